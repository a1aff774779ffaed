"""A comparison in writing: a TOML file, flags, or both."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_dps.compare.data.tasks import Place
from peft_dps.compare.data.user_data import OwnData
from peft_dps.compare.methods.choice import Choice
from peft_dps.compare.methods.table import FAMILY
from peft_dps.compare.runs.comparison import METHODS, Comparison
from peft_dps.compare.settings import Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_SETTINGS = frozenset(field.name for field in dataclasses.fields(Settings))
_OWN = frozenset(field.name for field in dataclasses.fields(OwnData))
_PLACE = frozenset(field.name for field in dataclasses.fields(Place))
_LISTS = ("tasks", "probes", "imports")
_PLAIN = frozenset({"model", "tuning_seeds", "jobs", "timing", *_LISTS})
_CHOICE = frozenset({"method", "options", "learning_rates", "title"})
_OTHERS = frozenset({"output", "methods", "data", "train_sizes", "seeds", "learning_rates", "reference"})
KEYS = _OTHERS | _PLAIN | _SETTINGS | _PLACE
ALL = "all"


def read_specification(path: Path) -> dict[str, Any]:
    """Read a specification file.

    Args:
        path: A .toml file.

    Raises:
        ValueError: It is not that, or not well formed.
        OSError: It cannot be read.
    """
    if path.suffix.lower() != ".toml":
        raise ValueError(f"`file` must be a .toml file, got {path.name!r}.")
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"`file` {str(path)!r} is not well formed: {error}") from error
    return content


def to_comparison(content: Mapping[str, Any]) -> Comparison:
    """Turn a specification into a comparison.

    Args:
        content: Values by name: fields of `Comparison`, `Settings` and `Place`; "data" for `own`, a list of tables;
            "learning_rates", a list for all methods or a table by method. Methods are strings as on the command line,
            or tables with "method", "options", "learning_rates" and "title". A training size may be "all", seeds may
            be given as "0-4".

    Raises:
        ValueError: A name is unknown or a value cannot work.
    """
    _require_known("the specification", content, KEYS)
    if "output" not in content:
        raise ValueError("`output` must name the result file, got none.")
    rates = content.get("learning_rates")
    named = _listed("methods", content.get("methods", METHODS))
    methods = [_choice(item) for name in named for item in (FAMILY if name == "family" else [name])]
    values: dict[str, Any] = {
        "output": Path(_text("output", content["output"])),
        "methods": [_with_rates(choice, rates) for choice in methods],
        "own": [_own_data(item) for item in _listed("data", content.get("data", []))],
        "settings": Settings(**{name: content[name] for name in _SETTINGS & set(content)}),
        "place": Place(**{name: Path(_text(name, content[name])) for name in _PLACE & set(content)}),
    }
    values.update({name: content[name] for name in _PLAIN & set(content)})
    for name in _LISTS:
        values[name] = [_text(name, item) for item in _listed(name, content.get(name, []))]
    if "train_sizes" in content:
        values["train_sizes"] = [
            None if size == ALL else _number("train_sizes", size)
            for size in _listed("train_sizes", content["train_sizes"])
        ]
    if "reference" in content:
        values["reference"] = Choice.parse(_text("reference", content["reference"])).variant
    for name in ("seeds", "tuning_seeds"):
        is_count = name == "tuning_seeds" and isinstance(content.get(name), int)
        if name in content and not is_count:
            values[name] = _seed_list(_listed(name, content[name]))
    if isinstance(rates, Mapping) and (unknown := set(rates) - {choice.method for choice in methods}):
        raise ValueError(f"`learning_rates` must be of methods that are compared, got {', '.join(sorted(unknown))}.")
    return Comparison(**values)


def without_rates(methods: Any, rates: Any) -> list[Any]:
    """Return the methods of a file without rates of their own, where others replace these.

    Args:
        methods: "methods" of a specification.
        rates: The others: a list for all methods, or a table by method.

    Raises:
        ValueError: A method is not well formed.
    """
    found = [item if item == "family" else _choice(item) for item in _listed("methods", methods)]
    return [
        dataclasses.replace(each, learning_rates=None)
        if isinstance(each, Choice) and (not isinstance(rates, Mapping) or each.method in rates)
        else each
        for each in found
    ]


def _choice(item: Any) -> Choice:
    if isinstance(item, Choice):
        return item
    if isinstance(item, str):
        return Choice.parse(item)
    if not isinstance(item, Mapping) or "method" not in item:
        raise ValueError(f"`methods` must hold names, or tables with `method`, got {item!r}.")
    _require_known("a method", item, _CHOICE)
    choice = Choice.parse(_text("method", item["method"]))
    rates = tuple(_listed("learning_rates", item["learning_rates"])) if "learning_rates" in item else None
    options = item.get("options", {})
    if not isinstance(options, Mapping):
        raise ValueError(f"`options` of method {choice.method!r} must be a table, got {options!r}.")
    return Choice(choice.method, {**choice.options, **options}, rates, item.get("title"))


def _with_rates(choice: Choice, rates: Any) -> Choice:
    if rates is None or choice.learning_rates is not None:
        return choice
    own = rates.get(choice.method) if isinstance(rates, Mapping) else rates
    return choice if own is None else dataclasses.replace(choice, learning_rates=tuple(_listed("learning_rates", own)))


def _own_data(item: Any) -> OwnData:
    if not isinstance(item, Mapping) or not isinstance(item.get("source"), str):
        raise ValueError(f"`data` must hold tables with `source`, got {item!r}.")
    _require_known("`data`", item, _OWN)
    values = dict(item)
    for name, value in item.items():
        if name in ("text_columns", "metrics"):
            values[name] = [_text(name, column) for column in _listed(name, value)]
        elif name != "others" and value is not None:
            values[name] = _text(name, value)
    others = values.get("others", {})
    if not isinstance(others, Mapping):
        raise ValueError(f"`others` must be a table of names and data, got {others!r}.")
    return OwnData(**{**values, "others": {name: _text("others", source) for name, source in others.items()}})


def _seed_list(items: Sequence[Any]) -> list[int]:
    seeds: list[int] = []
    for item in items:
        if isinstance(item, str) and (found := re.fullmatch(r"(\d+)-(\d+)", item)):
            seeds.extend(range(int(found[1]), int(found[2]) + 1))
        else:
            seeds.append(_number("seeds", item))
    return seeds


def _require_known(what: str, content: Mapping[str, Any], known: frozenset[str]) -> None:
    if unknown := sorted(set(content) - known):
        raise ValueError(f"{what} must have only {', '.join(sorted(known))}, got {', '.join(map(repr, unknown))}.")


def _listed(name: str, value: Any) -> list[Any]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        if isinstance(value, (str, int, float, Mapping)):
            return [value]
        raise ValueError(f"`{name}` must be a list, got {value!r}.")
    return list(value)


def _number(name: str, value: Any) -> int:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be whole numbers, got {value!r}.")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError(f"`{name}` must be text, got {value!r}.")
    return str(value)
