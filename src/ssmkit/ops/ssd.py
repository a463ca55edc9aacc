r"""A recurrence with one decay per head and a matrix as its state: the core of Mamba-2 (state-space duality).

.. math:: h_k = e^{a_k} h_{k-1} + x_k B_k^\top, \qquad y_k = h_k C_k

A chunk of T samples takes three matrix products: the output from the inputs of the chunk, by the T × T matrix
:math:`e^{a_{j+1} + \dots + a_i} (C_i \cdot B_j)`; the output from the state before; and the next state. Sums of
log-decays are differences of running sums in float64: in float32 they would lose digits if decays are strong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks

__all__ = ["naive_ssd_scan", "ssd_scan"]

_CHUNK = 64


def naive_ssd_scan(x: Tensor, a: Tensor, B: Tensor, C: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition of :func:`ssd_scan`, sample by sample."""
    x, a, B, C, h = _arguments(x, a, B, C, h)
    heads = x.shape[2] // B.shape[2]
    rows = []
    for k in range(x.shape[1]):
        b, c = (v[:, k].repeat_interleave(heads, dim=1) for v in (B, C))
        h = a[:, k, :, None, None].exp() * h + x[:, k, :, :, None] * b[:, :, None, :]
        rows.append((h @ c[..., None]).squeeze(-1))
    return (torch.stack(rows, dim=1) if rows else x.clone()), h


def ssd_scan(x: Tensor, a: Tensor, B: Tensor, C: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Runs a recurrence with one decay per head, whose state is a matrix.

    .. math:: h_k = e^{a_k} h_{k-1} + x_k B_k^\top, \qquad y_k = h_k C_k, \qquad k = 0, \dots, L - 1

    References:
        | Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality
        | (Dao and Gu, 2024), Section 6
        | https://arxiv.org/abs/2405.21060

    Arguments:
        x: The input, with shape :math:`(b, L, H, P)`.
        a: Log-decays, at most 0, with shape :math:`(b, L, H)`.
        B: The input gains, with shape :math:`(b, L, G, N)`; each of G groups serves :math:`H / G` neighbouring heads.
        C: The output gains, likewise.
        h: The first state :math:`h_{-1}`, with shape :math:`(b, H, P, N)`; by default zero.

    Returns:
        The output, with shape :math:`(b, L, H, P)`, and the last state, with shape :math:`(b, H, P, N)`. Gradients flow
        to all arguments.

    Raises:
        TypeError: If an argument is not a real floating tensor.
        ValueError: If the shapes do not fit.

    Example:
        >>> one = torch.ones(1, 4, 1, 1)
        >>> y, last = ssd_scan(one, torch.full((1, 4, 1), 0.5).log(), one, one)
        >>> y.flatten()
        tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    x, a, B, C, h = _arguments(x, a, B, C, h)
    if not x.shape[1]:
        return x.clone(), h
    rows = []
    for values, decays, b, c in zip(*(v.split(_CHUNK, dim=1) for v in (x, a, B, C)), strict=True):
        y, h = _chunk(values, decays, b, c, h)
        rows.append(y)
    return torch.cat(rows, dim=1), h


def _arguments(x: Tensor, a: Tensor, B: Tensor, C: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
    """The arguments in one dtype, after a check of their shapes."""
    given = _checks.one_dtype("ssd_scan", x=x, a=a, B=B, C=C, **({} if h is None else {"h": h}))
    x, a, B, C = given[:4]
    b, L, H, P = x.shape if x.ndim == 4 else (-1,) * 4
    G, N = B.shape[-2:] if B.ndim == 4 else (0, 0)
    fits = a.shape == (b, L, H) and B.shape == C.shape == (b, L, G, N) and G > 0 and H % G == 0
    if not fits or (h is not None and h.shape != (b, H, P, N)):
        got = ", ".join(str(tuple(value.shape)) for value in given)
        raise ValueError(
            "ssd_scan: `x` must have shape (b, L, H, P), `a` (b, L, H), `B` and `C` (b, L, G, N) with G dividing H, "
            f"and `h` (b, H, P, N), got {got}."
        )
    return x, a, B, C, x.new_zeros(b, H, P, N) if h is None else given[4]


def _chunk(x: Tensor, a: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of a chunk and the next state."""
    T, G, dtype = x.shape[1], B.shape[2], x.dtype
    # Heads before time: (b, G, H / G, ...).
    values = x.permute(0, 2, 1, 3).unflatten(1, (G, -1))
    B, C = (v.transpose(1, 2) for v in (B, C))
    sums = a.double().cumsum(1).transpose(1, 2).unflatten(1, (G, -1))
    between = sums[..., :, None] - sums[..., None, :]
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    decay = between.to(dtype).masked_fill(future, -torch.inf).exp()
    inside = (decay * (C @ B.mT)[:, :, None]) @ values
    since = sums.to(dtype).exp()[..., None]
    state = h.unflatten(1, (G, -1))
    before = since * (C[:, :, None] @ state.mT)
    until = (sums[..., -1:] - sums).to(dtype).exp()[..., None]
    new = sums[..., -1].to(dtype).exp()[..., None, None] * state + (until * values).mT @ B[:, :, None]
    return (inside + before).flatten(1, 2).transpose(1, 2), new.flatten(1, 2)
