"""Starts workers in several processes on 127.0.0.1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent / "distributed"


def torchrun(worker: str, *arguments: str, processes: int = 2, fails: bool = False) -> str:
    """Run a file of tests/distributed on every rank, and return what all of them said."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        *(str(HERE / worker), *arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (run.returncode != 0) is fails, run.stderr[-6000:]
    return run.stdout + run.stderr
