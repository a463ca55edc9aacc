"""Measures models sample by sample: samples per second, latency, and the speed compared with reading the weights.

    python benchmarks/streaming.py
    python benchmarks/streaming.py --peer path/to/state-spaces-s4

The contenders of a line run interleaved in one process. Results go to `benchmarks/results/` as JSON, and into the
tables and the figure of the documentation.
"""

from __future__ import annotations

import csv
import datetime
import functools
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numba
import numpy as np
import torch
import tyro

matplotlib.use("Agg")

from matplotlib import pyplot as plt

import cases
from measure import Run, time_interleaved
from sashimi.generation import Sampling, StepEngine
from sashimi.model import sashimi
from ssmkit import Sequential
from ssmkit.streaming import Engine
from ssmkit.streaming.kernels import Op

RATE = 16000
"""Samples per second of audio in real time."""


@dataclass(frozen=True)
class Config:
    """Measure streams."""

    peer: Path | None = None
    """A checkout of state-spaces/s4 to compare with."""
    rounds: int = 5
    """Measured rounds of every contender."""
    compile: bool = True
    """Also measure the step under torch.compile, which compiles for minutes."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Numbers of streams, for the figure."""
    out: Path | None = None
    """A folder for the JSON, the tables and the figure, instead of `benchmarks/results/` and the documentation."""


MODELS: dict[str, Callable[[], Sequential]] = {
    "width 32, 2 blocks": lambda: sashimi(32, 2),
    "width 64, 2 blocks": lambda: sashimi(64, 2),
    "width 64, 8 blocks": lambda: sashimi(64, 8),
    "width 64, 8 blocks, S4D": lambda: sashimi(64, 8, layer="s4d"),
    "width 64, 8 blocks, one tier": lambda: sashimi(64, 8, pool=()),
    "width 128, 8 blocks": lambda: sashimi(128, 8),
}
"""SaShiMis by size; with state size 64, and pools of 4 and 4 except the one with one tier."""

PAPER = "width 64, 8 blocks"
"""The size that the SaShiMi paper uses."""


def sampled(model: Sequential, batch: int, length: int, threads: int | None) -> Run:
    """Generates `length` samples with a compiled program."""
    stream = Engine(model, threads=threads).start(batch)
    logits, chance = torch.zeros(batch, stream.engine.d_output), torch.rand(batch, length)
    return lambda: stream.generate(logits, chance)


def stepped(model: Sequential, batch: int, length: int, compiled: bool) -> Run:
    """The same with `step`."""
    engine, state = StepEngine(model, compiled=compiled), model.initial_state(batch)
    logits, chance = torch.zeros(batch, 256), torch.rand(batch, length, dtype=torch.double)
    return lambda: engine.run(logits, state, chance, Sampling())


def generation(config: Config, batch: int) -> list[dict[str, Any]]:
    """All contenders at the paper's size: samples per second, and the speed-up over the reference or our `step`."""
    torch.manual_seed(0)
    model, cpu = MODELS[PAPER]().eval(), torch.device("cpu")
    length = {"reference": 160 if batch == 1 else 32, "step": 160 if batch == 1 else 64, "torch.compile": 256}
    runs: dict[str, Run] = {}
    if config.peer:
        case = cases.Case("generation", "dplr", False, B=batch, L=length["reference"], H=64)
        runs["reference"] = cases.reference(case, cpu, config.peer)
    runs["step"] = stepped(model, batch, length["step"], False)
    if config.compile:
        runs["torch.compile"] = stepped(model, batch, length["torch.compile"], True)
    for threads in (1, 2):
        runs[f"program, {threads} thread{'s' * (threads > 1)}"] = sampled(model, batch, 1600, threads)
    times = time_interleaved(runs, config.rounds, cpu)
    per_sample = {name: [t / length.get(name, 1600) / batch for t in taken.seconds] for name, taken in times.items()}
    base = per_sample["reference" if config.peer else "step"]
    rows: list[dict[str, Any]] = []
    for name, taken in per_sample.items():
        ratios = sorted(a / b for a, b in zip(base, taken, strict=False))
        rate = 1 / float(np.median(taken))
        rows.append(
            {
                "batch": batch,
                "contender": name,
                "samples per second": rate,
                "times real time": rate / RATE,
                "speed-up": (ratios[0], float(np.median(ratios)), ratios[-1]),
                "seconds per sample": taken,
            }
        )
        low, middle, high = rows[-1]["speed-up"]
        print(
            f"batch {batch:<4}{name:<20}{rate:10,.0f} samples/s   {middle:6.2f} ({low:.2f} to {high:.2f})", flush=True
        )
    return rows


def latency(frames: int = 600) -> list[dict[str, Any]]:
    """The latency of single samples, with a call from Python each; separate for samples that run a lower tier."""
    torch.manual_seed(0)
    stream = Engine(MODELS[PAPER]().eval()).start()
    sample, period = torch.zeros(1, dtype=torch.long), 16
    taken = np.empty(frames * period)
    for k in range(-period, len(taken)):
        begin = time.perf_counter()
        stream.run(sample)
        if k >= 0:
            taken[k] = time.perf_counter() - begin
    place = np.arange(len(taken)) % period
    groups = {
        "all": place >= 0,
        "top tier alone": place % 4 != 3,
        "a frame of the middle tier": (place % 4 == 3) & (place != 15),
        "a frame of the bottom tier": place == 15,
    }
    rows = []
    for name, chosen in groups.items():
        values = dict(zip(("p50", "p99", "p99.9"), np.percentile(taken[chosen], [50, 99, 99.9]).tolist(), strict=True))
        rows.append({"samples": name, **values, "mean": float(taken[chosen].mean())})
        print(f"latency, {name:<28}" + "".join(f"{k} {1e6 * v:8.0f} us   " for k, v in values.items()), flush=True)
    return rows


@numba.njit(fastmath=True, nogil=True)
def _read(weights: Any, segments: Any, length: Any) -> Any:
    """Sums segments (start, end, period) of the weights, each once per `period` samples, for `length` samples."""
    total = np.float32(0)
    for k in range(1, length + 1):
        for start, end, period in segments:
            if k % period == 0:
                part = weights[start:end]
                for i in range(part.size):
                    total += part[i]
    return total


def segments(engine: Engine) -> tuple[np.ndarray, np.ndarray]:
    """All coefficients, and for each instruction the place of its coefficients and the period of their reading."""
    packed = {"weights": engine.weights, "poles": engine.poles.view(np.float32)}
    # Starts are counted in numbers of the array: a pole has the size of two weights.
    found: dict[str, list[tuple[int, int]]] = {"weights": [], "poles": []}
    period, until = [1], [len(engine.table)]
    for at, line in enumerate(engine.table):
        while at >= until[-1]:
            period.pop()
            until.pop()
        op = line["op"]
        if op == Op.FRAME:
            period.append(period[-1] * int(line["pool"]))
            until.append(int(line["skip_to"]))
        elif op not in (Op.ADD, Op.GLU):
            # Only one row of an embedding is read, which is not counted.
            found["weights"].append((int(line["weights"]), 0 if op == Op.EMBED else period[-1]))
        if op == Op.SSM:
            found["poles"].append((2 * int(line["poles"]), period[-1]))
    parts, offset = [], 0
    for name, array in packed.items():
        starts = [start for start, _ in found[name]]
        ends = [*starts[1:], len(array)]
        parts += [(offset + s, offset + e, p) for (s, p), e in zip(found[name], ends, strict=True) if p]
        offset += len(array)
    return np.concatenate([*packed.values()]), np.array(parts)


def sizes(config: Config) -> list[dict[str, Any]]:
    """Real-time factors by size, compared with only reading the same weights at the same samples."""
    rows: list[dict[str, Any]] = []
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make().eval()
        engine = Engine(model)
        coefficients, parts = segments(engine)
        runs: dict[str, Run] = {
            "one thread": sampled(model, 1, 1600, 1),
            "two threads": sampled(model, 1, 1600, 2),
            "reading": functools.partial(_read, coefficients, parts, 1600),
        }
        times = time_interleaved(runs, config.rounds, torch.device("cpu"))
        seconds = {who: taken.median / 1600 for who, taken in times.items()}
        read = 4 * float(((parts[:, 1] - parts[:, 0]) / parts[:, 2]).sum())
        rows.append(
            {
                "model": name,
                "weights": coefficients.nbytes,
                "read per sample": read,
                **{f"{who}, seconds per sample": value for who, value in seconds.items()},
                "real-time factor, one thread": seconds["one thread"] * RATE,
                "real-time factor, two threads": seconds["two threads"] * RATE,
                "bandwidth of the program": read / seconds["one thread"],
                "bandwidth of reading": read / seconds["reading"],
            }
        )
        row = rows[-1]
        one, two = (row[f"real-time factor, {who}"] for who in ("one thread", "two threads"))
        program, reading = (row[f"bandwidth of {who}"] / 1e9 for who in ("the program", "reading"))
        print(f"{name:<30} real-time factor {one:5.2f}, two threads {two:5.2f}", end="; ")
        print(f"{read / 2**20:5.2f} of {row['weights'] / 2**20:5.1f} MiB per sample", end=", ")
        print(f"{program:4.1f} GB/s of {reading:4.1f}", flush=True)
    return rows


def throughput(config: Config) -> list[dict[str, Any]]:
    """Samples per second against the number of streams."""
    torch.manual_seed(0)
    model, rows = MODELS[PAPER]().eval(), []
    for batch in config.batches:
        length = max(16, 1600 // batch)
        runs = {"program": sampled(model, batch, length, None), "step": stepped(model, batch, 16, False)}
        times = time_interleaved(runs, min(3, config.rounds), torch.device("cpu"))
        row = {
            "batch": batch,
            "program": batch * length / times["program"].median,
            "step": batch * 16 / times["step"].median,
        }
        print(f"batch {batch:<5} program {row['program']:8,.0f}   step {row['step']:8,.0f} samples/s", flush=True)
        rows.append(row)
    return rows


def write(results: dict[str, Any], stem: Path) -> None:
    """Writes tables and figure for the documentation."""

    def table(part: str, columns: list[str], rows: list[list[str]]) -> None:
        with stem.with_name(f"{stem.name}-{part}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])

    table(
        "generation",
        ["streams", "contender", "samples per second", "times real time", "speed-up (spread)"],
        [
            [
                str(r["batch"]),
                r["contender"],
                f"{r['samples per second']:,.0f}",
                f"{r['times real time']:.3g}",
                "{1:.1f} ({0:.1f} to {2:.1f})".format(*r["speed-up"]),
            ]
            for r in results["generation"]
        ],
    )
    table(
        "latency",
        ["samples that run", "p50", "p99", "p99.9"],
        [[r["samples"], *(f"{1e6 * r[p]:.0f} µs" for p in ("p50", "p99", "p99.9"))] for r in results["latency"]],
    )
    table(
        "sizes",
        ["model", "real-time factor", "two threads", "weights", "read per sample", "GB/s", "bare reading, GB/s"],
        [
            [
                r["model"],
                f"{r['real-time factor, one thread']:.2f}",
                f"{r['real-time factor, two threads']:.2f}",
                f"{r['weights'] / 2**20:.1f} MiB",
                f"{r['read per sample'] / 2**20:.2f} MiB",
                f"{r['bandwidth of the program'] / 1e9:.0f}",
                f"{r['bandwidth of reading'] / 1e9:.0f}",
            ]
            for r in results["sizes"]
        ],
    )
    machine = results["machine"]
    stem.with_suffix(".txt").write_text(
        f"{results['date']}: {machine['cpu']}; torch {machine['torch']}, numba {machine['numba']}, float32\n"
    )
    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for who, label in (("program", "compiled program"), ("step", "step")):
        axis.loglog(
            [r["batch"] for r in results["throughput"]], [r[who] for r in results["throughput"]], ".-", label=label
        )
    axis.axhline(RATE, color="0.6", linewidth=0.8, linestyle=":")
    axis.annotate("16 kHz", (results["throughput"][-1]["batch"], RATE), ha="right", va="bottom", color="0.4")
    axis.set(xlabel="streams", ylabel="samples per second, all streams together")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(stem.with_suffix(".svg"))
    plt.close(figure)


def main(config: Config) -> int:
    """Measures, writes and draws."""
    warnings.filterwarnings("ignore", module="torch")
    results = {
        "date": datetime.date.today().isoformat(),
        "machine": {**cases.machine(torch.device("cpu")), "numba": numba.__version__},
        "generation": list(itertools.chain.from_iterable(generation(config, batch) for batch in (1, 32))),
        "latency": latency(),
        "sizes": sizes(config),
        "throughput": throughput(config),
    }
    root = Path(__file__).parents[1]
    folder, tables = (config.out, config.out) if config.out else (root / "benchmarks/results", root / "docs/_static")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results['date']}-streaming-cpu.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    write(results, tables / "streaming-cpu")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
