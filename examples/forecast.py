"""Forecast ten years of weekly carbon dioxide, beside forecasts without a network, on data that statsmodels ships.

    pip install 'ssmkit[series]'
    python examples/forecast.py

Forecasts are made at several times. For each, networks are trained on the weeks before it alone, and their error is
printed beside those of the last year continued with its growth, and of exponential smoothing. The model of the last
forecast is written to `runs/series/carbon-dioxide`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tyro.conf import OmitArgPrefixes

from sashimi.console import bar
from sashimi.problems import Problem, exit_status
from series.forecasting import (
    SETTINGS,
    Weekly,
    exponential_smoothing,
    load_carbon_dioxide,
    save,
    seasonal_naive,
    train_forecaster,
)
from series.training import Fitting

TEN_YEARS = 522
"""Weeks."""


@dataclass(frozen=True)
class Forecast:
    """Train forecasters and measure them."""

    settings: OmitArgPrefixes[Fitting] = SETTINGS
    """Settings of the training."""
    origins: tuple[int, ...] = (850, 980, 1110, 1240, 1762)
    """Numbers of the weeks after which a forecast begins. The last one leaves out the last ten years of the data, the
    others end before them: by these, settings can be chosen."""
    seeds: int = 3
    """Networks for each forecast."""
    out: Path = Path("runs/series/carbon-dioxide")
    """Folder for the last model."""


def errors(weeks: Weekly, origin: int, args: Forecast) -> tuple[float, float, float]:
    """The mean absolute errors of the networks, the last year with growth, and smoothing, for ten years."""
    past, known = weeks.until(origin), weeks.until(origin + TEN_YEARS)
    years, wanted = known.years[origin:], known.values[origin:]
    found = []
    for seed in range(args.seeds):
        with bar(args.settings.steps, f"{float(years[0]):.0f}, seed {seed}", unit="step") as progress:
            model = train_forecaster(past, len(years), args.settings, seed, lambda _: progress.update())
        with torch.no_grad():
            found.append(model(known, [origin], len(years))[0])
    if origin == args.origins[-1]:
        save(model, args.out)

    def error(forecast: Tensor) -> float:
        return float((forecast - wanted).abs().mean())

    network = sum(error(x) for x in found) / len(found)
    return network, error(seasonal_naive(past, years)), error(exponential_smoothing(past, years))


def run(args: Forecast) -> None:
    """Prints a line per forecast and the mean of those before the last."""
    weeks = load_carbon_dioxide()
    if args.seeds < 1:
        raise Problem("--seeds must be at least 1.")
    if not args.origins or not all(572 <= origin < len(weeks) for origin in args.origins):
        raise Problem(f"--origins must be from 572 to {len(weeks) - 1}.")
    print("mean absolute error over ten years, ppm")
    print(f"{'from':<8}{'network':>10}{'last year':>12}{'smoothing':>12}", flush=True)
    rows = []
    for origin in args.origins:
        rows.append(errors(weeks, origin, args))
        print(
            f"{float(weeks.years[origin]):<8.1f}{rows[-1][0]:>10.2f}{rows[-1][1]:>12.2f}{rows[-1][2]:>12.2f}",
            flush=True,
        )
    if len(rows) > 2:
        means = [sum(column) / len(column) for column in zip(*rows[:-1], strict=True)]
        print(f"{'but last':<8}{means[0]:>10.2f}{means[1]:>12.2f}{means[2]:>12.2f}")
    print(args.out)


def main(arguments: list[str]) -> int:
    """Runs the program."""
    return exit_status("forecast", lambda: run(tyro.cli(Forecast, args=arguments, description=__doc__)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
