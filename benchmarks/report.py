"""Tables and figures of results."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

HEADER = (
    f"{'case':<42} {'shape (B, L, H, N)':<22} {'contender':<10} {'median':>10} {'÷ ssmkit (spread)':>24} {'peak':>9}"
)


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"


def _ratio(row: dict[str, Any]) -> str:
    low, middle, high = row["ratio"]
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _memory(row: dict[str, Any]) -> str:
    return "" if row["peak"] is None else f"{row['peak'] / 2**20:.0f} MiB"


def line(row: dict[str, Any]) -> str:
    """A line of the table on the screen."""
    shape = f"({row['B']}, {row['L']}, {row['H']}, {row['N']})"
    cells = f"{row['name']:<42} {shape:<22} {row['contender']:<10} {_time(row['median']):>10}"
    return f"{cells} {_ratio(row):>24} {_memory(row):>9}"


def _growth(rows: list[dict[str, Any]], first: int = 1 << 12, last: int = 1 << 20) -> list[list[str]]:
    """The growth of time and memory from one length to another, and that of the bare FFT's time."""
    at = {(r["name"], r["contender"], r["L"]): r for r in rows}
    found = []
    for name in dict.fromkeys(r["name"] for r in rows):
        ours, bare, memory = (
            at[name, who, last][field] / at[name, who, first][field]
            for who, field in (("ssmkit", "median"), ("bare FFT", "median"), ("ssmkit", "peak"))
        )
        found.append([name, f"{ours:.0f}×", f"{bare:.0f}×", f"{ours / bare:.2f}", f"{memory:.0f}×"])
    return found


def _bars(results: dict[str, Any], path: Path) -> None:
    """The chart of the README: time and peak memory of one layer, forward and backward, for all contenders."""
    cases = {"layer, dplr, forward + backward": "S4", "layer, diagonal, forward + backward": "S4D"}
    who = {"reference": "state-spaces/s4", "bare FFT": "bare FFT convolution", "ssmkit": "ssmkit"}
    rows = [r for r in results["headline"] if r["name"] in cases]
    if not {r["contender"] for r in rows} >= set(who):
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained")
    for axis, field, unit, scale in ((axes[0], "median", "seconds", 1), (axes[1], "peak", "MiB at the peak", 2**20)):
        for place, (contender, label) in enumerate(who.items()):
            values = [next(r for r in rows if (r["name"], r["contender"]) == (c, contender)) for c in cases]
            numbers = [r[field] / scale for r in values]
            at = [index + 0.26 * (1 - place) for index in range(len(cases))]
            color = ("0.75", "0.55", "C0")[place]
            bars = axis.barh(at, numbers, 0.24, color=color, label=label)
            axis.bar_label(bars, [f"{v:.3g}" if field == "median" else f"{v:,.0f}" for v in numbers], padding=3)
        axis.set(xlabel=unit, yticks=range(len(cases)), yticklabels=cases.values())
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.invert_yaxis()
    axes[1].legend(fontsize="small", loc="lower right")
    case = rows[0]
    figure.suptitle(f"One layer, forward and backward: batch {case['B']}, {case['L']:,} samples, {case['H']} features")
    figure.savefig(path)
    plt.close(figure)


def write(results: dict[str, Any], stem: Path) -> None:
    """Writes the tables as CSV and the figure of cost against length as SVG, for the documentation."""
    columns = ["case", "B, L, H, N", "contender", "median", "÷ ssmkit (spread)", "peak memory"]
    for part in ("headline", "shapes"):
        if not results[part]:
            continue
        with stem.with_name(f"{stem.name}-{part}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for row in results[part]:
                shape = f"{row['B']}, {row['L']}, {row['H']}, {row['N']}"
                writer.writerow([row["name"], shape, row["contender"], _time(row["median"]), _ratio(row), _memory(row)])
    machine = results["machine"]
    where = f"{machine['card'] or machine['cpu']}, {machine['threads']} threads"
    stem.with_suffix(".txt").write_text(
        f"{results['date']}: {where}; torch {machine['torch']}, Python {machine['python']}, float32\n"
    )
    _bars(results, stem.with_name(f"{stem.name}-bars.svg"))
    if not results["lengths"]:
        return
    with stem.with_name(f"{stem.name}-growth.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "ssmkit", "bare FFT", "ssmkit ÷ bare FFT", "peak memory"])
        writer.writerows(_growth(results["lengths"]))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharex=True)
    for axis, field, unit in ((axes[0], "median", "seconds"), (axes[1], "peak", "bytes")):
        for kind, color in (("dplr", "C0"), ("diagonal", "C1")):
            for who, style in (("ssmkit", "-"), ("bare FFT", ":"), ("reference", "--")):
                rows = [
                    r
                    for r in results["lengths"]
                    if r["kind"] == kind and r["contender"] == who and r["backward"] and r[field]
                ]
                if rows and (who != "bare FFT" or kind == "dplr"):
                    name = {"ssmkit": "S4" if kind == "dplr" else "S4D", "reference": f"reference, {kind}"}.get(
                        who, who
                    )
                    shade = "0.3" if who == "bare FFT" else color
                    axis.loglog(
                        [r["L"] for r in rows], [r[field] for r in rows], style, color=shade, marker=".", label=name
                    )
        axis.set(xlabel="L", ylabel=unit)
        axis.grid(alpha=0.3)
    axes[0].set_title("forward + backward")
    axes[1].set_title("peak memory")
    axes[0].legend(fontsize="small")
    figure.savefig(stem.with_suffix(".svg"))
    plt.close(figure)
