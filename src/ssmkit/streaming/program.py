"""A program under construction: instructions, weights, and the layout of its memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .kernels import INSTRUCTION, LANE, Instruction, Op, lines
from .packing import Slot

__all__ = ["Program"]


class Program:
    """A program under construction."""

    def __init__(self) -> None:
        self._table: list[Instruction] = []
        self._weights: list[np.ndarray] = []
        self._held = 0
        self._poles: list[np.ndarray] = []
        self._poles_held = 0
        # Starts of the vectors written since the last barrier of a team. Each thread owns a part of every vector. A
        # vector is scattered if a thread has written outside its own part.
        self._unsynchronised: set[int] = set()
        self._scattered: set[int] = set()
        self.read_again: set[Slot] = set()
        """Vectors that more than one instruction reads."""
        self.size = 0
        """Float32 numbers of memory that a stream needs."""
        self.states = 0
        """Float64 numbers that a stream needs for the states of its recurrences."""
        self.counters = 0
        """Counters that the streams share."""
        self.classes: int | None = None
        """How many classes there are, if the input is classes."""

    def hold(self, *arrays: Tensor) -> int:
        """Packs weights as float32, each array at the start of a cache line; returns where the first begins."""
        start = self._held
        for array in arrays:
            flat = array.detach().to("cpu", torch.float32).reshape(-1).numpy()
            self._weights.append(np.pad(flat, (0, lines(flat.size) - flat.size)))
            self._held += self._weights[-1].size
        return start

    def slot(self, width: int) -> Slot:
        """Reserves a vector in the memory."""
        slot = Slot(self.size, width)
        self.size += lines(width)
        return slot

    def hold_float64(self, *arrays: Tensor) -> int:
        """Packs numbers as float64, such as poles, one array after another; returns where they begin."""
        start = self._poles_held
        for array in arrays:
            self._poles.append(array.detach().to("cpu", torch.float64).reshape(-1).numpy())
            self._poles_held += array.numel()
        return start

    def state(self, width: int) -> Slot:
        """Reserves a vector among the states."""
        slot = Slot(self.states, width)
        self.states += width
        return slot

    def counter(self) -> int:
        """Reserves a counter."""
        self.counters += 1
        return self.counters - 1

    def emit(
        self,
        op: Op,
        source: Slot,
        target: Slot,
        *,
        others: Mapping[str, Slot] | None = None,
        whole: bool = False,
        scattered: bool = False,
        **fields: int,
    ) -> Slot:
        """Writes an instruction.

        Arguments:
            op: What to do.
            source, target: What it reads and what it writes.
            others: What else it reads, by the names of the fields that say where each begins.
            whole: Whether a thread of a team reads parts that other threads own.
            scattered: Whether a thread writes parts that other threads own.
            fields: The other fields of :class:`~.kernels.Instruction` that this kind of instruction uses.

        Returns:
            The target.
        """
        starts = {name: slot.start for name, slot in (others or {}).items()}
        reads = {source.start, *starts.values()}
        wait = not reads.isdisjoint(self._unsynchronised if whole else self._scattered)
        if wait:
            self._unsynchronised.clear()
            self._scattered.clear()
        self.wrote(target, scattered)
        self._table.append(Instruction(op, wait, source.start, target.start, **starts, **fields))
        return target

    def gate(self, slot: Slot, width: int) -> bool:
        """Merges a gated linear unit into the linear map just before it.

        Arguments:
            slot: The input of the unit.
            width: The width of its output.

        Returns:
            Whether it was merged: not if another instruction wrote the input of the unit, or reads it as well.
        """
        line = self._table[-1] if self._table else None
        if line is None or line.op != Op.LINEAR or line.target != slot.start or line.gated or slot in self.read_again:
            return False
        self._table[-1] = line._replace(outputs=width, gated=1)
        return True

    def wrote(self, slot: Slot, scattered: bool = False) -> None:
        """Records that the threads of a team have written to a slot, each thread its part."""
        self._unsynchronised.add(slot.start)
        if scattered:
            self._scattered.add(slot.start)

    @contextmanager
    def skipped_unless_full(self) -> Iterator[None]:
        """The instructions inside are skipped if the frame of the preceding :attr:`Op.FRAME` is not full."""
        at, before = len(self._table) - 1, (self._unsynchronised.copy(), self._scattered.copy())
        yield
        self._table[at] = self._table[at]._replace(skip_to=len(self._table))
        # If the instructions inside are skipped, so are their barriers.
        self._unsynchronised |= before[0]
        self._scattered |= before[1]

    def table(self) -> np.ndarray:
        """The instructions, in an array of :data:`~.kernels.INSTRUCTION`."""
        return np.array(self._table, INSTRUCTION)

    def weights(self) -> np.ndarray:
        """All weights, float32, in the order in which the instructions read them."""
        return _aligned([*self._weights, np.zeros(LANE, np.float32)])

    def poles(self) -> np.ndarray:
        """All poles, float64, in the order in which the instructions read them."""
        return _aligned([*self._poles, np.zeros(LANE)])


def _aligned(parts: list[np.ndarray]) -> np.ndarray:
    """The parts one after another, aligned to a cache line."""
    line, item = 4 * LANE, parts[0].itemsize
    buffer = np.empty(sum(part.size for part in parts) + line // item, parts[0].dtype)
    start = -buffer.ctypes.data % line // item
    packed = buffer[start : buffer.size - line // item + start]
    return np.concatenate(parts, out=packed)
