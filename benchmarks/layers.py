"""Compares S5, Mamba and Mamba-2 with other packages, if these are installed.

    pip install mambapy==1.2.0 s5-pytorch==0.2.1 transformers==5.23.0
    python benchmarks/layers.py

Forward and backward passes of one layer in float32 on one thread, with gradients to the input and to all weights; and
single steps of a whole network, by the engine and by the cached step of transformers. The contenders of a case run
interleaved in one process. Peak memory is that of one run in its own process, above what was in use before the run.
Results go to `benchmarks/results/` as JSON and into a table of the documentation.
"""

from __future__ import annotations

import csv
import datetime
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

import cases
import ssmkit
from measure import Run, peak_memory, time_interleaved

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Config:
    """Compare layers with those of other packages."""

    rounds: int = 3
    """Measured rounds of every contender."""
    only: str = ""
    """Only cases whose name contains this."""
    scale: float = 1.0
    """Factor of the lengths, for a quick test of the command."""
    out: Path = Path(__file__).parent / "results"
    """Folder for the JSON; with the default, the table in the documentation is written too."""
    peak_of: tuple[str, str] | None = None
    """Internal: a case and a contender whose peak memory this process prints."""


Contenders = dict[str, Callable[[], Run]]


def _trained(make: Callable[[], nn.Module], B: int, L: int, H: int) -> Callable[[], Run]:
    """A forward and a backward pass of a layer."""

    def prepare() -> Run:
        layer, u = make(), torch.randn(B, L, H, requires_grad=True)

        def run() -> None:
            layer(u).square().mean().backward()
            for x in (u, *layer.parameters()):
                x.grad = None

        return run

    return prepare


def _theirs(module: str, name: str) -> Any:
    """A class of a package that may not be installed."""
    return getattr(importlib.import_module(module), name)


def _transformers(kind: str, **options: Any) -> Any:
    """The layer of transformers, which without CUDA kernels runs in plain torch."""
    config = _theirs("transformers", f"{kind}Config")(**options)
    return _theirs(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}", f"{kind}Mixer")(config, 0)


def _mambapy(H: int) -> Any:
    config = _theirs("mambapy.mamba", "MambaConfig")(d_model=H, n_layers=1, d_state=16)
    return _theirs("mambapy.mamba", "MambaBlock")(config)


def _mamba(B: int, L: int, H: int) -> Contenders:
    return {
        "ssmkit": _trained(lambda: ssmkit.Mamba(H), B, L, H),
        "mambapy": _trained(lambda: _mambapy(H), B, L, H),
    }


def _mamba_one_by_one(B: int, L: int, H: int) -> Contenders:
    layer = {"hidden_size": H, "state_size": 16}
    return {
        "ssmkit": _trained(lambda: ssmkit.Mamba(H), B, L, H),
        "transformers": _trained(lambda: _transformers("Mamba", **layer), B, L, H),
    }


def _mamba2(B: int, L: int, H: int) -> Contenders:
    layer = {"hidden_size": H, "state_size": 128, "head_dim": 64, "num_heads": 2 * H // 64, "n_groups": 1}
    return {
        "ssmkit": _trained(lambda: ssmkit.Mamba2(H), B, L, H),
        "transformers": _trained(lambda: _transformers("Mamba2", **layer), B, L, H),
    }


def _s5(B: int, L: int, H: int) -> Contenders:
    return {
        "ssmkit": _trained(lambda: ssmkit.S5(H, d_state=H), B, L, H),
        "ssmkit, as many pairs": _trained(lambda: ssmkit.S5(H, d_state=2 * H), B, L, H),
        "s5-pytorch": _trained(lambda: _theirs("s5", "S5")(H, H), B, L, H),
    }


def _steps(B: int, L: int, H: int) -> Contenders:
    """L samples, one by one, of a Mamba with 24 blocks."""
    u = torch.randn(B, L, H)

    def ours() -> Run:
        blocks = (ssmkit.Residual(nn.RMSNorm(H, 1e-5), ssmkit.Mamba(H)) for _ in range(24))
        stream = ssmkit.streaming.Engine(ssmkit.Sequential(*blocks), threads=1).start(B)

        def run() -> None:
            for k in range(L):
                stream.run(u[:, k : k + 1])

        return run

    def theirs() -> Run:
        config = _theirs("transformers", "MambaConfig")(hidden_size=H, num_hidden_layers=24, vocab_size=8)
        model = _theirs("transformers", "MambaModel")(config).eval()
        cache = model(inputs_embeds=u[:, :1], use_cache=True).cache_params

        @torch.no_grad()
        def run() -> None:
            for k in range(L):
                model(inputs_embeds=u[:, k : k + 1], cache_params=cache, use_cache=True)

        return run

    return {"ssmkit": ours, "transformers": theirs}


CASES: dict[str, tuple[Callable[[int, int, int], Contenders], tuple[int, int, int]]] = {
    "Mamba, N = 16": (_mamba, (4, 2048, 768)),
    "Mamba, N = 16, short": (_mamba_one_by_one, (1, 1024, 768)),
    "Mamba-2, heads of 64, N = 128": (_mamba2, (4, 2048, 768)),
    "S5": (_s5, (4, 16384, 256)),
    "steps of 24 Mamba blocks": (_steps, (1, 20, 768)),
}


def _made(config: Config, name: str) -> tuple[Contenders, tuple[int, int, int]]:
    make, (B, L, H) = CASES[name]
    L = max(4, int(config.scale * L))
    return make(B, L, H), (B, L, H)


def _peak(config: Config, case: str, name: str) -> int | None:
    command = [sys.executable, __file__, "--scale", str(config.scale), "--peak-of", case, name]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def measure(config: Config, case: str) -> list[dict[str, Any]]:
    """Runs a case and prints a line for each contender."""
    torch.manual_seed(0)
    contenders, shape = _made(config, case)
    runs = {}
    for name, make in contenders.items():
        try:
            runs[name] = make()
        except ModuleNotFoundError as error:
            print(f"{case}: {name} is left out, since the package {error.name} is not installed.")
    times = time_interleaved(runs, config.rounds, CPU)
    rows = []
    for name, taken in times.items():
        row = {
            "case": case,
            "shape": shape,
            "contender": name,
            "seconds": taken.seconds,
            "median": taken.median,
            "ratio": taken.ratio(times["ssmkit"]),
            "peak": None if case.startswith("steps") else _peak(config, case, name),
        }
        rows.append(row)
        print("  ".join(_cells(row)), flush=True)
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    low, middle, high = row["ratio"]
    return [
        row["case"],
        ", ".join(map(str, row["shape"])),
        row["contender"],
        f"{row['median']:.3f} s",
        f"{middle:.2f} ({low:.2f} to {high:.2f})",
        "" if row["peak"] is None else f"{row['peak'] / 2**20:.0f} MiB",
    ]


def main(config: Config) -> int:
    """Measures and writes."""
    torch.set_num_threads(1)
    if config.peak_of is not None:
        case, name = config.peak_of
        run = _made(config, case)[0][name]()
        torch.randn(4, 4) @ torch.randn(4, 4)  # loads the libraries
        print(peak_memory(run, CPU))
        return 0
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if config.only in case:
            rows += measure(config, case)
    if config.only or config.scale != 1:
        return 0
    date = datetime.date.today().isoformat()
    machine = cases.machine(CPU)
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / f"{date}-layers-cpu.json"
    path.write_text(json.dumps({"date": date, "machine": machine, "rows": rows}, indent=1) + "\n")
    print(path)
    if config.out == Config.out:
        stem = Path(__file__).parents[1] / "docs" / "_static" / "layers-cpu"
        with stem.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "B, L, H", "contender", "median", "÷ ssmkit (spread)", "peak memory"])
            writer.writerows(_cells(row) for row in rows)
        stem.with_suffix(".txt").write_text(
            f"{date}: {machine['cpu']}, 1 thread; torch {machine['torch']}, Python {machine['python']}, float32\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
