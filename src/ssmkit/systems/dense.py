r"""Systems with a dense real state matrix: tests compare the structured ones with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..ops.krylov import krylov, krylov_columns, krylov_rows, squares
from ..ops.scan import Chunk, chunk_length, scan_chunks
from .base import own
from .per_feature import PerFeature, add_direct, group_rows, per_feature, ungroup

__all__ = ["Dense", "DiscreteDense", "dense_bilinear", "dense_zoh"]


def dense_bilinear(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    r"""Discretises a dense system by the bilinear (Tustin) rule.

    .. math:: \bar A = (I - \tfrac\Delta2 A)^{-1} (I + \tfrac\Delta2 A), \qquad
        \bar B = (I - \tfrac\Delta2 A)^{-1} \Delta B

    Its error falls with the square of :math:`\Delta`; a stable system stays stable at any :math:`\Delta`.

    References:
        | Efficiently Modeling Long Sequences with Structured State Spaces (Gu et al., 2022), Equation 3
        | https://arxiv.org/abs/2111.00396

    Arguments:
        A: State matrices, real, in 1/time, with shape :math:`(G, N, N)`.
        B: Input gains, with shape :math:`(G, N)`.
        dt: The step :math:`\Delta`, in the time unit of `A`, with shape :math:`(G)`.

    Returns:
        The pair :math:`(\bar A, \bar B)`, with shapes :math:`(G, N, N)` and :math:`(G, N)`.

    Example:
        >>> A, B = dense_bilinear(torch.tensor([[[-1.0]]]), torch.ones(1, 1), torch.tensor([2.0]))
        >>> A.item(), B.item()
        (0.0, 1.0)
    """
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    half = dt[:, None, None] / 2 * A
    right = torch.cat([eye + half, (dt[:, None] * B)[..., None]], dim=-1)
    # One system after another: batched LAPACK solves of large matrices sometimes hang on CPU builds of torch.
    solved = torch.stack([torch.linalg.solve(m, r) for m, r in zip((eye - half).unbind(0), right, strict=True)])
    return solved[..., :-1], solved[..., -1]


def dense_zoh(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    r"""Discretises a dense system by zero-order hold: exact for inputs that are constant over each step.

    .. math:: \exp\left( \Delta \begin{bmatrix} A & B \\ 0 & 0 \end{bmatrix} \right)
        = \begin{bmatrix} \bar A & \bar B \\ 0 & 1 \end{bmatrix}

    References:
        | Computing Integrals Involving the Matrix Exponential (Van Loan, 1978)
        | https://doi.org/10.1109/TAC.1978.1101743

    Arguments:
        A: State matrices, real, in 1/time, with shape :math:`(G, N, N)`.
        B: Input gains, with shape :math:`(G, N)`.
        dt: The step :math:`\Delta`, in the time unit of `A`, with shape :math:`(G)`.

    Returns:
        The pair :math:`(\bar A, \bar B)`, with shapes :math:`(G, N, N)` and :math:`(G, N)`.

    Example:
        >>> A, B = dense_zoh(torch.zeros(1, 1, 1), torch.ones(1, 1), torch.tensor([0.5]))
        >>> A.item(), B.item()
        (1.0, 0.5)
    """
    top = torch.cat([A, B[..., None]], dim=-1)
    block = torch.cat([top, torch.zeros_like(top[..., :1, :])], dim=-2)
    grown = _matrix_expm1(dt[:, None, None] * block)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return eye + grown[..., :-1, :-1], grown[..., :-1, -1]


def _matrix_expm1(M: Tensor) -> Tensor:
    """exp(M) - I, by scaling and squaring of a Taylor polynomial.

    `torch.linalg.matrix_exp` loses up to four digits in float64 for norms between 1e-3 and 1e-2, which small steps
    have.
    """
    norm = float(torch.linalg.matrix_norm(M.detach(), 1).max())
    halvings = max(0, math.frexp(norm)[1] + 1)
    M = M / 2**halvings
    # At norms up to 1/2 the term of order 18 is below the rounding error of the first.
    total = term = M
    for order in range(2, 18):
        term = term @ M / order
        total = total + term
    for _ in range(halvings):
        # e^(2M) - 1 = 2 (e^M - 1) + (e^M - 1)²
        total = 2 * total + total @ total
    return total


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "bilinear": dense_bilinear,
    "zoh": dense_zoh,
}


@dataclass(frozen=True, eq=False)
class DiscreteDense(PerFeature):
    r"""A discrete system :math:`x_k = A x_{k-1} + b u_k`, :math:`y_k = c x_k + D u_k`.

    For H features with C outputs each; G systems serve them, feature h uses system h mod G.
    """

    A: Tensor
    """State matrices, float64; shape (G, N, N)."""
    b: Tensor
    """Input columns, float64; shape (G, N)."""
    c: Tensor
    """Output rows, float64; shape (C, H, N)."""
    D: Tensor
    """Feedthrough, in the working dtype; shape (C, H)."""

    def __post_init__(self) -> None:
        for name in ("A", "b", "c"):
            object.__setattr__(self, name, own(getattr(self, name), torch.double))
        object.__setattr__(self, "D", own(self.D))

    @property
    def state_shape(self) -> tuple[int, ...]:
        """(H, N)."""
        return tuple(self.c.shape[1:])

    def kernel(self, L: int) -> Tensor:
        r"""The impulse response :math:`K_l = c A^l b`, without D, with shape :math:`(C, H, L)`."""
        rows = krylov(self.A, self.b, group_rows(self.c, len(self.A)), L, dtype=self.dtype)
        return ungroup(rows, len(self.c))

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input :math:`(*, H)` and state :math:`(*, H, N)` to output :math:`(*, C H)` and the next state."""
        A, b = (per_feature(v, u.shape[-1]).to(x.dtype) for v in (self.A, self.b))
        new = (A @ x[..., None])[..., 0] + b * u[..., None]
        y = (self.c.to(x.dtype) * new[..., None, :, :]).sum(-1) + self.D.to(x.dtype) * u[..., None, :]
        return y.flatten(-2), new

    def scan(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input (B, L, H) and state (B, H, N) to output (B, L, C H) and the next state; L at least 1."""
        (C, H), T = self.D.shape, chunk_length(*u.shape[:2], kept=False, matrix=True)
        rows, table = group_rows(self.c, len(self.A)), squares(self.A, T.bit_length())
        columns = krylov_columns(table[:-1], self.b)
        chunk = Chunk.of(
            add_direct(ungroup(rows @ columns, C).to(self.dtype), self.D),
            ungroup(krylov_rows(table[:-1], rows @ self.A), C).to(self.dtype),
            per_feature(columns.flip(-1).mT.to(self.dtype), H),
            per_feature(table[-1].mT.to(self.dtype), H),
        )

        def advance(state: Tensor, m: int) -> Tensor:
            return state @ per_feature(torch.linalg.matrix_power(self.A, m).mT.to(self.dtype), H)

        return scan_chunks(u, x, chunk, advance)


class Dense(NamedTuple):
    r"""A continuous system :math:`x' = A x + B u`, :math:`y = C x`, with dense real matrices.

    Feature h of H uses system h mod S.
    """

    A: Tensor
    """State matrices, in 1/time; shape (S, N, N)."""
    B: Tensor
    """Input columns; shape (S, N)."""
    C: Tensor
    """Output rows; shape (channels, H, N)."""

    def discretize(
        self, dt: Tensor, method: str = "bilinear", dtype: torch.dtype | None = None, D: Tensor | None = None
    ) -> DiscreteDense:
        r"""Samples the system every `dt`.

        Arguments:
            dt: Steps :math:`\Delta`, in the time unit of `A`, with shape :math:`(G)`, `G` a multiple of `S`.
            method: `"bilinear"` or `"zoh"`.
            dtype: The working dtype of the result, by default that of `C`.
            D: Feedthrough, with shape :math:`(channels, H)`, by default zero.

        Returns:
            The discrete system.

        Raises:
            ValueError: If the method is unknown.

        Example:
            >>> system = Dense(-torch.ones(1, 1, 1), torch.ones(1, 1), torch.ones(1, 1, 1))
            >>> system.discretize(torch.tensor([2.0])).kernel(2)
            tensor([[[1., 0.]]])
        """
        _checks.known("Dense.discretize", "method", method, METHODS)
        A, B = (per_feature(v.double(), len(dt)) for v in (self.A, self.B))
        D = self.C.new_zeros(self.C.shape[:2]) if D is None else D
        return DiscreteDense(*METHODS[method](A, B, dt.double()), self.C, D.to(dtype or self.C.dtype))
