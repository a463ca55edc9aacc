"""Generation of text: prompts are read by `scan`, then each stream draws tokens until it ends."""

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
    """Reads prompts, and starts streams that continue them.

    Each prompt is read separately, so that prompts of different lengths need no padding.

    Arguments:
        network: The network.
        prompts: The tokens of each prompt.
        samples: The number of streams per prompt.
        seed: The seed of the random numbers for sampling.
        chunk: The largest number of tokens to read at a time. A smaller one needs less memory; results are the same.

    Raises:
        Problem: If a prompt is empty, or has tokens outside of the vocabulary.
    """
    network.eval()
    weight = network["embedding"].get_parameter("module.weight")
    system, ends = network.system(), []
    for prompt in prompts:
        if not prompt:
            raise Problem("a prompt must have at least one token.")
        if min(prompt) < 0 or max(prompt) >= len(weight):
            raise Problem(
                f"the model has the tokens 0 to {len(weight) - 1}, and the prompt has others; give its own tokenizer."
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
    """Continues each stream up to a stop token, or up to a length.

    The tokens of a stream depend on the seed, on its number and on the number of streams. They do not depend on `block`
    or on where other streams end.

    Arguments:
        engine: The engine that runs the network.
        streams: The streams to continue. They are not updated, but their random numbers are used.
        length: The largest number of tokens of a stream.
        sampling: How tokens are drawn.
        stop: Tokens that end a stream; such a token is the last of its stream.
        block: The number of tokens from one yield to the next.

    Yields:
        The new tokens of each stream; none after its end.
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
