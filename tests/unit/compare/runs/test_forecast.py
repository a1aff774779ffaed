from __future__ import annotations

from peft_dps.compare.runs.forecast import forecast
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.run import Timing
from peft_dps.compare.settings import Settings

SIZES = {"train": 100, "validation": 32, "test/here": 160, "test/far": 320}
TIMING = Timing("tiny", "cola", 16, 8, {"full": [9.0, 2.0, 1.0]}, loading=5.0)


def plan(**fields):
    return Plan("full", 1e-4, "cola", 0, "tiny", settings=Settings(epochs=2, evaluations=3), **fields)


def test_a_run_takes_its_steps_and_a_third_of_one_for_each_batch_of_evaluation():
    assert forecast(plan(phase="tune"), SIZES, TIMING) == 5 + 2 * (14 + (32 / 16) / 3)
    assert forecast(plan(), SIZES, TIMING) == 5 + 2 * (14 + ((3 * 32 + 480) / 16) / 3)
