"""The registry of tasks: from a name to what is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from peft_dps.compare.data import glue, nli
from peft_dps.compare.data.assets import fetch_assets
from peft_dps.compare.data.sentiment import sentiment_task
from peft_dps.compare.data.task import Task
from peft_dps.compare.data.user_data import OwnData
from peft_dps.compare.settings import Settings


@dataclass(frozen=True)
class Place:
    """Where tasks find their data.

    Attributes:
        cache: Folder of the embedded assets; None for the user's cache folder.
        data_folder: Local folder of published data sets; None for the Hub.
    """

    cache: Path | None = None
    data_folder: Path | None = None


Load = Callable[[Settings, Place], Task]
TASKS: dict[str, Load] = {}


def register_task(name: str) -> Callable[[Load], Load]:
    """Register a function as the task that the command line calls `name`, in place of one that has it already.

    Returns:
        A decorator that returns its function unchanged. The function takes the settings and the place of the data and
        returns a `Task`, which `build_task` makes from examples.
    """

    def register(load: Load) -> Load:
        TASKS[name] = load
        return load

    return register


def load_task(name: str, settings: Settings, place: Place, own: Mapping[str, OwnData]) -> Task:
    """Load a task by its name.

    Args:
        name: Name of one of the user's own tasks, or of a registered one.
        settings: Sizes of the splits.
        place: Where to find the data.
        own: The user's own data by name.

    Raises:
        ValueError: There is no such task.
        DataError: Its data cannot be loaded.
    """
    if name in own:
        return own[name].task(settings)
    if name not in TASKS:
        known = ", ".join([*own, *TASKS])
        raise ValueError(f"`tasks` must be among {known}, got {name!r}. Your own data is given by `--data`.")
    return TASKS[name](settings, place)


def _sentiment(settings: Settings, place: Place, *, regression: bool) -> Task:
    return sentiment_task(fetch_assets(place.cache).corpora, settings, regression=regression)


def _published(
    load: Callable[[str, Settings, Path | None], Task], name: str, settings: Settings, place: Place
) -> Task:
    return load(name, settings, place.data_folder)


register_task("sentiment")(partial(_sentiment, regression=False))
register_task("sentiment-regression")(partial(_sentiment, regression=True))
for _name in glue.DATA:
    register_task(f"glue/{_name}")(partial(_published, glue.glue_task, _name))
for _name in nli.DATA:
    register_task(f"nli/{_name}")(partial(_published, nli.nli_task, _name))
