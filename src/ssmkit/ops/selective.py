r"""A diagonal recurrence whose coefficients come from the input: the core of selective state-space layers (S6).

.. math:: h_k = e^{\Delta_k A} \circ h_{k-1} + \Delta_k u_k B_k, \qquad y_k = \sum_n C_{k,n} h_{k,n}

for every feature with N states. The states of a sequence are never in memory all at once: they are computed in blocks
of a few samples and rows of the batch, the outputs of a block are computed while its states are in the cache, and the
backward pass computes the states of a block again from its first one. So memory grows with batch, length and width.

The recurrence runs sample by sample inside a block, for all rows, features and states at once. It forms no product of
decays over several samples, so that strong decays lose no digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .precision import full_precision_backward
from .recurrence import recurrence
from .transforms import gradients_with_graph, transformed

__all__ = ["naive_selective_scan", "selective_scan"]

_BLOCK = 1 << 19
"""Numbers in the states of a block: a few such tensors fit in the cache."""
_SAMPLES = 16
"""The fewest samples of a block: one state is kept per block, which is at most N / 16 numbers per output."""


def naive_selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`selective_scan`, sample by sample."""
    u, dt, A, B, C, x = _arguments(u, dt, A, B, C, x)
    _, L, E = u.shape
    rows = []
    for k in range(L):
        b, c = (v if v.ndim == 2 else v[:, k].repeat_interleave(E // v.shape[2], dim=1) for v in (B, C))
        x = (dt[:, k, :, None] * A).exp() * x + (dt[:, k] * u[:, k])[..., None] * b
        rows.append((c * x).sum(-1))
    return (torch.stack(rows, dim=1) if rows else u.clone()), x


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Runs a diagonal recurrence whose step sizes and gains vary over time.

    .. math::
        h_k = e^{\Delta_k A} \circ h_{k-1} + (\Delta_k u_k) B_k, \qquad y_k = \sum_n C_{k,n} h_{k,n},
        \qquad k = 0, \dots, L - 1

    References:
        | Mamba: Linear-Time Sequence Modeling with Selective State Spaces (Gu and Dao, 2023), Section 3 and Algorithm 2
        | https://arxiv.org/abs/2312.00752

    Arguments:
        u: The input, with shape :math:`(b, L, E)`.
        dt: The step sizes :math:`\Delta`, in the time unit of `A`, with shape :math:`(b, L, E)`.
        A: The poles, real, in 1 / time, with shape :math:`(E, N)`.
        B: The input gains: with shape :math:`(b, L, G, N)`, where each of G groups of :math:`E / G` neighbouring
            features has its own; or :math:`(E, N)`, if they are constant.
        C: The output gains, likewise.
        x: The first state :math:`h_{-1}`, with shape :math:`(b, E, N)`; by default zero.

    Returns:
        The output, with shape :math:`(b, L, E)`, and the last state, with shape :math:`(b, E, N)`. Gradients flow to
        all arguments.

    Raises:
        TypeError: If an argument is not a real floating tensor.
        ValueError: If the shapes do not fit.

    Example:
        >>> one = torch.ones(1, 4, 1)
        >>> y, last = selective_scan(one, one, torch.log(torch.tensor([[0.5]])), torch.ones(1, 1), torch.ones(1, 1))
        >>> y.flatten()
        tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    u, dt, A, B, C, x = _arguments(u, dt, A, B, C, x)
    if not u.numel():
        return u.clone(), x
    run = _plain if transformed() else _Selective.apply
    found: tuple[Tensor, Tensor] = run(u, dt, A, B, C, x)
    return found


def _arguments(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, x: Tensor | None) -> tuple[Tensor, ...]:
    """The arguments in one dtype, after a check of their shapes."""
    given = _checks.one_dtype("selective_scan", u=u, dt=dt, A=A, B=B, C=C, **({} if x is None else {"x": x}))
    u, dt, A, B, C = given[:5]
    b, L, E = u.shape if u.ndim == 3 else (-1, -1, -1)
    N = A.shape[-1] if A.ndim else -1
    fits = u.shape == dt.shape == (b, L, E) and A.shape == (E, N) and (x is None or x.shape == (b, E, N))
    for gain in (B, C):
        groups = gain.shape[2] if gain.ndim == 4 else 1
        fits = fits and gain.shape in ((E, N), (b, L, groups, N)) and groups > 0 and E % groups == 0
    if not fits:
        got = ", ".join(str(tuple(value.shape)) for value in given)
        raise ValueError(
            "selective_scan: `u` and `dt` must have shape (b, L, E), `A` (E, N), `B` and `C` (b, L, G, N) with G "
            f"dividing E, or (E, N), and `x` (b, E, N), got {got}."
        )
    return u, dt, A, B, C, u.new_zeros(b, E, N) if x is None else given[5]


def _plain(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition with the states of the whole sequence in memory."""
    B, C = (v if v.ndim == 2 else v.repeat_interleave(u.shape[2] // v.shape[2], dim=2) for v in (B, C))
    states, last = recurrence((dt[..., None] * A).exp(), (dt * u)[..., None] * B, x, dim=1)
    return (C * states).sum(-1), last


class _Blocks:
    """The arguments with time first and features last, with an axis of G groups, in blocks of samples.

    Features are last, so that products broadcast over N in long rows. G is the larger of the numbers of groups of B
    and C.
    """

    def __init__(self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
        b, self.L, E = u.shape
        self.G = max(v.shape[2] if v.ndim == 4 else 1 for v in (B, C))
        self.E, self.N, self.b = E, A.shape[1], b
        self.u, self.dt = self.rows(u), self.rows(dt)
        self.A = self.columns(A)
        self.B, self.C = self.gains(B), self.gains(C)
        self.T = max(_SAMPLES, _BLOCK // max(1, b * E * self.N))

    def rows(self, v: Tensor) -> Tensor:
        """(b, L, E) to (L, b, G, 1, E / G)."""
        out: Tensor = v.transpose(0, 1).unflatten(-1, (self.G, 1, -1))
        return out

    def columns(self, v: Tensor) -> Tensor:
        """(*, E, N) to (*, G, N, E / G), with features contiguous."""
        out: Tensor = v.unflatten(-2, (self.G, -1)).mT.contiguous()
        return out

    def gains(self, v: Tensor) -> Tensor:
        """Gains as (L or 1, b or 1, G, N, E / G or 1)."""
        if v.ndim == 2:
            return self.columns(v)[None, None]
        v = v.transpose(0, 1)
        return (v if v.shape[2] == self.G else v.expand(-1, -1, self.G, -1))[..., None]

    def spans(self) -> Iterator[slice]:
        """The samples of each block."""
        for start in range(0, self.L, self.T):
            yield slice(start, min(self.L, start + self.T))

    def at(self, gains: Tensor, span: slice) -> Tensor:
        """Gains of a block."""
        return gains if len(gains) == 1 else gains[span]

    def decays_and_states(self, span: slice, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """exp(Δ A), and the states, both (T, b, G, N, E / G), and Δ u."""
        dt = self.dt[span]
        decay = (dt * self.A).exp_()
        flow = dt * self.u[span]
        states = flow * self.at(self.B, span)
        for k in range(len(states)):
            x = states[k].addcmul_(decay[k], x)
        return decay, states, flow


def _sum_over_states(gains: Tensor, states: Tensor) -> Tensor:
    """The sum over N of gains times states: (T, b, G, 1, E / G)."""
    if gains.shape[-1] == 1 and gains.shape[:3] == states.shape[:3]:
        return gains.mT @ states
    return (gains * states).sum(-2, keepdim=True)


def _gain_gradient(gains: Tensor, rows: Tensor, states: Tensor) -> Tensor:
    """The gradient of gains, from rows (T, b, G, 1, E / G) and states: summed to the shape of the gains."""
    if gains.shape[-1] == 1:
        return states @ rows.mT
    return (rows * states).sum((0, 1), keepdim=True)


def _batch_slices(u: Tensor, A: Tensor) -> Iterator[slice]:
    """Slices of the batch such that a block of the fewest samples has the right size."""
    rows = max(1, _BLOCK // (_SAMPLES * A.numel()))
    for start in range(0, len(u), rows):
        yield slice(start, start + rows)


def _select_rows(rows: slice, *values: Tensor) -> list[Tensor]:
    """Some rows of each tensor; constant gains have no rows and stay whole."""
    return [value if value.ndim == 2 else value[rows] for value in values]


class _Selective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y, last, starts = torch.empty_like(u), torch.empty_like(x), []
        for rows in _batch_slices(u, A):
            blocks = _Blocks(*_select_rows(rows, u, dt, A, B, C))
            out, state = blocks.rows(y[rows]), blocks.columns(x[rows])
            for span in blocks.spans():
                starts.append(state)
                _, states, _ = blocks.decays_and_states(span, state)
                out[span] = _sum_over_states(blocks.at(blocks.C, span), states)
                # A copy: a view would keep the states of the whole block.
                state = states[-1].clone()
            last[rows] = state.mT.flatten(1, 2)
        ctx.save_for_backward(u, dt, A, B, C, x, *starts)
        return y, last

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, gy: Tensor, glast: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, x, *starts = ctx.saved_tensors
        if torch.is_grad_enabled():
            return gradients_with_graph(_plain, (u, dt, A, B, C, x), (gy, glast))
        gu, gdt, gx = torch.empty_like(u), torch.empty_like(dt), torch.empty_like(glast)
        gA, gB, gC = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
        kept = iter(starts)
        for rows in _batch_slices(u, A):
            blocks = _Blocks(*_select_rows(rows, u, dt, A, B, C))
            spans = list(blocks.spans())
            firsts = [next(kept) for _ in spans]
            found = _backward(blocks, spans, firsts, blocks.rows(gy[rows]), blocks.columns(glast[rows]))
            back, poles, into, out, g = found
            for target, rows_of in zip((gu, gdt), back, strict=True):
                target[rows] = rows_of.flatten(2).transpose(0, 1)
            gA += poles.mT.flatten(0, 1)
            for target, grad in ((gB, into), (gC, out)):
                if target.ndim == 2:
                    target += grad[0, 0].mT.flatten(0, 1)
                else:
                    grad = grad[..., 0].transpose(0, 1)
                    target[rows] = grad if target.shape[2] == blocks.G else grad.sum(2, keepdim=True)
            gx[rows] = g.mT.flatten(1, 2)
        return gu, gdt, gA, gB, gC, gx


def _backward(
    blocks: _Blocks, spans: list[slice], starts: list[Tensor], gy: Tensor, g: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (u, Δ), A, B, C and the first state, from those of the outputs and of the last state."""
    gu, gdt = torch.empty_like(blocks.u), torch.empty_like(blocks.dt)
    gA, gB, gC = torch.zeros_like(blocks.A), torch.zeros_like(blocks.B), torch.zeros_like(blocks.C)
    for span, start in zip(reversed(spans), reversed(starts), strict=True):
        decay, states, flow = blocks.decays_and_states(span, start)
        b, c = blocks.at(blocks.B, span), blocks.at(blocks.C, span)
        blocks.at(gC, span).add_(_gain_gradient(c, gy[span], states))
        # The adjoint of the recurrence is the recurrence run backwards.
        G = gy[span] * c
        G[-1] += g
        for k in range(len(G) - 2, -1, -1):
            G[k].addcmul_(decay[k + 1], G[k + 1])
        g = decay[0] * G[0]
        blocks.at(gB, span).add_(_gain_gradient(b, flow, G))
        gflow = _sum_over_states(b, G)
        # From here on `decay` is the gradient of the exponent Δ A, which is G exp(Δ A) h_(k-1).
        decay[0] *= start
        decay[1:] *= states[:-1]
        decay *= G
        gu[span] = gflow * blocks.dt[span]
        gdt[span] = gflow * blocks.u[span] + (decay * blocks.A).sum(-2, keepdim=True)
        gA += decay.mul_(blocks.dt[span]).sum((0, 1))
    return (gu, gdt), gA, gB, gC, g
