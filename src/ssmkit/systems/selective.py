"""A diagonal system whose step sizes and gains come from its input (S6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.selective import selective_scan
from .base import System, own, per_sample
from .words import Vector, Words

__all__ = ["Selective"]


@dataclass(frozen=True, eq=False)
class Selective(System):
    r"""A diagonal system per feature whose step sizes and gains are linear functions of the input.

    .. math::
        h_k &= e^{\Delta_k A} \circ h_{k-1} + (\Delta_k \circ u_k) B_k^\top, \qquad y_k = h_k C_k + D \circ u_k, \\
        \Delta_k &= rate_k \cdot \mathrm{softplus}(W_\Delta r_k + b_\Delta), \qquad [r_k, B_k, C_k] = W u_k

    With E features, N states each, G groups of features that share :math:`B_k` and :math:`C_k`, and :math:`\Delta` of
    rank R. Gains that are given as tensors are constant, and W has no rows for them.

    References:
        | Mamba: Linear-Time Sequence Modeling with Selective State Spaces (Gu and Dao, 2023), Section 3.2
        | https://arxiv.org/abs/2312.00752
    """

    A: Tensor
    """Poles, real and negative; shape (E, N)."""
    W: Tensor
    """The map of the input; shape (R + G N for each of B and C that varies, E)."""
    W_dt: Tensor
    """The map from the R numbers to step sizes; shape (E, R)."""
    b_dt: Tensor
    """Bias of the step sizes, before the softplus; shape (E)."""
    D: Tensor
    """Feedthrough, in the working dtype; shape (E)."""
    B: Tensor | None = None
    """Constant input gains, or None; shape (E, N)."""
    C: Tensor | None = None
    """Constant output gains, or None; shape (E, N)."""
    groups: int = 1
    """G."""
    rate: float | Tensor = 1.0
    """The factor of all step sizes, or a tensor of the factors of every sample, (1, L) or (B, L), and :math:`(*)` for a
    step."""

    def __post_init__(self) -> None:
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        for name in ("A", "W", "W_dt", "b_dt", "D", "B", "C", "rate"):
            if isinstance(getattr(self, name), Tensor):
                object.__setattr__(self, name, own(getattr(self, name), dtype))

    @property
    def d_input(self) -> int:
        """E."""
        return self.A.shape[0]

    @property
    def d_output(self) -> int:
        """E."""
        return self.A.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of D."""
        return self.D.dtype

    @property
    def state_shape(self) -> tuple[int, ...]:
        """(E, N)."""
        return tuple(self.A.shape)

    def _of_input(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes (*, E), and gains (*, G, N), or (E, N) if they are constant."""
        W, W_dt, b_dt = (v.to(u.dtype) for v in (self.W, self.W_dt, self.b_dt))
        found = F.linear(u, W)
        R = W_dt.shape[1]
        dt = F.softplus(F.linear(found[..., :R], W_dt, b_dt)) * per_sample(self.rate)
        varying = list(found[..., R:].unflatten(-1, (-1, self.groups, self.A.shape[1])).unbind(-3))
        gains = [varying.pop(0) if fixed is None else fixed for fixed in (self.B, self.C)]
        return dt, gains[0], gains[1]

    def scan(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input (B, L, E) and state (B, E, N) to output (B, L, E) and the next state; L at least 1."""
        dt, B, C = self._of_input(u)
        y, new = selective_scan(u, dt, self.A, B, C, x)
        return torch.addcmul(y, self.D, u), new

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input :math:`(*, E)` and state :math:`(*, E, N)` to output :math:`(*, E)` and the next state."""
        dt, B, C = self._of_input(u)
        E = u.shape[-1]
        B, C = (_per_feature(v, E) if fixed is None else v for v, fixed in ((B, self.B), (C, self.C)))
        new = (dt[..., None] * self.A).exp() * x + (dt * u)[..., None] * B
        return torch.addcmul((new * C).sum(-1), self.D, u), new

    def write(self, words: Words, u: Vector) -> Vector:
        """Linear maps for step sizes and gains, and the recurrence."""
        R, gains = self.W_dt.shape[1], self.groups * self.A.shape[1]
        dt = words.softplus(words.linear(self.W_dt, words.linear(self.W[:R], u), self.b_dt))
        if self.rate != 1:
            dt = words.scale(self.b_dt.new_full(self.b_dt.shape, float(self.rate)), dt)
        rows = iter(self.W[R:].split(gains))
        B, C = (words.linear(next(rows), u) if fixed is None else fixed for fixed in (self.B, self.C))
        return words.select(self.A, dt, B, C, self.D, u, self.groups)


def _per_feature(gains: Tensor, E: int) -> Tensor:
    """Repeats gains (*, G, N) of groups, so that they broadcast with (*, E, N)."""
    return gains if gains.shape[-2] == 1 else gains.repeat_interleave(E // gains.shape[-2], dim=-2)
