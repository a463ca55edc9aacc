"""How vectors are laid out in the arrays of a program: each begins at a cache line."""

from __future__ import annotations

from typing import Any

from .compiling import compiled

__all__ = ["LANE", "compiled_lines", "lines"]

LANE = 16
"""Float32 numbers in a cache line: vectors begin at multiples of it, and so do the parts of the threads of a team."""


def lines(size: Any) -> Any:
    """The smallest multiple of :data:`LANE` that is at least `size`."""
    return (size + LANE - 1) // LANE * LANE


compiled_lines = compiled(lines)
"""The same, for use in compiled functions."""
