"""A recurrence over a sequence in blocks, which keeps only the first state of each block for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .precision import full_precision_backward
from .transforms import gradients_with_graph, transformed

__all__ = ["in_blocks"]

Block: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def in_blocks(
    block: Block, samples: int, x: Tensor, constants: Sequence[Tensor], sequences: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Calls a function on the blocks of a sequence, one after another, and concatenates its outputs.

    The backward pass calls the function again, so that its intermediate tensors exist for one block only: memory is
    that of inputs, outputs and one state per block. For second derivatives those of all blocks are kept. torch.compile
    does not trace it, since it would unroll the loop over all samples.

    References:
        | Training Deep Nets with Sublinear Memory Cost (Chen et al., 2016)
        | https://arxiv.org/abs/1604.06174

    Arguments:
        block: From a state, the constants and a block of each sequence to an output, with time as its second axis, and
            the next state, a new tensor. A second call must give the same result.
        samples: The length of a block.
        x: The first state.
        constants: Tensors that are the same for all blocks.
        sequences: Tensors with time as their second axis, of a length of at least 1.

    Returns:
        The concatenated outputs and the last state. Gradients flow to all tensors.

    Example:
        >>> def block(x, gain, u):
        ...     sums = x[:, None] + (gain * u).cumsum(1)
        ...     return sums, sums[:, -1].clone()
        >>> in_blocks(block, 2, torch.zeros(1), [torch.tensor(3.0)], [torch.ones(1, 5)])
        (tensor([[ 3.,  6.,  9., 12., 15.]]), tensor([15.]))
    """
    tensors = (*constants, *sequences)
    # torch.func differentiates the blocks directly, and keeps their intermediate tensors.
    again = torch.is_grad_enabled() and not transformed()
    if not (again and any(v.requires_grad for v in (x, *tensors))):
        y, last, _ = _run(block, samples, x, constants, sequences, keep=False)
        return y, last
    found: tuple[Tensor, Tensor] = _InBlocks.apply(block, samples, len(constants), x, *tensors)  # type: ignore[no-untyped-call]
    return found


def _spans(length: int, samples: int) -> Iterator[slice]:
    for start in range(0, length, samples):
        yield slice(start, min(length, start + samples))


def _run(
    block: Block, samples: int, x: Tensor, constants: Sequence[Tensor], sequences: Sequence[Tensor], *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, the last state and, if `keep`, the first states of the blocks.

    Every tensor that outlives a block is allocated before the second block: small tensors allocated between the large
    ones of the blocks would prevent the allocator from reusing their memory, which would then grow with the number of
    blocks.
    """
    L = sequences[0].shape[1]
    starts = x.new_empty(len(range(0, L, samples)) if keep else 0, *x.shape)
    y = x.new_empty(0)
    for number, span in enumerate(_spans(L, samples)):
        if keep:
            starts[number] = x
        piece, x = block(x, *constants, *(v[:, span] for v in sequences))
        if not number:
            y = piece.new_empty(len(piece), L, *piece.shape[2:])
        y[:, span] = piece
    return y, x, starts


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, block: Block, samples: int, constants: int, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, last, starts = _run(block, samples, x, tensors[:constants], tensors[constants:], keep=True)
        ctx.block, ctx.samples, ctx.constants = block, samples, constants
        ctx.save_for_backward(starts, x, *tensors)
        return y, last

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, gy: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        starts, x, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():

            def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
                constants, sequences = tensors[: ctx.constants], tensors[ctx.constants :]
                return _run(ctx.block, ctx.samples, x, constants, sequences, keep=False)[:2]

            return None, None, None, *gradients_with_graph(run, (x, *tensors), (gy, g))
        needed = ctx.needs_input_grad[4:]
        found = [torch.zeros_like(v) if need else None for v, need in zip(tensors, needed, strict=True)]
        spans = list(_spans(gy.shape[1], ctx.samples))
        for start, span in zip(reversed(starts.unbind(0)), reversed(spans), strict=True):
            pieces = (*tensors[: ctx.constants], *(v[:, span] for v in tensors[ctx.constants :]))
            leaves = [v.detach().requires_grad_(need) for v, need in zip(pieces, needed, strict=True)]
            state = start.detach().requires_grad_()
            with torch.enable_grad():
                outputs = ctx.block(state, *leaves)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            g, *grads = torch.autograd.grad(outputs, [state, *wanted], (gy[:, span], g))
            rest = iter(grads)
            for number, total in enumerate(found):
                if total is not None:
                    (total if number < ctx.constants else total[:, span]).add_(next(rest))
        return None, None, None, g, *found
