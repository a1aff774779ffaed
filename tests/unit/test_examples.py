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
        "step 1, cycle 1, accumulate 1/4, scoring 17408 entries, last selected none yet",
        "step 5, cycle 1, subnetwork 1/4, selected 30.1%",
        "step 9, cycle 2, accumulate 1/4",
        "step 24, cycle 3, subnetwork 4/4, selected 30.1% of 17408 entries, frozen entries unmoved",
        "engaged: True, frozen entries moved: False",
        "BertForSequenceClassification",
    ],
    "trainer.py": [
        "step 4: cycle 1, accumulate, selected None",
        "step 8: cycle 1, subnetwork, selected 0.30",
        "step 12: cycle 2, accumulate",
        "step 16: cycle 2, subnetwork",
        "step 16, cycle 2, subnetwork 4/4",
    ],
    "trainer_resume.py": [
        "interrupted at DPS adapter 'default': step 8, cycle 1, subnetwork 4/4, selected 30.1%",
        "resumed, ended at DPS adapter 'default': step 16, cycle 2, subnetwork 4/4, selected 30.1%",
        "frozen entries unmoved",
        "as if never interrupted, bit for bit: True",
    ],
    "accelerate_loop.py": ["step 16, cycle 2, subnetwork 4/4, selected 30.1%", "loaded DPS"],
}


def test_no_example_is_forgotten():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example_runs_and_engages(name, tmp_path):
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")},
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / name],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    position = 0
    for promised in EXPECTED[name]:
        position = run.stdout.find(promised, position)
        assert position >= 0, f"{promised!r} not printed, but:\n{run.stdout}"
    assert not list(tmp_path.iterdir())
