"""Checks of arguments: models, inputs, lengths, and positions at which sequences begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _checks
from ..layers.base import SequenceLayer, System
from ..states import State
from ..systems import ForwardSystem

__all__ = [
    "Lengths",
    "batched_state",
    "beginnings",
    "flags",
    "integers",
    "is_left",
    "model_and_input",
    "one_rate",
    "row_lengths",
    "time_axis",
    "values",
]

Lengths = Tensor | Sequence[int]
"""Integers, as a tensor or a list."""


def model_and_input(where: str, model: Any, u: Any, least: int) -> tuple[SequenceLayer, Tensor]:
    """A sequence layer, compiled or not, and an input with at least `least` axes in front of the features."""
    if not isinstance(model, nn.Module) or not hasattr(model, "causal"):
        raise TypeError(
            f"{where}: `model` must be a `ssmkit.SequenceLayer`, got {type(model).__name__}; wrap position-wise "
            "modules in `ssmkit.Sequential`."
        )
    if _checks.tensor(where, "u", u).is_floating_point():
        _checks.floating(where, "u", u)
    if u.ndim + time_axis(u) + 1 < least:
        axes = "(B, *, L, d), or (B, *, L) of classes" if least > 1 else "(*, L, d), or (*, L) of classes"
        raise ValueError(f"{where}: `u` must have shape {axes}, got {tuple(u.shape)}.")
    return cast(SequenceLayer, model), u


def one_rate(where: str, system: System) -> None:
    """Refuses a system with a tensor of rates, for functions that cut or move samples and cannot do so with rates."""
    for child in system if isinstance(system, tuple) else ():
        one_rate(where, child)
    if isinstance(system, ForwardSystem) and system.time_stamps is not None:
        raise ValueError(
            f"{where}: the rate of `system` must be a number, got a tensor, which cannot be cut like `u`; for samples "
            "at irregular times use `forward_padded` with padding on the right, or one call per sequence."
        )


def time_axis(u: Tensor) -> int:
    """The axis of time; class indices have no feature axis."""
    return -2 if u.is_floating_point() else -1


def is_left(where: str, value: str) -> bool:
    """Whether padding is on the left."""
    if not isinstance(value, str) or value not in ("left", "right"):
        raise ValueError(f"{where}: `side` must be 'left' or 'right', got {value!r}.")
    return value == "left"


def integers(where: str, name: str, value: Any) -> Tensor:
    """A tensor of integers, from one or from a list of them."""
    try:
        value = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{where}: `{name}` must be integers, got a {type(value).__name__}.") from None
    if value.is_floating_point() and not value.numel():
        # An empty list becomes a float tensor.
        value = value.long()
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{where}: `{name}` must be integers, got {value.dtype}.")
    return _checks.with_values(where, name, value)


def values(x: Tensor) -> list[Any] | None:
    """The values of a tensor on the CPU; None elsewhere, or if a graph is traced, which reading would break."""
    return x.tolist() if x.device.type == "cpu" and not torch.compiler.is_compiling() else None


def row_lengths(where: str, value: Lengths, sizes: Sequence[int]) -> Tensor:
    """The lengths (B) of the rows of a batch (B, L), or (B, A) along A axes (B, L_1 ... L_A).

    Values are checked if they are on the CPU and no graph is traced.
    """
    found = integers(where, "lengths", value)
    B, *axes = sizes
    shape = (B,) if found.ndim < 2 else (B, len(axes))
    if found.shape != shape:
        raise ValueError(
            f"{where}: `lengths` must have shape {shape}, one for each row of `u`, got shape {tuple(found.shape)}."
        )
    for row, per_axis in enumerate(values(found[:, None] if found.ndim < 2 else found) or ()):
        for length, most in zip(per_axis, axes[-len(per_axis) :], strict=True):
            if not 0 <= length <= most:
                raise ValueError(
                    f"{where}: `lengths` must be at least 0 and at most the {most} samples of `u`, got {length} in "
                    f"row {row}."
                )
    return found


def beginnings(where: str, boundaries: Any, batch: Sequence[int], L: int, *, whole: bool) -> list[list[int]]:
    """The positions in every row at which a sequence begins, in order.

    Arguments:
        where: The name of the function, for errors.
        boundaries: Booleans (\\*, L), true at the first sample of each sequence; or, for a single row, integers:
            cumulative lengths from 0 to L for whole rows, or positions in a chunk.
        batch: The batch axes, at most one.
        L: The number of samples.
        whole: Whether the rows are whole, so that sample 0 always begins a sequence, or chunks.
    """
    if isinstance(boundaries, Tensor) and boundaries.dtype == torch.bool:
        _checks.with_values(where, "boundaries", boundaries)
        if boundaries.shape != (*batch, L):
            raise ValueError(
                f"{where}: `boundaries` as booleans must have shape {(*batch, L)}, one for each sample of `u`, got "
                f"shape {tuple(boundaries.shape)}."
            )
        rows: list[list[int]] = [
            row.nonzero().flatten().tolist() for row in (boundaries.unbind(0) if batch else [boundaries])
        ]
        return [row if not whole or not L or row[:1] == [0] else [0, *row] for row in rows]
    found = integers(where, "boundaries", boundaries)
    if found.ndim != 1 or tuple(batch) not in ((), (1,)):
        raise ValueError(
            f"{where}: `boundaries` as integers must have shape (S + 1,) and belong to a single row, got shape "
            f"{tuple(found.shape)} for {tuple(batch)} rows; for several rows give booleans of shape {(*batch, L)}."
        )
    places: list[int] = found.tolist()
    for before, place in zip(places, places[1:], strict=False):
        if place <= before:
            raise ValueError(f"{where}: `boundaries` must increase, got {place} after {before}.")
    if whole and (places[:1] != [0] or places[-1] != L):
        got = f"{places[0]} to {places[-1]}" if places else "none"
        raise ValueError(
            f"{where}: `boundaries` must go from 0 to the number of samples, {L} (cumulative lengths), got {got}."
        )
    if places and not (places[0] >= 0 and places[-1] <= L):
        raise ValueError(
            f"{where}: `boundaries` must be at least 0 and at most the number of samples, {L}, got {places[0]} to "
            f"{places[-1]}."
        )
    return [[place for place in places if place < L]]


def batched_state(where: str, state: State, batch: Sequence[int], name: str) -> State:
    """A state whose tensors begin with the batch axes of another argument; phases may have fewer axes."""
    if isinstance(state, tuple):
        for child in state:
            batched_state(where, child, batch, name)
    elif isinstance(state, Tensor) and state.is_floating_point() and state.shape[: len(batch)] != tuple(batch):
        raise ValueError(
            f"{where}: `state` must have the batch shape {tuple(batch)} of `{name}`, got a tensor of shape "
            f"{tuple(state.shape)}."
        )
    return state


def flags(where: str, name: str, value: Any, shape: Sequence[int | str]) -> Tensor:
    """A boolean for every stream, or sample."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.shape != tuple(shape):
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        wanted = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
        raise ValueError(f"{where}: `{name}` must be a tensor of booleans with shape {wanted}, got {got}.")
    return _checks.with_values(where, name, value)
