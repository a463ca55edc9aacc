"""Interleaved timing of several contenders, and the peak memory of one."""

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
    """Seconds of every measured run of one contender, in the order of the rounds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    def ratio(self, other: Times) -> tuple[float, float, float]:
        """Smallest, median and largest of the ratios to another contender in the same round."""
        ratios = sorted(a / b for a, b in zip(self.seconds, other.seconds, strict=False))
        return ratios[0], statistics.median(ratios), ratios[-1]


SLOW = 10.0
"""From this many seconds on, a contender counts as slow."""
SETTLE = 3.0
"""Seconds of warm-up after a slow contender, in which the system frees its memory."""


def time_interleaved(contenders: dict[str, Run], rounds: int, device: torch.device) -> dict[str, Times]:
    """Times every contender once per round, so that other load on the machine affects all of them alike.

    The first round does not count. Before each measured run the contender has a warm-up, so that it is not slowed by
    the contender before it (gigabytes of pages to be freed, a cold cache): one run, or some seconds after a slow
    contender. A slow contender itself has no warm-up, and at most three measured rounds.
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
    """Peak bytes above those in use before the run; on a CPU those of the process, which must be a fresh one."""
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
