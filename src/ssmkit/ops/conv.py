r"""Causal convolution along time by FFT, in blocks that fit in the cache, with memory for twice the input."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks
from .precision import full_precision_backward
from .transforms import transformed

__all__ = ["causal_conv", "naive_causal_conv", "two_sided_conv"]

_BLOCK = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Samples of a block's FFT buffers, for each kind of device: the spectra of a block should fit in the CPU's cache."""
_FEATURES = 32
"""The fewest features of a block: with fewer, it would read less than a cache line of each (batch, time) row."""


def naive_causal_conv(u: Tensor, k: Tensor) -> Tensor:
    """The definition of :func:`causal_conv`, lag by lag."""
    out = torch.zeros(*u.shape[:-1], k.shape[0], u.shape[-1], dtype=u.dtype, device=u.device)
    for lag in range(min(k.shape[-1], u.shape[-2])):
        shifted = F.pad(u, (0, 0, lag, 0))[..., : u.shape[-2], :]
        out = out + shifted[..., None, :] * k[:, :, lag]
    return out.flatten(-2)


@lru_cache(maxsize=1024)
def _fft_length(least: int) -> int:
    """The smallest 2^a 3^b 5^c that is not below `least`: lengths with large prime factors are several times slower."""
    best = 1 << max(least - 1, 0).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = three << max(-(-least // three) - 1, 0).bit_length()
            best = min(best, two)
            three *= 3
        five *= 5
    return best


def _blocks(u: Tensor, n: int) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of features, and within each, blocks of the batch."""
    batch, _, H = u.shape
    budget = max(1, _BLOCK.get(u.device.type, _BLOCK["cuda"]) // n)
    features = min(H, max(_FEATURES, budget // max(1, batch)))
    rows = max(1, budget // features)
    for h in range(0, H, features):
        yield slice(h, h + features), [slice(b, b + rows) for b in range(0, batch, rows)]


def _by_feature(x: Tensor) -> Tensor:
    """(rows, L, F) to (rows, F, L); a single row with copies, since torch transposes whole matrices fast, in tiles."""
    return x[0].contiguous().T.contiguous()[None] if len(x) == 1 else x.mT


def _sum(x: Tensor, dim: int) -> Tensor:
    """The sum along an axis; for an axis of length one, torch's own sum costs two passes."""
    return x.squeeze(dim) if x.shape[dim] == 1 else x.sum(dim)


def _plain(u: Tensor, k: Tensor, n: int) -> Tensor:
    """What :class:`_Conv` computes, with all spectra in memory."""
    spectra = torch.fft.rfft(u.mT, n=n)[:, None] * torch.fft.rfft(k, n=n)
    y: Tensor = torch.fft.irfft(spectra, n=n)[..., : u.shape[1]].movedim(-1, 1)
    return y


class _Conv(torch.autograd.Function):
    """The first L samples of the circular convolution over n points of u (batch, L, H) with k (C, H, m).

    The backward pass keeps only the arguments: it computes the spectra again, block by block.
    """

    @staticmethod
    def forward(u: Tensor, k: Tensor, n: int) -> Tensor:
        L, C = u.shape[1], k.shape[0]
        y = u.new_empty(u.shape[0], L, C, u.shape[2])
        for h, batches in _blocks(u, n):
            kf = torch.fft.rfft(k[:, h], n=n)
            for b in batches:
                uf = torch.fft.rfft(_by_feature(u[b, :, h]), n=n)[:, None]
                y[b, :, :, h] = torch.fft.irfft(uf * kf, n=n)[..., :L].movedim(-1, 1)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        u, k, ctx.n = inputs
        ctx.save_for_backward(u, k)

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # y = k ⋆ u, so ∂u and ∂k are correlations of the gradient with k and u: conjugate spectra.
        u, k = ctx.saved_tensors
        n, (need_u, need_k, _) = ctx.n, ctx.needs_input_grad
        du = torch.empty_like(u) if need_u else None
        dk = torch.empty_like(k) if need_k else None
        for h, batches in _blocks(u, n):
            kf = torch.fft.rfft(k[:, h], n=n).conj() if need_u else None
            total: Tensor | None = None
            for b in batches:
                gf = torch.fft.rfft(grad[b, :, :, h].movedim(1, -1), n=n)
                if need_k:
                    uf = torch.fft.rfft(_by_feature(u[b, :, h]), n=n)[:, None]
                    part = _sum(gf * uf.conj(), 0)
                    total = part if total is None else total + part
                if du is not None:
                    back = _sum(gf * kf, 1)
                    du[b, :, h] = torch.fft.irfft(back, n=n)[..., : u.shape[1]].mT
            if dk is not None and total is not None:
                dk[:, h] = torch.fft.irfft(total, n=n)[..., : k.shape[-1]]
        return du, dk, None


def _conv(u: Tensor, k: Tensor, n: int) -> Tensor:
    dtype = torch.promote_types(u.dtype, k.dtype)
    batch = u.shape[:-2]
    conv = _plain if transformed() else _Conv.apply
    y: Tensor = conv(u.reshape(-1, *u.shape[-2:]).to(dtype), k.to(dtype), n)
    return y.flatten(-2).reshape(*batch, u.shape[-2], -1)


def _check(where: str, u: Tensor, k: Tensor) -> None:
    _checks.floating(where, "k", k)
    if k.ndim != 3:
        raise ValueError(f"{where}: the kernel must have shape (channels, H, length), got {tuple(k.shape)}.")
    _checks.sequence(where, "u", u, k.shape[1])


def causal_conv(u: Tensor, k: Tensor) -> Tensor:
    r"""Causal convolution of every feature with its own kernels.

    .. math:: y_{l,ch} = \sum_{j \le l} k_{ch,\,l-j}\, u_{j,h}

    By real FFTs of a smooth length of at least :math:`2L - 1`, over blocks of features that fit in the cache. The
    backward pass computes the spectra again, so that nothing of length :math:`2L` is kept.

    References:
        | Efficiently Modeling Long Sequences with Structured State Spaces (Gu et al., 2022), Section 2.4
        | https://arxiv.org/abs/2111.00396

    Arguments:
        u: The input, real, with shape :math:`(*, L, H)`.
        k: The kernels, real, with shape :math:`(C, H, M)`; values beyond :math:`L` have no effect, and a kernel
            shorter than :math:`L` is padded with zeros.

    Returns:
        The output, with shape :math:`(*, L, C H)`, channel outside and feature inside.

    Raises:
        TypeError: If an argument is not a real floating tensor.
        ValueError: If shapes do not fit.

    Example:
        >>> u, k = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[[1.0, 0.5]]])
        >>> causal_conv(u, k).flatten()
        tensor([1.0000, 2.5000, 4.0000])
    """
    _check("causal_conv", u, k)
    L = int(u.shape[-2])  # one program per length, if torch has a symbol for it
    k = k[..., :L]
    if u.numel() == 0 or k.numel() == 0:
        return _zeros(u, k)
    return _conv(u, k, _fft_length(L + k.shape[-1] - 1))


def two_sided_conv(u: Tensor, k: Tensor, k_reverse: Tensor) -> Tensor:
    r"""Convolution of every feature with a kernel over its past and another over its future.

    .. math:: y_{l,ch} = \sum_{j \le l} k_{ch,\,l-j}\, u_{j,h} + \sum_{j > l} k'_{ch,\,j-l-1}\, u_{j,h}

    References:
        | It's Raw! Audio Generation with State-Space Models (Goel et al., 2022), Section 4.2 (bidirectional S4)
        | https://arxiv.org/abs/2202.09729

    Arguments:
        u: The input, real, with shape :math:`(*, L, H)`.
        k: The kernels of the present and the past, real, with shape :math:`(C, H, L)`.
        k_reverse: The kernels :math:`k'` of the future, real, with shape :math:`(C, H, L)`.

    Returns:
        The output, with shape :math:`(*, L, C H)`, channel outside and feature inside.

    Raises:
        TypeError: If an argument is not a real floating tensor.
        ValueError: If shapes do not fit.

    Example:
        >>> u, k = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[[1.0, 0.0, 0.0]]])
        >>> two_sided_conv(u, k, k).flatten()
        tensor([3., 5., 3.])
    """
    _check("two_sided_conv", u, k)
    _checks.floating("two_sided_conv", "k_reverse", k_reverse)
    L = int(u.shape[-2])  # one program per length, if torch has a symbol for it
    _checks.shape("two_sided_conv", "k", k, (*k.shape[:2], L), "one value per sample of `u`")
    _checks.shape("two_sided_conv", "k_reverse", k_reverse, k.shape, "that of `k`")
    if u.numel() == 0:
        return _zeros(u, k)
    # In a circular convolution over n points the lag -(m + 1) is at n - 1 - m.
    n = _fft_length(2 * L - 1)
    circle = torch.cat([F.pad(k, (0, n - 2 * L + 1)), k_reverse[..., : L - 1].flip(-1)], dim=-1)
    return _conv(u, circle, n)


def _zeros(u: Tensor, k: Tensor) -> Tensor:
    """Zeros in the shape of the output, connected to the graphs of both arguments."""
    zero = u[..., :0, :].sum() + k[..., :0].sum()
    return zero + u.new_zeros(*u.shape[:-1], k.shape[0] * k.shape[1])
