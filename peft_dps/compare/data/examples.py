"""Examples of a data set: texts with labels, and how they are split and drawn from."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets.arrow_dataset import Dataset
from datasets.features import ClassLabel, Features, Value

SHARE = 5  # one in five examples is split off for testing, and at most one in five is held out


class DataError(RuntimeError):
    """A data set cannot be read or is not what it should be; the message names the cause and the remedy."""


@dataclass(frozen=True)
class Examples:
    """Texts with labels, ready to be split, drawn from and tokenized.

    Args:
        name: What the data is called in reports.
        texts: N texts.
        labels: N labels: ints in [0, k) that index `label_names`, or floats for regression.
        groups: N names of what must stay on one side of a split.
        label_names: The k classes; empty means regression.
        pairs: N second texts, for tasks on pairs of texts; empty if there are none.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[float, ...]
    groups: tuple[str, ...]
    label_names: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return N."""
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Examples:
        """Return the examples at `indices`, in that order."""
        return replace(
            self,
            texts=tuple(self.texts[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
            groups=tuple(self.groups[i] for i in indices),
            pairs=tuple(self.pairs[i] for i in indices) if self.pairs else (),
        )

    def to_dataset(self) -> Dataset:
        """Return a data set with the columns `text`, `text_pair` (if there are pairs) and `label`."""
        columns: dict[str, tuple[Any, ...]] = {"text": self.texts, "label": self.labels}
        kind = ClassLabel(names=list(self.label_names)) if self.label_names else Value("float32")
        features = Features(text=Value("string"), label=kind)
        if self.pairs:
            columns["text_pair"], features["text_pair"] = self.pairs, Value("string")
        return Dataset.from_dict(columns, features=features)


def group_names(keys: Iterable[object]) -> tuple[str, ...]:
    """Name the groups of examples: those with equal keys get the same name.

    Args:
        keys: One per example; equal ones look alike under `repr`.
    """
    first: dict[str, int] = {}
    return tuple(str(first.setdefault(repr(key), i)) for i, key in enumerate(keys))


def draw_order(seed: int, keys: Sequence[Hashable]) -> list[int]:
    """Return the indices of `keys` in an order drawn by `seed`: a hash, so the same on every machine and Python."""
    return sorted(range(len(keys)), key=lambda i: hashlib.sha256(f"{seed}:{keys[i]}".encode()).digest())


def train_and_test(examples: Examples) -> tuple[Examples, Examples]:
    """Split a fifth off for testing, whole groups at a time and always the same way.

    Args:
        examples: What to split.

    Returns:
        What may be trained on, and what is tested on.

    Raises:
        ValueError: There are too few examples: a part would be empty or lack a class.
    """
    aim = len(examples) / SHARE
    training, test = _split(examples, lambda middle: middle < aim, stops=True)
    if len(test) == 0 or _lacks_class(training, examples) or _lacks_class(test, examples):
        raise ValueError(
            f"The {len(examples)} examples of {examples.name!r} are too few to split a fifth off for testing: each "
            "part needs every class that occurs. Use more data, or give test data of its own (`test`)."
        )
    return training, test


def hold_out(examples: Examples, size: int) -> tuple[Examples, Examples]:
    """Hold examples out, whole groups at a time and always the same way.

    Args:
        examples: What to split.
        size: Examples to hold out, met up to a group, but at most a fifth of all; 0 for none.

    Returns:
        The rest, and what is held out.

    Raises:
        ValueError: A part would be empty or the rest would lack a class.
    """
    if size == 0:
        return examples, examples.take(())
    aim = min(size, len(examples) // SHARE)
    rest, validation = _split(examples, lambda middle: middle <= aim, stops=False)
    if len(validation) == 0 or _lacks_class(rest, examples):
        raise ValueError(
            f"{len(examples)} examples of {examples.name!r} in {len(set(examples.groups))} groups are too few: a "
            "fifth is held out for validation, and the rest needs every class that occurs."
        )
    return rest, validation


def _split(examples: Examples, fits: Callable[[float], bool], *, stops: bool) -> tuple[Examples, Examples]:
    """Hold groups out in a drawn order; what is held out before a group and half of the group has to fit.

    Whether what comes after a group that does not fit is looked at (`stops`) differs between test and validation
    data: the splits of published results are kept.
    """
    sizes = Counter(examples.groups)
    names, held, filled = list(sizes), set(), 0
    for i in draw_order(0, names):
        if fits(filled + sizes[names[i]] / 2):
            held.add(names[i])
            filled += sizes[names[i]]
        elif stops:
            break
    rest = [i for i, group in enumerate(examples.groups) if group not in held]
    return examples.take(rest), examples.take([i for i, group in enumerate(examples.groups) if group in held])


def _lacks_class(part: Examples, whole: Examples) -> bool:
    return len(part) == 0 or (bool(whole.label_names) and set(part.labels) != set(whole.labels))


def subset(examples: Examples, size: int, seed: int = 0) -> Examples:
    """Draw a training set of a given size, with the class balance of the whole.

    With the same seed a smaller draw is contained in a larger one, so that curves over sizes are comparable. Every
    class is in it at least once. For regression the draw is a plain random one.

    Args:
        examples: What to draw from.
        size: Number of examples to draw, in [k, N]; at least 1.
        seed: Draws the examples.

    Returns:
        `size` examples, in the order of `examples`.

    Raises:
        ValueError: `size` is out of range.
    """
    strata = examples.labels if examples.label_names else (0,) * len(examples)
    classes = Counter(strata)
    if not max(1, len(classes)) <= size <= len(examples):
        raise ValueError(f"`size` must be in [{max(1, len(classes))}, {len(examples)}], got {size}.")
    ranks: Counter[float] = Counter()
    places: list[tuple[bool, float, int]] = []
    for i in draw_order(seed, range(len(examples))):
        stratum = strata[i]
        # Places by Sainte-Lague's divisors: proportional to the classes, and a larger draw never takes one back.
        places.append((ranks[stratum] > 0, (ranks[stratum] + 0.5) / classes[stratum], i))
        ranks[stratum] += 1
    return examples.take(sorted(i for _, _, i in sorted(places)[:size]))
