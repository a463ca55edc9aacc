"""Forecasts of a weekly series over years: data, baselines, a network and its training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sashimi.problems import Problem
from sashimi.storage import make_folder, write_checked

from .data import package
from .models import FILE, Sizes, read
from .training import Fitting, fit

RECENT = 5
"""Years whose season and growth a forecast continues."""
SETTINGS = Fitting(Sizes(d_model=32, blocks=2, dropout=0.0), steps=50, lr=1e-4)
"""Chosen, as the recent years, by the forecasts of four decades that end before 1992."""


@dataclass(frozen=True)
class Weekly:
    """A weekly series."""

    years: Tensor
    """The time of every week in years, float64."""
    values: Tensor
    """Float64."""

    def __len__(self) -> int:
        return len(self.values)

    def until(self, count: int) -> Weekly:
        """The first weeks."""
        return Weekly(self.years[:count], self.values[:count])


def load_carbon_dioxide() -> Weekly:
    """Weekly carbon dioxide at Mauna Loa from March 1958 to December 2001, in parts per million, from statsmodels.

    Missing weeks are interpolated linearly.
    """
    table = package("statsmodels.datasets").co2.load_pandas().data["co2"].interpolate()
    first = table.index[0]
    days = torch.tensor((table.index - first).days.to_numpy(), dtype=torch.float64)
    start = first.year + (first.dayofyear - 1) / 365.25
    return Weekly(start + days / 365.25, torch.tensor(table.to_numpy(), dtype=torch.float64))


def seasonal(past: Weekly, years: Tensor, recent: int = 1) -> tuple[Tensor, Tensor]:
    """The season of the last years at the level of the last one, and the growth from year to year.

    Arguments:
        past: The weeks that are known.
        years: Times after them, with shape (n).
        recent: The number of years whose season and growth are averaged.

    Returns:
        The mean of the values at the same times of these years, each year moved to the mean of the last one, with
        shape (n), and the mean growth per year.
    """
    last = past.years[-1]
    means = [past.values[(past.years > last - i - 1) & (past.years <= last - i)].mean() for i in range(recent + 1)]
    season = torch.zeros_like(years)
    for i in range(recent):
        at = years - (years - last).ceil() - i
        after = torch.searchsorted(past.years, at).clamp(1, len(past) - 1)
        share = (at - past.years[after - 1]) / (past.years[after] - past.years[after - 1])
        season += torch.lerp(past.values[after - 1], past.values[after], share) + means[0] - means[i]
    return season / recent, (means[0] - means[-1]) / recent


def seasonal_naive(past: Weekly, years: Tensor) -> Tensor:
    """The value at the same time of the last year plus, for every year, the growth of the last year."""
    season, growth = seasonal(past, years)
    return season + (years - past.years[-1]).ceil() * growth


def exponential_smoothing(past: Weekly, years: Tensor) -> Tensor:
    """Exponential smoothing with an additive trend and season (ETS(A, A, A)), fitted to the past."""
    smoothing = package("statsmodels.tsa.holtwinters").ExponentialSmoothing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = smoothing(past.values.numpy(), trend="add", seasonal="add", seasonal_periods=52).fit()
    return torch.from_numpy(np.asarray(fitted.forecast(len(years))))


class Forecaster(nn.Module):
    """Forecasts a weekly series for years from the years before.

    A forecast is the season of the last years plus their growth, times a factor that the network gives for each week:
    its encoder runs over the past and then over the weeks of the forecast, whose values are unknown and zero in its
    input. A new network gives the factor 1.

    Arguments:
        sizes: The sizes of the encoder.
        past: Weeks that are read, of more than six years.

    Example:
        >>> model = Forecaster(Sizes(d_model=8, blocks=1), past=400)
        >>> weeks = Weekly(1980 + torch.arange(600) / 52.18, torch.randn(600).double())
        >>> model(weeks, [400, 450], 52).shape
        torch.Size([2, 52])
    """

    def __init__(self, sizes: Sizes, past: int = 520) -> None:
        super().__init__()
        self.sizes, self.past = sizes, past
        self.encoder = sizes.encoder(7)
        self.head = nn.Linear(sizes.d_model, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, weeks: Weekly, origins: list[int], horizon: int) -> Tensor:
        """Forecasts of the weeks after each origin, with shape (B, horizon).

        `weeks.years` must have the times of these weeks; their values are not read.
        """
        rows, seasons, growths = [], [], []
        for origin in origins:
            years = weeks.years[origin - self.past : origin + horizon]
            known = Weekly(years[: self.past], weeks.values[origin - self.past : origin])
            last, ahead = known.years[-1], years[self.past :]
            season, growth = seasonal(known, ahead, RECENT)
            seasons.append(season)
            growths.append((ahead - last).ceil() * growth)
            year = known.values[-52:]
            level = F.pad((known.values - year.mean()) / year.std(), (0, len(ahead)))
            angle, is_known = 2 * math.pi * years, (years <= last).double()
            channels = [level, is_known, (years - last) / 10, angle.sin(), angle.cos(), (2 * angle).sin()]
            rows.append(torch.stack([*channels, (2 * angle).cos()], -1).float())
        factor: Tensor = 1 + self.head(self.encoder(torch.stack(rows)))[:, self.past :, 0].double()
        return torch.stack(seasons) + torch.stack(growths) * factor


def train_forecaster(
    past: Weekly, horizon: int, settings: Fitting, seed: int = 0, report: Callable[[float], object] = lambda loss: None
) -> Forecaster:
    """A forecaster, trained on the forecasts from all weeks of the past.

    Raises:
        Problem: If there are too few weeks.
    """
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = Forecaster(settings.sizes)
    if len(past) < model.past + 52:
        raise Problem(f"{len(past)} weeks are too few: {model.past} are read and at least 52 forecast.")

    def losses() -> Iterator[Tensor]:
        while True:
            # Shorter forecasts too: there are more of them, and later ones.
            size = int(torch.randint(52, min(horizon, len(past) - model.past) + 1, (), generator=random))
            origins = torch.randint(model.past, len(past) - size + 1, (settings.batch,), generator=random).tolist()
            wanted = torch.stack([past.values[origin : origin + size] for origin in origins])
            yield F.smooth_l1_loss(model(past, origins, size), wanted)

    fit(model, losses(), settings, report)
    return model


def save(model: Forecaster, folder: Path) -> None:
    """Writes a model with its configuration and a checksum."""
    make_folder(folder)
    write_checked(folder / FILE, model.state_dict(), sizes=asdict(model.sizes), past=model.past)


def load(folder: Path) -> Forecaster:
    """Reads a model.

    Raises:
        Problem: If there is none, or it is damaged.
    """
    return read(folder, lambda file: Forecaster(Sizes.of(file), file.card["past"]))
