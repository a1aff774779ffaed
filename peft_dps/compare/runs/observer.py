"""Shows how far a comparison is, and how long it will take."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.run import Run

_UNITS = 1000  # of progress in a run, so that the time left also follows the run in hand


class Observer:
    """Progress in the terminal: all runs together, and each one in hand.

    Args:
        console: Where to show it.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}")
        left = TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(elapsed_when_finished=False)
        self._bars = Progress(*columns, *left, console=console, transient=True, speed_estimate_period=3600)
        self._all = self._bars.add_task("runs", total=None, note="")
        self._runs, self._done = 0, 0
        self._in_hand: dict[str, tuple[TaskID, float]] = {}

    def __enter__(self) -> Observer:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def add(self, runs: int) -> None:
        """Say that there are so many runs, or so many more."""
        self._runs += runs
        self._bars.update(self._all, total=self._runs * _UNITS, description=f"{self._runs} runs")

    def start(self, plan: Plan, title: str) -> None:
        """Say that a run begins."""
        bar = self._bars.add_task(describe(plan, title), total=None, note="starting")
        self._in_hand[plan.key] = bar, 0.0

    def step(self, plan: Plan, step: int, steps: int, note: str) -> None:
        """Say how far a run is."""
        if plan.key not in self._in_hand:
            return
        bar, before = self._in_hand[plan.key]
        now = _UNITS * step / steps
        self._in_hand[plan.key] = bar, now
        self._bars.update(bar, completed=step, total=steps, note=f"{step}/{steps} steps, {note}")
        self._advance(now - before)

    def finish(self, run: Run) -> None:
        """Say that a run ended, and how."""
        bar, before = self._in_hand.pop(run.plan.key, (None, 0.0))
        if bar is not None:
            self._bars.remove_task(bar)
        self._done += 1
        self._advance(_UNITS - before)
        name = f"{self._done}/{self._runs} {describe(run.plan, run.title)}"
        if run.failed:
            self.console.print(f"{name}: failed: {run.error}", style="red", markup=False)
        else:
            score = run.score() if run.plan.phase == "test" else run.validation_score
            self.console.print(f"{name}: {score:.4f} in {run.seconds:.0f} s", markup=False, highlight=False)

    def skip(self, runs: int) -> None:
        """Say that runs need not be made, since the result file has them."""
        self.console.print(f"{runs} runs are finished already and are not repeated.")
        self.add(-runs)

    def say(self, text: str) -> None:
        """Show a line."""
        self.console.print(text, markup=False)

    def _advance(self, units: float) -> None:
        self._bars.update(self._all, advance=units, note=f"{self._done} done")


def describe(plan: Plan, title: str) -> str:
    """Return a short name of a run."""
    size = "" if plan.train_size is None else f", {plan.train_size} examples"
    tuning = f", trying {plan.learning_rate:g}" if plan.phase == "tune" else ""
    return f"{title}, {plan.task}{size}, seed {plan.seed}{tuning}"
