"""The flags of the command line, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_dps.compare.cli.specification import read_specification, without_rates
from peft_dps.compare.data.user_data import OwnData
from peft_dps.compare.settings import Settings

_GIVEN = argparse.SUPPRESS  # a flag that is not given leaves the word to the file
_SETTINGS = {
    "epochs": "passes over the training examples",
    "batch-size": "examples in a batch",
    "weight-decay": "decay of AdamW",
    "warmup": "fraction of the steps in which the learning rate rises",
    "max-length": "tokens of an example at most",
    "validation-size": "examples held out to choose rates by, at most a fifth (default: 500, or 0 if all are given)",
    "test-size": "test examples per domain at most (default: all)",
    "evaluations": "points of the learning curve",
}
_FRACTIONS = ("epochs", "weight-decay", "warmup")
_REFERENCE_HELP = "what the others are tested against (default: full, or else the first method)"
_OURS = ("command", "run", "report", "traceback")  # of the command line, not of the comparison
_OWN = {  # what else is said of `--data`, and the field of `OwnData` for it
    "test": "test",
    "text_column": "text_columns",
    "label_column": "label_column",
    "group_column": "group_column",
    "data_config": "config",
    "metrics": "metrics",
}


def add_compare_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `compare`. Their names are those of the specification file."""
    add = parser.add_argument
    add("--file", type=Path, default=_GIVEN, help="specification, .toml; a flag overrides what the file says")
    known = 'names, such as full, lora, random-columns or dps-dense:{"density":0.3}; a wrong one lists all'
    add("--methods", nargs="+", default=_GIVEN, metavar="METHOD", help=known)
    add("--tasks", nargs="+", default=_GIVEN, metavar="TASK", help="names, as sentiment or glue/cola")
    _add_data_flags(parser, default=_GIVEN, otherwise="or give --tasks")
    add("--probes", nargs="+", default=_GIVEN, metavar="PROBE", help="articles, stsb, a file of rated pairs or .txt")
    add("--model", default=_GIVEN, help="path or Hub id of the model (default: a 22M one from the package index)")
    add(
        "--train-sizes",
        "--train-size",
        nargs="+",
        default=_GIVEN,
        metavar="N",
        help="training examples (default: all)",
    )
    add("--seeds", nargs="+", default=_GIVEN, metavar="SEED", help="seeds, as 0 1 2 or 0-4 (default: 0-4)")
    add(
        "--tuning-seeds",
        type=int,
        default=_GIVEN,
        metavar="N",
        help="seeds each learning rate is tried with (default: 1)",
    )
    add("--learning-rates", nargs="+", default=_GIVEN, metavar="RATE", help="for all, or METHOD=RATE,RATE")
    for name, meaning in _SETTINGS.items():
        default = getattr(Settings(), name.replace("-", "_"))
        shown = "" if default is None else f" (default: {default})"
        add(f"--{name}", type=float if name in _FRACTIONS else int, default=_GIVEN, metavar="N", help=meaning + shown)
    add("--precision", choices=("fp32", "bf16"), default=_GIVEN, help="bf16 is mixed precision (default: fp32)")
    add("--attention", choices=("eager", "sdpa"), default=_GIVEN, help="attention (default: as transformers chooses)")
    add("--jobs", type=int, default=_GIVEN, metavar="N", help="runs at the same time, on GPUs in turn (default: 1)")
    add(
        "--no-timing",
        dest="timing",
        action="store_false",
        default=_GIVEN,
        help="measure no step times before the runs",
    )
    add("--reference", default=_GIVEN, metavar="METHOD", help=_REFERENCE_HELP)
    add("--imports", nargs="+", default=_GIVEN, metavar="MODULE", help="modules that register methods or tasks")
    add("--data-folder", type=Path, default=_GIVEN, help="local folder of data sets, as cola/train.parquet")
    add("--cache", type=Path, default=_GIVEN, help="folder for the fetched assets (default: the user's cache folder)")
    add("--output", type=Path, default=_GIVEN, help="result file (default: runs/compare.jsonl)")
    add("--no-report", dest="report", action="store_false", help="write no report in the end")


def add_demo_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `demo`."""
    add = parser.add_argument
    add("--model", help="path or Hub id of a model (default: a 22M one from the package index)")
    _add_data_flags(parser, default=None, otherwise="default: movie reviews")
    add("--train-size", type=int, help="training examples (default: 256, or all of --data)")
    add("--test-size", type=int, default=250, help="test examples per domain at most")
    add("--epochs", type=float, default=3, help="passes over the training examples")
    add("--learning-rate", type=float, help="peak learning rate of all methods (default: each method's own)")
    add("--seed", type=int, default=0, help="seed of everything that is drawn")
    add("--output", type=Path, default=Path("runs/demo"), help="folder for results and report")
    add("--cache", type=Path, help="folder for the fetched assets (default: the user's cache folder)")


def add_report_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `report`."""
    add = parser.add_argument
    add("results", type=Path, nargs="+", help="result files of comparisons (JSON lines)")
    add("--output", type=Path, help="folder for the report (default: named after the result file, beside it)")
    add("--reference", metavar="METHOD", help=_REFERENCE_HELP)


def _add_data_flags(parser: argparse.ArgumentParser, default: Any, otherwise: str) -> None:
    add = parser.add_argument
    add("--data", default=default, help=f"Hub id, or csv, tsv, json, jsonl or parquet file ({otherwise})")
    add("--test", default=default, help="the same for the test data (default: a split of --data)")
    add("--text-column", action="append", default=default, help="column of texts in --data; twice for pairs")
    add("--label-column", default=default, help="column to predict in --data (default: label)")
    add("--group-column", default=default, help="rows equal in this column stay on one side of a split of --data")
    add("--data-config", default=default, metavar="NAME", help="configuration of --data on the Hub, if it has several")
    add("--metrics", nargs="+", default=default, metavar="METRIC", help="metrics of --data; their mean is the score")
    add("--other", action="append", default=default, metavar="NAME=DATA", help="a further domain; repeatable")


def specification_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the specification that the flags of `compare` make, together with the file they name.

    Raises:
        ValueError: A flag or the file cannot work.
        OSError: The file cannot be read.
    """
    given = {name: value for name, value in vars(options).items() if name not in _OURS}
    content = read_specification(given.pop("file")) if "file" in given else {}
    own = _data_fields(given)
    for name in ("data", "other", *_OWN):
        given.pop(name, None)
    if own is not None:
        content["data"] = [own]
    if "learning_rates" in given:
        given["learning_rates"] = _rates(given["learning_rates"])
        if "methods" in content:  # a file may give a method rates of its own, which the flag replaces
            content["methods"] = without_rates(content["methods"], given["learning_rates"])
    content.setdefault("output", Path("runs/compare.jsonl"))
    return {**content, **given}


def own_data_of(options: argparse.Namespace) -> OwnData | None:
    """Return the user's own data as the flags of `demo` say it; None without any.

    Raises:
        ValueError: A flag cannot work.
    """
    own = _data_fields({name: value for name, value in vars(options).items() if value is not None})
    return None if own is None else OwnData(**own)


def _data_fields(given: Mapping[str, Any]) -> dict[str, Any] | None:
    others = dict(other.split("=", 1) for other in given.get("other", []) if "=" in other)
    if len(others) != len(given.get("other", [])):
        raise ValueError(f"`--other` must be NAME=DATA with different names, got {given['other']}.")
    own = {field: given[flag] for flag, field in _OWN.items() if flag in given}
    if others:
        own["others"] = others
    if "data" not in given:
        if own:
            flags = ", ".join(f"`--{flag.replace('_', '-')}`" for flag in (*_OWN, "other") if flag in given)
            raise ValueError(f"{flags} goes with `--data`, the data to train on.")
        return None
    return {"source": given["data"], **own}


def _rates(items: Sequence[str]) -> Any:
    try:
        if not any("=" in item for item in items):
            return [float(item) for item in items]
        named = (item.split("=", 1) for item in items)
        return {method: [float(rate) for rate in rates.split(",")] for method, rates in named}
    except ValueError as error:
        raise ValueError(
            f"`--learning-rates` must be numbers, or METHOD=NUMBER,NUMBER for each method, got {' '.join(items)}."
        ) from error
