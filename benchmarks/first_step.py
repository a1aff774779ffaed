"""How long it takes until training goes on from saved weights: loading them, and the first step."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from benchmarks.crew import crew_of
from benchmarks.models import build_model, load_model, make_batch
from benchmarks.ratio import Spread
from benchmarks.rounds import turned
from benchmarks.settings import Settings
from benchmarks.variant import VARIANTS
from benchmarks.worker import make_optimizer, set_up, synchronize


@dataclass(frozen=True)
class LoadTimes:
    """Seconds until training goes on.

    Attributes:
        base: Loading the pretrained model that an adapter belongs to; 0 for a fully fine-tuned one.
        load: Loading the adapter onto it, ready to train, or the fully fine-tuned model.
        step: Making the optimizer, and the first step.
    """

    base: float
    load: float
    step: float


class Loader:
    """Saves a variant once, and then loads it whenever it is told to.

    Args:
        name: Name of the variant; without DPS or LoRA in it, a model is saved and no adapter.
        settings: Settings of the run.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        set_up(settings)
        self.settings = settings
        self.batch = make_batch(settings)
        self._folder = tempfile.TemporaryDirectory()
        self.base, self.own = (Path(self._folder.name) / part for part in ("base", "own"))
        model = VARIANTS[name].build(settings)
        self.trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.is_adapter = isinstance(model, PeftModel)
        if self.is_adapter:
            build_model(settings).save_pretrained(self.base)
        model.save_pretrained(self.own)

    def load(self) -> LoadTimes:
        """Load, train one step, and forget the model again."""
        start = time.perf_counter()
        model: nn.Module = load_model(self.settings, self.base if self.is_adapter else self.own)
        synchronize(self.settings.device)
        middle = time.perf_counter()
        base = 0.0
        if self.is_adapter:
            model = PeftModel.from_pretrained(model, self.own, is_trainable=True)
            synchronize(self.settings.device)
            base, start = middle - start, middle
        loaded = time.perf_counter()
        self._step(model)
        times = LoadTimes(base, loaded - start, time.perf_counter() - loaded)
        del model
        gc.collect()
        return times

    def _step(self, model: nn.Module) -> None:
        parameters = dict(model.train().named_parameters())
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in self.trained)
        optimizer = make_optimizer([parameters[name] for name in self.trained], self.settings)
        model(**self.batch).loss.backward()
        optimizer.step()
        synchronize(self.settings.device)


def measure_loading(comparisons: Sequence[tuple[str, str]], settings: Settings, rounds: int) -> dict[str, Any]:
    """Load variants in turn, and compare them.

    Args:
        comparisons: Which variant is held against which.
        settings: Settings of the run.
        rounds: How often each is loaded, after once that does not count.

    Returns:
        The ratios, and the seconds of each round; JSON-ready.
    """
    names = list(dict.fromkeys(name for pair in comparisons for name in reversed(pair)))
    taken: dict[str, list[LoadTimes]] = {name: [] for name in names}
    with crew_of(Loader, names, settings) as crew:
        for number in range(rounds + 1):
            for name in turned(names, number):
                times = crew.ask(name, "load")
                if number > 0:
                    taken[name].append(times)
    return {
        "ratios": [
            {
                "variant": variant,
                "against": against,
                "load": _ratio(taken[variant], taken[against], with_base=False),
                "load_with_base": _ratio(taken[variant], taken[against], with_base=True),
            }
            for variant, against in comparisons
        ],
        "seconds": {name: [asdict(times) for times in each] for name, each in taken.items()},
    }


def _ratio(ours: list[LoadTimes], theirs: list[LoadTimes], *, with_base: bool) -> dict[str, float]:
    def seconds(times: LoadTimes) -> float:
        return times.load + times.step + (times.base if with_base else 0.0)

    return asdict(Spread.of([seconds(a) / seconds(b) for a, b in zip(ours, theirs, strict=True)]))
