r"""A linear recurrence over a sequence in chunks: matrix products inside chunks, and a state between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .complex import add_rotation_adjoint, from_interleaved, interleaved
from .precision import full_precision_backward
from .transforms import transformed

__all__ = ["Chunk", "chunk_length", "move_on", "scan_chunks", "toeplitz"]

_SHORT, _LONG = 32, 64


def chunk_length(B: int, L: int, *, kept: bool, matrix: bool) -> int:
    """The chunk length for B sequences of length L: one of two, as a system keeps coefficients for each length.

    Long chunks have larger products, and fewer steps from chunk to chunk; these steps cost most if a matrix advances
    the state. Coefficients that are not kept are computed for this scan alone, at a cost that grows with the chunk.

    Arguments:
        B, L: The number of sequences and their length.
        kept: Whether other scans use the same coefficients.
        matrix: Whether a matrix advances the state.
    """
    samples, enough = B * L, 1 << 14 if not kept else 64 if matrix else 1 << 10
    return _LONG if samples >= enough else _SHORT


def toeplitz(kernel: Tensor) -> Tensor:
    """The matrices M[j, k] = kernel[k - j], zero below the diagonal: x M is a row x filtered by a kernel (*, T)."""
    T = kernel.shape[-1]
    return F.pad(kernel, (T - 1, 0)).unfold(-1, T, 1).flip(-2)


class Chunk(NamedTuple):
    """The coefficients of a chunk of T samples, for H features, C channels and a state of N numbers.

    All are in the layout that the products need.
    """

    inside: Tensor
    """c A^(k-j) b, from input j to output k, lower triangular; shape (H, T, C T)."""
    observe: Tensor
    """c A^(k+1), from the state before to output k; shape (H, N, C T)."""
    reach: Tensor
    """A^(T-1-j) b, from input j to the state after; shape (H, T, N)."""
    power: Tensor
    """A^T, from the state before to the one after: a real matrix M of shape (H, N, N) for x M, or a complex diagonal of
    shape (H, 1, N/2) for interleaved states. That is complex128: a rounded pole errs alike in every chunk.
    """

    @classmethod
    def of(cls, response: Tensor, observe: Tensor, reach: Tensor, power: Tensor) -> Chunk:
        """From c A^j b (C, H, T), c A^(j+1) (C, H, T, N), A^(T-1-j) b (H, T, N), and A^T."""
        return cls(
            rearrange(toeplitz(response), "c h j k -> h j (c k)").contiguous(),
            rearrange(observe, "c h t n -> h n (c t)").contiguous(),
            reach.contiguous(),
            power.contiguous(),
        )

    def first(self, m: int) -> Chunk:
        """The coefficients of the first m samples, except the power, which stays that of T samples."""
        T = self.reach.shape[1]
        inside, observe = (x.unflatten(-1, (-1, T))[..., :m].flatten(-2) for x in (self.inside[:, :m], self.observe))
        return self._replace(inside=inside, observe=observe, reach=self.reach[:, T - m :])


def move_on(added: Tensor, state: Tensor, power: Tensor) -> Tensor:
    """The state after a chunk that adds `added`; both (H, B, N)."""
    if not power.is_complex():
        return torch.baddbmm(added, state, power)
    s = from_interleaved(state)
    return added + interleaved((s * power).to(s.dtype))


def _stacked(states: list[Tensor], backwards: bool) -> Tensor:
    """States (H, B, N) in the order of time: (H, n, B, N)."""
    return torch.stack(states[:: -1 if backwards else 1], dim=1)


class _Carry(torch.autograd.Function):
    """The states before each of n chunks and after the last one.

    What the chunks add has shape (H, n, B, N), the first state (H, B, N). The adjoint is the same function, run
    backwards: the gradient of a state is that from its chunk, plus the adjoint of the power times the gradient of the
    next state.
    """

    @staticmethod
    def forward(added: Tensor, state: Tensor, power: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
        before = []
        parts = added.unbind(1)[:: -1 if backwards else 1]
        if not power.is_complex():
            for part in parts:
                before.append(state)
                state = torch.baddbmm(part, state, power)
            return _stacked(before, backwards), state
        # States between chunks stay in the dtype of the power: fewer operations, and less rounding.
        s = from_interleaved(state).to(power.dtype)
        for part in parts:
            before.append(interleaved(s).to(added.dtype))
            s = torch.addcmul(from_interleaved(part).to(s.dtype), s, power)
        return _stacked(before, backwards), interleaved(s).to(state.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, power, ctx.backwards = inputs
        ctx.save_for_backward(output[0], power)

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, g_before: Tensor, g_state: Tensor) -> tuple[Tensor | None, ...]:
        before, power = ctx.saved_tensors
        adjoint = power.conj() if power.is_complex() else power.mT
        g_added, g_first = _Carry.apply(g_before, g_state, adjoint, not ctx.backwards)  # type: ignore[no-untyped-call]
        # The gradient of the matrix in x M, which is the transpose of that of the state matrix.
        g = before.flatten(1, 2).mT @ g_added.flatten(1, 2)
        if power.is_complex():
            g = add_rotation_adjoint(g.mT)[:, None].to(power.dtype)
        return g_added, g_first, g, None


def _chunks(
    u: Tensor, state: Tensor, chunk: Chunk, carry: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """A whole number of chunks: u (B, n T, H) and state (H, B, N) to y (B, n T, C H) and the next state."""
    (B, L, H), T = u.shape, chunk.reach.shape[1]
    n = L // T
    # Views instead of einops, which costs as much as the product of a short block.
    # Contiguous: with a transposed view torch makes a copy and a product for each feature, which is ten times slower.
    flat = u.view(B, n, T, H).permute(3, 1, 0, 2).reshape(H, n * B, T).contiguous()
    before, state = carry(torch.bmm(flat, chunk.reach).view(H, n, B, -1), state)
    # In place, which saves a tensor of the size of the output, but not if vmap batches only the second product.
    add = torch.baddbmm if transformed() else Tensor.baddbmm_
    y = add(torch.bmm(flat, chunk.inside), before.view(H, n * B, -1), chunk.observe)
    return y.view(H, n, B, -1, T).permute(2, 1, 4, 3, 0).reshape(B, L, -1), state


def scan_chunks(
    u: Tensor, state: Tensor, chunk: Chunk, advance: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    r"""Runs a linear recurrence over a sequence of any length.

    Inside a chunk of :math:`T` samples, with :math:`x` the state before it,

    .. math:: y_k = \sum_{j \le k} (c A^{k-j} b)\, u_j + c A^{k+1} x, \qquad
        x \leftarrow A^T x + \sum_{j < T} A^{T-1-j} b\, u_j,

    which are matrix products over all chunks at once, except :math:`A^T x`. The rest at the end is one short chunk.

    Arguments:
        u: The input, with shape :math:`(B, L, H)`.
        state: The state, with shape :math:`(B, H, N)`.
        chunk: The coefficients of :math:`T` samples.
        advance: :math:`A^m x` for states of shape :math:`(H, B, N)` and :math:`m < T`, for the short chunk.

    Returns:
        The output :math:`(B, L, C H)` and the next state :math:`(B, H, N)`.
    """
    L, T = u.shape[1], chunk.reach.shape[1]
    whole = L - L % T

    def carry(added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        # For a short block, copies and the overhead of autograd cost as much as a product.
        if added.shape[1] == 1:
            return state[:, None], move_on(added[:, 0], state, chunk.power)
        run = _Carry.apply if torch.is_grad_enabled() and not transformed() else _Carry.forward
        before, after = run(added, state, chunk.power, False)
        return before, after

    state = state.transpose(0, 1).contiguous()
    parts = []
    if whole:
        y, state = _chunks(u[:, :whole], state, chunk, carry)
        parts.append(y)
    if rest := L - whole:
        short = chunk.first(rest)
        y, state = _chunks(u[:, whole:], state, short, lambda r, x: (x[:, None], advance(x, rest) + r[:, 0]))
        parts.append(y)
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), state.transpose(0, 1)
