r"""What the linear state-space layers have in common: everything but their system's parameters."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks
from ..initializers import log_uniform
from ..ops.complex import from_pairs, to_pairs
from ..ops.conv import causal_conv, two_sided_conv
from ..states import State
from ..systems import DiscreteDiagonal, DiscreteDPLR
from ..systems.recurrence import add_direct
from .base import SequenceLayer, at_least_float32

__all__ = ["SSMLayer", "pair"]


def pair(z: Tensor) -> Tensor:
    """The complex tensor of a real one whose last axis holds real and imaginary part: a copy, in complex128."""
    return from_pairs(z.to(torch.double, memory_format=torch.contiguous_format, copy=True))


def _full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Switches autocast off where it is on: a context costs a step more than its arithmetic."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class SSMLayer(SequenceLayer):
    r"""A linear state-space system per feature, sampled with a step of its own, and a direct term.

    .. math:: x'(t) = A x(t) + B u(t), \qquad y(t) = C x(t) + D u(t)

    Subclasses own the parameters of `A` and `B` and discretise them; `C`, `D` and the step size are here.
    """

    SSM_PARAMETERS: ClassVar[tuple[str, ...]]
    """Names of the parameters that :func:`ssmkit.param_groups` gives a learning rate of their own."""
    SYSTEM: ClassVar[type[DiscreteDiagonal] | type[DiscreteDPLR]]
    """The kind of system that the layer makes."""

    d_input: int
    d_output: int

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
        super().__init__()
        name = type(self).__name__
        self.d_model = self.d_input = _checks.integer(name, "d_model", d_model)
        self.d_state = _checks.even(name, "d_state", d_state)
        self.dt_min = _checks.positive(name, "dt_min", dt_min)
        self.dt_max = _checks.positive(name, "dt_max", dt_max)
        _checks.less(name, "dt_min", dt_min, "dt_max", dt_max)
        self.n_ssm = d_model if n_ssm is None else _checks.integer(name, "n_ssm", n_ssm)
        if d_model % self.n_ssm:
            raise ValueError(f"{name}: `n_ssm` must divide `d_model`, got {n_ssm} and {d_model}.")
        self.tie_dt = tie_dt
        self.channels = _checks.integer(name, "channels", channels)
        self.d_output = channels * d_model
        self.bidirectional, self.causal = bidirectional, not bidirectional
        self.dropout = _checks.probability(name, "dropout", dropout)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=_checks.dtype(name, dtype)))

        S, n = self.n_ssm, d_state // 2
        self.log_dt = parameter(S if tie_dt else d_model)
        self.log_A_real = parameter(S, n)
        self.A_imag = parameter(S, n)
        self.B = parameter(S, n, 2)
        self.C = parameter((1 + bidirectional) * channels, d_model, n, 2)
        self.D = parameter(channels, d_model)

    def _reset_shared(self, Lambda: Tensor, B: Tensor) -> None:
        """Starts the parameters from the poles and gains of one system, and draws the random ones."""
        with torch.no_grad():
            self.log_dt.copy_(log_uniform(tuple(self.log_dt.shape), self.dt_min, self.dt_max))
            self.log_A_real.copy_((-Lambda.real).log().expand_as(self.log_A_real))
            self.A_imag.copy_(Lambda.imag.expand_as(self.A_imag))
            self.B.copy_(to_pairs(B).expand_as(self.B))
            # Standard complex normal numbers: variance 1/2 in each part.
            self.C.copy_(torch.randn(self.C.shape) * 0.5**0.5)
            self.D.copy_(torch.randn(self.D.shape))

    @abstractmethod
    def reset_parameters(self) -> None:
        """Starts all parameters anew."""

    @abstractmethod
    def _discretize(self, dt: Tensor, dtype: torch.dtype) -> DiscreteDiagonal | DiscreteDPLR:
        """The discrete system for step sizes dt."""

    @property
    def _poles(self) -> Tensor:
        """Poles in the open left half plane, complex128."""
        return torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())

    def system(self, rate: float = 1.0) -> DiscreteDiagonal | DiscreteDPLR:
        """Discretises the layer, from the weights as they are now; gradients flow through it to them.

        Arguments:
            rate: The factor of the step size: a layer trained at 16 kHz runs on 8 kHz audio at rate 2.

        Returns:
            The discrete system, a value with `kernel`, `step` and `scan`.

        Raises:
            ValueError: If `rate` is not positive.
        """
        _checks.positive(type(self).__name__, "rate", rate)
        with _full_precision(self.C.device.type):
            system = self._discretize(self.log_dt.double().exp() * rate, at_least_float32(self.C.dtype))
            return system._replace(recurrence=system.recurrence.with_direct(self.D))

    def _given(self, system: DiscreteDiagonal | DiscreteDPLR | None) -> DiscreteDiagonal | DiscreteDPLR:
        """The system to use: the one handed in, if it can be this layer's, or one made on the spot."""
        if system is None:
            return self.system()
        shape = (self.channels * (2 if self.bidirectional else 1), self.d_model, self.d_state)
        if not isinstance(system, self.SYSTEM) or system.recurrence.shape != shape:
            got = type(system).__name__
            if isinstance(system, (DiscreteDiagonal, DiscreteDPLR)):
                got += f" with outputs of shape {system.recurrence.shape}"
            raise ValueError(
                f"{type(self).__name__}: `system` must be what this layer's `system()` returns, a "
                f"{self.SYSTEM.__name__} with outputs of shape {shape}, got a {got}."
            )
        return system

    def kernel(self, L: int, system: DiscreteDiagonal | DiscreteDPLR | None = None) -> Tensor:
        """The convolution kernel, for those who look.

        Arguments:
            L: Its length.
            system: What :meth:`system` returned; by default made on the spot.

        Returns:
            The response to an impulse, without `D`, with shape :math:`(channels, H, L)`; of a bidirectional layer
            first the channels that look back, then those that look ahead.

        Raises:
            ValueError: If `L` is negative.
        """
        _checks.integer(type(self).__name__, "L", L, least=0)
        with _full_precision(self.C.device.type):
            return self._given(system).kernel(L)

    def initial_state(
        self, *batch_shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Makes a state at rest.

        Arguments:
            batch_shape: The batch axes of what is going to be run.
            device: By default that of the weights.
            dtype: By default that of the weights, and at least float32.

        Returns:
            Zeros with shape :math:`(*, H, N)`: real and imaginary parts of the complex state in turns.

        Raises:
            ValueError: If the layer is bidirectional.
        """
        self._refuse_bidirectional("initial_state")
        return torch.zeros(
            *batch_shape,
            self.d_model,
            self.d_state,
            device=self.C.device if device is None else device,
            dtype=at_least_float32(_checks.dtype(type(self).__name__, dtype) or self.C.dtype),
        )

    def forward(self, u: Tensor, system: DiscreteDiagonal | DiscreteDPLR | None = None) -> Tensor:
        """Maps a whole sequence, from rest, as a convolution with :meth:`kernel`.

        Arguments:
            u: The input, with shape :math:`(*, L, H)`; :math:`L = 0` gives an empty output.
            system: What :meth:`system` returned; by default made on the spot.

        Returns:
            The output, with shape :math:`(*, L, channels \\cdot H)`, channel outside and feature inside, in the dtype
            of `u`.

        Raises:
            TypeError: If `u` is not a real floating tensor.
            ValueError: If the last axis of `u` is not `d_model`.
        """
        _checks.sequence(type(self).__name__, "u", u, self.d_model)
        with _full_precision(u.device.type):
            v = u.to(at_least_float32(u.dtype))
            system = self._given(system)
            k = system.kernel(u.shape[-2])
            past = add_direct(k[: self.channels], system.recurrence.D)
            y = two_sided_conv(v, past, k[self.channels :]) if self.bidirectional else causal_conv(v, past)
        return F.dropout(y.to(u.dtype), self.dropout, self.training)

    def step(
        self, u: Tensor, state: State, system: DiscreteDiagonal | DiscreteDPLR | None = None
    ) -> tuple[Tensor, State]:
        """Maps one sample, as a recurrence. Writes to nothing.

        Arguments:
            u: The input, with shape :math:`(*, H)`.
            state: Where the stream has got to.
            system: What :meth:`system` returned; by default made on the spot. A loop should make it once.

        Returns:
            The output, with shape :math:`(*, channels \\cdot H)`, and the next state.

        Raises:
            TypeError: If `u` is not a real floating tensor.
            ValueError: If the last axis of `u` is not `d_model`, if the state is of another layer or batch shape, or if
                the layer is bidirectional.
        """
        shape = (*u.shape[:-1], self.d_model, self.d_state)
        fits = not self.bidirectional and u.is_floating_point() and u.shape[-1:] == shape[-2:-1]
        if not (fits and isinstance(state, Tensor) and state.shape == shape):
            # A step is short: what is wrong is looked for only if something is.
            self._refuse_bidirectional("step")
            _checks.floating(type(self).__name__, "u", u)
            _checks.last_axis(type(self).__name__, "u", u, self.d_model)
            state = _checks.state(type(self).__name__, state, shape)
        with _full_precision(u.device.type):
            system = self._given(system)
            dtype = system.recurrence.dtype
            y, x = system.step(u.to(dtype), state if state.dtype == dtype else state.to(dtype))
            y = y.flatten(-2).to(u.dtype)
        if x.dtype != state.dtype:
            x = x.to(state.dtype)
        return (F.dropout(y, self.dropout, self.training) if self.dropout else y), x

    def scan(
        self, u: Tensor, state: State, system: DiscreteDiagonal | DiscreteDPLR | None = None
    ) -> tuple[Tensor, State]:
        """Maps a chunk of any length in parallel, carrying the state.

        Arguments:
            u: The input, with shape :math:`(*, L, H)`; :math:`L = 0` gives an empty output and the same state.
            state: Where the stream has got to.
            system: What :meth:`system` returned; by default made on the spot.

        Returns:
            The output, with shape :math:`(*, L, channels \\cdot H)`, and the next state.

        Raises:
            TypeError: If `u` is not a real floating tensor.
            ValueError: If the last axis of `u` is not `d_model`, if the state is of another layer or batch shape, or if
                the layer is bidirectional.
        """
        name = type(self).__name__
        self._refuse_bidirectional("scan")
        _checks.sequence(name, "u", u, self.d_model)
        x = _checks.state(name, state, (*u.shape[:-2], self.d_model, self.d_state))
        if u.numel() == 0:
            return self.forward(u, system), x
        with _full_precision(u.device.type):
            system = self._given(system)
            v, start = u.to(system.recurrence.dtype), x.to(system.recurrence.dtype)
            y, new = system.scan(v.reshape(-1, *v.shape[-2:]), start.reshape(-1, *x.shape[-2:]))
            y = y.reshape(*u.shape[:-1], self.d_output)
        return F.dropout(y.to(u.dtype), self.dropout, self.training), new.reshape(x.shape).to(x.dtype)

    def _refuse_bidirectional(self, method: str) -> None:
        if self.bidirectional:
            raise ValueError(
                f"{type(self).__name__}: `{method}` needs a causal layer, and this one is bidirectional: its output "
                "depends on the future. Use `forward`, or `bidirectional=False`."
            )

    def extra_repr(self) -> str:
        """The arguments that differ from their simplest value."""
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
