r"""The contract of all layers and containers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from ..states import State

__all__ = ["ForwardLayer", "SequenceLayer", "System", "at_least_float32", "refuse_forward_only"]

System: TypeAlias = Any
"""What :meth:`SequenceLayer.system` returns: a discrete system, or a tuple of the children's."""


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sequences and states are computed for inputs or weights of this dtype."""
    return torch.promote_types(dtype, torch.float32)


class SequenceLayer(nn.Module, ABC):
    r"""A map of sequences with three modes that agree to rounding.

    - :meth:`forward` takes a whole sequence, from rest;
    - :meth:`scan` takes a chunk of any length and carries the state;
    - :meth:`step` takes one sample and carries the state.

    The caller holds two values outside the module. The **system** comes from the weights alone: it is what
    :meth:`step` and :meth:`scan` need of them, discretised once by :meth:`system`. The **state** comes from the data:
    it is the memory of a stream. No method writes to the module. After a change of the weights, make a new system; a
    state stays valid.

    To write a layer of your own, subclass this and implement the five methods; a layer without weights to discretise
    has the system `()`, one without memory the state `()`. Then check it with
    :func:`ssmkit.testing.assert_modes_agree`. A layer whose output depends on the future has only :meth:`forward`:
    subclass :class:`ForwardLayer` instead.

    Attributes:
        d_input: The width of the input, or None if it is not known in advance.
        d_output: The width of the output, or None if it is not known in advance.
        causal: Whether the output at a sample depends on no later sample. If it is False, the layer has only
            :meth:`forward` and :meth:`system`, and so has every container around it.

    Example:
        >>> class Delay(ssmkit.SequenceLayer):
        ...     d_input = d_output = 3
        ...     def system(self, rate=1.0):
        ...         return ()
        ...     def initial_state(self, *batch_shape, device=None, dtype=None):
        ...         return torch.zeros(*batch_shape, 3, device=device, dtype=dtype)
        ...     def forward(self, u, system=None):
        ...         return self.scan(u, self.initial_state(*u.shape[:-2], dtype=u.dtype))[0]
        ...     def step(self, u, state, system=None):
        ...         return state, u
        ...     def scan(self, u, state, system=None):
        ...         both = torch.cat([state[..., None, :], u], dim=-2)
        ...         return both[..., :-1, :], both[..., -1, :]
        >>> ssmkit.testing.assert_modes_agree(Delay())
    """

    d_input: int | None
    d_output: int | None
    causal: bool = True

    def forward_only_part(self) -> tuple[str, SequenceLayer]:
        """The part that is not causal, if `causal` is False: its path inside the layer, and the part itself.

        By default the whole layer, with the path `""`. Containers return the first of their layers that is not causal.
        """
        return "", self

    @abstractmethod
    def forward(self, u: Tensor, system: System = None) -> Tensor:
        """Maps a whole sequence, from rest.

        Arguments:
            u: The input, with shape :math:`(*, L, d_{input})`; :math:`L = 0` gives an empty output.
            system: What :meth:`system` returned; by default it is made here.

        Returns:
            The output, with shape :math:`(*, L, d_{output})`.
        """

    @abstractmethod
    def system(self, rate: float | Tensor = 1.0) -> System:
        """Discretises the layer with its current weights; gradients flow through the system to them.

        Arguments:
            rate: The factor of the step size: a model trained at 16 kHz runs on 8 kHz audio at rate 2. For samples at
                irregular times a tensor: for each sample the length of the interval that ends at it, in steps, with
                shape :math:`(*, L)`, and :math:`(*)` for :meth:`step`. Some layers refuse it, and the system is then
                valid for one call.

        Returns:
            The system, an argument of the other methods; `()` for a layer that has nothing to discretise.
        """

    @abstractmethod
    def initial_state(
        self, *batch_shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Makes the initial state: at rest, unless the layer learns another one.

        Arguments:
            batch_shape: The batch axes of the inputs to come; none for a single stream without a batch axis.
            device: By default that of the weights.
            dtype: By default that of the weights, and at least float32.

        Returns:
            The state; `()` for a layer without memory.
        """

    @abstractmethod
    def step(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps one sample. Writes to nothing.

        Arguments:
            u: The input, with shape :math:`(*, d_{input})`.
            state: The state of the stream.
            system: What :meth:`system` returned; by default it is made here, which is slower. A loop should make it
                once.

        Returns:
            The output, with shape :math:`(*, d_{output})`, and the next state.
        """

    @abstractmethod
    def scan(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps a chunk of any length in parallel, carrying the state.

        For prompts, streams in blocks, and truncated backpropagation.

        Arguments:
            u: The input, with shape :math:`(*, L, d_{input})`; :math:`L = 0` gives an empty output and the same state.
            state: The state of the stream.
            system: What :meth:`system` returned; by default it is made here.

        Returns:
            The output, with shape :math:`(*, L, d_{output})`, and the next state.
        """


class ForwardLayer(SequenceLayer):
    r"""A sequence layer that has only `forward` and `system`, because it is not causal.

    For layers whose output depends on the future, and for layers over several axes, such as images of shape
    :math:`(*, L_1, L_2, d_{input})`. Every container accepts them, and then has only `forward`, too.

    Raises:
        ValueError: In :meth:`initial_state`, :meth:`step` and :meth:`scan`, always.

    Example:
        >>> class Flip(ssmkit.ForwardLayer):
        ...     d_input = d_output = 3
        ...     def system(self, rate=1.0):
        ...         return ()
        ...     def forward(self, u, system=None):
        ...         return u.flip(-2)
        >>> model = ssmkit.Sequential(ssmkit.S4D(3), Flip())
        >>> model.causal, model(torch.randn(2, 30, 3)).shape
        (False, torch.Size([2, 30, 3]))
        >>> model.initial_state(2)
        Traceback (most recent call last):
            ...
        ValueError: Sequential: `initial_state` needs causal layers, and `layers.1` (Flip) is not causal; use `forward`.
    """

    causal = False

    def initial_state(
        self, *batch_shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> NoReturn:
        """Refuses."""
        refuse_forward_only(type(self).__name__, "initial_state", self)

    def step(self, u: Tensor, state: State, system: System = None) -> NoReturn:
        """Refuses."""
        refuse_forward_only(type(self).__name__, "step", self)

    def scan(self, u: Tensor, state: State, system: System = None) -> NoReturn:
        """Refuses."""
        refuse_forward_only(type(self).__name__, "scan", self)


def refuse_forward_only(where: str, method: str, layer: SequenceLayer) -> NoReturn:
    """Raises an error for a method that needs a causal layer; it names the part that is not causal."""
    path, part = layer.forward_only_part()
    name = type(part).__name__
    raise ValueError(
        f"{where}: `{method}` needs causal layers, and {f'`{path}` ({name})' if path else name} is not causal; "
        "use `forward`."
    )
