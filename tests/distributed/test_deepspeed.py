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
    assert outcome in run("deepspeed_worker.py", zero_stage, dtype)


@pytest.mark.slow
@pytest.mark.supports(
    "Training", "compact storage selected once, DeepSpeed ZeRO-1, 2 and 3 (the test needs `deepspeed`, or skips)"
)
@pytest.mark.parametrize(("zero_stage", "dtype"), [(1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16")])
def test_compact_adapters_train_as_alone_and_are_not_selected_anew(zero_stage, dtype):
    said = run("deepspeed_compact_worker.py", zero_stage, dtype)
    assert "Use `schedule='once'`" in said
    assert "trained" in said


def run(worker: str, zero_stage: int, dtype: str) -> str:
    pytest.importorskip("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / worker), str(zero_stage), dtype, str(port)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
