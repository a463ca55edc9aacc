r"""The compiled side: what every instruction of a program does, and the loops that run a program sample by sample.

All of it is in one file: numba's cache on disk looks at the file of a compiled function, not at those that it calls.

A program is a table of instructions over five arrays: `weights` (float32) and `poles` (float64), read only; `memory`, a
row per stream with its activations and frames (float32); `states`, a row per stream with the states of its recurrences
(float64); `counters`, integers that all streams share. Several threads can share one program and its streams as a
*team*: every instruction computes the part of its output that :func:`_share` gives to the thread, and one that reads
what others have written waits for them first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.polynomial import chebyshev

__all__ = ["FIELDS", "LANE", "Activation", "Op", "generate", "lines", "run"]

# NaN and infinity keep their meaning; sums may be taken in the order that the vector unit likes.
_OPTIONS: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz", "arcp"}, "error_model": "numpy", "nogil": True}
# Without reference counts, which for every slice in a loop cost more than the arithmetic behind it.
_compiled = numba.njit(_nrt=False, **_OPTIONS)
_allocating = numba.njit(**_OPTIONS)


def _entry(function: Callable[..., Any]) -> Any:
    """What Python calls: compiled once for a machine, if there is a place to keep it, and else once for a process."""
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:
        return _allocating(function)


LANE = 16
"""Floats in a cache line: where arrays begin, and where the parts of a team meet."""

_F = np.float32
_TINY = 1e-30


class Op(IntEnum):
    """The kinds of instructions; a comment says what `n`, `m` and `a` to `d` of :data:`FIELDS` are."""

    EMBED = 0  # row of a table, for the class that came in: m width
    LINEAR = 1  # n in, m out; a: 1 for rows 2 m, of which the second half gates the first
    NORM = 2  # n width; a: 1 subtracts the mean
    ACTIVATE = 3  # n width; a: an Activation
    GLU = 4  # n width out, of 2 n
    SOFTMAX = 5  # n width; a: -1 for the softmin, b: 1 for the logarithm
    ADD = 6  # n width; a: the other summand
    SSM = 7  # n features; a: state, b: complex states, c: outputs, d: rank of the low-rank part; poles
    FRAME = 8  # n width; a: frame being filled, b: frame being emitted, c: pool, d: where to go unless full; counter
    MULTIPLY = 9  # n width; a: the other factor
    COPY = 10  # n width


FIELDS = ("op", "wait", "source", "target", "weights", "n", "m", "a", "b", "c", "d", "counter", "poles")
"""Columns of a program."""

_OP, _WAIT, _SOURCE, _TARGET, _WEIGHTS, _N, _M, _A, _B, _C, _D, _COUNTER, _POLES = range(len(FIELDS))


class Activation(IntEnum):
    """The functions of one number; each has up to three parameters p, q, r in the weights."""

    ELU = 0  # p (max(x, 0) + q (e^{min(x, 0) / r} - 1))
    GELU = 1
    GELU_TANH = 2
    HARD_SHRINK = 3  # zero for |x| <= p
    CLIP = 4  # between p and q
    HARD_SIGMOID = 5
    HARD_SWISH = 6
    LEAKY_RELU = 7  # p x below zero
    SOFTPLUS = 8  # p log(1 + e^{x / p}), x above the threshold q; r: its sign and that of x
    MISH = 9
    SILU = 10
    SIGMOID = 11
    SOFT_SHRINK = 12  # towards zero by p
    SOFT_SIGN = 13
    TANH = 14
    TANH_SHRINK = 15
    THRESHOLD = 16  # q where x <= p


# --- functions of one number ------------------------------------------------------------------------------------------

_LOG2_E = _F(1 / math.log(2))
# ln 2 in two parts, of which the first has so few digits that its product with an exponent is exact.
_LN2_HIGH = _F(0.693359375)
_LN2_LOW = _F(math.log(2) - 0.693359375)
_E2, _E3, _E4, _E5, _E6, _E7 = (_F(1 / math.factorial(k)) for k in range(2, 8))


@_compiled
def _exp(x: Any) -> Any:
    """e^x to 1.5e-7, in operations that a vector unit has: 2^k times the Taylor sum of the rest, at most ln(2) / 2."""
    # In this order NaN stays NaN; a clamp of comparisons would keep LLVM from the vector unit.
    x = min(max(x, _F(-87)), _F(88))
    k = _F(math.floor(x * _LOG2_E + _F(0.5)))
    f = (x - k * _LN2_HIGH) - k * _LN2_LOW
    p = _F(1) + f * (_F(1) + f * (_E2 + f * (_E3 + f * (_E4 + f * (_E5 + f * (_E6 + f * _E7))))))
    return p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(_F)


_FARTHEST = 6.0


def _erfc_coefficients(degree: int) -> tuple[Any, ...]:
    """Of log(erfc(z) e^{z²} / t), t = 2 / (2 + z), as a polynomial in s: t for z from 6 to 0, laid over [-1, 1]."""
    low = 2 / (2 + _FARTHEST)

    def smooth(s: Any) -> Any:
        t = low + (1 - low) * (s + 1) / 2
        return np.array([math.log(math.erfc(2 / v - 2)) + (2 / v - 2) ** 2 - math.log(v) for v in t])

    return tuple(_F(v) for v in chebyshev.cheb2poly(chebyshev.chebinterpolate(smooth, degree)))


_P0, _P1, _P2, _P3, _P4, _P5, _P6, _P7, _P8, _P9, _P10 = _erfc_coefficients(10)
_LOW = _F(2 / (2 + _FARTHEST))
_SPREAD = _F(2 / (1 - 2 / (2 + _FARTHEST)))
_ROOT_HALF = _F(0.5**0.5)
_TANH_SCALE = _F(2 * (2 / math.pi) ** 0.5)


@_compiled
def _phi(x: Any) -> Any:
    """The normal distribution function, erfc(-x / √2) / 2."""
    z = min(abs(x) * _ROOT_HALF, _F(_FARTHEST))
    t = _F(2) / (_F(2) + z)
    s = (t - _LOW) * _SPREAD - _F(1)
    p = _P5 + s * (_P6 + s * (_P7 + s * (_P8 + s * (_P9 + s * _P10))))
    p = _P0 + s * (_P1 + s * (_P2 + s * (_P3 + s * (_P4 + s * p))))
    half = _F(0.5) * t * _exp(p - z * z)
    return half if x < 0 else _F(1) - half


@_compiled
def _sigmoid(x: Any) -> Any:
    return _F(1) / (_F(1) + _exp(-x))


@_compiled
def _softplus(x: Any) -> Any:
    return max(x, _F(0)) + _F(math.log1p(math.exp(-abs(x))))


def _over(function: Callable[..., Any]) -> Any:
    """The loop over a function of one number and three parameters."""
    each = _compiled(function)

    @_compiled
    def loop(x: Any, y: Any, p: Any, q: Any, r: Any) -> None:
        for i in range(y.size):
            y[i] = each(x[i], p, q, r)

    return loop


_elu = _over(lambda x, p, q, r: p * (max(x, _F(0)) + q * _F(math.expm1(min(x, _F(0)) / r))))
_gelu = _over(lambda x, p, q, r: x * _phi(x))
_gelu_tanh = _over(lambda x, p, q, r: x * _sigmoid(_TANH_SCALE * (x + _F(0.044715) * x * x * x)))
_hard_shrink = _over(lambda x, p, q, r: _F(0) if abs(x) <= p else x)
_clip = _over(lambda x, p, q, r: min(max(x, p), q))
_hard_sigmoid = _over(lambda x, p, q, r: min(max(x / _F(6) + _F(0.5), _F(0)), _F(1)))
_hard_swish = _over(lambda x, p, q, r: x * min(max(x / _F(6) + _F(0.5), _F(0)), _F(1)))
_leaky_relu = _over(lambda x, p, q, r: x if x > 0 else p * x)
_scaled_softplus = _over(lambda x, p, q, r: r * (r * x if r * x > q else p * _softplus(r * x / p)))
_mish = _over(lambda x, p, q, r: x * _F(math.tanh(_softplus(x))))
_silu = _over(lambda x, p, q, r: x * _sigmoid(x))
_sigmoids = _over(lambda x, p, q, r: _sigmoid(x))
_soft_shrink = _over(lambda x, p, q, r: max(x - p, _F(0)) + min(x + p, _F(0)))
_soft_sign = _over(lambda x, p, q, r: x / (_F(1) + abs(x)))
_tanh = _over(lambda x, p, q, r: _F(math.tanh(x)))
_tanh_shrink = _over(lambda x, p, q, r: x - _F(math.tanh(x)))
_threshold = _over(lambda x, p, q, r: q if x <= p else x)


@_compiled
def _activate(kind: Any, x: Any, y: Any, p: Any, q: Any, r: Any) -> None:
    if kind == Activation.GELU:
        _gelu(x, y, p, q, r)
    elif kind == Activation.GELU_TANH:
        _gelu_tanh(x, y, p, q, r)
    elif kind == Activation.SILU:
        _silu(x, y, p, q, r)
    elif kind == Activation.LEAKY_RELU:
        _leaky_relu(x, y, p, q, r)
    elif kind == Activation.ELU:
        _elu(x, y, p, q, r)
    elif kind == Activation.HARD_SHRINK:
        _hard_shrink(x, y, p, q, r)
    elif kind == Activation.CLIP:
        _clip(x, y, p, q, r)
    elif kind == Activation.HARD_SIGMOID:
        _hard_sigmoid(x, y, p, q, r)
    elif kind == Activation.HARD_SWISH:
        _hard_swish(x, y, p, q, r)
    elif kind == Activation.SOFTPLUS:
        _scaled_softplus(x, y, p, q, r)
    elif kind == Activation.MISH:
        _mish(x, y, p, q, r)
    elif kind == Activation.SIGMOID:
        _sigmoids(x, y, p, q, r)
    elif kind == Activation.SOFT_SHRINK:
        _soft_shrink(x, y, p, q, r)
    elif kind == Activation.SOFT_SIGN:
        _soft_sign(x, y, p, q, r)
    elif kind == Activation.TANH:
        _tanh(x, y, p, q, r)
    elif kind == Activation.TANH_SHRINK:
        _tanh_shrink(x, y, p, q, r)
    elif kind == Activation.THRESHOLD:
        _threshold(x, y, p, q, r)


# --- products and norms -----------------------------------------------------------------------------------------------
# Slices, not indices with an offset: numba lets an index be negative, which keeps LLVM from using the vector unit.


def lines(size: Any) -> Any:
    """So many floats, and as many more as fill a cache line."""
    return (size + LANE - 1) // LANE * LANE


_lines = _compiled(lines)


@_compiled
def _share(n: Any, rank: Any, team: Any) -> Any:
    """The part of n numbers that a thread of a team computes: whole cache lines."""
    if team == 1:
        return 0, n
    count = _lines(n) // LANE
    return min(n, count * rank // team * LANE), min(n, count * (rank + 1) // team * LANE)


@_compiled
def _copy(x: Any, y: Any) -> None:
    for i in range(y.size):
        y[i] = x[i]


@_compiled
def _add(x: Any, other: Any, y: Any) -> None:
    for i in range(y.size):
        y[i] = x[i] + other[i]


@_compiled
def _multiply(x: Any, other: Any, y: Any) -> None:
    for i in range(y.size):
        y[i] = x[i] * other[i]


@_compiled
def _gate(y: Any, gate: Any) -> None:
    for i in range(y.size):
        y[i] *= _sigmoid(gate[i])


@_compiled
def _dot(w: Any, x: Any) -> Any:
    total = _F(0)
    for i in range(x.size):
        total += w[i] * x[i]
    return total


@_compiled
def _four(w0: Any, w1: Any, w2: Any, w3: Any, x: Any) -> Any:
    """Four dot products at a time: a processor reads four rows as fast as one."""
    y0, y1, y2, y3 = _F(0), _F(0), _F(0), _F(0)
    for i in range(x.size):
        y0 += w0[i] * x[i]
        y1 += w1[i] * x[i]
        y2 += w2[i] * x[i]
        y3 += w3[i] * x[i]
    return y0, y1, y2, y3


@_compiled
def _linear(w: Any, memory: Any, source: Any, target: Any, n: Any, m: Any, lo: Any, hi: Any) -> None:
    """Bias (m, to a whole line), then rows (m, n), each read once for all streams."""
    start = _lines(m)
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


@_compiled
def _gated(w: Any, memory: Any, source: Any, target: Any, n: Any, m: Any, lo: Any, hi: Any) -> None:
    """Bias (2 m, to a whole line), then rows (2 m, n): the first m times the sigmoids of the others."""
    start = _lines(2 * m)
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
        _gate(y[lo:hi], y[m + lo : m + hi])


@_compiled
def _norm(w: Any, x: Any, y: Any, centre: Any, lo: Any, hi: Any) -> None:
    """Epsilon in a line of its own, then gains (n, to a whole line) and biases (n)."""
    n = x.size
    start = LANE + _lines(n)
    gain, bias = w[LANE : LANE + n], w[start : start + n]
    mean = _F(0)
    if centre:
        for i in range(n):
            mean += x[i]
        mean /= _F(n)
    square = _F(0)
    for i in range(n):
        square += (x[i] - mean) * (x[i] - mean)
    scale = _F(1) / math.sqrt(square / _F(n) + w[0])
    for i in range(lo, hi):
        y[i] = (x[i] - mean) * scale * gain[i] + bias[i]


@_compiled
def _softmax(x: Any, y: Any, sign: Any, logarithm: Any) -> None:
    top = sign * x[0]
    for i in range(x.size):
        top = max(top, sign * x[i])
    total = _F(0)
    for i in range(x.size):
        total += _F(math.exp(sign * x[i] - top))
    for i in range(x.size):
        shifted = sign * x[i] - top
        y[i] = shifted - _F(math.log(total)) if logarithm else _F(math.exp(shifted)) / total


# --- the recurrence ---------------------------------------------------------------------------------------------------


@_compiled
def _alive(x: Any) -> Any:
    """Zero for a state that has died out, before denormal numbers slow the processor down."""
    return x if abs(x) > _TINY else 0.0


@_compiled
def _turn(poles: Any, w: Any, x: Any, n: Any, u: Any) -> None:
    """x <- a x + b u, with the column b at the beginning of w."""
    a_re, a_im, b_re, b_im = poles[:n], poles[n : 2 * n], w[:n], w[n : 2 * n]
    re, im = x[:n], x[n : 2 * n]
    for i in range(n):
        x_re, x_im = re[i], im[i]
        re[i] = _alive(a_re[i] * x_re - a_im[i] * x_im + b_re[i] * u)
        im[i] = _alive(a_im[i] * x_re + a_re[i] * x_im + b_im[i] * u)


@_compiled
def _diagonal(poles: Any, w: Any, x: Any, n: Any, u: Any) -> Any:
    """The step of a feature with one output and nothing but poles: returns c A x."""
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


@_compiled
def _rank_one(poles: Any, w: Any, x: Any, n: Any, u: Any) -> Any:
    """The step of a feature with one output and a low-rank part of rank 1: returns c A x."""
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


@_compiled
def _product(w: Any, x: Any) -> Any:
    total = 0.0
    for i in range(x.size):
        total += w[i] * x[i]
    return total


@_compiled
def _add_times(x: Any, w: Any, factor: Any) -> None:
    for i in range(x.size):
        x[i] += w[i] * factor


@_compiled
def _ssm(
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
    """One step of s <- a s - Σ p (q · x) + b u, y = c A x + (c b + D) u, for features lo to hi.

    States and poles are float64, and so are all sums: a slow mode hardly changes from sample to sample, and neither do
    its rounding errors, which in float32 add up. The weights are the feedthrough (C, H), then for every feature, real
    parts before imaginary ones, the column b and r columns -p, C rows c A and r rows q.
    """
    size = 2 * n
    stride = size * (1 + C + 2 * r)
    start = _lines(C * H)
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
            _turn(pole, part, x, n, u)
            for j in range(r):
                _add_times(x, columns[j * size : (j + 1) * size], seen[C + j])


# --- teams ------------------------------------------------------------------------------------------------------------
# Coverage is measured without the compiler, and then these have nothing to build.


@intrinsic  # pragma: no cover
def _publish(context: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value, after all that this thread has written before it."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments)
        builder.store_atomic(arguments[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, types.int64), build


@intrinsic  # pragma: no cover
def _observe(context: Any, array: Any, index: Any) -> Any:
    """array[index], before all that this thread reads after it."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(context, builder, signature, arguments), "acquire", 8)

    return types.int64(array, types.intp), build


def _pointer(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:  # pragma: no cover
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return cgutils.get_item_pointer(context, builder, signature.args[0], array, [arguments[1]], wraparound=False)


if hasattr(os, "sched_yield"):
    _give_way = types.ExternalFunction("sched_yield", types.int32())
else:

    @_compiled
    def _give_way() -> int:
        return 0


@_compiled
def _wait(arrivals: Any, rank: Any, team: Any) -> None:
    """Returns when all threads of the team are here. Gives way if that takes long: another's core may be busy."""
    if team == 1:
        return
    mine = _observe(arrivals, rank * LANE) + 1
    _publish(arrivals, rank * LANE, mine)
    for other in range(team):
        spins = 0
        while _observe(arrivals, other * LANE) < mine:
            spins += 1
            if spins > 4096:
                _give_way()


# --- programs ---------------------------------------------------------------------------------------------------------


@_compiled
def _advance(
    program: Any,
    weights: Any,
    poles: Any,
    memory: Any,
    states: Any,
    counters: Any,
    classes: Any,
    seen: Any,
    rank: Any,
    team: Any,
    arrivals: Any,
) -> None:
    """Runs the program once: one sample of every stream."""
    at = 0
    while at < len(program):
        line = program[at]
        at += 1
        op, source, target, n = line[_OP], line[_SOURCE], line[_TARGET], line[_N]
        w = weights[line[_WEIGHTS] :]
        if line[_WAIT]:
            _wait(arrivals, rank, team)
        if op == Op.LINEAR:
            lo, hi = _share(line[_M], rank, team)
            if line[_A]:
                _gated(w, memory, source, target, n, line[_M], lo, hi)
            else:
                _linear(w, memory, source, target, n, line[_M], lo, hi)
            continue
        if op == Op.EMBED:
            lo, hi = _share(line[_M], rank, team)
            for stream in range(len(memory)):
                row = classes[stream] * line[_M]
                _copy(w[row + lo : row + hi], memory[stream, target + lo : target + hi])
            continue
        lo, hi = _share(n, rank, team)
        if op == Op.SSM:
            state, N, C, r = line[_A], line[_B], line[_C], line[_D]
            _ssm(poles[line[_POLES] :], w, memory, states, source, target, n, state, N, C, r, seen, lo, hi)
            continue
        if op == Op.FRAME:
            phase = counters[line[_COUNTER]]
            for stream in range(len(memory)):
                row = memory[stream]
                emitting, filling = line[_B] + phase * n, line[_A] + phase * n
                _copy(row[emitting + lo : emitting + hi], row[target + lo : target + hi])
                _copy(row[source + lo : source + hi], row[filling + lo : filling + hi])
            counters[line[_COUNTER]] = (phase + 1) % line[_C]
            if phase + 1 < line[_C]:
                at = line[_D]
            continue
        for stream in range(len(memory)):
            row = memory[stream]
            x, y = row[source : source + n], row[target : target + n]
            if op == Op.NORM:
                _norm(w, x, y, line[_A], lo, hi)
            elif op == Op.ACTIVATE:
                _activate(line[_A], x[lo:hi], y[lo:hi], w[0], w[1], w[2])
            elif op == Op.GLU:
                _copy(x[lo:hi], y[lo:hi])
                _gate(y[lo:hi], row[source + n + lo : source + n + hi])
            elif op == Op.ADD:
                _add(x[lo:hi], row[line[_A] + lo : line[_A] + hi], y[lo:hi])
            elif op == Op.SOFTMAX and rank == 0:
                _softmax(x, y, _F(line[_A]), line[_B])
            elif op == Op.MULTIPLY:
                _multiply(x[lo:hi], row[line[_A] + lo : line[_A] + hi], y[lo:hi])
            elif op == Op.COPY:
                _copy(x[lo:hi], y[lo:hi])


@_entry
def run(
    program: Any,
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
) -> None:
    """Inputs (streams, length, width) or classes (streams, length) to outputs (streams, length, width)."""
    seen = np.empty(_scratch(program), np.float64)
    lo, hi = _share(inputs.shape[2], rank, team)
    first, last = _share(outputs.shape[2], rank, team)
    for k in range(outputs.shape[1]):
        _wait(arrivals, rank, team)
        for stream in range(len(memory)):
            _copy(inputs[stream, k, lo:hi], memory[stream, source + lo : source + hi])
        _advance(program, weights, poles, memory, states, counters, classes[:, k], seen, rank, team, arrivals)
        _wait(arrivals, rank, team)
        for stream in range(len(memory)):
            _copy(memory[stream, target + first : target + last], outputs[stream, k, first:last])


@_compiled
def _scratch(program: Any) -> Any:
    most = 1
    for line in program:
        if line[_OP] == Op.SSM:
            most = max(most, line[_C] + line[_D])
    return most


# --- sampling ---------------------------------------------------------------------------------------------------------


@_allocating
def _draw(logits: Any, p: Any, uniform: Any, temperature: Any, top_k: Any, top_p: Any) -> Any:
    """A class, by inverting the distribution at a number in [0, 1); the likeliest one at temperature 0."""
    n = logits.size
    best = 0
    for i in range(n):
        if logits[i] > logits[best]:
            best = i
    if temperature == 0:
        return best
    scale = _F(1 / temperature)
    for i in range(n):
        p[i] = _exp((logits[i] - logits[best]) * scale)
    if 0 < top_k < n:
        least = np.partition(p, n - top_k)[n - top_k]
        for i in range(n):
            if p[i] < least:
                p[i] = _F(0)
    if top_p < 1:
        limit, before = top_p * p.astype(np.float64).sum(), 0.0
        for i in np.argsort(-p, kind="mergesort"):
            chosen = before < limit
            before += p[i]
            if not chosen:
                p[i] = _F(0)
    total = 0.0
    for i in range(n):
        total += p[i]
    threshold, total, last = uniform * total, 0.0, best
    for i in range(n):
        total += p[i]
        if total > threshold:
            return i
        if p[i] > 0:
            last = i
    return last


@_compiled
def _nats(logits: Any, chosen: Any) -> Any:
    """Negative log-likelihood of a class."""
    top = logits[0]
    for i in range(logits.size):
        top = max(top, logits[i])
    total = _F(0)
    for i in range(logits.size):
        total += _exp(logits[i] - top)
    return math.log(total) + (top - logits[chosen])


@_entry
def generate(
    program: Any,
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
    nats: Any,
    rank: Any,
    team: Any,
    arrivals: Any,
) -> None:
    """Draws classes (streams, length) from the logits in the memory and feeds each back; `uniform` is as large."""
    seen = np.empty(_scratch(program), np.float64)
    p = np.empty(width, np.float32)
    for k in range(classes.shape[1]):
        _wait(arrivals, rank, team)
        if rank == 0:
            for stream in range(len(memory)):
                logits = memory[stream, target : target + width]
                chosen = _draw(logits, p, uniform[stream, k], temperature, top_k, top_p)
                classes[stream, k] = chosen
                nats[stream, k] = _nats(logits, chosen)
        _wait(arrivals, rank, team)
        _advance(program, weights, poles, memory, states, counters, classes[:, k], seen, rank, team, arrivals)
    _wait(arrivals, rank, team)
