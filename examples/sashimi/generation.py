"""Generating audio sample by sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ssmkit import Sequential
from ssmkit.states import State

SILENCE = 128
"""The class of a sample of value zero."""


@torch.no_grad()
def prime(model: Sequential, prompt: Tensor) -> tuple[Tensor, State]:
    """Reads prompts (batch, length) in parallel; returns the logits of what comes next, and the state."""
    model.eval()
    logits, state = model.scan(prompt.long(), model.initial_state(len(prompt)))
    return logits[:, -1], state


@torch.no_grad()
def generate(
    model: Sequential,
    logits: Tensor,
    state: State,
    length: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    report: Callable[[int], None] = lambda k: None,
) -> Tensor:
    """Continues a batch of streams by `step`, each sample drawn from what the network says of it.

    Arguments:
        model: The network.
        logits: What it says of the first sample, see :func:`prime`, with shape (batch, 256).
        state: Where the streams have got to.
        length: The number of samples to generate.
        temperature: Below 1 the draw is bolder; at 0 the most likely class is taken.
        seed: Of the draw.
        report: Called after every sample with its number.

    Returns:
        Classes, with shape (batch, length).
    """
    model.eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a step is too small to be worth sharing
    try:
        return _sample(model, logits, state, length, temperature, seed, report)
    finally:
        torch.set_num_threads(threads)


def _sample(
    model: Sequential,
    logits: Tensor,
    state: State,
    length: int,
    temperature: float,
    seed: int,
    report: Callable[[int], None],
) -> Tensor:
    system = model.system()
    generator = torch.Generator().manual_seed(seed)
    out = []
    for k in range(length):
        if temperature == 0:
            sample = logits.argmax(-1)
        else:
            p = torch.softmax(logits / temperature, -1)
            sample = torch.multinomial(p, 1, generator=generator)[:, 0]
        out.append(sample)
        logits, state = model.step(sample, state, system)
        report(k)
    return torch.stack(out, dim=1)
