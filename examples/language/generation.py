"""Generating text: prompts are read by `scan`, tokens drawn one by one, each row until its own end."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from sashimi.generation import Sampling, SamplingEngine, Streams
from sashimi.problems import Problem
from ssmkit import Sequential
from ssmkit.states import concatenate, repeat, select


@torch.no_grad()
def read_prompts(
    network: Sequential, prompts: Sequence[Sequence[int]], samples: int = 1, *, seed: int = 0, chunk: int = 512
) -> Streams:
    """Reads prompts, each from rest, and starts streams from where they end.

    They may have different lengths: each is read alone, so that nothing has to be filled up.

    Arguments:
        network: The network.
        prompts: Tokens.
        samples: Streams per prompt.
        seed: Of what is drawn later.
        chunk: The most tokens that are read at a time; it bounds the memory and changes nothing else.

    Raises:
        Problem: If a prompt is empty, or has tokens that the network has not.
    """
    network.eval()
    weight = network["embedding"].get_parameter("module.weight")
    system, ends = network.system(), []
    for prompt in prompts:
        if not prompt:
            raise Problem("a prompt must have at least one token: without one there is nothing to go on from.")
        if min(prompt) < 0 or max(prompt) >= len(weight):
            raise Problem(
                f"the model has the tokens 0 to {len(weight) - 1}, and the prompt others; is it its tokenizer?"
            )
        state = network.initial_state(1, device=weight.device)
        for part in torch.tensor([prompt], device=weight.device).split(chunk, dim=1):
            logits, state = network.scan(part, state, system)
        ends.append((logits[:, -1], state))
    logits = torch.cat([logits for logits, _ in ends]).repeat_interleave(samples, 0)
    state = repeat(concatenate([state for _, state in ends]), samples)
    return Streams(logits, state, torch.Generator().manual_seed(seed))


def generate(
    engine: SamplingEngine,
    streams: Streams,
    length: int,
    sampling: Sampling,
    *,
    stop: Collection[int] = (),
    block: int = 32,
) -> Iterator[list[Tensor]]:
    """Continues streams until each has drawn a stop token, or its length.

    What a stream draws depends on the seed, its number and the number of streams, and neither on the block nor on when
    the others stop.

    Arguments:
        engine: What runs the network.
        streams: Where to go on. It is used up: its random numbers are drawn, and it does not move on.
        length: The most tokens of a stream.
        sampling: How they are drawn.
        stop: Tokens that end a stream; they are given out as its last.
        block: Tokens from one yield to the next.

    Yields:
        For every stream its new tokens; none once it has stopped.
    """
    rows = len(streams.logits)
    running, logits, state = torch.arange(rows), streams.logits, streams.state
    ends = torch.tensor(sorted(stop), device=logits.device)
    for start in range(0, length, block):
        uniform = torch.rand((min(block, length - start), rows), generator=streams.random, dtype=torch.double)
        made = engine.run(logits, state, uniform[:, running].mT.to(logits.device), sampling)
        new = [made.classes.new_zeros(0) for _ in range(rows)]
        kept = []
        for i, (row, drawn) in enumerate(zip(running.tolist(), made.classes, strict=True)):
            at = torch.isin(drawn, ends).nonzero()
            new[row] = drawn[: at[0] + 1] if len(at) else drawn
            if not len(at):
                kept.append(i)
        yield [tokens.cpu() for tokens in new]
        if not kept:
            return
        logits, state = made.logits, made.state
        if len(kept) < len(running):
            running, logits, state = running[kept], logits[kept], select(state, kept)
