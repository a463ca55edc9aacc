"""Count models of quantised audio: what a network has to beat."""

from __future__ import annotations

import math

import torch

from .audio import Quantizer, Recording

_PAIRS_UP_TO = 12
"""Bits per sample up to which pairs are counted: the table has 4^bits entries."""


def count_baselines(train: list[Recording], held_out: list[Recording], quantizer: Quantizer) -> dict[str, float]:
    """Bits per sample on held-out recordings of models that count classes, or pairs of classes, in the training ones.

    Counts start at one, so that what was never seen is not impossible. Like the network, they are asked for every
    sample but a recording's first. Pairs are left out above 12 bits.
    """
    K = quantizer.classes
    found = {"uniform": math.log2(K)}
    seen, unseen = (_counts(recordings, quantizer, 1) for recordings in (train, held_out))
    found["unigram"] = _cross_entropy(seen + 1, unseen)
    if quantizer.bits <= _PAIRS_UP_TO:
        seen, unseen = (_counts(recordings, quantizer, 2).view(K, K) for recordings in (train, held_out))
        found["bigram"] = _cross_entropy(seen + 1, unseen)
    return found


def _cross_entropy(seen: torch.Tensor, unseen: torch.Tensor) -> float:
    """Bits per count of `unseen` under the frequencies, along the last axis, of `seen`."""
    bits = -(seen / seen.sum(-1, keepdim=True)).log2()
    return float((unseen * bits).sum() / unseen.sum())


def _counts(recordings: list[Recording], quantizer: Quantizer, order: int) -> torch.Tensor:
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
    return total
