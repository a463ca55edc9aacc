"""The SaShiMi network, composed of ssmkit's layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from ssmkit import S4, S4D, Checkpoint, MultiRate, Residual, S4Block, SequenceLayer, Sequential


def _smooth_embedding(d_model: int, classes: int, bandwidth: float = 8.0) -> nn.Embedding:
    """An embedding with similar vectors for neighbouring classes: random cosines of the class.

    Classes of samples are ordered; with independent vectors the network would have to learn this first.
    """
    embedding = nn.Embedding(classes, d_model)
    value = torch.linspace(-1, 1, classes)[:, None]
    frequency, phase = bandwidth * torch.rand(d_model), 2 * math.pi * torch.rand(d_model)
    with torch.no_grad():
        embedding.weight.copy_(math.sqrt(2) * torch.cos(math.pi * frequency * value + phase))
    return embedding


def sashimi(
    d_model: int = 64,
    n_blocks: int = 8,
    *,
    d_state: int = 64,
    layer: Literal["s4", "s4d"] = "s4",
    pool: Sequence[int] = (4, 4),
    expand: int = 2,
    ff: int = 2,
    glu: bool = True,
    dropout: float = 0.0,
    checkpoint: bool = False,
    inputs: Literal["classes", "samples"] = "classes",
    d_output: int = 256,
) -> Sequential:
    r"""SaShiMi: an autoregressive network over raw audio with several rates.

    Every tier runs the tier below it at a lower rate and a greater width, adds the output of that tier to its own
    input, and passes the sum through its blocks. The output at sample k is the logits of sample k + 1.

    References:
        | It's Raw! Audio Generation with State-Space Models (Goel et al., 2022)
        | https://arxiv.org/abs/2202.09729

    Arguments:
        d_model: The width of the top tier.
        n_blocks: Blocks per tier.
        d_state: The size of the state of each feature.
        layer: `"s4"` (diagonal plus low rank) or `"s4d"` (diagonal).
        pool: The factor of the rate from each tier to the one below.
        expand: The factor of the width from each tier to the one below.
        ff: The width of the feed-forward networks, as a multiple of the tier's.
        glu: Whether blocks gate their output.
        dropout: The probability of dropout inside the blocks.
        checkpoint: Compute the activations of a block again in the backward pass instead of keeping them.
        inputs: `"classes"`, embedded, or `"samples"`, floats with shape (*, L, 1).
        d_output: The number of classes of samples.

    Example:
        >>> import torch
        >>> model = sashimi(8, 1, d_state=4)
        >>> model(torch.randint(256, (1, 100))).shape
        torch.Size([1, 100, 256])
    """

    def blocks(width: int) -> list[SequenceLayer]:
        kind = {"s4": S4, "s4d": S4D}[layer]
        made = [S4Block(width, kind(width, d_state), glu=glu, ff=ff, dropout=dropout) for _ in range(n_blocks)]
        return [Checkpoint(block) for block in made] if checkpoint else [*made]

    def tier(width: int, factors: Sequence[int]) -> SequenceLayer:
        if not factors:
            return Residual(*blocks(width))
        lower = MultiRate(width, tier(width * expand, factors[1:]), factors[0], expand)
        return Sequential(Residual(lower), *blocks(width))

    embed = _smooth_embedding(d_model, d_output) if inputs == "classes" else nn.Linear(1, d_model)
    return Sequential(embed, tier(d_model, pool), nn.LayerNorm(d_model), nn.Linear(d_model, d_output))


def least_size(d_model: int, n_blocks: int, *, d_state: int, pool: Sequence[int], d_output: int) -> int:
    """A number of weights that :func:`sashimi` has at least, with `expand` and `ff` of 2: without biases and norms.

    A block of width w has two vectors of d_state numbers per feature, and 5 w² weights in linear maps.

    Example:
        >>> model = sashimi(64, 2, d_state=32)
        >>> bound = least_size(64, 2, d_state=32, pool=(4, 4), d_output=256)
        >>> bound < sum(p.numel() for p in model.parameters()) < 2 * bound
        True
    """
    widths = [d_model << tier for tier in range(len(pool) + 1)]
    blocks = sum(n_blocks * width * (2 * d_state + 5 * width) for width in widths)
    pooling = sum(4 * factor * width**2 for width, factor in zip(widths, pool, strict=False))
    return blocks + pooling + 2 * d_model * d_output


def without_head(model: Sequential) -> tuple[Sequential, nn.Module]:
    """The layers of a SaShiMi up to the last tier, and the two layers that compute the logits, as one module."""
    *trunk, norm, head = model
    return Sequential(*trunk), nn.Sequential(norm, head)
