r"""One system per feature: the step and the chunk of a diagonal-plus-low-rank system, in real arithmetic.

.. math:: s_k = a \circ s_{k-1} - p\, 2 \Re(q\, s_{k-1}) + b u_k, \qquad y_k = 2 \Re (c\, s_k) + D u_k

G systems serve H features with C outputs each, and feature h uses system h mod G. States are interleaved.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from ..ops.complex import (
    add_rotation,
    from_interleaved,
    interleaved,
    multiply_interleaved,
    output_rows,
    times_rows,
    to_pairs,
)
from ..ops.conv import causal_conv
from ..ops.scan import Chunk, chunk_length, move_on, scan_chunks, toeplitz
from ..ops.vandermonde import powers
from .base import System, part
from .words import Vector, Words

__all__ = [
    "ChunkCoefficients",
    "LowRankSystem",
    "PerFeature",
    "StepCoefficients",
    "add_direct",
    "group_rows",
    "per_feature",
    "ungroup",
]


_MATRICES = 4
"""From this many streams on, a step is faster with matrix products than with elementwise products and sums."""


def add_direct(kernel: Tensor, direct: Tensor) -> Tensor:
    """Adds a feedthrough (C, H) to a response (C, H, L), at lag zero: that saves a pass over the output."""
    if not kernel.shape[-1]:
        return kernel
    zero = kernel.new_zeros(1, dtype=torch.long)
    return kernel.index_add(-1, zero, direct.to(kernel.dtype)[..., None])


def per_feature(x: Tensor, H: int) -> Tensor:
    """Spreads G systems (G, …) over H features (H, …): feature h uses system h mod G."""
    return x if x.shape[0] == H else repeat(x, "g ... -> (t g) ...", t=H // x.shape[0])


def group_rows(c: Tensor, G: int) -> Tensor:
    """Collects the output rows (C, H, N) of the features that share a system: (G, C · H/G, N)."""
    return rearrange(c, "c (t g) n -> g (c t) n", g=G)


def ungroup(rows: Tensor, C: int) -> Tensor:
    """The inverse of :func:`group_rows`, with any last axes: (G, C · H/G, …) to (C, H, …)."""
    return rearrange(rows, "g (c t) ... -> c (t g) ...", c=C)


class StepCoefficients(NamedTuple):
    r"""The coefficients of a step, per feature, in float64 except the feedthrough.

    .. math:: s \leftarrow a \circ s - \sum_j p_j (q_j \cdot x) + b\, u, \qquad y = c\, (\bar A x + b\, u) + D u

    The output is computed from the state before the step: one product then has the rows :math:`c \bar A` and the
    :math:`q_j`.

    All of a step is computed in float64, and the next state is rounded to the working dtype once. With a pole near 1
    the state hardly changes from one sample to the next, and neither do the rounding errors of its step: in float32 the
    errors of a rounded pole, of its product with the state or of the feedback :math:`q_j \cdot x` keep their sign for a
    long time, and their sum grows with the number of steps :math:`k`. With one rounding per step the error grows with
    :math:`\sqrt k` as long as there is input.
    """

    a: Tensor
    """Poles, complex128; shape (H, N/2)."""
    parts: Tensor
    """The poles as pairs, float64, shape (H, N/2, 2): torch.compile does not support complex numbers."""
    rows: Tensor
    """Rows c A, then rows q of the low-rank part, float64; shape (C + r, H, N)."""
    columns: Tensor
    """Input column b, then columns -p of the low-rank part, float64; shape (1 + r, H, N)."""
    direct: Tensor
    """c b + D, in the working dtype; shape (C, H)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, N)."""
        (C, H), N = self.direct.shape, self.columns.shape[-1]
        return C, H, N

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input (*, H) and state (*, H, N) to output (*, C H) and the next state."""
        if x.ndim != 3:
            y, new = self.step(u.reshape(-1, u.shape[-1]), x.reshape(-1, *x.shape[-2:]))
            return y.reshape(*u.shape[:-1], y.shape[-1]), new.reshape(x.shape)
        compiling = torch.compiler.is_compiling()
        outputs, dtype, exact, v = len(self.direct), x.dtype, x.double(), u.double()
        if compiling:
            rotated = multiply_interleaved(self.parts, exact)
        else:
            rotated = interleaved(self.a * from_interleaved(exact))
        if compiling or len(x) < _MATRICES:
            products = (self.rows * exact.unsqueeze(-3)).sum(-1)
            new = torch.addcmul(rotated, self.columns[0], v.unsqueeze(-1))
            for j in range(1, len(self.columns)):
                new = torch.addcmul(new, self.columns[j], products.select(-2, outputs + j - 1).unsqueeze(-1))
            y = torch.addcmul(products.narrow(-2, 0, outputs).to(dtype), self.direct, u.unsqueeze(-2))
            return y.flatten(-2), new.to(dtype)
        # Batched over features. The new state is a transposed view, which the next step transposes back without a copy.
        per_row = torch.bmm(exact.transpose(0, 1), self.rows.permute(1, 2, 0))
        added = torch.cat([v.T.unsqueeze(-1), per_row.narrow(-1, outputs, len(self.columns) - 1)], dim=-1)
        new = torch.baddbmm(rotated.transpose(0, 1), added, self.columns.transpose(0, 1))
        products = per_row.narrow(-1, 0, outputs).permute(1, 2, 0).to(dtype)
        return torch.addcmul(products, self.direct, u.unsqueeze(-2)).flatten(-2), new.to(dtype).transpose(0, 1)


class ChunkCoefficients(NamedTuple):
    r"""The coefficients of a chunk of T samples, T a power of two, and of its first samples.

    With the low-rank part, :math:`\bar A^m = a^m - \sum_{i < m} a^{m-1-i} p\, (q \bar A^i)`: a product of m columns and
    m rows for each rank. For every :math:`m < T` they are slices of :attr:`columns` and :attr:`rows`.
    """

    chunk: Chunk
    poles: Tensor
    """a^m for m < T, complex128; shape (G, T, N/2)."""
    rows: Tensor
    """q A^i; shape (H, r, T, N)."""
    columns: Tensor
    """a^(T-1-i) p; shape (H, r, T, N)."""

    def advance(self, state: Tensor, m: int) -> Tensor:
        """A^m x, for states (H, B, N)."""
        H, T = len(state), self.rows.shape[2]
        poles = per_feature(self.poles[:, m], H)[:, None]
        moved = move_on(torch.zeros_like(state), state, poles)
        if not self.rows.shape[1]:
            return moved
        products = state @ self.rows[:, :, :m].flatten(1, 2).mT
        return torch.baddbmm(moved, products, self.columns[:, :, T - m :].flatten(1, 2), alpha=-1)


class PerFeature(System):
    """One system for each of H features, with C outputs each; outputs are ordered (channel, feature)."""

    D: Tensor
    """Feedthrough, in the working dtype; shape (C, H)."""

    @property
    def d_input(self) -> int:
        """H."""
        return self.D.shape[1]

    @property
    def d_output(self) -> int:
        """C H."""
        return self.D.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of D."""
        return self.D.dtype

    @abstractmethod
    def kernel(self, L: int) -> Tensor:
        """The impulse response without D, with shape :math:`(C, H, L)`."""

    def forward(self, u: Tensor) -> Tensor:
        """Input (B, L, H) to output (B, L, C H), from rest, as a convolution with the kernel; L at least 1."""
        return causal_conv(u, add_direct(self.kernel(int(u.shape[1])), self.D))


class LowRankSystem(PerFeature):
    """A :class:`PerFeature` system that is diagonal, or diagonal plus rank r, with coefficients in complex128."""

    a: Tensor
    """Poles; shape (G, N/2)."""
    b: Tensor
    """Input gains; shape (G, N/2)."""
    c: Tensor
    """Output gains; shape (C, H, N/2)."""

    @abstractmethod
    def low_rank_part(self) -> tuple[Tensor, Tensor]:
        """Columns p (G, N/2, r) and rows q (G, r, N/2); r may be 0."""

    @property
    def state_shape(self) -> tuple[int, ...]:
        """(H, N), interleaved."""
        return self.c.shape[1], 2 * self.c.shape[2]

    @part
    def step_coefficients(self) -> StepCoefficients:
        """The coefficients of :meth:`step`."""
        H = self.d_input
        a, p, q, b = (per_feature(x, H) for x in (self.a, *self.low_rank_part(), self.b))
        p, q, b, c = interleaved(p.mT), output_rows(q), interleaved(b), output_rows(self.c)
        observe = times_rows(c, a) - torch.einsum("chn,hrn,hrm->chm", c, p, q)
        return StepCoefficients(
            a,
            to_pairs(a),
            torch.cat([observe, q.transpose(0, 1)]),
            torch.cat([b[None], -p.transpose(0, 1)]),
            (c * b).sum(-1).to(self.dtype) + self.D,
        )

    @part
    def chunk_coefficients(self, T: int) -> ChunkCoefficients:
        r"""The coefficients of :meth:`scan`, for chunks of T samples.

        The rows :math:`v_i = q \bar A^i` are computed one after another, in O(N) each. Toeplitz products of these and
        of the powers of `a` give all coefficients, without a power of a dense matrix:

        .. math::
            c \bar A^{j+1} = c a^{j+1} - \sum_{i \le j} (c\, a^{j-i} p)\, v_i, \qquad
            \bar A^j b = a^j b - \sum_{i < j} a^{j-1-i} p\, (v_i b).
        """
        (C, H), (G, n), dtype = self.D.shape, self.a.shape, self.dtype
        table = powers(self.a, T)
        poles = table[:, -1] * self.a
        p, q = self.low_rank_part()
        c = group_rows(self.c, G)
        observe = output_rows((c * self.a[:, None])[:, :, None] * table[:, None])
        reach = interleaved(self.b[:, None] * table)
        rows = columns = observe.new_zeros(G, 0, T, 2 * n)
        power = per_feature(poles, H)[:, None]
        if rank := p.shape[-1]:
            low, columns = interleaved(p.mT), interleaved(p.mT[:, :, None] * table[:, None])
            v = [output_rows(q)]
            for _ in range(T - 1):
                v.append(times_rows(v[-1], self.a[:, None]) - (v[-1] @ low.mT) @ v[0])
            rows = torch.stack(v, dim=2)
            flat_rows, flat_columns = rows.flatten(1, 2), columns.flatten(1, 2)
            products = (output_rows(c) @ flat_columns.mT).unflatten(-1, (rank, T))
            observe = observe - rearrange(toeplitz(products), "g m r i j -> g m j (r i)") @ flat_rows[:, None]
            products = (flat_rows @ interleaved(self.b)[..., None]).view(G, rank, T)
            later = F.pad(products, (1, -1))
            reach = reach - rearrange(toeplitz(later), "g r k j -> g j (r k)") @ flat_columns
            columns = columns.flip(2)
            matrix = add_rotation(-(columns.flatten(1, 2).mT @ flat_rows), poles)
            power = per_feature(matrix.mT.to(dtype), H)
        return ChunkCoefficients(
            Chunk.of(
                add_direct(ungroup(output_rows(c) @ reach.mT, C).to(dtype), self.D),
                ungroup(observe, C).to(dtype),
                per_feature(reach.flip(1).to(dtype), H),
                power,
            ),
            table,
            *(per_feature(x.to(dtype), H) for x in (rows, columns)),
        )

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input :math:`(*, H)` and state :math:`(*, H, N)` to output :math:`(*, C H)` and the next state."""
        return self.step_coefficients().step(u, x)

    def scan(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input (B, L, H) and state (B, H, N) to output (B, L, C H) and the next state; L at least 1."""
        kept, matrix = not (torch.is_grad_enabled() and self.requires_grad), self.low_rank_part()[0].shape[-1] > 0
        parts = self.chunk_coefficients(chunk_length(*u.shape[:2], kept=kept, matrix=matrix))
        return scan_chunks(u, x, parts.chunk, parts.advance)

    def prepare(self) -> None:
        """Makes the coefficients of a step."""
        self.step_coefficients()

    def write(self, words: Words, u: Vector) -> Vector:
        """One operation for all features."""
        return words.per_feature(self.step_coefficients(), u)
