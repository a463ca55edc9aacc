"""Threads that run one program together: what each computes, and how they wait for each other.

Coverage is measured without the compiler; the functions that build LLVM code do not run then.
"""

from __future__ import annotations

import os
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiling import compiled
from .layout import LANE, compiled_lines

__all__ = ["share", "wait"]


@compiled
def share(n: Any, rank: Any, team: Any) -> Any:
    """Begin and end of the part of n numbers that a thread of a team computes; parts are whole cache lines."""
    if team == 1:
        return 0, n
    count = compiled_lines(n) // LANE
    return min(n, count * rank // team * LANE), min(n, count * (rank + 1) // team * LANE)


@intrinsic  # pragma: no cover
def _publish(context: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value, with release order: a thread that reads the value also sees all earlier writes."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments)
        builder.store_atomic(arguments[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, types.int64), build


@intrinsic  # pragma: no cover
def _observe(context: Any, array: Any, index: Any) -> Any:
    """array[index], with acquire order: later reads of this thread are not moved before it."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(context, builder, signature, arguments), "acquire", 8)

    return types.int64(array, types.intp), build


def _pointer(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:  # pragma: no cover
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return cgutils.get_item_pointer(context, builder, signature.args[0], array, [arguments[1]], wraparound=False)


if hasattr(os, "sched_yield"):
    _yield_core = types.ExternalFunction("sched_yield", types.int32())
else:

    @compiled
    def _yield_core() -> int:
        return 0


@compiled
def wait(arrivals: Any, rank: Any, team: Any) -> None:
    """Barrier: returns when all threads of the team have called it as often as this one.

    It spins first; then it also yields its core, since a thread of the team may be waiting for one.
    """
    if team == 1:
        return
    mine = _observe(arrivals, rank * LANE) + 1
    _publish(arrivals, rank * LANE, mine)
    for other in range(team):
        spins = 0
        while _observe(arrivals, other * LANE) < mine:
            spins += 1
            if spins > 4096:
                _yield_core()
