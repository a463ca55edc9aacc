"""Classifiers without a network: MiniRocket, and the nearest neighbour under dynamic time warping."""

from __future__ import annotations

import warnings
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .data import Classification, package


def minirocket(data: Classification, seed: int = 0) -> float:
    """The test accuracy of MiniRocket's features with a ridge classifier, as its authors use it.

    References:
        | MiniRocket (Dempster et al., 2021), https://arxiv.org/abs/2012.08791
    """
    rocket = package("sktime.transformations.panel.rocket")
    ridge = package("sklearn.linear_model").RidgeClassifierCV(alphas=np.logspace(-3, 3, 10))
    scaler = package("sklearn.preprocessing").StandardScaler(with_mean=False)
    # MiniRocket's shortest kernel has nine values.
    transform = rocket.MiniRocketMultivariateVariable(pad_value_short_series=0.0, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train = scaler.fit_transform(transform.fit_transform(_table(data.train.series)))
        test = scaler.transform(transform.transform(_table(data.test.series)))
    ridge.fit(train, data.train.labels.numpy())
    return float((ridge.predict(test) == data.test.labels.numpy()).mean())


def _table(series: list[Tensor]) -> Any:
    """sktime's table of series of different lengths."""
    pandas = package("pandas")
    channels = range(series[0].shape[1])
    return pandas.DataFrame({f"{c}": [pandas.Series(x[:, c].numpy().astype(float)) for x in series] for c in channels})


def nearest_neighbour(data: Classification) -> float:
    """The test accuracy of the nearest neighbour under dynamic time warping, with each channel standardised."""
    every = torch.cat(data.train.series)
    mean, spread = every.mean(0), every.std(0).clamp(min=1e-6)
    train, test = ([((x - mean) / spread).double().numpy() for x in part.series] for part in (data.train, data.test))
    right = 0
    for x, label in zip(test, data.test.labels.tolist(), strict=True):
        right += int(data.train.labels[int(np.argmin([warped_distance(x, other) for other in train]))]) == label
    return right / len(test)


@numba.njit(cache=True)
def warped_distance(x: Any, y: Any) -> float:
    """The least sum of squared distances along a path that moves on in x, in y or in both.

    sktime's distance takes series of equal length only.
    """
    row = np.full(len(y) + 1, np.inf)
    row[0] = 0.0
    for i in range(len(x)):
        corner, row[0] = row[0], np.inf
        for j in range(len(y)):
            cost = 0.0
            for c in range(x.shape[1]):
                cost += (x[i, c] - y[j, c]) ** 2
            above = row[j + 1]
            row[j + 1] = cost + min(corner, above, row[j])
            corner = above
    return float(row[-1])
