"""Classify series of any length, beside baselines, on data that sktime ships.

    pip install 'ssmkit[series]'
    python examples/time_series.py japanese-vowels
    python examples/time_series.py plaid
    python examples/time_series.py acsf1
    python examples/time_series.py files --data folder/GunPoint

The first three train networks with different seeds to recognise speakers or appliances, and print their accuracies
beside those of MiniRocket and of the nearest neighbour under dynamic time warping. Without arguments the first runs.
Models are written to `runs/series`.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from tyro.conf import OmitArgPrefixes

from sashimi.console import bar
from sashimi.problems import Problem, exit_status
from series import baselines
from series.data import load_classification
from series.models import save
from series.training import CLASSIFIERS, Settings, accuracy, train_classifier

RUNS = Path("runs/series")
NAMES = {"japanese-vowels": "JapaneseVowels", "plaid": "PLAID", "acsf1": "ACSF1"}
"""Commands, and the data of each."""


@dataclass(frozen=True)
class Classify:
    """Train classifiers, and measure them on the test split."""

    data: str
    """PLAID, JapaneseVowels, ACSF1, or the common beginning of two files of the UCR archive: `folder/GunPoint` for
    `folder/GunPoint_TRAIN.ts` and `folder/GunPoint_TEST.ts`."""
    settings: OmitArgPrefixes[Settings] = field(default_factory=Settings)
    """Settings of the training."""
    seeds: int = 3
    """Networks to train."""
    folds: int = 0
    """Do not read the test split; instead measure on this many folds of the training split, to choose settings."""
    neighbour: bool = True
    """Also measure the nearest neighbour, which takes minutes for long series."""
    out: Path = RUNS
    """Folder for the model of the first seed, in a folder with the name of the data."""


def run_classify(args: Classify) -> None:
    """Trains, measures and writes the first model."""
    if args.seeds < 1 or args.folds == 1 or args.folds < 0:
        raise Problem("--seeds must be at least 1, and --folds 0 or at least 2.")
    data, settings = load_classification(args.data), args.settings
    folder = args.out / Path(args.data).name
    print(f"{args.data}: {len(data.train)} series to train on, {len(data.test)} to test, {len(data.classes)} classes")
    parts = [data.fold(i, args.folds) for i in range(args.folds)] or [data]
    reached = []
    begin = time.perf_counter()
    for seed in range(args.seeds):
        for part in parts:
            with bar(settings.steps, f"seed {seed}", unit="step") as progress:
                model = train_classifier(part, settings, seed, lambda _: progress.update())
            reached.append(accuracy(model, part.test))
            if seed == 0 and not args.folds:
                save(model, folder)
    print(f"network            {statistics.mean(reached):.3f}  (each: {', '.join(f'{x:.3f}' for x in reached)})")
    print(f"                   {time.perf_counter() - begin:.0f} s")
    if args.folds:
        return
    print(f"MiniRocket         {baselines.minirocket(data):.3f}", flush=True)
    if args.neighbour:
        print(f"1-NN, warping      {baselines.nearest_neighbour(data):.3f}")
    print(folder)


def run_command(arguments: list[str]) -> None:
    """Runs what the command line says; the quickest data set if it says nothing."""
    kinds = {name: (data, Classify(data, CLASSIFIERS[data])) for name, data in NAMES.items()}
    kinds["files"] = ("files of the UCR archive", Classify(tyro.MISSING))
    run_classify(tyro.extras.overridable_config_cli(kinds, description=__doc__, args=arguments or ["japanese-vowels"]))


def main(arguments: list[str]) -> int:
    """Runs the program."""
    return exit_status("time_series", lambda: run_command(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
