r"""Layers one after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast, final, overload

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops.transforms import transformed
from ..states import State
from .base import SequenceLayer, System
from .container import Container
from .pointwise import chain_input_width, output_width

__all__ = ["Chain", "Checkpoint", "Residual", "Sequential"]


class Chain(Container):
    """Layers one after another: what :class:`Sequential`, :class:`Residual` and the blocks have in common."""

    def __init__(self, *layers: nn.Module | Mapping[str, nn.Module]) -> None:
        super().__init__(*layers)
        self.d_input = width = chain_input_width(self)
        for index, layer in enumerate(self):
            if None not in (width, layer.d_input) and layer.d_input != width:
                raise ValueError(
                    f"{type(self).__name__}: `layers` must fit, and layer {index} ({type(layer).__name__}) takes width "
                    f"{layer.d_input}, but the layer before it gives {width}."
                )
            width = output_width(layer, width)
        self.d_output = width

    @overload
    def __getitem__(self, index: int | str) -> SequenceLayer: ...

    @overload
    def __getitem__(self, index: slice) -> Sequential: ...

    def __getitem__(self, index: int | str | slice) -> SequenceLayer:
        """A layer, by its number or by its name, or a :class:`Sequential` of those in a slice."""
        if isinstance(index, slice):
            return Sequential(cast(dict[str, nn.Module], dict(list(self.layers._modules.items())[index])))
        return super().__getitem__(index)

    def combine(self, u: Tensor, y: Tensor) -> Tensor:
        """Makes the output of the chain.

        Arguments:
            u: The input of the chain.
            y: The output of the last layer.

        Returns:
            The output: `y`, and for :class:`Residual` the sum of both.
        """
        return y

    def forward(self, u: Tensor, system: System = None) -> Tensor:
        """Maps a whole sequence, from rest, through all layers."""
        y = u
        for layer, part in self.shares(system):
            y = layer(y, part)
        return self.combine(u, y)

    def step(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps one sample through all layers.

        Raises:
            ValueError: If a layer is not causal, or the state is of another container.
        """
        self.require_causal("step")
        y, new = u, []
        for layer, part, layer_state in self.shares(system, state):
            y, layer_state = layer.step(y, layer_state, part)
            new.append(layer_state)
        return self.combine(u, y), tuple(new)

    def scan(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps a chunk through all layers.

        Raises:
            ValueError: If a layer is not causal, or the state is of another container.
        """
        self.require_causal("scan")
        y, new = u, []
        for layer, part, layer_state in self.shares(system, state):
            y, layer_state = layer.scan(y, layer_state, part)
            new.append(layer_state)
        return self.combine(u, y), tuple(new)


@final
class Sequential(Chain):
    r"""Layers one after another.

    It is a sequence of its layers: `len(model)`, `model[-1]`, `for layer in model`; a slice is a :class:`Sequential` of
    the same layers. As with :class:`torch.nn.Sequential`, one dictionary gives them names, which are used in the
    `state_dict` (after `layers.`) and as keys: `model["head"]`.

    Arguments:
        layers: Sequence layers and position-wise modules of torch (Linear, Embedding, LayerNorm, RMSNorm, activations,
            GLU, Dropout ...), or one dictionary of these.

    Raises:
        TypeError: If one is not a torch module.
        ValueError: If one mixes time steps, is not known to be position-wise, or has a width that does not fit; or if
            a name has a dot or is an attribute of torch modules.

    Example:
        >>> model = ssmkit.Sequential(torch.nn.Embedding(256, 16), ssmkit.S4D(16), torch.nn.Linear(16, 256))
        >>> model(torch.randint(256, (2, 100))).shape
        torch.Size([2, 100, 256])
        >>> y, state = model.step(torch.randint(256, (2,)), model.initial_state(2))
        >>> y.shape
        torch.Size([2, 256])
        >>> len(model), model[-1].d_output, model[1:].d_input
        (3, 256, 16)
        >>> model = ssmkit.Sequential({"body": ssmkit.S4D(16), "head": torch.nn.Linear(16, 256)})
        >>> model["head"].d_output
        256
    """


@final
class Checkpoint(Chain):
    r"""Layers one after another whose activations are computed again in the backward pass instead of being kept.

    Training then keeps only the input of the chain, and its activations only while its gradient is computed; it costs
    the time of one more forward pass. In all other respects it is a :class:`Sequential`.

    References:
        | Training Deep Nets with Sublinear Memory Cost (Chen et al., 2016)
        | https://arxiv.org/abs/1604.06174

    Arguments:
        layers: As in :class:`Sequential`.

    Raises:
        TypeError: If one is not a torch module.
        ValueError: If one mixes time steps, is not known to be position-wise, or has a width that does not fit.

    Example:
        >>> network = ssmkit.Sequential(*(ssmkit.Checkpoint(ssmkit.S4Block(8, ssmkit.S4D(8))) for _ in range(2)))
        >>> network(torch.randn(1, 100, 8)).mean().backward()
    """

    def forward(self, u: Tensor, system: System = None) -> Tensor:
        """Maps a whole sequence, from rest, through all layers; keeps only the input for the backward pass."""
        if self._keeps():
            return super().forward(u, system)
        y: Tensor = checkpoint(super().forward, u, system, use_reentrant=False)
        return y

    def scan(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps a chunk through all layers; keeps only the input and the state for the backward pass."""
        if self._keeps():
            return super().scan(u, state, system)
        result: tuple[Tensor, State] = checkpoint(super().scan, u, state, system, use_reentrant=False)
        return result

    def _keeps(self) -> bool:
        """Whether all activations are kept: under torch.func, where torch's checkpoint cannot run, and in
        `functional_call`, since the backward pass would compute them again with the module's own parameters."""
        return transformed() or not all(isinstance(parameter, nn.Parameter) for parameter in self.parameters())


@final
class Residual(Chain):
    r"""Layers one after another, added to their input: :math:`y = u + f(u)`.

    Arguments:
        layers: As in :class:`Sequential`; the output width of the last must be the input width of the first.

    Raises:
        TypeError: If one is not a torch module.
        ValueError: If one mixes time steps or has a width that does not fit, or if the output's width is not the
            input's.

    Example:
        >>> layer = ssmkit.Residual(torch.nn.LayerNorm(8), ssmkit.S4D(8), torch.nn.GELU())
        >>> layer(torch.randn(2, 20, 8)).shape
        torch.Size([2, 20, 8])
    """

    def __init__(self, *layers: nn.Module | Mapping[str, nn.Module]) -> None:
        super().__init__(*layers)
        if None not in (self.d_input, self.d_output) and self.d_input != self.d_output:
            raise ValueError(
                f"Residual: `layers` must give back the width they take, got {self.d_input} in and {self.d_output} out."
            )

    def combine(self, u: Tensor, y: Tensor) -> Tensor:
        """Adds the input to the output of the last layer."""
        if u.shape != y.shape:
            raise ValueError(
                f"Residual: `layers` must keep the shape {tuple(u.shape)} of their input, got {tuple(y.shape)}."
            )
        return u + y
