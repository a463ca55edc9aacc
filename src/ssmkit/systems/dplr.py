r"""Systems with a diagonal-plus-low-rank state matrix (S4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.complex import add_rotation, interleaved, output_rows
from ..ops.krylov import krylov
from .base import own
from .dense import Dense, DiscreteDense
from .diagonal import Diagonal
from .per_feature import LowRankSystem, group_rows, per_feature, ungroup

__all__ = ["DPLR", "DiscreteDPLR"]


@dataclass(frozen=True, eq=False)
class DiscreteDPLR(LowRankSystem):
    r"""A discrete system with a state matrix that is diagonal plus rank r.

    .. math:: s_k = a \circ s_{k-1} - p\, 2 \Re(q\, s_{k-1}) + b u_k, \qquad y_k = 2 \Re (c\, s_k) + D u_k

    For H features with C outputs each; G systems serve them, feature h uses system h mod G. States are the real
    tensors :math:`[\Re s_1, \Im s_1, \dots]`. A step costs O(N) per feature, and so does a sample in a scan; kernels
    are made from the dense real form.
    """

    a: Tensor
    """Poles, complex128; shape (G, N/2)."""
    p: Tensor
    """Columns of the low-rank part, complex128; shape (G, N/2, r)."""
    q: Tensor
    """Rows of the low-rank part, complex128; shape (G, r, N/2)."""
    b: Tensor
    """Input gains, complex128; shape (G, N/2)."""
    c: Tensor
    """Output gains, complex128; shape (C, H, N/2)."""
    D: Tensor
    """Feedthrough, in the working dtype; shape (C, H)."""

    def __post_init__(self) -> None:
        for name in ("a", "p", "q", "b", "c"):
            object.__setattr__(self, name, own(getattr(self, name), torch.complex128))
        object.__setattr__(self, "D", own(self.D))

    def low_rank_part(self) -> tuple[Tensor, Tensor]:
        """p and q."""
        return self.p, self.q

    def _matrix(self) -> Tensor:
        """The state matrix in real form; shape (G, N, N)."""
        return add_rotation(-interleaved(self.p, dim=-2) @ output_rows(self.q), self.a)

    @property
    def dense(self) -> DiscreteDense:
        """The same system in real form. Its N × N matrices are too large to keep, and are made at every call."""
        return DiscreteDense(self._matrix(), interleaved(self.b), output_rows(self.c), self.D)

    def kernel(self, L: int) -> Tensor:
        r"""The impulse response :math:`K_l = 2 \Re (c\, \bar A^l b)`, without D, with shape :math:`(C, H, L)`."""
        rows = group_rows(output_rows(self.c), len(self.a))
        return ungroup(krylov(self._matrix(), interleaved(self.b), rows, L, dtype=self.dtype), len(self.c))


class DPLR(NamedTuple):
    r"""A continuous system :math:`s' = (\Lambda - P P^*) s + B u`, :math:`y = 2 \Re (C s)`.

    One of each conjugate pair is kept; :math:`P^* s` is a sum over both, which is :math:`2 \Re(P^* s)` over those that
    are kept. Feature h of H uses system h mod S. With :math:`\Re\Lambda < 0` the system is stable for every :math:`P`.
    """

    Lambda: Tensor
    """Poles, complex, in 1/time; shape (S, N/2)."""
    P: Tensor
    """Low-rank term, complex; shape (S, N/2, r)."""
    B: Tensor
    """Input gains, complex; shape (S, N/2)."""
    C: Tensor
    """Output gains, complex; shape (channels, H, N/2)."""

    def discretize(self, dt: Tensor, dtype: torch.dtype = torch.float32, D: Tensor | None = None) -> DiscreteDPLR:
        r"""Samples the system every `dt` by the bilinear rule, which keeps it diagonal plus rank r.

        With :math:`D = (I - \tfrac\Delta2 \Lambda)^{-1}` and :math:`G = I + \tfrac\Delta2\, 2\Re(P^* D P)`, a real
        :math:`r \times r` matrix, Woodbury's identity gives

        .. math::
            \bar A &= D (I + \tfrac\Delta2 \Lambda) - (D P) Q^*, \qquad Q^* = \Delta\, G^{-1} P^* D, \\
            \bar B &= \Delta \left( D B - \tfrac\Delta2 D P G^{-1}\, 2\Re(P^* D B) \right),

        where :math:`Q^* s` stands for :math:`2\Re(Q^* s)`. Only :math:`G` has to be inverted.

        References:
            | Efficiently Modeling Long Sequences with Structured State Spaces (Gu et al., 2022), Appendix C.2
            | https://arxiv.org/abs/2111.00396

        Arguments:
            dt: Steps :math:`\Delta`, in the time unit of `Lambda`, with shape :math:`(G)`, `G` a multiple of `S`.
            dtype: The working dtype of the result.
            D: Feedthrough, with shape :math:`(channels, H)`, by default zero.

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
        half = dt[:, None] / 2 * Lambda
        solved = 1 / (1 - half)
        p = solved[..., None] * P
        P_star = P.mH
        eye = torch.eye(P.shape[-1], dtype=torch.float64, device=P.device)
        G = eye + dt[:, None, None] * (P_star @ p).real
        inverse = torch.linalg.inv(G).to(full)
        projected = (2 * (P_star @ (solved * B)[..., None]).real).to(full)
        # torch takes the order of the products from opt_einsum, whose own `contract` torch.compile cannot trace.
        q = torch.einsum("g,grs,gsn,gn->grn", dt.to(full), inverse, P_star, solved)
        b = dt[:, None] * solved * B - torch.einsum("g,gnr,grs,gsi->gn", (dt * dt / 2).to(full), p, inverse, projected)
        D = dt.new_zeros(self.C.shape[:2]) if D is None else D
        return DiscreteDPLR((1 + half) * solved, p, q, b, self.C, D.to(dtype))

    def dense(self) -> Dense:
        """The same system in real form, with a dense state matrix; it is dissipative when the poles are stable."""
        real = Diagonal(self.Lambda, self.B, self.C).dense()
        P = interleaved(self.P, dim=-2)
        return real._replace(A=real.A - 2 * P @ P.mT)
