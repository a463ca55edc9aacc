r"""One step of a discrete system whose state matrix is diagonal plus low rank, in real arithmetic.

A complex state :math:`s` of :math:`N/2` numbers is kept as the :math:`N` real ones
:math:`x = [\Re s_1, \Im s_1, \Re s_2, \Im s_2, \dots]`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

__all__ = [
    "Recurrence",
    "add_direct",
    "add_rotation",
    "complex_form",
    "group_rows",
    "input_form",
    "output_form",
    "per_feature",
    "ungroup",
]


def input_form(z: Tensor, dim: int = -1) -> Tensor:
    """Real and imaginary parts in turns along an axis: how a state and what is added to it are real numbers."""
    return torch.stack([z.real, z.imag], dim=dim).flatten(dim - 1, dim)


def output_form(z: Tensor) -> Tensor:
    """2 [Re z, -Im z] in turns: the row whose product with the real form of s is 2 Re(z s)."""
    return 2 * input_form(z.conj())


def complex_form(x: Tensor) -> Tensor:
    """The complex tensor of a real form, without a copy: the way back from :func:`input_form`."""
    return torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))


def add_direct(kernel: Tensor, direct: Tensor | None) -> Tensor:
    """Adds direct gains (C, H) to a response (C, H, L), as its value at lag zero: that saves a pass over the output."""
    if direct is None or not kernel.shape[-1]:
        return kernel
    zero = kernel.new_zeros(1, dtype=torch.long)
    return kernel.index_add(-1, zero, direct.to(kernel.dtype)[..., None])


def add_rotation(A: Tensor, a: Tensor) -> Tensor:
    """Adds the complex diagonal `a`, as blocks [[Re a, -Im a], [Im a, Re a]] on real-form states, to A in place."""
    A.diagonal(dim1=-2, dim2=-1).add_(a.real.repeat_interleave(2, -1))
    A[..., 0::2, 1::2].diagonal(dim1=-2, dim2=-1).sub_(a.imag)
    A[..., 1::2, 0::2].diagonal(dim1=-2, dim2=-1).add_(a.imag)
    return A


def per_feature(x: Tensor, H: int) -> Tensor:
    """Spreads G systems (G, …) over H features (H, …): feature h uses system h mod G."""
    return x if x.shape[0] == H else repeat(x, "g ... -> (t g) ...", t=H // x.shape[0])


def group_rows(c: Tensor, G: int) -> Tensor:
    """Collects the output rows (C, H, N) of the features that share a system: (G, C · H/G, N)."""
    return rearrange(c, "c (t g) n -> g (c t) n", g=G)


def ungroup(rows: Tensor, C: int) -> Tensor:
    """The way back from :func:`group_rows`, whatever has become of the last axes: (G, C · H/G, …) to (C, H, …)."""
    return rearrange(rows, "g (c t) ... -> c (t g) ...", c=C)


class Recurrence(NamedTuple):
    r"""The coefficients of a step, per feature, in the working dtype.

    .. math:: s \leftarrow a \circ s - \sum_j p_j (q_j \cdot x) + b\, u, \qquad y = c\, (\bar A x + b\, u)

    The output is taken from the state before the step: its rows :math:`c \bar A` and the :math:`q_j` are then one
    product.

    A pole rounded to float32 turns a little too far, or decays a little too fast, at every step alike: over k steps the
    error grows with k. So a pole is kept as the sum of two numbers, with the digits of float64; what is rounded is its
    product with the state, which errs this way and that, and grows with √k.
    """

    pole: Tensor
    """a, complex; shape (H, N/2)."""
    rest: Tensor
    """What the rounding of a has cut off, complex; shape (H, N/2)."""
    p: Tensor
    """Columns of the low-rank part; shape (r, H, N)."""
    rows: Tensor
    """Rows q of the low-rank part, then rows c A; shape (r + C, H, N)."""
    b: Tensor
    """Input column; shape (H, N)."""
    direct: Tensor
    """c b; shape (C, H)."""

    @classmethod
    def of(cls, a: Tensor, p: Tensor, q: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Recurrence:
        """From poles (G, N/2), columns (G, N, r), rows (G, r, N), input (G, N) and outputs (C, H, N) in float64."""
        H = c.shape[1]
        a, p, q, b = (per_feature(x, H) for x in (a, p, q, b))
        observe = input_form(complex_form(c) * a.conj()) - torch.einsum("chn,hnr,hrm->chm", c, p, q)
        pole = a.to(dtype.to_complex())
        return cls(
            pole,
            (a - pole).to(pole.dtype),
            rearrange(p, "h n r -> r h n").to(dtype),
            torch.cat([rearrange(q, "h r n -> r h n"), observe]).to(dtype),
            b.to(dtype),
            (c * b).sum(-1).to(dtype),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, N)."""
        (C, H), N = self.direct.shape, self.b.shape[-1]
        return C, H, N

    def step(self, u: Tensor, x: Tensor, direct: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Input (*, H), state (*, H, N) and direct gains (C, H) to output (*, C, H) and the next state."""
        u = u[..., None, :]
        rank = len(self.p)
        seen = (self.rows * x[..., None, :, :]).sum(-1)
        y = torch.addcmul(seen[..., rank:, :], self.direct if direct is None else self.direct + direct, u)
        s = complex_form(x)
        new = torch.view_as_real(torch.addcmul(self.pole * s, self.rest, s)).flatten(-2)
        new = torch.addcmul(new, self.b, u.mT)
        for j in range(rank):
            new = torch.addcmul(new, self.p[j], seen[..., j, :, None], value=-1)
        return y, new
