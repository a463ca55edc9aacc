"""Packed batches: sequences one after another in a long row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from ..layers.base import SequenceLayer, System
from ..states import State, select, where
from .arguments import Lengths, beginnings, flags, integers, model_and_input, time_axis, values
from .rows import forward_rows, put, scan_rows

__all__ = [
    "forward_packed",
    "reset",
    "scan_packed",
    "segments_from_starts",
    "starts_from_boundaries",
    "starts_from_segments",
    "step_packed",
]


def forward_packed(model: SequenceLayer, u: Tensor, boundaries: Lengths, *, system: System = None) -> Tensor:
    r"""Runs sequences that stand one after another in a row, each as if it were alone.

    No output depends on another sequence, to the bit, and no gradient reaches another one. Sequences of similar length
    run together as rows of a batch, padded with zeros at their end; of one length, if the model is not causal. Beside a
    sequence alone they differ by rounding.

    Arguments:
        model: A sequence layer or container, causal or not.
        u: The input, with shape :math:`(L, d_{input})` or :math:`(B, L, d_{input})`, or without the last axis for class
            indices.
        boundaries: Where sequences begin: the cumulative lengths :math:`0, n_0, n_0 + n_1, \dots, L`, integers with
            shape :math:`(S + 1)`, for a single row; or booleans with shape :math:`(L)` or :math:`(B, L)`, true at the
            first sample of each sequence. They are read on the CPU.
        system: What the model's `system()` returned; by default made on the spot.

    Returns:
        The output, with shape :math:`(L, d_{output})` or :math:`(B, L, d_{output})`.

    Raises:
        TypeError: If `model` is not a sequence layer, or `boundaries` are neither integers nor booleans.
        ValueError: If `boundaries` have another shape, do not increase, or do not go from 0 to :math:`L`.

    Example:
        >>> model = ssmkit.Sequential(ssmkit.S4D(4), torch.nn.GELU())
        >>> first, second = torch.randn(9, 4), torch.randn(5, 4)
        >>> u, boundaries = ssmkit.sequences.pack([first, second])
        >>> y = ssmkit.sequences.forward_packed(model, u, boundaries)
        >>> torch.allclose(y[9:], model(second), atol=1e-5)
        True
    """
    model, rows, batch = _rows("forward_packed", model, u)
    L = u.shape[time_axis(u)]
    places = beginnings("forward_packed", boundaries, batch, L, whole=True)
    pieces = [piece for row, starts in zip(rows, places, strict=True) for piece in _split(row, starts)]
    if not pieces:
        return cast(Tensor, model(u, system))
    y = torch.cat(forward_rows(model, pieces, system), -2)
    return y.reshape(*batch, L, y.shape[-1])


def scan_packed(
    model: SequenceLayer, u: Tensor, state: State, boundaries: Lengths, *, system: System = None
) -> tuple[Tensor, State]:
    r"""Runs a chunk of rows in which sequences stand one after another, carrying the states.

    A chunk may begin and end inside a sequence: what comes before its first boundary goes on from `state`, and the
    state that is returned is that of the sequence under way at its end. Every other sequence starts from the model's
    initial state, and nothing reaches it from another one.

    Arguments:
        model: A causal sequence layer or container.
        u: The input, with shape :math:`(L, d_{input})` or :math:`(B, L, d_{input})`, or without the last axis for class
            indices.
        state: Where the streams have got to, of batch shape :math:`()` or :math:`(B)`.
        boundaries: Where sequences begin in this chunk: booleans with shape :math:`(L)` or :math:`(B, L)`, such as the
            part of :func:`starts_from_boundaries` that belongs to the chunk; or, for a single row, places that
            increase, integers from 0 to :math:`L`, where :math:`L` itself is no sample of this chunk.
        system: What the model's `system()` returned; by default made on the spot.

    Returns:
        The output, with shape :math:`(L, d_{output})` or :math:`(B, L, d_{output})`, and the next state.

    Raises:
        TypeError: If `model` is not a sequence layer, or `boundaries` are neither integers nor booleans.
        ValueError: If `boundaries` have another shape, do not increase or are outside of the chunk, or if the model is
            not causal.

    Example:
        >>> model = ssmkit.S4D(4)
        >>> u, boundaries = ssmkit.sequences.pack([torch.randn(9, 4), torch.randn(5, 4)])
        >>> starts = ssmkit.sequences.starts_from_boundaries(boundaries)
        >>> state, parts = model.initial_state(), []
        >>> for chunk, flags in zip(u.split(6), starts.split(6)):
        ...     y, state = ssmkit.sequences.scan_packed(model, chunk, state, flags)
        ...     parts.append(y)
        >>> whole = ssmkit.sequences.forward_packed(model, u, boundaries)
        >>> torch.allclose(torch.cat(parts), whole, atol=1e-5)
        True
    """
    model, rows, batch = _rows("scan_packed", model, u)
    L = u.shape[time_axis(u)]
    places = beginnings("scan_packed", boundaries, batch, L, whole=False)
    if not rows:
        return model.scan(u, state, system)
    system = model.system() if system is None else system
    # The piece that goes on, which may be empty, and those that begin here, of which the last one is not over.
    pieces = [_split(row, [0, *starts]) for row, starts in zip(rows, places, strict=True)]
    state = state if batch else _batched(state)
    outputs, state = scan_rows(model, [of_row[0] for of_row in pieces], state, system)
    found = [[y] for y in outputs]
    if over := [(b, piece) for b, of_row in enumerate(pieces) for piece in of_row[1:-1]]:
        for (b, _), y in zip(over, forward_rows(model, [piece for _, piece in over], system), strict=True):
            found[b].append(y)
    if begun := [b for b, of_row in enumerate(pieces) if len(of_row) > 1]:
        start = _alike(model.initial_state(len(begun), device=u.device), select(state, begun))
        outputs, end = scan_rows(model, [pieces[b][-1] for b in begun], start, system)
        for b, y in zip(begun, outputs, strict=True):
            found[b].append(y)
        state = put(state, begun, end, len(rows))
    joined = [torch.cat(of_row, -2) for of_row in found]
    return (torch.stack(joined), state) if batch else (joined[0], select(state, 0))


def step_packed(
    model: SequenceLayer, u: Tensor, state: State, starts: Tensor, *, system: System = None
) -> tuple[Tensor, State]:
    """Maps one sample of streams in which sequences follow each other: :func:`reset`, and then a step.

    Arguments:
        model: A causal sequence layer or container.
        u: The input, with shape :math:`(*, d_{input})`, or :math:`(*)` of class indices.
        state: Where the streams have got to.
        starts: Booleans with shape :math:`(*)`: whether this sample is the first of a sequence.
        system: What the model's `system()` returned; by default made on the spot. A loop should make it once.

    Returns:
        The output, with shape :math:`(*, d_{output})`, and the next state.

    Raises:
        TypeError: If `model` is not a sequence layer.
        ValueError: If `starts` are no booleans or have another shape, or if the model is not causal.

    Example:
        >>> model = ssmkit.S4D(4)
        >>> u, state = torch.randn(2, 4), model.initial_state(2)
        >>> first, state = ssmkit.sequences.step_packed(model, u, state, torch.tensor([False, False]))
        >>> again, state = ssmkit.sequences.step_packed(model, u, state, torch.tensor([True, False]))
        >>> torch.equal(again[0], first[0]), torch.equal(again[1], first[1])
        (True, False)
    """
    model, u = model_and_input("step_packed", model, u, 0)
    batch = u.shape[: u.ndim + time_axis(u) + 1]
    return model.step(u, _reset(model, state, flags("step_packed", "starts", starts, batch)), system)


def reset(model: SequenceLayer, state: State, rows: Tensor) -> State:
    """Sets single streams of a state to their start, the model's initial state.

    Where flags are on the CPU and none is set, the state is returned as it is, so that phases stay integers.

    Arguments:
        model: A causal sequence layer or container.
        state: Where the streams have got to.
        rows: Booleans with the batch shape of the state, true for the streams that start anew.

    Returns:
        The state, in which the dtypes are those of `state`.

    Raises:
        TypeError: If `model` is not a sequence layer.
        ValueError: If `rows` are no booleans or not of the batch shape of the state, or if the model is not causal.

    Example:
        >>> model = ssmkit.S4D(4)
        >>> _, state = model.scan(torch.randn(3, 9, 4), model.initial_state(3))
        >>> state = ssmkit.sequences.reset(model, state, torch.tensor([False, True, False]))
        >>> state.abs().amax((1, 2)) > 0
        tensor([ True, False,  True])
    """
    model, _ = model_and_input("reset", model, torch.zeros(1), 0)
    rows = flags("reset", "rows", rows, rows.shape if isinstance(rows, Tensor) else ("*",))
    for shape in _shapes(state):
        if shape[: rows.ndim] != rows.shape:
            raise ValueError(
                f"reset: `rows` must have the batch shape of `state`, got {tuple(rows.shape)} for a state of shape "
                f"{tuple(shape)}."
            )
    return _reset(model, state, rows)


def starts_from_boundaries(boundaries: Lengths) -> Tensor:
    r"""Says of every sample whether a sequence begins with it.

    Arguments:
        boundaries: Cumulative lengths :math:`0, n_0, n_0 + n_1, \dots, L`, integers with shape :math:`(S + 1)`.

    Returns:
        Booleans with shape :math:`(L)`, whose parts belong to chunks of the row.

    Raises:
        TypeError: If `boundaries` are not integers.
        ValueError: If they do not begin with 0 or do not increase.

    Example:
        >>> ssmkit.sequences.starts_from_boundaries([0, 3, 5])
        tensor([ True, False, False,  True, False])
    """
    found = integers("starts_from_boundaries", "boundaries", boundaries)
    L = int(found.max()) if found.numel() else 0
    (places,) = beginnings("starts_from_boundaries", found, (), L, whole=True)
    starts = torch.zeros(L, dtype=torch.bool, device=found.device)
    starts[places] = True
    return starts


def starts_from_segments(segments: Tensor, before: Tensor | None = None) -> Tensor:
    """Says of every sample whether a sequence begins with it, from the numbers of the sequences.

    Arguments:
        segments: For every sample the number of its sequence, integers with shape :math:`(*, L)`; neighbours with
            the same number belong together.
        before: The numbers of the samples before this chunk, with shape :math:`(*)`; by default the first sample begins
            a sequence.

    Returns:
        Booleans with shape :math:`(*, L)`.

    Raises:
        TypeError: If an argument is not of integers.
        ValueError: If the shapes do not fit.

    Example:
        >>> starts_from_segments(torch.tensor([7, 7, 7, 2, 2]))
        tensor([ True, False, False,  True, False])
        >>> starts_from_segments(torch.tensor([7, 7, 7, 2, 2]), before=torch.tensor(7))
        tensor([False, False, False,  True, False])
    """
    name = "starts_from_segments"
    found = integers(name, "segments", segments)
    if found.ndim < 1:
        raise ValueError(f"{name}: `segments` must have shape (*, L), got a single number.")
    changes = found[..., 1:] != found[..., :-1]
    if before is None:
        first = torch.ones_like(found[..., :1], dtype=torch.bool)
    else:
        before = integers(name, "before", before).to(found.device)
        if before.shape != found.shape[:-1]:
            raise ValueError(
                f"{name}: `before` must have shape {tuple(found.shape[:-1])}, one number for each row of `segments`, "
                f"got shape {tuple(before.shape)}."
            )
        first = found[..., :1] != before[..., None]
    return torch.cat([first, changes], dim=-1)


def segments_from_starts(starts: Tensor) -> Tensor:
    """Numbers the sequences of a row, as other libraries take them.

    Arguments:
        starts: Booleans with shape :math:`(*, L)`, true at the first sample of each sequence.

    Returns:
        For every sample the number of its sequence, from 0 on, integers with shape :math:`(*, L)`. Samples before the
        first start belong to number 0, as do those of the first sequence of a row that begins with one.

    Raises:
        ValueError: If `starts` are no booleans.

    Example:
        >>> segments_from_starts(torch.tensor([True, False, False, True, False]))
        tensor([0, 0, 0, 1, 1])
    """
    starts = flags("segments_from_starts", "starts", starts, starts.shape if isinstance(starts, Tensor) else ("*", "L"))
    if not starts.ndim:
        raise ValueError("segments_from_starts: `starts` must have shape (*, L), got a single flag.")
    return starts.long().cumsum(-1) - starts[..., :1].long()


def _rows(name: str, model: SequenceLayer, u: Tensor) -> tuple[SequenceLayer, list[Tensor], tuple[int, ...]]:
    """The rows of an input with one batch axis or none, and the batch axes."""
    model, u = model_and_input(name, model, u, 1)
    batch = tuple(u.shape[: u.ndim + time_axis(u)])
    if len(batch) > 1:
        raise ValueError(
            f"{name}: `u` must have shape (L, d) or (B, L, d), or (L) or (B, L) of classes, got {tuple(u.shape)}."
        )
    return model, list(u.unbind(0)) if batch else [u], batch


def _split(row: Tensor, starts: list[int]) -> list[Tensor]:
    """A row cut at the places where sequences begin, of which the first is 0; nothing if there are none."""
    if not starts:
        return []
    L = row.shape[time_axis(row)]
    sizes = [after - place for place, after in zip(starts, [*starts[1:], L], strict=True)]
    return list(row.split(sizes, time_axis(row)))


def _reset(model: SequenceLayer, state: State, rows: Tensor) -> State:
    known = values(rows.flatten())
    if known is not None and not any(known):
        return state
    start = _alike(model.initial_state(*rows.shape, device=rows.device), state)
    return start if known is not None and all(known) else where(rows, start, state)


def _shapes(state: State) -> Iterator[torch.Size]:
    """The shapes of the tensors in a state, but for phases."""
    if isinstance(state, tuple):
        for child in state:
            yield from _shapes(child)
    elif isinstance(state, Tensor) and state.is_floating_point():
        yield state.shape


def _alike(start: State, state: State) -> State:
    """A state on the devices and in the dtypes of another one."""
    if isinstance(start, tuple) and isinstance(state, tuple) and len(start) == len(state):
        return tuple(_alike(a, b) for a, b in zip(start, state, strict=True))
    if isinstance(start, Tensor) and isinstance(state, Tensor):
        return start.to(state)
    return start


def _batched(state: State) -> State:
    """The state of a single stream as that of a batch of one."""
    if isinstance(state, tuple):
        return tuple(_batched(child) for child in state)
    return state[None] if isinstance(state, Tensor) else state
