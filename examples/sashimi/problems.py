"""Errors that a user can correct."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable


class Problem(Exception):
    """An input cannot be used; the message says in one sentence which, why, and what to do."""


def exit_status(program: str, run: Callable[[], None]) -> int:
    """Runs a program; what a user can put right is said in one sentence.

    Arguments:
        program: Its name, which the sentence begins with.
        run: What it does.

    Returns:
        0; 1 after a sentence; 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        run()
    except Problem as problem:
        text = str(problem)
    except OSError as error:
        text = f"{error.filename or 'a file'} cannot be used ({error.strerror or error})."
    except (MemoryError, RuntimeError) as error:
        # torch has no error of its own for a full memory on a CPU.
        if isinstance(error, RuntimeError) and "allocat" not in str(error):
            raise
        text = "the memory is full; use a smaller network, batch or excerpt, or fewer streams."
    except KeyboardInterrupt:
        print(f"{program}: stopped.", file=sys.stderr)
        return 130
    else:
        return 0
    print(f"{program}: {' '.join(text.splitlines())}", file=sys.stderr)
    return 1
