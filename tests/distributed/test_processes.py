"""Trainings in several processes on 127.0.0.1, with gloo."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from tests import needs
from tests.launching import torchrun
from tests.resuming import Training, assert_same

MIX = {"variant": "mix"}
OFFLOADED = {"offload_base": True}
LEAN = {"lean": True}
LT_SFT = {"schedule": "two-phase", "score": "movement", "scope": "model"}


@pytest.mark.supports("Training", "DDP: as one process")
@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "mix", "lt_sft", "scored", "mixconnect"])
def test_ddp_ranks_agree_and_equal_one_process(method):
    torchrun("ddp_worker.py", method)


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


@needs.fsdp2
@pytest.mark.slow
@pytest.mark.supports("Training", "FSDP2 (`fully_shard`), hybrid too: as one process")
@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        pytest.param(
            2,
            [
                {"micro": 2},
                {"fields": MIX},
                {"fields": {**MIX, "scope": "model", "participation_decay": True}, "recompute": True, "micro": 2},
                {"fields": MIX, "sharding": {"reshard_after_forward": False}, "clip": 0.1},
                {"fields": {"score": "magnitude"}},
                {"fields": {"score": "low_rank_residual", "scope": "model"}},
            ],
            id="2",
        ),
        pytest.param(
            2,
            [
                {"fields": OFFLOADED, "micro": 2},
                {"fields": {**OFFLOADED, **MIX}, "sharding": {"reshard_after_forward": False}},
                {
                    "fields": {**OFFLOADED, **MIX, "target_modules": ["words", "conv", "head"]},
                    "blocks": ["words", "conv", "head"],
                },
                {"fields": {**OFFLOADED, **MIX}, "recompute": True, "blocks": []},
                {"fields": LEAN, "micro": 2},
                {"fields": {**LEAN, **MIX, "scope": "model"}},
                {"sharding": {"on_host": True}, "clip": 0.1},
                {"fields": {**OFFLOADED, **MIX}, "sharding": {"on_host": True}, "micro": 2},
            ],
            id="2-offloaded",
        ),
        pytest.param(
            2,
            [
                {"fields": LT_SFT, "micro": 2},
                {"fields": LT_SFT, "sharding": {"reshard_after_forward": False}, "recompute": True, "clip": 0.1},
                {"fields": LT_SFT, "blocks": []},
                {"fields": {**LT_SFT, "scope": "tensor", "offload_base": True}},
                {"fields": LT_SFT, "base_apart": True},
                {
                    "fields": {"frozen": "scaled_gradient", "schedule": "every", "score_steps": 0, "score": "random"},
                    "micro": 2,
                },
                {"fields": {"noise": "mixout", "schedule": "once", "score_steps": 3}, "micro": 2},
                {
                    "fields": {
                        "noise": "mixconnect",
                        "schedule": "once",
                        "score_steps": 3,
                        "target_modules": ["words", "conv", "head"],
                    },
                    "blocks": ["words", "conv", "head"],
                },
            ],
            id="2-other-recipes",
        ),
        pytest.param(
            3,
            [
                {
                    "micro": 2,
                    "clip": 0.1,
                    "optimizer": {"foreach": True},
                    "sharding": {"reshard_after_forward": False},
                },
                {"fields": MIX, "blocks": [], "optimizer": {"fused": True}},
                {"fields": {**MIX, "target_modules": ["words", "conv", "head"]}, "blocks": ["words", "conv", "head"]},
                {"fields": {"score": "random", "scope": "model"}, "base_apart": True},
            ],
            id="3-uneven",
        ),
        pytest.param(
            4,
            [
                {"fields": {"score": "random"}},
                {"fields": {**MIX, "frozen": "gradient"}},
                {"fields": {"scope": "model"}, "sharding": {"mesh": [2, 2], "names": ["replicate", "shard"]}},
                {"worker": "tensor_parallel_worker", "part": "replicas_equal_one_process_too"},
            ],
            id="4-empty-hybrid-and-split",
        ),
    ],
)
def test_fsdp2_equals_one_process(processes, settings):
    torchrun("fsdp_worker.py", json.dumps(settings), processes=processes)


@needs.fsdp2
@pytest.mark.slow
@pytest.mark.refuses(
    "Training", "copies: FSDP1, tensor parallelism", "processes hold parts that are not rows of a weight"
)
def test_an_error_of_one_rank_is_one_of_all_and_other_engines_are_refused_by_name():
    torchrun("failures_worker.py")


@needs.fsdp2
@pytest.mark.slow
@pytest.mark.supports(
    "Training", "FSDP2: state dicts, saving, resuming to the bit, mixed precision, Accelerate's loading"
)
def test_what_surrounds_a_training_under_fsdp2(tmp_path):
    torchrun("engine_worker.py", str(tmp_path))
