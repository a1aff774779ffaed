from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import psutil
import pytest
import torch

from peft_dps.errors import EngineError
from peft_dps.masking.effective_weight import NoisyWeight
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


def test_nothing_is_memory_of_the_process_before_it_is_read():
    tensor = torch.ones(16 << 20)
    gc.collect()
    before = psutil.Process().memory_info().rss
    stored = on_disk(tensor)
    assert psutil.Process().memory_info().rss - before < 8 << 20
    assert stored.sum() == 16 << 20


def test_no_file_stays_open_for_a_weight():
    opened = psutil.Process().num_fds()
    stored = [on_disk(torch.full((10,), float(value))) for value in range(20)]
    assert psutil.Process().num_fds() == opened
    assert [each.unique().item() for each in stored] == list(range(20))


def test_the_file_is_gone_with_the_last_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mapped = Path("/proc/self/maps").read_text
    stored = on_disk(torch.ones(4))
    part = stored[:2]
    del stored
    assert str(tmp_path) in mapped()
    del part
    gc.collect()
    assert str(tmp_path) not in mapped()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python warns of forks beside threads
def test_a_forked_process_reads_it_too():
    stored = on_disk(torch.arange(10))
    child = os.fork()
    if child == 0:
        os._exit(0 if stored.tolist() == list(range(10)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), ()])
def test_shapes_without_room(shape):
    stored = on_disk(torch.ones(shape))
    assert stored.shape == torch.Size(shape)
    assert torch.equal(stored, torch.ones(shape))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("entries", [10, 1 << 20])
def test_a_full_disk_is_told_with_the_remedy(monkeypatch, entries):
    def full(**_):
        return Path("/dev/full").open("wb")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    with pytest.raises(
        EngineError, match=rf"{entries >> 18} MiB cannot be written into .* No space left .* Set TMPDIR to a folder on"
    ):
        on_disk(torch.rand(entries))


def test_a_folder_that_is_not_there_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    with pytest.raises(EngineError, match=r"cannot be written into '/no/such/folder': .* Set TMPDIR"):
        on_disk(torch.rand(4))
