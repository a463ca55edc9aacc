"""Systems whose output depends on the past and the future."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.conv import two_sided_conv
from .base import ForwardSystem, System
from .per_feature import PerFeature, add_direct

__all__ = ["BothWays", "TwoSided"]


@dataclass(frozen=True, eq=False)
class TwoSided(ForwardSystem):
    r"""One system per feature whose outputs are two halves, which are added: one of the past, one of the future.

    .. math:: y_k = \sum_{j \le k} K_{k-j} u_j + \sum_{j > k} K'_{j-k-1} u_j + D u_k

    Example:
        >>> system = ssmkit.S4D(4, d_state=8, bidirectional=True).system()
        >>> system.kernel(5).shape
        torch.Size([2, 4, 5])
    """

    system: PerFeature
    """Its first outputs have the kernel K and the feedthrough D, the others the kernel K'."""

    @property
    def d_input(self) -> int:
        """H."""
        return self.system.d_input

    @property
    def d_output(self) -> int:
        """Half of the outputs of the system."""
        return self.system.d_output // 2

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the system."""
        return self.system.dtype

    def kernel(self, L: int) -> Tensor:
        """The responses of the past, then of the future, without D; shape (2 C, H, L)."""
        return self.system.kernel(L)

    def forward(self, u: Tensor) -> Tensor:
        """Input (B, L, H) to output (B, L, C H); L at least 1."""
        past, future = self.kernel(int(u.shape[1])).chunk(2)
        return two_sided_conv(u, add_direct(past, self.system.D[: len(past)]), future)


@dataclass(frozen=True, eq=False)
class BothWays(ForwardSystem):
    r"""Two systems that read the same input, one of them backwards; their outputs are added.

    .. math:: y = f(u) + R\, g(R u), \qquad (R u)_k = u_{L-1-k}

    Both use the present sample.

    Raises:
        ValueError: If the widths differ.

    Example:
        >>> system = ssmkit.S5(4, bidirectional=True).system()
        >>> u = torch.randn(1, 9, 4)
        >>> torch.equal(system.forward(u), system.past.forward(u) + system.future.forward(u.flip(1)).flip(1))
        True
    """

    past: System
    """f."""
    future: System
    """g."""

    def __post_init__(self) -> None:
        widths = [(system.d_input, system.d_output) for system in (self.past, self.future)]
        if widths[0] != widths[1]:
            raise ValueError(f"BothWays: the systems must have the same widths, got {widths[0]} and {widths[1]}.")

    @property
    def d_input(self) -> int:
        """The input width of both systems."""
        return self.past.d_input

    @property
    def d_output(self) -> int:
        """The output width of both systems."""
        return self.past.d_output

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the system that runs forwards."""
        return self.past.dtype

    def forward(self, u: Tensor) -> Tensor:
        """Input (B, L, d_input) to output (B, L, d_output); L at least 1."""
        return self.past.forward(u) + self.future.forward(u.flip(1)).flip(1)
