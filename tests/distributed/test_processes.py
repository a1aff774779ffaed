"""Trainings in two processes on 127.0.0.1, with gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def torchrun(worker: str, *arguments: str) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        *(str(HERE / worker), *arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_ddp_ranks_agree_and_equal_one_process(variant):
    torchrun("ddp_worker.py", variant)


@pytest.mark.slow
def test_sharded_weights_are_refused_by_name():
    torchrun("sharded_worker.py")
