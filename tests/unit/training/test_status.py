from __future__ import annotations

import sys
import threading

import pytest
from torch.optim import AdamW

from peft_dps import Stage
from tests.unit.conftest import train, trainable


@pytest.fixture
def _threads_take_turns_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_threads_take_turns_often")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"variant": "mix"},
        {"lean": True},
        {"frozen": "gradient"},
        {"variant": "mix", "frozen": "gradient", "lean": True},
        {"granularity": "row", "scope": "model"},
    ],
    ids=str,
)
def test_a_status_may_be_asked_for_by_another_thread_at_any_time(make_model, batches, fields):
    model = make_model(**{"stage_steps": 1, **fields})
    errors, seen, over = [], [], threading.Event()

    def poll():
        try:
            while not over.is_set():
                status = model.dps_status()
                seen.append((status.steps, status.stage, str(status)))
        except BaseException as error:  # noqa: BLE001  # whatever it is
            errors.append(error)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        optimizer = AdamW(trainable(model), lr=1e-2)
        train(model, optimizer, batches(40))
        model.set_dps_total_steps(40)
        train(model, optimizer, batches(10))
    finally:
        over.set()
        thread.join()
    assert not errors
    assert {stage for _, stage, _ in seen} >= {Stage.ACCUMULATE, Stage.SUBNETWORK}
    assert model.dps_status().steps == 10
