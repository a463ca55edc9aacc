"""A system of heads with one decay each, whose step sizes and gains are a part of the input (Mamba-2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.ssd import ssd_scan
from .base import System, own, per_sample
from .words import Vector, Words

__all__ = ["Heads"]


@dataclass(frozen=True, eq=False)
class Heads(System):
    r"""H heads of width P, each with one decay and a state of :math:`P \times N`.

    .. math::
        h_k = e^{\Delta_k A} h_{k-1} + \Delta_k x_k B_k^\top, \qquad y_k = h_k C_k + D \circ x_k,
        \qquad \Delta_k = rate_k \cdot \mathrm{clip}(\mathrm{softplus}(r_k + b_\Delta))

    The input is :math:`[x_k, B_k, C_k, r_k]` with :math:`H P + 2 G N + H` numbers.

    References:
        | Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality
        | (Dao and Gu, 2024), Sections 5 to 7
        | https://arxiv.org/abs/2405.21060
    """

    A: Tensor
    """Poles, real and negative; shape (H)."""
    b_dt: Tensor
    """Bias of the step sizes, before the softplus; shape (H)."""
    D: Tensor
    """Feedthrough, in the working dtype; shape (H, P)."""
    d_state: int
    """N."""
    groups: int
    """G."""
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    """The least and the greatest step size, before the rate."""
    rate: float | Tensor = 1.0
    """The factor of all step sizes, or a tensor of the factors of every sample, (1, L) or (B, L), and :math:`(*)` for a
    step."""

    def __post_init__(self) -> None:
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        for name in ("A", "b_dt", "D", "rate"):
            if isinstance(getattr(self, name), Tensor):
                object.__setattr__(self, name, own(getattr(self, name), dtype))

    @property
    def d_input(self) -> int:
        """H P + 2 G N + H."""
        return self.D.numel() + 2 * self.groups * self.d_state + len(self.A)

    @property
    def d_output(self) -> int:
        """H P."""
        return self.D.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of D."""
        return self.D.dtype

    @property
    def state_shape(self) -> tuple[int, ...]:
        """(H, P, N)."""
        return (*self.D.shape, self.d_state)

    def _of_input(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (*, H, P), step sizes (*, H), B and C (*, G, N)."""
        gains = self.groups * self.d_state
        x, B, C, r = u.split([self.D.numel(), gains, gains, len(self.A)], dim=-1)
        dt = F.softplus(r + self.b_dt).clamp(*self.dt_limit) * per_sample(self.rate)
        B, C = (v.unflatten(-1, (self.groups, self.d_state)) for v in (B, C))
        return x.unflatten(-1, self.D.shape), dt, B, C

    def scan(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input (B, L, d_input) and state (B, H, P, N) to output (B, L, H P) and the next state; L at least 1."""
        v, dt, B, C = self._of_input(u)
        y, new = ssd_scan(dt[..., None] * v, dt * self.A, B, C, x)
        return torch.addcmul(y, self.D, v).flatten(-2), new

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input :math:`(*, d_{input})` and state to output :math:`(*, H P)` and the next state."""
        v, dt, B, C = self._of_input(u)
        B, C = (g.repeat_interleave(len(self.A) // self.groups, dim=-2)[..., None, :] for g in (B, C))
        decay = (dt * self.A).exp()[..., None, None]
        new = torch.addcmul(decay * x, (dt[..., None] * v)[..., None], B)
        return torch.addcmul((new * C).sum(-1), self.D, v).flatten(-2), new

    def write(self, words: Words, u: Vector) -> Vector:
        """One operation."""
        return words.heads(
            self.A,
            self.b_dt,
            self.D,
            u,
            d_state=self.d_state,
            groups=self.groups,
            dt_limit=self.dt_limit,
            rate=float(self.rate),
        )
