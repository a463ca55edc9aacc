r"""Systems with a diagonal state matrix (S4D)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..ops.complex import add_rotation, from_interleaved, interleaved, output_rows
from ..ops.scan import CHUNK, Chunk, scan_chunks
from ..ops.vandermonde import powers, real_vandermonde
from .dense import Dense
from .recurrence import (
    Recurrence,
    add_direct,
    group_rows,
    per_feature,
    ungroup,
)

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


class DiscreteDiagonal(NamedTuple):
    r"""A discrete system :math:`s_k = a \circ s_{k-1} + b u_k`, :math:`y_k = 2 \Re (c\, s_k)`.

    For H features with C outputs each; G systems serve them, feature h uses system h mod G. States are the real
    tensors :math:`[\Re s_1, \Im s_1, \dots]`.
    """

    a: Tensor
    """Poles, complex128; shape (G, N/2)."""
    b: Tensor
    """Input gains, complex128; shape (G, N/2)."""
    c: Tensor
    """Output gains, complex128; shape (C, H, N/2)."""
    recurrence: Recurrence
    """The same system for :meth:`step`, in the working dtype."""

    def kernel(self, L: int) -> Tensor:
        r"""The impulse response :math:`K_l = 2 \Re (c\, a^l b)`, with shape :math:`(C, H, L)`."""
        weights = 2 * group_rows(self.c, len(self.a)) * self.b[:, None]
        return ungroup(real_vandermonde(weights, self.a, L, self.recurrence.direct.dtype), len(self.c))

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input :math:`(*, H)` and state :math:`(*, H, N)` to output :math:`(*, C, H)` and the next state."""
        return self.recurrence.step(u, x)

    def scan(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input (B, L, H) and state (B, H, N) to output (B, L, C H) and the next state; L at least 1."""
        H, dtype = u.shape[-1], self.recurrence.direct.dtype
        T = min(CHUNK, u.shape[1])
        table = powers(self.a, T + 1)
        observe = per_feature(table[:, 1:], H) * self.c[..., None, :]
        reach = table[:, :T].flip(1) * self.b[:, None]
        chunk = Chunk(
            add_direct(self.kernel(T), self.recurrence.D),
            output_rows(observe).to(dtype),
            per_feature(interleaved(reach).to(dtype), H),
        )

        def advance(m: int) -> Tensor:
            return per_feature(table[:, m].to(dtype.to_complex()), H)[:, None]

        def advance_by(state: Tensor, m: int) -> Tensor:
            return interleaved(from_interleaved(state) * advance(m))

        return scan_chunks(u, x, chunk, advance(T), advance_by)


class Diagonal(NamedTuple):
    r"""A continuous system :math:`s' = \Lambda \circ s + B u`, :math:`y = 2 \Re (C s)`, one of each conjugate pair.

    Feature h of H uses system h mod S.
    """

    Lambda: Tensor
    """Poles, complex, in 1/time; shape (S, N/2)."""
    B: Tensor
    """Input gains, complex; shape (S, N/2)."""
    C: Tensor
    """Output gains, complex; shape (channels, H, N/2)."""

    def discretize(
        self, dt: Tensor, method: str | Discretization = "zoh", dtype: torch.dtype = torch.float32
    ) -> DiscreteDiagonal:
        r"""Samples the system every `dt`.

        Arguments:
            dt: Steps :math:`\Delta`, in the time unit of `Lambda`, with shape :math:`(G)`, `G` a multiple of `S`.
            method: `"zoh"`, `"bilinear"`, or a function like :func:`zoh`.
            dtype: The working dtype of the result.

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
        a, b = method(Lambda, B, dt.double()[:, None])
        C = self.C.to(full)
        N = 2 * a.shape[-1]
        p, q = (dt.new_zeros(1, *shape, dtype=torch.double) for shape in ((N, 0), (0, N)))
        recurrence = Recurrence.of(a, p, q, interleaved(b), output_rows(C), dtype)
        return DiscreteDiagonal(a, b, C, recurrence)

    def dense(self) -> Dense:
        """The same system in real form, with a dense state matrix."""
        N = 2 * self.Lambda.shape[-1]
        A = torch.zeros(len(self.Lambda), N, N, dtype=self.Lambda.real.dtype, device=self.Lambda.device)
        return Dense(add_rotation(A, self.Lambda), interleaved(self.B), output_rows(self.C))
