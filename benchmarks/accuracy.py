"""The error of float32 kernels against float64 ones of the same float32 parameters.

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --peer path/to/state-spaces-s4

A line per initialisation and state size: the largest error, max|Δ| / max|K|, over the step sizes. If a checkout is
given, also the reference's own error, that of its float32 kernel against its own code in float64.
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from ssmkit import S4, S4D
from ssmkit.testing import relative_error


@dataclass(frozen=True)
class Config:
    """Measure errors."""

    peer: Path | None = None
    """A checkout of state-spaces/s4."""
    lengths: tuple[int, ...] = (1024, 16384, 1 << 20)
    """Kernel lengths."""
    states: tuple[int, ...] = (16, 64, 256)
    """State sizes."""


STEPS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
BOUND = {1024: 2e-6, 16384: 2e-6, 1 << 20: 1e-5}


@torch.no_grad()
def ours(kind: type[S4] | type[S4D], init: str, N: int, L: int) -> float:
    """The largest error over the step sizes, one feature each."""
    torch.manual_seed(0)
    layer = kind(len(STEPS), N, init=init)
    layer.log_dt.copy_(torch.tensor(STEPS).log())
    single, double = layer.kernel(L)[0], copy.deepcopy(layer).double().kernel(L)[0]
    return max(relative_error(a, b) for a, b in zip(single, double, strict=True))


@torch.no_grad()
def theirs(checkout: Path, mode: str, init: str, N: int, L: int) -> float:
    """The same for the reference."""
    import peer

    s4 = peer.load(checkout, "models.s4.s4")
    torch.manual_seed(0)
    rank = 2 if init == "legt" else 1
    layer = s4.FFTConv(len(STEPS), activation=None, mode=mode, d_state=N, init=init, rank=rank)
    layer.kernel.inv_dt.copy_(torch.tensor(STEPS).log()[:, None])
    double = copy.deepcopy(layer).double()
    single_kernel, double_kernel = layer.kernel(L=L)[0][0], double.kernel(L=L)[0][0]
    return max(relative_error(a, b) for a, b in zip(single_kernel, double_kernel, strict=True))


def main(config: Config) -> int:
    """Prints the table; returns 1 if an error is above its bound."""
    print(f"{'layer':<6}{'init':<6}{'N':>5}{'L':>9}{'ssmkit':>10}{'bound':>9}{'reference':>11}")
    broken = 0
    for kind, mode in ((S4, "dplr"), (S4D, "diag")):
        for init in ("legs", "legt", "fout"):
            for N in config.states:
                for L in config.lengths:
                    error, bound = ours(kind, init, N, L), BOUND.get(L, math.inf)
                    broken += error > bound
                    line = f"{kind.__name__:<6}{init:<6}{N:>5}{L:>9}{error:>10.1e}{bound:>9.0e}"
                    # The reference holds (H, N, L) arrays; the longest are left out.
                    if config.peer is not None and N * L <= 1 << 22:
                        try:
                            line += f"{theirs(config.peer, mode, init, N, L):>11.1e}"
                        except (RuntimeError, AssertionError) as failure:
                            line += f"  {type(failure).__name__}"
                    print(line, flush=True)
    print("every bound holds" if not broken else f"{broken} bounds are broken")
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
