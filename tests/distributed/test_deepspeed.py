"""The real DeepSpeed, where it is installed; it is too heavy to be a requirement of the tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stage", "dtype", "outcome"),
    [
        (0, "fp32", "trained: 8 steps, engaged True, frozen moved False"),
        (1, "fp32", "managed by DeepSpeed"),
        (2, "fp32", "managed by DeepSpeed"),
        (3, "fp32", "managed by DeepSpeed"),
        (0, "bf16", "The engine updates copies of the weights"),
    ],
)
def test_zero_0_trains_and_the_others_are_refused_by_name(zero_stage, dtype, outcome):
    pytest.importorskip("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(HERE / "deepspeed_worker.py"), str(zero_stage), dtype, str(port)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert outcome in run.stdout
