r"""Containers: they thread the systems and states of their children."""

from __future__ import annotations

from collections.abc import Iterable, ValuesView
from typing import Any, NoReturn, cast, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import _checks
from ..states import State
from .base import SequenceLayer, System, at_least_float32

__all__ = ["Chain", "Checkpoint", "Pointwise", "Residual", "Sequential", "TiedDropout"]

_ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)
_ALONG_LAST_AXIS = (nn.GLU, nn.Softmax, nn.Softmin, nn.LogSoftmax)
_NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm)
_SAME_WIDTH = (
    *_ACTIVATIONS,
    *_NORMS,
    *_ALONG_LAST_AXIS[1:],
    nn.Identity,
    nn.Dropout,
    nn.AlphaDropout,
    nn.PReLU,
)
_POINTWISE = (*_SAME_WIDTH, nn.GLU, nn.Linear, nn.Embedding)

# Modules of torch that read along the axis where a sequence layer has time, or across a batch.
_MIXING: tuple[type[nn.Module], ...] = (
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._LPPoolNd,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
    nn.Flatten,
    nn.Unflatten,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.Fold,
    nn.Unfold,
    nn.EmbeddingBag,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.FeatureAlphaDropout,
    nn.Softmax2d,
    nn.ChannelShuffle,
)


def _mixing(module: nn.Module) -> str | None:
    """Why a module may not stand alone at a time step, or None if nothing speaks against it."""
    name = type(module).__name__
    if isinstance(module, nn.PReLU):
        # Its channels are axis 1: time in a sequence, features in a step.
        return (
            None
            if module.num_parameters == 1
            else f"{name} with several parameters takes axis 1 for features, which is time here"
        )
    if isinstance(module, _MIXING):
        return f"{name} mixes time steps (or takes axis 1 for features), so it cannot run step by step"
    if getattr(module, "CHANGES_RATE", False):
        return f"{name} changes the rate; use `ssmkit.MultiRate`"
    if isinstance(module, SequenceLayer):
        return f"{name} is a sequence layer with a state of its own; put it in a container directly"
    if isinstance(module, _ALONG_LAST_AXIS) and module.dim != -1:
        return f"{name} must have dim=-1, the feature axis, and has dim={module.dim}"
    if isinstance(module, _NORMS) and len(cast(nn.LayerNorm, module).normalized_shape) != 1:
        return f"{name} must normalise the feature axis alone"
    return None


@final
class Pointwise(SequenceLayer):
    r"""A module that treats every time step alone, as a sequence layer without a state.

    :class:`Sequential` and its like wrap the position-wise modules of torch (linear layers, embeddings, norms over the
    feature axis, activations, GLU, dropout, `nn.Sequential` of these) by themselves. Put it around a module of your
    own to say that it maps :math:`(*, d)` to :math:`(*, d')`, each position alone.

    Arguments:
        module: A module from :math:`(*, d_{input})` to :math:`(*, d_{output})`.

    Raises:
        TypeError: If `module` is not a torch module.
        ValueError: If `module` is, or holds, one that mixes time steps.

    Example:
        >>> layer = ssmkit.Pointwise(torch.nn.Linear(3, 5))
        >>> layer.step(torch.randn(2, 3), ())[0].shape
        torch.Size([2, 5])
        >>> ssmkit.Pointwise(torch.nn.Conv1d(3, 3, 5))
        Traceback (most recent call last):
            ...
        ValueError: Pointwise: Conv1d mixes time steps (or takes axis 1 for features), so it cannot run step by step.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"Pointwise: `module` must be a torch module, got {type(module).__name__}.")
        for part in module.modules():
            if reason := _mixing(part):
                raise ValueError(f"Pointwise: {reason}.")
        self.module = module
        self.d_input = _width_before(module)
        self.d_output = _width_after(module, self.d_input)

    def forward(self, u: Tensor, system: System = None) -> Tensor:
        """Applies the module at every position."""
        y: Tensor = self.module(u)
        return y

    def system(self, rate: float = 1.0) -> System:
        """Nothing to discretise: `()`, at any rate."""
        _checks.positive("Pointwise", "rate", rate)
        return ()

    def initial_state(
        self, *batch_shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """No memory: `()`."""
        return ()

    def step(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Applies the module to one sample."""
        module = cast(nn.Module, self._modules["module"])
        # What `Module.__call__` does besides, for hooks, costs as much as the arithmetic of one sample.
        hooked = module._forward_hooks or module._forward_pre_hooks
        hooked = hooked or module._backward_hooks or module._backward_pre_hooks
        return (module(u) if hooked else module.forward(u)), _no_state("Pointwise", state)

    def scan(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Applies the module at every position."""
        return self.module(u), _no_state("Pointwise", state)


def _no_state(where: str, state: State) -> State:
    if not isinstance(state, tuple) or state:
        raise ValueError(f"{where}: `state` must be (), as this layer has no memory, got another layer's.")
    return ()


def _width_before(module: nn.Module) -> int | None:
    """The input width of a layer or position-wise module, or None if its type does not tell."""
    if isinstance(module, (SequenceLayer, nn.Linear)):
        return module.d_input if isinstance(module, SequenceLayer) else module.in_features
    if isinstance(module, _NORMS):
        return cast(nn.LayerNorm, module).normalized_shape[0]
    return _chain_before(list(module)) if isinstance(module, nn.Sequential) else None


def _chain_before(modules: list[nn.Module]) -> int | None:
    """The input width of modules one after another: the first that tells, if those before it keep the width."""
    for module in modules:
        width = _width_before(module)
        inner = module.module if isinstance(module, Pointwise) else module
        if width is not None or not isinstance(inner, _SAME_WIDTH):
            return width
    return None


def _width_after(module: nn.Module, width: int | None) -> int | None:
    """The output width for inputs of a width, or None if the type does not tell."""
    if isinstance(module, Pointwise):
        return _width_after(module.module, width)
    if isinstance(module, SequenceLayer):
        return module.d_output
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return module.out_features if isinstance(module, nn.Linear) else module.embedding_dim
    if isinstance(module, nn.GLU):
        return None if width is None else width // 2
    if isinstance(module, nn.Sequential):
        for child in module:
            width = _width_after(child, width)
        return width
    return width if isinstance(module, _SAME_WIDTH) else None


def _unknown(module: nn.Module) -> nn.Module | None:
    """The first part that is not known to leave time steps alone."""
    if isinstance(module, nn.Sequential):
        return next((part for part in map(_unknown, module) if part is not None), None)
    return None if isinstance(module, _POINTWISE) else module


def _as_layer(where: str, module: nn.Module) -> SequenceLayer:
    if isinstance(module, SequenceLayer):
        return module
    if not isinstance(module, nn.Module):
        raise TypeError(f"{where}: every layer must be a torch module, got {type(module).__name__}.")
    for part in module.modules():
        if reason := _mixing(part):
            raise ValueError(f"{where}: {reason}.")
    if (stranger := _unknown(module)) is not None:
        raise ValueError(
            f"{where}: {type(stranger).__name__} is not known to treat every time step alone; if it does, say so with "
            "`ssmkit.Pointwise(module)`, and if it keeps a memory, write a `ssmkit.SequenceLayer`."
        )
    return Pointwise(module)


class Chain(SequenceLayer):
    """Layers one after another: what :class:`Sequential`, :class:`Residual` and the blocks have in common.

    The system and the state are the tuples of the children's.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        name = type(self).__name__
        self.layers = nn.ModuleList(_as_layer(name, layer) for layer in layers)
        self.d_input = width = _chain_before(list(self.layers))
        for index, layer in enumerate(self._children()):
            if None not in (width, layer.d_input) and layer.d_input != width:
                raise ValueError(
                    f"{name}: layer {index} ({type(layer).__name__}) takes width {layer.d_input}, "
                    f"but the layer before it gives {width}."
                )
            width = _width_after(layer, width)
        self.d_output = width

    def _children(self) -> ValuesView[SequenceLayer]:
        # Past `Module.__getattr__` and `ModuleList.__iter__`, which would cost a step more than its arithmetic.
        return cast(ValuesView[SequenceLayer], self._modules["layers"]._modules.values())  # type: ignore[union-attr]

    def _shares(self, system: System, *states: Any) -> Iterable[tuple[Any, ...]]:
        """Every child with its share of the system and, if there is one, of the state; no system is one for nobody."""
        children = self._children()
        count = len(children)
        if system is None:
            system = (None,) * count
        # A plain tuple: a layer's own system is a named one, which may happen to be as long.
        for value in (system, *states):
            if type(value) is not tuple or len(value) != count:
                self._refuse("system" if value is system else "state", value)
        return zip(children, *states, system, strict=True)

    def _refuse(self, what: str, value: Any) -> NoReturn:
        got = f"a tuple of {len(value)}" if type(value) is tuple else f"a {type(value).__name__}"
        maker = "initial_state(*batch_shape)" if what == "state" else "system()"
        raise ValueError(
            f"{type(self).__name__}: `{what}` must be a tuple of {len(self._children())}, one per layer, got {got}; "
            f"make it with this layer's `{maker}`."
        )

    def _combine(self, u: Tensor, y: Tensor) -> Tensor:
        """The output, from the input and what the last child gave."""
        return y

    def forward(self, u: Tensor, system: System = None) -> Tensor:
        """Maps a whole sequence, from rest, through all children."""
        y = u
        for layer, part in self._shares(system):
            y = layer(y, part)
        return self._combine(u, y)

    def system(self, rate: float = 1.0) -> tuple[System, ...]:
        """The tuple of the children's systems."""
        return tuple(layer.system(rate) for layer in self._children())

    def initial_state(
        self, *batch_shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The tuple of the children's states."""
        return tuple(layer.initial_state(*batch_shape, device=device, dtype=dtype) for layer in self._children())

    def step(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps one sample through all children."""
        y, new = u, []
        for layer, child_state, child_system in self._shares(system, state):
            y, child_state = layer.step(y, child_state, child_system)
            new.append(child_state)
        return self._combine(u, y), tuple(new)

    def scan(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps a chunk through all children."""
        y, new = u, []
        for layer, child_state, child_system in self._shares(system, state):
            y, child_state = layer.scan(y, child_state, child_system)
            new.append(child_state)
        return self._combine(u, y), tuple(new)


@final
class Sequential(Chain):
    r"""Layers one after another.

    Arguments:
        layers: Sequence layers, and position-wise modules of torch as they are (Linear, Embedding, LayerNorm, RMSNorm,
            activations, GLU, Dropout ...).

    Raises:
        TypeError: If one is not a torch module.
        ValueError: If one mixes time steps, is not known to leave them alone, or has a width that does not fit.

    Example:
        >>> model = ssmkit.Sequential(torch.nn.Embedding(256, 16), ssmkit.S4D(16), torch.nn.Linear(16, 256))
        >>> model(torch.randint(256, (2, 100))).shape
        torch.Size([2, 100, 256])
        >>> y, state = model.step(torch.randint(256, (2,)), model.initial_state(2))
        >>> y.shape
        torch.Size([2, 256])
    """


@final
class Checkpoint(Chain):
    r"""Layers one after another whose activations are made again in the backward pass instead of being kept.

    Memory for training falls to the input of the chain and, while its gradient is taken, the activations of this chain
    alone; the time of one more forward pass is paid. In all other respects :class:`Sequential`.

    References:
        | Training Deep Nets with Sublinear Memory Cost (Chen et al., 2016)
        | https://arxiv.org/abs/1604.06174

    Arguments:
        layers: As in :class:`Sequential`.

    Raises:
        TypeError: If one is not a torch module.
        ValueError: If one mixes time steps, is not known to leave them alone, or has a width that does not fit.

    Example:
        >>> network = ssmkit.Sequential(*(ssmkit.Checkpoint(ssmkit.S4Block(8, ssmkit.S4D(8))) for _ in range(2)))
        >>> network(torch.randn(1, 100, 8)).mean().backward()
    """

    def forward(self, u: Tensor, system: System = None) -> Tensor:
        """Maps a whole sequence, from rest, through all children; keeps only the input for the backward pass."""
        y: Tensor = checkpoint(super().forward, u, system, use_reentrant=False)
        return y

    def scan(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps a chunk through all children; keeps only the input and the state for the backward pass."""
        result: tuple[Tensor, State] = checkpoint(super().scan, u, state, system, use_reentrant=False)
        return result


@final
class Residual(Chain):
    r"""Layers one after another, added to their input: :math:`y = u + f(u)`.

    Arguments:
        layers: As in :class:`Sequential`; together they must give back the width they take.

    Raises:
        TypeError: If one is not a torch module.
        ValueError: If one mixes time steps or has a width that does not fit, or if the output's width is not the
            input's.

    Example:
        >>> layer = ssmkit.Residual(torch.nn.LayerNorm(8), ssmkit.S4D(8), torch.nn.GELU())
        >>> layer(torch.randn(2, 20, 8)).shape
        torch.Size([2, 20, 8])
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        if None not in (self.d_input, self.d_output) and self.d_input != self.d_output:
            raise ValueError(
                f"Residual: the layers must give back the width they take, got {self.d_input} in and "
                f"{self.d_output} out."
            )

    def _combine(self, u: Tensor, y: Tensor) -> Tensor:
        if u.shape != y.shape:
            raise ValueError(
                f"Residual: the layers must keep the shape {tuple(u.shape)} of their input, got {tuple(y.shape)}."
            )
        return u + y


@final
class TiedDropout(SequenceLayer):
    r"""Dropout with one mask for the whole sequence: a feature is dropped at every time step, or at none.

    A new mask is drawn for every sequence of the batch by :meth:`forward` and by :meth:`initial_state`; in
    :meth:`step` and :meth:`scan` it lives in the state, so that a stream keeps its mask. It is applied in training
    only.

    References:
        | A Theoretically Grounded Application of Dropout in Recurrent Neural Networks (Gal and Ghahramani, 2016)
        | https://arxiv.org/abs/1512.05287

    Arguments:
        d_model: The number of features :math:`H`.
        p: The probability with which a feature is dropped; what is kept is scaled by :math:`1 / (1 - p)`.

    Raises:
        ValueError: If `p` is not at least 0 and less than 1.

    Example:
        >>> layer = ssmkit.TiedDropout(4, p=0.5)
        >>> y = layer(torch.ones(2, 100, 4))
        >>> bool((y == y[:, :1]).all())
        True
    """

    def __init__(self, d_model: int, p: float = 0.5) -> None:
        super().__init__()
        self.d_input = self.d_output = self.d_model = _checks.integer("TiedDropout", "d_model", d_model)
        self.p = _checks.probability("TiedDropout", "p", p)

    def forward(self, u: Tensor, system: System = None) -> Tensor:
        """Maps a whole sequence with a mask drawn for it."""
        _checks.sequence("TiedDropout", "u", u, self.d_model)
        mask = self.initial_state(*u.shape[:-2], device=u.device, dtype=u.dtype)
        return self._apply_mask(u, cast(Tensor, mask)[..., None, :])

    def system(self, rate: float = 1.0) -> System:
        """Nothing to discretise: `()`, at any rate."""
        _checks.positive("TiedDropout", "rate", rate)
        return ()

    def initial_state(
        self, *batch_shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Draws the mask of a stream: 0 for a dropped feature and 1 / (1 - p) for a kept one."""
        kept = torch.rand(*batch_shape, self.d_model, device=device) >= self.p
        return kept.to(at_least_float32(dtype or torch.float32)) / (1 - self.p)

    def step(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps one sample with the mask of the state."""
        mask = _checks.state("TiedDropout", state, u.shape)
        return self._apply_mask(u, mask), mask

    def scan(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps a chunk with the mask of the state."""
        mask = _checks.state("TiedDropout", state, (*u.shape[:-2], self.d_model))
        return self._apply_mask(u, mask[..., None, :]), mask

    def _apply_mask(self, u: Tensor, mask: Tensor) -> Tensor:
        return u * mask.to(u.dtype) if self.training else u

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.d_model}, p={self.p}"
