r"""The initial parameters of state-space layers: poles, gains and step sizes, and the registry of names.

An initialisation is a function of the state size `N`. It returns either a real matrix and vector `(A, B)` (a HiPPO
measure, or a user's own), or complex poles and gains `(Lambda, B)` of half the size, one of each conjugate pair.

References:
    | On the Parameterization and Initialization of Diagonal State Space Models (Gu et al., 2022)
    | https://arxiv.org/abs/2206.11893 (Section 4)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import _checks, hippo

__all__ = ["DIAGONAL", "HIPPO", "Init", "Poles", "inv", "lin", "log_uniform", "poles", "quad", "real", "softplus_steps"]

Init = Callable[[int], tuple[Any, Any]]

_RANDOM_RANK = 1e-2
_REAL_MAX = -1e-4


def _poles(real: float | hippo.Real, imag: float | hippo.Real) -> tuple[hippo.Complex, hippo.Complex]:
    Lambda = np.asarray(real + 1j * np.asarray(imag), dtype=np.complex128)
    return Lambda, np.ones_like(Lambda)


def _index(N: int, where: str) -> hippo.Real:
    return np.arange(_checks.even(where, "N", N) // 2, dtype=np.float64)


def lin(N: int) -> tuple[hippo.Complex, hippo.Complex]:
    r"""S4D-Lin: :math:`\Lambda_n = -\tfrac12 + i \pi n`, the frequencies of a Fourier series.

    References:
        | On the Parameterization and Initialization of Diagonal State Space Models (Gu et al., 2022), Equation 9
        | https://arxiv.org/abs/2206.11893

    Arguments:
        N: The size of the state, even.

    Returns:
        Poles (in 1/time) and gains, both with shape :math:`(N/2)`, complex128.

    Raises:
        ValueError: If `N` is not a positive even integer.

    Example:
        >>> lin(4)[0].round(3).tolist()
        [(-0.5+0j), (-0.5+3.142j)]
    """
    return _poles(-0.5, np.pi * _index(N, "lin"))


def inv(N: int) -> tuple[hippo.Complex, hippo.Complex]:
    r"""S4D-Inv: :math:`\Lambda_n = -\tfrac12 + i \tfrac{N}{\pi} \left(\tfrac{N}{2n+1} - 1\right)`, close to LegS.

    References:
        | On the Parameterization and Initialization of Diagonal State Space Models (Gu et al., 2022), Equation 8
        | https://arxiv.org/abs/2206.11893

    Arguments:
        N: The size of the state, even.

    Returns:
        Poles (in 1/time) and gains, both with shape :math:`(N/2)`, complex128.

    Raises:
        ValueError: If `N` is not a positive even integer.

    Example:
        >>> inv(4)[0].round(3).tolist()
        [(-0.5+3.82j), (-0.5+0.424j)]
    """
    return _poles(-0.5, N / np.pi * (N / (2 * _index(N, "inv") + 1) - 1))


def quad(N: int) -> tuple[hippo.Complex, hippo.Complex]:
    r"""S4D-Quad: :math:`\Lambda_n = -\tfrac12 + \tfrac{i}{\pi} (2n+1)^2`.

    References:
        | On the Parameterization and Initialization of Diagonal State Space Models (Gu et al., 2022), Section 5
        | https://arxiv.org/abs/2206.11893

    Arguments:
        N: The size of the state, even.

    Returns:
        Poles (in 1/time) and gains, both with shape :math:`(N/2)`, complex128.

    Raises:
        ValueError: If `N` is not a positive even integer.

    Example:
        >>> quad(4)[0].round(3).tolist()
        [(-0.5+0.318j), (-0.5+2.865j)]
    """
    return _poles(-0.5, (2 * _index(N, "quad") + 1) ** 2 / np.pi)


def real(N: int) -> tuple[hippo.Complex, hippo.Complex]:
    r"""S4D-Real: :math:`\Lambda_n = -(n + 1)`, decaying exponentials that do not oscillate until training changes them.

    References:
        | On the Parameterization and Initialization of Diagonal State Space Models (Gu et al., 2022), Section 4.4
        | https://arxiv.org/abs/2206.11893

    Arguments:
        N: The size of the state, even.

    Returns:
        Poles (in 1/time) and gains, both with shape :math:`(N/2)`, complex128.

    Raises:
        ValueError: If `N` is not a positive even integer.

    Example:
        >>> real(4)[0].real.tolist()
        [-1.0, -2.0]
    """
    return _poles(-(_index(N, "real") + 1), 0.0)


HIPPO: dict[str, Init] = {"legs": hippo.legs, "legt": hippo.legt, "lagt": hippo.lagt, "fout": hippo.fout}
"""The named initialisations that give matrices; for S4, and by their diagonal part for S4D."""

DIAGONAL: dict[str, Init] = {"lin": lin, "inv": inv, "quad": quad, "real": real}
"""The named initialisations that give poles; for S4D."""


class Poles(NamedTuple):
    r"""One of each conjugate pair of a system: :math:`A = \Lambda - P P^*`, :math:`B`, in complex128.

    :math:`\Re \Lambda \le -10^{-4}`, so that every layer starts strictly stable.
    """

    Lambda: Tensor
    """Poles in 1/time, with shape :math:`(N/2)`."""
    P: Tensor
    """Low-rank term, with shape :math:`(N/2, r)`; rank 0 for a diagonal system."""
    B: Tensor
    """Input gains, with shape :math:`(N/2)`."""


def poles(where: str, init: str | Init, N: int, rank: int | None = None) -> Poles:
    r"""Computes the poles and gains of an initialisation, which is a name or a function.

    With `rank = 0` the result is the diagonal part: for a matrix :math:`A = \Lambda - P P^*` that is
    :math:`(\Lambda, B / 2)`, whose response to smooth input tends to that of :math:`(A, B)` as :math:`N` grows. With a
    `rank` above that of the matrix, the additional columns of :math:`P` start small and random (at zero they would have
    no gradient).

    References:
        | On the Parameterization and Initialization of Diagonal State Space Models (Gu et al., 2022), Theorem 3
        | https://arxiv.org/abs/2206.11893

    Arguments:
        where: The name of the calling layer, for error messages.
        init: A name of :data:`HIPPO` or :data:`DIAGONAL`, or a function :math:`N \mapsto (A, B)` or
            :math:`N \mapsto (\Lambda, B)`.
        N: The size of the state, even.
        rank: The rank of the low-rank term; by default that of the matrix.

    Returns:
        The system, one of each conjugate pair.

    Raises:
        ValueError: If the name is unknown, if the function returns something else, if `rank` is too small for the
            matrix, or if `rank` is not 0 but `init` gives only poles.

    Example:
        >>> poles("S4", "legt", 8).P.shape
        torch.Size([4, 2])
    """
    if rank is not None:
        _checks.integer(where, "rank", rank, least=0)
    diagonal = rank == 0
    if isinstance(init, str):
        name = _checks.known(where, "init", init, [*HIPPO, *DIAGONAL])
        if name in DIAGONAL and not diagonal:
            raise ValueError(f"{where}: `init` {name!r} has no low-rank term; use S4D, or one of {', '.join(HIPPO)}.")
        init = {**HIPPO, **DIAGONAL}[name]
    elif not callable(init):
        raise TypeError(f"{where}: `init` must be a name or a function N -> (A, B), got {init!r}.")
    made = init(N)
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise TypeError(f"{where}: `init` must return a pair of arrays, got {_checks.shown(made)}.")
    A, B = (np.asarray(x) for x in made)
    if not all(np.issubdtype(x.dtype, np.number) and np.isfinite(x).all() for x in (A, B)):
        raise ValueError(f"{where}: `init` must return finite numbers, got others for N = {N}.")
    if A.shape == (N, N) and B.shape == (N,):
        system = _named(init, N) if init in HIPPO.values() else _diagonalize(A, B)
        Lambda, P, B = system.Lambda[: N // 2], system.P[: N // 2], system.B[: N // 2]
        if diagonal:
            P, B = P[:, :0], B / 2
    elif diagonal and A.shape == B.shape == (N // 2,):
        Lambda, P = A.astype(np.complex128), np.zeros((N // 2, 0), dtype=np.complex128)
    else:
        wanted = f"A ({N}, {N}) and B ({N},)"
        if diagonal:
            wanted += f", or poles and gains ({N // 2},) each"
        raise ValueError(f"{where}: `init` must return {wanted} for N = {N}, got {A.shape} and {B.shape}.")
    if rank is not None and P.shape[1] > rank:
        raise ValueError(
            f"{where}: `rank` must be at least {P.shape[1]} for this `init` (the rank of its low-rank term), "
            f"got {rank}."
        )
    Lambda = np.minimum(Lambda.real, _REAL_MAX) + 1j * Lambda.imag
    low_rank = _tensor(P)
    if rank is not None and rank > P.shape[1]:
        extra = torch.randn(N // 2, rank - P.shape[1], dtype=torch.complex128)
        low_rank = torch.cat([low_rank, _RANDOM_RANK * extra], dim=1)
    return Poles(_tensor(Lambda), low_rank, _tensor(B))


def _diagonalize(A: hippo.Real, B: hippo.Real, measure: Init | None = None) -> hippo.NPLR:
    return hippo.diagonalize(A, B, hippo.low_rank_correction(A, measure))


@lru_cache(maxsize=32)
def _named(measure: Init, N: int) -> hippo.NPLR:
    """Cached, since every layer of a network calls it. A user's function is not cached: it may be random."""
    return _diagonalize(*measure(N), measure)


def _tensor(x: npt.ArrayLike) -> Tensor:
    return torch.from_numpy(np.array(x, dtype=np.complex128))


def log_uniform(shape: tuple[int, ...], low: float, high: float) -> Tensor:
    r"""Draws :math:`\log \Delta` with :math:`\Delta` log-uniform between `low` and `high`, in float64.

    References:
        | Efficiently Modeling Long Sequences with Structured State Spaces (Gu et al., 2022)
        | https://arxiv.org/abs/2111.00396 (Appendix D)

    Arguments:
        shape: The shape of the result.
        low: The smallest step size, in the time unit of `A`.
        high: The largest step size, likewise.

    Returns:
        The natural logarithms, with shape `shape`.

    Raises:
        TypeError: If a bound is not a number.
        ValueError: If a bound is not positive and finite, or if `low` is not less than `high`.

    Example:
        >>> log_uniform((3,), 0.1, 0.2).exp().min() >= 0.1
        tensor(True)
    """
    low, high = _checks.positive_range("log_uniform", "low", low, "high", high)
    low_log, high_log = float(np.log(low)), float(np.log(high))
    return low_log + (high_log - low_log) * torch.rand(shape, dtype=torch.float64)


def softplus_steps(shape: tuple[int, ...], low: float, high: float, floor: float) -> Tensor:
    r"""Draws biases whose softplus is a log-uniform step size, in float64: :math:`\log (e^\Delta - 1)`.

    References:
        | Mamba: Linear-Time Sequence Modeling with Selective State Spaces (Gu and Dao, 2023), Section 3.6
        | https://arxiv.org/abs/2312.00752

    Arguments:
        shape: The shape of the result.
        low: The smallest step size that is drawn.
        high: The largest step size that is drawn.
        floor: The smallest step size of the result: smaller ones are raised to it.

    Returns:
        The biases, with shape `shape`.

    Raises:
        TypeError: If a bound is not a number.
        ValueError: If a bound is not positive and finite, or if `low` is not less than `high`.

    Example:
        >>> torch.nn.functional.softplus(softplus_steps((3,), 0.1, 0.2, 0.15)).min() >= 0.15 * (1 - 1e-9)
        tensor(True)
    """
    dt = log_uniform(shape, low, high).exp().clamp(min=_checks.positive("softplus_steps", "floor", floor))
    return dt + torch.log(-torch.expm1(-dt))
