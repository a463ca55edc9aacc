"""Labelled series of any length: those that sktime ships, and files of the UCR archive."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sashimi.problems import Problem

LOADERS = {"PLAID": "load_plaid", "JapaneseVowels": "load_japanese_vowels", "ACSF1": "load_acsf1"}
"""Names of data sets in sktime, and their functions."""


@dataclass(frozen=True)
class Labelled:
    """Series with labels."""

    series: list[Tensor]
    """Float32, with shapes (length, channels)."""
    labels: Tensor
    """Indices of classes."""

    def __len__(self) -> int:
        return len(self.series)

    def part(self, chosen: Tensor) -> Labelled:
        """Some of the series, by their indices."""
        return Labelled([self.series[i] for i in chosen.tolist()], self.labels[chosen])


@dataclass(frozen=True)
class Classification:
    """A data set for classification, with the split of those who published it."""

    train: Labelled
    test: Labelled
    classes: tuple[str, ...]

    def fold(self, number: int, folds: int) -> Classification:
        """Training data alone: one of its folds as the test split. Every fold has the same share of each class."""
        place = torch.empty(len(self.train), dtype=torch.long)
        random = torch.Generator().manual_seed(0)
        for label in self.train.labels.unique():
            members = (self.train.labels == label).nonzero()[:, 0]
            members = members[torch.randperm(len(members), generator=random)]
            place[members] = torch.arange(len(members)) % folds
        kept, held_out = (chosen.nonzero()[:, 0] for chosen in (place != number, place == number))
        return Classification(self.train.part(kept), self.train.part(held_out), self.classes)


def package(name: str) -> Any:
    """A module of a package that is not installed with ssmkit.

    Raises:
        Problem: If the package is missing.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Problem(f"the package {error.name} is missing; run `pip install 'ssmkit[series]'`.") from error


def load_classification(data: str) -> Classification:
    """Reads a data set.

    Arguments:
        data: A name of :data:`LOADERS`, or the common beginning of two files of the UCR archive: with `folder/GunPoint`
            these are `folder/GunPoint_TRAIN.ts` and `folder/GunPoint_TEST.ts`.

    Raises:
        Problem: If there is no such data set, or it cannot be used.
    """
    datasets = package("sktime.datasets")
    tables = []
    for split in ("train", "test"):
        if data in LOADERS:
            tables.append(getattr(datasets, LOADERS[data])(split=split, return_X_y=True, return_type="nested_univ"))
            continue
        path = Path(f"{data}_{split.upper()}.ts")
        if not path.is_file():
            raise Problem(f"--data must be one of {', '.join(LOADERS)} or files that exist; {path} does not.")
        try:
            tables.append(datasets.load_from_tsfile(str(path), return_data_type="nested_univ"))
        except (OSError, ValueError, IndexError) as error:
            raise Problem(f"{path} cannot be read ({error}).") from error
    classes = tuple(sorted({str(label) for _, labels in tables for label in labels}))
    train, test = (_labelled(table, labels, classes) for table, labels in tables)
    return Classification(train, test, classes)


def _labelled(table: Any, labels: Any, classes: tuple[str, ...]) -> Labelled:
    rows = [np.stack([np.asarray(cell, dtype=np.float32) for cell in row], -1) for row in table.to_numpy()]
    if not rows or not all(len(row) and np.isfinite(row).all() for row in rows):
        raise Problem("a series is empty, or has a value that is missing or not finite.")
    return Labelled([torch.from_numpy(row) for row in rows], torch.tensor([classes.index(str(x)) for x in labels]))
