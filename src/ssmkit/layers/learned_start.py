r"""A learnt initial state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, cast, final

import torch
from torch import Tensor, nn

from .. import _checks
from ..states import State
from .base import SequenceLayer, System, refuse_forward_only
from .container import Container
from .dropout import TiedDropout
from .pooling import MultiRate

__all__ = ["LearnedStart"]

_Change: TypeAlias = Callable[[str, Tensor], Tensor]


@final
class LearnedStart(SequenceLayer):
    r"""A layer with a learnt initial state.

    .. math:: x_{-1} = x_{rest} + \theta

    for each tensor of the layer's initial state, where :math:`\theta` is a parameter and zero at first.
    :meth:`initial_state` returns the learnt state, and :meth:`forward` starts from it. All else is that of the layer
    inside; systems and states are those of the layer inside, too.

    There is no parameter for what does not depend on past input: the mask of a :class:`TiedDropout`, and the phase of a
    :class:`MultiRate` and the frame that it fills, which has no sample yet.

    Arguments:
        layer: A causal sequence layer, or a network of such.

    Shapes:
        - as the layer inside.
        - parameters: one for each tensor of the state, with the shape of a single stream. Their names are positions in
          the tree of the state, such as `start_1_0`, or `start` if the state is one tensor. :func:`ssmkit.param_groups`
          gives them no weight decay.

    Raises:
        TypeError: If `layer` is not a sequence layer.
        ValueError: If it is not causal, and so has no state.

    Example:
        >>> layer = ssmkit.LearnedStart(ssmkit.S4D(4, d_state=8))
        >>> layer.start.shape, layer.initial_state(2).shape
        (torch.Size([4, 8]), torch.Size([2, 4, 8]))
        >>> layer(torch.randn(2, 50, 4)).sum().backward()
        >>> bool((layer.start.grad != 0).all())
        True
        >>> model = ssmkit.LearnedStart(ssmkit.Sequential(torch.nn.Linear(1, 4), ssmkit.S5(4, 8), ssmkit.ShortConv(4)))
        >>> [name for name, _ in model.named_parameters(recurse=False)]
        ['start_1', 'start_2']
    """

    def __init__(self, layer: SequenceLayer) -> None:
        super().__init__()
        if not isinstance(layer, SequenceLayer):
            raise TypeError(
                f"LearnedStart: `layer` must be a `ssmkit.SequenceLayer`, got {type(layer).__name__}; "
                "wrap position-wise modules in `ssmkit.Sequential`."
            )
        if not layer.causal:
            refuse_forward_only("LearnedStart", "initial_state", layer)
        self.layer = layer
        self.d_input, self.d_output = layer.d_input, layer.d_output

        def add(name: str, rest: Tensor) -> Tensor:
            # The state of a filter with one tap, for example, is an empty tensor.
            if rest.numel():
                self.register_parameter(name, nn.Parameter(torch.zeros_like(rest)))
            return rest

        _change(layer, layer.initial_state(), "start", add)

    def reset_parameters(self) -> None:
        """Sets the initial state to rest."""
        with torch.no_grad():
            for parameter in self._parameters.values():
                cast(Tensor, parameter).zero_()

    def system(self, rate: float | Tensor = 1.0) -> System:
        """The system of the layer inside."""
        return self.layer.system(rate)

    def initial_state(
        self, *batch_shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Makes the learnt initial state for a batch, with gradients to the parameters.

        Arguments:
            batch_shape: The batch axes of what is going to be run.
            device: By default that of the weights.
            dtype: By default that of the weights, and at least float32.

        Returns:
            A state of the layer inside. It is a copy, which does not change with the parameters.
        """

        def move(name: str, rest: Tensor) -> Tensor:
            start = self._parameters.get(name)
            return rest if start is None else rest + start.to(rest.device, rest.dtype)

        return _change(self.layer, self.layer.initial_state(*batch_shape, device=device, dtype=dtype), "start", move)

    def forward(self, u: Tensor, system: System = None) -> Tensor:
        """Maps a whole sequence from the learnt initial state, by a scan.

        Arguments:
            u: The input, with shape :math:`(*, L, d_{input})`, or :math:`(*, L)` of class indices.
            system: What :meth:`system` returned; by default made on the spot.

        Returns:
            The output, with shape :math:`(*, L, d_{output})`.
        """
        batch, dtype = _checks.tensor("LearnedStart", "u", u).shape[:-1], None
        if u.is_floating_point():
            _checks.floating("LearnedStart", "u", u)
            like = next((p.dtype for p in self.parameters() if p.is_floating_point()), u.dtype)
            batch, dtype = u.shape[:-2], torch.promote_types(u.dtype, like)
        return self.layer.scan(u, self.initial_state(*batch, device=u.device, dtype=dtype), system)[0]

    def step(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps one sample, as the layer inside."""
        return self.layer.step(u, state, system)

    def scan(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps a chunk of any length, as the layer inside."""
        return self.layer.scan(u, state, system)


def _change(layer: SequenceLayer, state: State, name: str, change: _Change) -> State:
    """Applies a function to the tensors of an initial state that can be learnt, with their names."""
    if isinstance(layer, LearnedStart):
        return _change(layer.layer, state, name, change)
    if isinstance(layer, TiedDropout):
        return state
    if isinstance(layer, MultiRate):
        # The frame being filled has no sample yet: its values affect no output.
        filling, emitting, phase, inner = cast(tuple[State, Tensor, State, State], state)
        return filling, change(f"{name}_1", emitting), phase, _change(layer.layer, inner, f"{name}_3", change)
    if isinstance(layer, Container):
        pairs = zip(layer, cast(tuple[State, ...], state), strict=True)
        return tuple(_change(child, part, f"{name}_{n}", change) for n, (child, part) in enumerate(pairs))
    return _change_tensors(state, name, change)


def _change_tensors(state: State, name: str, change: _Change) -> State:
    if isinstance(state, tuple):
        return tuple(_change_tensors(child, f"{name}_{n}", change) for n, child in enumerate(state))
    return change(name, state) if isinstance(state, Tensor) and state.is_floating_point() else state
