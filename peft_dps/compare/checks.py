"""What a reader of a contest has to know before believing its numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

from peft_dps.compare.contest import Contender, Contest
from peft_dps.compare.run import Run


def checks(contest: Contest) -> list[str]:
    """Look for what makes numbers not comparable, incomplete or doubtful.

    Args:
        contest: The contest.

    Returns:
        A sentence each; none if nothing is wrong.
    """
    return [
        *_failures(contest),
        *_missing(contest),
        *_pairing(contest),
        *_superseded(contest),
        *_edges(contest),
        *_selection(contest),
        *_constant(contest),
        *_surroundings(contest),
    ]


def _failures(contest: Contest) -> Iterator[str]:
    for each in contest.contenders:
        for seed, run in sorted(each.runs.items()):
            if run.failed:
                yield f"{each.title} failed with seed {seed}: {run.error}"
            elif bad := [domain for domain in contest.domains if math.isnan(each.scores(domain)[seed])]:
                yield f"{each.title} has no number with seed {seed} on {', '.join(bad)}; that counts as a failure."


def _missing(contest: Contest) -> Iterator[str]:
    for each in contest.contenders:
        if missing := [str(seed) for seed in contest.seeds if seed not in each.runs]:
            yield f"{each.title} was not run with seed {', '.join(missing)}."


def _pairing(contest: Contest) -> Iterator[str]:
    if contest.reference is None:
        yield f"There is no run of {contest.reference_variant!r}, so nothing is tested against it."
    for what, get in (("examples", _data), ("order of the training examples", _order)):
        broken = []
        for seed in contest.seeds:
            found = [get(each.runs[seed]) for each in contest.contenders if seed in each.runs]
            if len(set(found) - {""}) > 1:
                broken.append(str(seed))
        if broken:
            yield f"The {what} differ between methods with seed {', '.join(broken)}: these runs are no fair pairs."


def _data(run: Run) -> str:
    return run.plan.data


def _order(run: Run) -> str:
    return run.order


def _superseded(contest: Contest) -> Iterator[str]:
    for run in contest.superseded:
        title = next(each.title for each in contest.contenders if each.variant == run.plan.variant)
        outcome = "failed" if run.failed else f"score {run.score():.4f}"
        yield (
            f"{title}, seed {run.plan.seed}: an earlier run (learning rate {run.plan.learning_rate:g}, {outcome}) was "
            "repeated with another learning rate or other data and is not counted."
        )


def _edges(contest: Contest) -> Iterator[str]:
    given = [each.title for each in contest.contenders if any(len(run.candidates) == 1 for run in each.runs.values())]
    if given:
        yield f"The learning rate was given, and not chosen among several, for {', '.join(given)}."
    for each in contest.contenders:
        rates, found = _tried(contest, each), set()
        if len(rates) > 1:
            ends = {min(rates): "smallest", max(rates): "largest"}
            chosen = {run.plan.learning_rate for run in each.runs.values() if len(run.candidates) > 1}
            found = {ends[rate] for rate in chosen if rate in ends}
        if found:
            yield (
                f"{each.title}: the {' and the '.join(sorted(found))} learning rate tried was chosen; a better one "
                "may lie beyond."
            )


def _tried(contest: Contest, contender: Contender) -> frozenset[float]:
    """Return the learning rates that were tried, in this comparison or in a later one that tried more."""
    known = {candidate.learning_rate for run in contender.runs.values() for candidate in run.candidates}
    return contest.tried.get(contender.variant, frozenset()) | known


def _selection(contest: Contest) -> Iterator[str]:
    for each in contest.contenders:
        if any(run.stages and not run.selections for run in each.finished):
            yield f"{each.title}: training ended before a subnetwork was selected, so DPS did not happen."
        if any(run.frozen_moved and run.config.get("frozen") != "gradient" for run in each.finished):
            yield f"{each.title}: frozen entries moved in SUBNETWORK, which must not happen."


def _constant(contest: Contest) -> Iterator[str]:
    for domain in contest.domains:
        found = []
        for each in contest.contenders:
            scores = [run.scores.get(domain, {}) for run in each.finished]
            if len(scores) >= 3 and all(score == scores[0] for score in scores) and set(scores[0].values()) - {1.0}:
                found.append(each.title)
        if found:
            yield (
                f"All seeds have the same score on {domain} with {'; '.join(found)}: these models probably give every "
                "example the same answer, and have learned nothing."
            )


def _surroundings(contest: Contest) -> Iterator[str]:
    for what, get in (("hardware", _hardware), ("package versions", _versions), ("kinds of memory", _memory)):
        if len({get(run) for each in contest.contenders for run in each.finished}) > 1:
            cost = "scores" if what == "package versions" else "times and memory"
            yield f"The runs had different {what}: compare {cost} with care."


def _hardware(run: Run) -> str:
    return json.dumps({name: value for name, value in run.hardware.items() if name != "memory"}, sort_keys=True)


def _versions(run: Run) -> str:
    return json.dumps(run.versions, sort_keys=True)


def _memory(run: Run) -> str:
    return run.memory_kind
