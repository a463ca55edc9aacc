"""Programs: what a model is lowered to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .kernels import FIELDS, LANE, Op, lines
from .packing import Slot

__all__ = ["Program"]


class Program:
    """A program being written: instructions, packed weights, and a plan of the memory."""

    def __init__(self) -> None:
        self._table: list[list[int]] = []
        self._weights: list[np.ndarray] = []
        self._held = 0
        self._poles: list[np.ndarray] = []
        self._poles_held = 0
        # What threads of a team have written since they last waited for each other, and of that, what each has not
        # written in the part that it owns.
        self._unseen: set[int] = set()
        self._scattered: set[int] = set()
        self.read_again: set[Slot] = set()
        """What is read once more after the instruction that follows."""
        self.size = 0
        """Float32 numbers of memory that a stream needs."""
        self.states = 0
        """Float64 numbers that a stream needs for the states of its recurrences."""
        self.counters = 0
        """Counters that the streams share."""
        self.classes: int | None = None
        """How many classes there are, if classes come in."""

    def hold(self, *arrays: Tensor) -> int:
        """Packs weights, each from a cache line on; returns where the first begins."""
        start = self._held
        for array in arrays:
            flat = array.detach().to("cpu", torch.float32).reshape(-1).numpy()
            self._weights.append(np.pad(flat, (0, lines(flat.size) - flat.size)))
            self._held += self._weights[-1].size
        return start

    def slot(self, width: int) -> Slot:
        """Plans a vector in the memory."""
        slot = Slot(self.size, width)
        self.size += lines(width)
        return slot

    def hold_poles(self, poles: Tensor) -> int:
        """Packs poles (H, N/2): of each feature the real parts, then the imaginary ones; returns where they begin."""
        start = self._poles_held
        parts = torch.cat([poles.real, poles.imag], -1).detach().to("cpu", torch.float64).flatten().numpy()
        self._poles.append(parts)
        self._poles_held += parts.size
        return start

    def state(self, width: int) -> Slot:
        """Plans a vector in the states."""
        slot = Slot(self.states, width)
        self.states += width
        return slot

    def counter(self) -> int:
        """Plans a counter."""
        self.counters += 1
        return self.counters - 1

    def emit(
        self,
        op: Op,
        source: Slot,
        target: Slot,
        *,
        other: Slot | None = None,
        whole: bool = False,
        scattered: bool = False,
        **fields: int,
    ) -> Slot:
        """Writes an instruction.

        Arguments:
            op: What to do.
            source, target: What it reads and what it writes.
            other: A second source, as field `a`.
            whole: Whether a thread of a team reads more than the part that it owns.
            scattered: Whether a thread writes another part than it owns.
            fields: The other fields.

        Returns:
            The target.
        """
        reads = {source.start}
        if other is not None:
            fields["a"] = other.start
            reads.add(other.start)
        wait = not reads.isdisjoint(self._unseen if whole else self._scattered)
        if wait:
            self._unseen.clear()
            self._scattered.clear()
        self.wrote(target, scattered)
        values = {"op": op, "wait": wait, "source": source.start, "target": target.start, **fields}
        self._table.append([int(values.get(name, 0)) for name in FIELDS])
        return target

    def gate(self, slot: Slot, width: int) -> bool:
        """Puts a gated linear unit into the linear map that has just written its input, if nothing else reads that."""
        line = dict(zip(FIELDS, self._table[-1], strict=True)) if self._table else {}
        if line.get("op") != Op.LINEAR or line["target"] != slot.start or line["a"] or slot in self.read_again:
            return False
        self._table[-1] = list({**line, "m": width, "a": 1}.values())
        return True

    def wrote(self, slot: Slot, scattered: bool = False) -> None:
        """Says that the instruction written last writes to a slot."""
        self._unseen.add(slot.start)
        if scattered:
            self._scattered.add(slot.start)

    @contextmanager
    def skipped_unless_full(self) -> Iterator[None]:
        """What is written inside belongs to the :attr:`Op.FRAME` before, and is skipped while its frame is not full."""
        frame, before = self._table[-1], (self._unseen.copy(), self._scattered.copy())
        yield
        frame[FIELDS.index("d")] = len(self._table)
        self._unseen |= before[0]
        self._scattered |= before[1]

    def table(self) -> np.ndarray:
        """The instructions, with the columns :data:`FIELDS`."""
        return np.array(self._table, np.int64).reshape(-1, len(FIELDS))

    def weights(self) -> np.ndarray:
        """All weights, float32, in the order in which the instructions read them."""
        return _aligned([*self._weights, np.zeros(LANE, np.float32)])

    def poles(self) -> np.ndarray:
        """All poles, float64, in the order in which the instructions read them."""
        return _aligned([*self._poles, np.zeros(LANE)])


def _aligned(parts: list[np.ndarray]) -> np.ndarray:
    """The parts one after another, from the beginning of a cache line on."""
    line, item = 4 * LANE, parts[0].itemsize
    buffer = np.empty(sum(part.size for part in parts) + line // item, parts[0].dtype)
    start = -buffer.ctypes.data % line // item
    packed = buffer[start : buffer.size - line // item + start]
    return np.concatenate(parts, out=packed)
