r"""LRU: the linear recurrent unit."""

from __future__ import annotations

import math
from typing import ClassVar, NoReturn, final

import torch
from torch import Tensor, nn

from .. import _checks
from ..systems import SharedDiagonal
from .featurewise import pair
from .statespace import StateSpaceLayer

__all__ = ["LRU"]


@final
class LRU(StateSpaceLayer):
    r"""Linear recurrent unit: one diagonal complex recurrence that all features read and write.

    .. math:: s_k = \lambda \circ s_{k-1} + \gamma \circ (B u_k), \qquad y_k = \Re (C s_k) + D \circ u_k,
        \qquad \lambda = \exp(-e^{\nu} + i e^{\theta})

    with :math:`\nu, \theta, \log \gamma, B, C, D` learnt: :math:`|\lambda| < 1` for all parameters. It has no step
    size, so that it is learnt for one sampling rate. Features are mixed inside the layer, and a sample costs
    :math:`O(N H)`, like a linear map. Choose it over :class:`ssmkit.S5` if time has no unit, or to set the memory
    directly, by the radius of the poles.

    References:
        | Resurrecting Recurrent Neural Networks for Long Sequences (Orvieto et al., 2023), Section 3 and Appendix A
        | https://arxiv.org/abs/2303.06349

    Arguments:
        d_model: The number of features :math:`H`.
        d_state: The size :math:`N` of the real state, even: it holds :math:`N/2` complex numbers. (The paper counts the
            complex ones.)
        r_min, r_max: The ring in which :math:`\lambda` starts, uniform by area: :math:`0 \le r_{min} < r_{max} \le 1`.
            A memory of :math:`m` samples needs :math:`|\lambda|` of about :math:`1 - 1/m`.
        max_phase: The largest initial phase of :math:`\lambda`, in radians per sample; smaller for long sequences.
        dropout: The probability with which outputs are zeroed in training.
        device, dtype: Of the parameters; a real dtype.

    Shapes:
        - forward: `u` :math:`(*, L, H)` to `y` :math:`(*, L, H)`, any :math:`L \geq 0`.
        - step: `u` :math:`(*, H)` and a state to `y` :math:`(*, H)` and the next state.
        - scan: as forward, with a state in and out.
        - state: :math:`(*, N)`, real and imaginary parts interleaved.

    Units:
        Per sample: the layer has no step size, and refuses any `rate` but 1.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If `d_state` is not a positive even integer, or the ring or the phase is out of range.

    Example:
        >>> layer = ssmkit.LRU(8, d_state=32, r_min=0.9, r_max=0.999, max_phase=0.314)
        >>> layer(torch.randn(2, 50, 8)).shape
        torch.Size([2, 50, 8])
        >>> ssmkit.LRU(8).system(2.0)
        Traceback (most recent call last):
            ...
        ValueError: LRU: `rate` must be 1, since this layer has no step size, got 2.0; S5 and S4D have one.
    """

    SSM_PARAMETERS: ClassVar[tuple[str, ...]] = ("nu_log", "theta_log", "gamma_log", "B")
    SYSTEM = SharedDiagonal

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checks.integer("LRU", "d_model", d_model)
        _checks.even("LRU", "d_state", d_state)
        super().__init__(d_model, d_model, (d_state,), dropout=dropout)
        self.d_model, self.d_state = d_model, d_state
        self.r_min = _checks.at_least("LRU", "r_min", r_min, 0.0)
        _checks.less("LRU", "r_min", r_min, "r_max", _checks.number("LRU", "r_max", r_max))
        if r_max > 1:
            raise ValueError(
                f"LRU: `r_max` must be at most 1, since poles outside of the unit circle grow, got {r_max}."
            )
        self.r_max, self.max_phase = r_max, _checks.positive("LRU", "max_phase", max_phase)

        given = _checks.given("LRU", device, dtype)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **given))

        n = d_state // 2
        self.nu_log, self.theta_log, self.gamma_log = parameter(n), parameter(n), parameter(n)
        self.B = parameter(n, d_model, 2)
        self.C = parameter(d_model, n, 2)
        self.D = parameter(d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all parameters."""
        n = self.d_state // 2
        with torch.no_grad():
            # 1 - u lies in (0, 1], so that neither logarithm is infinite: the radius is neither 0 nor 1.
            uniform = (1 - torch.rand(2, n, dtype=torch.double)).clamp(1e-9, 1 - 1e-9)
            nu = -0.5 * torch.log(uniform[0] * (self.r_max**2 - self.r_min**2) + self.r_min**2)
            self.nu_log.copy_(nu.log())
            self.theta_log.copy_((self.max_phase * uniform[1]).log())
            self.gamma_log.copy_(0.5 * torch.log(-torch.expm1(-2 * nu)))
            self.B.copy_(torch.randn(self.B.shape) / (2 * self.d_model) ** 0.5)
            self.C.copy_(torch.randn(self.C.shape) / n**0.5)
            self.D.copy_(torch.randn(self.D.shape))

    def discretize(self, rate: float) -> SharedDiagonal:
        """Makes the system of the current weights, with gradients to them.

        Arguments:
            rate: 1, as the layer has no step size.

        Returns:
            The system.

        Raises:
            ValueError: If `rate` is not 1.
        """
        if rate != 1:
            raise ValueError(
                f"LRU: `rate` must be 1, since this layer has no step size, got {rate}; S5 and S4D have one."
            )
        nu, theta, gamma = (x.double().exp() for x in (self.nu_log, self.theta_log, self.gamma_log))
        a = torch.polar(torch.exp(-nu), theta)
        return SharedDiagonal(a, gamma[:, None] * pair(self.B), pair(self.C), self.D)

    def timed(self, rate: Tensor) -> NoReturn:
        """Refuses."""
        raise ValueError("LRU: `rate` must be 1, since this layer has no step size, got a tensor; S5 and S4D have one.")

    def extra_repr(self) -> str:
        """The main arguments, and others if they are set."""
        shown = f"{self.d_model}, d_state={self.d_state}, r_min={self.r_min}, r_max={self.r_max}"
        return shown + (f", dropout={self.dropout}" if self.dropout else "")
