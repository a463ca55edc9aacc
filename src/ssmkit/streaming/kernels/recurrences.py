"""The steps of recurrences.

States and poles are float64, and so are all sums: a slow mode hardly changes from sample to sample, and neither do its
rounding errors, which add up in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiling import compiled
from .layout import compiled_lines

__all__ = ["ssm"]

_TINY = 1e-30


@compiled
def _alive(x: Any) -> Any:
    """Replaces a state that has died out by zero, since denormal numbers slow the processor down."""
    return x if abs(x) > _TINY else 0.0


@compiled
def _step_modes(poles: Any, w: Any, x: Any, n: Any, u: Any) -> None:
    """x <- a x + b u, for the n complex states of a feature; the column b begins w."""
    a_re, a_im, b_re, b_im = poles[:n], poles[n : 2 * n], w[:n], w[n : 2 * n]
    re, im = x[:n], x[n : 2 * n]
    for i in range(n):
        x_re, x_im = re[i], im[i]
        re[i] = _alive(a_re[i] * x_re - a_im[i] * x_im + b_re[i] * u)
        im[i] = _alive(a_im[i] * x_re + a_re[i] * x_im + b_im[i] * u)


@compiled
def _diagonal(poles: Any, w: Any, x: Any, n: Any, u: Any) -> Any:
    """The step of a feature with one output and no low-rank part; returns c A x."""
    a_re, a_im, b_re, b_im = poles[:n], poles[n : 2 * n], w[:n], w[n : 2 * n]
    c_re, c_im = w[2 * n : 3 * n], w[3 * n : 4 * n]
    re, im = x[:n], x[n : 2 * n]
    y = 0.0
    for i in range(n):
        x_re, x_im = re[i], im[i]
        y += c_re[i] * x_re + c_im[i] * x_im
        re[i] = _alive(a_re[i] * x_re - a_im[i] * x_im + b_re[i] * u)
        im[i] = _alive(a_im[i] * x_re + a_re[i] * x_im + b_im[i] * u)
    return y


@compiled
def _rank_one(poles: Any, w: Any, x: Any, n: Any, u: Any) -> Any:
    """The step of a feature with one output and a low-rank part of rank 1; returns c A x."""
    a_re, a_im, b_re, b_im = poles[:n], poles[n : 2 * n], w[:n], w[n : 2 * n]
    p_re, p_im, c_re, c_im = w[2 * n : 3 * n], w[3 * n : 4 * n], w[4 * n : 5 * n], w[5 * n : 6 * n]
    q_re, q_im = w[6 * n : 7 * n], w[7 * n : 8 * n]
    re, im = x[:n], x[n : 2 * n]
    y, q = 0.0, 0.0
    for i in range(n):
        y += c_re[i] * re[i] + c_im[i] * im[i]
        q += q_re[i] * re[i] + q_im[i] * im[i]
    for i in range(n):
        x_re, x_im = re[i], im[i]
        re[i] = _alive((a_re[i] * x_re - a_im[i] * x_im) + (b_re[i] * u + p_re[i] * q))
        im[i] = _alive((a_im[i] * x_re + a_re[i] * x_im) + (b_im[i] * u + p_im[i] * q))
    return y


@compiled
def _product(w: Any, x: Any) -> Any:
    total = 0.0
    for i in range(x.size):
        total += w[i] * x[i]
    return total


@compiled
def _add_times(x: Any, w: Any, factor: Any) -> None:
    for i in range(x.size):
        x[i] += w[i] * factor


@compiled
def ssm(
    poles: Any,
    w: Any,
    memory: Any,
    states: Any,
    source: Any,
    target: Any,
    H: Any,
    state: Any,
    n: Any,
    C: Any,
    r: Any,
    seen: Any,
    lo: Any,
    hi: Any,
) -> None:
    """One step of x <- a x - Σ p (q · x) + b u, y = c A x + (c b + D) u, for features lo to hi of H.

    Each feature has n complex states, C outputs and a low-rank part of rank r. The weights are the feedthrough c b + D
    (C, H, filled up to a whole cache line), then for every feature the column b, r columns -p, C rows c A and r rows q,
    each with its real parts before its imaginary parts. `seen` is scratch memory for C + r numbers.
    """
    size = 2 * n
    stride = size * (1 + C + 2 * r)
    start = compiled_lines(C * H)
    for h in range(lo, hi):
        pole, part = poles[h * size : (h + 1) * size], w[start + h * stride : start + (h + 1) * stride]
        columns, rows = part[size : (1 + r) * size], part[(1 + r) * size : stride]
        for stream in range(len(memory)):
            x = states[stream, state + h * size : state + (h + 1) * size]
            u = np.float64(memory[stream, source + h])
            if C == 1 and r <= 1:
                y = _rank_one(pole, part, x, n, u) if r else _diagonal(pole, part, x, n, u)
                memory[stream, target + h] = y + w[h] * u
                continue
            for j in range(C + r):
                seen[j] = _product(rows[j * size : (j + 1) * size], x)
            for j in range(C):
                memory[stream, target + j * H + h] = seen[j] + w[j * H + h] * u
            _step_modes(pole, part, x, n, u)
            for j in range(r):
                _add_times(x, columns[j * size : (j + 1) * size], seen[C + j])
