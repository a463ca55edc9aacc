"""The layout of the states of layers in the memory of a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from ..layers import MultiRate
from ..layers.container import Container
from ..layers.pointwise import no_state
from ..states import State

__all__ = ["Frames", "Memory", "NoState", "Packing", "Recurrent", "Slot", "StateTuple", "Untouched"]


class Memory(NamedTuple):
    """What changes while a program runs."""

    floats: np.ndarray
    """Activations and frames, float32; shape (streams, size)."""
    states: np.ndarray
    """States of recurrences, float64; shape (streams, states)."""
    counters: np.ndarray
    """Phases of frames; shape (streams, counters), or (counters) for streams with equal phases."""


class Slot(NamedTuple):
    """The place of a vector in the memory of a stream."""

    start: int
    width: int

    def of(self, floats: np.ndarray) -> np.ndarray:
        """The vectors of all streams: columns of an array of shape (streams, size)."""
        return floats[:, self.start : self.start + self.width]


class Packing(Protocol):
    """The layout of a layer's state in the memory."""

    def pack(self, state: State, batch: Sequence[int], memory: Memory) -> None:
        """Writes a state to the memory."""

    def unpack(self, like: State, batch: Sequence[int], memory: Memory) -> State:
        """Reads a state from the memory, with the dtypes and devices of the state `like`."""


def _write(state: State, shape: Sequence[int], batch: Sequence[int]) -> np.ndarray:
    x = _checks.with_values("Engine", "state", _checks.state("Engine", state, (*batch, *shape)))
    return x.detach().to("cpu", torch.float64).numpy().reshape(prod(batch), *shape)


def _read(x: np.ndarray, like: State, batch: Sequence[int]) -> Tensor:
    copy = torch.from_numpy(np.ascontiguousarray(x)).reshape(*batch, *x.shape[1:])
    return copy.to(cast(Tensor, like), copy=x.flags.c_contiguous)


@dataclass(frozen=True)
class NoState:
    """The state of a layer without memory, `()`."""

    def pack(self, state: State, batch: Sequence[int], memory: Memory) -> None:
        """Checks the state; there is nothing to write."""
        no_state("Engine", state)

    def unpack(self, like: State, batch: Sequence[int], memory: Memory) -> State:
        """`()`."""
        return ()


@dataclass(frozen=True)
class Recurrent:
    """The state of a system: one tensor, whose elements are stored among the states, possibly in another order."""

    slot: Slot
    shape: tuple[int, ...]
    order: np.ndarray | slice
    """For each element in the memory, its index in the flat tensor."""

    def pack(self, state: State, batch: Sequence[int], memory: Memory) -> None:
        """Writes the elements in the order of the memory."""
        x = _write(state, self.shape, batch).reshape(prod(batch), self.slot.width)
        self.slot.of(memory.states)[...] = x[:, self.order]

    def unpack(self, like: State, batch: Sequence[int], memory: Memory) -> State:
        """Reads the elements in the order of the tensor."""
        x = np.empty((prod(batch), self.slot.width))
        x[:, self.order] = self.slot.of(memory.states)
        return _read(x.reshape(prod(batch), *self.shape), like, batch)


@dataclass(frozen=True)
class Untouched:
    """A tensor that the program neither reads nor writes, such as the mask of a tied dropout."""

    slot: Slot

    def pack(self, state: State, batch: Sequence[int], memory: Memory) -> None:
        """Writes the tensor."""
        self.slot.of(memory.floats)[...] = _write(state, (self.slot.width,), batch)

    def unpack(self, like: State, batch: Sequence[int], memory: Memory) -> State:
        """Reads the tensor."""
        return _read(self.slot.of(memory.floats), like, batch)


@dataclass(frozen=True)
class Frames:
    """The state of a :class:`ssmkit.MultiRate`: the frame being filled, the one being emitted, phase and inner state.

    In a frame that is not full, the samples are at the end in the layer's state, and at the beginning in the memory.
    """

    layer: MultiRate
    filling: Slot
    emitting: Slot
    counter: int
    inner: Packing

    def _frame(self, slot: Slot, memory: Memory) -> np.ndarray:
        return slot.of(memory.floats).reshape(len(memory.floats), self.layer.pool, self.layer.d_input)

    def pack(self, state: State, batch: Sequence[int], memory: Memory) -> None:
        """Moves the samples of the frame being filled to its beginning."""
        filling, emitting, phase, inner = self.layer.parts(state, batch)
        pool, shape = self.layer.pool, filling.shape[len(batch) :]
        phases = memory.counters[:, self.counter]
        if isinstance(phase, Tensor):
            phases[...] = _checks.with_values("Engine", "state", phase).reshape(-1).cpu().numpy()
        else:
            phases[...] = phase
        if phases.size and not 0 <= phases.min() <= phases.max() < pool:
            raise ValueError(
                f"Engine: phases in `state` must be from 0 to {pool - 1}, got {phases.min()} to {phases.max()}."
            )
        place = (np.arange(pool) - phases[:, None]) % pool
        self._frame(self.filling, memory)[...] = np.take_along_axis(
            _write(filling, shape, batch), place[..., None], axis=1
        )
        self._frame(self.emitting, memory)[...] = _write(emitting, shape, batch)
        self.inner.pack(inner, batch, memory)

    def unpack(self, like: State, batch: Sequence[int], memory: Memory) -> State:
        """Moves the samples of the frame being filled back to its end."""
        filling, emitting, _, inner = cast(tuple[Tensor, Tensor, State, State], like)
        pool, phases = self.layer.pool, memory.counters[:, self.counter]
        place = np.arange(pool) + phases[:, None]
        filled = np.take_along_axis(self._frame(self.filling, memory), (place % pool)[..., None], axis=1)
        filled[place < pool] = 0
        agree = (phases == phases[:1]).all()
        return (
            _read(filled, filling, batch),
            _read(self._frame(self.emitting, memory), emitting, batch),
            int(phases.max(initial=0)) if agree else torch.from_numpy(phases.copy()).reshape(*batch).to(filling.device),
            self.inner.unpack(inner, batch, memory),
        )


@dataclass(frozen=True)
class StateTuple:
    """The tuple of the states of a container's layers."""

    layer: Container
    parts: tuple[Packing, ...]

    def pack(self, state: State, batch: Sequence[int], memory: Memory) -> None:
        """Writes the states of all layers."""
        for part, (_, _, layer_state) in zip(self.parts, self.layer.shares(None, state), strict=True):
            part.pack(layer_state, batch, memory)

    def unpack(self, like: State, batch: Sequence[int], memory: Memory) -> State:
        """Reads the states of all layers."""
        return tuple(
            part.unpack(child, batch, memory)
            for part, child in zip(self.parts, cast(tuple[State, ...], like), strict=True)
        )
