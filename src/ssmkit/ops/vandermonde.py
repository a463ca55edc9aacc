r"""Vandermonde products: sums of exponential sequences, and their transpose."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks
from .complex import from_interleaved, from_pairs, interleaved, to_pairs
from .precision import full_precision_backward
from .transforms import transformed

__all__ = [
    "check_sums",
    "naive_vandermonde",
    "naive_vandermonde_transpose",
    "powers",
    "real_vandermonde",
    "vandermonde",
    "vandermonde_transpose",
]

_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
_COMPLEX = {real: complex_ for complex_, real in _REAL.items()}


def check_sums(where: str, v: Tensor, name: str, nodes: Tensor, L: int) -> None:
    """Checks weights `v` and nodes or poles: both complex, and with the same last axis."""
    _checks.integer(where, "L", L, least=0)
    if v.dtype not in _REAL or nodes.dtype not in _REAL:
        raise TypeError(f"{where}: `v` and `{name}` must be complex tensors, got {v.dtype} and {nodes.dtype}.")
    if v.ndim < 1 or nodes.ndim < 1 or v.shape[-1] != nodes.shape[-1]:
        raise ValueError(
            f"{where}: `v` and `{name}` must agree in their last axis, got {tuple(v.shape)} and {tuple(nodes.shape)}."
        )


def naive_vandermonde(v: Tensor, x: Tensor, L: int) -> Tensor:
    """The definition of :func:`vandermonde`, with all :math:`N L` powers in memory."""
    return (v[..., None] * x[..., None] ** torch.arange(L, device=x.device)).sum(-2)


def naive_vandermonde_transpose(u: Tensor, x: Tensor) -> Tensor:
    """The definition of :func:`vandermonde_transpose`, with all :math:`N L` powers in memory."""
    return (u[..., None, :] * x[..., None] ** torch.arange(u.shape[-1], device=x.device)).sum(-1)


def powers(x: Tensor, J: int) -> Tensor:
    """The powers x^0 ... x^(J-1) of nodes (*, N), with shape (*, J, N).

    By doubling and without logarithms, so that x = 0 is no special case.
    """
    table = torch.ones_like(x)[..., None, :]
    power = x[..., None, :]
    while table.shape[-2] < J:
        table = torch.cat([table, table * power], dim=-2)
        power = power * power
    return table[..., :J, :]


class _WithoutDenormals(torch.autograd.Function):
    """The gradient passes unchanged: a number that is zero now need not stay zero."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.hardshrink(x, 1e-30)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def without_denormals(x: Tensor) -> Tensor:
    """Sets tiny numbers to zero: float32 products of denormal numbers are ten times slower on a CPU."""
    if transformed():
        return x
    y: Tensor = _WithoutDenormals.apply(x)  # type: ignore[no-untyped-call]
    return y


class _Tables(NamedTuple):
    """The powers x^j and x^(iJ), whose products are all x^l = x^(iJ) x^j, l < L."""

    small: Tensor
    """Shape (*, J, N), J a power of two near √L."""
    giant: Tensor
    """Shape (*, I, N) with I J ≥ L."""


def _tables(x: Tensor, L: int, dtype: torch.dtype) -> _Tables:
    """Computed in complex128, so that the phase is accurate at any l, and cast to the complex dtype of `dtype`.

    They carry no graph, since the sums have a gradient of their own, except in the plain form.
    """
    J = 1 << max(L - 1, 0).bit_length() // 2
    with nullcontext() if transformed() else torch.no_grad():
        small = powers(x.to(torch.complex128), J)
        giant = powers(small[..., -1, :] * x, -(-L // J))
        small, giant = (from_pairs(without_denormals(to_pairs(t))) for t in (small, giant))
    return _Tables(small.to(_COMPLEX[dtype]), giant.to(_COMPLEX[dtype]))


def _derivative(u: Tensor) -> Tensor:
    """(l + 1) u_(l+1): a polynomial's derivative has these coefficients."""
    order = torch.arange(1, max(1, u.shape[-1]), device=u.device, dtype=u.dtype)
    return F.pad(u[..., 1:] * order, (0, min(1, u.shape[-1])))


class _Sums(torch.autograd.Function):
    """y_ml = Re Σ_n v_mn x_n^l: weights (*, M, N) and nodes (*, N) to (*, M, L). Its adjoint is _Polynomials."""

    @staticmethod
    def forward(v: Tensor, x: Tensor, small: Tensor, giant: Tensor) -> Tensor:
        # Re(a b) is the product of the real vectors (Re a, Im a) and (Re b, -Im b).
        left = v.to(giant.dtype)[..., :, None, :] * giant[..., None, :, :]
        sign = torch.tensor([1.0, -1.0], dtype=left.real.dtype, device=left.device)
        right = (to_pairs(small) * sign).flatten(-2)
        y: Tensor = interleaved(left).flatten(-3, -2) @ right.mT
        y = y.unflatten(-2, left.shape[-3:-1])
        return y.flatten(-2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        v, x, small, giant = ctx.saved_tensors
        rows = torch.cat([grad, _derivative(grad)], dim=-2)
        values = _Polynomials.apply(rows, x, small, giant)  # type: ignore[no-untyped-call]
        at_nodes, slopes = values.conj().to(v.dtype).chunk(2, dim=-2)
        return at_nodes, (v.conj() * slopes).sum(-2), None, None


class _Polynomials(torch.autograd.Function):
    """s_mn = Σ_l u_ml x_n^l: real coefficients (*, M, L) and nodes (*, N) to (*, M, N). Its adjoint is _Sums."""

    @staticmethod
    def forward(u: Tensor, x: Tensor, small: Tensor, giant: Tensor) -> Tensor:
        I, J = giant.shape[-2], small.shape[-2]
        blocks = F.pad(u.to(small.real.dtype), (0, I * J - u.shape[-1])).unflatten(-1, (I, J))
        inner: Tensor = blocks.flatten(-3, -2) @ interleaved(small)
        values = from_interleaved(inner.unflatten(-2, blocks.shape[-3:-1]))
        return (values * giant[..., None, :, :]).sum(-2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        u, x, small, giant = ctx.saved_tensors
        du = _Sums.apply(grad.conj(), x, small, giant)  # type: ignore[no-untyped-call]
        slopes = _Polynomials.apply(_derivative(u), x, small, giant).conj()  # type: ignore[no-untyped-call]
        du = du[..., : u.shape[-1]].to(u.dtype)
        return du, (grad * slopes).sum(-2).to(x.dtype), None, None


def real_vandermonde(v: Tensor, x: Tensor, L: int, dtype: torch.dtype) -> Tensor:
    r"""Real parts :math:`\Re \sum_n v_{mn} x_n^l` of several rows that share their nodes.

    With :math:`l = iJ + j` the sum is a matrix product of inner size :math:`2N`,

    .. math:: \Re \sum_n (v_{mn} x_n^{iJ})\, x_n^j
        = \sum_n \Re(v_{mn} x_n^{iJ}) \Re(x_n^j) - \Im(v_{mn} x_n^{iJ}) \Im(x_n^j),

    whose factors hold :math:`N (J + L/J)` powers instead of :math:`N L`. The powers are computed in complex128, so that
    the phase is accurate at any :math:`l`, and the product is computed in `dtype`.

    Arguments:
        v: Weights, complex, with shape :math:`(*, M, N)`.
        x: Nodes, complex, with shape :math:`(*, N)`.
        L: The number of powers.
        dtype: The real dtype of the product.

    Returns:
        The sums, with shape :math:`(*, M, L)`.

    Example:
        >>> x = torch.tensor([0.5j], dtype=torch.complex128)
        >>> real_vandermonde(torch.ones(1, 1, dtype=torch.complex128), x, 4, torch.float64)
        tensor([[ 1.0000,  0.0000, -0.2500,  0.0000]], dtype=torch.float64)
    """
    sums = _Sums.forward if transformed() else _Sums.apply
    y: Tensor = sums(v, x, *_tables(x, L, dtype))
    return y[..., :L]


def vandermonde(v: Tensor, x: Tensor, L: int) -> Tensor:
    r"""Sums of exponential sequences.

    .. math:: y_l = \sum_n v_n x_n^l, \qquad l = 0 \dots L - 1

    The kernel of a diagonal system is such a sum, whose nodes are the poles. The :math:`N L` powers are never in memory
    at once: they are factored as :math:`x^{iJ} x^j` into a matrix product.

    References:
        | On the Parameterization and Initialization of Diagonal State Space Models (Gu et al., 2022), Section 3.2
        | https://arxiv.org/abs/2206.11893

    Arguments:
        v: Weights, complex, with shape :math:`(*, N)`.
        x: Nodes, complex, with shape :math:`(*, N)`, broadcastable with `v`. For :math:`|x| > 1` powers may overflow.
        L: The number of powers.

    Returns:
        The sums :math:`y`, complex, with shape :math:`(*, L)`.

    Raises:
        TypeError: If `v` or `x` is real.
        ValueError: If the last axes differ or `L` is negative.

    Example:
        >>> v, x = torch.tensor([1.0 + 0j, 2.0]), torch.tensor([0.5 + 0j, 1.0])
        >>> vandermonde(v, x, 3).real
        tensor([3.0000, 2.5000, 2.2500])
    """
    check_sums("vandermonde", v, "x", x, L)
    result = torch.promote_types(v.dtype, x.dtype)
    v, x = torch.broadcast_tensors(v.to(result), x.to(result))
    # The imaginary part of a sum is the real part of -i times the sum: a second row with the same nodes.
    rows = torch.stack([v, -1j * v], dim=-2)
    y = real_vandermonde(rows, x, L, _REAL[result])
    return torch.complex(y[..., 0, :], y[..., 1, :])


def vandermonde_transpose(u: Tensor, x: Tensor) -> Tensor:
    r"""Polynomials at several nodes: the transpose of :func:`vandermonde`.

    .. math:: s_n = \sum_l u_l x_n^l, \qquad l = 0 \dots L - 1

    The state of a diagonal system after a sequence is such a value, for the reversed sequence.

    References:
        | On the Parameterization and Initialization of Diagonal State Space Models (Gu et al., 2022), Section 3.2
        | https://arxiv.org/abs/2206.11893

    Arguments:
        u: Coefficients, real or complex, with shape :math:`(*, L)`.
        x: Nodes, complex, with shape :math:`(*, N)`; the leading axes broadcast with those of `u`.

    Returns:
        The values :math:`s`, complex, with shape :math:`(*, N)`.

    Raises:
        TypeError: If `x` is real.

    Example:
        >>> vandermonde_transpose(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0 + 0j])).real
        tensor([17.])
    """
    if x.dtype not in _REAL:
        raise TypeError(f"vandermonde_transpose: `x` must be a complex tensor, got {x.dtype}.")
    result = torch.promote_types(u.dtype, x.dtype)
    batch = torch.broadcast_shapes(u.shape[:-1], x.shape[:-1])
    u, x = u.expand(*batch, u.shape[-1]), x.expand(*batch, x.shape[-1])
    rows = torch.stack([u.real, u.imag], dim=-2) if u.is_complex() else u[..., None, :]
    tables = _tables(x, u.shape[-1], _REAL[result])
    polynomials = _Polynomials.forward if transformed() else _Polynomials.apply
    s: Tensor = polynomials(rows, x, *tables)
    return s[..., 0, :] + 1j * s[..., 1, :] if u.is_complex() else s[..., 0, :]
