r"""Layers side by side: they read the same input, and their outputs are multiplied or joined."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import mul
from typing import final

import torch
from torch import Tensor, nn

from ..states import State
from .base import System
from .container import Container
from .pointwise import output_width

__all__ = ["Branches", "Concatenate", "Product"]


class Branches(Container):
    """Layers that read the same input: what :class:`Product` and :class:`Concatenate` have in common."""

    ARGUMENT = "branches"

    def __init__(self, *branches: nn.Module | Mapping[str, nn.Module]) -> None:
        super().__init__(*branches)
        where = type(self).__name__
        if not len(self):
            raise ValueError(f"{where}: `branches` must hold at least one branch, got none.")
        self.d_input = next((branch.d_input for branch in self if branch.d_input is not None), None)
        for index, branch in enumerate(self):
            if branch.d_input not in (None, self.d_input):
                raise ValueError(
                    f"{where}: `branches` must take the same width, got {branch.d_input} in branch {index} "
                    f"({type(branch).__name__}) and {self.d_input} before it."
                )
        self.d_output = self.combined_width([output_width(branch, self.d_input) for branch in self])

    @abstractmethod
    def combined_width(self, widths: Sequence[int | None]) -> int | None:
        """The width of :meth:`combine`'s output for outputs of these widths; None is a width that is not known.

        Raises:
            ValueError: If the widths do not fit together.
        """

    @abstractmethod
    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """Combines the outputs of the branches to one output.

        Raises:
            ValueError: If their shapes do not fit together.
        """

    def forward(self, u: Tensor, system: System = None) -> Tensor:
        """Maps a whole sequence, from rest, through all branches."""
        return self.combine([branch(u, part) for branch, part in self.shares(system)])

    def step(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps one sample through all branches.

        Raises:
            ValueError: If a branch is not causal, or the state is of another container.
        """
        self.require_causal("step")
        pairs = [branch.step(u, branch_state, part) for branch, part, branch_state in self.shares(system, state)]
        return self.combine([y for y, _ in pairs]), tuple(new for _, new in pairs)

    def scan(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps a chunk through all branches.

        Raises:
            ValueError: If a branch is not causal, or the state is of another container.
        """
        self.require_causal("scan")
        pairs = [branch.scan(u, branch_state, part) for branch, part, branch_state in self.shares(system, state)]
        return self.combine([y for y, _ in pairs]), tuple(new for _, new in pairs)


@final
class Product(Branches):
    r"""Layers side by side whose outputs are multiplied: :math:`y = f_1(u) \odot f_2(u) \odot \dots`

    For gates, such as the gated linear unit :math:`(W u) \odot \sigma(V u)`.

    References:
        | Language Modeling with Gated Convolutional Networks (Dauphin et al., 2017), Section 2
        | https://arxiv.org/abs/1612.08083

    Arguments:
        branches: Sequence layers and position-wise modules of torch, which take the same input and give outputs of
            the same width; or one dictionary of these, whose keys are their names.

    Raises:
        TypeError: If one is not a torch module.
        ValueError: If there is none, if one mixes time steps or is not known to be position-wise, or if the widths
            differ.

    Example:
        >>> gate = ssmkit.Sequential(torch.nn.Linear(8, 8), torch.nn.Sigmoid())
        >>> layer = ssmkit.Product(ssmkit.S4D(8), gate)
        >>> u = torch.randn(2, 20, 8)
        >>> torch.equal(layer(u), layer[0](u) * layer[1](u))
        True
    """

    def combined_width(self, widths: Sequence[int | None]) -> int | None:
        """The width that all branches give."""
        known = {width for width in widths if width is not None}
        if len(known) > 1:
            raise ValueError(f"Product: `branches` must give the same width, got {sorted(known)}.")
        return known.pop() if known else None

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """Multiplies the outputs."""
        if any(y.shape != outputs[0].shape for y in outputs):
            shapes = ", ".join(str(tuple(y.shape)) for y in outputs)
            raise ValueError(f"Product: `branches` must give outputs of the same shape, got {shapes}.")
        return reduce(mul, outputs)


@final
class Concatenate(Branches):
    r"""Layers side by side whose outputs are joined along the features: :math:`y = [f_1(u), f_2(u), \dots]`.

    Arguments:
        branches: Sequence layers and position-wise modules of torch, which take the same input; or one dictionary of
            these, whose keys are their names.

    Raises:
        TypeError: If one is not a torch module.
        ValueError: If there is none, if one mixes time steps or is not known to be position-wise, or if they take
            different widths.

    Example:
        >>> layer = ssmkit.Concatenate(ssmkit.S4D(8), torch.nn.Linear(8, 3))
        >>> layer(torch.randn(2, 20, 8)).shape
        torch.Size([2, 20, 11])
    """

    def combined_width(self, widths: Sequence[int | None]) -> int | None:
        """The sum of the branches' widths."""
        known = [width for width in widths if width is not None]
        return sum(known) if len(known) == len(widths) else None

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """Joins the outputs along the last axis."""
        if any(y.shape[:-1] != outputs[0].shape[:-1] for y in outputs):
            shapes = ", ".join(str(tuple(y.shape)) for y in outputs)
            raise ValueError(f"Concatenate: `branches` must keep batch and time axes, got shapes {shapes}.")
        return torch.cat(list(outputs), dim=-1)
