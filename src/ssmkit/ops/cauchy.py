r"""Cauchy products, which are sums of simple poles: at any nodes in bounded memory, and fast at the roots of unity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .precision import full_precision_backward
from .transforms import transformed
from .vandermonde import check_sums, vandermonde

__all__ = ["cauchy", "cauchy_roots_of_unity", "naive_cauchy"]

_BLOCK = 1 << 21
"""The number of terms in memory at a time: 16 MiB in complex64, which is little memory and still fast."""


def naive_cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """The definition of :func:`cauchy`, with all :math:`N L` terms in memory."""
    return (v[..., None] / (z[..., None, :] - w[..., None])).sum(-2)


class _Cauchy(torch.autograd.Function):
    """Blocks of nodes, one after another; the backward pass computes the terms again instead of keeping them."""

    @staticmethod
    def forward(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return torch.cat([naive_cauchy(v, part, w) for part in _blocks(z, v)], dim=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # y_l = Σ v_n / (z_l - w_n):  ∂y/∂v = 1/(z - w),  ∂y/∂w = v/(z - w)²,  ∂y/∂z = -Σ v/(z - w)².
        # torch's gradient of a holomorphic function is the conjugate of its derivative.
        v, z, w = ctx.saved_tensors
        dv, dw = torch.zeros_like(v), torch.zeros_like(w)
        dz = []
        start = 0
        for part in _blocks(z, v):
            g = grad[..., None, start : start + part.shape[-1]]
            start += part.shape[-1]
            inverse = (1 / (part[..., None, :] - w[..., None])).conj()
            dv = dv + (g * inverse).sum(-1)
            square = g * inverse * inverse * v.conj()[..., None]
            dw = dw + square.sum(-1)
            dz.append(-square.sum(-2))
        return dv, torch.cat(dz, dim=-1), dw


def _blocks(z: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    blocks: tuple[Tensor, ...] = z.split(max(1, _BLOCK // max(1, v.numel())), dim=-1)
    return blocks


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    r"""Sums of simple poles at any nodes.

    .. math:: y_l = \sum_n \frac{v_n}{z_l - w_n}

    Memory is bounded: :math:`O(N + L)` plus one block of terms, in both passes. The error is relative to
    :math:`\sum_n |v_n / (z_l - w_n)|`, as terms may cancel.

    References:
        | Efficiently Modeling Long Sequences with Structured State Spaces (Gu et al., 2022), Appendix C.3
        | https://arxiv.org/abs/2111.00396

    Arguments:
        v: Weights, complex, with shape :math:`(*, N)`.
        z: Nodes, complex, with shape :math:`(*, L)`; the leading axes of all three broadcast.
        w: Poles, complex, with shape :math:`(*, N)`, none of them equal to a node.

    Returns:
        The sums :math:`y`, complex, with shape :math:`(*, L)`.

    Raises:
        TypeError: If an argument is real.
        ValueError: If `v` and `w` differ in their last axis.

    Example:
        >>> v, w = torch.tensor([1.0 + 0j]), torch.tensor([0.5 + 0j])
        >>> cauchy(v, torch.tensor([1.0 + 0j, -1.0]), w).real
        tensor([ 2.0000, -0.6667])
    """
    for name, value in (("v", v), ("z", z), ("w", w)):
        if not value.is_complex():
            raise TypeError(f"cauchy: `{name}` must be a complex tensor, got {value.dtype}.")
    if v.shape[-1:] != w.shape[-1:]:
        raise ValueError(
            f"cauchy: `v` and `w` must agree in their last axis, got {tuple(v.shape)} and {tuple(w.shape)}."
        )
    batch = torch.broadcast_shapes(v.shape[:-1], z.shape[:-1], w.shape[:-1])
    v, w, z = (x.expand(*batch, x.shape[-1]) for x in (v, w, z))
    dtype = torch.promote_types(torch.promote_types(v.dtype, z.dtype), w.dtype)
    sums = naive_cauchy if transformed() else _Cauchy.apply
    result: Tensor = sums(v.to(dtype), z.to(dtype), w.to(dtype))
    return result


def cauchy_roots_of_unity(v: Tensor, w: Tensor, L: int) -> Tensor:
    r"""Sums of simple poles at the :math:`L`-th roots of unity, as a Vandermonde product and one FFT.

    .. math:: y_l = \sum_n \frac{v_n}{z_l - w_n}
        = z_l^{-1} \sum_{j < L} \left( \sum_n \frac{v_n}{1 - w_n^L} w_n^j \right) z_l^{-j},
        \qquad z_l = e^{2 \pi i l / L},

    because :math:`z^{-L} = 1` turns the geometric series into a finite sum. The :math:`N L` divisions become
    :math:`N L` multiplications in a matrix product.

    References:
        | Efficiently Modeling Long Sequences with Structured State Spaces (Gu et al., 2022), Appendix C.3
        | https://arxiv.org/abs/2111.00396 (the sums; the factorisation is derived above)

    Arguments:
        v: Weights, complex, with shape :math:`(*, N)`.
        w: Poles, complex, with shape :math:`(*, N)`, inside the unit circle: :math:`|w| \le 1` and :math:`w^L \ne 1`.
        L: The number of nodes.

    Returns:
        The sums :math:`y` at :math:`z_0 \dots z_{L-1}`, complex, with shape :math:`(*, L)`.

    Raises:
        TypeError: If an argument is real.
        ValueError: If the last axes differ or `L` is negative.

    Example:
        >>> v, w = torch.tensor([1.0 + 0j]), torch.tensor([0.5 + 0j])
        >>> cauchy_roots_of_unity(v, w, 2).real
        tensor([ 2.0000, -0.6667])
    """
    check_sums("cauchy_roots_of_unity", v, "w", w, L)
    result = torch.promote_types(v.dtype, w.dtype)
    if L == 0:
        return vandermonde(v, w, 0)
    w = w.to(torch.complex128)
    series = vandermonde((v / (1 - w**L)), w, L).to(result)
    phase = torch.arange(L, device=w.device, dtype=torch.float64) * (-2 * torch.pi / L)
    y: Tensor = torch.fft.fft(series) * torch.polar(torch.ones_like(phase), phase).to(result)
    return y
