"""What DPS costs beside plain training, in counts that are the same on every machine.

Bounds are what the code needs now, and a little for what does not grow with the weights. One more pass over the
weights, or one more buffer of their size, is more than that. Lower them when the code needs less.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from peft import get_peft_model
from torch import nn

from benchmarks.live import LiveTensors
from benchmarks.memory import KINDS, tensor_bytes
from benchmarks.operators import Call, operators_of
from peft_dps import DPSConfig

WIDTH = 512
ENTRIES = WIDTH * WIDTH  # of each weight; as many as fit one piece of the work on a CPU
LAYERS = (2, 4, 8)
PLAIN = "plain"
# Names of the steps of two cycles with stages of two steps; the first step makes the optimizer's state.
STEPS = ("warm-up", "accumulate", "selecting", "subnetwork", "accumulate anew", "accumulate")
STATE = ("W0", "scores", "masks", "snapshots")


@dataclass(frozen=True)
class Limit:
    """Bounds of one kind of step, in excess of plain training. Bytes are per entry, in fp32.

    Attributes:
        calls: Operator calls for each weight.
        touched: Bytes that operators read or write.
        kept: Bytes that stay after the step.
        peak: Bytes at the step's peak with eight weights.
    """

    calls: int
    touched: float
    kept: float
    peak: float


LIMITS = {
    ("dense", "accumulate"): Limit(calls=1, touched=12, kept=8, peak=9.1),
    ("dense", "selecting"): Limit(calls=49, touched=155.6, kept=8.125, peak=10.7),
    ("dense", "subnetwork"): Limit(calls=6, touched=30.3, kept=8.125, peak=9.2),
    ("mix", "accumulate"): Limit(calls=16, touched=42.6, kept=8, peak=10.2),
    ("mix", "selecting"): Limit(calls=52, touched=190.5, kept=8.125, peak=10.2),
    ("mix", "subnetwork"): Limit(calls=9, touched=70.3, kept=8.125, peak=10.3),
    # Scores in bf16 and `frozen="gradient"`: nothing of the size of the weights is kept but W0.
    ("dense bf16", "accumulate"): Limit(calls=13, touched=24, kept=6, peak=7.1),
    ("dense bf16", "subnetwork"): Limit(calls=3, touched=13.2, kept=4.125, peak=5.1),
    # Frozen bits are alive while the optimizer steps: without activations, that is the peak.
    ("dense lean", "accumulate"): Limit(calls=0, touched=0, kept=0, peak=1.2),
    ("dense lean", "subnetwork"): Limit(calls=9, touched=47.5, kept=0.125, peak=5.4),
    ("mix lean", "accumulate"): Limit(calls=15, touched=30.6, kept=0, peak=2.2),
    ("mix lean", "subnetwork"): Limit(calls=9, touched=70.3, kept=4.125, peak=6.3),
}
SPECIAL = {"lean": {"lean": True}, "bf16": {"score_dtype": "bfloat16", "frozen": "gradient"}}
SLACK = 0.5  # bytes per entry; what is as large as a weight takes 1 (a mask) or more
CASES = pytest.mark.parametrize(("variant", "step"), LIMITS)


@dataclass(frozen=True)
class Measured:
    """What one step of a training did.

    Attributes:
        calls: Its operator calls.
        peak: Most bytes that were alive during it.
        kinds: Bytes that are kept after it, by kind.
    """

    calls: list[Call]
    peak: int
    kinds: dict[str, int]

    @property
    def touched(self) -> int:
        return sum(call.touched for call in self.calls)

    def count(self, name: str) -> int:
        return sum(call.name == name for call in self.calls)


def _config(variant: str, names: list[str]) -> DPSConfig:
    kind, *special = variant.split()
    fields = SPECIAL[special[0]] if special else {}
    return DPSConfig(target_modules=names, variant=kind, stage_steps=2, **fields)


@cache
def steps_of(variant: str, layers: int) -> dict[str, Measured]:
    """Train a net of equal linear layers for two cycles, and return what a step of each name did."""
    if layers > 1:
        steps_of(variant, 1)  # makes what is made once in a process
    torch.manual_seed(0)
    measured = {}
    with LiveTensors() as live:
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        if variant != PLAIN:
            names = [str(index) for index in range(layers)]
            model = get_peft_model(model, _config(variant, names))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        x = torch.randn(4, WIDTH, requires_grad=True)  # so that the first layer is like the others

        def step() -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        for name in STEPS:
            live.reset()
            measured[name] = Measured(operators_of(step), live.peak, tensor_bytes(model, optimizer))
    return measured


def excess(variant: str, step: str, layers: int, read) -> float:
    return read(steps_of(variant, layers)[step]) - read(steps_of(PLAIN, layers)[step])


@CASES
def test_operator_calls_grow_with_the_number_of_weights_alone(variant, step):
    few, some, many = (excess(variant, step, layers, lambda each: len(each.calls)) for layers in LAYERS)
    assert many - some == 2 * (some - few)
    assert (many - some) / 4 <= LIMITS[variant, step].calls


@CASES
def test_bytes_that_operators_touch(variant, step):
    few, some, many = (excess(variant, step, layers, lambda each: each.touched) for layers in LAYERS)
    per_entry = (many - some) / (4 * ENTRIES)
    assert per_entry == pytest.approx((some - few) / (2 * ENTRIES), abs=SLACK)
    assert per_entry <= LIMITS[variant, step].touched + SLACK


@CASES
def test_bytes_that_are_kept(variant, step):
    kinds = {kind: excess(variant, step, 8, lambda each, kind=kind: each.kinds[kind]) for kind in KINDS}
    assert {kind for kind, size in kinds.items() if size > 0} <= set(STATE)
    assert sum(kinds.values()) <= (LIMITS[variant, step].kept + SLACK) * 8 * ENTRIES
    assert kinds["W0"] == (0 if "lean" in variant else 4 * 8 * ENTRIES)
    if step == "accumulate":
        assert kinds["snapshots"] == 0
    else:
        assert kinds["scores"] <= SLACK * 8 * ENTRIES


@CASES
def test_bytes_at_the_peak(variant, step):
    assert excess(variant, step, 8, lambda each: each.peak) <= (LIMITS[variant, step].peak + SLACK) * 8 * ENTRIES


@CASES
def test_no_weight_is_sorted(variant, step):
    sorting = ("sort", "argsort", "msort", "topk", "kthvalue", "median", "quantile", "unique")
    calls = steps_of(variant, 8)[step].calls
    assert not [call for call in calls if call.largest >= ENTRIES and call.name.strip("_").startswith(sorting)]


@pytest.mark.parametrize("variant", ["dense", "mix"])
def test_steps_ask_for_no_number_for_each_weight(variant):
    asked = "_local_scalar_dense"
    for step in ("accumulate", "subnetwork", "accumulate anew"):
        few, many = (steps_of(variant, layers)[step].count(asked) for layers in (2, 8))
        assert few == many <= 1  # whether the gradients are finite
    assert steps_of(variant, 8)["selecting"].count(asked) <= 9 * 8


def test_the_counters_notice_one_more_pass_and_one_more_buffer():
    weight = torch.ones(ENTRIES)
    [call] = operators_of(lambda: weight.mul_(2.0))
    assert (call.name, call.touched, call.largest) == ("mul_", 4 * ENTRIES, ENTRIES)
    assert operators_of(lambda: weight.view(2, -1).t()) == []
    with LiveTensors() as live:
        copy = weight.clone()
        assert live.live == 2 * 4 * ENTRIES  # the weight too, since an operator has taken it
        del copy
        assert (live.live, live.peak) == (4 * ENTRIES, 2 * 4 * ENTRIES)
        live.reset()
        assert live.peak == 4 * ENTRIES
