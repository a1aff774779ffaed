"""Trainings in two processes on 127.0.0.1, with gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.resuming import Training, assert_same

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


@pytest.mark.supports("Training", "DDP: as one process")
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_ddp_ranks_agree_and_equal_one_process(variant):
    torchrun("ddp_worker.py", variant)


@pytest.mark.slow
def test_ddp_resumes_bitwise(tmp_path):
    torchrun("ddp_resume_worker.py", "train", str(tmp_path))
    torchrun("ddp_resume_worker.py", "resume", str(tmp_path))
    for variant in ("dense", "mix"):
        ours, theirs = (load_file(tmp_path / variant / f"{mode}.safetensors") for mode in ("resume", "train"))
        assert_same(ours, theirs)
        alone = Training.resumed(tmp_path / variant)  # one process may go on with what two have saved
        assert alone.model.dps_status().steps == 5
        alone.run(14)
        assert not alone.model.dps_status().frozen_moved


@pytest.mark.slow
def test_sharded_weights_are_refused_by_name():
    torchrun("sharded_worker.py")
