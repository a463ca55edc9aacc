"""Compares layers under torch.compile with the same layers in eager mode, forward and backward.

    python benchmarks/compile.py

First it prints how long torch compiles, and how far outputs and gradients differ. Then both run interleaved in one
process; the ratio is the median over the rounds, the least and the greatest.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import tyro
from torch import Tensor, nn

import ssmkit
from measure import Run, time_interleaved
from ssmkit.testing import relative_error


@dataclass(frozen=True)
class Config:
    """Measure torch.compile."""

    shape: tuple[int, int, int] = (4, 16384, 256)
    """Batch, length and features."""
    rounds: int = 5
    """Measured rounds of each."""
    only: str = ""
    """Only the layer of this name."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    backend: str = "inductor"
    """What torch compiles with."""


def gradients(layer: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], u: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    y = layer(u)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [u, *parameters])]


def main(config: Config) -> int:
    """Measures and prints a line for each layer."""
    device = torch.device(config.device)
    for name, make in {"S4": ssmkit.S4, "S4D": ssmkit.S4D}.items():
        if config.only not in ("", name):
            continue
        torch.manual_seed(0)
        torch.compiler.reset()
        layer = make(config.shape[-1], device=device)
        parameters = list(layer.parameters())
        compiled = torch.compile(layer, fullgraph=True, backend=config.backend)
        u = torch.randn(config.shape, device=device, requires_grad=True)
        start = time.perf_counter()
        found = gradients(compiled, parameters, u)
        seconds = time.perf_counter() - start
        error = max(relative_error(a, b) for a, b in zip(found, gradients(layer, parameters, u), strict=True))
        del found
        runs: dict[str, Run] = {
            "eager": partial(gradients, layer, parameters, u),
            "compiled": partial(gradients, compiled, parameters, u),
        }
        times = time_interleaved(runs, config.rounds, device)
        low, ratio, high = times["compiled"].ratio(times["eager"])
        print(
            f"{name}: compiled in {seconds:.0f} s, differs by {error:.1e}; eager {times['eager'].median:.3f} s, "
            f"compiled ÷ eager {ratio:.2f} ({low:.2f} to {high:.2f})",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
