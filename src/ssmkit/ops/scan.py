r"""A linear recurrence over a sequence in chunks: matrix products inside a chunk, the state from chunk to chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .complex import from_interleaved, interleaved

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
    """A^(T-1-j) b, what sample j adds to the state at the chunk's end; shape (H, T, N)."""


def _toeplitz(kernel: Tensor) -> Tensor:
    """The matrices M[j, k] = kernel[k - j], zero below the diagonal, that apply a kernel to a row of inputs."""
    T = kernel.shape[-1]
    return F.pad(kernel, (T - 1, 0)).unfold(-1, T, 1).flip(-2)


class _Carry(torch.autograd.Function):
    """The states before each of n chunks and after the last one: s <- A s + r, chunk by chunk.

    What the chunks add, r, has shape (H, n, B, K), the first state (H, B, K). The power A is a real matrix (H, K, K)
    from the right, or a complex diagonal (H, 1, K). It is its own adjoint, run the other way round: the gradient of a
    state is what its chunk makes of it, and A^* times the gradient of the next.
    """

    @staticmethod
    def forward(added: Tensor, state: Tensor, power: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
        before = torch.empty_like(added)
        for i in reversed(range(added.shape[1])) if backwards else range(added.shape[1]):
            before[:, i] = state
            if power.is_complex():
                state = torch.addcmul(added[:, i], state, power)
            else:
                state = torch.baddbmm(added[:, i], state, power)
        return before, state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, power, ctx.backwards = inputs
        ctx.save_for_backward(output[0], power)

    @staticmethod
    def backward(ctx: Any, g_before: Tensor, g_state: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        before, power = ctx.saved_tensors
        adjoint = power.conj() if power.is_complex() else power.mT
        g_added, g_first = _Carry.apply(g_before, g_state, adjoint, not ctx.backwards)  # type: ignore[no-untyped-call]
        if power.is_complex():
            return g_added, g_first, (before.conj() * g_added).sum((1, 2))[:, None], None
        return g_added, g_first, before.flatten(1, 2).mT @ g_added.flatten(1, 2), None


def _chunks(
    u: Tensor, state: Tensor, chunk: Chunk, carry: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """A whole number of chunks: u (B, n T, H) and state (H, B, N) to y (B, n T, C H) and the next state."""
    B, T = u.shape[0], chunk.kernel.shape[-1]
    flat = rearrange(u, "b (n t) h -> h (n b) t", t=T)
    before, state = carry((flat @ chunk.reach).unflatten(1, (-1, B)), state)
    inside = rearrange(_toeplitz(chunk.kernel), "c h j k -> h j (c k)")
    observe = rearrange(chunk.observe, "c h t n -> h n (c t)")
    y = torch.baddbmm(flat @ inside, before.flatten(1, 2), observe)
    return rearrange(y, "h (n b) (c t) -> b (n t) (c h)", b=B, t=T), state


def scan_chunks(
    u: Tensor, state: Tensor, chunk: Chunk, power: Tensor, advance_by: Callable[[Tensor, int], Tensor]
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
        power: :math:`A^T`, as a real matrix :math:`(H, N, N)` that multiplies states from the right, or as a complex
            diagonal :math:`(H, 1, N/2)` for interleaved states.
        advance_by: :math:`A^m x` for states of shape :math:`(H, B, N)`, for the short chunk.

    Returns:
        The output :math:`(B, L, C H)` and the next state :math:`(B, H, N)`.
    """
    L = u.shape[1]
    T = chunk.kernel.shape[-1]
    whole = L - L % T

    def carry(added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if not power.is_complex():
            before, after = _Carry.apply(added, state, power, False)  # type: ignore[no-untyped-call]
            return before, after
        pairs = [from_interleaved(x) for x in (added, state)]
        before, after = _Carry.apply(*pairs, power, False)  # type: ignore[no-untyped-call]
        return interleaved(before), interleaved(after)

    state = rearrange(state, "b h n -> h b n")
    parts = []
    if whole:
        y, state = _chunks(u[:, :whole], state, chunk, carry)
        parts.append(y)
    if rest := L - whole:
        short = Chunk(chunk.kernel[..., :rest], chunk.observe[..., :rest, :], chunk.reach[..., T - rest :, :])
        y, state = _chunks(u[:, whole:], state, short, lambda r, x: (x[:, None], advance_by(x, rest) + r[:, 0]))
        parts.append(y)
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), rearrange(state, "h b n -> b h n")
