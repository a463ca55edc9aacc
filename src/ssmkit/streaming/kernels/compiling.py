"""How functions are compiled, and how compiled code is cached on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

__all__ = ["SOURCES", "allocating", "compiled", "entry", "fingerprint"]

# NaN and infinity keep their meaning; sums may be reordered for the vector unit.
_OPTIONS: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz", "arcp"}, "error_model": "numpy", "nogil": True}

compiled = numba.njit(_nrt=False, **_OPTIONS)
"""Compiles a function without reference counts: for slices inside a loop they cost more than the arithmetic."""

allocating = numba.njit(**_OPTIONS)
"""Compiles a function that makes arrays, which needs reference counts."""


def fingerprint(folder: Path) -> int:
    """A number of 56 bits that changes when a Python file of a folder changes, appears, disappears or is renamed."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        text = path.read_bytes()
        digest.update(f"{path.name} {len(text)} ".encode() + text)
    return int.from_bytes(digest.digest()[:7], "big")


SOURCES = fingerprint(Path(__file__).parent)
"""The fingerprint of this folder."""


def entry(make: Callable[[int], Callable[..., Any]]) -> Any:
    """Compiles a function that Python calls, and caches it on disk if a cache folder can be written.

    The key of numba's cache contains the file of the function itself, not the files of the functions that it calls. It
    also contains the values that the function closes over, so every entry closes over :data:`SOURCES`, and is compiled
    again when any file of this folder has changed.

    Arguments:
        make: Maps the fingerprint of the sources to the function. The function has to use it: it returns it.

    Returns:
        The compiled function.
    """
    function = make(SOURCES)
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:
        return allocating(function)
