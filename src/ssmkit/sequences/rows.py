r"""Sequences of different lengths through a model, by the contract alone: what padded and packed batches share.

`forward` runs groups of rows: of one shape each if the model is not causal, else of similar length, padded with zeros
at the end, which nothing before it hears. `scan` pads nothing, as the state of a row has to stop where the row does:
all rows are cut into stretches of a few lengths, and those of one length run together, each from where its row has got
to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..layers.base import SequenceLayer, System
from ..states import State, concatenate, select
from .arguments import time_axis

__all__ = ["forward_rows", "put", "scan_rows"]

_RUN = 2048
"""What a run of a model costs beside its samples, in samples: S4 makes a kernel for every length."""
_PLACES = 32
"""How many places are tried at which a group may begin."""


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
        # Of one shape there is nothing to pad; and `pad_sequence` takes time in front.
        padded = pad_sequence([rows[i].movedim(time, 0) for i in group], batch_first=True).movedim(1, time)
        outputs = model(padded, system)
        for i, y in zip(group, outputs.unbind(0), strict=True):
            found[i] = y.narrow(-2, 0, rows[i].shape[time])
    return [found[i] if i in found else _nothing(row, outputs) for i, row in enumerate(rows)]


def scan_rows(model: SequenceLayer, rows: Sequence[Tensor], state: State, system: System) -> tuple[list[Tensor], State]:
    """Runs chunks of different lengths from their states.

    Arguments:
        model: A causal sequence layer.
        rows: The chunks, at least one, each with shape (\\*, L, d) or (\\*, L), which may differ in L alone.
        state: Where the streams have got to, one row for each chunk.
        system: What the model's `system()` returned, or None.

    Returns:
        The outputs, each with shape (\\*, L, d_output), and the state of each row at its end.
    """
    system = model.system() if system is None else system
    time = time_axis(rows[0])
    cuts = _stretches([row.shape[time] for row in rows])
    sizes = [[size for size, group in cuts if i in group] for i in range(len(rows))]
    stretches = [iter(row.split(of_row, time)) if of_row else iter(()) for row, of_row in zip(rows, sizes, strict=True)]
    found: list[list[Tensor]] = [[] for _ in rows]
    for _, group in cuts or [(0, dict.fromkeys(range(len(rows))))]:
        u = torch.stack([next(stretches[i]) for i in group] if cuts else list(rows))
        outputs, new = model.scan(u, select(state, list(group)) if len(group) < len(rows) else state, system)
        state = put(state, list(group), new, len(rows))
        for i, y in zip(group, outputs.unbind(0), strict=True):
            found[i].append(y)
    return [torch.cat(y, -2) if y else _nothing(row, outputs) for row, y in zip(rows, found, strict=True)], state


def put(state: State, rows: Sequence[int], new: State, count: int) -> State:
    """A state of `count` rows with some of them replaced."""
    if len(rows) == count:
        return new
    chosen = set(rows)
    order = [*rows, *(i for i in range(count) if i not in chosen)]
    places = sorted(range(count), key=order.__getitem__)
    return select(concatenate([new, select(state, order[len(rows) :])]), places)


def _nothing(row: Tensor, outputs: Tensor) -> Tensor:
    """The output for a sequence without samples, like those of others."""
    return outputs.new_zeros(*row.shape[: row.ndim + time_axis(row) + 1], outputs.shape[-1])


def _equal(shapes: Sequence[torch.Size]) -> list[list[int]]:
    """The places of equal shapes, together."""
    groups: dict[torch.Size, list[int]] = defaultdict(list)
    for i, shape in enumerate(shapes):
        groups[shape].append(i)
    return list(groups.values())


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """The places of similar lengths, together, so that padded samples and runs cost the least in all."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    places = min(len(order), _PLACES)
    edges = [len(order) * k // places for k in range(places + 1)]
    # The least cost of the rows before an edge, and where the last of their groups begins.
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


def _stretches(lengths: Sequence[int]) -> list[tuple[int, dict[int, None]]]:
    """Lengths as sums of a few: how long the stretches are, in order, and which rows have each.

    Either all rows go together from one length to the next, or by powers of two, the largest first: of many lengths up
    to L the second needs log L stretches alone. Both run no sample twice.
    """
    distinct = sorted({length for length in lengths if length})
    powers = [1 << bit for bit in reversed(range(max(lengths).bit_length())) if any(n >> bit & 1 for n in lengths)]
    if len(distinct) <= len(powers):
        steps = [after - before for before, after in zip([0, *distinct], distinct, strict=False)]
        chosen = [[i for i, n in enumerate(lengths) if n >= length] for length in distinct]
        return [(step, dict.fromkeys(rows)) for step, rows in zip(steps, chosen, strict=True)]
    return [(power, dict.fromkeys(i for i, n in enumerate(lengths) if n & power)) for power in powers]
