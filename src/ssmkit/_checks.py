"""Checks of arguments, whose errors are one clear sentence.

Shapes and dtypes are always checked; values only if they are Python numbers, because reading the values of a tensor
would synchronise the device and break compilation.
"""

from __future__ import annotations

import difflib
import functools
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "at_least",
    "dtype",
    "even",
    "floating",
    "integer",
    "known",
    "last_axis",
    "less",
    "number",
    "one_dtype",
    "positive",
    "positive_range",
    "probability",
    "rate",
    "sequence",
    "shape",
    "state",
]


def integer(where: str, name: str, value: Any, least: int = 1) -> int:
    """An integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: `{name}` must be an integer, got {value!r} ({type(value).__name__}).")
    if value < least:
        raise ValueError(f"{where}: `{name}` must be at least {least}, got {value}.")
    return value


def even(where: str, name: str, value: Any) -> int:
    """A positive even integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: `{name}` must be an integer, got {value!r} ({type(value).__name__}).")
    if value <= 0 or value % 2:
        raise ValueError(
            f"{where}: `{name}` must be a positive even integer (poles come in conjugate pairs), got {value}."
        )
    return value


def number(where: str, name: str, value: Any) -> float:
    """A real number, which True and False are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where}: `{name}` must be a number, got {value!r} ({type(value).__name__}).")
    return float(value)


def positive(where: str, name: str, value: float) -> float:
    """A finite number above zero."""
    if not 0 < number(where, name, value) < math.inf:
        raise ValueError(f"{where}: `{name}` must be a positive number, got {value!r}.")
    return value


def less(where: str, low_name: str, low: float, high_name: str, high: float) -> None:
    """Two numbers in order."""
    if not low < high:
        raise ValueError(f"{where}: `{low_name}` must be less than `{high_name}`, got {low!r} and {high!r}.")


def positive_range(where: str, low_name: str, low: float, high_name: str, high: float) -> tuple[float, float]:
    """Two finite numbers above zero, in order."""
    positive(where, low_name, low)
    positive(where, high_name, high)
    less(where, low_name, low, high_name, high)
    return low, high


def at_least(where: str, name: str, value: float, least: float) -> float:
    """A finite number with a lower bound."""
    if not least <= number(where, name, value) < math.inf:
        raise ValueError(f"{where}: `{name}` must be finite and at least {least}, got {value!r}.")
    return value


def rate(where: str, value: Any) -> None:
    """A positive number, or a floating tensor of rates, whose values are not checked."""
    if not isinstance(value, Tensor):
        positive(where, "rate", value)
    elif not value.is_floating_point():
        raise TypeError(f"{where}: `rate` must be a number or a real floating tensor, got {value.dtype}.")


def probability(where: str, name: str, value: float) -> float:
    """A number in [0, 1)."""
    if not 0 <= number(where, name, value) < 1:
        raise ValueError(f"{where}: `{name}` must be at least 0 and less than 1, got {value!r}.")
    return value


def known(where: str, name: str, value: Any, options: Iterable[str]) -> str:
    """A name from a list; the error for a misspelt one suggests the closest."""
    options = sorted(options)
    if value in options:
        return str(value)
    close = difflib.get_close_matches(str(value), options, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{where}: unknown `{name}` {value!r}; the known ones are {', '.join(options)}.{hint}")


def dtype(where: str, value: torch.dtype | None) -> torch.dtype | None:
    """A real floating dtype, or None for torch's default."""
    if value is not None and not value.is_floating_point:
        raise ValueError(
            f"{where}: `dtype` must be a real floating dtype (complex values are kept as real pairs), got {value}."
        )
    return value


def floating(where: str, name: str, value: Tensor) -> Tensor:
    """A real floating tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: `{name}` must be a tensor, got {type(value).__name__}.")
    if not value.is_floating_point():
        raise TypeError(
            f"{where}: `{name}` must be a real floating tensor, got {value.dtype}; "
            "convert it with `.float()`, or put an `nn.Embedding` in front for class indices."
        )
    return value


def one_dtype(where: str, **values: Any) -> list[Tensor]:
    """Real floating tensors, by their names, in the dtype that all of them promote to."""
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{where}: `{name}` must be a real floating tensor, got {got}.")
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in values.values()))
    return [value.to(dtype) for value in values.values()]


def last_axis(where: str, name: str, value: Tensor, size: int) -> None:
    """A tensor (*, size)."""
    if value.ndim < 1 or value.shape[-1] != size:
        raise ValueError(f"{where}: the last axis of `{name}` must be {size}, got shape {tuple(value.shape)}.")


def sequence(where: str, name: str, value: Tensor, size: int) -> Tensor:
    """A real floating tensor (*, length, size)."""
    floating(where, name, value)
    if value.ndim < 2:
        raise ValueError(
            f"{where}: `{name}` must have shape (*, length, {size}), got {tuple(value.shape)}; "
            "for one sample use `step`."
        )
    last_axis(where, name, value, size)
    return value


def shape(where: str, name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    """A tensor of the expected shape."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{where}: `{name}` must have shape {tuple(expected)} ({meaning}), got {tuple(value.shape)}.")


def state(where: str, value: Any, expected: Sequence[int]) -> Tensor:
    """A state tensor that this layer could have made for this batch."""
    if not isinstance(value, Tensor) or value.shape != tuple(expected):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(
            f"{where}: `state` must have shape {tuple(expected)}, got {got}; a state belongs to one layer and "
            "one batch shape: make it with this layer's `initial_state(*batch_shape)`."
        )
    return value
