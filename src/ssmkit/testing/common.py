"""Common parts of the laws: inputs, errors, and comparisons of states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..layers.base import SequenceLayer
from ..states import State

__all__ = [
    "RTOL",
    "clone",
    "equal",
    "evaluating",
    "example_input",
    "leaves",
    "relative_error",
    "same",
    "same_state",
    "state_dtype",
    "time_axis",
    "weights",
]

RTOL = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""The largest errors allowed between modes."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    r"""The error by which modes are compared, :math:`\max |\hat y - y| / \max |y|`.

    Arguments:
        actual: The values to check.
        expected: The values to compare with, of the same shape.

    Returns:
        The error; 0 if both are empty, the absolute error if `expected` is zero.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> relative_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
        0.25
    """
    _checks.shape("relative_error", "actual", actual, expected.shape, "that of `expected`")
    if expected.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - expected.detach().double()).abs().max()
    scale = expected.detach().double().abs().max()
    return float(difference / scale) if scale > 0 else float(difference)


def example_input(layer: SequenceLayer, *shape: int) -> Tensor:
    """Random input for a layer: class indices if it begins with an embedding, else normal numbers.

    Arguments:
        layer: A sequence layer.
        shape: The axes in front of the feature axis, batch and length.

    Returns:
        The input, in the dtype and on the device of the layer's first parameter.

    Raises:
        ValueError: If the input width of the layer is not known.

    Example:
        >>> example_input(ssmkit.Sequential(torch.nn.Embedding(256, 8), ssmkit.S4D(8)), 2, 5).shape
        torch.Size([2, 5])
    """
    like = next((p for p in layer.parameters() if p.is_floating_point()), torch.zeros(()))
    first: nn.Module = layer
    while not isinstance(first, nn.Embedding) and getattr(first, "d_input", None) is None:
        children = list(first.children())
        if not children:
            raise ValueError(
                f"example_input: the input width of {type(layer).__name__} is not known; set its `d_input`, or pass an "
                "input as `u`."
            )
        first = children[0]
    if isinstance(first, nn.Embedding):
        return torch.randint(first.num_embeddings, shape, device=like.device)
    width: Any = first.d_input
    return torch.randn(*shape, width, device=like.device, dtype=like.dtype)


@contextmanager
def evaluating(layer: nn.Module) -> Iterator[None]:
    """Puts a layer into eval mode for a while."""
    was_training = [module for module in layer.modules() if module.training]
    layer.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


def leaves(state: State) -> list[Tensor | int]:
    """The tensors and phases of a state, in order."""
    if isinstance(state, tuple):
        return [leaf for child in state for leaf in leaves(child)]
    return [state]


def clone(state: State) -> State:
    """A copy of a state."""
    if isinstance(state, tuple):
        return tuple(clone(child) for child in state)
    return state.clone() if isinstance(state, Tensor) else state


def equal(a: State, b: State) -> bool:
    """Whether two states have the same values."""
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(leaves(a), leaves(b), strict=True)
    )


def same(
    name: str, what: str, other: str, actual: Tensor, expected: Tensor, *, rtol: float, scale: Tensor | None = None
) -> None:
    """Asserts that two tensors agree, up to an error relative to the largest value of `scale`, by default `expected`.

    With `rtol=0` they must be equal to the bit.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: {what} has shape {tuple(actual.shape)}, and {other} {tuple(expected.shape)}.")
    if not expected.numel():
        return
    largest = (expected if scale is None else scale).double().abs().max().item() or 1.0
    error = (actual.double() - expected.double()).abs().max().item() / largest
    if not error <= rtol:
        allowed = f"{rtol:.0e} is allowed" if rtol else "they must be equal"
        raise AssertionError(f"{name}: {what} differs from {other} by {error:.1e} of the largest output; {allowed}.")


def same_state(name: str, what: str, other: str, actual: State, expected: State, *, rtol: float) -> None:
    """Asserts that two states agree: phases exactly, and tensors up to an error."""
    found, wanted = leaves(actual), leaves(expected)
    if len(found) != len(wanted):
        raise AssertionError(f"{name}: the state of {what} has {len(found)} leaves, and that of {other} {len(wanted)}.")
    for a, b in zip(found, wanted, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and b.is_floating_point():
            same(name, f"the state of {what}", f"that of {other}", a, b, rtol=rtol)
        elif not bool((torch.as_tensor(a) == torch.as_tensor(b)).all()):
            # A phase is an integer, or a tensor of one for each row.
            raise AssertionError(f"{name}: {what} ends at phase {a}, and {other} at {b}.")


def time_axis(u: Tensor) -> int:
    """The axis of time, counted from the front; class indices have no feature axis."""
    return u.ndim - (2 if u.is_floating_point() else 1)


def state_dtype(u: Tensor) -> torch.dtype | None:
    """The dtype of a state for an input; None for class indices, for that of the weights."""
    return u.dtype if u.is_floating_point() else None


def weights(y: Tensor) -> Tensor:
    """Different weights for a sum over outputs."""
    places = torch.arange(y.numel(), device=y.device, dtype=torch.float64)
    return (1 + (places * 0.618).frac()).reshape(y.shape).to(y.dtype)
