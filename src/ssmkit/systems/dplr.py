r"""Systems with a diagonal-plus-low-rank state matrix (S4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from opt_einsum import contract
from torch import Tensor

from ..ops.complex import add_rotation, interleaved, output_rows
from .dense import Dense, DiscreteDense
from .diagonal import Diagonal
from .recurrence import Recurrence, per_feature

__all__ = ["DPLR", "DiscreteDPLR"]


class DiscreteDPLR(NamedTuple):
    r"""A discrete system :math:`s_k = a \circ s_{k-1} - p\, 2 \Re(q\, s_{k-1}) + b u_k`, :math:`y_k = 2 \Re (c\, s_k)`.

    For H features with C outputs each; G systems serve them, feature h uses system h mod G. States are the real
    tensors :math:`[\Re s_1, \Im s_1, \dots]`. A step costs O(N) per feature; kernels and scans are made from the dense
    real form.
    """

    dense: DiscreteDense
    """The system in real form, float64."""
    recurrence: Recurrence
    """The same system for :meth:`step`, in the working dtype."""

    def kernel(self, L: int) -> Tensor:
        r"""The impulse response :math:`K_l = 2 \Re (c\, \bar A^l b)`, with shape :math:`(C, H, L)`."""
        return self.dense.kernel(L)

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input :math:`(*, H)` and state :math:`(*, H, N)` to output :math:`(*, C, H)` and the next state."""
        return self.recurrence.step(u, x)

    def scan(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input (B, L, H) and state (B, H, N) to output (B, L, C H) and the next state; L at least 1."""
        return self.dense.scan(u, x, self.recurrence.D)


class DPLR(NamedTuple):
    r"""A continuous system :math:`s' = (\Lambda - P P^*) s + B u`, :math:`y = 2 \Re (C s)`.

    One of each conjugate pair is kept; :math:`P^* s` runs over both and so is :math:`2 \Re(P^* s)` of the half. Feature
    h of H uses system h mod S. With :math:`\Re\Lambda < 0` the system is stable, whatever :math:`P`.
    """

    Lambda: Tensor
    """Poles, complex, in 1/time; shape (S, N/2)."""
    P: Tensor
    """Low-rank term, complex; shape (S, N/2, r)."""
    B: Tensor
    """Input gains, complex; shape (S, N/2)."""
    C: Tensor
    """Output gains, complex; shape (channels, H, N/2)."""

    def discretize(self, dt: Tensor, dtype: torch.dtype = torch.float32) -> DiscreteDPLR:
        r"""Samples the system every `dt` by the bilinear rule, which keeps it diagonal plus rank r.

        With :math:`D = (I - \tfrac\Delta2 \Lambda)^{-1}` and :math:`G = I + \tfrac\Delta2\, 2\Re(P^* D P)`, a real
        :math:`r \times r` matrix, Woodbury's identity gives

        .. math::
            \bar A &= D (I + \tfrac\Delta2 \Lambda) - (D P) Q^*, \qquad Q^* = \Delta\, G^{-1} P^* D, \\
            \bar B &= \Delta \left( D B - \tfrac\Delta2 D P G^{-1}\, 2\Re(P^* D B) \right),

        where :math:`Q^* s` stands for :math:`2\Re(Q^* s)`. There is no matrix to solve but :math:`G`.

        References:
            | Efficiently Modeling Long Sequences with Structured State Spaces (Gu et al., 2022), Appendix C.2
            | https://arxiv.org/abs/2111.00396

        Arguments:
            dt: Steps :math:`\Delta`, in the time unit of `Lambda`, with shape :math:`(G)`, `G` a multiple of `S`.
            dtype: The working dtype of the result.

        Returns:
            The discrete system.

        Example:
            >>> one = torch.ones(1, 1, dtype=torch.complex128)
            >>> system = DPLR(-one, 0 * one[..., None], one, one[None] / 2)
            >>> system.discretize(torch.tensor([2.0])).kernel(2)
            tensor([[[1., 0.]]])
        """
        full = torch.complex128
        dt = dt.double()
        Lambda, P, B = (per_feature(v.to(full), len(dt)) for v in (self.Lambda, self.P, self.B))
        C = self.C.to(full)
        half = dt[:, None] / 2 * Lambda
        D = 1 / (1 - half)
        DP = D[..., None] * P
        P_star = P.mH
        eye = torch.eye(P.shape[-1], dtype=torch.float64, device=P.device)
        G = eye + dt[:, None, None] * (P_star @ DP).real
        inverse = torch.linalg.inv(G).to(full)
        projected = (2 * (P_star @ (D * B)[..., None]).real).to(full)
        Q_star = contract("g,grs,gsn,gn->grn", dt.to(full), inverse, P_star, D)
        b = dt[:, None] * D * B - contract("g,gnr,grs,gsi->gn", (dt * dt / 2).to(full), DP, inverse, projected)
        a = (1 + half) * D

        p, q = interleaved(DP, dim=-2), output_rows(Q_star)
        dense = DiscreteDense(add_rotation(-p @ q, a), interleaved(b), output_rows(C), dtype)
        return DiscreteDPLR(dense, Recurrence.of(a, p, q, dense.b, dense.c, dtype))

    def dense(self) -> Dense:
        """The same system in real form, with a dense state matrix; it is dissipative when the poles are stable."""
        real = Diagonal(self.Lambda, self.B, self.C).dense()
        P = interleaved(self.P, dim=-2)
        return real._replace(A=real.A - 2 * P @ P.mT)
