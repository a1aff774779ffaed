"""`Case`: one model in one setting, and what is measured on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch

from benchmarks.first_step import measure_loading
from benchmarks.footprint import Footprint, count_footprints
from benchmarks.progress import Tell
from benchmarks.ratio import seconds, step_ratios
from benchmarks.rounds import FIGURES, Round, run_rounds
from benchmarks.settings import Settings

ALL, LINEAR = "all", "linear"
# Per set of trained parameters: full fine-tuning of them, and what is held against it.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    ALL: ("full", ("lora", "dps-remaining", "mix-remaining", "dps-narrow", "dps-lean", "mix-lean")),
    LINEAR: ("full-linear", ("lora", "dps-exact", "mix-exact")),
}
# What a process takes before it has a model: the libraries in memory, or a context on the device.
_PROCESS = 600 * 2**20
_USABLE = 0.9  # of the memory that is free now


@dataclass(frozen=True)
class Case:
    """One model in one setting.

    Attributes:
        settings: The settings.
        trained: `ALL` parameters, or the `LINEAR` layers alone.
        methods: Names of the variants to hold against full fine-tuning of the same parameters; None for the usual.
        swept: The setting for whose sake the case is measured; None if for the model's.
    """

    settings: Settings
    trained: str = ALL
    methods: tuple[str, ...] | None = None
    swept: str | None = None

    @property
    def name(self) -> str:
        """What the results call it: everything that tells it from the same model in the default setting."""
        default, own = asdict(Settings(size=self.settings.size)), asdict(self.settings)
        fields = ("batch", "tokens", "density", "optimizer", "dropout")
        marks = [f"{field}={own[field]}" for field in fields if own[field] != default[field]]
        return " ".join([self.settings.size, *([LINEAR] if self.trained == LINEAR else []), *marks])

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """Each variant with the one it is held against."""
        reference, usual = METHODS[self.trained]
        return [(name, reference) for name in (usual if self.methods is None else self.methods)]

    @property
    def variants(self) -> list[str]:
        """All variants, full fine-tuning first."""
        return [METHODS[self.trained][0], *(name for name, _ in self.comparisons)]


def measure_memory(case: Case, tell: Tell) -> dict[str, Any]:
    """Count the memory of each variant, alone in a process.

    Args:
        case: The case.
        tell: Told of progress.

    Returns:
        Per variant, its `Footprint`; JSON-ready.
    """
    tell(f"{case.name}: memory of {len(case.variants)} variants")
    return {name: asdict(each) for name, each in count_footprints(case.variants, case.settings).items()}


def measure_steps(case: Case, tell: Tell, footprints: dict[str, Any]) -> dict[str, Any]:
    """Take the times of steps, with as many variants in turn as fit into memory.

    Args:
        case: The case.
        tell: Told of progress.
        footprints: What `measure_memory` returned.

    Returns:
        Ratios, and the seconds of each step; JSON-ready.
    """
    groups = group_to_fit(case, {name: Footprint(**each) for name, each in footprints.items()})
    result: dict[str, Any] = {"groups": groups, "ratios": [], "runs": []}
    for names in groups:

        def after(each: Round, names: list[str] = names) -> None:
            if each.number in {1, case.settings.rounds} or each.number % case.settings.stage_steps == 0:
                tell(f"{case.name}: {', '.join(names)}: round {each.number} of {case.settings.rounds}")

        run = run_rounds(names, case.settings, after)
        comparisons = [pair for pair in case.comparisons if pair[0] in names]
        result["threads"] = run.threads
        result["ratios"] += [asdict(ratio) for ratio in step_ratios(run, comparisons)]
        result["runs"].append(
            {
                name: {
                    "peak_rss": summary.peak_above,
                    "trained_entries": summary.trained_entries,
                    "selected_fraction": summary.selected_fraction,
                    "frozen_moved": summary.frozen_moved,
                    "seconds": {figure: seconds(run, name, figure, lambda times: times.seconds) for figure in FIGURES},
                }
                for name, summary in run.summaries.items()
            }
        )
    return result


def measure_load(case: Case, tell: Tell, rounds: int) -> dict[str, Any]:
    """Take the times of loading and the first step, each variant beside full fine-tuning alone.

    Args:
        case: The case.
        tell: Told of progress.
        rounds: How often each is loaded.

    Returns:
        Ratios and seconds; JSON-ready.
    """
    result: dict[str, Any] = {"ratios": [], "runs": []}
    for pair in case.comparisons:
        tell(f"{case.name}: loading {pair[0]} beside {pair[1]}")
        measured = measure_loading([pair], case.settings, rounds)
        result["ratios"] += measured["ratios"]
        result["runs"].append(measured["seconds"])
    return result


def group_to_fit(case: Case, footprints: dict[str, Footprint]) -> list[list[str]]:
    """Put variants together that fit into memory at the same time, full fine-tuning into each group.

    Args:
        case: The case.
        footprints: Memory of each variant.

    Raises:
        MemoryError: If a variant and full fine-tuning do not fit together.
    """
    on_cpu = case.settings.device == "cpu"
    free = psutil.virtual_memory().available if on_cpu else torch.cuda.mem_get_info()[0]
    return grouped(case, {name: each.peak + _PROCESS for name, each in footprints.items()}, int(_USABLE * free))


def grouped(case: Case, needs: dict[str, int], limit: int) -> list[list[str]]:
    """Put variants together whose needs add up to at most a limit, full fine-tuning into each group.

    Args:
        case: The case.
        needs: Bytes that each variant needs.
        limit: Bytes that there are.

    Raises:
        MemoryError: If a variant and full fine-tuning need more.
    """
    reference, *others = case.variants
    groups: list[list[str]] = []
    for name in others:
        if needs[reference] + needs[name] > limit:
            raise MemoryError(
                f"Case {case.name!r}: {reference!r} and {name!r} need {(needs[reference] + needs[name]) / 2**30:.1f} "
                f"GiB together, and {limit / 2**30:.1f} GiB may be used. Use a smaller batch, `--trained linear`, "
                "or a smaller model."
            )
        room = (group for group in groups if sum(needs[each] for each in (*group, name)) <= limit)
        group = next(room, None)
        if group is None:
            groups.append([reference, name])
        else:
            group.append(name)
    return groups


def sweep(case: Case, field: str, values: Sequence[float]) -> list[Case]:
    """Return the same case with other values of a setting, and only DPS held against full fine-tuning."""
    methods = tuple(name for name, _ in case.comparisons if name != "lora")
    return [Case(replace(case.settings, **{field: value}), case.trained, methods, field) for value in values]
