"""Effective weights have a first derivative, and say so where another one is asked for."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim import SGD

from peft_dps import DPSConfig
from peft_dps.errors import EngineError
from tests.unit.conftest import layers_of, train, trainable, weights_of

STAGES = pytest.mark.parametrize("steps", [0, 3], ids=["accumulate", "subnetwork"])
JVP_WARNS = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # of what it uses itself


class Reading(nn.Module):
    """Reads the weight of a layer instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)), ["0", "2"], (4, 6)),
    "conv": (lambda: nn.Sequential(nn.Conv1d(6, 6, 3), nn.Tanh(), nn.Conv1d(6, 3, 3)), ["0", "2"], (4, 6, 9)),
    "read": (Reading, ["layer"], (4, 6)),
}


def made(kind, steps):
    """A model of Mix after some steps, its optimizer and a batch."""
    torch.manual_seed(0)
    make, names, shape = NETS[kind]
    model = get_peft_model(make(), DPSConfig(target_modules=names, variant="mix", density=0.6, stage_steps=3))
    optimizer, x = SGD(trainable(model), lr=0.1), torch.randn(shape)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, x


@STAGES
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph=True")
def test_a_derivative_of_gradients_of_weights_is_refused(kind, steps):
    model, _, x = made(kind, steps)
    loss = model(x).square().mean()
    gradients = torch.autograd.grad(loss, trainable(model), create_graph=True)
    with pytest.raises(EngineError, match=r"no second derivative.*`create_graph=True`.*`variant='dense'`"):
        (loss + sum(gradient.square().sum() for gradient in gradients)).backward()
    model.zero_grad()
    model(x).square().mean().backward(create_graph=True)
    penalty = sum(parameter.grad.square().sum() for parameter in trainable(model))
    with pytest.raises(EngineError, match="no second derivative"):
        penalty.backward()


@STAGES
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_derivative_of_gradients_of_inputs_is_refused(kind, steps):
    model, _, x = made(kind, steps)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
    with pytest.raises(EngineError, match="no second derivative"):
        gradient.square().sum().backward()


def test_a_derivative_of_gradients_of_an_embedding_is_refused():
    model = get_peft_model(
        nn.Sequential(nn.Embedding(7, 5)), DPSConfig(target_modules=["0"], variant="mix", stage_steps=3)
    )
    loss = model(torch.arange(7)).pow(3).mean()
    (gradient,) = torch.autograd.grad(loss, trainable(model), create_graph=True)
    with pytest.raises(EngineError, match="no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph=True")
@pytest.mark.parametrize("frozen", ["exact", "gradient"])
def test_a_graph_that_nobody_differentiates_changes_nothing(make_model, batches, frozen):
    plain, with_graph = (make_model(variant="mix", frozen=frozen, stage_steps=3) for _ in range(2))
    first, second = (SGD(trainable(model), lr=0.1, momentum=0.9) for model in (plain, with_graph))
    for x, y in batches(9):
        train(plain, first, [(x, y)])
        second.zero_grad()
        nn.functional.cross_entropy(with_graph(x), y).backward(create_graph=True)
        second.step()
    assert with_graph.dps_status() == plain.dps_status()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(plain), weights_of(with_graph), strict=True))


def in_grad(model, x):
    parameters = {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}

    def loss(values):
        return torch.func.functional_call(model, values, (x,)).square().mean()

    torch.func.grad(loss)(parameters)


def in_vmap(model, x):
    torch.func.vmap(model)(x.unsqueeze(1))


def in_jvp(model, x):
    torch.func.jvp(model, (x,), (torch.ones_like(x),))


@JVP_WARNS
@STAGES
@pytest.mark.parametrize("transform", [in_grad, in_vmap, in_jvp])
@pytest.mark.parametrize("kind", NETS)
def test_transforms_of_functions_are_refused_in_training(kind, transform, steps):
    model, optimizer, x = made(kind, steps)
    with pytest.raises(EngineError, match=r"cannot train under `torch.func`.*`variant='dense'`"):
        transform(model, x)
    model(x).square().mean().backward()  # it trains on
    optimizer.step()
    assert model.dps_status().steps == steps + 1


@JVP_WARNS
@pytest.mark.parametrize("transform", [in_grad, in_vmap, in_jvp])
def test_transforms_of_functions_are_fine_in_evaluation_and_dense(make_model, transform):
    model, _, x = made("linear", 0)
    transform(model.eval(), x)
    dense = make_model()
    transform(dense, torch.randn(4, layers_of(dense)[0].in_features))
