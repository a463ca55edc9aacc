r"""Vandermonde products: sums of exponential sequences, and their transpose."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks

__all__ = [
    "naive_vandermonde",
    "naive_vandermonde_transpose",
    "powers",
    "real_vandermonde",
    "vandermonde",
    "vandermonde_transpose",
]

_DOUBLE = {torch.complex64: torch.complex128, torch.complex128: torch.complex128}
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def _check(where: str, v: Tensor, x: Tensor, L: int) -> None:
    _checks.integer(where, "L", L, least=0)
    if v.dtype not in _DOUBLE or x.dtype not in _DOUBLE:
        raise TypeError(f"{where}: `v` and `x` must be complex tensors, got {v.dtype} and {x.dtype}.")
    if v.ndim < 1 or x.ndim < 1 or v.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{where}: `v` and `x` must agree in their last axis, got {tuple(v.shape)} and {tuple(x.shape)}."
        )


def naive_vandermonde(v: Tensor, x: Tensor, L: int) -> Tensor:
    """The definition of :func:`vandermonde`, with all :math:`N L` powers in memory."""
    return (v[..., None] * x[..., None] ** torch.arange(L, device=x.device)).sum(-2)


def naive_vandermonde_transpose(u: Tensor, x: Tensor) -> Tensor:
    """The definition of :func:`vandermonde_transpose`, with all :math:`N L` powers in memory."""
    return (u[..., None, :] * x[..., None] ** torch.arange(u.shape[-1], device=x.device)).sum(-1)


def powers(x: Tensor, J: int) -> Tensor:
    """The powers x^0 ... x^(J-1) of nodes (*, N), with shape (*, J, N).

    By doubling: no logarithm, so that x = 0 is no special case.
    """
    table = torch.ones_like(x)[..., None, :]
    power = x[..., None, :]
    while table.shape[-2] < J:
        table = torch.cat([table, table * power], dim=-2)
        power = power * power
    return table[..., :J, :]


def _interleaved(z: Tensor) -> Tensor:
    """Real and imaginary parts of (*, N) side by side in (*, 2N): a view."""
    return torch.view_as_real(z).flatten(-2)


def _steps(L: int) -> int:
    """The number J of small steps, a power of two near √L, that splits l = i J + j."""
    return 1 << max(L - 1, 0).bit_length() // 2


def real_vandermonde(v: Tensor, x: Tensor, L: int, dtype: torch.dtype) -> Tensor:
    r"""Real parts :math:`\Re \sum_n v_{mn} x_n^l` of several rows that share their nodes.

    With :math:`l = iJ + j` the sum is a matrix product of inner size :math:`2N`,

    .. math:: \Re \sum_n (v_{mn} x_n^{iJ})\, x_n^j
        = \sum_n \Re(v_{mn} x_n^{iJ}) \Re(x_n^j) - \Im(v_{mn} x_n^{iJ}) \Im(x_n^j),

    whose factors hold :math:`N (J + L/J)` powers instead of :math:`N L`. The factors are made in complex128, so
    that the phase is right at any :math:`l`, and the product is taken in `dtype`.

    Arguments:
        v: Weights, complex128, with shape :math:`(*, M, N)`.
        x: Nodes, complex128, with shape :math:`(*, N)`.
        L: The number of powers.
        dtype: The real dtype of the product.

    Returns:
        The sums, with shape :math:`(*, M, L)`.

    Example:
        >>> x = torch.tensor([0.5j], dtype=torch.complex128)
        >>> real_vandermonde(torch.ones(1, 1, dtype=torch.complex128), x, 4, torch.float64)
        tensor([[ 1.0000,  0.0000, -0.2500,  0.0000]], dtype=torch.float64)
    """
    J = _steps(L)
    small = powers(x, J)
    giant = powers(small[..., -1, :] * x, -(-L // J))
    # Re(a b) is the product of the real vectors (Re ā, Im ā) and (Re b, Im b).
    left = v.conj()[..., :, None, :] * giant.conj()[..., None, :, :]
    rows = _interleaved(left.flatten(-3, -2)).to(dtype)
    y: Tensor = (rows @ _interleaved(small).to(dtype).mT).unflatten(-2, left.shape[-3:-1])
    return y.flatten(-2)[..., :L]


def vandermonde(v: Tensor, x: Tensor, L: int) -> Tensor:
    r"""Sums of exponential sequences.

    .. math:: y_l = \sum_n v_n x_n^l, \qquad l = 0 \dots L - 1

    The kernel of a diagonal system is one, with poles for nodes. The :math:`N L` powers are never in memory
    together: they are factored as :math:`x^{iJ} x^j` into a matrix product.

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
    _check("vandermonde", v, x, L)
    result = torch.promote_types(v.dtype, x.dtype)
    v, x = torch.broadcast_tensors(v.to(torch.complex128), x.to(torch.complex128))
    # The imaginary part of a sum is the real part of -i times it: a second row on the same nodes.
    rows = torch.stack([v, -1j * v], dim=-2)
    y = real_vandermonde(rows, x, L, _REAL[result])
    return torch.complex(y[..., 0, :], y[..., 1, :])


def vandermonde_transpose(u: Tensor, x: Tensor) -> Tensor:
    r"""Polynomials at several nodes: the transpose of :func:`vandermonde`.

    .. math:: s_n = \sum_l u_l x_n^l, \qquad l = 0 \dots L - 1

    The state of a diagonal system after a sequence is one, of the sequence reversed.

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
    if x.dtype not in _DOUBLE:
        raise TypeError(f"vandermonde_transpose: `x` must be a complex tensor, got {x.dtype}.")
    result = torch.promote_types(u.dtype, x.dtype)
    L = u.shape[-1]
    J = _steps(L)
    I = -(-L // J)
    small = powers(x.to(torch.complex128), J)
    giant = powers(small[..., -1, :] * x, I)
    # Within a block of J coefficients a matrix product, over the blocks a weighted sum: N (J + L/J) powers.
    blocks = torch.nn.functional.pad(u, (0, I * J - L)).unflatten(-1, (I, J)).to(result)
    s: Tensor = (blocks @ small.to(result) * giant.to(result)).sum(-2)
    return s
