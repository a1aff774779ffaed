"""Runs a comparison: what is missing in the result file, in processes of their own."""

from __future__ import annotations

import importlib
import logging
import queue
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from peft_dps.compare.apart import Apart, Seat, WorkError, seats
from peft_dps.compare.assets import fetch_assets
from peft_dps.compare.choice import Choice, beyond, choose
from peft_dps.compare.comparison import EMBEDDED, Comparison
from peft_dps.compare.machine import hardware, versions
from peft_dps.compare.observer import Observer
from peft_dps.compare.plan import Plan
from peft_dps.compare.pretrained import check_model, longest_input
from peft_dps.compare.results import Results, append, read
from peft_dps.compare.run import Candidate, Run, Timing
from peft_dps.compare.task import Task
from peft_dps.compare.tasks import load_task
from peft_dps.compare.timing import time_steps
from peft_dps.compare.training import quieten, train

_logger = logging.getLogger(__name__)
TIMED_STEPS = 16
EXTENSIONS = 2
"""How often a method's own learning rates are extended while the best one is the smallest or the largest."""


@dataclass(frozen=True)
class _Assignment:
    plan: Plan
    title: str
    task: Task
    candidates: list[Candidate]


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
    quieten()
    model_path = find_model(comparison)
    check_model(model_path)
    longest = longest_input(model_path, comparison.settings.max_length)
    comparison = replace(comparison, settings=replace(comparison.settings, max_length=longest))
    own = {data.title: data for data in comparison.own}
    tasks = {name: load_task(name, comparison.settings, comparison.place, own) for name in comparison.task_names}
    for task in tasks.values():
        for size in comparison.train_sizes:
            task.draw(size, comparison.seeds[0])
    comparison.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{comparison.output}.lock", timeout=0):
            return _Runner(comparison, choices, tasks, model_path, observer).run()
    except Timeout as error:
        raise ValueError(f"`output` {str(comparison.output)!r} is being written by another comparison.") from error


def find_model(comparison: Comparison) -> str:
    """Return where the model of a comparison is loaded from."""
    if comparison.model == EMBEDDED:
        return str(fetch_assets(comparison.place.cache).model)
    return comparison.model


def _rates(runs: Sequence[Run]) -> list[float]:
    return sorted({run.plan.learning_rate for run in runs})


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
        self.apart = Apart(comparison.imports)
        self.seats: queue.SimpleQueue[Seat] = queue.SimpleQueue()
        for seat in seats(comparison.jobs):
            self.seats.put(seat)
        self.gpu = hardware()["gpu"]
        self.planned: list[str] = []
        self.timed: list[Timing] = []
        self.finished = {key for key, run in self.results.runs.items() if not run.failed}

    def run(self) -> Results:
        self._announce()
        for name in self.tasks:
            for size in self.comparison.train_sizes:
                drawn = {seed: self.tasks[name].draw(size, seed) for seed in self.comparison.seeds}
                prints = {seed: task.fingerprint() for seed, task in drawn.items()}
                tried = self._tune(name, size, drawn, prints)
                self._test(name, size, drawn, prints, tried)
        if self.comparison.timing:
            self._time()
        runs = {key: self.results.runs[key] for key in self.planned}
        return Results(runs, self.timed, self.results.damaged)

    def _announce(self) -> None:
        tries = sum(len(choice.rates) for choice in self.choices if choice.is_tuned) * len(self._tuning_seeds)
        groups = len(self.tasks) * len(self.comparison.train_sizes)
        runs = groups * (tries + len(self.choices) * len(self.comparison.seeds))
        self.observer.begin(runs)

    @property
    def _tuning_seeds(self) -> Sequence[int]:
        return self.comparison.seeds[: self.comparison.tuning_seeds]

    def _plan(self, choice: Choice, rate: float, task: str, size: int | None, seed: int, data: str) -> Plan:
        comparison = self.comparison
        plan = choice.plan(rate, task, size, seed, comparison.model, comparison.settings)
        return replace(plan, data=data, metrics=self.metrics.get(task, ()))

    def _tune(
        self, name: str, size: int | None, drawn: dict[int, Task], prints: dict[int, str]
    ) -> dict[int, list[Run]]:
        """Try the learning rates; returns the runs of each choice, by its place."""
        tried: dict[int, list[Run]] = {place: [] for place, choice in enumerate(self.choices) if choice.is_tuned}
        wanted = {place: self.choices[place].rates for place in tried}
        for round_ in range(1 + EXTENSIONS):
            plans = {
                place: [
                    replace(self._plan(self.choices[place], rate, name, size, seed, prints[seed]), phase="tune")
                    for seed in self._tuning_seeds
                    for rate in rates
                ]
                for place, rates in wanted.items()
            }
            if round_:
                self.observer.add(sum(map(len, plans.values())))
            self._run_all(
                _Assignment(plan, self.choices[place].title or "", drawn[plan.seed], [])
                for place, group in plans.items()
                for plan in group
            )
            for place, group in plans.items():
                tried[place] += [self.results.runs[plan.key] for plan in group]
            wanted = {place: (rate,) for place in plans if (rate := self._beyond(place, tried[place])) is not None}
        return tried

    def _beyond(self, place: int, tried: Sequence[Run]) -> float | None:
        return beyond(choose(_rates(tried), tried)) if self.choices[place].extends else None

    def _test(
        self,
        name: str,
        size: int | None,
        drawn: dict[int, Task],
        prints: dict[int, str],
        tried: dict[int, list[Run]],
    ) -> None:
        assignments = []
        for seed in self.comparison.seeds:  # seed by seed: a comparison that is stopped has compared something
            for place, choice in enumerate(self.choices):
                runs = tried.get(place, [])
                candidates = choose(_rates(runs) or choice.rates, runs)
                rate = next(candidate.learning_rate for candidate in candidates if candidate.chosen)
                plan = self._plan(choice, rate, name, size, seed, prints[seed])
                if runs and all(run.failed for run in runs):
                    error = f"No learning rate could be tried: {runs[0].error}"
                    self.planned.append(plan.key)
                    metrics = list(drawn[seed].metrics)
                    self._keep(Run(plan, choice.title or "", error, metrics=metrics, candidates=candidates))
                else:
                    assignments.append(_Assignment(plan, choice.title or "", drawn[seed], candidates))
        self._run_all(assignments)

    def _run_all(self, assignments: Iterable[_Assignment]) -> None:
        wanted = list(assignments)
        self.planned += [assignment.plan.key for assignment in wanted]
        missing = [assignment for assignment in wanted if assignment.plan.key not in self.finished]
        if len(missing) < len(wanted):
            self.observer.skip(len(wanted) - len(missing))
        with ThreadPoolExecutor(self.comparison.jobs) as pool:
            try:
                for future in as_completed([pool.submit(self._run, assignment) for assignment in missing]):
                    self._keep(future.result())
            except BaseException:  # an interrupt or a full disk: end what runs, and leave it for the next time
                self.apart.close()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _run(self, assignment: _Assignment) -> Run:
        plan, title, task = assignment.plan, assignment.title, assignment.task
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        seat = self.seats.get()

        def report(step: int, steps: int, note: str) -> None:
            self.observer.step(plan, step, steps, note)

        try:
            self.observer.start(plan, title)
            arguments = (plan, title, task, self.model_path, assignment.candidates)
            run: Run = self.apart.run(train, arguments, seat, report)
        except WorkError as error:
            self._log_failure(plan, error)
            run = Run(
                plan=plan,
                title=title,
                error=str(error),
                metrics=list(task.metrics),
                candidates=assignment.candidates,
                examples=task.sizes,
                started=started,
                versions=versions(),
                hardware=hardware(),
            )
        finally:
            self.seats.put(seat)
        return run

    def _keep(self, run: Run) -> None:
        if self.apart.closed:
            return
        append(run, self.comparison.output)
        self.results.runs[run.plan.key] = run
        self.observer.finish(run)

    def _log_failure(self, plan: Plan, error: WorkError) -> None:
        if self.apart.closed:
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
            plans = [self._plan(choice, choice.rates[0], name, size, seed, "") for choice in self.choices]
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
        self.observer.say(f"Timing steps side by side on {task.name} ...")
        arguments = (plans, task, self.model_path, TIMED_STEPS)
        try:
            timing: Timing = self.apart.run(time_steps, arguments, Seat(seats(1)[0].device))
        except WorkError as error:
            self._log_failure(plans[0], error)
            _logger.warning("The step times on %s could not be measured: %s", task.name, error)
            return None
        append(timing, self.comparison.output)
        return timing
