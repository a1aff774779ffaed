"""The record of one training run: what was planned, what was measured, what went wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field, fields
from typing import Any

from peft_dps.compare.data.probe import LOSS
from peft_dps.compare.runs.plan import PROTOCOL, Plan
from peft_dps.compare.settings import Settings

Scores = dict[str, float]


@dataclass(frozen=True)
class Candidate:
    """A learning rate that was tried.

    Attributes:
        learning_rate: The rate.
        seeds: The seeds it was tried with.
        score: Mean score on the validation split; NaN if a training failed or gave no number.
        chosen: Whether the reported run uses it.
    """

    learning_rate: float
    seeds: list[int]
    score: float
    chosen: bool = False


@dataclass(frozen=True)
class Evaluation:
    """A look at the validation split during training.

    Attributes:
        step: After which step.
        loss: Mean loss.
        score: Mean of the task's metrics.
    """

    step: int
    loss: float
    score: float


@dataclass(frozen=True)
class Selection:
    """A subnetwork that DPS selected.

    Attributes:
        cycle: Number of the cycle, from 1.
        first: First step of its SUBNETWORK stage.
        last: Its last step, included.
        overlap: The Jaccard index of the masks and those of the cycle before: mean over the weights, least and most.
            Empty in the first cycle.
        chance: What the mean would be of random masks of the same sizes; None in the first cycle.
    """

    cycle: int
    first: int
    last: int
    overlap: list[float] = field(default_factory=list)
    chance: float | None = None


@dataclass(frozen=True)
class Retention:
    """What a model can do without being trained for it.

    Attributes:
        probe: Name of the probe.
        metric: What it measures; `LOSS` is better the lower, all others the higher.
        before: Of the pretrained model.
        after: Of the trained one.
    """

    probe: str
    metric: str
    before: float
    after: float

    @property
    def merit(self) -> float:
        """What it is after training, signed so that higher is better."""
        return -self.after if self.metric == LOSS else self.after


@dataclass(frozen=True)
class Run:
    """One training, finished or failed. What a failed one did not get to know keeps its default.

    One of phase "tune" has what a learning rate is chosen by, and nothing of what is reported alone.

    Attributes:
        plan: What it was to do.
        title: What tables call the method.
        error: The last line of the traceback; empty for a finished run.
        metrics: Names of the metrics whose mean is the score of the task.
        scores: Per test domain and metric, in the order of the task: the first domain is the one trained on. Empty in
            phase "tune".
        retention: Per probe, what was measured before and after training; empty in phase "tune".
        validation: Per metric, on the validation split at the end.
        candidates: The learning rates tried on the validation split before this run; empty in phase "tune".
        config: The method's configuration, ready for JSON.
        examples: Number of examples by split: "train", "validation", and each test domain as "test/<domain>".
        order: Fingerprint of the training examples in the order they were fed: equal for all methods of one seed.
        losses: Training loss, as means of `loss_steps` steps each.
        loss_steps: Of how many steps a loss is the mean.
        evaluations: Looks at the validation split; in phase "tune" the last one alone.
        selections: DPS: the subnetworks in order.
        fractions: DPS: per weight, the fraction of its entries in the last subnetwork; empty if it is the same for
            all of them.
        status: DPS: what it said of itself at the end of the last SUBNETWORK stage, or of the training without one.
        frozen_moved: DPS: whether a frozen entry had moved then; None without DPS.
        trainable: Entries that are trained.
        selected: Entries that are updated while the subnetwork is: those selected, and trained ones DPS does not
            mask. None without DPS, and in compact storage, which trains nothing else.
        seconds: Wall time of the training, without evaluations.
        peak_memory: Peak during training above what was held before the model was built, in bytes.
        memory_kind: "resident" for the process's memory, "cuda" for the device's.
        file_size: Size of the saved weights, in bytes.
        started: When it began, ISO 8601 in UTC.
        versions: Versions of Python and the packages.
        hardware: What it ran on.
    """

    plan: Plan
    title: str = ""
    error: str = ""
    metrics: list[str] = field(default_factory=list)
    scores: dict[str, Scores] = field(default_factory=dict)
    retention: list[Retention] = field(default_factory=list)
    validation: Scores = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    order: str = ""
    losses: list[float] = field(default_factory=list)
    loss_steps: int = 1
    evaluations: list[Evaluation] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)
    fractions: dict[str, float] = field(default_factory=dict)
    status: str = ""
    frozen_moved: bool | None = None
    trainable: int = 0
    selected: int | None = None
    seconds: float = 0.0
    peak_memory: int = 0
    memory_kind: str = ""
    file_size: int = 0
    started: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether it ended in an error."""
        return bool(self.error)

    def score(self, domain: str | None = None) -> float:
        """Return the mean of the task's metrics on a test domain, NaN for a failed run.

        Args:
            domain: Name of the domain; None for the first one, which is trained on.
        """
        if not self.scores:
            return math.nan
        return mean_score(self.scores[domain or next(iter(self.scores))], self.metrics)

    @property
    def validation_score(self) -> float:
        """The mean of the task's metrics on the validation split, NaN if it was not reached."""
        return mean_score(self.validation, self.metrics) if self.validation else math.nan


@dataclass(frozen=True)
class Timing:
    """Step times of several methods, measured one step of each in turn in one process.

    Attributes:
        model: As in `Plan`.
        task: The task whose batch was trained on.
        batch_size: Examples a step.
        tokens: Tokens of an example, padding included.
        seconds: Per variant (see `Plan.variant`), the time of its step in each round; rounds are comparable.
        precision: As in `Settings`; empty in records that do not say.
        attention: As in `Settings`.
        max_length: As in `Settings`; None in records that do not say.
        protocol: Version of the protocol.
        versions: As in `Run`.
        hardware: As in `Run`.
        loading: Seconds of loading the model and tokenizing, as before each run.
    """

    model: str
    task: str
    batch_size: int
    tokens: int
    seconds: dict[str, list[float]]
    precision: str = ""
    attention: str | None = None
    max_length: int | None = None
    protocol: int = PROTOCOL
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    loading: float = 0.0

    def fits(self, plan: Plan) -> bool:
        """Tell whether runs of a plan took steps like those that were timed."""
        settings = plan.settings
        size = min(settings.batch_size, settings.batch_size if plan.train_size is None else plan.train_size)
        mine = (self.model, self.task, self.attention, self.batch_size, self.protocol)
        return (
            mine == (plan.model, plan.task, settings.attention, size, plan.protocol)
            and self.precision in ("", settings.precision)
            and self.max_length in (None, settings.max_length)
        )


def mean_score(values: Mapping[str, float], metrics: list[str]) -> float:
    """Return the mean of the named metrics."""
    return sum(values[name] for name in metrics) / len(metrics)


_ROWS = {  # written as rows of values
    "candidates": Candidate,
    "evaluations": Evaluation,
    "selections": Selection,
    "retention": Retention,
}


def to_json(record: Run | Timing) -> str:
    """Write a record as one line of JSON: what is not as by default, numbers that are not finite as null."""
    content = {
        item.name: value
        for item in fields(record)
        if (value := getattr(record, item.name)) != item.default and value not in ([], {})
    }
    content.update({name: [astuple(item) for item in content[name]] for name in _ROWS if name in content})
    if isinstance(record, Run):
        content["plan"] = asdict(record.plan)
    content = {"record": type(record).__name__.lower(), **content}
    return json.dumps(_without_nan(content), allow_nan=False, separators=(",", ":"))


def from_json(line: str) -> Run | Timing:
    """Read a record from its line.

    Raises:
        ValueError: The line is no record.
    """
    content = json.loads(line)
    kind = content.get("record") if isinstance(content, dict) else None
    if kind not in ("run", "timing"):
        raise ValueError(f"`record` must be 'run' or 'timing', got {kind!r}.")
    try:
        return _run(content) if kind == "run" else Timing(**_known(Timing, content))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"This is no complete {kind}: {error}.") from error


def _run(content: dict[str, Any]) -> Run:
    plan = _known(Plan, content["plan"])
    plan["settings"] = Settings(**_known(Settings, plan["settings"]))
    plan["metrics"] = tuple(plan.get("metrics", ()))
    values = _known(Run, content)
    for name in ("scores", "validation", "losses"):
        values[name] = _with_nan(values[name]) if name in values else ({} if name != "losses" else [])
    for name, kind in _ROWS.items():
        values[name] = [_row(kind, row) for row in values.get(name, [])]
    return Run(**{**values, "plan": Plan(**plan)})


def _row(kind: type, row: list[Any]) -> Any:
    """Make a part of a record; null stands for a number that is not finite where there has to be one."""
    if not isinstance(row, list):
        raise TypeError(f"a {kind.__name__} must be a list, got {row!r}")
    pairs = zip(fields(kind), row, strict=False)  # a later version may have added more
    return kind(*(math.nan if value is None and item.type == "float" else value for item, value in pairs))


def _known(kind: type, content: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a later version may have added."""
    names = {item.name for item in fields(kind)}
    return {name: value for name, value in content.items() if name in names}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value
