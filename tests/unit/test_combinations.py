"""Axes combine freely: a combination trains and keeps its promises, or is refused by the name of a field."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from peft_dps import DPSConfig, dps_adapter
from peft_dps.errors import ConfigError
from peft_dps.masking.frozen_policy import FROZEN
from peft_dps.masking.noise import NOISES
from peft_dps.masking.storage import STORAGES
from peft_dps.selection.budget import BUDGETS
from peft_dps.selection.evidence import EVIDENCE
from peft_dps.selection.granularity import GRANULARITIES
from peft_dps.selection.schedule import SCHEDULES
from peft_dps.selection.scope import SCOPES
from peft_dps.selection.scores import SCORES
from peft_dps.tuner.adapter import find_controller

STEPS, STOP = 9, 5
MOVES_FROZEN = [FROZEN.find(name) for name in FROZEN if "gradient" in name]  # by momentum and decay
LEARNING_RATE, DECAY = 1e-2, 0.1


class Block(nn.Module):
    """Attention without softmax, and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "value", "output")})
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attn = self.attn
        x = x + attn["output"](torch.sigmoid(attn["query"](x)) * attn["value"](x))
        return x + self.mlp(x)


class Model(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


TARGETS = r"blocks\..*(query|value|output|mlp\.[02])|head"


def base() -> Model:
    torch.manual_seed(0)
    return Model()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 8, generator=generator), torch.randint(3, (6,), generator=generator)


def loss_of(model: nn.Module, examples: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(examples[0]), examples[1])


def ours(registry: Any) -> list[str]:
    """Return the names that other tests have not added."""
    return sorted(name for name in registry if registry.find(name).__module__.startswith("peft_dps."))


FREE = {
    "storage": st.sampled_from(ours(STORAGES)),
    "granularity": st.sampled_from(ours(GRANULARITIES)),
    "schedule": st.sampled_from(ours(SCHEDULES)),
    "score": st.sampled_from(ours(SCORES)),
    "evidence": st.sampled_from(ours(EVIDENCE)),
    "scope": st.sampled_from(ours(SCOPES)),
    "budget": st.sampled_from(ours(BUDGETS)),
    "frozen": st.sampled_from(ours(FROZEN)),
    "noise": st.sampled_from(ours(NOISES)),
    "density": st.sampled_from([0.1, 0.3, 0.7, 1.0]),
    "units": st.sampled_from([1, 2]),
    "stage_steps": st.sampled_from([1, 2, 3]),
    "score_steps": st.sampled_from([0, 1, 2]),
    "reduction": st.sampled_from(["mean", "sum"]),
    "train_bias": st.booleans(),
    "seed": st.integers(0, 3),
}


@st.composite
def fields(draw: Any) -> dict[str, Any]:
    """Draw fields that have an effect on each other, and at times one more that may be anything."""
    names = {"storage", "granularity", "schedule", "train_bias", "seed"}
    drawn = {name: draw(FREE[name]) for name in sorted(names)}
    kind, steps = GRANULARITIES.find(drawn["granularity"]), drawn["schedule"] in ("once", "every")
    drawn["stage_steps"] = 3 if drawn["schedule"] == "every" else draw(FREE["stage_steps"])
    wanted = ["density", "score", *(["score_steps"] if steps else []), *([] if kind.per_entry else ["reduction"])]
    if drawn["storage"] == "copy":
        wanted += [draw(st.sampled_from(["frozen", "noise", "evidence"]))]
    wanted += [draw(st.sampled_from(["scope", "budget" if kind.spans_weights else "score"]))]
    drawn |= {name: draw(FREE[name]) for name in wanted}
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from(sorted(FREE)))
        drawn[name] = draw(FREE[name])
    return drawn


class Training:
    """A model, its optimizer, and how far it is."""

    def __init__(self, config: DPSConfig) -> None:
        self.model = get_peft_model(base(), copy.deepcopy(config)).train()
        trained = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=DECAY)
        self.step = 0

    def begin(self) -> None:
        recipe = find_controller(self.model).recipe
        if recipe.evidence.looks and getattr(recipe.schedule, "score_steps", None) == 0:
            self.model.dps_score([batch(-1), batch(-2)], loss=loss_of)

    def run(self, until: int, check: Any = None) -> None:
        while self.step < until:
            loss_of(self.model, batch(self.step)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            if check is not None:
                check()

    def save(self, folder: Any) -> dict[str, Any]:
        self.model.save_dps_state(folder / "state.safetensors")
        adapter = {name: each.clone() for name, each in get_peft_model_state_dict(self.model).items()}
        return {"adapter": adapter, "optimizer": copy.deepcopy(self.optimizer.state_dict()), "step": self.step}

    def load(self, saved: dict[str, Any], folder: Any) -> None:
        set_peft_model_state_dict(self.model, saved["adapter"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.model.load_dps_state(folder / "state.safetensors")
        self.step = saved["step"]

    def weights(self) -> dict[str, torch.Tensor]:
        """Every target's weight as its layer computes with it in evaluation: without noise or a new phase."""
        layers = {each.name: each.layer for each in find_controller(self.model).existing}
        self.model.eval()
        found = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        self.model.train()
        return found


class Watch:
    """Looks, after each step, for entries outside of the mask that have moved, and for masks of another density."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.before = training.weights()
        self.masks: dict[str, torch.Tensor] = {}

    def __call__(self) -> None:
        training, now = self.training, self.training.weights()
        controller = find_controller(training.model)
        recipe, masks = controller.recipe, dps_adapter(training.model).masks()
        if controller.clock.position.phase.masked and recipe.frozen not in MOVES_FROZEN:
            for name, mask in masks.items():
                held = self.masks.get(name)
                if held is not None and torch.equal(held, mask):  # since before this step
                    assert torch.equal(now[name][~mask], self.before[name][~mask]), name
        if masks and controller.clock.position.phase.masked:
            self._check_size(recipe, masks, now)
        self.before, self.masks = now, {name: mask.clone() for name, mask in masks.items()}

    def _check_size(self, recipe: Any, masks: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
        if recipe.budget.takes_all or recipe.granularity.spans_weights:
            return
        units, names = self._units(recipe), list(weights)
        counts = [int(masks[name].count_nonzero()) for name in names]
        for problem in recipe.scope.problems(names):
            selected = sum(counts[index] for index in problem)
            if not recipe.scope.across:
                (index,) = problem
                assert selected == recipe.budget.count(units[index].count) * units[index].size, names[index]
                continue
            limit = recipe.budget.count(sum(weights[names[index]].numel() for index in problem))
            assert limit <= selected < limit + max(units[index].size for index in problem)

    def _units(self, recipe: Any) -> list[Any]:
        return [recipe.granularity.units(each.layout) for each in find_controller(self.training.model).existing]


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(fields=fields())
def test_a_combination_trains_exactly_or_is_refused_by_name(fields, tmp_path_factory):
    folder = tmp_path_factory.mktemp("combination")
    refused = ""
    try:
        config = DPSConfig(target_modules=TARGETS, **fields)
        whole = Training(config)
        whole.begin()
    except ConfigError as error:
        refused = str(error)
    if refused:
        named = set(re.findall(r"`(\w+)", refused))
        assert named & set(fields), refused
        event(f"refused: {min(named & set(fields))}")
        return
    try:
        whole.run(STOP, Watch(whole))
    except ConfigError as error:  # of what only the model tells: what is trained besides, how many weights there are
        refused = str(error)
    if refused:
        assert re.match(r"`(density=0.1|units)`", refused), refused
        event("refused: density")
        return
    event("trained")
    saved = whole.save(folder)
    whole.run(STEPS, Watch(whole))
    resumed = Training(config)
    resumed.load(saved, folder)
    resumed.run(STEPS)
    for name, weight in whole.weights().items():
        assert torch.equal(resumed.weights()[name], weight), name
    whole.model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(base(), str(folder)).eval()
    inputs = batch(100)[0]
    assert torch.equal(loaded(inputs), whole.model.eval()(inputs))


def test_most_axes_meet_each_other():
    """The draws above are of some use only if many of them are not refused."""
    seen: dict[str, set[str]] = {"granularity": set(), "schedule": set(), "storage": set(), "score": set()}

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(fields=fields())
    def look(fields: dict[str, Any]) -> None:
        try:
            DPSConfig(target_modules=TARGETS, **fields)
        except ConfigError:
            return
        for axis, found in seen.items():
            found.add(fields[axis])

    look()
    assert seen["granularity"] == set(ours(GRANULARITIES))
    assert seen["schedule"] == set(ours(SCHEDULES))
    assert seen["storage"] == set(ours(STORAGES))
    assert seen["score"] >= {"squared_gradient", "absolute_gradient", "random"}
