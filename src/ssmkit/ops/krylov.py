r"""Krylov products: the impulse response of a dense system."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks
from .precision import full_precision_backward
from .transforms import gradients_with_graph, transformed
from .vandermonde import without_denormals

__all__ = ["krylov", "krylov_columns", "krylov_rows", "naive_krylov", "squares"]

_BLOCK = 1 << 26
"""The most numbers in the factors of a block of systems: half a gigabyte in float64."""
_READ_ROWS = 8
"""The number of rows whose product with a matrix costs as much as reading that matrix."""


def naive_krylov(A: Tensor, b: Tensor, c: Tensor, L: int) -> Tensor:
    """The definition of :func:`krylov`: one product with `A` after another."""
    out = []
    for _ in range(L):
        out.append((c @ b[..., None])[..., 0])
        b = (A @ b[..., None])[..., 0]
    return torch.stack(out, dim=-1) if out else c[..., :0] + b[..., None, :0]


def squares(A: Tensor, count: int) -> list[Tensor]:
    """The powers A, A², A⁴, … of a matrix: `count` of them."""
    table = [A]
    for _ in range(count - 1):
        table.append(table[-1] @ table[-1])
    return table[:count]


def krylov_columns(table: list[Tensor], b: Tensor) -> Tensor:
    """The columns b, A b, … by doubling, 2^len(table) of them, from the squares of A; shape (*, N, columns)."""
    columns = b[..., None]
    for power in table:
        columns = torch.cat([columns, power @ columns], dim=-1)
    return columns


def krylov_rows(table: list[Tensor], c: Tensor) -> Tensor:
    """The rows c, c A, … by doubling, 2^len(table) of them, for each row of c (*, M, N); shape (*, M, rows, N)."""
    rows = c[..., None, :]
    for power in table:
        rows = torch.cat([rows, (rows.flatten(-3, -2) @ power).unflatten(-2, rows.shape[-3:-1])], dim=-2)
    return rows


def krylov(A: Tensor, b: Tensor, c: Tensor, L: int, *, dtype: torch.dtype | None = None) -> Tensor:
    r"""The impulse response of a dense system.

    .. math:: K_{ml} = c_m A^l b, \qquad l = 0 \dots L - 1

    Baby steps :math:`b, Ab, \dots, A^{J-1}b` are built by doubling from squared powers of `A`. The first giant steps
    :math:`c, cA^J, cA^{2J}, \dots` are built in the same way, and further ones block by block. One matrix product of
    the two gives all of `K`. The cost is :math:`O(N^3 \log L + N^2 \sqrt L + N L)` per system; the layout is the
    cheapest by a count of operations. The powers are computed in float64 and only the last product in `dtype`, since
    squaring in float32 loses precision for poles near 1; the gradient, which squares nothing, is computed in `dtype`.
    Many or large systems are processed in blocks, whose factors the backward pass computes again.

    References:
        | Matrix Computations (Golub and Van Loan, 2013), Section 10.1 (Krylov matrices)
        | The doubling is derived above.

    Arguments:
        A: State matrices, real, with shape :math:`(*, N, N)`.
        b: Input vectors, with shape :math:`(*, N)`.
        c: Output rows, with shape :math:`(*, M, N)`; they share `A` and `b`.
        L: The length of the response.
        dtype: The dtype of the last product and of the result, by default that of the arguments.

    Returns:
        The response :math:`K`, with shape :math:`(*, M, L)`.

    Raises:
        TypeError: If an argument is not a real floating tensor.
        ValueError: If shapes do not fit or `L` is negative.

    Example:
        >>> A, b, c = torch.tensor([[0.5]]), torch.ones(1), torch.ones(1, 1)
        >>> krylov(A, b, c, 4)
        tensor([[1.0000, 0.5000, 0.2500, 0.1250]])
    """
    for name, value in (("A", A), ("b", b), ("c", c)):
        _checks.floating("krylov", name, value)
    _checks.integer("krylov", "L", L, least=0)
    N = A.shape[-1]
    if A.ndim < 2 or A.shape[-2] != N or b.shape[-1:] != (N,) or c.ndim < 2 or c.shape[-1] != N:
        raise ValueError(
            "krylov: `A` must have shape (*, N, N), `b` (*, N) and `c` (*, M, N), "
            f"got {tuple(A.shape)}, {tuple(b.shape)} and {tuple(c.shape)}."
        )
    dtype = dtype or torch.promote_types(torch.promote_types(A.dtype, b.dtype), c.dtype)
    batch = torch.broadcast_shapes(A.shape[:-2], b.shape[:-1], c.shape[:-2])
    A, b, c = (x.expand(*batch, *x.shape[-k:]).reshape(-1, *x.shape[-k:]) for x, k in ((A, 2), (b, 1), (c, 2)))
    block = max(1, _BLOCK // max(1, _factor_numbers(N, c.shape[-2], L)))
    if transformed():
        return _plain(A, b, c, L, dtype).reshape(*batch, -1, L)
    K: Tensor = _Krylov.apply(A, b, c, L, dtype, block)[0]  # type: ignore[no-untyped-call]
    return K.reshape(*batch, *K.shape[-2:])


class _Layout(NamedTuple):
    """The layout of a response: `blocks` blocks of 2^`wide` giant steps, each of 2^`baby` samples."""

    baby: int
    wide: int
    blocks: int

    @property
    def powers(self) -> int:
        """How many of A, A², A⁴, … are needed; the last one advances from block to block, if there are several."""
        return self.baby + self.wide + (self.blocks > 1)

    def cost(self, N: int, M: int) -> float:
        """Multiplications and additions for a system of N states and M outputs.

        A product of r rows with a matrix also reads the matrix, which costs as much as some more rows.
        """
        rows = [1 << k for k in range(self.baby)] + [M << k for k in range(self.wide)]
        rows += (self.blocks - 1) * [M << self.wide]
        steps = (1 << self.baby) * M * (self.blocks << self.wide)
        return N**3 * max(0, self.powers - 1) + N * N * sum(r + _READ_ROWS for r in rows) + N * steps


@lru_cache(maxsize=1024)
def _layout(N: int, M: int, L: int) -> _Layout:
    """The cheapest layout of a response of length L."""
    bits = max(L - 1, 0).bit_length()
    choices = [
        _Layout(baby, wide, -(-L // (1 << baby + wide))) for baby in range(bits + 1) for wide in range(bits - baby + 1)
    ]
    best = choices[0]
    for layout in choices[1:]:  # torch.compile does not take `min` with a key of a dynamic length
        if layout.cost(N, M) < best.cost(N, M):
            best = layout
    return best


def _factor_numbers(N: int, M: int, L: int) -> int:
    """How many float64 numbers the factors of one system hold: squared powers, baby steps and giant steps."""
    layout = _layout(N, M, L)
    return N * (layout.powers * N + 2 * ((1 << layout.baby) + M * (layout.blocks << layout.wide)))


def _factors(A: Tensor, b: Tensor, c: Tensor, L: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Squared powers, baby steps (G, N, J) and giant steps (G, M, I, N), in float64; I J is at least L."""
    baby, wide, blocks = layout = _layout(A.shape[-1], c.shape[-2], L)
    table = squares(A.double(), layout.powers)
    columns = krylov_columns(table[:baby], b.double())
    parts = [krylov_rows(table[baby : baby + wide], c.double())]
    for _ in range(blocks - 1):
        parts.append((parts[-1].flatten(1, 2) @ table[-1]).view_as(parts[0]))
    return table, columns, torch.cat(parts, dim=-2)


def _product(rows: Tensor, columns: Tensor, L: int) -> Tensor:
    K: Tensor = rows.flatten(1, 2) @ columns
    return K.view(*rows.shape[:-1], -1).flatten(-2)[..., :L]


def _plain(A: Tensor, b: Tensor, c: Tensor, L: int, dtype: torch.dtype) -> Tensor:
    """The response by operations of torch, for second derivatives and torch.func."""
    _, columns, rows = _factors(A, b, c, L)
    return _product(rows.to(dtype), columns.to(dtype), L)


def _cast_factors(A: Tensor, b: Tensor, c: Tensor, L: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Giant steps, baby steps and squared powers, in the working dtype."""
    table, columns, rows = _factors(A, b, c, L)
    return tuple(without_denormals(x.to(dtype)) for x in (rows, columns, *table))


def _gradient(g: Tensor, rows: Tensor, columns: Tensor, *table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of A, b and c from that of K and the factors, which :func:`_factors` made in this order."""
    L, M, (N, J) = g.shape[-1], rows.shape[1], columns.shape[-2:]
    baby, wide, blocks = _layout(N, M, L)
    W = 1 << wide
    powers = []  # gradients of the squared powers, the last one first
    g = F.pad(g, (0, rows.shape[2] * J - L)).unflatten(-1, (-1, J)).flatten(1, 2)
    g_columns = rows.flatten(1, 2).mT @ g
    g_rows = (g @ columns.mT).view_as(rows)
    if blocks > 1:
        parts = list(g_rows.unflatten(2, (blocks, W)).unbind(2))
        for i in range(blocks - 1, 0, -1):
            parts[i - 1] = parts[i - 1] + (parts[i].flatten(1, 2) @ table[-1].mT).view_as(parts[0])
        later = torch.cat(parts[1:], dim=2)
        powers.append(rows[:, :, :-W].flatten(1, 2).mT @ later.flatten(1, 2))
        g_rows = parts[0]
    for k in range(wide - 1, -1, -1):
        first, second = g_rows.split(1 << k, dim=2)
        powers.append(rows[:, :, : 1 << k].flatten(1, 2).mT @ second.flatten(1, 2))
        g_rows = first + (second.flatten(1, 2) @ table[baby + k].mT).view_as(first)
    for k in range(baby - 1, -1, -1):
        before, after = g_columns.split(1 << k, dim=2)
        powers.append(after @ columns[..., : 1 << k].mT)
        g_columns = before + table[k].mT @ after
    if not powers:
        return columns.new_zeros(len(g), N, N), g_columns[..., 0], g_rows[:, :, 0]
    g_power = powers[0]
    for power, base in zip(powers[1:], table[-2::-1], strict=True):
        g_power = power.baddbmm_(g_power, base.mT).baddbmm_(base.mT, g_power)
    return g_power, g_columns[..., 0], g_rows[:, :, 0]


class _Krylov(torch.autograd.Function):
    """Systems (G, N, N), (G, N) and (G, M, N) to responses (G, M, L), and the factors if there is only one block.

    With several blocks the backward pass computes their factors again. For a second derivative, autograd differentiates
    the operations of the forward pass.
    """

    @staticmethod
    def forward(A: Tensor, b: Tensor, c: Tensor, L: int, dtype: torch.dtype, block: int) -> tuple[Tensor, ...]:
        if len(A) <= block:
            factors = _cast_factors(A, b, c, L, dtype)
            return _product(factors[0], factors[1], L), *factors
        K = torch.empty(*c.shape[:-1], L, dtype=dtype, device=A.device)
        for part, *system in zip(K.split(block), A.split(block), b.split(block), c.split(block), strict=True):
            rows, columns, *_ = _cast_factors(system[0], system[1], system[2], L, dtype)
            part.copy_(_product(rows, columns, L))
        return (K,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *system, ctx.L, ctx.dtype, ctx.block = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*system, *output[1:])

    @staticmethod
    @full_precision_backward
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        A, b, c, *kept = ctx.saved_tensors
        system = (A, b, c)
        if torch.is_grad_enabled():
            found = gradients_with_graph(lambda A, b, c: (_plain(A, b, c, ctx.L, ctx.dtype),), system, (grad,))
            return *found, None, None, None
        if kept:
            parts = [_gradient(grad, *kept)]
        else:
            blocks = zip(*(x.split(ctx.block) for x in (grad, *system)), strict=True)
            parts = [_gradient(g, *_cast_factors(p, q, r, ctx.L, ctx.dtype)) for g, p, q, r in blocks]
        joined = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*parts, strict=True))
        return (*(g.to(x.dtype) for g, x in zip(joined, system, strict=True)), None, None, None)
