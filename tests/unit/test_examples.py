"""Each example runs as a user would run it, and its output shows that DPS engaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPECTED = {
    "plain_loop.py": [
        "step 10, cycle 1, accumulate 10/10, scoring 17408 entries, last selected none yet",
        "step 20, cycle 1, subnetwork 10/10, selected 70.0%",
        "step 30, cycle 2, accumulate 10/10",
        "step 40, cycle 2, subnetwork 10/10, selected 70.0% of 17408 entries, frozen entries unmoved",
        "engaged: True, frozen entries moved: False",
        "BertForSequenceClassification",
    ],
    "trainer.py": [
        "step 10: cycle 1, accumulate, selected None",
        "step 20: cycle 1, subnetwork, selected 0.70",
        "step 30: cycle 2, accumulate",
        "step 40: cycle 2, subnetwork",
        "step 40, cycle 2, subnetwork 10/10",
    ],
    "trainer_resume.py": [
        "interrupted at DPS adapter 'default': step 18, cycle 1, subnetwork 8/10, selected 70.0%",
        "resumed, ended at DPS adapter 'default': step 40, cycle 2, subnetwork 10/10, selected 70.0%",
        "frozen entries unmoved",
        "as if never interrupted, bit for bit: True",
    ],
    "own_score.py": ["subnetwork 10/10, selected 70.", "the loss falls: True"],
    "four_bits_to_lora.py": [
        "step 12, cycle 1, subnetwork 9/-, selected 5.6%",
        "the loss falls: True",
        "resumed after step 2, bit for bit: True",
        "resumed after step 6, bit for bit: True",
        "a LoRA of rank 4",
        "served without peft_dps: True, largest difference below 1e-5: True",
    ],
    "two_tasks.py": [
        "DPS adapter 'A': step 120",
        "DPS adapter 'B': step 120",
        "pretrained",
        "A + B",
        "in its weaker task the sum is ahead of each adapter: True",
    ],
    "fsdp2.py": [],  # only by torchrun, below
    "accelerate_loop.py": ["step 80, cycle 2, subnetwork 20/20, selected 70.0%", "loaded DPS"],
}
ON_TWO_PROCESSES = {
    "fsdp2.py": [
        "step 40, cycle 2, subnetwork 10/10, selected 70.0% of 17408 entries",
        "frozen entries unmoved",
        "loaded DPS",
    ],
    "accelerate_loop.py": ["step 40, cycle 2, subnetwork 10/10, selected 70.0%", "loaded DPS"],
}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]


def test_no_example_is_forgotten():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(name for name in EXPECTED if EXPECTED[name]))
def test_example_runs_and_engages(name, tmp_path):
    run_example([], name, EXPECTED[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ON_TWO_PROCESSES))
def test_example_runs_on_two_processes(name, tmp_path):
    run_example(TORCHRUN, name, ON_TWO_PROCESSES[name], tmp_path, ACCELERATE_USE_CPU="true")


def run_example(launcher, name, expected, tmp_path, **variables):
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")},
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    run = subprocess.run(
        [sys.executable, *launcher, ROOT / "examples" / name],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    position = 0
    for promised in expected:
        position = run.stdout.find(promised, position)
        assert position >= 0, f"{promised!r} not printed, but:\n{run.stdout}"
    assert not list(tmp_path.iterdir())
