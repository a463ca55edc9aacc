"""Autocast is off where this package computes, in backward passes too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["full_precision", "full_precision_backward"]

_T = TypeVar("_T")


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Switches autocast off if it is on; otherwise does nothing, since entering a context is slow.

    Some devices, such as `meta`, have no autocast.
    """
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    # Autocast may be on when traced code runs, though it is off during tracing: in the backward pass of a function.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def full_precision_backward(backward: Callable[..., _T]) -> Callable[..., _T]:
    """Decorates the backward pass of an autograd function: autocast is off in it.

    Without it autocast is on if the caller calls `backward` inside its context, and under `torch.compile`, which traces
    the backward pass inside the context of the forward pass.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> _T:
        devices = [g.device.type for g in gradients if g is not None]
        with full_precision(devices[0]) if devices else nullcontext():
            return backward(ctx, *gradients)

    return run
