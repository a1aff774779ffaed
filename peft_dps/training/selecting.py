"""Selecting a subnetwork: every weight of an adapter gets its mask."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from peft_dps.errors import EngineError, ScoreError, TargetError
from peft_dps.masking.mask import Mask
from peft_dps.selection.budget import Candidates
from peft_dps.selection.sharded_topk import WEIGHTS_AT_ONCE, select_sharded
from peft_dps.selection.topk import SortableScores, check_one_dtype, select
from peft_dps.tensors.layout import Units
from peft_dps.tensors.processes import Ranks, distinct, together
from peft_dps.training.recipe import Recipe
from peft_dps.training.scoring import scores_of
from peft_dps.training.weight import TargetWeight

logger = logging.getLogger(__name__)
_SELECTING = "Selecting a subnetwork"
_NAMED = 3  # weights that a warning names


class Selector:
    """Selects the subnetwork of an adapter; where weights are sharded, all processes have to call it.

    Args:
        weights: All weights of the adapter, at the end of a phase that gathers evidence.
        recipe: The method.
        adapter: Name of the adapter.
        step: Number of the latest step.
        steps: Steps of the phase in which evidence was gathered.
        phase: Number of the phase that begins.
        selection: Number of the selection, from 1.
        besides: Returns how many entries are trained besides the selection, whatever it is.
    """

    def __init__(
        self,
        weights: Sequence[TargetWeight],
        recipe: Recipe,
        *,
        adapter: str,
        step: int,
        steps: int,
        phase: int,
        selection: int = 1,
        besides: Callable[[], int] = int,
    ) -> None:
        self._weights = weights
        self._indices = {id(weight): index for index, weight in enumerate(weights)}
        owners = dict.fromkeys(recipe.granularity.owner(weight.name) for weight in weights)
        self._places = {owner: place for place, owner in enumerate(owners)}
        self._recipe = recipe
        self._adapter = adapter
        self._step = step
        self._steps = steps
        self._phase = phase
        self._selection = selection
        self._besides = besides
        self._without_evidence: list[str] = []

    @torch.no_grad()
    def run(self) -> None:
        """Give every weight its mask."""
        if self._recipe.budget.takes_all:
            for weight in self._weights:
                weight.choose_all(self._phase)
            return
        # Those that have a mask of this phase got it in an earlier attempt, which an exception ended.
        for weight in self._weights:
            if weight.masked_in == self._phase:
                weight.refreeze()
        waiting = [weight for weight in self._weights if weight.masked_in != self._phase]
        if self._recipe.scope.across:
            self._check_ranks()
        if not waiting:
            return
        if self._recipe.granularity.per_entry:
            for batch in self._batches(waiting):
                self._select_entries(batch)
        else:
            self._select_units(waiting)
        self._warn_of_empty()

    def _check_ranks(self) -> None:
        if len({weight.ranks for weight in self._weights}) > 1:
            raise EngineError(
                f"Adapter {self._adapter!r}: `scope='model'` ranks all weights together, but they are not all cut "
                "over the same processes. Apply `fully_shard` to the whole model, or use `scope='tensor'`."
            )

    def _batches(self, weights: Sequence[TargetWeight]) -> list[list[TargetWeight]]:
        """Batch weights whose masks are chosen at once: one by one where they are whole, many where they are cut."""
        if self._recipe.scope.across:
            return [list(weights)]
        alike: dict[tuple[Ranks | None, torch.dtype | None], list[TargetWeight]] = {}
        for weight in weights:
            alike.setdefault((weight.score_ranks, self._recipe.evidence.dtype_for(weight.weight)), []).append(weight)
        batches = []
        for (ranks, _), found in alike.items():
            at_once = 1 if ranks is None else WEIGHTS_AT_ONCE
            batches += [found[start : start + at_once] for start in range(0, len(found), at_once)]
        return batches

    def _select_entries(self, batch: list[TargetWeight]) -> None:
        ranks, budget = batch[0].score_ranks, self._recipe.budget
        with together([] if ranks is None else [ranks], _SELECTING, EngineError):
            scores = [self._sortable(weight) for weight in batch]
            check_one_dtype(scores)
        problems = self._recipe.scope.problems([weight.name for weight in batch])
        counts = [budget.count(sum(batch[index].entries for index in problem)) for problem in problems]
        if ranks is None:
            masks = [mask for p, count in zip(problems, counts, strict=True) for mask in select(_at(scores, p), count)]
            selected = counts if len(problems) == len(batch) else [int(mask.count_nonzero()) for mask in masks]
        else:
            masks, selected = select_sharded(scores, problems, counts, ranks)
        held = [Mask.of(mask) for mask in masks]  # what may fail comes before any scores are dropped
        for weight, mask, count in zip(batch, held, selected, strict=True):
            weight.choose_entries(mask, count, self._phase)
        self._note_empty(batch, scores, ranks)

    def _select_units(self, weights: list[TargetWeight]) -> None:
        """Select units larger than an entry: few enough for every process to know the scores of all."""
        layouts = [self._units(weight) for weight in weights]
        everyone = distinct(weight.ranks for weight in weights)
        with together(everyone, _SELECTING, EngineError):
            own = [
                weight.unit_sums(units, self._scores(weight)) for weight, units in zip(weights, layouts, strict=True)
            ]
        sums = [
            part if ranks is None else ranks.gather(part).sum(0)
            for ranks, part in zip((weight.score_ranks for weight in weights), own, strict=True)
        ]
        owners = self._owners(weights)
        candidates = []
        for members in owners.values():  # weights of one owner have their units in common
            sizes = tuple(layouts[index].size for index in members)
            total = sum((sums[index].cpu() for index in members[1:]), start=sums[members[0]].cpu())
            with _named(weights[members[0]].name):
                scores = SortableScores.of(self._recipe.granularity.reduce(total, sum(sizes)))
            candidates.append(Candidates(scores, sizes))
        chosen = self._choose(list(owners), candidates)
        for members, choice in zip(owners.values(), chosen, strict=True):
            for index in members:
                weights[index].choose(choice, layouts[index], self._phase)
        firsts = [weights[members[0]] for members in owners.values()]
        self._note_empty(firsts, [each.scores for each in candidates], None)

    def _choose(self, owners: list[str], candidates: list[Candidates]) -> list[torch.Tensor]:
        recipe = self._recipe
        problems = recipe.scope.problems(owners)
        besides = self._besides() if recipe.granularity.spans_weights and recipe.scope.spans_model else 0
        chosen = recipe.budget.choose([[candidates[index] for index in each] for each in problems], besides)
        found = {
            index: mask
            for problem, masks in zip(problems, chosen, strict=True)
            for index, mask in zip(problem, masks, strict=True)
        }
        return [found[index] for index in range(len(candidates))]

    def _owners(self, weights: list[TargetWeight]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for index, weight in enumerate(weights):
            found.setdefault(self._recipe.granularity.owner(weight.name), []).append(index)
        return found

    def _units(self, weight: TargetWeight) -> Units:
        units = self._recipe.granularity.units(weight.layout)
        if units is None:
            raise TargetError(
                f"Nothing tells where the rows and columns of the weight of {weight.name!r} are, which has the shape "
                f"{tuple(weight.parameter.shape)}. Use `granularity='entry'`, or leave it out of the targets."
            )
        return units

    def _scores(self, weight: TargetWeight) -> torch.Tensor:
        return scores_of(
            weight,
            self._recipe,
            index=self._indices[id(weight)],
            step=self._step,
            steps=self._steps,
            selection=self._selection,
            place=self._places[self._recipe.granularity.owner(weight.name)],
            places=len(self._places),
        )

    def _sortable(self, weight: TargetWeight) -> SortableScores:
        scores = weight.limited(self._scores(weight))
        with _named(weight.name):
            return SortableScores.of(scores)

    def _note_empty(self, weights: list[TargetWeight], scores: list[SortableScores], ranks: Ranks | None) -> None:
        """Take note of weights that all evidence says nothing of."""
        if not self._recipe.evidence.looks:
            return
        some = torch.tensor([each.highest > 0 for each in scores], dtype=torch.int32, device="cpu")
        some = some if ranks is None else ranks.sum(some)
        self._without_evidence += [
            weight.name
            for weight, any_ in zip(weights, some.tolist(), strict=True)
            if not any_ and (weight.observed or (weight.is_trained and not weight.layer.training))
        ]

    def _warn_of_empty(self) -> None:
        names = ", ".join(map(repr, self._without_evidence[:_NAMED]))
        more = len(self._without_evidence) - _NAMED
        if names:
            logger.warning(
                "Adapter %r: all scores of %s are 0 at step %d, so that the first units of each are selected. They "
                "are in evaluation mode (call `model.train()`), or their gradients are 0 or so small that the squares "
                "are: then use `score='absolute_gradient'`.",
                self._adapter,
                names if more <= 0 else f"{names} and {more} more",
                self._step,
            )


def _at(scores: list[SortableScores], indices: list[int]) -> list[SortableScores]:
    return [scores[index] for index in indices]


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Add to an error of scores whose they are, and what to do."""
    try:
        yield
    except ScoreError as error:
        raise ScoreError(
            f"The weight of {name!r}: {error} Look for NaN or inf in the gradients of this stage, or in what a score "
            "of your own returns."
        ) from error
