"""Single examples of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from peft_dps.errors import ConfigError


def examples_of(batches: Iterable[Any]) -> Iterator[Any]:
    """Cut batches into batches of one example each, along the first axis of their tensors.

    Args:
        batches: Tensors, or mappings, tuples and lists of them, which may lie in each other. A mapping becomes a dict.
            What is no tensor, such as None or a flag, stays as it is.

    Raises:
        ConfigError: If a batch holds no tensor with a first axis, or tensors of several lengths along it.
    """
    for batch in batches:
        lengths = dict(_lengths(batch, "the batch"))
        if len(set(lengths.values())) != 1:
            shown = ", ".join(f"{place}: {length}" for place, length in lengths.items())
            found = f"tensors of {shown}" if lengths else f"{type(batch).__name__} without any"
            raise ConfigError(
                "`per_example=True` cuts each batch along the first axis of its tensors, which have to be as long as "
                f"each other, got {found}. Give batches of tensors (or dicts, tuples, lists of them), or cut them "
                "yourself."
            )
        for number in range(next(iter(lengths.values()))):
            yield _cut(batch, slice(number, number + 1))


def _lengths(batch: Any, place: str) -> Iterator[tuple[str, int]]:
    if isinstance(batch, torch.Tensor) and batch.dim():
        yield place, len(batch)
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _lengths(value, f"{place}[{key!r}]")
    elif isinstance(batch, (tuple, list)):
        for number, value in enumerate(batch):
            yield from _lengths(value, f"{place}[{number}]")


def _cut(batch: Any, example: slice) -> Any:
    if isinstance(batch, torch.Tensor) and batch.dim():
        return batch[example]
    if isinstance(batch, Mapping):
        return {key: _cut(value, example) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        cut = [_cut(value, example) for value in batch]
        return type(batch)(*cut) if hasattr(batch, "_fields") else type(batch)(cut)
    return batch
