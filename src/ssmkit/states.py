r"""States as values: select rows, repeat, concatenate, detach and move them.

A state says where a stream has got to. It is a small tree: tuples of tensors with the batch axes in front, and
integers that the whole batch shares (the phase of a multi-rate layer). These functions work on the first batch axis of
any layer's state, so the state must have been made with at least one, as in ``layer.initial_state(8)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from . import _checks

__all__ = ["State", "concatenate", "detach", "move", "repeat", "select"]

State: TypeAlias = Tensor | int | tuple["State", ...]
"""A tensor, an integer, or a tuple of states."""


def _map(f: Callable[[Tensor], Tensor], state: State) -> State:
    if isinstance(state, tuple):
        return tuple(_map(f, child) for child in state)
    return f(state) if isinstance(state, Tensor) else state


def select(state: State, index: int | slice | Sequence[int] | Tensor) -> State:
    """Takes rows of a batch of states.

    Arguments:
        state: A state with at least one batch axis.
        index: What to take of the first axis: a slice, a list of indices or an integer or boolean tensor; an integer
            takes one row and drops the axis.

    Returns:
        The state of the rows taken.

    Raises:
        TypeError: If `index` is True or False.

    Example:
        >>> layer = ssmkit.S4D(4)
        >>> select(layer.initial_state(8), slice(2, 5)).shape
        torch.Size([3, 4, 64])
    """
    if isinstance(index, bool):
        # To torch a boolean is a mask without axes: it would add one.
        raise TypeError(f"select: `index` must be an integer, a slice, a list or a tensor, got {index!r} (bool).")
    return _map(lambda x: x[index if isinstance(index, (int, slice, Tensor)) else list(index)], state)


def repeat(state: State, times: int) -> State:
    """Repeats every row of a batch of states, as when several continuations start from one prompt.

    Arguments:
        state: A state with at least one batch axis.
        times: How often; the copies of a row stand side by side.

    Returns:
        The state of a batch `times` as large.

    Raises:
        ValueError: If `times` is less than 1.

    Example:
        >>> layer = ssmkit.S4D(4)
        >>> repeat(layer.initial_state(2), 3).shape
        torch.Size([6, 4, 64])
    """
    _checks.integer("repeat", "times", times)
    return _map(lambda x: x.repeat_interleave(times, dim=0), state)


def concatenate(states: Sequence[State]) -> State:
    """Joins batches of states along the first axis.

    Arguments:
        states: States of one layer, at the same phase.

    Returns:
        The state of the joined batch.

    Raises:
        ValueError: If there are none, if they are of different layers, or if their phases differ (a multi-rate layer
            runs its whole batch in step).

    Example:
        >>> layer = ssmkit.S4D(4)
        >>> concatenate([layer.initial_state(2), layer.initial_state(3)]).shape
        torch.Size([5, 4, 64])
    """
    if not states:
        raise ValueError("concatenate: `states` must hold at least one state.")
    first = states[0]
    if isinstance(first, tuple) and all(isinstance(s, tuple) and len(s) == len(first) for s in states):
        return tuple(concatenate(children) for children in zip(*states, strict=True))
    if isinstance(first, int) and all(isinstance(s, int) for s in states):
        if any(s != first for s in states):
            raise ValueError(
                f"concatenate: the states must be at the same phase of their frame, got {list(states)}; "
                "advance streams until their phases are equal."
            )
        return first
    tensors = [s for s in states if isinstance(s, Tensor)]
    if len(tensors) < len(states) or any(s.shape[1:] != tensors[0].shape[1:] for s in tensors):
        raise ValueError("concatenate: the states must be of one layer, got trees that differ.")
    return torch.cat(tensors)


def detach(state: State) -> State:
    """Cuts a state off from the graph that made it, for truncated backpropagation.

    Arguments:
        state: A state.

    Returns:
        The same values, without history.

    Example:
        >>> layer = ssmkit.S4D(4)
        >>> y, state = layer.scan(torch.randn(1, 9, 4), layer.initial_state(1))
        >>> state.requires_grad, detach(state).requires_grad
        (True, False)
    """
    return _map(Tensor.detach, state)


def move(state: State, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
    """Moves a state to another device or dtype.

    Arguments:
        state: A state.
        device: Where to; by default it stays.
        dtype: A real floating dtype of at least 32 bits; by default it stays.

    Returns:
        The moved state.

    Raises:
        ValueError: If `dtype` is not float32 or float64: with less, states drift.

    Example:
        >>> layer = ssmkit.S4D(4)
        >>> move(layer.initial_state(1), dtype=torch.float64).dtype
        torch.float64
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"move: `dtype` must be torch.float32 or torch.float64, got {dtype}.")
    return _map(lambda x: x.to(device=device, dtype=dtype), state)
