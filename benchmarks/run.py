"""Compares ssmkit with the bare FFT convolution, and with the reference if a checkout of it is given.

    python benchmarks/run.py
    python benchmarks/run.py --peer path/to/state-spaces-s4

The contenders of a line run interleaved in one process; peak memory is measured in a fresh process for each. Results go
to `benchmarks/results/` as JSON, and into the tables and figures of the documentation.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

import cases
import report
from measure import peak_memory, time_interleaved


@dataclass(frozen=True)
class Config:
    """Measure ssmkit."""

    peer: Path | None = None
    """A checkout of state-spaces/s4 to compare with."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    rounds: int = 5
    """Measured rounds of every contender."""
    only: str = ""
    """Only cases whose name contains this."""
    full: bool = True
    """Also measure other shapes, and the cost against the length."""
    out: Path = Path(__file__).parent / "results"
    """Folder for the JSON; with the default, the tables and figures in the documentation are written too."""
    peak_of: tuple[str, int, str] | None = None
    """Internal: a list, the index of a case in it and a contender whose peak memory this process prints."""


def _peak(config: Config, which: str, index: int, name: str) -> int | None:
    """Peak bytes of a contender, run once in its own process; None if that fails."""
    command = [sys.executable, __file__, "--device", config.device, "--peak-of", which, str(index), name]
    if config.peer:
        command += ["--peer", str(config.peer)]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def measure(config: Config, which: str) -> list[dict[str, Any]]:
    """Runs a list of cases and prints a line for each contender."""
    device = torch.device(config.device)
    rows = []
    for index, case in enumerate(getattr(cases, which)):
        if config.only not in case.name:
            continue
        torch.manual_seed(0)
        # The reference runs only in the published comparison: in the other cases it would take hours.
        peer = config.peer if which == "HEADLINE" else None
        made = {name: make() for name, make in cases.contenders(case, device, peer).items()}
        times = time_interleaved(made, config.rounds, device)
        del made
        memory = (
            {name: _peak(config, which, index, name) for name in times}
            if case.what not in ("step", "generation")
            else {}
        )
        for name, taken in times.items():
            row = {
                **asdict(case),
                "name": case.name,
                "contender": name,
                "seconds": taken.seconds,
                "median": taken.median,
                "peak": memory.get(name),
                "ratio": taken.ratio(times["ssmkit"]),
            }
            rows.append(row)
            print(report.line(row), flush=True)
    return rows


def main(config: Config) -> int:
    """Measures, writes and draws."""
    device = torch.device(config.device)
    if config.peak_of is not None:
        which, index, name = config.peak_of
        run = cases.contenders(getattr(cases, which)[index], device, config.peer)[name]()
        # No small run before: it would hide the memory of a first run. One small product loads the libraries.
        torch.fft.irfft(torch.fft.rfft(torch.randn(4, 64, device=device)) * 1.0)
        print(peak_memory(run, device))
        return 0
    print(report.HEADER)
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": cases.machine(device),
        "headline": measure(config, "HEADLINE"),
        "shapes": measure(config, "SHAPES") if config.full else [],
        "lengths": measure(config, "LENGTHS") if config.full else [],
    }
    if not config.only:
        config.out.mkdir(parents=True, exist_ok=True)
        path = config.out / f"{results['date']}-{config.device}.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(path)
        if config.out == Config.out:
            report.write(results, Path(__file__).parents[1] / "docs" / "_static" / f"benchmarks-{config.device}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
