"""The overfitting test at full size: one minute of audio, every sample in one training step."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .audio import Quantizer, Recording, input_and_target
from .evaluation import total_bits
from .model import sashimi, without_head

LENGTH = 958_400
"""Samples of the test: a minute at 16 kHz, cut to whole frames of both pools."""


@dataclass(frozen=True)
class Epoch:
    """One step over the whole clip."""

    bits: float
    seconds: float
    peak: int
    """Most bytes in use so far, on the GPU or by this process."""


def overfit(
    recording: Recording,
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
    """Trains on one whole recording with Adam; returns loss, time and peak memory of every step.

    It fits in memory because of the algorithms and of activation checkpointing per block, not as a smaller problem.
    """
    torch.manual_seed(seed)
    model = sashimi(d_model, blocks, d_state=d_state, glu=False, checkpoint=True).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    x, y = input_and_target(Quantizer().encode(recording.read(0, LENGTH + 1))[None].to(device))
    trunk, head = without_head(model)
    results = []
    for epoch in range(epochs):
        start = time.perf_counter()
        loss = total_bits(head, trunk(x), y) / y.numel()
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
