"""Models of quantised audio without a network, as baselines."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .audio import Quantizer, Recording
from .console import Stage, silent

Array = npt.NDArray[np.float64]

BASELINES = ("uniform", "unigram", "bigram", "adaptive")
"""What a network is compared with."""
_PAIRS_UP_TO = 12
"""Bits per sample up to which pairs are counted: the table has 4^bits entries."""
_WINDOW = 1 << 15
"""Samples of each recording that the adaptive filter reads at a time."""
_TUNED_ON = 1 << 15
"""Samples of each recording on which its settings are compared."""


def measure_baselines(
    train: list[Recording], held_out: list[Recording], quantizer: Quantizer, begin: Stage = silent
) -> dict[str, float]:
    """Bits per sample on held-out recordings of what knows less than a network does.

    `uniform` knows nothing; `unigram` and `bigram` count classes, and pairs of classes, in the training recordings;
    `adaptive` is an :class:`AdaptiveFilter`. Counts start at one, so that what was never seen is not impossible. Like
    the network, they are asked for every sample but a recording's first. Pairs are left out above 12 bits.

    Arguments:
        train: Recordings to count in.
        held_out: Recordings to measure on.
        quantizer: How samples become classes.
        begin: Called at the beginning of each part of the work.
    """
    K, pairs = quantizer.classes, quantizer.bits <= _PAIRS_UP_TO
    found = {"uniform": math.log2(K)}
    report = begin("counting", (1 + pairs) * sum(map(len, train + held_out)))
    seen, unseen = (_counts(recordings, quantizer, 1, report) for recordings in (train, held_out))
    found["unigram"] = _cross_entropy(seen + 1, unseen)
    if pairs:
        seen, unseen = (_counts(recordings, quantizer, 2, report).view(K, K) for recordings in (train, held_out))
        found["bigram"] = _cross_entropy(seen + 1, unseen)
    tuned = tune_filter(train, quantizer, begin)
    found["adaptive"] = tuned.bits(held_out, quantizer, report=begin("adaptive filter", sum(map(len, held_out))))
    return found


def _cross_entropy(known: torch.Tensor, new: torch.Tensor) -> float:
    """Bits per count of `new` under the frequencies of `known` along the last axis."""
    bits = -(known / known.sum(-1, keepdim=True)).log2()
    return float((new * bits).sum() / new.sum())


def _counts(
    recordings: list[Recording], quantizer: Quantizer, order: int, report: Callable[[int], object]
) -> torch.Tensor:
    """How often each class follows another (order 2), or anything (order 1)."""
    total = torch.zeros(quantizer.classes**order, dtype=torch.double)
    for recording in recordings:
        previous = None
        for samples in recording.chunks(1 << 20):
            q = quantizer.encode(samples)
            if previous is not None:
                q = torch.cat([previous, q])
            codes = q[1:] if order == 1 else q[:-1] * quantizer.classes + q[1:]
            total += torch.bincount(codes, minlength=len(total))
            previous = q[-1:]
            report(len(samples))
    return total


@dataclass(frozen=True)
class AdaptiveFilter:
    r"""A linear filter that learns from each sample, and gives a probability for each class.

    From the :math:`P` samples before sample :math:`k`, :math:`u_k = (x_{k-P}, \dots, x_{k-1})`, it predicts
    :math:`\hat x_k = w_k \cdot u_k`, and learns from its error :math:`e_k = x_k - \hat x_k` by normalised least mean
    squares,

    .. math:: w_{k+1} = w_k + \frac{\mu\, e_k\, u_k}{\delta + |u_k|^2}.

    The error is assumed to be logistic, with a width proportional to the mean of recent errors,
    :math:`s_k = \gamma\, m_k`, :math:`m_{k+1} = \beta m_k + (1 - \beta) |e_k|`. A class stands for all samples between
    two edges :math:`a < b`, the lowest and the highest class also for all samples beyond, so that

    .. math:: p_k = \sigma\left(\frac{b - \hat x_k}{s_k}\right) - \sigma\left(\frac{a - \hat x_k}{s_k}\right).

    :math:`\delta` is :math:`P` times the square of the smallest distance between two classes, and an eighth of that
    distance is the smallest :math:`m_k`. :math:`w` and :math:`m` start from zero; only :math:`\mu, \beta, \gamma` are
    chosen in advance.

    References:
        | Adaptive Filter Theory (Haykin, 4th edition, 2002), Chapter 6 (normalised least mean squares)
        | PixelCNN++ (Salimans et al., 2017), Section 2.1, https://arxiv.org/abs/1701.05517 (discretised logistic)
    """

    rate: float = 0.1
    r""":math:`\mu`, how fast the filter learns; stable below 2."""
    memory: float = 0.97
    r""":math:`\beta`, the memory of the mean error."""
    width: float = 0.7
    r""":math:`\gamma`, the logistic's width for a mean error of one; 0.72 for errors that are logistic."""
    order: int = 32
    """:math:`P`, the number of past samples."""

    def bits(
        self,
        recordings: list[Recording],
        quantizer: Quantizer,
        limit: int | None = None,
        *,
        report: Callable[[int], object] = lambda done: None,
    ) -> float:
        """Bits per sample of all samples of some recordings but the first of each.

        Arguments:
            recordings: The recordings, which are filtered in parallel.
            quantizer: How samples become classes.
            limit: Samples of each recording, by default all.
            report: Called with every number of samples that were heard.
        """
        lengths = np.array([min(len(recording), limit or len(recording)) for recording in recordings])
        longest = int(lengths.max())
        least = float(quantizer.decode(quantizer.silence + torch.arange(-1, 2)).diff().min())
        before, w = np.zeros((2, len(recordings), self.order))
        mean, total = np.zeros(len(recordings)), 0.0
        for start in range(0, longest, _WINDOW):
            size = min(_WINDOW, longest - start)
            classes = torch.full((len(recordings), size), quantizer.silence)
            for row, recording, length in zip(classes, recordings, lengths.tolist(), strict=True):
                part = quantizer.encode(recording.read(start, min(start + size, length)))
                row[: len(part)] = part
            heard = np.concatenate([before, quantizer.decode(classes).double().numpy()], 1)
            before = heard[:, size:]
            predicted = _predict(heard, w, self.rate, self.order * least**2)
            recent, mean = _recent(np.abs(heard[:, self.order :] - predicted), mean, self.memory)
            bits = _logistic_bits(classes, predicted, self.width * np.maximum(recent, least / 8), quantizer)
            time = np.arange(start, start + size)
            total += float(bits[(time >= 1) & (time < lengths[:, None])].sum())
            report(int((lengths - start).clip(0, size).sum()))
        return total / float((lengths - 1).sum())


def _predict(heard: Array, w: Array, rate: float, floor: float) -> Array:
    """The predictions of heard[:, order:] by the filters `w` (rows, order), which are updated in place."""
    order = w.shape[1]
    power = np.lib.stride_tricks.sliding_window_view(heard[:, :-1] ** 2, order, 1).sum(-1)
    gain = rate / (power + floor)
    predicted: Array = np.empty_like(gain)
    for k in range(gain.shape[1]):
        u = heard[:, k : k + order]
        x: Array = (w[:, None] @ u[:, :, None])[:, 0, 0]
        predicted[:, k] = x
        w += (gain[:, k] * (heard[:, k + order] - x))[:, None] * u
    return predicted


def _recent(sizes: Array, mean: Array, memory: float) -> tuple[Array, Array]:
    """The running mean before each column, and the one after the last."""
    found = np.empty_like(sizes)
    block = max(1, min(256, int(-25 / math.log(memory))))  # memory^-block is then at most e^25
    for start in range(0, sizes.shape[1], block):
        part = sizes[:, start : start + block]
        # m_k = memory^k m_0 + (1 - memory) sum_{j<k} memory^(k-1-j) |e_j|, a sum of positive numbers
        power = memory ** np.arange(part.shape[1] + 1)
        new = power[1:] * (mean[:, None] + (1 - memory) * np.cumsum(part / power[1:], 1))
        found[:, start] = mean
        found[:, start + 1 : start + block] = new[:, :-1]
        mean = new[:, -1]
    return found, mean


def _logistic_bits(classes: torch.Tensor, middle: Array, scale: Array, quantizer: Quantizer) -> Array:
    """The negative log-likelihood of classes under logistic distributions, in bits."""
    low, high = ((quantizer.decode(classes + side).double().numpy() - middle) / scale for side in (-0.5, 0.5))
    low[(classes == 0).numpy()] = -np.inf
    high[(classes == quantizer.classes - 1).numpy()] = np.inf
    # log(sigma(b) - sigma(a)) = log sigma(b) + log sigma(-a) + log(1 - exp(a - b)): accurate in the tails too
    nats = np.logaddexp(0, -high) + np.logaddexp(0, low) - np.log1p(-np.exp(low - high))
    bits: Array = nats / math.log(2)
    return bits


_CANDIDATES: dict[str, tuple[Any, ...]] = {
    "rate": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "memory": (0.9, 0.97, 0.99),
    "width": (0.5, 0.6, 0.7, 0.8, 1.0),
}
"""The values among which each setting of the filter is chosen, one setting after another."""


def tune_filter(train: list[Recording], quantizer: Quantizer, begin: Stage = silent) -> AdaptiveFilter:
    """The filter whose settings suit the first seconds of up to four training recordings best."""
    chosen, found = train[:: max(1, len(train) // 4)][:4], AdaptiveFilter()
    samples = sum(min(len(recording), _TUNED_ON) for recording in chosen)
    report = begin("tuning the filter", samples * sum(map(len, _CANDIDATES.values())))
    for name, values in _CANDIDATES.items():
        tried = [replace(found, **{name: value}) for value in values]
        found = min(tried, key=lambda candidate: candidate.bits(chosen, quantizer, _TUNED_ON, report=report))
    return found
