r"""Position-wise modules, which map every time step separately: which of torch's are, and their sequence layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn, cast, final

import torch
from torch import Tensor, nn

from .. import _checks
from ..ops.transforms import transformed
from ..states import State
from .base import SequenceLayer, System

__all__ = ["UNFIT", "Pointwise", "as_layer", "chain_input_width", "no_state", "output_width", "refuse_input"]

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

# Modules that `Pointwise` refuses: they run on a sequence and mix its time steps, or its batch. Containers also refuse
# all other modules that are not known to be position-wise.
_MIXING: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.ConvTranspose1d,
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.BatchNorm1d,
    nn.InstanceNorm1d,
    nn.GroupNorm,
    nn.MaxPool1d,
    nn.AvgPool1d,
    nn.Dropout1d,
)


def _layer_norm(norm: nn.LayerNorm, u: Tensor) -> Tensor:
    centred = u - u.mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    y = y if norm.weight is None else y * norm.weight
    return y if norm.bias is None else y + norm.bias


def _glu(_: nn.GLU, u: Tensor) -> Tensor:
    values, gates = u.chunk(2, dim=-1)
    return values * gates.sigmoid()


_PLAIN: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {nn.LayerNorm: _layer_norm, nn.GLU: _glu}
"""Modules whose second derivatives torch cannot take there: those of LayerNorm are wrong under vmap and in two levels
of forward mode (pytorch issue 196700), and those of GLU are missing."""


def _hooked(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks)


def _apply(module: nn.Module, u: Tensor) -> Tensor:
    """Calls a module, or its plain form under torch.func."""
    plain = _PLAIN.get(type(module)) if transformed() and not _hooked(module) else None
    y: Tensor = module(u) if plain is None else plain(module, u)
    return y


def _mixing(module: nn.Module) -> str | None:
    """Why a module cannot run on single time steps, or None if no reason is known."""
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
        return f"{name} must normalise only the feature axis"
    return None


@final
class Pointwise(SequenceLayer):
    r"""A position-wise module, which maps every time step separately, as a sequence layer without a state.

    Containers wrap the position-wise modules of torch (linear layers, embeddings, norms over the feature axis,
    activations, GLU, dropout, `nn.Sequential` of these) automatically. Wrap a module of your own to declare that it
    maps :math:`(*, d)` to :math:`(*, d')`, each position separately.

    Arguments:
        module: A module from :math:`(*, d_{input})` to :math:`(*, d_{output})`.

    Raises:
        TypeError: If `module` is not a torch module.
        ValueError: If `module` is, or holds, one that mixes time steps.

    Example:
        >>> layer = ssmkit.Pointwise(torch.nn.Linear(3, 5))
        >>> layer.step(torch.randn(2, 3), ())[0].shape
        torch.Size([2, 5])
        >>> ssmkit.Pointwise(ssmkit.DownPool(4))
        Traceback (most recent call last):
            ...
        ValueError: Pointwise: `module` must be position-wise, and DownPool changes the rate; use `ssmkit.MultiRate`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"Pointwise: `module` must be a torch module, got {type(module).__name__}.")
        for part in module.modules():
            if reason := _mixing(part):
                raise ValueError(f"Pointwise: `module` must be position-wise, and {reason}.")
        self.module = module
        self.d_input = input_width(module)
        self.d_output = output_width(module, self.d_input)

    def forward(self, u: Tensor, system: System = None) -> Tensor:
        """Applies the module at every position."""
        return self._applied(u)

    def system(self, rate: float | Tensor = 1.0) -> System:
        """Nothing to discretise: `()`, at any rate."""
        _checks.rate("Pointwise", rate)
        return ()

    def initial_state(
        self, *batch_shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """No memory: `()`."""
        _checks.batch("Pointwise", batch_shape)
        _checks.given("Pointwise", device, dtype)
        return ()

    def step(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Applies the module to one sample."""
        return self._applied(u, direct=True), no_state("Pointwise", state)

    def scan(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Applies the module at every position."""
        return self._applied(u), no_state("Pointwise", state)

    def _applied(self, u: Tensor, *, direct: bool = False) -> Tensor:
        """The output of the module, or an error in one sentence."""
        _checks.tensor("Pointwise", "u", u)
        module = cast(nn.Module, self._modules["module"])
        try:
            # The handling of hooks in `Module.__call__` costs as much as the arithmetic of one sample.
            y: Tensor = module.forward(u) if direct and not (transformed() or _hooked(module)) else _apply(module, u)
        except UNFIT as error:
            if _unknown(module) is not None:
                raise  # by a user's own module
            refuse_input("Pointwise", "u", u, module, error)
        # An embedding takes indices on the device meta, and reads no weights.
        if y.device != u.device and _unknown(module) is None:
            _checks.same_device("Pointwise", "u", u.device, "module", y.device)
        return y


UNFIT = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)
"""What modules of torch raise for an input that does not fit."""


def refuse_input(where: str, name: str, u: Tensor, module: nn.Module, error: Exception) -> NoReturn:
    """Turns an error of a module of torch about its input into one sentence."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    raise ValueError(
        f"{where}: `{name}` must be an input of {type(module).__name__}, got {u.dtype} of shape {tuple(u.shape)} "
        f"({reason})."
    ) from error


def no_state(where: str, state: State) -> State:
    """Checks the state of a layer without memory, which is `()`, and returns it."""
    if not isinstance(state, tuple) or state:
        raise ValueError(f"{where}: `state` must be (), as this layer has no memory, got another layer's.")
    return ()


def input_width(module: nn.Module) -> int | None:
    """The input width of a layer or position-wise module, or None if it is not known."""
    if isinstance(module, (SequenceLayer, nn.Linear)):
        return module.d_input if isinstance(module, SequenceLayer) else module.in_features
    if isinstance(module, _NORMS):
        return cast(nn.LayerNorm, module).normalized_shape[0]
    return chain_input_width(module) if isinstance(module, nn.Sequential) else None


def chain_input_width(modules: Iterable[nn.Module]) -> int | None:
    """The input width of modules one after another: the first known one, if the modules before it keep the width."""
    for module in modules:
        width = input_width(module)
        inner = module.module if isinstance(module, Pointwise) else module
        if width is not None or not isinstance(inner, _SAME_WIDTH):
            return width
    return None


def output_width(module: nn.Module, width: int | None) -> int | None:
    """The output width for inputs of a width, or None if it is not known."""
    if isinstance(module, Pointwise):
        return output_width(module.module, width)
    if isinstance(module, SequenceLayer):
        return module.d_output
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return module.out_features if isinstance(module, nn.Linear) else module.embedding_dim
    if isinstance(module, nn.GLU):
        return None if width is None else width // 2
    if isinstance(module, nn.Sequential):
        for child in module:
            width = output_width(child, width)
        return width
    return width if isinstance(module, _SAME_WIDTH) else None


def _unknown(module: nn.Module) -> nn.Module | None:
    """The first part that is not known to be position-wise."""
    if isinstance(module, nn.Sequential):
        return next((part for part in map(_unknown, module) if part is not None), None)
    return None if isinstance(module, _POINTWISE) else module


def as_layer(where: str, name: str, module: nn.Module) -> SequenceLayer:
    """Returns a sequence layer unchanged, and a position-wise module in a :class:`Pointwise`; raises an error for
    everything else.
    """
    if isinstance(module, SequenceLayer):
        return module
    if not isinstance(module, nn.Module):
        raise TypeError(f"{where}: `{name}` must be torch modules, got {_checks.shown(module)}.")
    for part in module.modules():
        if reason := _mixing(part):
            raise ValueError(f"{where}: `{name}` must be position-wise, and {reason}.")
    if (unknown := _unknown(module)) is not None:
        raise ValueError(
            f"{where}: `{name}` must be position-wise, and {type(unknown).__name__} is not known to be position-wise; "
            "if it is, say so with `ssmkit.Pointwise(module)`, and if it keeps a memory, write a "
            "`ssmkit.SequenceLayer`."
        )
    return Pointwise(module)
