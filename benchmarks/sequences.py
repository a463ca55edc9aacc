"""Compares padded batches and packed rows with plain runs of the same tensors.

    python benchmarks/sequences.py

Padded: 32 rows of 4,096 samples, lengths uniform from 1 to 4,096. Packed: one row of 16,384 samples, sequences uniform
from 64 to 1,024. The plain run ignores lengths and boundaries, so that its outputs are wrong. All contenders of a case
run interleaved in one process. The table goes to the documentation, or to `--out`.
"""

from __future__ import annotations

import csv
import datetime
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

import cases
import ssmkit
from measure import Run, time_interleaved
from ssmkit import sequences

LAYERS: dict[str, Callable[[int], ssmkit.SequenceLayer]] = {"S4Block": ssmkit.S4Block, "Mamba": ssmkit.Mamba}
COLUMNS = ["layer", "batch", "pass", "contender", "median", "÷ plain (spread)"]


@dataclass(frozen=True)
class Config:
    """Measure sequences of different lengths."""

    rounds: int = 5
    """Measured rounds of every contender."""
    d_model: int = 64
    """The width."""
    scale: float = 1.0
    """Factor of the lengths, for a quick test of the command."""
    only: str = ""
    """Only layers whose name contains this."""
    out: Path = Path(__file__).parents[1] / "docs/_static"
    """Where the table goes."""


def padded(layer: ssmkit.SequenceLayer, config: Config) -> tuple[Tensor, dict[str, Callable[[Tensor], Tensor]]]:
    """The input and the contenders: `forward` in all ways, and `scan`."""
    L = int(4096 * config.scale)
    u, lengths = torch.randn(32, L, config.d_model), torch.randint(1, L + 1, (32,))
    rest = layer.initial_state(32)
    return u, {
        "plain": layer,
        "forward_padded": lambda u: sequences.forward_padded(layer, u, lengths),
        "forward_padded, left": lambda u: sequences.forward_padded(layer, u, lengths, side="left"),
        "plain scan": lambda u: layer.scan(u, rest)[0],
        "scan_padded": lambda u: sequences.scan_padded(layer, u, rest, lengths)[0],
    }


def packed(layer: ssmkit.SequenceLayer, config: Config) -> tuple[Tensor, dict[str, Callable[[Tensor], Tensor]]]:
    """The same for a row."""
    L, low, high = (int(n * config.scale) for n in (16384, 64, 1024))
    ends = torch.randint(low, high + 1, (L // low,)).cumsum(0)
    boundaries = [0, *(end for end in ends.tolist() if end < L), L]
    u, rest = torch.randn(1, L, config.d_model), layer.initial_state(1)
    return u, {
        "plain": layer,
        "forward_packed": lambda u: sequences.forward_packed(layer, u, boundaries),
        "plain scan": lambda u: layer.scan(u, rest)[0],
        "scan_packed": lambda u: sequences.scan_packed(layer, u, rest, boundaries)[0],
    }


def timed(run: Callable[[Tensor], Tensor], u: Tensor, backward: bool) -> Run:
    """A forward pass without gradients, or a forward and a backward pass."""

    def forward() -> None:
        with torch.no_grad():
            run(u)

    def both() -> None:
        run(u.requires_grad_()).square().mean().backward()
        u.grad = None

    return both if backward else forward


def main(config: Config) -> int:
    """Measures, prints and writes the table."""
    rows = []
    print(*(f"{name:<22}" for name in COLUMNS), sep="")
    for name, make in LAYERS.items():
        if config.only not in name:
            continue
        for batch, contenders in (("padded", padded), ("packed", packed)):
            torch.manual_seed(0)
            u, runs = contenders(make(config.d_model), config)
            for backward in (False, True):
                made = {who: timed(run, u.detach(), backward) for who, run in runs.items()}
                times = time_interleaved(made, config.rounds, torch.device("cpu"))
                for who, taken in times.items():
                    low, middle, high = taken.ratio(times["plain"])
                    what = "forward + backward" if backward else "forward"
                    ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
                    rows.append([name, batch, what, who, f"{taken.median:.3f} s", ratio])
                    print(*(f"{cell:<22}" for cell in rows[-1]), sep="", flush=True)
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / "sequences-cpu.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    machine = cases.machine(torch.device("cpu"))
    (config.out / "sequences-cpu.txt").write_text(
        f"{datetime.date.today().isoformat()}: {machine['cpu']}, {machine['threads']} threads; torch "
        f"{machine['torch']}, Python {machine['python']}, float32, width {config.d_model}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
