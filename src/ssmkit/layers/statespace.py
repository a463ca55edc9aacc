r"""The base of layers that are a system: checks, dtypes, batch axes, dropout and the three modes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NoReturn, final

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks
from ..ops.precision import full_precision
from ..states import State
from ..systems import ForwardSystem
from ..systems.timed import fit_rate
from .base import SequenceLayer, at_least_float32, refuse_forward_only

__all__ = ["StateSpaceLayer"]


class StateSpaceLayer(SequenceLayer):
    r"""A layer that consists of parameters and of the discrete system that they make.

    A subclass owns the parameters, defines :meth:`discretize`, and declares the shape of its state. This class does
    the rest: checks, dtypes, batch axes, empty sequences, autocast, dropout, and the three modes, by those of the
    system.

    Arguments:
        d_input: The width of the input.
        d_output: The width of the output.
        state_shape: The shape of the state of one stream, that of the system; None for a layer that is not causal,
            which has :meth:`forward` only.
        dropout: The probability with which outputs are zeroed in training.

    Raises:
        TypeError: If a width is not an integer.
        ValueError: If a width is less than 1, or `dropout` is not a probability below 1.

    Example:
        >>> class Decay(ssmkit.StateSpaceLayer):
        ...     SSM_PARAMETERS = ("rate",)
        ...     def __init__(self, d_model):
        ...         super().__init__(d_model, d_model, (2 * d_model,))
        ...         self.rate = torch.nn.Parameter(torch.rand(d_model))
        ...     def discretize(self, rate):
        ...         a = torch.exp(-self.rate.exp() * rate).to(torch.complex128)
        ...         eye = torch.eye(len(a), dtype=torch.complex128)
        ...         return ssmkit.systems.SharedDiagonal(a, eye, eye, torch.zeros_like(self.rate))
        >>> ssmkit.testing.assert_modes_agree(Decay(3))
    """

    SSM_PARAMETERS: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters for which :func:`ssmkit.param_groups` makes a group of their own."""
    SYSTEM: ClassVar[type[Any] | tuple[type[Any], ...]] = ForwardSystem
    """The types of system that the layer makes; it refuses a `system` of another type."""

    d_input: int
    d_output: int

    def __init__(
        self, d_input: int, d_output: int, state_shape: tuple[int, ...] | None, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.d_input = _checks.integer(name, "d_input", d_input)
        self.d_output = _checks.integer(name, "d_output", d_output)
        self.causal = state_shape is not None
        self.state_shape = None if state_shape is None else tuple(state_shape)
        self.dropout = _checks.probability(name, "dropout", dropout)

    @abstractmethod
    def discretize(self, rate: float) -> ForwardSystem:
        """Makes the discrete system of the current parameters, with gradients to them.

        Called by :meth:`system`, without autocast.

        Arguments:
            rate: The factor of the step size, a positive number. A layer without a step size refuses any but 1.

        Returns:
            The system: a :class:`ssmkit.systems.System`, or a :class:`ssmkit.systems.ForwardSystem` if the layer is not
            causal.
        """

    def timed(self, rate: Tensor) -> ForwardSystem:
        """Makes the system for samples at irregular times, with gradients to the parameters and to the rates.

        :meth:`system` calls it with a tensor, without autocast. A layer that takes time stamps overrides it and returns
        a system whose attribute `rate` is that tensor.

        Arguments:
            rate: For each sample the interval that ends at it, in steps, with shape :math:`(*, L)`, or :math:`(*)` for
                a step.

        Returns:
            The system.

        Raises:
            ValueError: Unless a subclass has it.
        """
        raise ValueError(
            f"{type(self).__name__}: `rate` must be a number, as this layer takes no time stamps, got a tensor; "
            "S4D, S5 and S6 do."
        )

    @final
    def system(self, rate: float | Tensor = 1.0) -> Any:
        """Discretises the layer with its current weights; gradients flow through the system to them.

        Arguments:
            rate: The factor of the step size: a layer trained at 16 kHz runs on 8 kHz audio at rate 2. For samples at
                irregular times a floating tensor: for each sample the length of the interval that ends at it, over
                which the sample is held, in steps. It is positive (which is not checked) and has shape :math:`(*, L)`
                or its last axes, and :math:`(*)` for :meth:`step`. The system is then valid for one call.

        Returns:
            The discrete system, a value.

        Raises:
            TypeError: If `rate` is a tensor of another kind.
            ValueError: If a number `rate` is not positive, or the layer takes no time stamps.
        """
        name = type(self).__name__
        _checks.rate(name, rate)
        with full_precision(self._like.device.type):
            if not isinstance(rate, Tensor):
                return self.discretize(float(rate))
            if not self.causal:
                raise ValueError(
                    f"{name}: `rate` must be a number for a layer that is not causal, got a tensor: it holds the "
                    "interval before each sample, and the backward direction needs the one after it."
                )
            return self.timed(rate)

    @property
    def _like(self) -> Tensor:
        return next(self.parameters(), torch.empty(0))

    def fits(self, system: Any) -> bool:
        """Whether a system can be this layer's, by its kind, its widths and the shape of its state."""
        shapes = (self.d_input, self.d_output, self.state_shape)
        return isinstance(system, self.SYSTEM) and system.shapes == shapes

    def given(self, system: Any = None) -> Any:
        """The system to use.

        Arguments:
            system: What :meth:`system` returned, or None.

        Returns:
            The same system, or a new one.

        Raises:
            ValueError: If the system is of another kind or size than this layer's.
        """
        if system is None:
            return self.system()
        if not self.fits(system):
            raise ValueError(
                f"{type(self).__name__}: `system` must be what this layer's `system()` returns, "
                f"{_described(self.system())}, got {_described(system)}."
            )
        return system

    def initial_state(
        self, *batch_shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Makes a state at rest.

        Arguments:
            batch_shape: The batch axes of the inputs to come.
            device: By default that of the weights.
            dtype: By default that of the weights, and at least float32.

        Returns:
            Zeros with shape :math:`(*, state)`.

        Raises:
            TypeError: If a size is not an integer, or `dtype` not a dtype.
            ValueError: If the layer is not causal, a size is negative, or the device or the dtype cannot be used.
        """
        shape, like, name = self._shape_for("initial_state"), self._like, type(self).__name__
        _checks.batch(name, batch_shape)
        device = like.device if device is None else _checks.device(name, device)
        dtype = at_least_float32(_checks.dtype(name, dtype) or like.dtype)
        return torch.zeros(*batch_shape, *shape, device=device, dtype=dtype)

    def forward(self, u: Tensor, system: Any = None) -> Tensor:
        """Maps a whole sequence, from rest.

        Arguments:
            u: The input, with shape :math:`(*, L, d_{input})`; :math:`L = 0` gives an empty output.
            system: What :meth:`system` returned; by default it is made here.

        Returns:
            The output, with shape :math:`(*, L, d_{output})`, in the dtype of `u`.

        Raises:
            TypeError: If `u` is not a real floating tensor.
            ValueError: If the last axis of `u` is not `d_input`, or the system is another layer's, or has time stamps
                for another number of samples.
        """
        _checks.sequence(type(self).__name__, "u", u, self.d_input)
        if u.numel() == 0:
            return self._empty(u, system)
        with full_precision(u.device.type):
            system = self._fitted(u, system, time=True)
            v = u.to(torch.promote_types(u.dtype, system.dtype))
            y = system.forward(v.reshape(-1, *v.shape[-2:])).reshape(*u.shape[:-1], self.d_output)
        return F.dropout(y.to(u.dtype), self.dropout, self.training)

    def step(self, u: Tensor, state: State, system: Any = None) -> tuple[Tensor, State]:
        """Maps one sample, as a recurrence. Writes to nothing.

        Arguments:
            u: The input, with shape :math:`(*, d_{input})`.
            state: The state of the stream.
            system: What :meth:`system` returned; by default it is made here. A loop should make it once.

        Returns:
            The output, with shape :math:`(*, d_{output})`, and the next state.

        Raises:
            TypeError: If `u` is not a real floating tensor.
            ValueError: If the last axis of `u` is not `d_input`, if the state or the system is of another layer or
                batch shape, if the system has time stamps for another number of samples, or if the layer is not causal.
        """
        shape = self.state_shape or self._shape_for("step")
        if not (
            isinstance(u, Tensor)
            and isinstance(state, Tensor)
            and u.dtype in _checks.FLOATING
            and state.dtype in _checks.FLOATING
            and u.shape[-1:] == (self.d_input,)
            and state.shape == (*u.shape[:-1], *shape)
            and u.layout is state.layout is torch.strided
            and u.device == state.device
        ):
            # The checks would cost more than a step, so they run only if something does not fit.
            _checks.floating(type(self).__name__, "u", u)
            _checks.last_axis(type(self).__name__, "u", u, self.d_input)
            state = _checks.state(type(self).__name__, state, (*u.shape[:-1], *shape), u)
        if u.numel() == 0:
            return self._empty(u, system, time=False), state
        with full_precision(u.device.type):
            system = self._fitted(u, system, time=False)
            dtype = system.dtype
            y, x = system.step(u.to(dtype), state if state.dtype == dtype else state.to(dtype))
            y = y.to(u.dtype)
        if x.dtype != state.dtype:
            x = x.to(state.dtype)
        return (F.dropout(y, self.dropout, self.training) if self.dropout else y), x

    def scan(self, u: Tensor, state: State, system: Any = None) -> tuple[Tensor, State]:
        """Maps a chunk of any length in parallel, carrying the state.

        Arguments:
            u: The input, with shape :math:`(*, L, d_{input})`; :math:`L = 0` gives an empty output and the same state.
            state: The state of the stream.
            system: What :meth:`system` returned; by default it is made here.

        Returns:
            The output, with shape :math:`(*, L, d_{output})`, and the next state.

        Raises:
            TypeError: If `u` is not a real floating tensor.
            ValueError: If the last axis of `u` is not `d_input`, if the state or the system is of another layer or
                batch shape, if the system has time stamps for another number of samples, or if the layer is not causal.
        """
        name = type(self).__name__
        shape = self._shape_for("scan")
        _checks.sequence(name, "u", u, self.d_input)
        x = _checks.state(name, state, (*u.shape[:-2], *shape), u)
        if u.numel() == 0:
            return self._empty(u, system), x
        with full_precision(u.device.type):
            system = self._fitted(u, system, time=True)
            v = u.to(system.dtype).reshape(-1, *u.shape[-2:])
            # The batch size instead of -1, which is ambiguous if a state is empty.
            y, new = system.scan(v, x.to(system.dtype).reshape(len(v), *shape))
            y = y.reshape(*u.shape[:-1], self.d_output)
        return F.dropout(y.to(u.dtype), self.dropout, self.training), new.reshape(x.shape).to(x.dtype)

    def _fitted(self, u: Tensor, system: Any, *, time: bool) -> Any:
        """The system to use for an input, with its rates in the shape that the modes take."""
        system = self.given(system)
        if system.device != u.device:
            _checks.same_device(type(self).__name__, "u", u.device, "system", system.device)
        return fit_rate(type(self).__name__, system, u.shape[:-1], time=time)

    def _empty(self, u: Tensor, system: Any, *, time: bool = True) -> Tensor:
        """The output for an empty input, in the graph of all inputs and coefficients: its gradients are zero."""
        y = u.new_zeros(*u.shape[:-1], self.d_output) + u.sum()
        for coefficient in self._fitted(u, system, time=time).coefficients:
            y = y + coefficient.flatten()[:0].real.sum()
        return y

    def _shape_for(self, method: str) -> tuple[int, ...]:
        """The shape of the state, for a method that needs one."""
        if self.state_shape is None:
            self._refuse(method)
        return self.state_shape

    def _refuse(self, method: str) -> NoReturn:
        """Raises the error of a method that needs a causal layer."""
        refuse_forward_only(type(self).__name__, method, self)


def _described(system: Any) -> str:
    """Describes a system by type, widths and state."""
    kind = f"a {type(system).__name__}"
    if not isinstance(system, ForwardSystem):
        return kind
    *widths, state = system.shapes
    return "{} of widths {} and {} and {}".format(kind, *widths, "no state" if state is None else f"state {state}")
