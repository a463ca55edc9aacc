"""The error of float32 states after many samples, of `step` and of the compiled program, against float64.

    python benchmarks/drift.py
    python benchmarks/drift.py --samples 1000000 --out docs/_static/drift-cpu.csv

A line per layer, initialisation and range of dt: max|Δ| / max|x| over the state of a layer of two features after all
samples of normal noise, the largest over the seeds. The exact state is that of `scan` in float64, chunk by chunk, with
the same float32 parameters.
"""

from __future__ import annotations

import copy
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from ssmkit import S4, S4D
from ssmkit.states import State
from ssmkit.streaming import Engine

FEATURES, STATE, CHUNK = 2, 16, 1 << 16
STEPS = ((1e-5, 2e-5), (1e-3, 1e-1))
INITS: dict[type[S4] | type[S4D], tuple[tuple[str, ...], ...]] = {
    S4: (("legs", "lagt", "fout"), ("legt",)),
    S4D: (("legs", "legt", "lagt", "fout", "lin", "inv", "quad", "real"),),
}
"""The names of the initialisations; those of one group have low-rank parts of the same rank."""


@dataclass(frozen=True)
class Config:
    """Measure how far states drift."""

    samples: int = 10_000
    """Length of the streams."""
    seeds: int = 10
    """Layers of each kind; each has its own parameters and input."""
    bound: float | None = None
    """The largest error allowed; by default 1e-5 up to 10,000 samples and 1e-4 beyond."""
    out: Path | None = None
    """Where to write the table as CSV."""


def _joined_layer(kind: type[S4] | type[S4D], cases: list[tuple[str, float, float]], seeds: int) -> S4 | S4D:
    """One layer with the features of all cases and seeds, ordered (case, seed)."""
    layers = []
    for init, low, high in cases:
        for seed in range(seeds):
            torch.manual_seed(seed)
            layers.append(kind(FEATURES, STATE, init=init, dt_min=low, dt_max=high))
    whole = kind(FEATURES * len(layers), STATE, init=cases[0][0])
    for name, parameter in whole.named_parameters():
        axis = 1 if name in ("C", "D") else 0
        parameter.copy_(torch.cat([layer.get_parameter(name) for layer in layers], axis))
    return whole


@torch.no_grad()
def errors(kind: type[S4] | type[S4D], inits: tuple[str, ...], config: Config) -> list[list[str | float]]:
    """Rows of the table: layer, initialisation, dt, error of `step`, error of the program."""
    cases = [(init, *dt) for init in inits for dt in STEPS]
    layer = _joined_layer(kind, cases, config.seeds)
    system, exact = layer.system(), copy.deepcopy(layer).double()
    exact_system = exact.system()
    stream, state, double = Engine(layer).start(), layer.initial_state(), exact.initial_state()
    noise = torch.Generator().manual_seed(0)
    done = 0
    while done < config.samples:
        u = torch.randn(min(CHUNK, config.samples - done), layer.d_model, generator=noise)
        _, double = exact.scan(u.double(), double, exact_system)
        stream.run(u)
        for sample in u:
            _, state = layer.step(sample, state, system)
        done += len(u)
        print(f"{kind.__name__} {', '.join(inits)}: {done} samples", file=sys.stderr, flush=True)

    def per_seed(x: torch.Tensor) -> torch.Tensor:
        return x.abs().reshape(len(cases), config.seeds, -1).amax(-1)

    def largest(reached: State, right: State) -> list[float]:
        assert isinstance(reached, torch.Tensor)
        assert isinstance(right, torch.Tensor)
        found: list[float] = (per_seed(reached.double() - right) / per_seed(right)).amax(-1).tolist()
        return found

    by_step, by_program = largest(state, double), largest(stream.state, double)
    return [
        [kind.__name__, init, f"{low:g} to {high:g}", s, p]
        for (init, low, high), s, p in zip(cases, by_step, by_program, strict=True)
    ]


def main(config: Config) -> int:
    """Prints the table; returns 1 if an error is above its bound."""
    torch.set_num_threads(1)
    rows = [row for kind, groups in INITS.items() for inits in groups for row in errors(kind, inits, config)]
    header = ["layer", "init", "dt", "step", "program"]
    print(f"{header[0]:<7}{header[1]:<7}{header[2]:<18}{header[3]:>9}{header[4]:>9}")
    for layer, init, dt, *found in rows:
        print(f"{layer:<7}{init:<7}{dt:<18}{found[0]:>9.1e}{found[1]:>9.1e}")
    if config.out is not None:
        with config.out.open("w", newline="") as file:
            csv.writer(file).writerows([header, *([*row[:3], f"{row[3]:.1e}", f"{row[4]:.1e}"] for row in rows)])
    bound = config.bound or (1e-5 if config.samples <= 10_000 else 1e-4)
    broken = sum(error > bound for row in rows for error in row[3:] if isinstance(error, float))
    print(f"every error is at most {bound:.0e}" if not broken else f"{broken} errors are above {bound:.0e}")
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
