r"""The base of the layers with one linear system per feature: all parameters except those of the low-rank term."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks
from ..initializers import log_uniform
from ..ops.complex import from_pairs, to_pairs
from ..ops.precision import full_precision
from ..systems import DiscreteDiagonal, DiscreteDPLR, ForwardSystem, TwoSided
from .base import at_least_float32
from .statespace import StateSpaceLayer

__all__ = ["FeaturewiseLayer", "pair"]


def pair(z: Tensor) -> Tensor:
    """The complex tensor that pairs stand for, in complex128."""
    return from_pairs(z.double().contiguous())


class FeaturewiseLayer(StateSpaceLayer):
    r"""A linear state-space system with feedthrough for each feature, sampled with a step size of its own.

    .. math:: x'(t) = A x(t) + B u(t), \qquad y(t) = C x(t) + D u(t)

    Subclasses initialise and discretise it, and may add parameters of `A`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int,
        dt_min: float,
        dt_max: float,
        n_ssm: int | None,
        tie_dt: bool,
        channels: int,
        bidirectional: bool,
        dropout: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        name = type(self).__name__
        _checks.flags(name, tie_dt=tie_dt, bidirectional=bidirectional)
        _checks.integer(name, "d_model", d_model)
        state = (d_model, _checks.even(name, "d_state", d_state))
        d_output = _checks.integer(name, "channels", channels) * d_model
        super().__init__(d_model, d_output, None if bidirectional else state, dropout=dropout)
        self.d_model, self.d_state, self.channels = d_model, d_state, channels
        self.dt_min, self.dt_max = _checks.positive_range(name, "dt_min", dt_min, "dt_max", dt_max)
        self.n_ssm = d_model if n_ssm is None else _checks.integer(name, "n_ssm", n_ssm)
        if d_model % self.n_ssm:
            raise ValueError(f"{name}: `n_ssm` must divide `d_model`, got {n_ssm} and {d_model}.")
        self.tie_dt = tie_dt
        self.bidirectional = bidirectional

        given = _checks.given(name, device, dtype)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **given))

        S, n = self.n_ssm, d_state // 2
        self.log_dt = parameter(S if tie_dt else d_model)
        self.log_A_real = parameter(S, n)
        self.A_imag = parameter(S, n)
        self.B = parameter(S, n, 2)
        self.C = parameter((1 + bidirectional) * channels, d_model, n, 2)
        self.D = parameter(channels, d_model)

    def _reset_shared(self, Lambda: Tensor, B: Tensor) -> None:
        """Initialises the parameters: poles and input gains from one system, the others at random."""
        _checks.holds(type(self).__name__, self.A_imag.dtype, Lambda.imag, B)
        with torch.no_grad():
            self.log_dt.copy_(log_uniform(tuple(self.log_dt.shape), self.dt_min, self.dt_max))
            self.log_A_real.copy_((-Lambda.real).log().expand_as(self.log_A_real))
            self.A_imag.copy_(Lambda.imag.expand_as(self.A_imag))
            self.B.copy_(to_pairs(B).expand_as(self.B))
            # Standard complex normal numbers: real and imaginary part have variance 1/2.
            self.C.copy_(torch.randn(self.C.shape) * 0.5**0.5)
            self.D.copy_(torch.randn(self.D.shape))

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialises all parameters."""

    @abstractmethod
    def _discretize(self, dt: Tensor, dtype: torch.dtype, D: Tensor) -> DiscreteDiagonal | DiscreteDPLR:
        """The discrete system for step sizes dt, in a working dtype, with the feedthrough D for all outputs."""

    @property
    def _poles(self) -> Tensor:
        """Poles in the open left half plane, complex128."""
        return torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())

    def discretize(self, rate: float) -> ForwardSystem:
        """Makes the discrete system of the current weights, with gradients to them.

        Arguments:
            rate: The factor of the step size.

        Returns:
            The discrete system.
        """
        # The outputs that look ahead begin at the next sample, and have no feedthrough.
        D = F.pad(self.D, (0, 0, 0, self.channels)) if self.bidirectional else self.D
        system = self._discretize(self.log_dt.double().exp() * rate, at_least_float32(self.C.dtype), D)
        return TwoSided(system) if self.bidirectional else system

    def fits(self, system: Any) -> bool:
        """Whether a system can be this layer's, by its kind, its widths and the shape of its state."""
        if not self.bidirectional:
            return super().fits(system)
        inside = system.system if isinstance(system, TwoSided) else None
        shapes = (self.d_input, 2 * self.d_output, (self.d_model, self.d_state))
        return isinstance(inside, self.SYSTEM) and inside.shapes == shapes

    def _refuse(self, method: str) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__}: `{method}` needs a causal layer, and this one is bidirectional: its output "
            "depends on the future. Use `forward`, or `bidirectional=False`."
        )

    def kernel(self, L: int, system: DiscreteDiagonal | DiscreteDPLR | TwoSided | None = None) -> Tensor:
        r"""The convolution kernel.

        Arguments:
            L: Its length.
            system: What :meth:`system` returned; by default it is made here.

        Returns:
            The response to an impulse, without `D`, with shape :math:`(channels, H, L)`; for a bidirectional layer
            :math:`(2 \cdot channels, H, L)`, first the channels that look back, then those that look ahead.

        Raises:
            ValueError: If `L` is negative, or the system has time stamps.
        """
        _checks.integer(type(self).__name__, "L", L, least=0)
        with full_precision(self.C.device.type):
            system = self.given(system)
            if system.time_stamps is not None:
                raise ValueError(
                    f"{type(self).__name__}: `kernel` needs a system of one rate, got one with a tensor of rates, with "
                    "which the response depends on the time of the impulse; use `forward`."
                )
            k: Tensor = system.kernel(L)
        return k

    def extra_repr(self) -> str:
        """The main arguments, and others if they are set."""
        shown = [f"{self.d_model}, d_state={self.d_state}"]
        if self.n_ssm != self.d_model:
            shown.append(f"n_ssm={self.n_ssm}, tie_dt={self.tie_dt}")
        if self.channels > 1:
            shown.append(f"channels={self.channels}")
        if self.bidirectional:
            shown.append("bidirectional=True")
        if self.dropout:
            shown.append(f"dropout={self.dropout}")
        return ", ".join(shown)
