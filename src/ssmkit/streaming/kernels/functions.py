"""Functions of single numbers and of vectors.

Loops run over slices, not over indices with an offset: an index of numba may be negative, and then LLVM does not
vectorise the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.polynomial import chebyshev

from .compiling import compiled
from .instructions import Activation
from .layout import LANE, compiled_lines

__all__ = ["activate", "add", "copy", "exp", "exp_float64", "gate", "multiply", "norm", "scale", "softmax"]

_F = np.float32


# --- functions of one number ------------------------------------------------------------------------------------------

_LOG2_E = _F(1 / math.log(2))
# ln 2 in two parts: the first has so few digits that its product with an exponent is exact.
_LN2_HIGH = _F(0.693359375)
_LN2_LOW = _F(math.log(2) - 0.693359375)
_E2, _E3, _E4, _E5, _E6, _E7 = (_F(1 / math.factorial(k)) for k in range(2, 8))


@compiled
def exp(x: Any) -> Any:
    """e^x to 1.5e-7, in operations that a vector unit has: 2^k e^f with |f| <= ln(2) / 2 and a Taylor sum for e^f."""
    # With min and max in this order NaN stays NaN; LLVM would not vectorise comparisons and branches.
    x = min(max(x, _F(-87)), _F(88))
    k = _F(math.floor(x * _LOG2_E + _F(0.5)))
    f = (x - k * _LN2_HIGH) - k * _LN2_LOW
    p = _F(1) + f * (_F(1) + f * (_E2 + f * (_E3 + f * (_E4 + f * (_E5 + f * (_E6 + f * _E7))))))
    return p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(_F)


_LOG2_E_64 = 1 / math.log(2)
_LN2_HIGH_64 = 0.693147180369123816490
_LN2_LOW_64 = 1.90821492927058770002e-10
(_X2, _X3, _X4, _X5, _X6, _X7, _X8, _X9, _X10, _X11, _X12) = (1 / math.factorial(k) for k in range(2, 13))


@compiled
def exp_float64(x: Any) -> Any:
    """e^x for float64 numbers up to 700, with an error of |x| roundings; a number below -700 counts as -700."""
    x = min(max(x, -700.0), 700.0)
    k = math.floor(x * _LOG2_E_64 + 0.5)
    f = (x - k * _LN2_HIGH_64) - k * _LN2_LOW_64
    p = _X5 + f * (_X6 + f * (_X7 + f * (_X8 + f * (_X9 + f * (_X10 + f * (_X11 + f * _X12))))))
    p = 1.0 + f * (1.0 + f * (_X2 + f * (_X3 + f * (_X4 + f * p))))
    return p * np.int64((np.int64(np.int32(k)) + np.int64(1023)) << np.int64(52)).view(np.float64)


_FARTHEST = 6.0


def _erfc_coefficients(degree: int) -> tuple[Any, ...]:
    """Coefficients of a polynomial in s that approximates log(erfc(z) e^{z²} / t) with t = 2 / (2 + z).

    For z from 0 to 6; s is t, mapped linearly to [-1, 1].
    """
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


@compiled
def _phi(x: Any) -> Any:
    """The normal distribution function, erfc(-x / √2) / 2."""
    z = min(abs(x) * _ROOT_HALF, _F(_FARTHEST))
    t = _F(2) / (_F(2) + z)
    s = (t - _LOW) * _SPREAD - _F(1)
    p = _P5 + s * (_P6 + s * (_P7 + s * (_P8 + s * (_P9 + s * _P10))))
    p = _P0 + s * (_P1 + s * (_P2 + s * (_P3 + s * (_P4 + s * p))))
    half = _F(0.5) * t * exp(p - z * z)
    return half if x < 0 else _F(1) - half


@compiled
def _sigmoid(x: Any) -> Any:
    return _F(1) / (_F(1) + exp(-x))


@compiled
def _softplus(x: Any) -> Any:
    return max(x, _F(0)) + _F(math.log1p(math.exp(-abs(x))))


def _loop_over(function: Callable[..., Any]) -> Any:
    """Compiles the loop over a vector for a function of one number and three parameters."""
    each = compiled(function)

    @compiled
    def loop(x: Any, y: Any, p: Any, q: Any, r: Any) -> None:
        for i in range(y.size):
            y[i] = each(x[i], p, q, r)

    return loop


_elu = _loop_over(lambda x, p, q, r: p * (max(x, _F(0)) + q * _F(math.expm1(min(x, _F(0)) / r))))
_gelu = _loop_over(lambda x, p, q, r: x * _phi(x))
_gelu_tanh = _loop_over(lambda x, p, q, r: x * _sigmoid(_TANH_SCALE * (x + _F(0.044715) * x * x * x)))
_hard_shrink = _loop_over(lambda x, p, q, r: _F(0) if abs(x) <= p else x)
_clip = _loop_over(lambda x, p, q, r: min(max(x, p), q))
_hard_sigmoid = _loop_over(lambda x, p, q, r: min(max(x / _F(6) + _F(0.5), _F(0)), _F(1)))
_hard_swish = _loop_over(lambda x, p, q, r: x * min(max(x / _F(6) + _F(0.5), _F(0)), _F(1)))
_leaky_relu = _loop_over(lambda x, p, q, r: x if x > 0 else p * x)
_scaled_softplus = _loop_over(lambda x, p, q, r: r * (r * x if r * x > q else p * _softplus(r * x / p)))
_mish = _loop_over(lambda x, p, q, r: x * _F(math.tanh(_softplus(x))))
_silu = _loop_over(lambda x, p, q, r: x * _sigmoid(x))
_sigmoids = _loop_over(lambda x, p, q, r: _sigmoid(x))
_soft_shrink = _loop_over(lambda x, p, q, r: max(x - p, _F(0)) + min(x + p, _F(0)))
_soft_sign = _loop_over(lambda x, p, q, r: x / (_F(1) + abs(x)))
_tanh = _loop_over(lambda x, p, q, r: _F(math.tanh(x)))
_tanh_shrink = _loop_over(lambda x, p, q, r: x - _F(math.tanh(x)))
_threshold = _loop_over(lambda x, p, q, r: q if x <= p else x)


@compiled
def activate(kind: Any, x: Any, y: Any, p: Any, q: Any, r: Any) -> None:
    """y <- f(x), where f is the :class:`Activation` of that kind."""
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


# --- functions of vectors ---------------------------------------------------------------------------------------------


@compiled
def copy(x: Any, y: Any) -> None:
    """y <- x."""
    for i in range(y.size):
        y[i] = x[i]


@compiled
def add(x: Any, other: Any, y: Any) -> None:
    """y <- x + other."""
    for i in range(y.size):
        y[i] = x[i] + other[i]


@compiled
def multiply(x: Any, other: Any, y: Any) -> None:
    """y <- x other, elementwise."""
    for i in range(y.size):
        y[i] = x[i] * other[i]


@compiled
def gate(y: Any, x: Any) -> None:
    """y <- y sigmoid(x)."""
    for i in range(y.size):
        y[i] *= _sigmoid(x[i])


@compiled
def scale(w: Any, x: Any, y: Any) -> None:
    """y <- w x, elementwise."""
    for i in range(y.size):
        y[i] = w[i] * x[i]


@compiled
def _norm(eps: Any, gain: Any, bias: Any, x: Any, y: Any, centre: Any, lo: Any, hi: Any) -> None:
    n = x.size
    mean = _F(0)
    if centre:
        for i in range(n):
            mean += x[i]
        mean /= _F(n)
    square = _F(0)
    for i in range(n):
        square += (x[i] - mean) * (x[i] - mean)
    scale = _F(1) / math.sqrt(square / _F(n) + eps)
    for i in range(lo, hi):
        y[i] = (x[i] - mean) * scale * gain[i] + bias[i]


@compiled
def norm(w: Any, x: Any, y: Any, centre: Any, groups: Any, lo: Any, hi: Any) -> None:
    """The part lo to hi of y <- (x - mean) / deviation gains + biases, with mean and deviation of each group.

    Without `centre`, the mean is taken as zero. The weights are epsilon in a cache line of its own, the gains (n,
    padded to a whole cache line) and the biases (n).
    """
    size = x.size // groups
    start = LANE + compiled_lines(x.size)
    for group in range(groups):
        a, b = group * size, (group + 1) * size
        first, last = max(lo - a, 0), min(hi - a, size)
        if first < last:
            _norm(w[0], w[LANE + a : LANE + b], w[start + a : start + b], x[a:b], y[a:b], centre, first, last)


@compiled
def softmax(x: Any, y: Any, sign: Any, logarithm: Any) -> None:
    """y <- softmax(sign x), or its logarithm.

    The sum is taken in float64: this function is not inlined, and its copy in numba's cache may add in another order
    than a freshly compiled one.
    """
    top = sign * x[0]
    for i in range(x.size):
        top = max(top, sign * x[i])
    exact = 0.0
    for i in range(x.size):
        exact += math.exp(sign * x[i] - top)
    total = _F(exact)
    for i in range(x.size):
        shifted = sign * x[i] - top
        y[i] = shifted - _F(math.log(total)) if logarithm else _F(math.exp(shifted)) / total
