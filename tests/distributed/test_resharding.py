"""A training goes from one number of processes to another, and is to the bit the one that nothing interrupted."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from tests import needs
from tests.distributed.fsdp_worker import batches, everything, make_model, optimizer_of
from tests.distributed.reshard_worker import train
from tests.launching import torchrun
from tests.resuming import assert_same

MIX, LEAN, MODEL = {"variant": "mix"}, {"lean": True}, {"scope": "model"}
# The nets have weights whose rows the processes hold unevenly, and of the smallest the third process holds none.
PLANS = [
    {},
    {**MIX, **MODEL, "participation_decay": True},
    {"frozen": "gradient", "score_dtype": "bfloat16"},
    {**MIX, "frozen": "gradient"},
    {**LEAN, "score": "absolute_gradient"},
    {**LEAN, **MIX},
    {**MODEL, "score": "random"},
    {"granularity": "row", **MODEL, **MIX},
    {"granularity": "column", **LEAN},
    {"granularity": "column", **MODEL, **MIX},
    {"granularity": "tensor"},
    {"granularity": "block", **MIX},
    {"granularity": "block", **LEAN, "reduction": "sum"},
    {"schedule": "once", "score_steps": 3},
    {**MIX, "target_modules": ["words", "conv", "head"]},
]
# Stages are 3 steps long: from 2 processes in ACCUMULATE to 3, to 1 in SUBNETWORK, to 2 in the next ACCUMULATE.
HOPS = [(2, 2), (3, 4), (1, 8), (2, 11)]


@needs.fsdp2
@pytest.mark.slow
@pytest.mark.supports("Training", "resuming to the bit, FSDP2 with another number of processes, and one process")
def test_two_processes_then_three_then_one_then_two_are_one_uninterrupted_training(tmp_path):
    for index, fields in enumerate(PLANS):
        (tmp_path / f"{index:02d}").mkdir()
        (tmp_path / f"{index:02d}" / "plan.json").write_text(json.dumps(fields))
    start = 0
    for processes, stop in HOPS:
        torchrun("reshard_worker.py", str(tmp_path), str(start), str(stop), processes=processes)
        start = stop
    for index, fields in enumerate(PLANS):
        model = make_model(fields)
        optimizer, start = optimizer_of(model), 0
        for _, stop in HOPS:
            train(model, optimizer, batches(stop)[start:])
            assert_same(load_file(tmp_path / f"{index:02d}" / f"{stop}.safetensors"), everything(model))
            start = stop
        assert model.dps_status().engaged
