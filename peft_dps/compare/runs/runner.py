"""Runs a comparison: what is missing in the result file, in processes of their own."""

from __future__ import annotations

import importlib
import logging
import math
import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peft_dps.compare.data.assets import fetch_assets
from peft_dps.compare.data.probes import load_probes, probed
from peft_dps.compare.data.task import Task
from peft_dps.compare.data.tasks import load_task
from peft_dps.compare.methods.choice import Choice
from peft_dps.compare.runs.comparison import EMBEDDED, Comparison
from peft_dps.compare.runs.forecast import forecast
from peft_dps.compare.runs.machine import hardware, versions
from peft_dps.compare.runs.observer import Observer
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.pretrained import check_model, longest_input, quieten
from peft_dps.compare.runs.processes import Processes, Slot, WorkError, slots
from peft_dps.compare.runs.results import Results, append, read
from peft_dps.compare.runs.retention import asked_before
from peft_dps.compare.runs.run import Candidate, Run, Timing
from peft_dps.compare.runs.timing import time_steps
from peft_dps.compare.runs.training import train
from peft_dps.compare.runs.tuning import beyond, choose

_logger = logging.getLogger(__name__)
TIMED_STEPS = 16
EXTENSIONS = 2
"""How often a method's own learning rates are extended while the best one is the smallest or the largest."""


@dataclass(frozen=True)
class _Assignment:
    plan: Plan
    choice: Choice
    task: Task
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def title(self) -> str:
        return self.choice.title or ""

    def failed(self, error: str, **fields: Any) -> Run:
        """Return the record of a run that was not made, or not to its end."""
        metrics = list(self.task.metrics)
        return Run(self.plan, self.title, error, metrics=metrics, candidates=self.candidates, **fields)


_Assign = Callable[[Choice, float, int], _Assignment]
"""Takes a method, a learning rate and a seed."""


def compare(comparison: Comparison, observer: Observer) -> Results:
    """Make every run of a comparison that its result file does not hold yet.

    Within a task and training size, learning rates are tried first, on the validation split, then all seeds are run
    with the rate that was chosen. A run that fails is recorded as failed and the others go on; the next call tries it
    again. Every record is on the disk before the next run begins.

    Args:
        comparison: What to compare.
        observer: Told what happens.

    Returns:
        The records of this comparison; the result file may hold others.

    Raises:
        ValueError: A field of the comparison cannot work; nothing was run.
        DataError: The data of a task cannot be loaded; nothing was run.
        OSError: The model cannot be found, or the result file cannot be written.
    """
    for module in comparison.imports:
        importlib.import_module(module)
    comparison.check()
    choices = [choice.checked() for choice in comparison.methods]
    settings = comparison.settings.holding_out([choice.method for choice in choices if choice.is_tuned])
    quieten()
    is_embedded = comparison.model == EMBEDDED
    model_path = str(fetch_assets(comparison.place.cache).model) if is_embedded else comparison.model
    check_model(model_path)
    longest = longest_input(model_path, settings.max_length)
    comparison = replace(comparison, settings=replace(settings, max_length=longest))
    own = {data.title: data for data in comparison.own}
    tasks = {name: load_task(name, comparison.settings, comparison.place, own) for name in comparison.task_names}
    probes = load_probes(comparison.probes, comparison.settings, comparison.place)
    for probe in probes:
        probe.check(model_path)
    tasks = {name: probed(task, probes) for name, task in tasks.items()}
    for task in tasks.values():
        for size in comparison.train_sizes:
            task.draw(size, comparison.seeds[0])
    comparison.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{comparison.output}.lock", timeout=0):
            return _Runner(comparison, choices, tasks, model_path, observer).run()
    except Timeout as error:
        raise ValueError(f"`output` {str(comparison.output)!r} is being written by another comparison.") from error


class _Runner:
    def __init__(
        self,
        comparison: Comparison,
        choices: Sequence[Choice],
        tasks: dict[str, Task],
        model_path: str,
        observer: Observer,
    ) -> None:
        self.comparison, self.choices, self.tasks = comparison, choices, tasks
        self.model_path, self.observer = model_path, observer
        self.metrics = {data.title: tuple(data.metrics) for data in comparison.own}
        self.results = read(comparison.output)
        self.processes = Processes(comparison.imports)
        self.slots: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in slots(comparison.jobs):
            self.slots.put(slot)
        self.gpu = hardware()["gpu"]
        self.planned: list[str] = []
        self.timed: list[Timing] = []
        self.finished = {key for key, run in self.results.runs.items() if not run.failed}
        self.tuning_seeds = comparison.trying

    def run(self) -> Results:
        asked = partial(asked_before, self.comparison, self.model_path, self.results, self.processes, self.observer)
        self.tasks = {name: asked(task) for name, task in self.tasks.items()}
        if self.comparison.timing:
            self._time()
        groups = []
        for task in self.tasks.values():
            for size in self.comparison.train_sizes:
                drawn = {seed: task.draw(size, seed) for seed in {*self.comparison.seeds, *self.tuning_seeds}}
                groups.append(
                    partial(self._assign, size, {seed: (part, part.fingerprint()) for seed, part in drawn.items()})
                )
        self._announce(groups)
        for assign in groups:
            self._test(assign, self._tune(assign))
        runs = {key: self.results.runs[key] for key in self.planned}
        return Results(runs, self.timed, self.results.damaged)

    def _announce(self, groups: Sequence[_Assign]) -> None:
        """Say how many runs there will be; of a rate that is yet to be chosen, any one stands for the run."""
        wanted = []
        for assign in groups:
            wanted += self._tries(assign, {choice.variant: choice.rates for choice in self.choices if choice.is_tuned})
            wanted += [
                assign(choice, choice.rates[0], seed) for choice in self.choices for seed in self.comparison.seeds
            ]
        any_rate = {replace(self.results.runs[key].plan, learning_rate=0.0).key for key in self.finished}
        left = [
            each.plan
            for each in wanted
            if each.plan.key not in self.finished
            and not (
                each.choice.is_tuned
                and each.plan.phase == "test"
                and replace(each.plan, learning_rate=0.0).key in any_rate
            )
        ]
        timings = {timing.task: timing for timing in self.timed}
        sizes = {(each.plan.task, each.plan.train_size): each.task.sizes for each in wanted}
        devices = 1 if self.gpu is None else len({slot.device for slot in slots(self.comparison.jobs)})

        def cost(plan: Plan) -> float:
            return forecast(plan, sizes[plan.task, plan.train_size], timings[plan.task]) / devices

        known = timings.keys() >= self.tasks.keys()
        self.observer.expect([each.plan for each in wanted], left, cost if known else None)

    def _tries(self, assign: _Assign, rates: Mapping[str, Sequence[float]]) -> list[_Assignment]:
        """Return the runs that try learning rates, which are given by variant."""
        assignments = [
            assign(choice, rate, seed)
            for choice in self.choices
            for seed in self.tuning_seeds
            for rate in rates.get(choice.variant, ())
        ]
        return [replace(each, plan=replace(each.plan, phase="tune", probes={})) for each in assignments]

    def _assign(
        self, size: int | None, drawn: dict[int, tuple[Task, str]], choice: Choice, rate: float, seed: int
    ) -> _Assignment:
        task, data = drawn[seed]
        probes = {probe.name: probe.fingerprint() for probe in task.probes}
        plan = replace(self._plan(choice, rate, task.name, size, seed), data=data, probes=probes)
        return _Assignment(plan, choice, task)

    def _plan(self, choice: Choice, rate: float, task: str, size: int | None, seed: int) -> Plan:
        return Plan(
            method=choice.method,
            options=dict(choice.options),
            learning_rate=rate,
            task=task,
            train_size=size,
            seed=seed,
            model=self.comparison.model,
            settings=self.comparison.settings,
            metrics=self.metrics.get(task, ()),
        )

    def _tune(self, assign: _Assign) -> dict[str, list[Run]]:
        """Try the learning rates; returns the runs of each method that has several, by its variant."""
        wanted = {choice.variant: choice.rates for choice in self.choices if choice.is_tuned}
        tried: dict[str, list[Run]] = {variant: [] for variant in wanted}
        for round_ in range(1 + EXTENSIONS):
            assignments = self._tries(assign, wanted)
            if round_:
                self.observer.add([each.plan for each in assignments if each.plan.key not in self.finished])
            self._run_all(assignments)
            for each in assignments:
                tried[each.choice.variant].append(self.results.runs[each.plan.key])
            further = {
                choice.variant: beyond(choose(tried[choice.variant]))
                for choice in self.choices
                if choice.extends and choice.variant in wanted
            }
            wanted = {variant: (rate,) for variant, rate in further.items() if rate is not None}
        return tried

    def _test(self, assign: _Assign, tried: dict[str, list[Run]]) -> None:
        assignments = []
        for seed in self.comparison.seeds:  # seed by seed: a comparison that is stopped has compared something
            for choice in self.choices:
                runs = tried.get(choice.variant, [])
                candidates = choose(runs) if runs else [Candidate(choice.rates[0], [], math.nan, chosen=True)]
                rate = next(candidate.learning_rate for candidate in candidates if candidate.chosen)
                assignment = replace(assign(choice, rate, seed), candidates=candidates)
                if runs and all(run.failed for run in runs):
                    self.planned.append(assignment.plan.key)
                    self._keep(assignment.failed(f"No learning rate could be tried: {runs[0].error}"))
                else:
                    assignments.append(assignment)
        self._run_all(assignments)

    def _run_all(self, wanted: Sequence[_Assignment]) -> None:
        self.planned += [assignment.plan.key for assignment in wanted]
        missing = [assignment for assignment in wanted if assignment.plan.key not in self.finished]
        with ThreadPoolExecutor(self.comparison.jobs) as pool:
            try:
                for future in as_completed([pool.submit(self._run, assignment) for assignment in missing]):
                    self._keep(future.result())
            except BaseException:  # an interrupt or a full disk: end what runs, and leave it for the next time
                self.processes.close()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _run(self, assignment: _Assignment) -> Run:
        plan, task = assignment.plan, assignment.task
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        slot = self.slots.get()
        try:
            self.observer.start(plan, assignment.title)
            arguments = (plan, assignment.title, task, self.model_path, assignment.candidates)
            run: Run = self.processes.run(train, arguments, slot, partial(self.observer.step, plan))
        except WorkError as error:
            self._log_failure(plan, error)
            machine = {"versions": versions(), "hardware": hardware()}
            run = assignment.failed(str(error), examples=task.sizes, started=started, **machine)
        finally:
            self.slots.put(slot)
        return run

    def _keep(self, run: Run) -> None:
        if self.processes.closed:
            return
        append(run, self.comparison.output)
        self.results.runs[run.plan.key] = run
        self.observer.finish(run)

    def _log_failure(self, plan: Plan, error: WorkError) -> None:
        if self.processes.closed:
            return
        log = Path(f"{self.comparison.output}.failures.log")
        try:
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{plan.key} {plan.variant} {plan.task} seed {plan.seed}: {error}\n{error.details}\n")
        except OSError as fault:
            _logger.warning("The traceback of a failed run cannot be kept: %s", fault)

    def _time(self) -> None:
        for name, task in self.tasks.items():
            seed, size = self.comparison.seeds[0], self.comparison.train_sizes[0]
            plans = [self._plan(choice, choice.rates[0], name, size, seed) for choice in self.choices]
            timing = self._earlier(plans) or self._measure(plans, task.draw(size, seed))
            if timing is not None:
                self.timed.append(timing)

    def _earlier(self, plans: Sequence[Plan]) -> Timing | None:
        variants = [plan.variant for plan in plans]
        for timing in self.results.timings:
            same = timing.fits(plans[0]) and timing.precision == plans[0].settings.precision
            if same and (list(timing.seconds), timing.hardware.get("gpu")) == (variants, self.gpu):
                return timing
        return None

    def _measure(self, plans: Sequence[Plan], task: Task) -> Timing | None:
        self.observer.say(f"Measuring a step of each method on {task.name} ...")
        arguments = (plans, task, self.model_path, TIMED_STEPS)
        try:
            timing: Timing = self.processes.run(time_steps, arguments, Slot(slots(1)[0].device))
        except WorkError as error:
            self._log_failure(plans[0], error)
            _logger.warning("The step times on %s could not be measured: %s", task.name, error)
            return None
        append(timing, self.comparison.output)
        return timing
