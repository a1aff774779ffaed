"""How a quantized layer is known, without the library that made it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_dps.tuner.quantized import is_packed, is_quantized, linear_shape, remedy_for_quantized, stored_as


class Sized(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


class EetqLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 5, dtype=torch.int8), requires_grad=False)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(3, 5), (5, 3)),
        (Sized(in_features=3, out_features=5), (5, 3)),
        (Sized(infeatures=3, outfeatures=5), (5, 3)),
        (EetqLinear(), (5, 3)),
        (nn.LazyLinear(5), None),
        (Sized(in_features=3), None),
        (Sized(in_features=3.0, out_features=5), None),
        (nn.Embedding(3, 5), None),
        (nn.Conv2d(3, 5, 1), None),
    ],
)
def test_the_shape_that_a_linear_layer_says(module, shape):
    assert linear_shape(module) == shape


@pytest.mark.parametrize("name", ["qweight", "W_q", "weight_packed", "codes"])
def test_packed_under_another_name(name):
    module = Sized(in_features=3, out_features=5, **{name: torch.zeros(2)})
    assert is_packed(module)
    assert is_quantized(module)
    assert stored_as(module) == "Sized, packed"
    assert not is_packed(Sized(in_features=3, out_features=5, **{name: None}))
    assert not is_packed(Sized(in_features=3, out_features=5, **{name: nn.Linear(3, 5)}))  # a projection of that name
    assert not is_packed(Sized(**{name: torch.zeros(2)}))  # a buffer of a module that is no linear layer


def test_weights_by_dtype_and_type():
    linear = nn.Linear(2, 2)
    assert not is_quantized(linear)
    assert not is_quantized(nn.LazyLinear(2))
    assert not is_quantized(nn.ReLU())
    for weight, name in (
        (torch.zeros(2, 2, dtype=torch.int8), "torch.int8"),
        (torch.zeros(2, 2).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.zeros(2, 2).as_subclass(Subclass), "Subclass"),
    ):
        linear.weight = nn.Parameter(weight, requires_grad=False)
        assert is_quantized(linear)
        assert stored_as(linear) == f"Linear, {name}"


def test_each_storage_has_its_remedy():
    assert "use 'column' or 'row'" in remedy_for_quantized("compact", "entry")
    assert "use `storage='compact'`" in remedy_for_quantized("copy", "entry")
