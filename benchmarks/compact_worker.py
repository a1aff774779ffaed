"""A method of `benchmarks.compact` in a process of its own: it trains steps, and counts what they hold."""

from __future__ import annotations

import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.compact_methods import Plan, find_method
from benchmarks.engine import compact_tensors, target_weights, tensors_in
from benchmarks.live import LiveTensors
from benchmarks.models import make_batch
from benchmarks.worker import make_optimizer, set_up
from peft_dps.compare.runs.memory import peak_resident, resident

_STEPS = 3  # before memory is counted: by then a copy of weights has selected its entries


@dataclass(frozen=True)
class Held:
    """What a method holds.

    Attributes:
        trained: Entries of what it trains.
        process: Most bytes of its process, above those before the model was built.
        peak: Most bytes that were allocated in a step.
        kept: Bytes that the forward saves for the backward pass; parameters, buffers and the batch are left out.
        alive: Bytes that are allocated after the forward and were not before it.
        gradients: Bytes of gradients after the backward pass.
        optimizer: Bytes of the optimizer's state.
        parameters: Bytes of parameters and buffers.
        largest: Bytes of the largest weight of a linear layer.
        per_entry: Bytes per entry of the target weights between two steps: W0, units, evidence, optimizer; None where
            that is no compact adapter on a base in fp32.
        file: Bytes of the adapter's file; None where that is no compact adapter on a base in fp32.
        content: Bytes of the values and indices that are in it.
    """

    trained: int
    process: int
    peak: int
    kept: int
    alive: int
    gradients: int
    optimizer: int
    parameters: int
    largest: int
    per_entry: float | None = None
    file: int | None = None
    content: int | None = None


class Worker:
    """A method at work.

    Args:
        name: Name of the method.
        plan: What methods have in common.
    """

    def __init__(self, name: str, plan: Plan) -> None:
        set_up(plan.settings)
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled", UserWarning)  # SHiRA
        self.method, self.plan = find_method(name), plan
        self.batch = make_batch(plan.settings)
        self.before = resident()
        self.model = self.method.build(plan)
        self.optimizer = make_optimizer(
            [each for each in self.model.parameters() if each.requires_grad], plan.settings
        )

    def step(self) -> float:
        """Train one step and return its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self._loss().backward()
        self.optimizer.step()
        return time.perf_counter() - start

    def peak(self) -> int:
        """Return the most bytes of this process, above those before the model was built."""
        return peak_resident() - self.before

    def hold(self) -> Held:
        """Train some steps and return what they hold."""
        for _ in range(_STEPS):
            self.step()
        process = self.peak()  # first: counting takes memory
        kept = self._kept()
        gradients = _bytes(parameter.grad for parameter in self.model.parameters())
        self.optimizer.zero_grad()
        with LiveTensors() as meter:
            self.step()  # in which everything is seen
            self.optimizer.zero_grad()
            meter.reset()
            before = meter.live
            loss = self._loss()
            alive = meter.live - before
            loss.backward()
            self.optimizer.step()
            peak = meter.peak
        self.optimizer.zero_grad()
        return Held(
            trained=sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad),
            process=process,
            peak=peak,
            kept=kept,
            alive=alive,
            gradients=gradients,
            optimizer=_bytes(value for state in self.optimizer.state.values() for value in state.values()),
            parameters=_bytes([*self.model.parameters(), *self.model.buffers()]),
            largest=max(module.weight.nbytes for module in self.model.modules() if isinstance(module, nn.Linear)),
            **(self._compact() if self.method.is_compact and self.plan.four_bits is None else {}),
        )

    def _loss(self) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.plan.four_bits is not None):
            return self.model(**self.batch).loss

    def _kept(self) -> int:
        own = {_key(tensor) for tensor in (*self.model.parameters(), *self.model.buffers(), *self.batch.values())}
        saved: dict[int, torch.UntypedStorage] = {}  # they stay alive, so that no address comes twice

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            for part in _dense_parts(tensor):
                if _key(part) not in own:
                    saved[_key(part)] = part.untyped_storage()
            return tensor

        self.optimizer.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self._loss()
        size = sum(storage.nbytes() for storage in saved.values())
        saved.clear()
        loss.backward()
        self.optimizer.step()
        return size

    def _compact(self) -> dict[str, Any]:
        size, entries = 0, 0
        units: list[torch.Tensor] = []
        for weight, base, tensors in compact_tensors(self.model):
            state = [*self.optimizer.state.get(weight.parameter, {}).values()]
            size += _bytes([base, *tensors, *state, *tensors_in(weight.gathered)])
            entries += base.numel()
            units += tensors
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            file = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
        known = {id(each) for weight in target_weights(self.model) for each in weight.layer.parameters()}
        others = [each for each in self.model.parameters() if each.requires_grad and id(each) not in known]
        return {"per_entry": size / entries, "file": file, "content": _bytes([*units, *others])}


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _dense_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor] if tensor.layout is torch.strided else [tensor._indices(), tensor._values()]


def _bytes(values: Any) -> int:
    """Add up the bytes of tensors; what is None or no tensor has none, and memory that they share counts once."""
    parts = [part for value in values if isinstance(value, torch.Tensor) for part in _dense_parts(value)]
    return sum({_key(part): part.untyped_storage().nbytes() for part in parts}.values())
