"""Batches cut into examples."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from transformers import BatchEncoding

from peft_dps.errors import ConfigError
from peft_dps.tuner.examples import examples_of

Pair = namedtuple("Pair", ["x", "y"])
X, Y = torch.randn(3, 4), torch.arange(3)


def test_a_tensor_a_tuple_a_list_and_a_mapping_are_cut_along_the_first_axis():
    assert all(torch.equal(own, X[n : n + 1]) for n, own in enumerate(examples_of([X])))
    for batch in ((X, Y), [X, Y], Pair(X, Y)):
        found = list(examples_of([batch]))
        assert len(found) == 3
        assert {type(own) for own in found} == {type(batch)}
        assert torch.equal(torch.cat([x for x, _ in found]), X)
        assert [y.tolist() for _, y in found] == [[0], [1], [2]]
    for batch in ({"x": X, "y": Y}, BatchEncoding({"x": X, "y": Y})):
        assert [own["y"].tolist() for own in examples_of([batch])] == [[0], [1], [2]]


def test_batches_follow_each_other_in_order():
    assert [own.item() for own in examples_of([Y, Y[:0], Y[1:]])] == [0, 1, 2, 1, 2]


def test_tensors_in_each_other_are_cut_and_the_rest_stays():
    temperature = torch.tensor(2.0)
    first, *_ = examples_of([{"x": (X, {"y": Y}), "use_cache": False, "mask": None, "temperature": temperature}])
    assert torch.equal(first["x"][0], X[:1])
    assert first["x"][1]["y"].tolist() == [0]
    assert (first["use_cache"], first["mask"], first["temperature"]) == (False, None, temperature)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ("text", "str without any"),
        ({"ids": [1, 2, 3]}, "dict without any"),
        (torch.tensor(1.0), "Tensor without any"),
        ({"x": X, "y": Y[:2]}, r"tensors of the batch\['x'\]: 3, the batch\['y'\]: 2"),
    ],
)
def test_what_cannot_be_cut_is_named(batch, found):
    with pytest.raises(ConfigError, match=rf"`per_example=True` cuts each batch .* got {found}"):
        list(examples_of([batch]))
