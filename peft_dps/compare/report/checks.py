"""What a reader of an experiment has to know before believing its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from operator import attrgetter

from peft_dps.compare.report.experiment import Experiment, MethodRuns

_MOVING = ("gradient", "scaled_gradient")  # under these momentum and weight decay go on moving frozen entries


def checks(experiment: Experiment) -> list[str]:
    """Look for what makes numbers not comparable, incomplete or doubtful.

    Returns:
        A sentence each; none if nothing is wrong.
    """
    return [
        *_failures(experiment),
        *_missing(experiment),
        *_pairing(experiment),
        *_superseded(experiment),
        *_edges(experiment),
        *_several_rates(experiment),
        *_selection(experiment),
        *_constant(experiment),
        *_surroundings(experiment),
    ]


def _failures(experiment: Experiment) -> Iterator[str]:
    for each in experiment.methods:
        for seed, run in sorted(each.runs.items()):
            if run.failed:
                yield f"{each.title} failed with seed {seed}: {run.error}"
            elif bad := [domain for domain in experiment.domains if math.isnan(each.scores(domain)[seed])]:
                yield f"{each.title} has no number with seed {seed} on {', '.join(bad)}; that counts as a failure."


def _missing(experiment: Experiment) -> Iterator[str]:
    for each in experiment.methods:
        if missing := [str(seed) for seed in experiment.seeds if seed not in each.runs]:
            yield f"{each.title} was not run with seed {', '.join(missing)}."


def _pairing(experiment: Experiment) -> Iterator[str]:
    if experiment.reference is None:
        yield f"There is no run of {experiment.reference_variant!r}, so nothing is tested against it."
    for what, field in (("examples", "plan.data"), ("order of the training examples", "order")):
        broken = []
        for seed in experiment.seeds:
            found = [attrgetter(field)(each.runs[seed]) for each in experiment.methods if seed in each.runs]
            if len(set(found) - {""}) > 1:
                broken.append(str(seed))
        if broken:
            yield f"The {what} differ between methods with seed {', '.join(broken)}: these runs are no fair pairs."


def _superseded(experiment: Experiment) -> Iterator[str]:
    for run in experiment.superseded:
        title = next(each.title for each in experiment.methods if each.variant == run.plan.variant)
        outcome = "failed" if run.failed else f"score {run.score():.4f}"
        yield (
            f"{title}, seed {run.plan.seed}: an earlier run (learning rate {run.plan.learning_rate:g}, {outcome}) was "
            "repeated with another learning rate or other data and is not counted."
        )


def _edges(experiment: Experiment) -> Iterator[str]:
    given = [each.title for each in experiment.methods if any(len(run.candidates) == 1 for run in each.runs.values())]
    if given:
        yield f"The learning rate was given, and not chosen among several, for {', '.join(given)}."
    for each in experiment.methods:
        rates, found = _tried(experiment, each), set()
        if len(rates) > 1:
            ends = {min(rates): "smallest", max(rates): "largest"}
            chosen = {run.plan.learning_rate for run in each.runs.values() if len(run.candidates) > 1}
            found = {ends[rate] for rate in chosen if rate in ends}
        if found:
            yield (
                f"{each.title}: the {' and the '.join(sorted(found))} learning rate tried was chosen; a better one "
                "may lie beyond."
            )


def _several_rates(experiment: Experiment) -> Iterator[str]:
    for each in experiment.methods:
        rates = sorted({run.plan.learning_rate for run in each.runs.values()})
        if len(rates) > 1:
            yield (
                f"{each.title}: the seeds do not have one learning rate ({', '.join(f'{rate:g}' for rate in rates)}). "
                "The same command makes the missing runs."
            )


def _tried(experiment: Experiment, method: MethodRuns) -> frozenset[float]:
    """Return the learning rates that were tried, in this comparison or in a later one that tried more."""
    known = {candidate.learning_rate for run in method.runs.values() for candidate in run.candidates}
    return experiment.tried.get(method.variant, frozenset()) | known


def _selection(experiment: Experiment) -> Iterator[str]:
    for each in experiment.methods:
        selecting = (run for run in each.finished if run.status and run.config.get("schedule") != "full")
        if any(not run.selections for run in selecting):
            yield f"{each.title}: training ended before a subnetwork was selected, so DPS did not happen."
        if any(run.frozen_moved and run.config.get("frozen") not in _MOVING for run in each.finished):
            yield f"{each.title}: frozen entries moved in SUBNETWORK, which must not happen."


def _constant(experiment: Experiment) -> Iterator[str]:
    for domain in experiment.domains:
        found = []
        for each in experiment.methods:
            scores = [run.scores.get(domain, {}) for run in each.finished]
            if len(scores) >= 3 and all(score == scores[0] for score in scores) and set(scores[0].values()) - {1.0}:
                found.append(each.title)
        if found:
            yield (
                f"All seeds have the same score on {domain} with {'; '.join(found)}: these models probably give every "
                "example the same answer, and have learned nothing."
            )


def _surroundings(experiment: Experiment) -> Iterator[str]:
    runs = [run for each in experiment.methods for run in each.finished]
    machines = [{name: value for name, value in run.hardware.items() if name != "memory"} for run in runs]
    for what, found in (
        ("hardware", machines),
        ("package versions", [run.versions for run in runs]),
        ("kinds of memory", [run.memory_kind for run in runs]),
    ):
        if any(each != found[0] for each in found):
            cost = "scores" if what == "package versions" else "times and memory"
            yield f"The runs had different {what}: compare {cost} with care."
    timing = experiment.timing
    if timing is not None and runs and timing.versions and timing.versions != runs[0].versions:
        names = [name for name, version in timing.versions.items() if version != runs[0].versions.get(name)]
        yield f"Step times were measured with other versions than the runs had, of {', '.join(names)}."
