"""The steps of recurrences.

States and poles are float64, and so are all sums. With a pole near 1 the state hardly changes from sample to sample;
in float32 its rounding errors would keep their sign and add up.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .compiling import compiled
from .functions import copy, exp_float64
from .layout import compiled_lines

__all__ = ["heads", "recur", "select", "ssm", "taps"]

_TINY = 1e-30


@compiled
def _flush(x: Any) -> Any:
    """Replaces a tiny state by zero, since denormal numbers slow the processor down."""
    return x if abs(x) > _TINY else 0.0


@compiled
def _step_modes(poles: Any, w: Any, x: Any, n: Any, u: Any) -> None:
    """x <- a x + b u, for the n complex states of a feature; w begins with the column b."""
    a_re, a_im, b_re, b_im = poles[:n], poles[n : 2 * n], w[:n], w[n : 2 * n]
    re, im = x[:n], x[n : 2 * n]
    for i in range(n):
        x_re, x_im = re[i], im[i]
        re[i] = _flush(a_re[i] * x_re - a_im[i] * x_im + b_re[i] * u)
        im[i] = _flush(a_im[i] * x_re + a_re[i] * x_im + b_im[i] * u)


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
        re[i] = _flush(a_re[i] * x_re - a_im[i] * x_im + b_re[i] * u)
        im[i] = _flush(a_im[i] * x_re + a_re[i] * x_im + b_im[i] * u)
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
        re[i] = _flush((a_re[i] * x_re - a_im[i] * x_im) + (b_re[i] * u + p_re[i] * q))
        im[i] = _flush((a_im[i] * x_re + a_re[i] * x_im) + (b_im[i] * u + p_im[i] * q))
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
    scratch: Any,
    lo: Any,
    hi: Any,
) -> None:
    """One step of x <- a x - Σ p (q · x) + b u, y = c A x + (c b + D) u, for features lo to hi of H.

    Each feature has n complex states, C outputs and a low-rank part of rank r. The weights are the feedthrough c b + D
    (C, H, padded to a whole cache line), then for every feature the column b, r columns -p, C rows c A and r rows q,
    each with its real parts before its imaginary parts. `scratch` is memory for C + r numbers.
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
                scratch[j] = _product(rows[j * size : (j + 1) * size], x)
            for j in range(C):
                memory[stream, target + j * H + h] = scratch[j] + w[j * H + h] * u
            _step_modes(pole, part, x, n, u)
            for j in range(r):
                _add_times(x, columns[j * size : (j + 1) * size], scratch[C + j])


@compiled
def _rotate(a: Any, v: Any, x: Any, y: Any) -> None:
    """x <- a x + v and y <- x, for interleaved complex numbers."""
    for i in range(x.size // 2):
        re, im = x[2 * i], x[2 * i + 1]
        x[2 * i] = _flush(a[2 * i] * re - a[2 * i + 1] * im + v[2 * i])
        x[2 * i + 1] = _flush(a[2 * i + 1] * re + a[2 * i] * im + v[2 * i + 1])
        y[2 * i], y[2 * i + 1] = x[2 * i], x[2 * i + 1]


@compiled
def recur(poles: Any, memory: Any, states: Any, source: Any, target: Any, state: Any, lo: Any, hi: Any) -> None:
    """The numbers lo to hi of x <- a x + v and y <- x; poles, v, x and y are interleaved."""
    for stream in range(len(memory)):
        x, y = states[stream, state + lo : state + hi], memory[stream, target + lo : target + hi]
        _rotate(poles[lo:hi], memory[stream, source + lo : source + hi], x, y)


@compiled
def _add_product(w: Any, x: Any, y: Any) -> None:
    for i in range(y.size):
        y[i] += w[i] * x[i]


@compiled
def taps(
    w: Any, memory: Any, states: Any, source: Any, target: Any, H: Any, state: Any, K: Any, lo: Any, hi: Any
) -> None:
    """Features lo to hi of y <- bias + Σ w_j x_j + w_K u; then the K last inputs x are shifted by one sample.

    The weights are the biases (H, padded to a whole cache line) and a row for each of the K + 1 taps, likewise.
    """
    stride = compiled_lines(H)
    for stream in range(len(memory)):
        u, y = memory[stream, source + lo : source + hi], memory[stream, target + lo : target + hi]
        past = states[stream, state : state + K * H]
        copy(w[lo:hi], y)
        for j in range(K):
            _add_product(w[(1 + j) * stride + lo : (1 + j) * stride + hi], past[j * H + lo : j * H + hi], y)
        _add_product(w[(1 + K) * stride + lo : (1 + K) * stride + hi], u, y)
        for j in range(K - 1):
            copy(past[(j + 1) * H + lo : (j + 1) * H + hi], past[j * H + lo : j * H + hi])
        if K:
            copy(u, past[(K - 1) * H + lo : (K - 1) * H + hi])


@compiled
def _select_modes(a: Any, x: Any, b: Any, c: Any, dt: Any, u: Any) -> Any:
    """x <- e^(dt a) x + dt u b, for the states of a feature; returns c x."""
    gain, y = dt * u, 0.0
    for i in range(x.size):
        x[i] = _flush(exp_float64(dt * a[i]) * x[i] + gain * b[i])
        y += c[i] * x[i]
    return y


@compiled
def select(
    poles: Any,
    w: Any,
    memory: Any,
    states: Any,
    source: Any,
    target: Any,
    E: Any,
    state: Any,
    N: Any,
    G: Any,
    steps: Any,
    input_gains: Any,
    output_gains: Any,
    fixed_input_gains: Any,
    fixed_output_gains: Any,
    lo: Any,
    hi: Any,
) -> None:
    """Features lo to hi of E of the step of a selective system with N states per feature.

    The weights are the feedthrough (E, padded to a whole cache line), then the constant gains (E, N), likewise. Other
    gains (G, N) lie in the memory, where feature e uses row e // (E / G).
    """
    fixed_in = compiled_lines(E)
    fixed_out = fixed_in + (compiled_lines(E * N) if fixed_input_gains else 0)
    for e in range(lo, hi):
        a, own, shared = poles[e * N : (e + 1) * N], e * N, e // (E // G) * N
        for stream in range(len(memory)):
            row, x = memory[stream], states[stream, state + own : state + own + N]
            dt, u = np.float64(row[steps + e]), np.float64(row[source + e])
            if fixed_input_gains:
                b = w[fixed_in + own : fixed_in + own + N]
            else:
                b = row[input_gains + shared : input_gains + shared + N]
            if fixed_output_gains:
                c = w[fixed_out + own : fixed_out + own + N]
            else:
                c = row[output_gains + shared : output_gains + shared + N]
            row[target + e] = _select_modes(a, x, b, c, dt, u) + w[e] * u


@compiled
def _decay(x: Any, b: Any, c: Any, decay: Any, gain: Any) -> Any:
    """x <- decay x + gain b; returns c x."""
    y = 0.0
    for i in range(x.size):
        x[i] = _flush(decay * x[i] + gain * b[i])
        y += c[i] * x[i]
    return y


@compiled
def heads(
    poles: Any,
    w: Any,
    memory: Any,
    states: Any,
    source: Any,
    target: Any,
    n: Any,
    state: Any,
    N: Any,
    G: Any,
    P: Any,
    lo: Any,
    hi: Any,
) -> None:
    """Features lo to hi of n of the step of heads of P features, with N states per feature and G groups of heads.

    The input is x (n), B and C (G, N) and a number for the step size of each head. The weights are the biases of the
    step sizes (one per head, padded to a whole cache line) and the feedthrough (n); the poles begin with the least and
    the greatest step size and the rate.
    """
    H = n // P
    direct, low, high, rate = w[compiled_lines(H) :], poles[0], poles[1], poles[2]
    gains = source + n
    raw = gains + 2 * G * N
    for stream in range(len(memory)):
        row = memory[stream]
        for h in range(lo // P, (hi + P - 1) // P):
            r = np.float64(row[raw + h]) + w[h]
            dt = rate * min(max(max(r, 0.0) + math.log1p(math.exp(-abs(r))), low), high)
            decay = math.exp(dt * poles[3 + h])
            first = gains + h // (H // G) * N
            b, c = row[first : first + N], row[first + G * N : first + G * N + N]
            for i in range(max(lo, h * P), min(hi, (h + 1) * P)):
                x, u = states[stream, state + i * N : state + (i + 1) * N], np.float64(row[source + i])
                row[target + i] = _decay(x, b, c, decay, dt * u) + direct[i] * u
