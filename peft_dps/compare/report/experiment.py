"""An experiment: all methods on one task, with one training size, model and budget."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from peft_dps.compare.methods.choice import variant_of
from peft_dps.compare.methods.table import DROPOUT, NO_DROPOUT, REFERENCE, usual_reference
from peft_dps.compare.runs.results import Results
from peft_dps.compare.runs.run import Run, Timing

PROBE = "probe/"
"""What comes before the name of a probe, where it stands for a test domain."""
OTHERS = "other domains"
"""All test domains but the first, together."""
_WITHOUT_DROPOUT = (REFERENCE + NO_DROPOUT, variant_of(REFERENCE, {DROPOUT: False}))


@dataclass(frozen=True)
class MethodRuns:
    """A method in an experiment.

    Attributes:
        variant: The method with its options, see `Plan.variant`.
        title: What tables and figures call it.
        runs: Its run per seed, failed ones included.
    """

    variant: str
    title: str
    runs: Mapping[int, Run]

    @property
    def finished(self) -> list[Run]:
        """The runs that did not fail, by seed."""
        return [self.runs[seed] for seed in sorted(self.runs) if not self.runs[seed].failed]

    def scores(self, domain: str) -> dict[int, float]:
        """Return the score per seed on a test domain; NaN for a run that failed or gave no number.

        Args:
            domain: Name of the domain; `OTHERS`; or `PROBE` and the name of a probe, of which higher is better too.
        """
        return {seed: _score(self.runs[seed], domain) for seed in sorted(self.runs)}


@dataclass(frozen=True)
class Experiment:
    """All methods on one task, with one training size, model and budget.

    Attributes:
        name: What tables and figures call it.
        slug: The same for file names; unique in a report.
        task: Name of the task.
        train_size: Training examples drawn; None for all there are.
        model: The pretrained model.
        methods: The methods, the reference first.
        seeds: All seeds that any of them ran with.
        domains: Test domains; the first is the one trained on.
        metrics: Names of the metrics whose mean is the score.
        timing: Step times, measured interleaved, if they were.
        superseded: Runs of which a later one, or one that finished, has the same method and seed.
        reference_variant: Variant of the method that the others are tested against.
        tried: Per variant, the learning rates that were tried on the validation split.
    """

    name: str
    slug: str
    task: str
    train_size: int | None
    model: str
    methods: tuple[MethodRuns, ...]
    seeds: tuple[int, ...]
    domains: tuple[str, ...]
    metrics: tuple[str, ...]
    timing: Timing | None = None
    superseded: tuple[Run, ...] = ()
    reference_variant: str = REFERENCE
    tried: Mapping[str, frozenset[float]] = field(default_factory=dict)

    @property
    def reference(self) -> MethodRuns | None:
        """The method that the others are tested against, if it is there."""
        return next((each for each in self.methods if each.variant == self.reference_variant), None)

    @property
    def reference_title(self) -> str:
        """What tables and figures call the reference, also where it is not there."""
        return self.reference.title if self.reference else self.reference_variant

    @property
    def runs(self) -> list[Run]:
        """All runs, by method and seed."""
        return [each.runs[seed] for each in self.methods for seed in sorted(each.runs)]

    @property
    def metric(self) -> str:
        """Name of the score."""
        return "mean of " + " and ".join(self.metrics) if len(self.metrics) > 1 else "".join(self.metrics) or "score"


def experiments_of(results: Results, reference: str | None = None) -> list[Experiment]:
    """Sort the reported runs of a result file into experiments, in the order in which they appear.

    Args:
        results: The runs.
        reference: Variant that the others are tested against; None for full fine-tuning, or else the first method.
    """
    if reference is None:
        reference = usual_reference([run.plan.variant for run in results.reported])
    groups: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in results.reported:
        groups[_key(run)].append(run)
    tried: dict[tuple[Any, ...], dict[str, frozenset[float]]] = defaultdict(dict)
    for run in results.runs.values():
        if run.plan.phase == "tune":
            rates = tried[_key(run)]
            rates[run.plan.variant] = rates.get(run.plan.variant, frozenset()) | {run.plan.learning_rate}
    titles = _titles(results, reference)
    names = _distinct([_name(runs, key, groups.keys()) for key, runs in groups.items()], " ")
    slugs = _distinct([re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "experiment" for name in names], "-")
    return [
        _experiment(groups[key], titles, results.timings, name=name, slug=slug, reference=reference, tried=tried[key])
        for name, slug, key in zip(names, slugs, groups, strict=True)
    ]


def _key(run: Run) -> tuple[Any, ...]:
    """What the runs of an experiment have in common."""
    plan = run.plan
    settings = tuple(asdict(plan.settings).items())
    return plan.task, plan.train_size, plan.model, settings, plan.protocol, tuple(plan.metrics)


def without_dropout(experiment: Experiment) -> Experiment | None:
    """Return what of an experiment is like for like without dropout: those methods beside full fine-tuning without it.

    Returns:
        The experiment of these methods; None without such methods, and where another reference was asked for.
    """
    alike = tuple(each for each in experiment.methods if _is_without_dropout(each))
    references = [each.variant for each in alike if each.variant in _WITHOUT_DROPOUT]
    if experiment.reference_variant != REFERENCE or len(alike) < 2 or not references:
        return None
    return replace(experiment, methods=alike, reference_variant=references[0])


def _is_without_dropout(method: MethodRuns) -> bool:
    run = next(iter(method.finished or method.runs.values()))
    by_name = run.plan.options.get(DROPOUT, not run.plan.method.endswith(NO_DROPOUT))
    return run.config.get(DROPOUT, by_name) is False


def _experiment(
    runs: Sequence[Run], titles: Mapping[str, str], timings: list[Timing], *, reference: str, **fields: Any
) -> Experiment:
    plan = runs[0].plan
    latest: dict[str, dict[int, Run]] = {variant: {} for variant in titles}
    superseded = []
    for run in runs:
        of_variant = latest[run.plan.variant]
        earlier = of_variant.get(run.plan.seed)
        if earlier is not None and run.failed and not earlier.failed:
            superseded.append(run)
            continue
        if earlier is not None:
            superseded.append(earlier)
        of_variant[run.plan.seed] = run
    first = max(runs, key=lambda run: len(run.scores))
    return Experiment(
        **fields,
        reference_variant=reference,
        task=plan.task,
        train_size=plan.train_size,
        model=plan.model,
        methods=tuple(MethodRuns(variant, titles[variant], found) for variant, found in latest.items() if found),
        seeds=tuple(sorted({run.plan.seed for run in runs})),
        domains=tuple(first.scores),
        metrics=tuple(first.metrics),
        timing=_best_timing([timing for timing in timings if timing.fits(plan)], latest, reference),
        superseded=tuple(superseded),
    )


def _best_timing(timings: Iterable[Timing], variants: Mapping[str, Any], reference: str) -> Timing | None:
    """Return the latest of the timings that measured the reference and the most of the methods beside it."""
    best: Timing | None = None
    most = (False, 0)
    for timing in timings:
        covers = (reference in timing.seconds, len(timing.seconds.keys() & {v for v in variants if variants[v]}))
        if covers >= most and covers[1] > 0:
            best, most = timing, covers
    return best


def _score(run: Run, domain: str) -> float:
    if run.failed:
        return math.nan
    asked = list(run.scores)[1:] if domain == OTHERS else [domain]
    found = [run.score(name) for name in asked if name in run.scores]
    found += [each.merit for each in run.retention if PROBE + each.probe == domain]
    return sum(found) / len(found) if found else math.nan


def _titles(results: Results, reference: str) -> dict[str, str]:
    """Per variant its title, the reference first and the others as they appear; no two alike."""
    found: dict[str, str] = {}
    for run in results.reported:
        found[run.plan.variant] = run.title or found.get(run.plan.variant, "") or run.plan.variant
    alike = {title for title in found.values() if list(found.values()).count(title) > 1}
    titles = {variant: f"{title} [{variant}]" if title in alike else title for variant, title in found.items()}
    return {variant: titles[variant] for variant in sorted(titles, key=lambda variant: variant != reference)}


def _name(runs: Sequence[Run], key: tuple[Any, ...], keys: Iterable[tuple[Any, ...]]) -> str:
    """Name the task and its size, and whatever else is not the same in all experiments."""
    plan, others = runs[0].plan, list(keys)
    sizes = {run.examples["train"] for run in runs if "train" in run.examples}
    size = f"{plan.train_size if plan.train_size is not None else max(sizes, default=0):,} training examples"
    parts = [plan.task, size if plan.train_size is not None or sizes else "all training examples"]
    if len({other[2] for other in others}) > 1:
        parts.append(plan.model)
    for position, (setting, value) in enumerate(key[3]):
        if len({other[3][position][1] for other in others}) > 1:
            parts.append(f"{setting} {value}")
    if len({other[4] for other in others}) > 1:
        parts.append(f"protocol {plan.protocol}")
    if len({other[5] for other in others if other[0] == plan.task}) > 1:
        parts.append(f"scored by {' and '.join(plan.metrics) or 'the task'}")
    return ", ".join(parts)


def _distinct(names: Sequence[str], separator: str) -> list[str]:
    seen: dict[str, int] = defaultdict(int)
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}{separator}{seen[name]}")
    return distinct
