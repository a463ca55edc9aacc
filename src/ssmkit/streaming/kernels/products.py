"""Linear maps, with and without a gate."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiling import compiled
from .functions import gate
from .layout import compiled_lines

__all__ = ["gated", "linear"]

_F = np.float32


@compiled
def _dot(w: Any, x: Any) -> Any:
    total = _F(0)
    for i in range(x.size):
        total += w[i] * x[i]
    return total


@compiled
def _four(w0: Any, w1: Any, w2: Any, w3: Any, x: Any) -> Any:
    """Four dot products at once: reading four rows takes no longer than reading one."""
    y0, y1, y2, y3 = _F(0), _F(0), _F(0), _F(0)
    for i in range(x.size):
        y0 += w0[i] * x[i]
        y1 += w1[i] * x[i]
        y2 += w2[i] * x[i]
        y3 += w3[i] * x[i]
    return y0, y1, y2, y3


@compiled
def linear(w: Any, memory: Any, source: Any, target: Any, n: Any, m: Any, lo: Any, hi: Any) -> None:
    """The outputs lo to hi of a linear map from n to m numbers; each row is read once for all streams.

    The weights are the biases (m, padded to a whole cache line) and the rows (m, n).
    """
    start = compiled_lines(m)
    bias, rows = w[:m], w[start : start + m * n]
    whole = lo + (hi - lo) // 4 * 4
    for j in range(lo, whole, 4):
        four = rows[j * n : (j + 4) * n]
        for stream in range(len(memory)):
            x, y = memory[stream, source : source + n], memory[stream, target + j : target + j + 4]
            y0, y1, y2, y3 = _four(four[:n], four[n : 2 * n], four[2 * n : 3 * n], four[3 * n :], x)
            y[0], y[1], y[2], y[3] = y0 + bias[j], y1 + bias[j + 1], y2 + bias[j + 2], y3 + bias[j + 3]
    for j in range(whole, hi):
        for stream in range(len(memory)):
            x = memory[stream, source : source + n]
            memory[stream, target + j] = _dot(rows[j * n : (j + 1) * n], x) + bias[j]


@compiled
def gated(w: Any, memory: Any, source: Any, target: Any, n: Any, m: Any, lo: Any, hi: Any) -> None:
    """The outputs lo to hi of a linear map from n to 2 m numbers, of which the second half gates the first.

    The weights are the biases (2 m, padded to a whole cache line) and the rows (2 m, n).
    """
    start = compiled_lines(2 * m)
    bias, gates = w[:m], w[m : 2 * m]
    rows, gate_rows = w[start : start + m * n], w[start + m * n : start + 2 * m * n]
    whole = lo + (hi - lo) // 2 * 2
    for j in range(lo, whole, 2):
        two, gate_two = rows[j * n : (j + 2) * n], gate_rows[j * n : (j + 2) * n]
        for stream in range(len(memory)):
            x = memory[stream, source : source + n]
            y, g = memory[stream, target + j : target + j + 2], memory[stream, target + m + j : target + m + j + 2]
            y0, y1, g0, g1 = _four(two[:n], two[n:], gate_two[:n], gate_two[n:], x)
            y[0], y[1], g[0], g[1] = y0 + bias[j], y1 + bias[j + 1], g0 + gates[j], g1 + gates[j + 1]
    for j in range(whole, hi):
        for stream in range(len(memory)):
            x = memory[stream, source : source + n]
            memory[stream, target + j] = _dot(rows[j * n : (j + 1) * n], x) + bias[j]
            memory[stream, target + m + j] = _dot(gate_rows[j * n : (j + 1) * n], x) + gates[j]
    for stream in range(len(memory)):
        y = memory[stream, target : target + 2 * m]
        gate(y[lo:hi], y[m + lo : m + hi])
