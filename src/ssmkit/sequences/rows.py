r"""Runs rows of different lengths, by the contract alone: the common part of padded and packed batches.

`forward` runs groups of rows: of equal shape if the model is not causal, else of similar length with zeros as padding
at the end, which do not affect outputs before them. `scan` needs the state at the end of every row, so it has no
padding: rows are split into pieces of a few common lengths, and pieces of equal length run together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers.base import SequenceLayer, System
from ..states import State, concatenate, select
from .arguments import time_axis

__all__ = ["forward_rows", "put", "scan_rows", "stack_padded"]

_RUN = 2048
"""The fixed cost of a run, in samples: S4 makes a kernel for every length."""
_PLACES = 32
"""At most so many positions are considered as the begin of a group."""


def forward_rows(model: SequenceLayer, rows: Sequence[Tensor], system: System) -> list[Tensor]:
    """Runs sequences from rest.

    Arguments:
        model: A sequence layer, causal or not.
        rows: The sequences, at least one, each with shape (\\*, L, d) or (\\*, L), which may differ in L, and in other
            axes if the model is not causal.
        system: What the model's `system()` returned, or None.

    Returns:
        The outputs, each with shape (\\*, L, d_output).
    """
    system = model.system() if system is None else system
    if not any(row.numel() for row in rows):
        return [model(row[None], system)[0] for row in rows]
    time, found = time_axis(rows[0]), {}
    full = [i for i, row in enumerate(rows) if row.numel()]
    lengths = [rows[i].shape[time] for i in full]
    groups = _similar(lengths) if model.causal else _equal([rows[i].shape for i in full])
    for places in groups:
        group = [full[place] for place in places]
        outputs = model(stack_padded([rows[i] for i in group], time), system)
        for i, y in zip(group, outputs.unbind(0), strict=True):
            found[i] = y.narrow(-2, 0, rows[i].shape[time])
    return [found[i] if i in found else _nothing(row, outputs) for i, row in enumerate(rows)]


def scan_rows(model: SequenceLayer, rows: Sequence[Tensor], state: State, system: System) -> tuple[list[Tensor], State]:
    """Runs chunks of different lengths from their states.

    Arguments:
        model: A causal sequence layer.
        rows: The chunks, at least one, each with shape (\\*, L, d) or (\\*, L), which may differ in L alone.
        state: The states of the streams, with one row for each chunk.
        system: What the model's `system()` returned, or None.

    Returns:
        The outputs, each with shape (\\*, L, d_output), and the state of each row at its end.
    """
    system = model.system() if system is None else system
    time, count = time_axis(rows[0]), len(rows)
    groups = _pieces([row.shape[time] for row in rows])
    sizes: list[list[int]] = [[] for _ in rows]
    for size, group in groups:
        for i in group:
            sizes[i].append(size)
    pieces = [iter(row.split(of_row, time) if of_row else [row]) for row, of_row in zip(rows, sizes, strict=True)]
    found: list[list[Tensor]] = [[] for _ in rows]
    for _, group in groups or [(0, list(range(count)))]:
        u = torch.stack([next(pieces[i]) for i in group])
        outputs, new = model.scan(u, state if len(group) == count else select(state, group), system)
        state = put(state, group, new, count)
        for i, y in zip(group, outputs.unbind(0), strict=True):
            found[i].append(y)
    return [torch.cat(y, -2) if y else _nothing(row, outputs) for row, y in zip(rows, found, strict=True)], state


def stack_padded(rows: Sequence[Tensor], time: int, *, left: bool = False) -> Tensor:
    """Makes a batch of rows that differ only in length along the axis `time`, with zeros as padding.

    The backward pass of torch's `pad_sequence` makes a gradient of the whole batch for each row; this one does not.
    """
    longest = max(row.shape[time] for row in rows)
    padded = []
    for row in rows:
        missing = longest - row.shape[time]
        behind = [0, 0] * (row.ndim - 1 - time % row.ndim)
        padded.append(F.pad(row, [*behind, missing, 0] if left else [*behind, 0, missing]) if missing else row)
    return torch.stack(padded)


def put(state: State, rows: Sequence[int], new: State, count: int) -> State:
    """A state of `count` rows with some of them replaced."""
    if len(rows) == count:
        return new
    chosen = set(rows)
    order = [*rows, *(i for i in range(count) if i not in chosen)]
    places = sorted(range(count), key=order.__getitem__)
    return select(concatenate([new, select(state, order[len(rows) :])]), places)


def _nothing(row: Tensor, outputs: Tensor) -> Tensor:
    """The output for a sequence without samples, in the dtype and width of others."""
    return outputs.new_zeros(*row.shape[: row.ndim + time_axis(row) + 1], outputs.shape[-1])


def _equal(shapes: Sequence[torch.Size]) -> list[list[int]]:
    """Groups the indices of equal shapes."""
    groups: dict[torch.Size, list[int]] = defaultdict(list)
    for i, shape in enumerate(shapes):
        groups[shape].append(i)
    return list(groups.values())


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Groups the indices of similar lengths, so that padded samples and fixed costs of runs are minimal in total."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    places = min(len(order), _PLACES)
    edges = [len(order) * k // places for k in range(places + 1)]
    # For every edge: the least cost of the rows before it, and the edge at which the last of their groups begins.
    best = [(0, 0)]
    for end in range(1, len(edges)):
        best.append(
            min(
                (best[begin][0] + _RUN + (edges[end] - edges[begin]) * lengths[order[edges[begin]]], begin)
                for begin in range(end)
            )
        )
    groups, end = [], len(edges) - 1
    while end:
        begin = best[end][1]
        groups.append(order[edges[begin] : edges[end]])
        end = begin
    return groups


def _pieces(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Splits lengths into pieces of a few common lengths: for each, in order, the length and the rows with a piece.

    Either from each length to the next longer one, or into powers of two, the largest first, whichever has fewer
    pieces: for lengths up to L there are at most log2 L + 1 powers. In both, every sample is in one piece.
    """
    rows = range(len(lengths))
    distinct = sorted({length for length in lengths if length})
    powers = [1 << bit for bit in reversed(range(max(lengths).bit_length())) if any(n >> bit & 1 for n in lengths)]
    if len(distinct) > len(powers):
        return [(power, [i for i in rows if lengths[i] & power]) for power in powers]
    return [
        (length - before, [i for i in rows if lengths[i] >= length])
        for before, length in zip([0, *distinct], distinct, strict=False)
    ]
