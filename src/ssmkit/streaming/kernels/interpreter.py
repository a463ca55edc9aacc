"""The compiled functions that Python calls: loops that run a program sample by sample.

A program is a table of instructions over five arrays: `weights` (float32) and `poles` (float64), read only; `memory`
with the activations and frames of each stream in a row (float32); `states` with the states of its recurrences in a row
(float64); and `counters`, integers that all streams share. Several threads can run one program together, as a *team*:
each computes its :func:`~.teams.share` of every output, and waits for the others before an instruction that reads what
they have written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .compiling import compiled, entry
from .functions import activate, add, copy, gate, multiply, norm, scale, softmax
from .instructions import Op
from .products import gated, linear
from .recurrences import heads, recur, select, ssm, taps
from .sampling import draw, nats
from .teams import share, wait

__all__ = ["generate", "run"]

_F = np.float32


@compiled
def _advance(
    table: Any,
    weights: Any,
    poles: Any,
    memory: Any,
    states: Any,
    counters: Any,
    classes: Any,
    scratch: Any,
    rank: Any,
    team: Any,
    arrivals: Any,
) -> None:
    """Runs the program once: one sample of every stream."""
    at = 0
    while at < len(table):
        line = table[at]
        at += 1
        op, source, target, n = line["op"], line["source"], line["target"], line["width"]
        w = weights[line["weights"] :]
        if line["wait"]:
            wait(arrivals, rank, team)
        if op == Op.LINEAR:
            m = line["outputs"]
            lo, hi = share(m, rank, team)
            if line["gated"]:
                gated(w, memory, source, target, n, m, lo, hi)
            else:
                linear(w, memory, source, target, n, m, lo, hi)
            continue
        if op == Op.EMBED:
            m = line["outputs"]
            lo, hi = share(m, rank, team)
            for stream in range(len(memory)):
                row = classes[stream] * m
                copy(w[row + lo : row + hi], memory[stream, target + lo : target + hi])
            continue
        lo, hi = share(n, rank, team)
        if op == Op.SSM:
            state, modes, channels, low_rank = line["state"], line["modes"], line["channels"], line["rank"]
            a = poles[line["poles"] :]
            ssm(a, w, memory, states, source, target, n, state, modes, channels, low_rank, scratch, lo, hi)
            continue
        if op == Op.RECUR:
            recur(poles[line["poles"] :], memory, states, source, target, line["state"], lo, hi)
            continue
        if op == Op.TAPS:
            taps(w, memory, states, source, target, n, line["state"], line["modes"], lo, hi)
            continue
        if op == Op.SELECT:
            select(
                poles[line["poles"] :],
                w,
                memory,
                states,
                source,
                target,
                n,
                line["state"],
                line["modes"],
                line["groups"],
                line["other"],
                line["input_gains"],
                line["output_gains"],
                line["fixed_input_gains"],
                line["fixed_output_gains"],
                lo,
                hi,
            )
            continue
        if op == Op.HEADS:
            a, state, modes = poles[line["poles"] :], line["state"], line["modes"]
            heads(a, w, memory, states, source, target, n, state, modes, line["groups"], line["head"], lo, hi)
            continue
        if op == Op.FRAME:
            phase = counters[line["counter"]]
            emitting, filling = line["emitting"] + phase * n, line["filling"] + phase * n
            for stream in range(len(memory)):
                row = memory[stream]
                copy(row[emitting + lo : emitting + hi], row[target + lo : target + hi])
                copy(row[source + lo : source + hi], row[filling + lo : filling + hi])
            counters[line["counter"]] = (phase + 1) % line["pool"]
            if phase + 1 < line["pool"]:
                at = line["skip_to"]
            continue
        for stream in range(len(memory)):
            row = memory[stream]
            x, y = row[source : source + n], row[target : target + n]
            if op == Op.NORM:
                norm(w, x, y, line["centred"], line["groups"], lo, hi)
            elif op == Op.ACTIVATE:
                activate(line["function"], x[lo:hi], y[lo:hi], w[0], w[1], w[2])
            elif op == Op.GLU:
                copy(x[lo:hi], y[lo:hi])
                gate(y[lo:hi], row[source + n + lo : source + n + hi])
            elif op == Op.ADD:
                add(x[lo:hi], row[line["other"] + lo : line["other"] + hi], y[lo:hi])
            elif op == Op.SOFTMAX and rank == 0:
                softmax(x, y, _F(line["sign"]), line["logarithm"])
            elif op == Op.MULTIPLY:
                multiply(x[lo:hi], row[line["other"] + lo : line["other"] + hi], y[lo:hi])
            elif op == Op.COPY:
                copy(x[lo:hi], y[lo:hi])
            elif op == Op.SCALE:
                scale(w[lo:hi], x[lo:hi], y[lo:hi])


@compiled
def _scratch_size(table: Any) -> Any:
    """The most scratch memory that a recurrence of the program needs, in numbers."""
    most = 1
    for line in table:
        if line["op"] == Op.SSM:
            most = max(most, line["channels"] + line["rank"])
    return most


@entry
def run(sources: int) -> Callable[..., int]:
    def run(
        table: Any,
        weights: Any,
        poles: Any,
        memory: Any,
        states: Any,
        counters: Any,
        source: Any,
        target: Any,
        classes: Any,
        inputs: Any,
        outputs: Any,
        rank: Any,
        team: Any,
        arrivals: Any,
    ) -> int:
        """Maps inputs (streams, length, width) or classes (streams, length) to outputs (streams, length, width)."""
        scratch = np.empty(_scratch_size(table), np.float64)
        lo, hi = share(inputs.shape[2], rank, team)
        first, last = share(outputs.shape[2], rank, team)
        for k in range(outputs.shape[1]):
            wait(arrivals, rank, team)
            for stream in range(len(memory)):
                copy(inputs[stream, k, lo:hi], memory[stream, source + lo : source + hi])
            _advance(table, weights, poles, memory, states, counters, classes[:, k], scratch, rank, team, arrivals)
            wait(arrivals, rank, team)
            for stream in range(len(memory)):
                copy(memory[stream, target + first : target + last], outputs[stream, k, first:last])
        return sources

    return run


@entry
def generate(sources: int) -> Callable[..., int]:
    def generate(
        table: Any,
        weights: Any,
        poles: Any,
        memory: Any,
        states: Any,
        counters: Any,
        target: Any,
        width: Any,
        uniform: Any,
        temperature: Any,
        top_k: Any,
        top_p: Any,
        classes: Any,
        costs: Any,
        rank: Any,
        team: Any,
        arrivals: Any,
    ) -> int:
        """Draws classes (streams, length) from the logits in the memory and feeds each back.

        `uniform` has a number in [0, 1) for each; their negative log-likelihoods are written to `costs`.
        """
        scratch = np.empty(_scratch_size(table), np.float64)
        p = np.empty(width, np.float32)
        for k in range(classes.shape[1]):
            wait(arrivals, rank, team)
            if rank == 0:
                for stream in range(len(memory)):
                    logits = memory[stream, target : target + width]
                    chosen = draw(logits, p, uniform[stream, k], temperature, top_k, top_p)
                    classes[stream, k] = chosen
                    costs[stream, k] = nats(logits, chosen)
            wait(arrivals, rank, team)
            _advance(table, weights, poles, memory, states, counters, classes[:, k], scratch, rank, team, arrivals)
        wait(arrivals, rank, team)
        return sources

    return generate
