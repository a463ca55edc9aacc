"""Models as compiled programs, for streams in real time and for sampling inside the compiled loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from ..layers.base import SequenceLayer, System, refuse_forward_only
from ..sequences.arguments import flags
from ..states import State, detach, select
from . import kernels
from .lowering import lower
from .packing import Memory
from .program import Program

__all__ = ["Engine", "Generated", "Stream"]


class Generated(NamedTuple):
    """The samples that :meth:`Stream.generate` has drawn."""

    classes: Tensor
    """Shape :math:`(*, L)`."""
    nats: Tensor
    """Negative log-likelihood of each under the model at temperature 1, in float64; shape :math:`(*, L)`."""
    logits: Tensor
    """The model's logits for the next sample; shape :math:`(*, classes)`."""


class Engine:
    r"""A causal model as a compiled program that runs sample by sample, in real time.

    The model is lowered once to a flat list of instructions over packed float32 weights; one compiled function runs
    them, with no Python between samples. The output agrees with :meth:`~ssmkit.SequenceLayer.step` to rounding, and
    the states are interchangeable: read a prompt with :meth:`~ssmkit.SequenceLayer.scan`, and continue here. Streams
    whose phases differ (:class:`ssmkit.MultiRate`) run in groups of equal phase.

    It accepts all causal layers of ssmkit, the position-wise modules of torch, and a :class:`ssmkit.StateSpaceLayer` of
    your own whose system has :meth:`~ssmkit.systems.System.write`; it refuses a module of your own. The program holds a
    copy of the current weights, in float32 and on the CPU, and runs in evaluation mode: dropout does nothing.
    No gradients flow through it. The first engine on a machine compiles for about twenty seconds; the result is kept
    on disk. Needs `numba`: ``pip install 'ssmkit[streaming]'``.

    Threads may share an engine: running writes to the stream alone, and releases Python's lock.

    Arguments:
        model: A causal model of width :math:`d_{input}`, or one that begins with an `nn.Embedding` and takes classes.
        system: What the model's `system()` returned; by default it is made here.
        threads: How many threads share the work. Several streams are divided among them. For one stream they divide
            the rows of each product, and wait for each other after it: if another program uses one of the cores, this
            is slower than one thread. By default one for one stream, and `torch.get_num_threads()` for several.

    Attributes:
        table: The instructions, a structured array with the fields of `Instruction` in `ssmkit.streaming.kernels`.
        weights: The packed weights, float32.
        poles: The packed poles of the recurrences, float64.

    Raises:
        TypeError: If `model` is not a sequence layer.
        ValueError: If it holds a module of an unknown kind, which the message names, or is not causal; or if the
            system is of another model.

    Example:
        >>> model = ssmkit.Sequential(ssmkit.S4Block(8, ssmkit.S4(8)), torch.nn.Linear(8, 2))
        >>> engine = ssmkit.streaming.Engine(model)
        >>> u = torch.randn(3, 50, 8)
        >>> y, state = engine.run(u, model.initial_state(3))
        >>> torch.allclose(y, model(u), atol=1e-5)
        True
    """

    def __init__(self, model: SequenceLayer, system: System = None, *, threads: int | None = None) -> None:
        if not isinstance(model, SequenceLayer):
            raise TypeError(
                f"Engine: `model` must be a `ssmkit.SequenceLayer`, got {type(model).__name__}; "
                "wrap position-wise modules in `ssmkit.Sequential`."
            )
        if not model.causal:
            refuse_forward_only("Engine", "run", model)
        self._threads = threads if threads is None else _checks.integer("Engine", "threads", threads)
        program = Program()
        with torch.no_grad():
            self._source = program.slot(model.d_input or 0)
            # Each thread of a team copies its own part of the input.
            program.wrote(self._source)
            system = model.system() if system is None else system
            self._target, self._packing = lower(program, model, system, self._source)
        if model.d_input is None and program.classes is None:
            raise ValueError(
                "Engine: the input width of `model` is not known; begin with a layer or module of known width."
            )
        self.table, self.weights, self.poles = program.table(), program.weights(), program.poles()
        self._size, self._states, self._counters = program.size, program.states, program.counters
        self._classes = program.classes
        # A copy, as of the weights: a learnt start may change later.
        self._first = detach(model.initial_state(1))
        # Compile now, or load compiled code from disk, so that the first sample does not wait for it.
        empty = self.start(0)
        if self._classes is None:
            empty.run(torch.zeros(0, 0, self._source.width))
        else:
            empty.run(torch.zeros(0, 0, dtype=torch.long))
            if self._classes >= self.d_output:
                empty.generate(torch.zeros(0, self.d_output), torch.zeros(0, 0))

    @property
    def d_input(self) -> int | None:
        """The width of the input, or None if the input is classes."""
        return None if self._classes is not None else self._source.width

    @property
    def d_output(self) -> int:
        """The width of the output."""
        return self._target.width

    def start(self, *batch_shape: int, state: State | None = None) -> Stream:
        """Starts streams whose states stay in the engine's own layout, so that no call converts them.

        Arguments:
            batch_shape: The batch axes.
            state: The state, in the form that `step` takes; by default the initial state that the model had when the
                engine was made: rest, or a learnt start.

        Returns:
            The streams.

        Raises:
            ValueError: If the state is of another model or batch shape.
        """
        return Stream(self, batch_shape, state)

    def run(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        """Maps a chunk of any length sample by sample; the model's `scan` gives the same in parallel.

        Arguments:
            u: The input, with shape :math:`(*, L, d_{input})`, or classes with shape :math:`(*, L)`.
            state: The state before the chunk.

        Returns:
            The output, with shape :math:`(*, L, d_{output})`, and the next state.

        Raises:
            TypeError: If `u` is of the wrong kind.
            ValueError: If a shape is wrong, or a class is not one of the model's.
        """
        stream = self.start(*self._batch(u), state=state)
        return stream.run(u), stream.state

    def _batch(self, u: Tensor) -> torch.Size:
        _checks.with_values("Engine", "u", u)
        if self._classes is None:
            _checks.sequence("Engine", "u", u, self._source.width)
            return u.shape[:-2]
        if u.is_floating_point() or u.is_complex() or u.dtype == torch.bool:
            raise TypeError(
                "Engine: `u` must be a tensor of classes (integers), as the model begins with an Embedding."
            )
        if u.ndim < 1:
            raise ValueError("Engine: `u` must have a time axis.")
        if u.numel() and not (int(u.min()) >= 0 and int(u.max()) < self._classes):
            raise ValueError(f"Engine: classes in `u` must be at least 0 and less than {self._classes}.")
        return u.shape[:-1]

    def _run_on_threads(self, memory: Memory, work: Callable[..., None]) -> None:
        """Runs compiled work on all threads: one stream as a team, or several streams with a part for each thread."""
        streams = len(memory.floats)
        alone = np.zeros(kernels.LANE, np.int64)
        threads = self._threads or (1 if streams == 1 else torch.get_num_threads())
        if threads == 1 or not streams:
            work(slice(None), memory, 0, 1, alone)
            return
        parts: list[tuple[slice, Memory, int, int, np.ndarray]]
        if streams == 1:
            arrivals = np.zeros(threads * kernels.LANE, np.int64)
            ranks = range(threads)
            parts = [
                (slice(None), memory._replace(counters=memory.counters.copy()), r, threads, arrivals) for r in ranks
            ]
        else:
            edges = np.linspace(0, streams, min(threads, streams) + 1).round().astype(int)
            parts = [
                (slice(lo, hi), Memory(memory.floats[lo:hi], memory.states[lo:hi], memory.counters.copy()), 0, 1, alone)
                for lo, hi in zip(edges, edges[1:], strict=False)
            ]
        # New threads for every call: a thread of a pool could be busy while the others of its team wait for it.
        rest = [threading.Thread(target=work, args=part) for part in parts[1:]]
        for thread in rest:
            thread.start()
        work(*parts[0])
        for thread in rest:
            thread.join()
        memory.counters[...] = parts[0][1].counters


class Stream:
    """Streams of an :class:`Engine`, kept in its own layout and advanced in place.

    Made by :meth:`Engine.start`. A stream must not be run by two threads at a time.

    Attributes:
        engine: The engine that runs them.
        batch_shape: The batch axes.

    Example:
        >>> model = ssmkit.Sequential(torch.nn.Embedding(16, 8), ssmkit.S4D(8), torch.nn.Linear(8, 16))
        >>> stream = ssmkit.streaming.Engine(model).start()
        >>> logits = stream.run(torch.tensor([3, 1, 4]))[-1]
        >>> uniform = torch.rand(100, generator=torch.Generator().manual_seed(0))
        >>> stream.generate(logits, uniform, top_p=0.9).classes.shape
        torch.Size([100])
    """

    def __init__(self, engine: Engine, batch_shape: tuple[int, ...], state: State | None) -> None:
        _checks.batch("Engine.start", batch_shape)
        self.batch_shape = torch.Size(batch_shape)
        self.engine = engine
        # An odd number of cache lines: with an even one, the same line of many streams would fall into one cache set.
        row = engine._size + kernels.LANE * (1 - engine._size // kernels.LANE % 2)
        streams, counters = prod(batch_shape), max(1, engine._counters)
        memory = Memory(
            np.zeros((streams, row), np.float32),
            np.zeros((streams, engine._states)),
            np.zeros((streams, counters), np.int64),
        )
        self._like = engine._first if state is None else state
        if state is None:
            engine._packing.pack(select(engine._first, [0] * streams), (streams,), memory)
        else:
            engine._packing.pack(state, self.batch_shape, memory)
        self._groups = _groups(memory)

    @property
    def state(self) -> State:
        """A copy of the state, in the form that `step` takes, with dtypes and devices of the state at the start."""
        return self.engine._packing.unpack(self._like, self.batch_shape, _join(self._groups))

    def reset(self, rows: Tensor | None = None) -> None:
        """Restarts single streams: sets their states to the model's initial state.

        Arguments:
            rows: Booleans with the batch shape, true for the streams to restart; by default all.

        Raises:
            ValueError: If `rows` are no booleans or have another shape.
        """
        rows = torch.ones(self.batch_shape, dtype=torch.bool) if rows is None else rows
        chosen = flags("Stream.reset", "rows", rows, self.batch_shape).cpu().reshape(-1).numpy()
        memory = _join(self._groups)
        memory = memory._replace(counters=memory.counters.copy())
        for array, start in zip(memory, _join(self.engine.start(int(chosen.sum()))._groups), strict=True):
            array[chosen] = start
        self._groups = _groups(memory)

    def run(self, u: Tensor) -> Tensor:
        """Maps a chunk of any length.

        Arguments:
            u: The input, with shape :math:`(*, L, d_{input})`, or classes with shape :math:`(*, L)`.

        Returns:
            The output, with shape :math:`(*, L, d_{output})`, in the dtype of `u` or, for classes, float32.

        Raises:
            TypeError: If `u` is of the wrong kind.
            ValueError: If its shape is wrong, or a class is not one of the model's.
        """
        engine, streams = self.engine, prod(self.batch_shape)
        if engine._batch(u) != self.batch_shape:
            raise ValueError(
                f"Stream.run: `u` must have the batch shape {tuple(self.batch_shape)}, got shape {tuple(u.shape)}."
            )
        length = u.shape[-1] if engine._classes is not None else u.shape[-2]
        inputs, classes = np.zeros((streams, length, 0), np.float32), np.zeros((streams, length), np.int64)
        if engine._classes is None:
            inputs = (
                u.detach().to("cpu", torch.float32).contiguous().numpy().reshape(streams, length, engine._source.width)
            )
        else:
            classes = u.to("cpu", torch.long).contiguous().numpy().reshape(streams, length)
        y = torch.empty(*self.batch_shape, length, engine.d_output)
        outputs = y.numpy().reshape(streams, length, engine.d_output)

        for rows, memory in self._groups:
            part = outputs[rows]
            self._run(memory, classes[rows], inputs[rows], part)
            if not isinstance(rows, slice):
                outputs[rows] = part
        return y.to(u.device, u.dtype if u.is_floating_point() else torch.float32)

    def _run(self, memory: Memory, classes: np.ndarray, inputs: np.ndarray, outputs: np.ndarray) -> None:
        engine = self.engine

        def work(part: slice, memory: Memory, rank: int, team: int, arrivals: np.ndarray) -> None:
            kernels.run(
                engine.table,
                engine.weights,
                engine.poles,
                memory.floats,
                memory.states,
                memory.counters,
                engine._source.start,
                engine._target.start,
                classes[part],
                inputs[part],
                outputs[part],
                rank,
                team,
                arrivals,
            )

        engine._run_on_threads(memory, work)

    def generate(
        self, logits: Tensor, uniform: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> Generated:
        """Draws samples and feeds each back, all in the compiled loop.

        Arguments:
            logits: The model's last output, with shape :math:`(*, classes)`.
            uniform: Numbers in [0, 1), one for every sample to draw, with shape :math:`(*, L)`, for example from
                `torch.rand` with a generator: the same numbers give the same samples, in one call or in several.
            temperature: Logits are divided by it; at 0 the likeliest class is taken.
            top_k: Draw from this many of the likeliest classes; 0 for all.
            top_p: Draw from the likeliest classes that together have this probability (nucleus sampling); 1 for all.

        Returns:
            Classes, their negative log-likelihood, and the logits of the next sample.

        Raises:
            TypeError: If `logits` or `uniform` are no floating tensors.
            ValueError: If the model does not begin with an Embedding of at least as many classes as its output has, a
                shape is wrong, or an option is out of its range.
        """
        engine = self.engine
        width, streams = engine.d_output, prod(self.batch_shape)
        if engine._classes is None or engine._classes < width:
            raise ValueError(
                "Stream.generate: the model must begin with an Embedding of at least as many classes as its output has."
            )
        for name, value in (("logits", logits), ("uniform", uniform)):
            _checks.floating("Stream.generate", name, _checks.with_values("Stream.generate", name, value))
        if logits.shape != (*self.batch_shape, width) or uniform.shape[:-1] != self.batch_shape or not uniform.ndim:
            raise ValueError(
                f"Stream.generate: `logits` must have shape {(*self.batch_shape, width)} and `uniform` "
                f"{(*self.batch_shape, 'L')}, got {tuple(logits.shape)} and {tuple(uniform.shape)}."
            )
        _checks.at_least("Stream.generate", "temperature", temperature, 0)
        _checks.integer("Stream.generate", "top_k", top_k, 0)
        if not 0 < _checks.number("Stream.generate", "top_p", top_p) <= 1:
            raise ValueError(f"Stream.generate: `top_p` must be above 0 and at most 1, got {top_p!r}.")
        length = uniform.shape[-1]
        chance = uniform.detach().to("cpu", torch.double).contiguous().numpy().reshape(streams, length)
        if chance.size and not 0 <= chance.min() <= chance.max() < 1:
            raise ValueError(
                f"Stream.generate: numbers in `uniform` must be at least 0 and less than 1, got {chance.min()} to "
                f"{chance.max()}."
            )
        last_logits = logits.detach().to("cpu", torch.float32, copy=True).numpy().reshape(streams, width)
        classes = torch.empty(*self.batch_shape, length, dtype=torch.long)
        nats = torch.empty(*self.batch_shape, length, dtype=torch.double)
        drawn, cost = classes.numpy().reshape(streams, length), nats.numpy().reshape(streams, length)

        for rows, memory in self._groups:
            parts = drawn[rows], cost[rows], last_logits[rows]
            self._generate(memory, chance[rows], *parts, float(temperature), top_k, float(top_p))
            if not isinstance(rows, slice):
                drawn[rows], cost[rows], last_logits[rows] = parts
        following = torch.from_numpy(last_logits).reshape(logits.shape).to(logits)
        return Generated(classes.to(logits.device), nats.to(logits.device), following)

    def _generate(
        self,
        memory: Memory,
        chance: np.ndarray,
        drawn: np.ndarray,
        cost: np.ndarray,
        last_logits: np.ndarray,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> None:
        engine = self.engine
        target, width = engine._target.start, engine.d_output
        logits = engine._target.of(memory.floats)
        logits[...] = last_logits

        def work(part: slice, memory: Memory, rank: int, team: int, arrivals: np.ndarray) -> None:
            kernels.generate(
                engine.table,
                engine.weights,
                engine.poles,
                memory.floats,
                memory.states,
                memory.counters,
                target,
                width,
                chance[part],
                temperature,
                top_k,
                top_p,
                drawn[part],
                cost[part],
                rank,
                team,
                arrivals,
            )

        engine._run_on_threads(memory, work)
        last_logits[...] = logits


def _groups(memory: Memory) -> list[tuple[slice | np.ndarray, Memory]]:
    """Splits streams into groups with equal counters: while a program runs, its streams share the counters."""
    kinds, kind = np.unique(memory.counters, axis=0, return_inverse=True)
    rows: list[slice | np.ndarray] = [slice(None)]
    if len(kinds) > 1:
        rows = [np.flatnonzero(kind.reshape(-1) == number) for number in range(len(kinds))]
    return [(r, Memory(memory.floats[r], memory.states[r], memory.counters[r].max(axis=0, initial=0))) for r in rows]


def _join(groups: list[tuple[slice | np.ndarray, Memory]]) -> Memory:
    """The memory of all streams, in their order."""
    rows, memory = groups[0]
    if isinstance(rows, slice):
        return memory._replace(counters=np.broadcast_to(memory.counters, (len(memory.floats), memory.counters.size)))
    streams = sum(len(part.floats) for _, part in groups)
    whole = Memory(*(np.empty((streams, array.shape[-1]), array.dtype) for array in memory))
    for rows, part in groups:
        for array, group_array in zip(whole, part, strict=True):
            array[rows] = group_array
    return whole
