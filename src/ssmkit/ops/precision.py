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


def full_precision(device_type: str, *, always: bool = False) -> AbstractContextManager[Any]:
    """Switches autocast off if it is on, or `always`; otherwise does nothing, since entering a context is slow.

    Some devices, such as `meta`, have no autocast.
    """
    if torch.amp.is_autocast_available(device_type) and (always or torch.is_autocast_enabled(device_type)):
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
        # Tracing is inside the forward pass, where autocast is off; the traced backward pass runs where it may be on.
        traced = torch.compiler.is_compiling()
        with full_precision(devices[0], always=traced) if devices else nullcontext():
            return backward(ctx, *gradients)

    return run
