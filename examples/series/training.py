"""Training of classifiers, and its settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tyro.conf import OmitArgPrefixes

from sashimi.problems import Problem
from ssmkit import param_groups

from .data import Classification, Labelled
from .models import Classifier, Sizes


@dataclass(frozen=True)
class Fitting:
    """Settings of the training of any network for series."""

    sizes: OmitArgPrefixes[Sizes] = field(default_factory=Sizes)
    steps: int = 1000
    """Training steps."""
    batch: int = 16
    """Series per step."""
    lr: float = 4e-3
    """Highest learning rate; it rises over the first tenth of the steps, and falls to zero by a cosine."""
    weight_decay: float = 0.05
    """Decay of the weights that have one."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise Problem(f"--{name} must be at least 1, not {getattr(self, name)}.")


@dataclass(frozen=True)
class Settings(Fitting):
    """Settings of the training of a classifier."""

    crop: float = 1.0
    """Shortest part of a series that is used in training."""
    scale: float = 0.0
    """Spread of a random factor of a series in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.crop <= 1:
            raise Problem(f"--crop must be greater than 0 and at most 1, not {self.crop}.")


CLASSIFIERS = {
    "PLAID": Settings(Sizes(dt_min=1e-2, dt_max=1.0), steps=2700, crop=0.7, scale=0.1),
    "JapaneseVowels": Settings(steps=700),
    "ACSF1": Settings(steps=600, crop=0.7),
}
"""Settings for the data sets. Those of JapaneseVowels and PLAID were tried on folds of the training splits (`--folds`);
those of ACSF1 are a first guess."""
Report = Callable[[float], object]


def fit(model: nn.Module, losses: Iterator[Tensor], settings: Fitting, report: Report) -> None:
    """Minimises losses, one per step."""
    optimizer = torch.optim.AdamW(param_groups(model, settings.lr, settings.weight_decay))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], settings.steps, pct_start=0.1
    )
    model.train()
    for _, loss in zip(range(settings.steps), losses, strict=False):
        if not loss.isfinite():
            raise Problem("the loss is not finite; use a smaller --lr.")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(loss.item())
    model.eval()


def batches(data: Labelled, size: int, random: torch.Generator) -> Iterator[Labelled]:
    """Batches without end, each of series of similar length: little padding. Every series once per epoch."""
    lengths = torch.tensor([len(x) for x in data.series])
    while True:
        order = torch.rand(len(data), generator=random).mul(0.1).add(1).mul(lengths).argsort()
        parts = order.split(size)
        for i in torch.randperm(len(parts), generator=random).tolist():
            yield data.part(parts[i])


def vary(x: Tensor, settings: Settings, random: torch.Generator) -> Tensor:
    """A random part of a series, times a random factor."""
    share, start, size = torch.rand(3, generator=random).tolist()
    length = max(1, math.ceil(len(x) * (1 - share * (1 - settings.crop))))
    first = int(start * (len(x) - length + 1))
    return x[first : first + length] * math.exp(settings.scale * (2 * size - 1))


def train_classifier(
    data: Classification, settings: Settings, seed: int = 0, report: Report = lambda loss: None
) -> Classifier:
    """A classifier, trained on the training split."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = Classifier(data.train.series[0].shape[1], data.classes, settings.sizes)
    model.measure(data.train.series)

    def losses() -> Iterator[Tensor]:
        for part in batches(data.train, settings.batch, random):
            yield F.cross_entropy(model([vary(x, settings, random) for x in part.series]), part.labels)

    fit(model, losses(), settings, report)
    return model


@torch.no_grad()
def accuracy(model: Classifier, data: Labelled, size: int = 64) -> float:
    """The share of series whose likeliest class is their label."""
    order = torch.tensor([len(x) for x in data.series]).argsort()
    right = 0
    for chosen in order.split(size):
        part = data.part(chosen)
        right += int((model(part.series).argmax(-1) == part.labels).sum())
    return right / len(data)
