"""How a class is drawn from logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .compiling import allocating, compiled
from .functions import exp

__all__ = ["draw", "nats"]

_F = np.float32


@allocating
def draw(logits: Any, p: Any, uniform: Any, temperature: Any, top_k: Any, top_p: Any) -> Any:
    """A class, by inverting the distribution function at a number in [0, 1); at temperature 0 the likeliest class.

    `p` is scratch memory of the size of `logits`.
    """
    n = logits.size
    best = 0
    for i in range(n):
        if logits[i] > logits[best]:
            best = i
    if temperature == 0:
        return best
    scale = _F(1 / temperature)
    for i in range(n):
        p[i] = exp((logits[i] - logits[best]) * scale)
    if 0 < top_k < n:
        least = np.partition(p, n - top_k)[n - top_k]
        for i in range(n):
            if p[i] < least:
                p[i] = _F(0)
    if top_p < 1:
        limit, before = top_p * p.astype(np.float64).sum(), 0.0
        for i in np.argsort(-p, kind="mergesort"):
            chosen = before < limit
            before += p[i]
            if not chosen:
                p[i] = _F(0)
    total = 0.0
    for i in range(n):
        total += p[i]
    threshold, total, last = uniform * total, 0.0, best
    for i in range(n):
        total += p[i]
        if total > threshold:
            return i
        if p[i] > 0:
            last = i
    return last


@compiled
def nats(logits: Any, chosen: Any) -> Any:
    """Negative log-likelihood of a class."""
    top = logits[0]
    for i in range(logits.size):
        top = max(top, logits[i])
    total = 0.0
    for i in range(logits.size):
        total += exp(logits[i] - top)
    return math.log(total) + (top - logits[chosen])
