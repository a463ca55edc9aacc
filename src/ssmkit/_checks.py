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
from typing import Any, cast

import torch
from torch import Tensor

__all__ = [
    "FLOATING",
    "at_least",
    "batch",
    "choice",
    "device",
    "dtype",
    "even",
    "flags",
    "floating",
    "given",
    "holds",
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
    "same_device",
    "sequence",
    "shape",
    "shown",
    "state",
    "step_size",
    "tensor",
    "with_values",
]

FLOATING = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
"""The dtypes of weights, inputs and states: those that promote to float32 or float64."""
_INTEGER_LIMIT = 2**31
_STEP_LIMIT = 1e12
"""Larger step sizes overflow in the arithmetic of complex numbers, and forget all but the last sample anyway."""


def integer(where: str, name: str, value: Any, least: int = 1) -> int:
    """An integer of at least `least`, and small enough for a size."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: `{name}` must be an integer, got {shown(value)}.")
    if value < least:
        raise ValueError(f"{where}: `{name}` must be at least {least}, got {value}.")
    if value >= _INTEGER_LIMIT:
        raise ValueError(f"{where}: `{name}` must be less than {_INTEGER_LIMIT}.")
    return value


def flags(where: str, **values: Any) -> None:
    """Values that are True or False, by their names."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{where}: `{name}` must be True or False, got {shown(value)}.")


def even(where: str, name: str, value: Any) -> int:
    """A positive even integer."""
    if integer(where, name, value, least=-_INTEGER_LIMIT) <= 0 or value % 2:
        raise ValueError(
            f"{where}: `{name}` must be a positive even integer (poles come in conjugate pairs), got {value}."
        )
    return int(value)


def number(where: str, name: str, value: Any) -> float:
    """A real number, which True and False are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where}: `{name}` must be a number, got {shown(value)}.")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{where}: `{name}` must be a number that a float can hold.") from None


def positive(where: str, name: str, value: float) -> float:
    """A finite number above zero."""
    found = number(where, name, value)
    if not 0 < found < math.inf:
        raise ValueError(f"{where}: `{name}` must be a positive number, got {value!r}.")
    return found


def less(where: str, low_name: str, low: float, high_name: str, high: float) -> None:
    """Two numbers in order."""
    if not low < high:
        raise ValueError(f"{where}: `{low_name}` must be less than `{high_name}`, got {low!r} and {high!r}.")


def positive_range(where: str, low_name: str, low: float, high_name: str, high: float) -> tuple[float, float]:
    """Two step sizes in order."""
    low, high = positive(where, low_name, low), step_size(where, high_name, high)
    less(where, low_name, low, high_name, high)
    return low, high


def step_size(where: str, name: str, value: float) -> float:
    """A number above zero that is not too large for a step size, or a factor of one."""
    found = positive(where, name, value)
    if found > _STEP_LIMIT:
        raise ValueError(f"{where}: `{name}` must be at most {_STEP_LIMIT:g}, got {value!r}.")
    return found


def at_least(where: str, name: str, value: float, least: float) -> float:
    """A finite number with a lower bound."""
    if not least <= number(where, name, value) < math.inf:
        raise ValueError(f"{where}: `{name}` must be finite and at least {least}, got {value!r}.")
    return value


def rate(where: str, value: Any) -> None:
    """A positive number, or a floating tensor of rates, whose values are not checked."""
    if not isinstance(value, Tensor):
        step_size(where, "rate", value)
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
    if isinstance(value, str) and value in options:
        return value
    close = difflib.get_close_matches(value, options, n=1) if isinstance(value, str) else []
    hint = f" Did you mean {close[0]!r}?" if close else ""
    got = " ".join(repr(value).split())
    raise ValueError(f"{where}: unknown `{name}` {got}; the known ones are {', '.join(options)}.{hint}")


def choice(where: str, name: str, value: Any, options: Iterable[str]) -> None:
    """A name from a list, or a function."""
    if isinstance(value, str):
        known(where, name, value, options)
    elif not callable(value):
        raise TypeError(f"{where}: `{name}` must be a name or a function, got {shown(value)}.")


def dtype(where: str, value: torch.dtype | None) -> torch.dtype | None:
    """A real floating dtype, or None for torch's default."""
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(f"{where}: `dtype` must be a torch.dtype, got {shown(value)}.")
    if value is not None and value not in FLOATING:
        raise ValueError(
            f"{where}: `dtype` must be a real floating dtype (complex values are kept as real pairs) of at least 16 "
            f"bits, got {value}."
        )
    return value


def holds(where: str, of_dtype: torch.dtype, *values: Tensor) -> None:
    """Initial values that are finite in the dtype of the parameters."""
    largest = max((float(value.abs().max()) for value in values if value.numel()), default=0.0)
    if largest > torch.finfo(of_dtype).max:
        raise ValueError(f"{where}: `dtype` must hold the initial values, up to {largest:.3g}, got {of_dtype}.")


def device(where: str, value: torch.device | str | None) -> torch.device | str | None:
    """A device that exists here, or None for the default."""
    # A trace has the devices of its inputs, and must not have another operation.
    if value is not None and not torch.compiler.is_compiling():
        try:
            torch.empty(0, device=value)
        except (TypeError, ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"{where}: `device` must be a device that torch has here, got {shown(value)}.") from error
    return value


def given(where: str, of_device: torch.device | str | None, of_dtype: torch.dtype | None) -> dict[str, Any]:
    """The checked arguments `device` and `dtype` of tensors and modules of torch."""
    return {"device": device(where, of_device), "dtype": dtype(where, of_dtype)}


def batch(where: str, shape: Iterable[Any]) -> None:
    """The batch axes of a state or a stream."""
    for size in shape:
        if not isinstance(size, torch.SymInt):
            integer(where, "batch_shape", size, least=0)


def tensor(where: str, name: str, value: Any) -> Tensor:
    """A dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: `{name}` must be a tensor, got {type(value).__name__}.")
    if value.layout is not torch.strided:
        raise TypeError(f"{where}: `{name}` must be a dense tensor, got layout {value.layout}.")
    return value


def with_values(where: str, name: str, value: Any) -> Tensor:
    """A dense tensor whose values can be read."""
    if tensor(where, name, value).is_meta:
        raise ValueError(f"{where}: `{name}` must have values, got a tensor on the device meta.")
    return cast(Tensor, value)


def same_device(where: str, name: str, value: torch.device, other_name: str, other: torch.device) -> None:
    """Two arguments on one device."""
    if value != other:
        raise ValueError(f"{where}: `{name}` must be on the device of `{other_name}`, {other}, got {value}.")


def floating(where: str, name: str, value: Tensor) -> Tensor:
    """A real floating tensor, which torch.jit does not trace."""
    tensor(where, name, value)
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise TypeError(
            f"{where}: `{name}` must not be traced by torch.jit, which would keep its length and the phase of a state "
            "as constants; use torch.export."
        )
    if value.dtype not in FLOATING:
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


def state(where: str, value: Any, expected: Sequence[int], like: Tensor | None = None) -> Tensor:
    """A state tensor that this layer could have made for this batch, on the device of an input `u`."""
    if not isinstance(value, Tensor) or value.shape != tuple(expected):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(
            f"{where}: `state` must have shape {tuple(expected)}, got {got}; a state belongs to one layer and "
            "one batch shape: make it with this layer's `initial_state(*batch_shape)`."
        )
    if tensor(where, "state", value).dtype not in FLOATING:
        raise TypeError(f"{where}: `state` must be a real floating tensor, got {value.dtype}.")
    if like is not None:
        same_device(where, "state", value.device, "u", like.device)
    return value


def shown(value: Any) -> str:
    """A value and its type in one line."""
    text = " ".join(repr(value).split())
    return f"{text if len(text) < 80 else text[:77] + '...'} ({type(value).__name__})"
