from __future__ import annotations

import errno
import gc
import os
import tempfile
from pathlib import Path

import pytest
import torch

from peft_dps.errors import EngineError
from peft_dps.masking.effective import NoisyWeight
from peft_dps.tensors.file import on_disk


def anonymous_bytes():
    """Memory of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bits_dtype_and_shape_survive(dtype):
    tensor = torch.randn(3, 5, 7).to(dtype)
    tensor[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0], dtype=dtype)
    stored = on_disk(tensor)
    assert (stored.dtype, stored.shape, stored.stride()) == (dtype, tensor.shape, tensor.stride())
    assert torch.equal(stored.view(torch.uint8), tensor.view(torch.uint8))
    assert stored.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize(
    "tensor", [torch.randn(6, 4).t(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)]
)
def test_layouts_survive(tensor):
    stored = on_disk(tensor)
    assert torch.equal(stored, tensor)
    assert stored.stride() == tensor.stride()


def test_views_with_gaps_are_packed():
    tensor = torch.randn(6, 8)[:, ::2]
    assert torch.equal(on_disk(tensor), tensor)


def test_no_file_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stored = on_disk(torch.ones(4))
    assert list(tmp_path.iterdir()) == []
    stored.add_(1)
    assert torch.equal(stored, torch.full((4,), 2.0))


def test_memory_is_freed():
    tensor = torch.randn(16 << 20)  # so large that malloc gives it back at once, whatever it has learned from others
    gc.collect()
    before = anonymous_bytes()
    tensor = on_disk(tensor)
    gc.collect()
    assert before - anonymous_bytes() > 48 << 20
    assert torch.isfinite(tensor).all()


def test_noise_takes_the_pretrained_weight_from_another_device():
    noisy = NoisyWeight(torch.randn(3, 4), torch.ones(4, device="meta"), 0.5)
    assert noisy.of(torch.empty(3, 4, device="meta")).device.type == "meta"


@pytest.mark.parametrize("size", [0, 10])
def test_a_full_disk_is_told_before_anything_is_written(monkeypatch, size):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    tensor = torch.rand(size)
    if size == 0:
        assert torch.equal(on_disk(tensor), tensor)
        return
    with pytest.raises(EngineError, match=r"no room for 0 MiB of weights in .* Set TMPDIR"):
        on_disk(tensor)


def test_a_file_system_that_cannot_reserve_is_used_all_the_same(monkeypatch):
    def unable(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unable)
    tensor = torch.rand(10)
    assert torch.equal(on_disk(tensor), tensor)
