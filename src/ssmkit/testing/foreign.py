"""Modules of other libraries as sequence layers."""

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
    r"""A module of another library as a sequence layer.

    It is given by functions: one for whole sequences, and, if the module can run as a recurrence, one for a step and
    one for the initial state. `scan` is then one step per sample. Without a step the layer counts as not causal.

    Arguments:
        module: The module, with the parameters.
        forward: From an input :math:`(B, L, d_{input})` to an output :math:`(B, L, d_{output})`; by default the module.
        step: From an input :math:`(B, d_{input})` and a state to an output :math:`(B, d_{output})` and the next state.
        start: From batch axes to the initial state: tensors, or tuples of them, with the batch axes in front.
        d_input: The width of the input, for functions that draw an input.

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
        # In a tuple, since torch would register a module that is an attribute a second time.
        self._functions = (module if forward is None else forward, step, start)

    def forward(self, u: Tensor, system: System = None) -> Tensor:
        """Maps a whole sequence by the given function."""
        return self._functions[0](u)

    def system(self, rate: float | Tensor = 1.0) -> System:
        """Nothing to discretise: `()`.

        Raises:
            ValueError: If `rate` is not 1, since the module has no known time unit.
        """
        if isinstance(rate, Tensor) or _checks.positive("Foreign", "rate", rate) != 1.0:
            raise ValueError(f"Foreign: `rate` must be 1, since the module has no known time unit, got {rate!r}.")
        return ()

    def initial_state(
        self, *batch_shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The initial state, by the given function."""
        start = self._functions[2]
        if start is None:
            refuse_forward_only("Foreign", "initial_state", self)
        return move(start(*batch_shape), device, None if dtype is None else at_least_float32(dtype))

    def step(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps one sample by the given function."""
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
            # A step tells the width of the output.
            shape = list(u.shape)
            del shape[time]
            return step(u.new_zeros(shape), state)[0].unsqueeze(-2)[..., :0, :], state
        rows = []
        for sample in u.unbind(time):
            y, state = step(sample, state)
            rows.append(y)
        return torch.stack(rows, -2), state
