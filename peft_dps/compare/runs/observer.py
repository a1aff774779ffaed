"""Shows how far a comparison is, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.run import Run


class Observer:
    """Progress in the terminal: all runs together, and each one in hand. Without a terminal, a line for each run.

    Args:
        console: Where to show it.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        names = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self._bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=names),
            BarColumn(12),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
            expand=True,
        )
        self._all = self._bars.add_task("all runs", total=None, note="")
        self._runs, self._done = 0, 0
        self._seconds, self._passed, self._pace = 0.0, 0.0, 0.0  # as forecast: of all runs, of what is done
        self._cost: Callable[[Plan], float] = lambda plan: 1.0
        self._started = time.monotonic()
        self._in_hand: dict[str, tuple[TaskID, float]] = {}
        self._tasks = self._sizes = 0

    def __enter__(self) -> Observer:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def expect(self, plans: Sequence[Plan], left: Sequence[Plan], cost: Callable[[Plan], float] | None) -> None:
        """Say how many runs there are, and about how long they will take.

        Args:
            plans: All runs.
            left: Those that are not finished yet.
            cost: Returns about how many seconds a run takes; None if that is not known.
        """
        self._tasks, self._sizes = len({plan.task for plan in plans}), len({plan.train_size for plan in plans})
        self._cost, self._pace = cost or self._cost, float(cost is not None)
        self._started = time.monotonic()
        self.add(left)
        tries = sum(plan.phase == "tune" for plan in plans)
        text = f"{len(plans) - tries} runs to report" + (f", {tries} to choose learning rates" if tries else "")
        if finished := len(plans) - len(left):
            text += f"; {finished} are finished already"
        self.say(f"{text}; {self._time_left()}." if cost and left else f"{text}.")

    def add(self, plans: Sequence[Plan]) -> None:
        """Say that there are more runs to make."""
        self._runs += len(plans)
        self._seconds += sum(map(self._cost, plans))

    def start(self, plan: Plan, title: str) -> None:
        """Say that a run begins."""
        self._in_hand[plan.key] = self._bars.add_task(self._name(plan, title), total=None, note="starting"), 0.0
        self._show()

    def step(self, plan: Plan, step: int, steps: int, note: str) -> None:
        """Say how far a run is."""
        if plan.key in self._in_hand:
            bar, _ = self._in_hand[plan.key]
            self._in_hand[plan.key] = bar, self._cost(plan) * step / steps
            self._bars.update(bar, completed=step, total=steps, note=f"{step}/{steps} {note}")
            self._show()

    def finish(self, run: Run) -> None:
        """Say that a run ended, and how."""
        bar, _ = self._in_hand.pop(run.plan.key, (None, 0.0))
        if bar is not None:
            self._bars.remove_task(bar)
        self._done += 1
        self._runs = max(self._runs, self._done)
        self._passed += self._cost(run.plan)
        self._pace = (time.monotonic() - self._started) / self._passed
        self._show()
        name = f"{self._done}/{self._runs} {self._name(run.plan, run.title)}"
        if run.failed:
            self.console.print(f"{name}: failed: {run.error}", style="red", markup=False)
            return
        score = run.score() if run.plan.phase == "test" else run.validation_score
        left = f", {self._time_left()}" if self._done < self._runs else ""
        self.console.print(f"{name}: {100 * score:.1f}{left}", markup=False, highlight=False)

    def say(self, text: str) -> None:
        """Show a line."""
        self.console.print(text, markup=False, highlight=False)

    def _name(self, plan: Plan, title: str) -> str:
        """Return a short name of a run: of task and training size, what tells it from the others."""
        parts = [title, *([plan.task] if self._tasks > 1 else [])]
        if self._sizes > 1:
            parts.append(f"{plan.train_size or 'all'} examples")
        return ", ".join([*parts, f"rate {plan.learning_rate:g}" if plan.phase == "tune" else f"seed {plan.seed}"])

    def _show(self) -> None:
        done = self._passed + sum(part for _, part in self._in_hand.values())
        note = f"{self._done}/{self._runs}" + (f", {self._time_left()}" if self._pace else "")
        self._bars.update(self._all, completed=done, total=self._seconds, note=note)

    def _time_left(self) -> str:
        done = self._passed + sum(part for _, part in self._in_hand.values())
        seconds = max(0.0, self._seconds - done) * self._pace
        for unit, length in (("h", 3600), ("min", 60)):
            if seconds >= 1.5 * length:
                return f"about {seconds / length:.0f} {unit} left"
        return f"about {seconds:.0f} s left"
