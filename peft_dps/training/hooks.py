"""Optimizer hooks: they hand gradients to the controllers before a step, and the weights after it.

torch's global step hooks fire in every training loop, so nothing has to be called by the user. What they leave to
do: one logical step may take several optimizers, a step may be nested in another, gradients may come into being
only in a closure, an exception skips the hook after the step, and some steps are none.
"""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peft_dps.errors import EngineError
from peft_dps.training.controller import Controller
from peft_dps.training.guards import check_optimizer
from peft_dps.training.weight import TargetWeight

logger = logging.getLogger(__name__)

_warned: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # of step hooks of their own

Work = list[tuple[Controller, list[TargetWeight]]]


class _OpenStep:
    """An optimizer step in progress."""

    def __init__(self, optimizer: Optimizer, work: Work, frame: FrameType) -> None:
        self.optimizer = optimizer
        self.work = work
        self.frames = [frame]  # of the step itself and of the steps nested in it
        self.wrapped = False  # whether there is a closure
        self.closure_runs = 0

    def take_gradients(self) -> None:
        """Count the step and hand over its gradients, unless it is none."""
        grad_scale, found_inf = (getattr(self.optimizer, name, None) for name in ("grad_scale", "found_inf"))
        if found_inf is not None and float(found_inf) > 0:
            return
        _begin_anew(self.optimizer)
        for controller, weights in self.work:
            with_gradient = [weight for weight in weights if weight.has_gradient]
            if not with_gradient:
                controller.see_no_gradient(weights)
                continue
            if self.closure_runs <= 1:
                controller.begin_call(weights, self.optimizer)
            elif controller.gathers:
                raise EngineError(
                    f"{type(self.optimizer).__name__} evaluated its closure {self.closure_runs} times in one step, so "
                    "it is unclear which gradient to score. Use an optimizer that evaluates it once."
                )
            controller.see_caller(self.frames[0])
            controller.take_gradients(with_gradient, self.optimizer, grad_scale)
            controller.before_step(weights)  # of a stage that has begun now

    def expect(self) -> None:
        for controller, weights in self.work:
            controller.expect_call(weights)

    def wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that hands over the gradients when the original has made them."""

        def closure_then_gradients() -> Any:
            result = closure()
            self.closure_runs += 1
            self.take_gradients()
            return result

        self.wrapped = True
        return closure_then_gradients

    def check_closure(self) -> None:
        """Check, when the step is over, that its closure was called, which hands over the gradients."""
        unseen = self.wrapped and self.closure_runs == 0
        if unseen and any(weight.parameter.grad is not None for _, weights in self.work for weight in weights):
            raise EngineError(
                f"{type(self.optimizer).__name__} was given a closure and did not call it, so DPS has not seen the "
                "gradients that it applied. Call `step()` without one after `backward()`."
            )

    def hold(self) -> None:
        for controller, weights in self.work:
            controller.after_step(weights, self.optimizer)

    def covers(self, work: Work) -> bool:
        mine = {id(weight) for _, weights in self.work for weight in weights}
        return any(id(weight) in mine for _, weights in work for weight in weights)


class _OpenSteps(threading.local):
    """The steps in progress in this thread."""

    def __init__(self) -> None:
        self.steps: list[_OpenStep] = []


_open = _OpenSteps()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Global pre-hook: score or mask the gradients of the DPS weights that the optimizer is about to update."""
    work = _find_work(optimizer)
    if not work:
        if _open.steps:
            _close_abandoned(_stack())  # they keep their callers' tensors alive
        _begin_anew(optimizer)  # it may have biases of target layers
        return None
    stack = _stack()
    outer = next((step for step in _open.steps if step.frames[0] in stack and step.covers(work)), None)
    if outer is not None:
        outer.frames.append(stack[0])
        return None
    _close_abandoned(stack)
    if _is_phantom(stack):
        return None
    check_optimizer(optimizer, (weight for _, weights in work for weight in weights))
    _warn_of_own_hooks(optimizer)
    step = _OpenStep(optimizer, work, stack[0])
    step.expect()
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):  # there is none, or an optimizer takes something else there
        step.take_gradients()
    elif len(args) > 1:
        args = (args[0], step.wrap(closure), *args[2:])
    else:
        kwargs = {**kwargs, "closure": step.wrap(closure)}
    _open.steps.append(step)
    return args, kwargs


@torch.compiler.disable  # type: ignore[untyped-decorator]
def after_step(optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    """Global post-hook: give frozen entries their bits back when the outermost step on these weights is done."""
    if not _open.steps:
        return
    stack = _stack()
    work = _find_work(optimizer)
    for step in [step for step in _open.steps if step.frames[0] in stack and step.covers(work)]:
        # An inner step that raised, and was caught by the outer one, is not on the stack any more.
        step.frames = [frame for frame in step.frames if frame in stack]
        if len(step.frames) > 1:
            step.frames.pop()
        else:
            _close(step)
            step.check_closure()


def _begin_anew(optimizer: Optimizer) -> None:
    for controller in list(Controller.alive):
        controller.rewinding.begin_anew(optimizer)


def _close(step: _OpenStep) -> None:
    """Finish a step. One whose finish is interrupted stays open, and the next step of the thread finishes it."""
    try:
        step.hold()
    except Exception:
        _open.steps.remove(step)
        raise
    _open.steps.remove(step)


@dataclass(frozen=True)
class _Match:
    """Which target weights an optimizer's parameters are. It keeps no model alive."""

    parameters: tuple[int, ...]
    generation: int
    found: list[tuple[weakref.ref[Controller], list[int]]]


_matches: weakref.WeakKeyDictionary[Optimizer, _Match] = weakref.WeakKeyDictionary()


def _find_work(optimizer: Optimizer) -> Work:
    """Match the optimizer's parameters with the target weights of living models."""
    parameters = tuple(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    match = _matches.get(optimizer)
    if match is None or match.parameters != parameters or match.generation != Controller.generation:
        match = _matches[optimizer] = _match(parameters)
    work = []
    for reference, indices in match.found:
        controller = reference()
        weights = [] if controller is None else [controller.weights[index] for index in indices]
        weights = [weight for weight in weights if weight.exists()]
        if controller is not None and weights:
            work.append((controller, weights))
    return work


def _match(parameters: tuple[int, ...]) -> _Match:
    ids, generation, found = set(parameters), Controller.generation, []
    for controller in list(Controller.alive):
        weights = enumerate(controller.weights)
        indices = [index for index, weight in weights if weight.exists() and id(weight.parameter) in ids]
        if indices:
            found.append((weakref.ref(controller), indices))
    return _Match(parameters, generation, found)


def _close_abandoned(stack: list[FrameType]) -> None:
    """Finish steps that an exception ended: what they did to frozen entries is undone."""
    for step in [step for step in _open.steps if step.frames[0] not in stack]:
        _close(step)


def _warn_of_own_hooks(optimizer: Optimizer) -> None:
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    if optimizer in _warned or not any(getattr(optimizer, name, None) for name in names):
        return
    _warned.add(optimizer)
    logger.warning(
        "%s has step hooks of its own. torch runs them between those of DPS: what they make of gradients is applied "
        "and not scored, and they see frozen entries before these get their bits back. Do that before and after "
        "`optimizer.step()` instead.",
        type(optimizer).__name__,
    )


def _is_phantom(stack: list[FrameType]) -> bool:
    """Tell whether the step only makes optimizer state, as torch.distributed.checkpoint does before saving."""
    return any(
        frame.f_code.co_name == "_init_optim_state" and "distributed" in frame.f_code.co_filename for frame in stack
    )


def _stack() -> list[FrameType]:
    """Return the frames from the optimizer's step outwards, without those of the hook itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _belongs_to_hook(frame.f_code):
        frame = frame.f_back
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _belongs_to_hook(code: CodeType) -> bool:
    return code.co_filename == __file__ or "_dynamo" in code.co_filename


def install() -> None:
    """Register the hooks with torch, once, however often this module is run."""
    for handle in globals().get("_handles", ()):
        handle.remove()
    globals()["_handles"] = (
        register_optimizer_step_pre_hook(before_step),
        register_optimizer_step_post_hook(after_step),
    )
