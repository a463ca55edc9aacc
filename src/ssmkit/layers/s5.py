r"""S5: a state-space layer with several inputs and outputs, and one diagonal state matrix for all of them."""

from __future__ import annotations

from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn

from .. import _checks, hippo
from ..initializers import log_uniform
from ..ops.complex import to_pairs
from ..systems import BothWays, ForwardSystem, SharedDiagonal, TimedShared
from ..systems.diagonal import DISCRETIZATIONS, Discretization, discretized
from .featurewise import pair
from .statespace import StateSpaceLayer

__all__ = ["S5"]

_LARGEST_REAL = -1e-4
"""As in the authors' code."""


@final
class S5(StateSpaceLayer):
    r"""Simplified state-space layer (S5): one system that all features read and write.

    .. math:: s'(t) = \Lambda \circ s(t) + B u(t), \qquad y(t) = 2 \Re\, C s(t) + D \circ u(t),

    with :math:`s` one of each conjugate pair of a real state of size :math:`N`, and a step size :math:`\Delta_n` for
    each pair. While :class:`ssmkit.S4D` filters each feature separately, with :math:`N` numbers of state each, S5 mixes
    features inside the layer, and its whole state has only :math:`N` numbers. A sample costs :math:`O(N H)`, like a
    linear map.

    References:
        | Simplified State Space Layers for Sequence Modeling (Smith et al., 2023), Section 3 and Appendix B
        | https://arxiv.org/abs/2208.04933

    :math:`B` and :math:`C` start as in the authors' code (`lindermanlab/S5`): real LeCun-normal :math:`\tilde B` and
    complex :math:`\tilde C` with variances :math:`1/N` in the basis of HiPPO, and :math:`B = V^* \tilde B`,
    :math:`C = \tilde C V`.

    Arguments:
        d_model: The number of features :math:`H`.
        d_state: The size :math:`N` of the real state, even, as poles come in conjugate pairs.
        blocks: The number of equal parts of the state; each starts at the poles of HiPPO-LegS of its size, without the
            low-rank term (HiPPO-N).
        dt_min, dt_max: The range of the initial :math:`\Delta`, log-uniform.
        discretization: `"zoh"`, `"bilinear"`, or a function like :func:`ssmkit.systems.zoh`.
        clip_eigs: Whether :math:`\Re \Lambda` is clipped to at most -1e-4, so that training cannot make the system
            unstable. (In the authors' code this is off by default.)
        bidirectional: Whether a second :math:`C` reads the states of the reversed sequence; such a layer has only
            :meth:`forward`.
        dropout: The probability with which outputs are zeroed in training.
        device, dtype: Of the parameters; a real dtype.

    Shapes:
        - forward: `u` :math:`(*, L, H)` to `y` :math:`(*, L, H)`, any :math:`L \geq 0`.
        - step: `u` :math:`(*, H)` and a state to `y` :math:`(*, H)` and the next state.
        - scan: as forward, with a state in and out.
        - state: :math:`(*, N)`, real and imaginary parts interleaved.

    Units:
        :math:`\Delta` is in the time unit of :math:`\Lambda`, in 1 / unit: a step is :math:`\Delta \cdot rate` long.
        For samples at irregular times, `rate` is a tensor.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If `d_state` is not a positive multiple of `2 blocks`, `dt_min >= dt_max`, or `discretization` is
            unknown.

    Example:
        >>> layer = ssmkit.S5(8, d_state=32, blocks=4)
        >>> layer(torch.randn(2, 50, 8)).shape, layer.initial_state(2).shape
        (torch.Size([2, 50, 8]), torch.Size([2, 32]))
        >>> ssmkit.S5(8, d_state=32, blocks=3)
        Traceback (most recent call last):
            ...
        ValueError: S5: `d_state` must be a multiple of 2 `blocks` (each has conjugate pairs), got 32 and 3.
    """

    SSM_PARAMETERS: ClassVar[tuple[str, ...]] = ("A_real", "A_imag", "B", "log_dt")

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        blocks: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        discretization: str | Discretization = "zoh",
        clip_eigs: bool = True,
        bidirectional: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checks.flags("S5", clip_eigs=clip_eigs, bidirectional=bidirectional)
        _checks.integer("S5", "d_model", d_model)
        _checks.even("S5", "d_state", d_state)
        if d_state % (2 * _checks.integer("S5", "blocks", blocks)):
            raise ValueError(
                "S5: `d_state` must be a multiple of 2 `blocks` (each has conjugate pairs), "
                f"got {d_state} and {blocks}."
            )
        super().__init__(d_model, d_model, None if bidirectional else (d_state,), dropout=dropout)
        self.d_model, self.d_state, self.blocks = d_model, d_state, blocks
        self.dt_min, self.dt_max = _checks.positive_range("S5", "dt_min", dt_min, "dt_max", dt_max)
        _checks.choice("S5", "discretization", discretization, DISCRETIZATIONS)
        self.discretization, self.clip_eigs, self.bidirectional = discretization, clip_eigs, bidirectional

        given = _checks.given("S5", device, dtype)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **given))

        n = d_state // 2
        self.A_real, self.A_imag, self.log_dt = parameter(n), parameter(n), parameter(n)
        self.B = parameter(n, d_model, 2)
        self.C = parameter(1 + bidirectional, d_model, n, 2)
        self.D = parameter(d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all parameters."""
        N, J = self.d_state, self.blocks
        part = N // J
        A, b = hippo.legs(part)
        Lambda, _, _, V = hippo.diagonalize(A, b, hippo.low_rank_correction(A, hippo.legs))
        half = torch.from_numpy(np.ascontiguousarray(V[:, : part // 2]))
        with torch.no_grad():
            poles = torch.from_numpy(Lambda[: part // 2]).repeat(J)
            _checks.holds("S5", self.A_imag.dtype, poles.imag)
            self.A_real.copy_(poles.real)
            self.A_imag.copy_(poles.imag)
            self.log_dt.copy_(log_uniform((N // 2,), self.dt_min, self.dt_max))
            B = _lecun_normal(J, part, self.d_model, fan=N)
            self.B.copy_(to_pairs(half.mH @ B.to(half.dtype)).flatten(0, 1))
            C = torch.view_as_complex(_lecun_normal(len(self.C), self.d_model, J, part, 2, fan=N))
            self.C.copy_(to_pairs((C @ half).flatten(-2)))
            self.D.copy_(torch.randn(self.D.shape))

    def discretize(self, rate: float) -> ForwardSystem:
        """Makes the discrete system of the current weights, with gradients to them.

        Arguments:
            rate: The factor of the step size.

        Returns:
            The system.
        """
        Lambda = self._poles
        a, gain = discretized(self._rule, Lambda, torch.ones_like(Lambda), self.log_dt.double().exp() * rate)
        B, C = gain[:, None] * pair(self.B), 2 * pair(self.C)
        past = SharedDiagonal(a, B, C[0], self.D)
        return BothWays(past, SharedDiagonal(a, B, C[1], torch.zeros_like(self.D))) if self.bidirectional else past

    def timed(self, rate: Tensor) -> TimedShared:
        """Makes the system for samples at irregular times, with gradients to the weights and to the rates.

        Arguments:
            rate: For each sample the interval that ends at it, in steps, with shape :math:`(*, L)`, or :math:`(*)` for
                a step.

        Returns:
            The system.
        """
        dt = self.log_dt.double().exp()
        return TimedShared(self._poles, pair(self.B), 2 * pair(self.C[0]), self.D, dt, rate, self._rule)

    @property
    def _rule(self) -> Discretization:
        return DISCRETIZATIONS[self.discretization] if isinstance(self.discretization, str) else self.discretization

    @property
    def _poles(self) -> Tensor:
        real = self.A_real.double()
        return torch.complex(real.clamp(max=_LARGEST_REAL) if self.clip_eigs else real, self.A_imag.double())

    def extra_repr(self) -> str:
        """The main arguments, and others if they are set."""
        shown = [f"{self.d_model}, d_state={self.d_state}"]
        if self.blocks > 1:
            shown.append(f"blocks={self.blocks}")
        if self.bidirectional:
            shown.append("bidirectional=True")
        if self.dropout:
            shown.append(f"dropout={self.dropout}")
        return ", ".join(shown)


def _lecun_normal(*shape: int, fan: int) -> Tensor:
    """Normal numbers truncated at two standard deviations, with variance 1 / fan, in float64."""
    x = torch.empty(shape, dtype=torch.double)
    # Truncation multiplies the standard deviation by 0.8796.
    nn.init.trunc_normal_(x, a=-2.0, b=2.0)
    return x.div_(0.87962566103423978 * fan**0.5)
