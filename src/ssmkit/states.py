r"""States as values: select rows, repeat, concatenate, replace, detach, move and save them.

A state is the memory of a stream. It is a small tree: tuples of tensors with the batch axes in front, and phases, such
as the number of samples of a frame that a multi-rate layer has read. A phase is an integer if all rows of the batch
have the same, and an integer tensor with batch axes if they differ. These functions work on the first batch axis of any
layer's state, so the state needs at least one, as in ``layer.initial_state(8)``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from . import _checks

__all__ = ["State", "concatenate", "detach", "from_dict", "move", "repeat", "select", "to_dict", "where"]

State: TypeAlias = Tensor | int | tuple["State", ...]
"""A tensor, a phase (an integer, or an integer tensor if rows differ), or a tuple of states."""


_DTYPES = _checks.FLOATING | {torch.int64, torch.int32}


def _map(where: str, f: Callable[[Tensor], Tensor], state: State) -> State:
    if isinstance(state, tuple):
        return tuple(_map(where, f, child) for child in state)
    part = _part(where, state)
    return f(part) if isinstance(part, Tensor) else part


def _part(where: str, value: Any) -> Tensor | int:
    """A part of a state: a floating tensor or a phase."""
    phase = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    if not phase and not (isinstance(value, Tensor) and value.dtype in _DTYPES and value.layout is torch.strided):
        raise TypeError(
            f"{where}: `state` must be a dense real tensor, a phase (an integer of at least 0), or a tuple of these, "
            f"got {_checks.shown(value)}."
        )
    return cast(Tensor | int, value)


def select(state: State, index: int | slice | Sequence[int] | Tensor) -> State:
    """Takes rows of a batch of states.

    Arguments:
        state: A state with at least one batch axis.
        index: What to take of the first axis: a slice, a list of indices or an integer or boolean tensor; an integer
            takes one row and drops the axis.

    Returns:
        The state of the rows taken.

    Raises:
        TypeError: If `index` is True or False, or `state` not a state.
        ValueError: If `index` is not in the batch.

    Example:
        >>> layer = ssmkit.S4D(4)
        >>> select(layer.initial_state(8), slice(2, 5)).shape
        torch.Size([3, 4, 64])
    """
    if isinstance(index, bool):
        # torch treats a boolean as a mask without axes, which would add an axis.
        raise TypeError(f"select: `index` must be an integer, a slice, a list or a tensor, got {index!r} (bool).")

    def take(x: Tensor) -> Tensor:
        try:
            rows = index if isinstance(index, (int, slice, Tensor)) else [operator.index(row) for row in index]
            return x[rows]
        except (IndexError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"select: `index` must take rows of the first axis, got {_checks.shown(index)} for a tensor of shape "
                f"{tuple(x.shape)}."
            ) from error

    return _map("select", take, state)


def repeat(state: State, times: int) -> State:
    """Repeats every row of a batch of states, for example for several continuations of one prompt.

    Arguments:
        state: A state with at least one batch axis.
        times: How often; the copies of a row are neighbours.

    Returns:
        The state of a batch that is `times` as large.

    Raises:
        ValueError: If `times` is less than 1.

    Example:
        >>> layer = ssmkit.S4D(4)
        >>> repeat(layer.initial_state(2), 3).shape
        torch.Size([6, 4, 64])
    """
    _checks.integer("repeat", "times", times)

    def copies(x: Tensor) -> Tensor:
        if not x.ndim:
            raise ValueError("repeat: `state` must have a batch axis, got a tensor without axes.")
        return x.repeat_interleave(times, dim=0)

    return _map("repeat", copies, state)


def concatenate(states: Sequence[State]) -> State:
    """Joins batches of states along the first axis.

    Arguments:
        states: States of one layer.

    Returns:
        The state of the joined batch. A phase in which they differ becomes an integer tensor; one in which they agree
        stays an integer.

    Raises:
        ValueError: If there are none, if they are of different layers, or if phases differ in states without tensors,
            whose number of rows is not known.

    Example:
        >>> layer = ssmkit.S4D(4)
        >>> concatenate([layer.initial_state(2), layer.initial_state(3)]).shape
        torch.Size([5, 4, 64])
        >>> layer = ssmkit.MultiRate(2, ssmkit.S4D(4))
        >>> _, later = layer.step(torch.randn(2, 2), layer.initial_state(2))
        >>> concatenate([later, layer.initial_state(1)])[2]
        tensor([1, 1, 0])
    """
    if not isinstance(states, (list, tuple)):
        raise TypeError(f"concatenate: `states` must be a list of states, got {_checks.shown(states)}.")
    if not states:
        raise ValueError("concatenate: `states` must hold at least one state.")
    return _join(states, [next(_tensors(state), None) for state in states])


def _tensors(state: State) -> Iterator[Tensor]:
    if isinstance(state, tuple):
        for child in state:
            yield from _tensors(child)
    elif isinstance(state, Tensor):
        yield state


def _join(states: Sequence[State], like: Sequence[Tensor | None]) -> State:
    """Joins parts of states; `like` holds a tensor of each whole state, for its number of rows."""
    first = states[0]
    if isinstance(first, tuple) and all(isinstance(s, tuple) and len(s) == len(first) for s in states):
        return tuple(_join(children, like) for children in zip(*cast(Sequence[tuple[State, ...]], states), strict=True))
    if isinstance(first, int) and all(isinstance(s, int) and s == first for s in states):
        return first
    if all(isinstance(s, int) or (isinstance(s, Tensor) and not s.is_floating_point()) for s in states):
        phases = [_spread(cast(int | Tensor, s), rows) for s, rows in zip(states, like, strict=True)]
        largest = max(phases, key=lambda phase: phase.ndim)
        states = [_with_axes(phase, largest.ndim).expand(len(phase), *largest.shape[1:]) for phase in phases]
    tensors = [s for s in states if isinstance(s, Tensor)]
    alike = {(s.shape[1:], s.is_floating_point(), s.device, s.ndim > 0) for s in tensors}
    if len(tensors) < len(states) or len(alike) > 1 or not tensors[0].ndim:
        raise ValueError(
            "concatenate: `states` must be of one layer, on one device and with a batch axis, got trees that differ."
        )
    return torch.cat(tensors)


def _spread(phase: int | Tensor, rows: Tensor | None) -> Tensor:
    """A phase as a tensor, with one entry for each row of another tensor of the state."""
    if isinstance(phase, Tensor):
        return phase
    if rows is None:
        raise ValueError(
            "concatenate: `states` with different phases must hold a tensor, which tells the number of their rows."
        )
    return torch.full((len(rows),), phase, device=rows.device)


def _with_axes(x: Tensor, ndim: int) -> Tensor:
    """Appends axes of size 1 to a tensor, so that it has at least `ndim` axes."""
    return x.reshape((*x.shape, *(1,) * (ndim - x.ndim)))


def where(condition: Tensor, state: State, other: State) -> State:
    """Takes each row from one of two states, for example to restart single streams of a batch.

    Arguments:
        condition: A boolean tensor with the batch's shape, or its first axes.
        state: The state of rows whose condition is true.
        other: The state of the other rows.

    Returns:
        The state of the batch. A phase in which the two states differ becomes an integer tensor.

    Raises:
        ValueError: If the states are of different layers or batch shapes, or `condition` has another shape.

    Example:
        >>> layer = ssmkit.S4D(4)
        >>> _, state = layer.scan(torch.randn(3, 9, 4), layer.initial_state(3))
        >>> fresh = torch.tensor([False, True, False])
        >>> state = where(fresh, layer.initial_state(3), state)
        >>> bool((state[1] == 0).all())
        True
    """
    if not isinstance(condition, Tensor) or condition.dtype != torch.bool:
        raise TypeError(f"where: `condition` must be a boolean tensor, got {_checks.shown(condition)}.")
    if isinstance(state, tuple) and isinstance(other, tuple) and len(state) == len(other):
        return tuple(where(condition, a, b) for a, b in zip(state, other, strict=True))
    if isinstance(state, int) and isinstance(other, int) and state == other:
        return state
    try:
        return _chosen(condition, state, other)
    except (RuntimeError, OverflowError) as error:
        raise _unlike(condition, state, other) from error


def _chosen(condition: Tensor, state: State, other: State) -> Tensor:
    """:func:`where` for two parts of states, of which at most one is an integer."""
    a, b = (condition.new_full((), x, dtype=torch.long) if isinstance(x, int) else x for x in (state, other))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.is_floating_point() != b.is_floating_point():
        raise _unlike(condition, state, other)
    if not a.is_floating_point():
        # Phases: integers get the axes of the condition, and tensors may have fewer axes than it.
        ndim = max(a.ndim, b.ndim, condition.ndim)
        a, b = (_with_axes(x, ndim) if x.ndim else x for x in (a, b))
        return torch.where(_with_axes(condition, ndim), a, b)
    if a.shape != b.shape or a.shape[: condition.ndim] != condition.shape:
        raise _unlike(condition, a, b)
    return torch.where(_with_axes(condition, a.ndim), a, b)


def _unlike(condition: Tensor, state: State, other: State) -> ValueError:
    return ValueError(
        "where: `state` and `other` must be of one layer, with one device and one shape, which begins with that of "
        f"`condition`, got {_described(state)}, {_described(other)} and {_described(condition)}."
    )


def _described(x: State) -> str:
    return f"shape {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def detach(state: State) -> State:
    """Detaches a state from its graph, for truncated backpropagation.

    Arguments:
        state: A state.

    Returns:
        The same values, without a graph.

    Example:
        >>> layer = ssmkit.S4D(4)
        >>> y, state = layer.scan(torch.randn(1, 9, 4), layer.initial_state(1))
        >>> state.requires_grad, detach(state).requires_grad
        (True, False)
    """
    return _map("detach", Tensor.detach, state)


def move(state: State, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
    """Moves a state to another device or dtype.

    Arguments:
        state: A state.
        device: Where to; by default it stays.
        dtype: A real floating dtype of at least 32 bits; by default it stays. Phases stay integers.

    Returns:
        The moved state.

    Raises:
        ValueError: If `dtype` is not float32 or float64: with less, states drift.

    Example:
        >>> layer = ssmkit.S4D(4)
        >>> move(layer.initial_state(1), dtype=torch.float64).dtype
        torch.float64
    """
    _checks.given("move", device, dtype)
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"move: `dtype` must be torch.float32 or torch.float64, got {dtype}.")

    def moved(x: Tensor) -> Tensor:
        if device is not None and torch.device(device).type != "meta":
            _checks.with_values("move", "state", x)
        return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

    return _map("move", moved, state)


def to_dict(state: State, prefix: str = "state") -> dict[str, Tensor]:
    """Gives the tensors of a state with names, for any file format for tensors.

    Arguments:
        state: A state.
        prefix: The beginning of all names. Items of a tuple add their number, as in ``state.1.0``.

    Returns:
        Copies of the tensors, contiguous and without history. An integer phase becomes a tensor with no axes.

    Example:
        >>> model = ssmkit.Sequential(torch.nn.Linear(2, 4), ssmkit.MultiRate(4, ssmkit.S4D(8)))
        >>> {name: tuple(x.shape) for name, x in to_dict(model.initial_state(3)).items()}
        {'state.1.0': (3, 4, 4), 'state.1.1': (3, 4, 4), 'state.1.2': (), 'state.1.3': (3, 8, 64)}
    """
    _prefix("to_dict", prefix)
    return {
        name: part.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(part, Tensor)
        else torch.tensor(part)
        for name, part in _named("to_dict", state, prefix)
    }


def from_dict(tensors: Mapping[str, Tensor], like: State, prefix: str = "state") -> State:
    """Makes a state from the named tensors of :func:`to_dict`.

    Arguments:
        tensors: The tensors, for example read from a file. Tensors with other names than `prefix` are ignored.
        like: A state of the same layer, such as its `initial_state()`, which gives the tree; its values and shapes are
            not used.
        prefix: The beginning of the names.

    Returns:
        The state, which consists of these tensors.

    Raises:
        ValueError: If a tensor is missing, or is not in the tree of `like`, or has the wrong kind of dtype.

    Example:
        >>> layer = ssmkit.MultiRate(2, ssmkit.S4D(4))
        >>> _, state = layer.scan(torch.randn(3, 7, 2), layer.initial_state(3))
        >>> again = from_dict(to_dict(state), layer.initial_state())
        >>> again[2], torch.equal(again[3], state[3])
        (3, True)
    """
    _prefix("from_dict", prefix)
    if not isinstance(tensors, Mapping):
        raise TypeError(f"from_dict: `tensors` must be a mapping of names to tensors, got {_checks.shown(tensors)}.")
    wanted = dict(_named("from_dict", like, prefix))
    found = {name for name in tensors if name == prefix or name.startswith(f"{prefix}.")}
    if found != set(wanted):
        missing, more = sorted(set(wanted) - found), sorted(found - set(wanted))
        which = f"{missing[0]!r} is missing" if missing else f"{more[0]!r} is not in it"
        raise ValueError(f"from_dict: `tensors` must be of the same layer as `like`, and {which}.")
    for name, part in wanted.items():
        dtype = _checks.with_values("from_dict", "tensors", tensors[name]).dtype
        if dtype.is_floating_point != (isinstance(part, Tensor) and part.is_floating_point()):
            raise ValueError(f"from_dict: `tensors` must be of the same layer as `like`, and {name!r} is {dtype}.")
    return _filled(like, prefix, tensors)


def _prefix(where: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{where}: `prefix` must be a string, got {_checks.shown(value)}.")


def _named(where: str, state: State, name: str) -> Iterator[tuple[str, Tensor | int]]:
    """The leaves of a state, with their names."""
    if isinstance(state, tuple):
        for number, child in enumerate(state):
            yield from _named(where, child, f"{name}.{number}")
    else:
        yield name, _part(where, state)


def _filled(like: State, name: str, tensors: Mapping[str, Tensor]) -> State:
    if isinstance(like, tuple):
        return tuple(_filled(child, f"{name}.{number}", tensors) for number, child in enumerate(like))
    x = tensors[name]
    # A phase that is the same for all rows is an integer.
    return x if x.is_floating_point() or x.ndim else int(x)
