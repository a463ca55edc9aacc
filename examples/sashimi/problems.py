"""Errors that a user can correct."""

from __future__ import annotations

import sys
from collections.abc import Callable


class Problem(Exception):
    """An input cannot be used; the message says in one sentence which, why, and what to do."""


def exit_status(command: str, run: Callable[[], None]) -> int:
    """Runs a command; prints errors that a user can correct in one sentence."""
    try:
        run()
    except Problem as problem:
        print(f"{command}: {problem}", file=sys.stderr)
        return 1
    return 0
