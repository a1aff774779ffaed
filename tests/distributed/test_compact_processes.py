"""Compact adapters in several processes on 127.0.0.1, with gloo."""

from __future__ import annotations

import pytest

from tests.launching import torchrun


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp1"])
def test_compact_adapters_equal_one_process(engine):
    torchrun("compact_worker.py", engine)


@pytest.mark.slow
@pytest.mark.supports(
    "Training", "tensor parallelism beside compact columns and rows (torch's and transformers' plans): as one process"
)
def test_tensor_parallelism_equals_one_process(tmp_path):
    parts = ("equals_one_process", "files_are_those_of_one_process", "a_plan_of_transformers")
    torchrun("tensor_parallel_worker.py", str(tmp_path), *parts, "others_are_refused_by_name")


@pytest.mark.slow
@pytest.mark.supports("Training", "tensor parallelism with DDP or FSDP2 over the other axis of a mesh: as one process")
def test_tensor_parallelism_with_replicas_equals_one_process(tmp_path):
    torchrun("tensor_parallel_worker.py", str(tmp_path), "replicas_equal_one_process_too", processes=4)
