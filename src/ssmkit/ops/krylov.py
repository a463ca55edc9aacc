r"""Krylov products: the impulse response of a dense system."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import _checks
from .vandermonde import without_denormals

__all__ = ["krylov", "krylov_columns", "krylov_rows", "naive_krylov", "squares"]

_BLOCK = 1 << 26
"""How many float64 numbers the factors of a block may hold: half a gigabyte."""


def naive_krylov(A: Tensor, b: Tensor, c: Tensor, L: int) -> Tensor:
    """The definition of :func:`krylov`, one product with `A` after another."""
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

    Baby steps :math:`b, Ab, \dots, A^{J-1}b` and giant steps :math:`c, cA^J, cA^{2J}, \dots` are built by doubling from
    squared powers of `A`; one matrix product of the two is all of `K`. Cost :math:`O(N^3 \log L + N L)` per system.
    The powers are taken in float64 and only the last product in `dtype`, since squaring in float32 loses slow modes.
    Many or large systems are taken in blocks, whose factors the backward pass makes again instead of keeping them; such
    a product can be differentiated once.

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
    count = math.prod(batch)
    block = max(1, _BLOCK // max(1, _factor_numbers(N, c.shape[-2], L)))
    if count <= block:
        return _response(A, b, c, L, dtype)
    A, b, c = (x.expand(*batch, *x.shape[-k:]).reshape(count, *x.shape[-k:]) for x, k in ((A, 2), (b, 1), (c, 2)))
    K: Tensor = _Blocks.apply(A, b, c, L, dtype, block)  # type: ignore[no-untyped-call]
    return K.reshape(*batch, *K.shape[-2:])


def _split(M: int, L: int) -> tuple[int, int]:
    """The number of doublings, and how many of them are for baby steps.

    M rows share the baby steps: fewer giant steps and more baby steps balance the two factors.
    """
    bits = max(L - 1, 0).bit_length()
    return bits, min(bits, (bits + max(M - 1, 0).bit_length() + 1) // 2)


def _factor_numbers(N: int, M: int, L: int) -> int:
    """How many float64 numbers the factors of one system hold: squared powers, baby steps and giant steps."""
    bits, baby = _split(M, L)
    return bits * N * N + 2 * N * ((1 << baby) + M * (1 << (bits - baby)))


def _factors(A: Tensor, b: Tensor, c: Tensor, L: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Giant steps (*, M, I, N) and baby steps (*, N, J), made in float64 and cast; I J is at least L."""
    bits, baby = _split(c.shape[-2], L)
    table = squares(A.double(), bits)
    columns = krylov_columns(table[:baby], b.double())
    # Giant steps beyond L are not multiplied out.
    rows = krylov_rows(table[baby:], c.double())[..., : -(-L // (1 << baby)), :]
    return without_denormals(rows).to(dtype), without_denormals(columns).to(dtype)


def _response(A: Tensor, b: Tensor, c: Tensor, L: int, dtype: torch.dtype) -> Tensor:
    rows, columns = _factors(A, b, c, L, dtype)
    K: Tensor = (rows.flatten(-3, -2) @ columns).unflatten(-2, rows.shape[-3:-1])
    return K.flatten(-2)[..., :L]


class _Blocks(torch.autograd.Function):
    """Blocks of systems, one after another; the backward pass makes a block's factors again instead of keeping them.

    A function of its own and not a checkpoint: what it keeps, the arguments, an outer checkpoint can let go of.
    """

    @staticmethod
    def forward(A: Tensor, b: Tensor, c: Tensor, L: int, dtype: torch.dtype, block: int) -> Tensor:
        K = torch.empty(*c.shape[:-1], L, dtype=dtype, device=A.device)
        for part, *system in zip(K.split(block), A.split(block), b.split(block), c.split(block), strict=True):
            part.copy_(_response(system[0], system[1], system[2], L, dtype))
        return K

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        A, b, c, ctx.L, ctx.dtype, ctx.block = inputs
        ctx.save_for_backward(A, b, c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = []
        for g, *arguments in zip(*(x.split(ctx.block) for x in (grad, *ctx.saved_tensors)), strict=True):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in arguments]
                rows, columns = _factors(leaves[0], leaves[1], leaves[2], ctx.L, ctx.dtype)
            # K = rows @ columns, laid out as (M, I, J) and cut at L.
            I, J = rows.shape[-2], columns.shape[-1]
            g = F.pad(g, (0, I * J - ctx.L)).unflatten(-1, (I, J)).flatten(-3, -2)
            back = ((g @ columns.mT).view_as(rows), rows.flatten(-3, -2).mT @ g)
            parts.append(torch.autograd.grad((rows, columns), leaves, back))
        return (*(torch.cat(x) for x in zip(*parts, strict=True)), None, None, None)
