"""What a user can put right."""

from __future__ import annotations

import sys
from collections.abc import Callable


class Problem(Exception):
    """Something that was handed over cannot be used; the message says in one sentence what, and what to do."""


def exit_status(program: str, run: Callable[[], None]) -> int:
    """Runs a program; what a user can put right is said in one sentence."""
    try:
        run()
    except Problem as problem:
        print(f"{program}: {problem}", file=sys.stderr)
        return 1
    return 0
