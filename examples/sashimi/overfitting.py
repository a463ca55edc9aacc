"""The overfitting test at full size: one minute of audio, every sample in one training step."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ssmkit import Sequential

from .audio import Clip, input_and_target
from .model import sashimi

LENGTH = 958_400
"""Samples of the test: a minute at 16 kHz, cut to whole frames of both pools."""


@dataclass(frozen=True)
class Epoch:
    """One step over the whole clip."""

    bits: float
    seconds: float
    peak: int
    """Most bytes in use so far: of the card, or of this process."""


def whole_clip_bits(model: Sequential, x: Tensor, y: Tensor, chunk: int = 1 << 16) -> Tensor:
    """The mean negative log-likelihood in bits, with the logits of one chunk of the sequence in memory at a time."""
    *trunk, norm, head = model.layers
    for layer in trunk:
        x = layer(x)

    def total(hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(norm(hidden)), target, reduction="sum")

    parts = zip(x[0].split(chunk), y[0].split(chunk), strict=True)
    return torch.stack([checkpoint(total, *part, use_reentrant=False) for part in parts]).sum() / (
        y.numel() * math.log(2)
    )


def overfit(
    clip: Clip,
    epochs: int,
    *,
    d_model: int = 128,
    d_state: int = 512,
    blocks: int = 2,
    lr: float = 1e-3,
    seed: int = 0,
    device: str = "cpu",
    report: Callable[[int, Epoch], None] = lambda epoch, result: None,
) -> list[Epoch]:
    """Trains on one clip, whole, with Adam; returns loss, time and peak memory of every step.

    Memory comes from the algorithms and from activation checkpointing per block, not from a smaller problem.
    """
    torch.manual_seed(seed)
    model = sashimi(d_model, blocks, d_state=d_state, glu=False, checkpoint=True).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    x, y = input_and_target(clip.samples[: LENGTH + 1][None].to(device))
    results = []
    for epoch in range(epochs):
        start = time.perf_counter()
        loss = whole_clip_bits(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bits = loss.item()
        results.append(Epoch(bits, time.perf_counter() - start, _peak(device)))
        report(epoch, results[-1])
    return results


def _peak(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
