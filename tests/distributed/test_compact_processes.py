"""Compact adapters in several processes on 127.0.0.1, with gloo."""

from __future__ import annotations

import pytest

from tests import needs
from tests.launching import torchrun


@pytest.mark.slow
@pytest.mark.supports("Training", "compact storage, {engine}: as one process")
@pytest.mark.parametrize("engine", ["DDP", pytest.param("FSDP2", marks=needs.fsdp2), "FSDP1"])
def test_compact_adapters_equal_one_process(engine):
    torchrun("compact_worker.py", engine.lower())


@pytest.mark.slow
@pytest.mark.supports(
    "Training", "tensor parallelism beside compact columns and rows (torch's and transformers' plans): as one process"
)
def test_tensor_parallelism_equals_one_process(tmp_path):
    torchrun("tensor_parallel_worker.py", str(tmp_path))
