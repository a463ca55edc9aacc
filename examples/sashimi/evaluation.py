"""Measuring an autoregressive network on recordings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ssmkit import S4Block, Sequential

from .audio import Quantizer, Recording, input_and_target
from .model import without_head

WINDOW = 1 << 20
"""Samples that are read at a time: a minute at 16 kHz."""
_LOGITS = 1 << 14
"""Samples whose logits are in memory at a time."""


def total_bits(head: nn.Module, hidden: Tensor, target: Tensor) -> Tensor:
    """The negative log-likelihood of the targets in bits, summed.

    Logits need the most memory: they are computed for a part of the sequence at a time, and again in the backward pass.
    """

    def part(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(x).flatten(0, -2).float(), y.flatten(), reduction="sum").double()

    pairs = zip(hidden.split(_LOGITS, dim=-2), target.split(_LOGITS, dim=-1), strict=True)
    return torch.stack([checkpoint(part, *pair, use_reentrant=False) for pair in pairs]).sum() / math.log(2)


@contextmanager
def _shared_out(network: nn.Module, samples: int, report: Callable[[int], object]) -> Iterator[None]:
    """Reports samples that are read inside: a share of them after each block of the network, the rest at the end."""
    blocks = [part for part in network.modules() if isinstance(part, S4Block)]
    share, left = samples // (len(blocks) + 1), samples

    def passed(*_: object) -> None:
        nonlocal left
        left -= share
        report(share)

    hooks = [block.register_forward_hook(passed) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    report(left)


@torch.no_grad()
def evaluate(
    model: Sequential,
    recordings: list[Recording],
    quantizer: Quantizer,
    limit: int | None = None,
    *,
    window: int = WINDOW,
    report: Callable[[int], object] = lambda done: None,
) -> float:
    """The negative log-likelihood of recordings, each from rest, in bits per sample.

    A recording is read by `forward`, or by `scan` window by window if it is longer than a window, so that memory does
    not grow with its length.

    Arguments:
        model: The network.
        recordings: The recordings.
        quantizer: How samples become classes.
        limit: Samples of each recording, by default all.
        window: Samples that are read at a time.
        report: Called with every number of samples that were read.
    """
    model.eval()
    device = next(model.parameters()).device
    trunk, head = without_head(model)
    system = trunk.system()
    total, count = 0.0, 0
    for recording in recordings:
        end = min(len(recording), limit or len(recording)) - 1
        state = None
        for start in range(0, end, window):
            classes = quantizer.encode(recording.read(start, min(start + window, end) + 1)).to(device)
            x, y = input_and_target(classes[None])
            with _shared_out(trunk, y.numel(), report):
                if end <= window:
                    hidden = trunk(x, system)
                else:
                    hidden, state = trunk.scan(x, trunk.initial_state(1) if state is None else state, system)
                total += float(total_bits(head, hidden, y))
            count += y.numel()
    return total / count


@torch.no_grad()
def evaluate_by_step(
    model: Sequential,
    recording: Recording,
    quantizer: Quantizer,
    samples: int,
    *,
    report: Callable[[int], object] = lambda done: None,
) -> float:
    """The negative log-likelihood of a recording's first samples, in bits per sample, read one by one."""
    model.eval()
    device = next(model.parameters()).device
    x, y = input_and_target(quantizer.encode(recording.read(0, samples + 1)).to(device)[None])
    system, state = model.system(), model.initial_state(1)
    total = 0.0
    for k in range(x.shape[1]):
        logits, state = model.step(x[:, k], state, system)
        total += float(F.cross_entropy(logits, y[:, k]).double())
        report(1)
    return total / (x.shape[1] * math.log(2))
