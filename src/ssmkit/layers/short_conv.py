r"""ShortConv: a causal convolution with a few taps per feature."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from .. import _checks
from ..systems import Taps
from .statespace import StateSpaceLayer

__all__ = ["ShortConv"]


@final
class ShortConv(StateSpaceLayer):
    r"""Causal depthwise convolution of a few taps.

    .. math:: y_{k} = \sum_{j=0}^{K-1} w_{j} \circ u_{k-K+1+j} + b

    Mamba, Mamba-2, Griffin, Hyena and Gated DeltaNet mix neighbouring samples in this way before their recurrence. The
    state is the last :math:`K - 1` inputs.

    References:
        | Hungry Hungry Hippos: Towards Language Modeling with State Space Models (Fu et al., 2023), Section 3.1
        | https://arxiv.org/abs/2212.14052
        | Mamba: Linear-Time Sequence Modeling with Selective State Spaces (Gu and Dao, 2023), Section 3.4
        | https://arxiv.org/abs/2312.00752

    Arguments:
        d_model: The number of features :math:`H`.
        d_conv: The number of taps :math:`K`.
        bias: Whether each feature has a bias :math:`b`.
        any_rate: Whether any `rate` is accepted, without effect: for blocks in which other layers have a step size,
            such as :class:`ssmkit.Mamba`.
        dropout: The probability with which outputs are zeroed in training.
        device, dtype: Of the parameters; a real dtype.

    Shapes:
        - forward: `u` :math:`(*, L, H)` to `y` :math:`(*, L, H)`, any :math:`L \geq 0`.
        - step: `u` :math:`(*, H)` and a state to `y` :math:`(*, H)` and the next state.
        - scan: as forward, with a state in and out.
        - state: :math:`(*, K - 1, H)`, the oldest input first.
        - `weight` :math:`(H, 1, K)` and `bias` :math:`(H)`: those of `torch.nn.Conv1d` with `groups=H`.

    Units:
        Taps count samples: the layer has no step size, and refuses any `rate` but 1, unless `any_rate` is set.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive.

    Example:
        >>> layer = ssmkit.ShortConv(8, d_conv=4)
        >>> layer(torch.randn(2, 50, 8)).shape
        torch.Size([2, 50, 8])
        >>> layer.initial_state(2).shape
        torch.Size([2, 3, 8])
    """

    SYSTEM = Taps

    def __init__(
        self,
        d_model: int,
        d_conv: int = 4,
        *,
        bias: bool = True,
        any_rate: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checks.flags("ShortConv", bias=bias, any_rate=any_rate)
        _checks.integer("ShortConv", "d_model", d_model)
        _checks.integer("ShortConv", "d_conv", d_conv)
        super().__init__(d_model, d_model, (d_conv - 1, d_model), dropout=dropout)
        self.d_model, self.d_conv, self.any_rate = d_model, d_conv, any_rate
        given = _checks.given("ShortConv", device, dtype)
        self.weight = nn.Parameter(torch.empty(d_model, 1, d_conv, **given))
        self.bias = nn.Parameter(torch.empty(d_model, **given)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        r"""Initialises all parameters: uniform in :math:`\pm 1 / \sqrt K`, as in `torch.nn.Conv1d`."""
        bound = self.d_conv**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def discretize(self, rate: float) -> Taps:
        """Makes the system of the current weights.

        Arguments:
            rate: 1, as taps count samples, unless `any_rate` is set.

        Returns:
            The taps.

        Raises:
            ValueError: If `rate` is not 1 and `any_rate` is not set.
        """
        if rate != 1 and not self.any_rate:
            raise ValueError(
                f"ShortConv: `rate` must be 1, as the taps count samples, got {rate}; set `any_rate` to accept others."
            )
        w = self.weight[:, 0].mT
        return Taps(w, w.new_zeros(self.d_model) if self.bias is None else self.bias)

    def timed(self, rate: Tensor) -> Taps:
        """The same taps for all intervals, if `any_rate` is set.

        Arguments:
            rate: What is accepted, and changes nothing.

        Returns:
            The taps.

        Raises:
            ValueError: Unless `any_rate` is set.
        """
        if not self.any_rate:
            raise ValueError(
                "ShortConv: `rate` must be 1, as the taps count samples, got a tensor; set `any_rate` to accept others."
            )
        return self.discretize(1.0)

    def extra_repr(self) -> str:
        """The main arguments, and others if they are set."""
        return f"{self.d_model}, d_conv={self.d_conv}" + ("" if self.bias is not None else ", bias=False")
