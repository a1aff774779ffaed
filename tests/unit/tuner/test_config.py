from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftConfig, TaskType

from peft_dps import DPSConfig
from peft_dps.errors import ConfigError, DPSError
from peft_dps.selection.scores import SCORES

NOT_DEFAULT = {
    "target_modules": {"query", "value"},
    "target_parameters": ["experts.down_proj"],
    "exclude_modules": {"pooler"},
    "variant": "mix",
    "density": 0.25,
    "budget": "units",
    "schedule": "once",
    "stage_steps": 12,
    "score_steps": 0,
    "granularity": "block",
    "reduction": "sum",
    "total_steps": 300,
    "scope": "model",
    "frozen": "gradient",
    "score": "random",
    "noise": "columns",
    "evidence": "absolute_gradient",
    "score_dtype": "bfloat16",
    "participation_decay": True,
    "train_bias": False,
    "train_remaining": True,
    "offload_base": True,
    "modules_to_save": ["classifier"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layer",
    "seed": 7,
    "init_weights": False,
    "task_type": "SEQ_CLS",
}
LEAN = {"lean": True}  # which has no scores to choose a dtype for
COMPACT = {"storage": "compact", "units": 4, "max_density": 0.5, "granularity": "row"}  # nothing of which is a copy

REFUSED = [
    # field, bad value, what the message says, field and value included
    ("target_modules", None, "`target_modules` must name modules or be 'all-linear', got None"),
    ("target_modules", [], "`target_modules` must name modules or be 'all-linear', got "),
    ("target_modules", "", "`target_modules` must name modules or be 'all-linear', got ''"),
    ("variant", "Dense", "`variant` must be one of 'dense', 'mix', got 'Dense'"),
    ("variant", None, "`variant` must be one of 'dense', 'mix', got None"),
    ("scope", "layer", "`scope` must be one of 'tensor', 'category', 'model', got 'layer'"),
    ("scope", ["tensor"], "`scope` must be one of 'tensor', 'category', 'model', got ['tensor']"),
    ("budget", "flop", "`budget` must be one of 'entries', 'units', 'flops', got 'flop'"),
    ("frozen", True, "`frozen` must be one of 'gradient', 'scaled_gradient', 'exact', 'exact_in_step', got True"),
    ("frozen", "none", "`frozen` must be one of 'gradient', 'scaled_gradient', 'exact', 'exact_in_step', got 'none'"),
    ("score", "fisher", f"`score` must be one of {', '.join(map(repr, SCORES))}, got 'fisher'"),
    *(("score_dtype", bad, f"`score_dtype` must be one of 'float32', 'bfloat16', got {bad!r}")
      for bad in ("float16", None, torch.bfloat16)),
    ("score", None, f"`score` must be one of {', '.join(map(repr, SCORES))}, got None"),
    *((name, bad, f"`{name}` must be True or False, got {bad!r}")
      for name in ("train_bias", "train_remaining", "lean", "offload_base", "init_weights")
      for bad in (1, 0, None, "all")),
    *(("density", bad, f"`density` must be in (0, 1], got {bad!r}")
      for bad in (0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf, True, None, "0.5")),
    *(("stage_steps", bad, f"`stage_steps` as a fraction of all steps must be in (0, 1), got {bad!r}")
      for bad in (0.0, 1.0, -0.05, 20.0, math.nan, math.inf)),
    *(("stage_steps", bad, f"`stage_steps` as a number of steps must be at least 1, got {bad!r}") for bad in (0, -3)),
    *(("stage_steps", bad, f"`stage_steps` must be an int (steps) or a float (fraction), got {bad!r}")
      for bad in (True, False, "5%")),
    *(("total_steps", bad, f"`total_steps` must be an integer of at least 2, got {bad!r}")
      for bad in (1, 0, -1, 100.0, True, "100")),
    *(("seed", bad, f"`seed` must be an integer of at least 0, got {bad!r}") for bad in (-1, 1.0, None, False)),
    ("participation_decay", 1, "`participation_decay` must be True, False or None, got 1"),
    ("participation_decay", "no", "`participation_decay` must be True, False or None, got 'no'"),
    ("layers_pattern", "h", "`layers_pattern='h'` needs `layers_to_transform`"),
]  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """Save a config and return its folder; keywords are written into the file beside its fields."""

    def save(config: DPSConfig, **more) -> str:
        config.save_pretrained(str(tmp_path))
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
        return str(tmp_path)

    return save


# --- fields ---


def test_the_defaults_are_the_papers():
    config = DPSConfig()
    assert config.lean is False
    assert {name: getattr(config, name) for name in NOT_DEFAULT} == {
        "target_modules": "all-linear",
        "target_parameters": None,
        "exclude_modules": None,
        "variant": "dense",
        "density": 0.7,
        "budget": "entries",
        "schedule": "cycle",
        "stage_steps": None,  # the paper's 0.05, where the number of steps is known
        "score_steps": 8,
        "granularity": "entry",
        "reduction": "mean",
        "evidence": None,
        "total_steps": None,
        "scope": "tensor",
        "frozen": "exact",
        "score": "squared_gradient",
        "noise": None,
        "score_dtype": "float32",
        "participation_decay": None,
        "train_bias": True,
        "train_remaining": False,
        "offload_base": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "seed": 0,
        "init_weights": True,
        "task_type": None,
    }


@pytest.mark.parametrize(("field", "value", "message"), REFUSED, ids=lambda value: repr(value)[:40])
def test_a_bad_value_is_refused_by_field_and_value(field, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        DPSConfig(**{field: value})


def test_every_field_of_ours_is_documented_in_the_docstring_and_in_its_help():
    ours = set(DPSConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    text = inspect.cleandoc(DPSConfig.__doc__).partition("Raises:")[0]
    documented = set(re.findall(r"^ {4}(\w+): ", text, re.MULTILINE))
    assert documented == ours
    assert all(DPSConfig.__dataclass_fields__[name].metadata["help"] for name in ours)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"units": 2}, "or of weights or blocks of the model, and `granularity` is 'entry'"),
        ({"units": 2, "granularity": "row", "scope": "model"}, "and `scope` is 'model'"),
        ({"units": 2, "granularity": "row", "scope": "category"}, "and `scope` is 'category'"),
        ({"evidence": "none"}, "`evidence='none'` gathers nothing, and `score='squared_gradient'` is made of"),
        ({"budget": "units"}, "`budget='units'` counts whole weights, and `granularity='entry'` selects parts"),
        ({"budget": "flops", "granularity": "row"}, "`budget='flops'` counts whole weights"),
        ({"granularity": "tensor", "scope": "tensor"}, "`granularity='tensor'` selects whole weights"),
        ({"granularity": "block", "scope": "category"}, "`scope='category'` ranks them apart"),
        ({"granularity": "tensor", "scope": "category", "budget": "flops"}, "`scope='category'` chooses within parts"),
        ({"granularity": "tensor", "budget": "flops", "units": 1}, "`units=1` counts units, and `budget` is 'flops'"),
        ({"granularity": "tensor", "budget": "flops"}, "`budget='flops'` does not go with `train_bias=True`"),
        ({"granularity": "tensor", "budget": "flops", "train_bias": False, "train_remaining": True},
         "`budget='flops'` does not go with `train_remaining=True`"),
        ({"granularity": "tensor", "budget": "flops", "train_bias": False, "target_parameters": ["experts.w"]},
         "`budget='flops'` does not go with `target_parameters=['experts.w']`"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_or_counted_is_refused(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        DPSConfig(**fields)


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_units_may_be_weights_or_blocks_of_the_model(granularity):
    assert DPSConfig(granularity=granularity, units=2).scope == "model"
    assert DPSConfig(granularity=granularity, budget="flops", train_bias=False).recipe().budget.in_flops


def test_layer_numbers_beside_a_regular_expression_are_refused():
    with pytest.raises(ConfigError, match=r"`layers_to_transform` works with.*got the regular expression 'h\.1\.x'"):
        DPSConfig(target_modules="h.1.x", layers_to_transform=[1])


def test_a_dtype_of_scores_beside_lean_is_refused():
    with pytest.raises(ConfigError, match=r"`score_dtype='bfloat16'` has nothing to do with `lean=True`"):
        DPSConfig(score_dtype="bfloat16", **LEAN)


@pytest.mark.parametrize("targets", ["all-linear", ["query"]])
def test_layer_numbers_beside_names_are_accepted(targets):
    assert DPSConfig(target_modules=targets, layers_to_transform=1, layers_pattern="h").layers_to_transform == 1


@given(st.floats(0.0, 1.0, exclude_min=True))
def test_every_density_above_zero_up_to_one_is_accepted(density):
    assert DPSConfig(density=density).density == density


def test_int_one_is_a_density():
    assert DPSConfig(density=1).density == 1


@given(st.one_of(st.integers(1), st.floats(0.0, 1.0, exclude_min=True, exclude_max=True)))
def test_every_positive_int_and_every_proper_fraction_is_a_stage_length(stage_steps):
    kept = DPSConfig(stage_steps=stage_steps).stage_steps
    assert kept == stage_steps
    assert type(kept) is type(stage_steps)


def test_config_errors_are_value_errors_and_errors_of_ours():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, DPSError)


def test_the_peft_type_cannot_be_another():
    assert DPSConfig(peft_type="LORA").peft_type == "DPS"


def test_pefts_own_validation_still_runs():
    with pytest.raises(ValueError, match="Invalid task type: 'NONSENSE'"):
        DPSConfig(task_type="NONSENSE")
    assert DPSConfig(task_type=TaskType.SEQ_CLS).task_type == "SEQ_CLS"


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_lists_of_modules_become_sets_and_expressions_stay(field):
    assert getattr(DPSConfig(**{field: ["a", "b", "a"]}), field) == {"a", "b"}
    assert getattr(DPSConfig(**{field: {"a"}}), field) == {"a"}
    assert getattr(DPSConfig(**{field: r".*\.a"}), field) == r".*\.a"


def test_tuples_are_lists():
    config = DPSConfig(
        target_parameters=("a",), modules_to_save=("b",), layers_to_transform=(0, 1), layers_pattern=("layers",)
    )
    lists = (config.target_parameters, config.modules_to_save, config.layers_to_transform, config.layers_pattern)
    assert lists == (["a"], ["b"], [0, 1], ["layers"])


# --- to a file and back ---


@pytest.mark.parametrize("cls", [DPSConfig, PeftConfig])
@pytest.mark.parametrize(
    "fields", [{}, NOT_DEFAULT, LEAN, COMPACT], ids=["defaults", "other values", "lean", "compact"]
)
def test_a_saved_config_comes_back(cls, fields, saved):
    config = DPSConfig(**fields)
    loaded = cls.from_pretrained(saved(config))
    assert type(loaded) is DPSConfig
    assert loaded == config


def test_no_field_is_missing_from_the_round_trip():
    ours = set(DPSConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert ours <= {*NOT_DEFAULT, *LEAN, *COMPACT}
    default = DPSConfig()
    assert not [name for name, value in (NOT_DEFAULT | LEAN | COMPACT).items() if getattr(default, name) == value]


def test_the_file_names_the_tuner_in_plain_text(tmp_path):
    DPSConfig(target_modules=["a"]).save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "DPS"
    assert written["target_modules"] == ["a"]


@pytest.mark.parametrize("stage_steps", [1, 0.5, None])
def test_steps_and_fractions_are_told_apart_after_loading(stage_steps, saved):
    loaded = DPSConfig.from_pretrained(saved(DPSConfig(stage_steps=stage_steps)))
    assert type(loaded.stage_steps) is type(stage_steps)


@pytest.mark.parametrize("cls", [DPSConfig, PeftConfig])
def test_a_field_from_a_newer_version_is_left_out_with_a_warning(cls, saved):
    config = DPSConfig(**NOT_DEFAULT)
    folder = saved(config, field_of_the_future=3)
    with pytest.warns(UserWarning, match=r"\['field_of_the_future'\] for class DPSConfig, these are ignored"):
        loaded = cls.from_pretrained(folder)
    assert loaded == config


def test_a_bad_value_in_a_file_is_refused_too(saved):
    folder = saved(DPSConfig(), density=1.5)
    with pytest.raises(ConfigError, match=re.escape("`density` must be in (0, 1], got 1.5")):
        PeftConfig.from_pretrained(folder)


def test_to_dict_has_every_field_and_makes_the_config_again():
    config = DPSConfig(**NOT_DEFAULT)
    fields = config.to_dict()
    assert set(fields) == set(DPSConfig.__dataclass_fields__)
    assert DPSConfig(**fields) == config


# --- copies ---


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])  # noqa: S301
def test_copies_and_pickles_are_equal_configs(copied):
    config = DPSConfig(**NOT_DEFAULT)
    other = copied(config)
    assert other is not config
    assert other == config
    assert other.peft_type is config.peft_type


def test_a_deep_copy_shares_nothing():
    config = DPSConfig(target_modules=["a"])
    copy.deepcopy(config).target_modules.add("b")
    assert config.target_modules == {"a"}


def test_making_a_config_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DPSConfig(**NOT_DEFAULT)
