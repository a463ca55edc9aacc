"""A system of finite memory: a filter of a few taps for each feature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks
from .base import System, own
from .words import Vector, Words

__all__ = ["Taps"]


@dataclass(frozen=True, eq=False)
class Taps(System):
    r"""A causal filter per feature with K taps, whose state is its last :math:`K - 1` inputs.

    .. math:: y_k = \sum_{j=0}^{K-1} w_j \circ u_{k-K+1+j} + D

    Arguments:
        w: The taps, the last one for the present sample, with shape :math:`(K, H)`. Sequences and states are computed
            in its dtype, and at least in float32.
        D: What is added to every output, with shape :math:`(H)`.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> difference = Taps(torch.tensor([[-1.0], [1.0]]), torch.zeros(1))
        >>> y, state = difference.scan(torch.tensor([[[1.0], [4.0], [9.0]]]), difference.initial_state(1))
        >>> y.flatten(), state.flatten()
        (tensor([1., 3., 5.]), tensor([9.]))
    """

    w: Tensor
    """Taps, in the working dtype; shape (K, H)."""
    D: Tensor
    """Added to every output, in the working dtype; shape (H)."""

    def __post_init__(self) -> None:
        if self.w.ndim != 2 or self.D.shape != self.w.shape[1:] or not len(self.w):
            w, D = tuple(self.w.shape), tuple(self.D.shape)
            raise ValueError(f"Taps: `w` and `D` must have shapes (K, H) and (H,), got {w} and {D}.")
        dtype = torch.promote_types(_checks.floating("Taps", "w", self.w).dtype, torch.float32)
        object.__setattr__(self, "w", own(self.w, dtype))
        object.__setattr__(self, "D", own(self.D, dtype))

    @property
    def d_input(self) -> int:
        """H."""
        return self.w.shape[1]

    @property
    def d_output(self) -> int:
        """H."""
        return self.w.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the taps."""
        return self.w.dtype

    @property
    def state_shape(self) -> tuple[int, ...]:
        """The shape (K - 1, H) of the last inputs, the oldest first."""
        return (len(self.w) - 1, self.w.shape[1])

    def kernel(self, L: int) -> Tensor:
        """The impulse response, without D; shape (1, H, L)."""
        k = self.w.flip(0).mT[:, :L]
        return torch.nn.functional.pad(k, (0, L - k.shape[1]))[None]

    def scan(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input (B, L, H) and state (B, K - 1, H) to output (B, L, H) and the next state; L at least 1."""
        K, L = len(self.w), u.shape[1]
        both = torch.cat([x.to(u.dtype), u], dim=1)
        w, y = self.w.to(u.dtype), self.D.to(u.dtype)
        for j in range(K):
            y = torch.addcmul(y, w[j], both[:, j : j + L])
        # A copy: a view would keep the whole chunk in memory.
        return y, both[:, L:].to(x.dtype, copy=True)

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input :math:`(*, H)` and state :math:`(*, K - 1, H)` to output :math:`(*, H)` and the next state."""
        both = torch.cat([x, u[..., None, :]], dim=-2)
        return (self.w * both).sum(-2) + self.D, both[..., 1:, :]

    def write(self, words: Words, u: Vector) -> Vector:
        """One operation."""
        return words.taps(self.w, self.D, u)
