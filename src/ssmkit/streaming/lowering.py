"""The lowering of models: the instructions that every container and every module of torch becomes.

The table does not name state-space layers one by one: the system of such a layer writes its own step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn

from .. import systems
from ..layers import (
    Checkpoint,
    Concatenate,
    GroupedRMSNorm,
    LearnedStart,
    MultiRate,
    Pointwise,
    Product,
    Residual,
    StateSpaceLayer,
    TiedDropout,
)
from ..layers.base import SequenceLayer, System
from ..layers.branches import Branches
from ..layers.chain import Chain
from .kernels import Activation, Op
from .packing import Frames, NoState, Packing, Slot, StateTuple, Untouched
from .program import Program
from .words import ProgramWords, activation, linear

__all__ = ["LAYERS", "MODULES", "lower"]

_Layer: TypeAlias = Callable[[Program, Any, System, Slot], tuple[Slot, Packing]]
_Module: TypeAlias = Callable[[Program, Any, Slot], Slot]
_T = TypeVar("_T")

LAYERS: dict[type[SequenceLayer], _Layer] = {}
"""Sequence layers: functions of a program, the layer, its system and its input, which return its output and the packing
of its state. An entry also holds for subclasses that override none of `_MODES`."""

MODULES: dict[type[nn.Module], _Module] = {}
"""Position-wise modules: functions of a program, the module and its input, which return its output."""


def _lowers(table: dict[Any, _T], *kinds: type[nn.Module]) -> Callable[[_T], _T]:
    def enter(function: _T) -> _T:
        table.update(dict.fromkeys(kinds, function))
        return function

    return enter


def lower(program: Program, layer: SequenceLayer, system: System, source: Slot) -> tuple[Slot, Packing]:
    """Writes a layer's instructions.

    Arguments:
        program: The program to write to.
        layer: The layer.
        system: What its `system()` returned.
        source: The slot of its input.

    Returns:
        The slot of its output, and the packing of its state.

    Raises:
        ValueError: If its kind is not in the table, if it has forward hooks, or if its system cannot be written.
    """
    _refuse_hooks(layer)
    for kind in type(layer).__mro__:
        if kind in LAYERS:
            return LAYERS[kind](program, layer, system, source)
        own = _MODES.intersection(vars(kind))
        if own:
            break
    name = type(layer).__name__
    raise ValueError(
        f"Engine: {name} cannot be lowered to a compiled program, since its `{min(own)}` is its own; run this model by "
        "`step`, or make the layer a `ssmkit.StateSpaceLayer`."
    )


_MODES = {"combine", "forward", "initial_state", "scan", "step", "system"}
"""Methods that a subclass must not override: a program would not run them."""


def _lower_module(program: Program, module: nn.Module, source: Slot) -> Slot:
    # A subclass is refused: it may compute something else.
    if type(module) not in MODULES:
        known = ", ".join(sorted(kind.__name__ for kind in MODULES))
        raise ValueError(
            f"Engine: {type(module).__name__} cannot be lowered to a compiled program; run this model by `step`. "
            f"The modules that can: {known}."
        )
    _refuse_hooks(module)
    return MODULES[type(module)](program, module, source)


def _refuse_hooks(module: nn.Module) -> None:
    if module._forward_hooks or module._forward_pre_hooks:
        name = type(module).__name__
        raise ValueError(f"Engine: a {name} has forward hooks, which a compiled program cannot call; remove them.")


# --- sequence layers --------------------------------------------------------------------------------------------------


@_lowers(LAYERS, Chain, Checkpoint)
def _chain(program: Program, layer: Chain, system: System, source: Slot) -> tuple[Slot, Packing]:
    y, parts = source, []
    for child, part in layer.shares(system):
        y, packing = lower(program, child, part, y)
        parts.append(packing)
    return y, StateTuple(layer, tuple(parts))


@_lowers(LAYERS, Residual)
def _residual(program: Program, layer: Residual, system: System, source: Slot) -> tuple[Slot, Packing]:
    program.read_again.add(source)
    y, packing = _chain(program, layer, system, source)
    return program.emit(Op.ADD, y, program.slot(y.width), others={"other": source}, width=y.width), packing


def _branches(program: Program, layer: Branches, system: System, source: Slot) -> tuple[list[Slot], Packing]:
    program.read_again.add(source)
    outputs, parts = [], []
    for branch, part in layer.shares(system):
        y, packing = lower(program, branch, part, source)
        outputs.append(y)
        parts.append(packing)
    return outputs, StateTuple(layer, tuple(parts))


@_lowers(LAYERS, Product)
def _product(program: Program, layer: Product, system: System, source: Slot) -> tuple[Slot, Packing]:
    (y, *others), packing = _branches(program, layer, system, source)
    for other in others:
        y = program.emit(Op.MULTIPLY, y, program.slot(y.width), others={"other": other}, width=y.width)
    return y, packing


@_lowers(LAYERS, Concatenate)
def _concatenate(program: Program, layer: Concatenate, system: System, source: Slot) -> tuple[Slot, Packing]:
    outputs, packing = _branches(program, layer, system, source)
    target = program.slot(sum(y.width for y in outputs))
    start = target.start
    for y in outputs:
        # A thread owns other elements of the joined vector than of the vectors that it is made of.
        program.emit(Op.COPY, y, Slot(start, y.width), scattered=True, width=y.width)
        program.wrote(target, scattered=True)
        start += y.width
    return target, packing


@_lowers(LAYERS, Pointwise)
def _pointwise(program: Program, layer: Pointwise, system: System, source: Slot) -> tuple[Slot, Packing]:
    return _lower_module(program, layer.module, source), NoState()


@_lowers(LAYERS, LearnedStart)
def _learned_start(program: Program, layer: LearnedStart, system: System, source: Slot) -> tuple[Slot, Packing]:
    return lower(program, layer.layer, system, source)


@_lowers(LAYERS, TiedDropout)
def _tied_dropout(program: Program, layer: TiedDropout, system: System, source: Slot) -> tuple[Slot, Packing]:
    return source, Untouched(program.slot(layer.d_model))


@_lowers(LAYERS, StateSpaceLayer)
def _state_space(program: Program, layer: StateSpaceLayer, system: System, source: Slot) -> tuple[Slot, Packing]:
    given = layer.given(system)
    if given.time_stamps is not None:
        raise ValueError(
            "Engine: the rate of `system` must be a number, got a tensor, which is valid for one call, and a program "
            "runs many samples; use `step` for samples at irregular times."
        )
    if type(given).write is systems.System.write:
        raise ValueError(
            f"Engine: the system of {type(layer).__name__}, a {type(given).__name__}, has no `write` that says what "
            "its step is made of; run this model by `step`."
        )
    words = ProgramWords(program)
    return given.write(words, source), words.packing(given)


@_lowers(LAYERS, MultiRate)
def _multi_rate(program: Program, layer: MultiRate, system: System, source: Slot) -> tuple[Slot, Packing]:
    d, pool = layer.d_input, layer.pool
    filling, emitting = program.slot(pool * d), program.slot(pool * d)
    counter = program.counter()
    y = program.slot(d)
    program.emit(
        Op.FRAME, source, y, width=d, filling=filling.start, emitting=emitting.start, pool=pool, counter=counter
    )
    program.wrote(filling, scattered=True)
    with program.skipped_unless_full():
        # In the memory a frame is ordered (sample, feature); the weights of the pooling are ordered (feature, sample).
        down, up = layer.down.linear, layer.up.linear
        before = down.weight.unflatten(1, (d, pool)).transpose(1, 2).flatten(1)
        after = up.weight.unflatten(0, (d, pool)).transpose(0, 1).flatten(0, 1)
        biases = up.bias.unflatten(0, (d, pool)).T.flatten()
        z = linear(program, before, down.bias, filling)
        w, packing = lower(program, layer.layer, system, z)
        linear(program, after, biases, w, emitting)
    return y, Frames(layer, filling, emitting, counter, packing)


# --- position-wise modules --------------------------------------------------------------------------------------------


@_lowers(MODULES, nn.Sequential)
def _modules(program: Program, module: nn.Sequential, source: Slot) -> Slot:
    for child in module:
        source = _lower_module(program, child, source)
    return source


@_lowers(MODULES, nn.Identity, nn.Dropout, nn.AlphaDropout)
def _nothing(program: Program, module: nn.Module, source: Slot) -> Slot:
    return source


@_lowers(MODULES, nn.Linear)
def _linear_module(program: Program, module: nn.Linear, source: Slot) -> Slot:
    return linear(program, module.weight, module.bias, source)


@_lowers(MODULES, nn.Embedding)
def _embedding(program: Program, module: nn.Embedding, source: Slot) -> Slot:
    if module.max_norm is not None:
        raise ValueError(
            "Engine: an Embedding with `max_norm` writes to its weights whenever it is used; apply it first."
        )
    if program.classes is not None or source.width:
        raise ValueError("Engine: an Embedding must be the first module of a model, where classes come in.")
    program.classes, m = module.num_embeddings, module.embedding_dim
    return program.emit(Op.EMBED, source, program.slot(m), weights=program.hold(module.weight), outputs=m)


@_lowers(MODULES, nn.LayerNorm, nn.RMSNorm, GroupedRMSNorm)
def _norm(program: Program, module: nn.LayerNorm | nn.RMSNorm, source: Slot) -> Slot:
    n = source.width
    centred = isinstance(module, nn.LayerNorm)
    gain = torch.ones(n) if module.weight is None else module.weight
    bias = getattr(module, "bias", None)
    eps = torch.finfo(gain.dtype).eps if module.eps is None else module.eps
    weights = program.hold(torch.tensor([eps]), gain, gain.new_zeros(n) if bias is None else bias)
    groups = module.groups if isinstance(module, GroupedRMSNorm) else 1
    target = program.slot(n)
    return program.emit(Op.NORM, source, target, whole=True, weights=weights, width=n, centred=centred, groups=groups)


@_lowers(MODULES, nn.GLU)
def _glu(program: Program, module: nn.GLU, source: Slot) -> Slot:
    n = source.width // 2
    if program.gate(source, n):
        return Slot(source.start, n)
    return program.emit(Op.GLU, source, program.slot(n), whole=True, width=n)


@_lowers(MODULES, nn.Softmax, nn.Softmin, nn.LogSoftmax)
def _softmax(program: Program, module: nn.Module, source: Slot) -> Slot:
    n, sign = source.width, -1 if isinstance(module, nn.Softmin) else 1
    logarithm = isinstance(module, nn.LogSoftmax)
    target = program.slot(n)
    return program.emit(Op.SOFTMAX, source, target, whole=True, scattered=True, width=n, sign=sign, logarithm=logarithm)


_INFINITY = float("inf")

# Each module as an Activation with its parameters.
_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], tuple[Activation, tuple[float, ...]]]] = {
    nn.CELU: lambda f: (Activation.ELU, (1.0, f.alpha, f.alpha)),
    nn.ELU: lambda f: (Activation.ELU, (1.0, f.alpha, 1.0)),
    nn.GELU: lambda f: (Activation.GELU_TANH if f.approximate == "tanh" else Activation.GELU, ()),
    nn.Hardshrink: lambda f: (Activation.HARD_SHRINK, (f.lambd,)),
    nn.Hardsigmoid: lambda f: (Activation.HARD_SIGMOID, ()),
    nn.Hardswish: lambda f: (Activation.HARD_SWISH, ()),
    nn.Hardtanh: lambda f: (Activation.CLIP, (f.min_val, f.max_val)),
    nn.LeakyReLU: lambda f: (Activation.LEAKY_RELU, (f.negative_slope,)),
    nn.LogSigmoid: lambda f: (Activation.SOFTPLUS, (1.0, _INFINITY, -1.0)),
    nn.Mish: lambda f: (Activation.MISH, ()),
    nn.PReLU: lambda f: (Activation.LEAKY_RELU, (float(f.weight),)),
    nn.ReLU: lambda f: (Activation.LEAKY_RELU, (0.0,)),
    nn.ReLU6: lambda f: (Activation.CLIP, (0.0, 6.0)),
    nn.SELU: lambda f: (Activation.ELU, (1.0507009873554805, 1.6732632423543772, 1.0)),
    nn.SiLU: lambda f: (Activation.SILU, ()),
    nn.Sigmoid: lambda f: (Activation.SIGMOID, ()),
    nn.Softplus: lambda f: (Activation.SOFTPLUS, (1 / f.beta, f.threshold / f.beta, 1.0)),
    nn.Softshrink: lambda f: (Activation.SOFT_SHRINK, (f.lambd,)),
    nn.Softsign: lambda f: (Activation.SOFT_SIGN, ()),
    nn.Tanh: lambda f: (Activation.TANH, ()),
    nn.Tanhshrink: lambda f: (Activation.TANH_SHRINK, ()),
    nn.Threshold: lambda f: (Activation.THRESHOLD, (f.threshold, f.value)),
}


@_lowers(MODULES, *_ACTIVATIONS)
def _activation(program: Program, module: nn.Module, source: Slot) -> Slot:
    return activation(program, *_ACTIVATIONS[type(module)](module), source)
