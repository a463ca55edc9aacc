"""Timing several contenders turn by turn, and the peak memory of one."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds of every counted run of one contender, in the order in which they were taken."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The middle run."""
        return statistics.median(self.seconds)

    def ratio(self, other: Times) -> tuple[float, float, float]:
        """Least, middle and greatest of the ratios to another contender, turn by turn."""
        ratios = sorted(a / b for a, b in zip(self.seconds, other.seconds, strict=False))
        return ratios[0], statistics.median(ratios), ratios[-1]


SLOW = 10.0
"""Seconds from which a contender counts as slow."""
SETTLE = 3.0
"""Seconds of uncounted runs after a slow contender, until the machine has taken back what it held."""


def turn_by_turn(contenders: dict[str, Run], rounds: int, device: torch.device) -> dict[str, Times]:
    """Times every contender once per round, so that all of them see the machine's good and bad minutes alike.

    A first round is not counted, and before each counted run the contender runs uncounted, so that it does not pay for
    what the one before it left behind (gigabytes of pages to be handed back, a cold cache): once, or for some seconds
    after a slow contender. A slow contender itself is spared that, and is counted in three rounds at most.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    last = dict.fromkeys(contenders, 0.0)
    before = 0.0
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            slow = last[name] > SLOW
            if turn > 3 and slow:
                continue
            gc.collect()
            start = time.perf_counter()
            while turn and not slow:
                run()
                if before <= SLOW or time.perf_counter() - start > SETTLE:
                    break
            _finish(device)
            start = time.perf_counter()
            run()
            _finish(device)
            last[name] = before = time.perf_counter() - start
            if turn:
                seconds[name].append(last[name])
    return {name: Times(values) for name, values in seconds.items()}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run: Run, device: torch.device) -> int:
    """Bytes at the peak above those before the run; on a CPU of the whole process, which must be a fresh one."""
    gc.collect()
    if device.type == "cuda":
        _finish(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        _finish(device)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024
