r"""The recurrence x_k = a_k x_(k-1) + v_k along a sequence, in chunks, with its own backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .precision import full_precision_backward
from .transforms import transformed

__all__ = ["naive_recurrence", "recurrence"]

_CHUNK = 64
"""Samples per chunk."""
_WIDTH = 1 << 15
"""Numbers per operation: with fewer the call costs more than the arithmetic, and more do not fit in the cache."""
_MIN_CHUNKS = 4
"""With fewer chunks it is faster to go sample by sample, since chunks take two passes over the numbers."""


def naive_recurrence(a: Tensor, v: Tensor, x: Tensor | None = None, *, dim: int = -2) -> tuple[Tensor, Tensor]:
    """The definition of :func:`recurrence`, sample by sample."""
    a, v, x, dim = _arguments(a, v, x, dim)
    a, rows = a.expand(*(a.shape[i] if i != dim else v.shape[i] for i in range(v.ndim))), []
    for a_k, v_k in zip(a.unbind(dim), v.unbind(dim), strict=True):
        x = a_k.to(v.dtype) * x + v_k
        rows.append(x)
    return (torch.stack(rows, dim) if rows else v), x


def recurrence(a: Tensor, v: Tensor, x: Tensor | None = None, *, dim: int = -2) -> tuple[Tensor, Tensor]:
    r"""Runs an elementwise linear recurrence of the first order.

    .. math:: x_k = a_k \circ x_{k-1} + v_k, \qquad k = 0 \dots L - 1

    `a` may be constant or vary over time, be real or complex, and broadcasts with `v`: one pole per feature, a scalar
    per head, or a coefficient for every number. :math:`a_k = 0` restarts the recurrence at sample :math:`k`.

    The sequence is cut into chunks. All chunks of a block run together from zero, sample by sample; their last states
    give the states before all chunks; and the product of the state before a chunk with the running product of `a` is
    added. The gradient of `v` is the same recurrence with :math:`\bar a`, run backwards,
    :math:`g_k = \bar a_{k+1} g_{k+1} + \partial_k`, and that of :math:`a_k` is :math:`\bar x_{k-1} g_k`. The backward
    pass needs only the result. With a constant `a`, powers and the states between chunks are in double precision, so
    that states do not drift if poles are near 1.

    References:
        | Prefix Sums and Their Applications (Blelloch, 1990), Section 1.4 (first-order recurrences)
        | https://www.cs.cmu.edu/~guyb/papers/Ble93.pdf

    Arguments:
        a: Coefficients, real or complex, broadcastable with `v`; constant if its size along time is 1, or if it has no
            time axis because it has fewer axes.
        v: The input, real or complex, with shape :math:`(*, L, N)`.
        x: The state before the first sample, broadcastable with `v` without its time axis; by default zero.
        dim: The axis of time in `v`.

    Returns:
        All states, in the shape to which `v`, `a` and `x` broadcast, and the last one, without the time axis. Their
        precision is that of `v` and `x`, and they are complex if any argument is; the states of an empty sequence are
        empty, and the last one is `x`.

    Raises:
        TypeError: If an argument is not a floating or complex tensor.
        ValueError: If `dim` is not an axis of `v`, or the shapes do not broadcast.

    Example:
        >>> states, last = recurrence(torch.tensor([0.5]), torch.tensor([[8.0], [0.0], [2.0]]))
        >>> states.flatten(), last
        (tensor([8., 4., 4.]), tensor([4.]))
        >>> starts = torch.tensor([[0.5], [0.5], [0.0]])  # the third sample begins a new sequence
        >>> recurrence(starts, torch.tensor([[8.0], [0.0], [2.0]]), torch.tensor([2.0]))[0].flatten()
        tensor([9.0000, 4.5000, 2.0000])
    """
    a, v, x, dim = _arguments(a, v, x, dim)
    if v.shape[dim] == 0:
        return v, x
    # An exported program would write to views that it makes without gradients.
    run = _plain if transformed() or torch.compiler.is_exporting() else _Recurrence.apply
    found: tuple[Tensor, Tensor] = run(a, v, x, dim)
    return found


def _arguments(a: Tensor, v: Tensor, x: Tensor | None, dim: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """The arguments with the axes of the result: a unexpanded, v and x expanded; and the time axis, counted from 0."""
    for name, value in (("a", a), ("v", v), *([] if x is None else [("x", x)])):
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"recurrence: `{name}` must be a floating or complex tensor, got {got}.")
    if not -v.ndim <= dim < v.ndim:
        raise ValueError(f"recurrence: `dim` must be an axis of `v`, got {dim} for shape {tuple(v.shape)}.")
    after = (v.ndim - dim if dim >= 0 else -dim) - 1
    x = v.new_zeros((1,) * after) if x is None else x
    full = x.reshape(*x.shape[: max(0, x.ndim - after)], 1, *x.shape[max(0, x.ndim - after) :])
    try:
        shape = torch.broadcast_shapes(a.shape, v.shape, full.shape)
    except RuntimeError:
        shape = torch.Size()
    L = v.shape[v.ndim - 1 - after]
    if not shape or shape[len(shape) - 1 - after] != L:
        raise ValueError(
            "recurrence: `a`, `v` and `x` (without its time axis) must broadcast to one shape of the length of `v`, "
            f"got {tuple(a.shape)}, {tuple(v.shape)} and {tuple(x.shape)} with {L} samples."
        )
    dim = len(shape) - 1 - after
    dtype = torch.promote_types(v.dtype, x.dtype)
    if a.is_complex() or dtype.is_complex:
        dtype = torch.promote_types(dtype, torch.complex64)
        a = a.to(torch.promote_types(a.dtype, torch.complex64))
    a = a.to(torch.promote_types(a.dtype, dtype)).reshape((1,) * (len(shape) - a.ndim) + a.shape)
    v = v.to(dtype).expand(shape)
    x = full.to(dtype).expand(*shape[:dim], 1, *shape[dim + 1 :]).squeeze(dim)
    return a, v, x, dim


def _plain(a: Tensor, v: Tensor, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The recurrence in n chunks of T samples, both about the root of the length, in 2 T + n operations of torch."""
    L = v.shape[dim]
    T = math.isqrt(L - 1) + 1
    n = -(-L // T)
    # With a constant `a` states in float32 would drift.
    dtype = torch.promote_types(v.dtype, torch.float64) if a.shape[dim] == 1 else v.dtype

    def chunks(z: Tensor) -> tuple[Tensor, ...]:
        z = z.to(dtype).movedim(dim, 0)
        z = z.expand(L, *z.shape[1:])
        padded = torch.cat([z, torch.zeros_like(z[:1]).expand(n * T - L, *z.shape[1:])])
        parts: tuple[Tensor, ...] = padded.unflatten(0, (n, T)).unbind(1)
        return parts

    steps, inputs = chunks(a), chunks(v)
    products, inside, before = [steps[0]], [inputs[0]], [x.to(dtype)]
    for a_j, v_j in zip(steps[1:], inputs[1:], strict=True):
        products.append(a_j * products[-1])
        inside.append(a_j * inside[-1] + v_j)
    for product, end in zip(products[-1].unbind(0), inside[-1].unbind(0), strict=True):
        before.append(product * before[-1] + end)
    states = torch.stack(inside, 1) + torch.stack(products, 1) * torch.stack(before[:-1]).unsqueeze(1)
    states = states.flatten(0, 1)[:L].movedim(0, dim).to(v.dtype)
    return states, states.select(dim, -1)


def _blocks(L: int, width: int) -> Iterator[tuple[int, int, int]]:
    """Blocks (start, n, T) of n chunks of T samples, for `width` numbers per sample; a single chunk takes one pass."""
    n, T = _WIDTH // max(1, width), _CHUNK
    start = 0
    while n >= _MIN_CHUNKS and L - start >= _MIN_CHUNKS * T:
        yield start, min(n, (L - start) // T), T
        start += min(n, (L - start) // T) * T
    if start < L:
        yield start, 1, L - start


def _write_sum(v: Tensor, a: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Writes v + a x to `out`, a view, and returns it."""
    if torch.compiler.is_compiling():
        # torch.compile knows no `out=` that is a strided view.
        return out.copy_(v).addcmul_(a, x)
    return torch.addcmul(v, a, x, out=out)


def _run(a: Tensor, v: Tensor, x: Tensor, dim: int, out: Tensor, backwards: bool = False) -> None:
    """Writes the states to `out`: forwards from the first sample, or backwards from the last with conjugate `a`."""
    constant, order = a.shape[dim] == 1, slice(None, None, -1 if backwards else 1)
    a = a.conj_physical() if backwards and constant else a
    carry, step = x, a.select(dim, 0).to(v.dtype)
    if constant:
        carry = carry.to(torch.promote_types(v.dtype, torch.float64))
        table = a.to(carry.dtype).expand(*a.shape[:dim], _CHUNK, *a.shape[dim + 1 :]).cumprod(dim)
        through = table.to(v.dtype)
        through = through.flip(dim) if backwards else through
    for start, n, T in list(_blocks(v.shape[dim], v.select(dim, 0).numel()))[order]:
        chunks = [z.narrow(dim, start, n * T).unflatten(dim, (n, T)) for z in (v, out)]
        inputs, outputs = (z.unbind(dim + 1)[order] for z in chunks)
        if constant:
            steps = [step.unsqueeze(dim)] * T
        else:
            part = a.narrow(dim, start, n * T).to(v.dtype)
            part = (part.conj_physical() if backwards else part).unflatten(dim, (n, T))
            steps = list(part.unbind(dim + 1)[order])
        if n == 1:
            state = carry.to(v.dtype).unsqueeze(dim)
            for a_j, v_j, x_j in zip(steps, inputs, outputs, strict=True):
                state = _write_sum(v_j, a_j, state, x_j)
            carry = state.squeeze(dim).to(carry.dtype)
            continue
        state = outputs[0].copy_(inputs[0])
        for a_j, v_j, x_j in zip(steps[1:], inputs[1:], outputs[1:], strict=True):
            state = _write_sum(v_j, a_j, state, x_j)
        if constant:
            product, powers = through.unsqueeze(dim), [table.select(dim, -1)] * n
        else:
            product = torch.empty_like(part)
            running, ones = product.unbind(dim + 1)[order], steps[0]
            running[0].copy_(ones)
            for j in range(1, T):
                running[j].copy_(running[j - 1]).mul_(steps[j])
            powers = list(running[-1].unbind(dim)[order])
        before = torch.empty_like(state)
        for end, power, place in zip(
            state.to(carry.dtype).unbind(dim)[order], powers, before.unbind(dim)[order], strict=True
        ):
            place.copy_(carry)
            carry = torch.addcmul(end, power, carry)
        chunks[1].addcmul_(product, before.unsqueeze(dim + 1))


def _coefficient_gradient(a: Tensor, x: Tensor, states: Tensor, g: Tensor, dim: int) -> Tensor:
    """The gradient of the coefficients, conj(x_(k-1)) g_k summed to their shape, in blocks of samples."""
    L, constant = g.shape[dim], a.shape[dim] == 1
    found = torch.zeros_like(a)
    rows = max(1, _WIDTH // max(1, x.numel()))
    spans = [(0, 1), *((start, min(rows, L - start)) for start in range(1, L, rows))]
    for start, count in spans:
        before = states.narrow(dim, start - 1, count) if start else x.unsqueeze(dim)
        place = found if constant else found.narrow(dim, start, count)
        place += (before.conj_physical() * g.narrow(dim, start, count)).sum_to_size(place.shape)
    return found


class _Recurrence(torch.autograd.Function):
    """Coefficients, inputs and first state to all states and the last one; the adjoint is the same loop."""

    @staticmethod
    def forward(a: Tensor, v: Tensor, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        states = torch.empty_like(v, memory_format=torch.contiguous_format)
        _run(a, v, x, dim, states)
        return states, states.select(dim, -1).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
        a, _, x, ctx.dim = inputs
        ctx.save_for_backward(a, x, output[0])
        ctx.set_materialize_grads(False)

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, g_states: Tensor | None, g_last: Tensor | None) -> tuple[Tensor | None, ...]:
        a, x, states = ctx.saved_tensors
        dim, L = ctx.dim, states.shape[ctx.dim]
        g_states = torch.zeros_like(states[..., :1]).expand_as(states) if g_states is None else g_states
        # The last sample is separate: the gradient of the last state is added to it.
        first = g_states.narrow(dim, L - 1, 1)
        first = first if g_last is None else first + g_last.unsqueeze(dim)
        later = a if a.shape[dim] == 1 else a.narrow(dim, 1, L - 1)
        a_0 = a.select(dim, 0).conj_physical().to(states.dtype)
        if torch.is_grad_enabled():
            rest = g_states.narrow(dim, 0, L - 1).flip(dim)
            g, _ = recurrence(later.conj_physical().flip(dim), rest, first.squeeze(dim), dim=dim)
            g = torch.cat([g.flip(dim), first], dim)
            before = torch.cat([x.unsqueeze(dim), states.narrow(dim, 0, L - 1)], dim)
            return (before.conj_physical() * g).sum_to_size(a.shape).to(a.dtype), g, a_0 * g.select(dim, 0), None
        g = torch.empty_like(states)
        g.narrow(dim, L - 1, 1).copy_(first)
        if L > 1:
            _run(later, g_states.narrow(dim, 0, L - 1), first.squeeze(dim), dim, g.narrow(dim, 0, L - 1), True)
        return (
            _coefficient_gradient(a, x, states, g, dim) if ctx.needs_input_grad[0] else None,
            g,
            a_0 * g.select(dim, 0),
            None,
        )
