"""Packed rows: sequences one after another in a long row."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..layers.base import SequenceLayer, System
from ..states import State, select, where
from .arguments import Lengths, batched_state, beginnings, flags, integers, model_and_input, one_rate, time_axis, values
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
    r"""Runs the sequences of a packed row, each as if it were alone.

    The values of other sequences do not change a bit of the output of a sequence, and gradients between sequences are
    exactly 0. The output equals that of the sequence alone up to rounding.

    The sequences run as rows of batches: of similar length, padded with zeros at the end, or of equal length if the
    model is not causal.

    Arguments:
        model: A sequence layer or container, causal or not.
        u: The input, with shape :math:`(L, d_{input})` or :math:`(B, L, d_{input})`, or without the last axis for class
            indices.
        boundaries: Where sequences begin: the cumulative lengths :math:`0, n_0, n_0 + n_1, \dots, L`, integers with
            shape :math:`(S + 1)`, for a single row; or booleans with shape :math:`(L)` or :math:`(B, L)`, true at the
            first sample of each sequence. They are read on the CPU.
        system: What the model's `system()` returned; by default it is made here.

    Returns:
        The output, with shape :math:`(L, d_{output})` or :math:`(B, L, d_{output})`.

    Raises:
        TypeError: If `model` is not a sequence layer, or `boundaries` are neither integers nor booleans.
        ValueError: If `boundaries` have another shape, do not increase, or do not go from 0 to :math:`L`, or if the
            system has a tensor of rates.

    Example:
        >>> model = ssmkit.Sequential(ssmkit.S4D(4), torch.nn.GELU())
        >>> first, second = torch.randn(9, 4), torch.randn(5, 4)
        >>> u, boundaries = ssmkit.sequences.pack([first, second])
        >>> y = ssmkit.sequences.forward_packed(model, u, boundaries)
        >>> torch.allclose(y[9:], model(second), atol=1e-5)
        True
    """
    model, rows, batch = _rows("forward_packed", model, u)
    one_rate("forward_packed", system)
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
    r"""Runs a chunk of packed rows, carrying the states.

    A chunk may begin and end inside a sequence: the samples before its first boundary continue from `state`, and the
    returned state is that of the last sequence at the end of the chunk. All other sequences start from the model's
    initial state. The sequences are independent as in :func:`forward_packed`.

    Arguments:
        model: A causal sequence layer or container.
        u: The input, with shape :math:`(L, d_{input})` or :math:`(B, L, d_{input})`, or without the last axis for class
            indices.
        state: The states of the streams, of batch shape :math:`()` or :math:`(B)`.
        boundaries: Where sequences begin in this chunk: booleans with shape :math:`(L)` or :math:`(B, L)`, such as a
            slice of what :func:`starts_from_boundaries` returns; or, for a single row, increasing positions in the
            chunk, integers from 0 to :math:`L`, where :math:`L` stands for the sample after the chunk.
        system: What the model's `system()` returned; by default it is made here.

    Returns:
        The output, with shape :math:`(L, d_{output})` or :math:`(B, L, d_{output})`, and the next state.

    Raises:
        TypeError: If `model` is not a sequence layer, or `boundaries` are neither integers nor booleans.
        ValueError: If `boundaries` have another shape, do not increase or are outside of the chunk, if the system has a
            tensor of rates, or if the model is not causal.

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
    one_rate("scan_packed", system)
    L = u.shape[time_axis(u)]
    places = beginnings("scan_packed", boundaries, batch, L, whole=False)
    batched_state("scan_packed", state, batch, "u")
    if not rows:
        return model.scan(u, state, system)
    system = model.system() if system is None else system
    # First the piece that continues from `state`, which may be empty; the last sequence may continue after the chunk.
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
    """Maps one sample of streams, and restarts streams before it: :func:`reset`, and then a step.

    Arguments:
        model: A causal sequence layer or container.
        u: The input, with shape :math:`(*, d_{input})`, or :math:`(*)` of class indices.
        state: The states of the streams.
        starts: Booleans with shape :math:`(*)`: whether this sample is the first of a sequence.
        system: What the model's `system()` returned; by default it is made here. A loop should make it once.

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
    """Restarts single streams: sets their states to the model's initial state.

    If the flags are on the CPU and none is set, the state is returned as it is, so that phases stay integers.

    Arguments:
        model: A causal sequence layer or container.
        state: The states of the streams.
        rows: Booleans with the batch shape of the state, true for the streams to restart.

    Returns:
        The state, with the dtypes of `state`.

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
    return _reset(model, batched_state("reset", state, rows.shape, "rows"), rows)


def starts_from_boundaries(boundaries: Lengths) -> Tensor:
    r"""For every sample, whether a sequence begins with it, from cumulative lengths.

    Arguments:
        boundaries: Cumulative lengths :math:`0, n_0, n_0 + n_1, \dots, L`, integers with shape :math:`(S + 1)`.

    Returns:
        Booleans with shape :math:`(L)`; slices of them belong to chunks of the row.

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
    """For every sample, whether a sequence begins with it, from segment numbers.

    Arguments:
        segments: The number of the sequence of every sample, integers with shape :math:`(*, L)`; neighbours with
            equal numbers belong to one sequence.
        before: The segment numbers of the samples before this chunk, with shape :math:`(*)`; by default the first
            sample begins a sequence.

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
    """Segment numbers from flags, for other libraries.

    Arguments:
        starts: Booleans with shape :math:`(*, L)`, true at the first sample of each sequence.

    Returns:
        The number of the sequence of every sample, from 0 on, integers with shape :math:`(*, L)`. If the first sample
        is no start, the samples before the first start have number 0.

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
    """Splits a row where sequences begin; the first begins at 0. No starts give no pieces."""
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


def _alike(start: State, state: State) -> State:
    """A state with the devices and dtypes of another one."""
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
