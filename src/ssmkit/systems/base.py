"""The interface of discrete systems, and the rule by which a system keeps the parts that a single mode needs."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..ops.precision import full_precision
from ..ops.transforms import transformed
from .words import Vector, Words

__all__ = ["ForwardSystem", "System", "own", "part", "per_sample"]

_T = TypeVar("_T")


def own(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of a coefficient: a system that shared memory with a parameter would change in training.

    The copy carries the graph of `x`. It is never an inference tensor, so that a system made in inference mode can be
    used later where gradients flow to the input or the state.

    Arguments:
        x: The coefficient.
        dtype: The dtype of the copy, by default that of `x`.

    Returns:
        The copy.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> copy = own(weight, torch.float64)
        >>> _ = weight.data.zero_()
        >>> copy
        tensor([1., 1.], dtype=torch.float64, grad_fn=<ToCopyBackward0>)
    """
    dtype = x.dtype if dtype is None else dtype
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return x.to(dtype, copy=True).resolve_conj()
    return x.to(dtype, copy=True).resolve_conj()


def per_sample(rate: float | Tensor) -> float | Tensor:
    """A rate as a factor of step sizes that have one more axis: a number, or a tensor with an axis of size 1 added."""
    return rate.unsqueeze(-1) if isinstance(rate, Tensor) else rate


def _may_keep() -> bool:
    """False while a graph is traced or transformed, or under a dispatch mode, where tensors may be fake ones."""
    return not (torch.compiler.is_compiling() or transformed() or torch._C._len_torch_dispatch_stack())


def part(make: Callable[..., _T]) -> Callable[..., _T]:
    """Decorates a method whose result is a part of its system: made by the first call, and kept if it has no graph.

    A part is what a single mode needs, such as the coefficients of a step or of a chunk. What is kept carries no graph:
    while gradients flow through the system, each call makes a part of its own. Otherwise the part is made without
    gradients, outside inference mode and without autocast, and all later calls use it. Nothing is kept while
    torch.compile, torch.export or torch.func is active, but parts that were kept before are used.

    Arguments:
        make: A method without arguments, or with integers.

    Returns:
        The method that keeps its results.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, eq=False)
        ... class Delay(ssmkit.systems.System):
        ...     gain: torch.Tensor
        ...     d_input = d_output = 1
        ...     dtype, state_shape = torch.float32, (1,)
        ...     @part
        ...     def squared(self):
        ...         print("made")
        ...         return self.gain**2
        ...     def scan(self, u, x):
        ...         both = torch.cat([x[:, None], u], 1)
        ...         return self.squared() * both[:, :-1], both[:, -1]
        ...     def step(self, u, x):
        ...         return self.squared() * x, u
        >>> system = Delay(torch.tensor([3.0]))
        >>> for _ in range(2):
        ...     y, state = system.step(torch.ones(1), torch.ones(1))
        made
        >>> y
        tensor([9.])
    """
    name = make.__name__

    @functools.wraps(make)
    def get(self: Any, *key: int) -> _T:
        if torch.is_grad_enabled() and self.requires_grad:
            return make(self, *key)
        kept: dict[Any, _T] = self.__dict__.setdefault("_parts", {})
        place = (name, *key)
        if place in kept:
            return kept[place]
        if not _may_keep():
            return make(self, *key)
        with torch.inference_mode(False), torch.no_grad(), full_precision(self.device.type):
            made = kept[place] = make(self, *key)
        return made

    return get


def _cached(get: Callable[[Any], _T]) -> Callable[[Any], _T]:
    """Keeps the value of a property that every step reads.

    `functools.cached_property` has a lock in some versions of Python, which torch.compile cannot trace.
    """
    name = f"_{get.__name__}"

    @functools.wraps(get)
    def cached(self: Any) -> _T:
        kept: _T | None = self.__dict__.get(name)
        if kept is None:
            kept = get(self)
            if not torch.compiler.is_compiling():
                self.__dict__[name] = kept
        return kept

    return cached


class ForwardSystem(ABC):
    """A discrete system that maps whole sequences: the value that a layer's `system()` returns.

    A subclass is a dataclass with `frozen=True, eq=False`, whose tensors are copies of what they were made of (see
    :func:`own`). It has no parameters and no other state: its output for an input never changes.

    Attributes:
        d_input: The width of the input.
        d_output: The width of the output.
        dtype: The dtype in which sequences and states are computed.

    Example:
        >>> system = ssmkit.S4D(4, bidirectional=True).system()
        >>> isinstance(system, ForwardSystem), isinstance(system, ssmkit.systems.System)
        (True, False)
        >>> system.forward(torch.randn(2, 9, 4)).shape
        torch.Size([2, 9, 4])
    """

    @property
    @abstractmethod
    def d_input(self) -> int:
        """The width of the input."""

    @property
    @abstractmethod
    def d_output(self) -> int:
        """The width of the output."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype in which sequences and states are computed."""

    @abstractmethod
    def forward(self, u: Tensor) -> Tensor:
        """Input :math:`(B, L, d_{input})` to output :math:`(B, L, d_{output})`, from rest; L at least 1."""

    @property
    @_cached
    def shapes(self) -> tuple[int, int, tuple[int, ...] | None]:
        """The widths of input and output, and the shape of the state, or None if there is none."""
        return self.d_input, self.d_output, getattr(self, "state_shape", None)

    @property
    def coefficients(self) -> list[Tensor]:
        """The tensors that the system is made of."""
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        nested = [value.coefficients if isinstance(value, ForwardSystem) else [value] for value in values]
        return [tensor for group in nested for tensor in group if isinstance(tensor, Tensor)]

    @property
    def time_stamps(self) -> Tensor | None:
        """The tensor of rates, one per sample, if the system was made with one and is valid for one call; else None."""
        rate = getattr(self, "rate", None)
        return rate if isinstance(rate, Tensor) else None

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow through the system to what it was made of."""
        return any(tensor.requires_grad for tensor in self.coefficients)

    @property
    @_cached
    def device(self) -> torch.device:
        """Where the coefficients are."""
        return self.coefficients[0].device

    def __getstate__(self) -> dict[str, Any]:
        # Pickles and copies leave parts out: they can be made again from the coefficients.
        return {name: value for name, value in self.__dict__.items() if name not in ("_parts", "_shapes", "_device")}


class System(ForwardSystem):
    """A causal discrete system: it also runs in chunks and sample by sample, with one tensor as its state.

    Attributes:
        state_shape: The shape of the state of one stream.

    Example:
        >>> system = ssmkit.S4D(4, d_state=8).system()
        >>> system.d_input, system.d_output, system.state_shape
        (4, 4, (4, 8))
        >>> y, state = system.step(torch.randn(2, 4), system.initial_state(2))
        >>> y.shape, state.shape
        (torch.Size([2, 4]), torch.Size([2, 4, 8]))
    """

    @property
    @abstractmethod
    def state_shape(self) -> tuple[int, ...]:
        """The shape of the state of one stream."""

    @abstractmethod
    def scan(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input :math:`(B, L, d_{input})` and state :math:`(B, *)` to output and next state; L at least 1."""

    @abstractmethod
    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input :math:`(*, d_{input})` and state to output :math:`(*, d_{output})` and the next state."""

    def forward(self, u: Tensor) -> Tensor:
        """Input :math:`(B, L, d_{input})` to output :math:`(B, L, d_{output})`: a scan from rest, unless overridden."""
        return self.scan(u, self.initial_state(len(u), device=u.device, dtype=u.dtype))[0]

    def initial_state(
        self, *batch_shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A state at rest, by default on the device and in the dtype of the system."""
        device = self.device if device is None else device
        return torch.zeros(*batch_shape, *self.state_shape, device=device, dtype=self.dtype if dtype is None else dtype)

    def prepare(self) -> None:
        """Makes the parts that :meth:`step` needs, before it is compiled."""

    def write(self, words: Words, u: Vector) -> Vector:
        """Writes a step in :class:`Words`, so that :class:`ssmkit.streaming.Engine` can run it.

        Arguments:
            words: The operations.
            u: The handle of the input.

        Returns:
            The handle of the output.

        Raises:
            NotImplementedError: If the subclass does not define this method, which is optional.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `write`.")
