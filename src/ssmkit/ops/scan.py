r"""A linear recurrence over a sequence in chunks: matrix products inside a chunk, the state from chunk to chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

__all__ = ["CHUNK", "Chunk", "scan_chunks"]

CHUNK = 128
"""Samples per chunk, a power of two: the Toeplitz products grow with it, the steps between chunks shrink."""


class Chunk(NamedTuple):
    """What a chunk of T samples does to input and state, for H features, C channels and a state of N numbers."""

    kernel: Tensor
    """c A^j b, the response inside the chunk; shape (C, H, T)."""
    observe: Tensor
    """c A^(j+1), what the state at the chunk's start adds to sample j; shape (C, H, T, N)."""
    reach: Tensor
    """A^(T-1-j) b, what sample j adds to the state at the chunk's end; shape (H or 1, T, N)."""


def _toeplitz(kernel: Tensor) -> Tensor:
    """The matrices M[j, k] = kernel[k - j], zero below the diagonal, that apply a kernel to a row of inputs."""
    T = kernel.shape[-1]
    return F.pad(kernel, (T - 1, 0)).unfold(-1, T, 1).flip(-2)


def _chunks_forward(
    u: Tensor, state: Tensor, chunk: Chunk, advance: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """A whole number of chunks: u (H, n, B, T) and state (H, B, N) to y (C, H, n, B, T) and the next state."""
    H, n, B, T = u.shape
    flat = u.reshape(H, n * B, T)
    inputs = (flat @ chunk.reach).view(H, n, B, -1)
    states = []
    # unbind and stack, not indexing: the backward of an index fills the whole array at each chunk.
    for reached in inputs.unbind(1):
        states.append(state)
        state = advance(state) + reached
    starts = torch.stack(states, dim=1).flatten(1, 2)
    y = flat @ _toeplitz(chunk.kernel) + starts @ chunk.observe.mT
    return y.view(-1, H, n, B, T), state


def scan_chunks(
    u: Tensor,
    state: Tensor,
    chunk: Chunk,
    advance: Callable[[Tensor], Tensor],
    advance_by: Callable[[Tensor, int], Tensor],
) -> tuple[Tensor, Tensor]:
    r"""Runs a linear recurrence over a sequence of any length.

    Inside a chunk of :math:`T` samples, with :math:`x` the state before it,

    .. math:: y_k = \sum_{j \le k} (c A^{k-j} b)\, u_j + c A^{k+1} x, \qquad
        x \leftarrow A^T x + \sum_{j < T} A^{T-1-j} b\, u_j,

    which are matrix products over all chunks at once, but for :math:`A^T x`. What is left over at the end is one
    short chunk.

    Arguments:
        u: The input, with shape :math:`(B, L, H)`.
        state: The state, with shape :math:`(B, H, N)`.
        chunk: The chunk's response, of length :math:`T`; :math:`T \le L` unless :math:`L < T`.
        advance: :math:`A^T x` for states of shape :math:`(H, B, N)`.
        advance_by: :math:`A^m x` likewise, for the short chunk.

    Returns:
        The output :math:`(B, L, C H)` and the next state :math:`(B, H, N)`.
    """
    L = u.shape[1]
    T = chunk.kernel.shape[-1]
    whole = L - L % T
    state = rearrange(state, "b h n -> h b n")
    parts = []
    if whole:
        chunks = rearrange(u[:, :whole], "b (n t) h -> h n b t", t=T)
        y, state = _chunks_forward(chunks, state, chunk, advance)
        parts.append(rearrange(y, "c h n b t -> b (n t) (c h)"))
    if rest := L - whole:
        short = Chunk(chunk.kernel[..., :rest], chunk.observe[..., :rest, :], chunk.reach[..., T - rest :, :])
        y, state = _chunks_forward(
            rearrange(u[:, whole:], "b t h -> h 1 b t"), state, short, lambda x: advance_by(x, rest)
        )
        parts.append(rearrange(y, "c h 1 b t -> b t (c h)"))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), rearrange(state, "h b n -> b h n")
