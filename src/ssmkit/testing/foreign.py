"""Modules of other libraries, as sequence layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from .. import _checks
from ..layers.base import SequenceLayer, System, at_least_float32, refuse_forward_only
from ..states import State, move

__all__ = ["Foreign"]


@final
class Foreign(SequenceLayer):
    r"""A module of another library as a sequence layer, so that the functions here take it.

    It is made of functions: one that maps whole sequences, and, if it can run as a recurrence, one that maps a sample
    and one that makes the state at the start. :meth:`scan` is then a step per sample. Without a step it is taken for a
    layer that is not causal.

    Arguments:
        module: The module, whose parameters and `state_dict` are looked at.
        forward: From an input :math:`(B, L, d_{input})` to an output :math:`(B, L, d_{output})`; by default the module.
        step: From an input :math:`(B, d_{input})` and a state to an output :math:`(B, d_{output})` and the next state.
        start: From batch axes to the state at the start: tensors, or tuples of them, with the batch axes in front.
        d_input: The width of the input, from which the functions here draw an input if none is given.

    Raises:
        TypeError: If `module` is not a torch module.
        ValueError: If only one of `step` and `start` is given.

    Example:
        >>> gru = torch.nn.GRU(3, 5, batch_first=True)
        >>> def step(u, state):
        ...     y, last = gru(u[:, None], state[None])
        ...     return y[:, 0], last[0]
        >>> layer = Foreign(gru, lambda u: gru(u)[0], step, lambda *batch: torch.zeros(*batch, 5), d_input=3)
        >>> ssmkit.testing.assert_modes_agree(layer)
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[[Tensor], Tensor] | None = None,
        step: Callable[[Tensor, State], tuple[Tensor, State]] | None = None,
        start: Callable[..., State] | None = None,
        *,
        d_input: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"Foreign: `module` must be a torch module, got {type(module).__name__}.")
        if (step is None) != (start is None):
            raise ValueError("Foreign: `step` and `start` must be given together, got one of them.")
        self.module = module
        self.d_input = d_input if d_input is None else _checks.integer("Foreign", "d_input", d_input)
        self.d_output = None
        self.causal = step is not None
        # In a tuple, as torch would take a module that is an attribute for a second one.
        self._functions = (module if forward is None else forward, step, start)

    def forward(self, u: Tensor, system: System = None) -> Tensor:
        """Maps a whole sequence by the function that was given."""
        return self._functions[0](u)

    def system(self, rate: float = 1.0) -> System:
        """Nothing to discretise: `()`.

        Raises:
            ValueError: If `rate` is not 1, as nothing is known of a time unit.
        """
        if _checks.positive("Foreign", "rate", rate) != 1.0:
            raise ValueError(f"Foreign: `rate` must be 1, as nothing is known of a time unit, got {rate!r}.")
        return ()

    def initial_state(
        self, *batch_shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state at the start, by the function that was given."""
        start = self._functions[2]
        if start is None:
            refuse_forward_only("Foreign", "initial_state", self)
        return move(start(*batch_shape), device, None if dtype is None else at_least_float32(dtype))

    def step(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps one sample by the function that was given."""
        step = self._functions[1]
        if step is None:
            refuse_forward_only("Foreign", "step", self)
        return step(u, state)

    def scan(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps a chunk, a step per sample."""
        step = self._functions[1]
        if step is None:
            refuse_forward_only("Foreign", "scan", self)
        time = -2 if u.is_floating_point() else -1
        if not u.shape[time]:
            # The width of the output is that of any sample.
            shape = list(u.shape)
            del shape[time]
            return step(u.new_zeros(shape), state)[0].unsqueeze(-2)[..., :0, :], state
        rows = []
        for sample in u.unbind(time):
            y, state = step(sample, state)
            rows.append(y)
        return torch.stack(rows, -2), state
