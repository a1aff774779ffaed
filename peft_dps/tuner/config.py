"""`DPSConfig`: the fields of DPS and their validation."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from peft_dps.errors import AdapterFileError, ConfigError
from peft_dps.training.recipe import Recipe
from peft_dps.tuner.field_checks import check_plain, check_targets, refuse_idle_fields
from peft_dps.tuner.method import recipe_of
from peft_dps.tuner.peft_interface import SAFETENSORS_WEIGHTS_NAME, PeftConfig


class DPSPeftType(str, enum.Enum):
    """The PEFT type of DPS: an enum of its own, since PEFT's has no place for tuners from outside."""

    DPS = "DPS"


@dataclass
class DPSConfig(PeftConfig):
    """Configuration of Dynamic Parameter Selection (Zhang et al., NeurIPS 2022, arXiv:2211.01642).

    Training alternates two stages of equal length. ACCUMULATE updates every entry of the targeted weights and scores
    each by its accumulated squared gradient; SUBNETWORK updates only the ceil(n * density) best-scored entries and
    freezes the rest. Then scores and masks are thrown away and the next cycle begins.

    Args:
        target_modules: Names of the modules to train, a regular expression, or `"all-linear"`.
        target_parameters: Names of single parameters to train besides, such as the weights of experts that models of
            transformers keep as one parameter (`["experts.gate_up_proj"]`). With `target_modules=[]` nothing else is
            targeted.
        exclude_modules: Names, or a regular expression, of modules to leave out.
        variant: `"dense"` trains as described; `"mix"` adds column noise to ACCUMULATE, relaxes scores by how often a
            column took part, and trains SUBNETWORK on W_eff = T + M * (W - T) / density, T being the weight when the
            stage began.
        density: Fraction of entries that the subnetwork holds, in (0, 1]. Where the units are weights or blocks,
            chosen over the whole model, what is trained besides them counts too: biases under `train_bias`, modules
            under `modules_to_save` and `train_remaining`. They are part of the entries that could be trained, and of
            those that are, whatever is selected.
        units: Number of units that are trained of each weight, or of weights or blocks of the model, in place of a
            density. As many rows or columns as a LoRA has ranks make half of its parameters.
        budget: What the density is a fraction of: `"entries"`; for weights and blocks also `"units"`, their number,
            whatever their size, and `"flops"`, those of the backward pass, which has to reach down to the lowest
            selected weight; or a registered name.
        storage: `"copy"`: parameters are copies of whole weights, which masks are put on; `"compact"`: they hold the
            selected units alone, beside a base model that is never written, so that frozen entries cost no gradient,
            no optimizer state and no memory.
        max_density: With `storage="compact"`, the fraction of units of a weight of which the adapter may hold values,
            over all selections: units that are selected no more keep what they learned.
        schedule: Which phases follow each other: `"cycle"`, the two stages in turns; `"once"`, ACCUMULATE for
            `score_steps` steps and SUBNETWORK from then on; `"every"`, the same anew every `stage_steps` steps;
            `"two-phase"`, ACCUMULATE for `stage_steps` steps, and SUBNETWORK from then on, which begins with the
            pretrained weights and a new optimizer state; `"full"`, nothing is selected; or a registered name.
        stage_steps: Length of a stage of `"cycle"`, or steps from one selection of `"every"` to the next, or of the
            first phase of `"two-phase"`: optimizer steps if an int, a fraction of all steps in (0, 1) if a float. By
            default 0.05, or 10 steps where the number of all is unknown. A fraction stands for 10 steps or more (with
            `"every"` also for twice `score_steps` or more).
        score_steps: Steps of ACCUMULATE with `"once"` and `"every"`; 0 for scores that need no evidence, and with
            `"once"` to score before training, from batches of yours (`model.dps_score(batches)`).
        granularity: What is selected as a whole: `"entry"`; `"row"`, all that makes one output; `"column"`, all that
            takes one input; `"submatrix"`, a tile of 256 rows and columns; `"tensor"`, one weight; `"block"`, all
            targets of one layer of the model; or a registered name.
        reduction: How the scores of its entries make the score of a unit.
        total_steps: Number of optimizer steps of the whole training. Only a fractional `stage_steps` needs it, and not
            with the HF Trainer, which knows it.
        scope: Whether the best units are chosen within each weight (`"tensor"`), within the weights of attention and
            the other weights of each layer of the model (`"category"`), or over all weights together (`"model"`). By
            default within each weight, and over all where units are weights or more.
        frozen: What frozen means in SUBNETWORK. With `"exact"` frozen entries keep their bits whatever the optimizer
            does; `"exact_in_step"` does so with a copy of them only while the optimizer steps; with `"gradient"` only
            their gradient is zeroed, and momentum and weight decay still move them, as in the code released with the
            paper; `"scaled_gradient"` does so, and divides the gradient of the others by their share; or a registered
            name.
        score: How entries are ranked: `"squared_gradient"`, `"absolute_gradient"`, `"random"` (the baseline),
            `"magnitude"` of the pretrained weight, `"low_rank_residual"` (what a matrix of rank 16 leaves of it),
            `"movement"` (abs(W - W0)), `"in_turn"` (weights or blocks in ascending order), or a name given to
            `peft_dps.register_score`.
        evidence: What is gathered for the score: `"squared_gradient"`, `"absolute_gradient"`, `"second_moment"` (of
            the optimizer), `"none"`, or a registered name. By default what the score is made of.
        noise: What training forwards compute with in place of the weight: `"none"`, `"columns"` (of DPS Mix),
            `"mixout"` (columns that swap back to W0, in every step), `"mixconnect"` (the same with entries), or a
            registered name; what takes part does so with probability `density`. By default what `variant` says.
        score_dtype: What evidence is added up in. `"bfloat16"` halves the memory of the scores; entries whose scores
            are within 0.4% of each other may change places, and once a sum is more than 256 times what a step adds to
            it, it stands still. `"float32"` means fp64 for an fp64 weight.
        participation_decay: Only for Mix: whether scores are multiplied by exp(-F / stage_steps), F being how often a
            column took part. By default it is for stages of 50 steps or more.
        train_bias: Whether the biases of targeted modules are trained too. They are never masked.
        train_remaining: Whether every other module with parameters is trained in full, as in the paper, by adding it
            to `modules_to_save`.
        modules_to_save: Modules trained in full and saved with the adapter.
        layers_to_transform: Indices of the layers to train.
        layers_pattern: Name of the module list that `layers_to_transform` counts in.
        offload_base: Whether the pretrained weights W0 of targeted modules are kept in a temporary file (see `TMPDIR`)
            instead of memory, on the host or an accelerator. What needs them reads them from there: disabling, merging
            and combining adapters, and each step of Mix in ACCUMULATE.
        lean: One name for three choices that save memory, at the price of somewhat different scores and of time:
            `evidence="second_moment"` in place of squared gradients, `frozen="exact_in_step"` in place of `"exact"`,
            and `offload_base=True`; on a CPU the originals of `modules_to_save` are kept in files too.
        seed: Seed of the method's own random numbers.
        init_weights: `False` perturbs the trainable copies at random; only for tests.

    Raises:
        ConfigError: If a field has a value that cannot work.
    """

    target_modules: list[str] | str | None = field(
        default="all-linear",
        metadata={"help": "Names of the modules to train, a regular expression, or 'all-linear'."},
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Names of single parameters to train besides, such as the fused weights of experts."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression, of modules to leave out."}
    )
    variant: Literal["dense", "mix"] = field(
        default="dense", metadata={"help": "'dense', or 'mix', which trains with column noise and relaxed scores."}
    )
    density: float = field(default=0.7, metadata={"help": "Fraction of entries in the subnetwork, in (0, 1]."})
    units: int | None = field(
        default=None, metadata={"help": "Number of units of each weight, or of the model, in place of a density."}
    )
    budget: str = field(
        default="entries", metadata={"help": "What the density counts: 'entries', 'units' or 'flops'."}
    )
    storage: str = field(
        default="copy", metadata={"help": "'copy' of whole weights, or 'compact': the selected units alone."}
    )
    max_density: float | None = field(
        default=None, metadata={"help": "Fraction of units that compact storage may hold over all selections."}
    )
    schedule: str = field(
        default="cycle",
        metadata={"help": "Which phases follow each other: 'cycle', 'once', 'every', 'two-phase', 'full', ..."},
    )
    stage_steps: int | float | None = field(
        default=None, metadata={"help": "Steps of a stage if int, a fraction in (0, 1) of all steps if float."}
    )
    score_steps: int = field(
        default=8, metadata={"help": "Steps of scoring with schedule='once'; 0 to score before training."}
    )
    granularity: str = field(
        default="entry",
        metadata={"help": "What is selected as a whole: 'entry', 'row', 'column', 'submatrix', 'tensor' or 'block'."},
    )
    reduction: Literal["mean", "sum"] = field(
        default="mean", metadata={"help": "How the scores of its entries make the score of a unit."}
    )
    total_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps of the whole training, for a fractional `stage_steps`."}
    )
    scope: str | None = field(
        default=None,
        metadata={"help": "Choose the best units within each 'tensor', each 'category', or over the 'model'."},
    )
    frozen: str = field(
        default="exact",
        metadata={"help": "'exact': frozen entries keep their bits; 'gradient': only their gradient is zeroed."},
    )
    score: str = field(default="squared_gradient", metadata={"help": "How entries are ranked."})
    evidence: str | None = field(
        default=None, metadata={"help": "What is gathered for the score; by default what it is made of."}
    )
    noise: str | None = field(
        default=None, metadata={"help": "What training forwards compute with; by default what `variant` says."}
    )
    score_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "What evidence is added up in."}
    )
    participation_decay: bool | None = field(
        default=None, metadata={"help": "Mix: favour columns that took part less often. None: from 50 steps on."}
    )
    train_bias: bool = field(default=True, metadata={"help": "Train the biases of targeted modules too."})
    train_remaining: bool = field(
        default=False, metadata={"help": "Train every other module with parameters in full (`modules_to_save`)."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to train."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that `layers_to_transform` counts in."}
    )
    offload_base: bool = field(
        default=False, metadata={"help": "Keep the pretrained weights of targeted modules in a temporary file."}
    )
    lean: bool = field(
        default=False, metadata={"help": "Save memory: scores from the optimizer's state, W0 in a file."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the method's own random numbers."})
    init_weights: bool = field(default=True, metadata={"help": "False perturbs the copies; only for tests."})

    @classmethod
    def from_paper(cls, variant: Literal["dense", "mix"] = "dense", **fields: Any) -> DPSConfig:
        """Build the configuration of the paper's own runs (arXiv:2211.01642, with the code released beside it).

        DPS on every linear layer, pooler and head included, with density 0.7 and stages of 5% of all steps; every
        other parameter is trained too, and freezing is by gradient. The runs also had no dropout in the model
        (`peft_dps.disable_dropout`), AdamW with learning rate 2e-5, weight decay 0.01, warm-up over 10% of the steps,
        batches of 16 and 3 epochs.

        Args:
            variant: `"dense"` or `"mix"`.
            **fields: Fields to set otherwise. With a `task_type` PEFT trains the head in full, beside DPS.

        Returns:
            The configuration.
        """
        paper: dict[str, Any] = {
            "target_modules": "all-linear",
            "density": 0.7,
            "stage_steps": 0.05,
            "scope": "tensor",
            "frozen": "gradient",
            "train_bias": True,
            "train_remaining": True,
        }
        return cls(variant=variant, **{**paper, **fields})

    @classmethod
    def compact(cls, units: int | None = None, **fields: Any) -> DPSConfig:
        """Build a configuration of few parameters: sixteen columns of each linear layer, and nothing else.

        Of a square layer these are half of the parameters of a LoRA of rank 16. The columns are chosen at random,
        before the first step. With `score_steps=8` they are those with the largest gradients in the first eight steps,
        and with `score_steps=0` in batches that you score before training (`model.dps_score(batches)`).

        Args:
            units: Number of columns of each weight, as the rank of a LoRA; None for 16, unless there is a `density`.
            **fields: Fields to set otherwise. `score` is `"random"`, and `"squared_gradient"` if `score_steps` or
                `evidence` is given; `score_steps` is 0 for random columns, and 8 for other scores.

        Returns:
            The configuration.

        Raises:
            ConfigError: If a field has a value that cannot work, or single entries are to be selected without a
                `density`.
        """
        if units is None and fields.get("density") is None:
            if fields.get("granularity") == "entry":
                raise ConfigError(
                    "`DPSConfig.compact(granularity='entry')` needs a `density`, such as 0.01: `units` is a number of "
                    "rows or columns of each weight."
                )
            units = 16
        score = fields.get("score", "squared_gradient" if fields.keys() & {"score_steps", "evidence"} else "random")
        cheap: dict[str, Any] = {
            "storage": "compact",
            "granularity": "column",
            "schedule": "once",
            "score": score,
            "score_steps": 0 if score == "random" else 8,
            "units": units,
            "train_bias": False,
        }
        return cls(**{**cheap, **fields})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration, and what is known of the training into the folder's model card, if it has one."""
        super().save_pretrained(save_directory, **kwargs)
        if self.write_card is not None:
            self.write_card(Path(save_directory, "README.md"))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read a configuration from an adapter's folder, or from the Hub; see `peft.PeftConfig.from_pretrained`.

        Raises:
            AdapterFileError: If the folder's file of weights is cut short or damaged. Adapters are loaded in this
                order, configuration first, so it is found before the model is touched.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config.is_to_be_filled = True
        _require_readable(Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME))
        return config

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = DPSPeftType.DPS
        self.write_card: Callable[[Path], None] | None = None  # known when the weights are saved; no field either
        self.is_to_be_filled = False  # read from a file whose weights are still to come; no field, never saved
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        for name in ("target_parameters", "modules_to_save", "layers_to_transform", "layers_pattern"):
            if isinstance(getattr(self, name), tuple):
                setattr(self, name, list(getattr(self, name)))
        self.validate()
        if self.scope is None:
            self.scope = "model" if self.recipe().granularity.spans_weights else "tensor"

    def validate(self) -> None:
        """Check every field, also if it was set after the configuration was made.

        Raises:
            ConfigError: If one has a value that cannot work.
        """
        check_targets(self)
        check_plain(self)
        schedule = self.recipe().schedule
        if not (self.inference_mode or self.is_to_be_filled):  # one that was saved has been trained with
            refuse_idle_fields(self)
        if self.total_steps is not None:
            schedule.resolve(self.total_steps)

    def recipe(self) -> Recipe:
        """Return the method: one object per axis.

        Raises:
            ConfigError: If a field that says what the method is has a value that cannot work.
        """
        return recipe_of(self)


def _require_readable(path: Path) -> None:
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt"):
            pass  # opening checks that the file is as long as its header says
    except SafetensorError as error:
        raise AdapterFileError(
            f"The adapter's file {path} is cut short or damaged ({error}). Save or copy it again."
        ) from error
