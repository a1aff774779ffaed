"""The table of the methods. A method turns a pretrained model into one that is ready to train."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import peft
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_dps import DPSConfig, disable_dropout, recipes
from peft_dps.compare.methods.bitfit import apply_bitfit
from peft_dps.compare.methods.bottleneck import add_houlsby, add_pfeiffer
from peft_dps.compare.methods.head import head_modules
from peft_dps.compare.methods.wise_ft import average, prepare_wise_ft

Prepare = Callable[..., PreTrainedModel | PeftConfig]
"""Takes the model, and the method's options by keyword. Returns the model ready to train, or a PEFT config to wrap it
with."""
Finish = Callable[..., None]
"""Takes the trained model, the pretrained one with the same head before training, and the method's options."""

# A factor of about 3 between neighbours, and as many for every method.
FULL_RATES = (3e-5, 1e-4, 3e-4)
ADAPTER_RATES = (3e-4, 1e-3, 3e-3)
FEW_ENTRIES_RATES = (1e-3, 3e-3, 1e-2)
PEFT_PREFIX = "peft:"
RECIPE_PREFIX = "recipe:"
FAMILY = tuple(f"{RECIPE_PREFIX}{name}" for name in recipes.__all__)
"""Every method of `peft_dps.recipes`."""
DROPOUT = "dropout"
SEED = "seed"
NO_DROPOUT = "-nodropout"
REFERENCE = "full"
"""The method that the others are tested against, unless another is named."""


def usual_reference(variants: Sequence[str]) -> str:
    """Return which of some methods the others are tested against: full fine-tuning, or else the first."""
    return REFERENCE if REFERENCE in variants else next(iter(variants), REFERENCE)


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    Attributes:
        name: What the command line calls it.
        title: What tables and figures call it.
        prepare: Makes a pretrained model ready to train.
        learning_rates: Peak learning rates to choose from on the validation split.
        defaults: Options that hold unless the user sets them otherwise.
        only_config: Whether `prepare` also takes None in place of a model, which lets options be checked before any
            training.
        takes_seed: Whether `prepare` takes the seed of the run as its option "seed", unless the user sets one.
        finish: Changes the model in place after training; None if the method ends with it.
    """

    name: str
    title: str
    prepare: Prepare
    learning_rates: tuple[float, ...] = FULL_RATES
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only_config: bool = False
    takes_seed: bool = False
    finish: Finish | None = None

    def apply(
        self,
        model: PreTrainedModel,
        options: Mapping[str, Any],
        seed: int = 0,
        *,
        stage_steps: int | None = None,
        score_steps: int | None = None,
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Make a model ready to train.

        Args:
            model: The pretrained model with a new head; changed in place.
            options: Options of the method. "dropout": false sets the model's dropout to 0, for every method.
            seed: Seed of the run, for a method that takes it as an option.
            stage_steps: Steps of a stage of DPS, in place of what the options say.
            score_steps: Steps that a method which selects once scores in, likewise; if it scores.

        Returns:
            The model, and the method's configuration, ready for JSON.
        """
        seeded = {SEED: seed} if self.takes_seed else {}
        given = copy.deepcopy({DROPOUT: True, **seeded, **self.defaults, **options})  # PEFT writes into its lists
        with_dropout = given.pop(DROPOUT)
        if not with_dropout:
            disable_dropout(model)
        prepared = self.prepare(model, **given)
        config = {DROPOUT: with_dropout, **_plain(given)}
        if isinstance(prepared, DPSConfig) and stage_steps is not None:
            prepared.stage_steps = stage_steps
            if prepared.schedule in ("once", "every") and prepared.score_steps:
                prepared.score_steps = score_steps or prepared.score_steps
        if isinstance(prepared, PeftConfig):
            config.update(_plain(prepared.to_dict()))
            return get_peft_model(model, prepared), config
        return prepared, config

    def end(self, model: nn.Module, pretrained: Callable[[], PreTrainedModel], options: Mapping[str, Any]) -> bool:
        """Do what the method does after training; returns whether that changed the model.

        Args:
            model: The trained model; changed in place.
            pretrained: Returns the model as it was before.
            options: Options of the method.
        """
        if self.finish is None:
            return False
        given = {**self.defaults, **options}
        self.finish(model, pretrained(), **{name: value for name, value in given.items() if name != DROPOUT})
        return True

    def check(self, options: Mapping[str, Any]) -> None:
        """Check that the options work, as far as can be told without a model.

        Raises:
            ValueError: They do not.
        """
        if not isinstance(options.get(DROPOUT, True), bool):
            raise ValueError(f"`dropout` of method {self.name!r} must be true or false, got {options[DROPOUT]!r}.")
        given = {name: value for name, value in {**self.defaults, **options}.items() if name != DROPOUT}
        try:
            inspect.signature(self.prepare).bind(None, **given)
            if self.only_config:
                self.prepare(None, **given)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The options of method {self.name!r} do not work, got {dict(options)}: {error}"
            ) from error


METHODS: dict[str, Method] = {}


def register_method(
    name: str,
    title: str,
    learning_rates: tuple[float, ...] = FULL_RATES,
    *,
    only_config: bool = False,
    takes_seed: bool = False,
    finish: Finish | None = None,
    **defaults: Any,
) -> Callable[[Prepare], Prepare]:
    """Register a function as the method that the command line calls `name`.

    The function takes the pretrained model, and options by keyword. It returns the model ready to train, or a PEFT
    config to wrap the model with::

        @register_method("rslora", "rank-stabilized LoRA", learning_rates=(1e-4, 3e-4, 1e-3))
        def rslora(model, r=8):
            return LoraConfig(r=r, use_rslora=True, target_modules="all-linear", task_type="SEQ_CLS")

    Args:
        name: The name; a method that has it already is replaced.
        title: What tables and figures call it.
        learning_rates: Peak learning rates to choose from.
        only_config: As in `Method`.
        takes_seed: As in `Method`.
        finish: As in `Method`.
        **defaults: Options that hold unless the user sets them otherwise.

    Returns:
        A decorator that returns its function unchanged.
    """

    def register(prepare: Prepare) -> Prepare:
        METHODS[name] = Method(name, title, prepare, learning_rates, defaults, only_config, takes_seed, finish)
        return prepare

    return register


def find_method(name: str) -> Method:
    """Return the method of that name; "peft:LoraConfig" stands for any configuration class of PEFT.

    Raises:
        ValueError: There is none.
    """
    if name in METHODS:
        return METHODS[name]
    plain = name.removesuffix(NO_DROPOUT)
    if plain != name and (plain in METHODS or plain.startswith((PEFT_PREFIX, RECIPE_PREFIX))):
        known = find_method(plain)
        defaults = {**known.defaults, DROPOUT: False}
        return replace(known, name=name, title=f"{known.title}, no dropout", defaults=defaults)
    if name.startswith(PEFT_PREFIX):
        return _peft_method(name)
    if name.startswith(RECIPE_PREFIX):
        return _recipe_method(name)
    raise ValueError(
        f"`methods` must be among {', '.join(METHODS)}, any of them with {NO_DROPOUT!r} after it, "
        f"{RECIPE_PREFIX}<name> for a function of `peft_dps.recipes`, 'family' for all of these, or "
        f'{PEFT_PREFIX}<class>:<JSON> for any of PEFT\'s, as peft:LoraConfig:{{"r": 8}}, got {name!r}.'
    )


def _peft_method(name: str) -> Method:
    class_name = name.removeprefix(PEFT_PREFIX)
    kind = getattr(peft, class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, PeftConfig)):
        raise ValueError(f"`methods`: PEFT has no configuration class {class_name!r}; write it as in peft:LoraConfig.")

    def prepare(model: PreTrainedModel | None, **fields: Any) -> PeftConfig:
        return kind(**{"task_type": "SEQ_CLS", **fields})

    return Method(name, class_name.removesuffix("Config"), prepare, ADAPTER_RATES, only_config=True)


def _recipe_method(name: str) -> Method:
    """Return a method of the family: where the weights are copied, everything else is trained in full as well."""
    function = name.removeprefix(RECIPE_PREFIX)
    if function not in recipes.__all__:
        raise ValueError(f"`methods`: {name!r} must be {RECIPE_PREFIX} and one of {', '.join(recipes.__all__)}.")
    recipe: Callable[..., DPSConfig] = getattr(recipes, function)

    def prepare(model: PreTrainedModel | None, **fields: Any) -> PeftConfig:
        config = recipe(**{"task_type": "SEQ_CLS", **fields})
        if config.storage == "copy":
            config.train_remaining = fields.get("train_remaining", True)
        elif model is not None:
            config.modules_to_save = _head_and(model, config.modules_to_save)
        return config

    config = recipe()
    whole = config.storage == "copy" or config.recipe().granularity.spans_weights
    rates = FULL_RATES if whole else FEW_ENTRIES_RATES if config.granularity == "entry" else ADAPTER_RATES
    return Method(name, function, prepare, rates, only_config=True, takes_seed=True)


def _head_and(model: PreTrainedModel, others: Iterable[str] | None) -> list[str]:
    """Return the modules of the head, and others that are to be trained in full."""
    return sorted({*head_modules(model), *(others or ())})


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is not set, and make the rest fit for JSON."""
    given = {name: value for name, value in config.items() if value is not None}
    plain: dict[str, Any] = json.loads(json.dumps(given, default=_plain_value))
    return plain


def _plain_value(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


@register_method("full", "full FT")
def full(model: PreTrainedModel) -> PreTrainedModel:
    """Train every parameter of the model."""
    return model


@register_method("lora", "LoRA", ADAPTER_RATES, only_config=True)
def lora(model: PreTrainedModel | None, **fields: Any) -> PeftConfig:
    """Train low-rank updates of all linear layers, and the head (Hu et al., arXiv:2106.09685)."""
    defaults: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": "all-linear", "r": 8, "lora_alpha": 16}
    if model is not None:  # to PEFT the head is what is called classifier or score
        fields["modules_to_save"] = _head_and(model, fields.get("modules_to_save"))
    return LoraConfig(**{**defaults, **fields})


register_method("wise-ft", "WiSE-FT", only_config=True, finish=average, alpha=0.5)(prepare_wise_ft)
register_method("bitfit", "BitFit", FEW_ENTRIES_RATES)(apply_bitfit)
register_method("houlsby", "Houlsby adapters", ADAPTER_RATES)(add_houlsby)
register_method("pfeiffer", "Pfeiffer adapters", FEW_ENTRIES_RATES)(add_pfeiffer)


@register_method("random-mask", "random mask", only_config=True, takes_seed=True, score="random")
@register_method("dps-mix", "DPS Mix", only_config=True, takes_seed=True, variant="mix")
@register_method("dps-dense", "DPS Dense", only_config=True, takes_seed=True)
def dps(model: PreTrainedModel, **fields: Any) -> PeftConfig:
    """Train every parameter, the weights of linear layers in turns: all entries, then a subnetwork."""
    return DPSConfig(**{"task_type": "SEQ_CLS", "train_remaining": True, **fields})


@register_method("random-columns", "random columns", ADAPTER_RATES, only_config=True, takes_seed=True, score="random")
@register_method("dps-columns", "DPS columns", ADAPTER_RATES, only_config=True, takes_seed=True, score_steps=8)
def columns(model: PreTrainedModel | None, **fields: Any) -> PeftConfig:
    """Train some columns of all linear layers, chosen once, and the head."""
    if model is not None:
        fields["modules_to_save"] = _head_and(model, fields.get("modules_to_save"))
    return DPSConfig.compact(**{"task_type": "SEQ_CLS", **fields})
