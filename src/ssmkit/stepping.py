"""A model's step under torch.compile."""

from __future__ import annotations

import functools
import itertools
import types
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from . import systems
from .layers import LearnedStart, MultiRate, Sequential
from .layers.base import SequenceLayer, System, refuse_forward_only
from .layers.branches import Branches
from .layers.chain import Chain
from .states import State

__all__ = ["compile_step"]

Step: TypeAlias = Callable[[Tensor, State], tuple[Tensor, State]]

_numbers = itertools.count()


def compile_step(model: SequenceLayer, system: System = None) -> Callable[[Tensor, State], tuple[Tensor, State]]:
    r"""Compiles a model's :meth:`~ssmkit.SequenceLayer.step`, for loops without gradients.

    The system becomes a constant of the compiled code. The layers between two changes of the rate are compiled as one
    part; the phases of :class:`ssmkit.MultiRate`, which are Python integers, stay outside, so that nothing is compiled
    again once every part has run, which is after one frame of the slowest. The first steps compile, for some seconds
    per part, and so do the first steps with another batch size. If rows have different phases, each part runs at every
    sample.

    It works for every model, on any device. On a CPU :class:`ssmkit.streaming.Engine` is faster, but it accepts fewer
    kinds of layers.

    Without a compiler for the device (a C++ compiler for a CPU), it warns and returns the model's own step.

    Arguments:
        model: A causal model. After a change of its weights, call this function again.
        system: What the model's `system()` returned; by default it is made here.

    Returns:
        A function from an input and a state to an output and the next state.

    Raises:
        ValueError: If the model is not causal, or the system has time stamps.

    Example:
        >>> model = ssmkit.Sequential(ssmkit.S4D(4, 8), torch.nn.GELU())
        >>> step = ssmkit.compile_step(model)
        >>> y, state = step(torch.randn(2, 4), model.initial_state(2))
        >>> y.shape
        torch.Size([2, 4])
    """
    if not isinstance(model, SequenceLayer):
        raise TypeError(f"compile_step: `model` must be a `ssmkit.SequenceLayer`, got {type(model).__name__}.")
    if not model.causal:
        refuse_forward_only("compile_step", "step", model)
    with torch.no_grad():
        system = model.system() if system is None else system
        _prepare(system)
    device = next((tensor.device.type for tensor in model.parameters()), "cpu")
    if reason := _missing_compiler(device):
        warnings.warn(
            f"compile_step: torch.compile does not work here, so the step stays eager ({reason}).", stacklevel=2
        )
        return torch.no_grad()(functools.partial(model.step, system=system))
    return torch.no_grad()(_plan(model, system))


def _prepare(system: System) -> None:
    """Prepares every system of a tree: while compiling, systems keep no parts, so each step would make them again."""
    for child in system if isinstance(system, tuple) else ():
        _prepare(child)
    if isinstance(system, systems.System):
        if system.time_stamps is not None:
            raise ValueError(
                "compile_step: the rate of `system` must be a number, got a tensor, which is valid for one call, and a "
                "compiled step runs many samples; use `step` for samples at irregular times."
            )
        system.prepare()


@functools.cache
def _missing_compiler(device: str) -> str | None:
    """Why torch.compile does not work on a device; None if it does."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _compiled(layer: SequenceLayer, system: System) -> Step:
    def segment(u: Tensor, state: State) -> tuple[Tensor, State]:
        y, new = layer.step(u, state, system)
        return y, _contiguous(new)

    # torch.compile limits how often it compiles one code object, so every segment gets a code object of its own.
    code = segment.__code__.replace(co_name=f"segment_{next(_numbers)}")
    own = types.FunctionType(code, segment.__globals__, closure=segment.__closure__)
    return cast(Step, torch.compile(own, dynamic=False))


def _contiguous(state: State) -> State:
    """A state in new strides would compile the segment again."""
    if isinstance(state, tuple):
        return tuple(_contiguous(part) for part in state)
    return state.contiguous() if isinstance(state, Tensor) else state


def _changes_rate(layer: nn.Module) -> bool:
    return any(isinstance(part, MultiRate) for part in layer.modules())


def _plan(layer: SequenceLayer, system: System) -> Step:
    """The step of a layer, made of compiled parts that are as large as possible."""
    if not _changes_rate(layer):
        return _compiled(layer, system)
    if isinstance(layer, LearnedStart):
        return _plan(layer.layer, system)
    if isinstance(layer, MultiRate):
        return _plan_multi_rate(layer, system)
    if isinstance(layer, Chain):
        return _plan_chain(layer, system)
    if isinstance(layer, Branches):
        return _plan_branches(layer, system)
    # A layer of the user's own with a MultiRate inside: the place of the phases in its state is not known.
    return functools.partial(layer.step, system=system)


def _plan_multi_rate(layer: MultiRate, system: System) -> Step:
    inside = _plan(layer.layer, system)

    def step(u: Tensor, state: State) -> tuple[Tensor, State]:
        y, new = layer.step_by(inside, u, state)
        # The strides of a sample depend on the layout of its frame; other strides would compile the rest again.
        return y.contiguous(), new

    return step


def _plan_chain(chain: Chain, system: System) -> Step:
    groups: list[tuple[Callable[..., Any], slice]] = []
    place = 0
    for changes, group in itertools.groupby(chain, _changes_rate):
        children = list(group)
        if not changes:
            part = slice(place, place + len(children))
            groups.append((_compiled(Sequential(*children), system[part]), part))
        else:
            for at, child in enumerate(children, place):
                groups.append((_in_tuple(_plan(child, system[at])), slice(at, at + 1)))
        place += len(children)

    def step(u: Tensor, state: Any) -> tuple[Tensor, State]:
        y: Tensor = u
        new: tuple[State, ...] = ()
        for part_step, part in groups:
            y, part_state = part_step(y, state[part])
            new += part_state
        return chain.combine(u, y), new

    return step


def _plan_branches(layer: Branches, system: System) -> Step:
    steps = [_plan(branch, part) for branch, part in layer.shares(system)]

    def step(u: Tensor, state: Any) -> tuple[Tensor, State]:
        pairs = [branch_step(u, part) for branch_step, part in zip(steps, state, strict=True)]
        return layer.combine([y for y, _ in pairs]), tuple(new for _, new in pairs)

    return step


def _in_tuple(step: Step) -> Step:
    """Wraps the state of a step in a tuple of one."""

    def tupled(u: Tensor, state: Any) -> tuple[Tensor, State]:
        y, new = step(u, state[0])
        return y, (new,)

    return tupled
