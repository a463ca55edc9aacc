r"""Systems with a diagonal state matrix (S4D)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..ops.complex import add_rotation, interleaved, output_rows
from ..ops.vandermonde import real_vandermonde
from .base import own
from .dense import Dense
from .per_feature import LowRankSystem, group_rows, per_feature, ungroup

__all__ = ["DISCRETIZATIONS", "Diagonal", "DiscreteDiagonal", "Discretization", "bilinear", "zoh"]

Discretization = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def bilinear(Lambda: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    r"""Discretises a diagonal system by the bilinear (Tustin) rule.

    .. math:: \bar\Lambda = \frac{1 + \Delta\Lambda/2}{1 - \Delta\Lambda/2}, \qquad
        \bar B = \frac{\Delta}{1 - \Delta\Lambda/2} B

    Its error falls with the square of :math:`\Delta`; a stable pole stays stable at any :math:`\Delta`.

    References:
        | On the Parameterization and Initialization of Diagonal State Space Models (Gu et al., 2022), Section 3.1
        | https://arxiv.org/abs/2206.11893

    Arguments:
        Lambda: Poles, complex, in 1/time, with shape :math:`(*, N)`.
        B: Input gains, complex, with shape :math:`(*, N)`.
        dt: The step :math:`\Delta > 0`, real, in the time unit of `Lambda`, broadcastable with it. Not checked:
            testing a tensor's values would synchronise the device.

    Returns:
        The pair :math:`(\bar\Lambda, \bar B)`, dimensionless and in units of `B` times time, shapes :math:`(*, N)`.

    Example:
        >>> a, b = bilinear(torch.tensor([-1.0 + 0j]), torch.tensor([1.0 + 0j]), torch.tensor(2.0))
        >>> a.item(), b.item()
        (0j, (1+0j))
    """
    inverse = 1 / (1 - dt / 2 * Lambda)
    return (1 + dt / 2 * Lambda) * inverse, dt * B * inverse


def zoh(Lambda: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    r"""Discretises a diagonal system by zero-order hold.

    The input is held constant over each interval of length :math:`\Delta`, so that the samples

    .. math:: \bar\Lambda = e^{\Delta\Lambda}, \qquad \bar B = \Delta\, \varphi(\Delta\Lambda)\, B, \quad
        \varphi(z) = (e^z - 1) / z, \; \varphi(0) = 1,

    are exact for inputs that are constant over each step. There is no cancellation for small :math:`\Delta\Lambda`.

    References:
        | On the Parameterization and Initialization of Diagonal State Space Models (Gu et al., 2022), Section 3.1
        | https://arxiv.org/abs/2206.11893

    Arguments:
        Lambda: Poles, complex, in 1/time, with shape :math:`(*, N)`.
        B: Input gains, complex, with shape :math:`(*, N)`.
        dt: The step :math:`\Delta > 0`, real, in the time unit of `Lambda`, broadcastable with it. Not checked:
            testing a tensor's values would synchronise the device.

    Returns:
        The pair :math:`(\bar\Lambda, \bar B)`, dimensionless and in units of `B` times time, shapes :math:`(*, N)`.

    Example:
        >>> a, b = zoh(torch.zeros(1, dtype=torch.complex64), torch.ones(1), torch.tensor(0.5))  # an integrator
        >>> a.item(), b.item()
        ((1+0j), (0.5+0j))
    """
    z = dt * Lambda
    # e^z - 1 without cancellation: Re = expm1(x) cos y - 2 sin²(y/2), Im = e^x sin y.
    x, y = z.real, z.imag
    minus_one = torch.complex(torch.expm1(x) * y.cos() - 2 * (y / 2).sin() ** 2, x.exp() * y.sin())
    zero = z == 0
    phi = torch.where(zero, 1.0, minus_one / torch.where(zero, 1.0, z))
    return 1 + minus_one, dt * phi * B


DISCRETIZATIONS: dict[str, Discretization] = {"zoh": zoh, "bilinear": bilinear}
"""The named discretisation rules of diagonal systems."""


def discretized(rule: Discretization, Lambda: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """What a rule, which may be a user's own, makes of poles and gains."""
    made = rule(Lambda, B, dt)
    poles = torch.broadcast_shapes(Lambda.shape, dt.shape)
    if not isinstance(made, tuple) or [getattr(x, "shape", None) for x in made] != [poles] * 2:
        raise ValueError(f"Diagonal: `discretization` must return a pair of tensors with shape {tuple(poles)}.")
    return made


_LESS_ONE: dict[Discretization, Callable[[Tensor], Tensor]] = {zoh: torch.expm1, bilinear: lambda z: z / (1 - z / 2)}


def less_one(rule: Discretization, Lambda: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Discretises for many step sizes: :math:`\bar\Lambda - 1`, and two factors whose product is :math:`\bar B`.

    Both named rules keep the steady state for a constant input, so that
    :math:`\bar B = (\bar\Lambda - 1) B / \Lambda`, and only one number per pole depends on the step size. It is
    computed without cancellation.

    Arguments:
        rule: The rule.
        Lambda: Poles, with shape :math:`(*, N)`.
        B: Input gains, with shape :math:`(*, N)`.
        dt: Step sizes, with more axes than `Lambda`.

    Returns:
        Poles minus 1, the factor that depends on `dt` and the factor that does not.
    """
    if rule not in _LESS_ONE:
        a, b = discretized(rule, Lambda, B, dt)
        return a - 1, b, torch.ones_like(B)
    # A pole at zero becomes a very slow pole, which is the same to rounding.
    poles = torch.where(Lambda == 0, 1e-150, Lambda)
    less = _LESS_ONE[rule](dt * poles)
    return less, less, B / poles


@dataclass(frozen=True, eq=False)
class DiscreteDiagonal(LowRankSystem):
    r"""A discrete system :math:`s_k = a \circ s_{k-1} + b u_k`, :math:`y_k = 2 \Re (c\, s_k) + D u_k`.

    For H features with C outputs each; G systems serve them, feature h uses system h mod G. States are the real
    tensors :math:`[\Re s_1, \Im s_1, \dots]`.
    """

    a: Tensor
    """Poles, complex128; shape (G, N/2)."""
    b: Tensor
    """Input gains, complex128; shape (G, N/2)."""
    c: Tensor
    """Output gains, complex128; shape (C, H, N/2)."""
    D: Tensor
    """Feedthrough, in the working dtype; shape (C, H)."""

    def __post_init__(self) -> None:
        for name in ("a", "b", "c"):
            object.__setattr__(self, name, own(getattr(self, name), torch.complex128))
        object.__setattr__(self, "D", own(self.D))

    def low_rank_part(self) -> tuple[Tensor, Tensor]:
        """Empty: the rank is 0."""
        G, n = self.a.shape
        return self.a.new_zeros(G, n, 0), self.a.new_zeros(G, 0, n)

    def kernel(self, L: int) -> Tensor:
        r"""The impulse response :math:`K_l = 2 \Re (c\, a^l b)`, without D, with shape :math:`(C, H, L)`."""
        weights = 2 * group_rows(self.c, len(self.a)) * self.b[:, None]
        return ungroup(real_vandermonde(weights, self.a, L, self.dtype), len(self.c))


class Diagonal(NamedTuple):
    r"""A continuous system :math:`s' = \Lambda \circ s + B u`, :math:`y = 2 \Re (C s)`, with one pole of each pair.

    Feature h of H uses system h mod S.
    """

    Lambda: Tensor
    """Poles, complex, in 1/time; shape (S, N/2)."""
    B: Tensor
    """Input gains, complex; shape (S, N/2)."""
    C: Tensor
    """Output gains, complex; shape (channels, H, N/2)."""

    def discretize(
        self,
        dt: Tensor,
        method: str | Discretization = "zoh",
        dtype: torch.dtype = torch.float32,
        D: Tensor | None = None,
    ) -> DiscreteDiagonal:
        r"""Samples the system every `dt`.

        Arguments:
            dt: Steps :math:`\Delta`, in the time unit of `Lambda`, with shape :math:`(G)`, `G` a multiple of `S`.
            method: `"zoh"`, `"bilinear"`, or a function like :func:`zoh`.
            dtype: The working dtype of the result.
            D: Feedthrough, with shape :math:`(channels, H)`, by default zero.

        Returns:
            The discrete system.

        Raises:
            ValueError: If the method is unknown.

        Example:
            >>> one = torch.ones(1, 1, dtype=torch.complex128)
            >>> system = Diagonal(-one, one, one[None] / 2)
            >>> system.discretize(torch.tensor([2.0]), "bilinear").kernel(2)
            tensor([[[1., 0.]]])
        """
        if isinstance(method, str):
            method = DISCRETIZATIONS[_checks.known("Diagonal.discretize", "method", method, DISCRETIZATIONS)]
        full = torch.complex128
        Lambda, B = (per_feature(v.to(full), len(dt)) for v in (self.Lambda, self.B))
        a, b = discretized(method, Lambda, B, dt.double()[:, None])
        D = dt.new_zeros(self.C.shape[:2]) if D is None else D
        return DiscreteDiagonal(a, b, self.C, D.to(dtype))

    def dense(self) -> Dense:
        """The same system in real form, with a dense state matrix."""
        N = 2 * self.Lambda.shape[-1]
        A = torch.zeros(len(self.Lambda), N, N, dtype=self.Lambda.real.dtype, device=self.Lambda.device)
        return Dense(add_rotation(A, self.Lambda), interleaved(self.B), output_rows(self.C))
