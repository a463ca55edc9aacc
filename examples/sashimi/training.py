"""Training and measuring an autoregressive network."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmkit import Sequential, param_groups

from .audio import Clip, Excerpts, input_and_target


def bits(logits: Tensor, target: Tensor) -> Tensor:
    """The mean negative log-likelihood of the targets, in bits per sample."""
    return F.cross_entropy(logits.flatten(0, -2), target.flatten()) / math.log(2)


def train(
    model: Sequential,
    excerpts: Excerpts,
    steps: int,
    *,
    lr: float,
    weight_decay: float,
    warmup: float = 0.05,
    clip: float = 1.0,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Trains with AdamW, a linear warm-up and a cosine decay to zero; returns the loss of every step in bits.

    Arguments:
        model: The network.
        excerpts: What it is trained on.
        steps: The number of optimiser steps.
        lr: The highest learning rate; the state-space parameters stay at 1e-3 or below.
        weight_decay: Of the weights that decay.
        warmup: The part of the steps in which the rate rises.
        clip: The largest norm of the gradient.
        report: Called after every step with its number and loss.
    """
    optimizer = torch.optim.AdamW(param_groups(model, lr, weight_decay))
    rise = max(1, round(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: min((k + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * max(0, k - rise) / max(1, steps - rise))),
    )
    model.train()
    losses = []
    for step in range(steps):
        x, y = excerpts.draw()
        loss = bits(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        report(step, losses[-1])
    return losses


@torch.no_grad()
def evaluate(model: Sequential, clips: list[Clip], chunk: int = 1 << 16) -> float:
    """The negative log-likelihood of whole clips, each from rest, in bits per sample.

    A clip is read by `scan` in chunks that carry the state: memory does not grow with its length.
    """
    model.eval()
    system = model.system()
    total, count = 0.0, 0
    for clip in clips:
        x, y = input_and_target(clip.samples)
        state = model.initial_state(1)
        for inputs, targets in zip(x.split(chunk), y.split(chunk), strict=True):
            logits, state = model.scan(inputs[None], state, system)
            total += float(bits(logits, targets)) * len(targets)
            count += len(targets)
    return total / count
