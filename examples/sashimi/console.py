"""What a user sees and does while the program runs: progress, announcements, Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

from tqdm import tqdm

Stage: TypeAlias = Callable[[str, int], Callable[[int], object]]
"""Begins a part of some work, by its name and its size; returns what is called with every piece that is done."""


def silent(what: str, total: int) -> Callable[[int], object]:
    """A stage that nobody sees."""
    return lambda done: None


def bar(total: int | None, what: str, start: int = 0, unit: str = "sample") -> tqdm[None]:
    """A progress bar; into a file it prints a line every half minute instead of two a second."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(
        total=total, initial=start, desc=what, unit=unit, unit_scale=True, mininterval=interval, dynamic_ncols=True
    )


@contextmanager
def stages(unit: str = "sample") -> Iterator[Stage]:
    """Shows stages one after another, each by a progress bar."""
    with ExitStack() as stack:

        def begin(what: str, total: int) -> Callable[[int], object]:
            stack.close()
            progress = stack.enter_context(bar(total, what, unit=unit))
            return lambda done: progress.update(done)

        yield begin


@contextmanager
def announced(text: str, after: float = 2.0) -> Iterator[None]:
    """Prints a line to standard error if what is done inside takes longer than `after` seconds."""
    timer = threading.Timer(after, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def interrupts(patient: bool = False) -> Iterator[list[int]]:
    """Collects Ctrl-C, so that what is under way ends where it can go on later.

    Arguments:
        patient: Collect a second one, too, instead of ending at once: `torchrun` sends one of its own after that of the
            terminal.

    Yields:
        What was collected so far.
    """
    asked: list[int] = []
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def ask(number: int, _: object) -> None:
        if asked and not patient:
            raise KeyboardInterrupt  # a second one does not wait
        asked.append(number)

    if ours:
        signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
