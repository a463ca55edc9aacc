r"""HiPPO: linear systems with a memory of their input, as real matrices and as diagonal plus low rank.

A measure weights each moment of the past. Its system :math:`x'(t) = A x(t) + B u(t)` keeps in :math:`x` the
coefficients of the past of :math:`u` in the measure's orthonormal basis. Every measure here has

.. math:: A = V (\Lambda - P P^*) V^*, \qquad V V^* = I,

with :math:`\Lambda` diagonal and :math:`P` of low rank, because :math:`A + P P^\top` (`P` real, in the basis of `A`)
is normal: a multiple of the identity plus a skew-symmetric matrix.

Everything is computed in float64 with numpy; callers cast it.

References:
    | HiPPO: Recurrent Memory with Optimal Polynomial Projections (Gu et al., 2020)
    | https://arxiv.org/abs/2008.07669
    | How to Train Your HiPPO (Gu et al., 2022)
    | https://arxiv.org/abs/2206.12037
    | Efficiently Modeling Long Sequences with Structured State Spaces (Gu et al., 2022), Theorem 1
    | https://arxiv.org/abs/2111.00396
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from . import _checks

__all__ = ["NPLR", "diagonalize", "fout", "lagt", "legs", "legt", "low_rank_correction"]

Real = npt.NDArray[np.float64]
Complex = npt.NDArray[np.complex128]
Measure = Callable[[int], tuple[Real, Real]]


class NPLR(NamedTuple):
    r"""A real matrix `A` and vector `B` in the basis that makes `A` diagonal plus low rank.

    :math:`A = V (\Lambda - P P^*) V^*` and :math:`B_A = V B`. Poles come in conjugate pairs: the second half of
    every array is the conjugate of its first half (for `V`, the second half of its columns), whose poles have
    :math:`\Im \Lambda \ge 0`, in ascending order.
    """

    Lambda: Complex
    """Poles :math:`\\Lambda`, in 1/time, with shape :math:`(N)`."""
    P: Complex
    """Low-rank term, with shape :math:`(N, r)`."""
    B: Complex
    """Input gains, with shape :math:`(N)`."""
    V: Complex
    """Unitary change of basis, with shape :math:`(N, N)`."""


def _roots(N: int) -> tuple[Real, Real]:
    """Square roots of 2n + 1, and the sign (-1)^n."""
    n = np.arange(N, dtype=np.float64)
    return np.sqrt(2 * n + 1), np.where(n % 2, -1.0, 1.0)


def legs(N: int) -> tuple[Real, Real]:
    r"""The scaled Legendre measure (LegS): the whole past, rescaled to a fixed interval.

    .. math:: A_{nk} = -\begin{cases} \sqrt{(2n+1)(2k+1)} & n > k \\ n + 1 & n = k \\ 0 & n < k \end{cases},
        \qquad B_n = \sqrt{2n+1}

    With time-varying steps, :math:`x'(t) = (A x + B u) / t`, the state holds Legendre coefficients; S4 uses a constant
    step, for which the basis is Legendre polynomials of :math:`e^{-t}`.

    References:
        | HiPPO: Recurrent Memory with Optimal Polynomial Projections (Gu et al., 2020), Theorem 2
        | https://arxiv.org/abs/2008.07669

    Arguments:
        N: The size of the state.

    Returns:
        The pair `(A, B)` in float64, with shapes :math:`(N, N)` and :math:`(N)`.

    Raises:
        ValueError: If `N` is less than 1.

    Example:
        >>> A, B = legs(2)
        >>> A[1].round(4).tolist()
        [-1.7321, -2.0]
    """
    _checks.integer("legs", "N", N)
    root, _ = _roots(N)
    return -np.tril(np.outer(root, root), -1) - np.diag(np.arange(N) + 1.0), root


def legt(N: int) -> tuple[Real, Real]:
    r"""The translated Legendre measure (LegT): a sliding window of unit length.

    .. math:: A_{nk} = -\sqrt{(2n+1)(2k+1)} \begin{cases} 1 & k \le n \\ (-1)^{n-k} & k \ge n \end{cases},
        \qquad B_n = \sqrt{2n+1}

    The state holds the coefficients of the last unit of time in the orthonormal Legendre basis of the window,
    :math:`\sqrt{2n+1}\, P_n(1 - 2s)` at age :math:`s`.

    References:
        | HiPPO: Recurrent Memory with Optimal Polynomial Projections (Gu et al., 2020), Theorem 1
        | https://arxiv.org/abs/2008.07669

    Arguments:
        N: The size of the state.

    Returns:
        The pair `(A, B)` in float64, with shapes :math:`(N, N)` and :math:`(N)`.

    Raises:
        ValueError: If `N` is less than 1.

    Example:
        >>> A, B = legt(2)
        >>> A.round(4).tolist()
        [[-1.0, 1.7321], [-1.7321, -3.0]]
    """
    _checks.integer("legt", "N", N)
    root, sign = _roots(N)
    return -np.outer(root, root) * np.where(np.tri(N, dtype=bool), 1.0, np.outer(sign, sign)), root


def lagt(N: int) -> tuple[Real, Real]:
    r"""The translated Laguerre measure (LagT): an exponentially fading past.

    .. math:: A_{nk} = -\begin{cases} 1 & n > k \\ 1/2 & n = k \\ 0 & n < k \end{cases}, \qquad B_n = 1

    The state holds the coefficients of the past in the orthonormal Laguerre functions,
    :math:`e^{-s/2} L_n(s)` at age :math:`s`.

    References:
        | HiPPO: Recurrent Memory with Optimal Polynomial Projections (Gu et al., 2020), Appendix D.2
        | https://arxiv.org/abs/2008.07669

    Arguments:
        N: The size of the state.

    Returns:
        The pair `(A, B)` in float64, with shapes :math:`(N, N)` and :math:`(N)`.

    Raises:
        ValueError: If `N` is less than 1.

    Example:
        >>> A, B = lagt(2)
        >>> A.tolist()
        [[-0.5, 0.0], [-1.0, -0.5]]
    """
    _checks.integer("lagt", "N", N)
    return np.eye(N) / 2 - np.tril(np.ones((N, N))), np.ones(N)


def fout(N: int) -> tuple[Real, Real]:
    r"""The truncated Fourier measure (FouT): a sliding window of unit length, in sines and cosines.

    The basis of the window at age :math:`s`, with :math:`D` its derivative, :math:`g' = D g`, gives

    .. math::
        g(s) = (1, 0, \sqrt2 \cos 2\pi s, \sqrt2 \sin 2\pi s, \sqrt2 \cos 4\pi s, \dots), \\
        A = D - 2\, g(0)\, g(0)^\top, \qquad B = 2\, g(0).

    The second coordinate (the sine of frequency zero) is always zero. Because of it all poles come in pairs, and
    :math:`\Lambda` has a double pole at zero.

    References:
        | How to Train Your HiPPO (Gu et al., 2022), Theorem 7
        | https://arxiv.org/abs/2206.12037

    Arguments:
        N: The size of the state, even.

    Returns:
        The pair `(A, B)` in float64, with shapes :math:`(N, N)` and :math:`(N)`.

    Raises:
        ValueError: If `N` is not a positive even integer.

    Example:
        >>> A, B = fout(4)
        >>> B.round(4).tolist()
        [2.0, 0.0, 2.8284, 0.0]
    """
    _checks.even("fout", "N", N)
    g = np.zeros(N)
    g[0::2] = np.sqrt(2.0)
    g[0] = 1.0
    omega = np.zeros(N - 1)
    omega[0::2] = 2 * np.pi * np.arange(N // 2)
    return np.diag(omega, -1) - np.diag(omega, 1) - 2 * np.outer(g, g), 2 * g


def _legs_correction(N: int) -> Real:
    return np.asarray(_roots(N)[0] / np.sqrt(2.0))[:, None]


def _legt_correction(N: int) -> Real:
    root, sign = _roots(N)
    return np.stack([root * (sign > 0), root * (sign < 0)], axis=1)


def _lagt_correction(N: int) -> Real:
    return np.full((N, 1), np.sqrt(0.5))


def _fout_correction(N: int) -> Real:
    return np.asarray(fout(N)[1] / np.sqrt(2.0))[:, None]


_CORRECTIONS: dict[Measure, Callable[[int], Real]] = {
    legs: _legs_correction,
    legt: _legt_correction,
    lagt: _lagt_correction,
    fout: _fout_correction,
}


def low_rank_correction(A: npt.ArrayLike, measure: Measure | None = None) -> Real:
    r"""The real :math:`P` of least rank for which :math:`A + P P^\top` is normal.

    For the measures of this module it is known in closed form. For any other matrix it follows from the symmetric part,

    .. math:: \tfrac12 (A + A^\top) = c I - P P^\top,

    where :math:`c` is the largest eigenvalue of the left-hand side.

    References:
        | Efficiently Modeling Long Sequences with Structured State Spaces (Gu et al., 2022), Appendix C.1
        | https://arxiv.org/abs/2111.00396

    Arguments:
        A: A real square matrix, with shape :math:`(N, N)`.
        measure: The function that made `A`, if it is one of this module's.

    Returns:
        :math:`P` in float64, with shape :math:`(N, r)`.

    Raises:
        ValueError: If `A` is not a square matrix.

    Example:
        >>> A, B = lagt(4)
        >>> low_rank_correction(A).shape
        (4, 1)
    """
    A = _square(A)
    if measure in _CORRECTIONS:
        return _CORRECTIONS[measure](len(A))
    eigenvalues, vectors = np.linalg.eigh((A + A.T) / 2)
    gaps = eigenvalues[-1] - eigenvalues
    low = gaps > 1e-10 * max(1.0, np.abs(A).max())
    return np.asarray(vectors[:, low] * np.sqrt(gaps[low]))


def diagonalize(A: npt.ArrayLike, B: npt.ArrayLike, P: npt.ArrayLike) -> NPLR:
    r"""Turns a real normal-plus-low-rank system into a diagonal-plus-low-rank one.

    .. math:: A = V (\Lambda - P' P'^*) V^*, \qquad P' = V^* P, \quad B' = V^* B,

    for :math:`A + P P^\top = c I + S` with :math:`S` skew-symmetric: :math:`-i S` is Hermitian, so that `eigh`
    finds a unitary :math:`V` to rounding, and :math:`\Re \Lambda = c` is exact.

    References:
        | Efficiently Modeling Long Sequences with Structured State Spaces (Gu et al., 2022), Theorem 1
        | https://arxiv.org/abs/2111.00396

    Arguments:
        A: A real matrix, with shape :math:`(N, N)`, `N` even.
        B: A real vector, with shape :math:`(N)`.
        P: The low-rank correction, see :func:`low_rank_correction`, with shape :math:`(N, r)`.

    Returns:
        The system in its diagonal basis, conjugate pairs in order.

    Raises:
        ValueError: If `N` is odd, if shapes do not fit, or if :math:`A + P P^\top` is not a multiple of the
            identity plus a skew-symmetric matrix.

    Example:
        >>> A, B = legs(8)
        >>> Lambda, P, B_diagonal, V = diagonalize(A, B, low_rank_correction(A, legs))
        >>> bool(np.allclose(V @ (np.diag(Lambda) - P @ P.conj().T) @ V.conj().T, A))
        True
    """
    A = _square(A)
    N = _checks.even("diagonalize", "N", len(A))
    B, P = np.asarray(B, dtype=np.float64), np.asarray(P, dtype=np.float64)
    if B.shape != (N,) or P.ndim != 2 or P.shape[0] != N:
        raise ValueError(f"diagonalize: `B` must have shape ({N},) and `P` ({N}, rank), got {B.shape} and {P.shape}.")
    normal = A + P @ P.T
    c = np.trace(normal) / N
    scale = np.abs(A).max()
    if np.abs(normal + normal.T - 2 * c * np.eye(N)).max() > 1e-8 * max(1.0, scale):
        raise ValueError(
            "diagonalize: `A + P Pᵀ` must be a multiple of the identity plus a skew-symmetric matrix; "
            "take `P` from `low_rank_correction(A)`."
        )
    omega, vectors = np.linalg.eigh(-0.5j * (normal - normal.T))
    # omega is symmetric about zero; its positive part gives one of each conjugate pair. In the kernel of S eigh returns
    # an arbitrary complex basis, whose first half is not the conjugate of its second half. The kernel is closed under
    # conjugation, so it has a real orthonormal basis, whose vectors form pairs (e + i f) / √2.
    zero = np.abs(omega) <= 1e-12 * N * max(1.0, scale)
    positive = omega > 0
    half, poles = vectors[:, positive & ~zero], omega[positive & ~zero]
    if zero.any():
        span = vectors[:, zero]
        basis = np.linalg.svd(np.concatenate([span.real, span.imag], axis=1))[0][:, : zero.sum()]
        half = np.concatenate([(basis[:, 0::2] + 1j * basis[:, 1::2]) / np.sqrt(2.0), half], axis=1)
        poles = np.concatenate([np.zeros(zero.sum() // 2), poles])
    V = np.concatenate([half, half.conj()], axis=1)
    imag = np.concatenate([poles, -poles])
    return NPLR(c + 1j * imag, V.conj().T @ P, V.conj().T @ B, V)


def _square(A: npt.ArrayLike) -> Real:
    A = np.asarray(A, dtype=np.float64)
    if A.ndim != 2 or A.shape[0] != A.shape[1]:
        raise ValueError(f"hippo: `A` must be a square matrix, got shape {A.shape}.")
    return A
