r"""One step of a discrete system whose state matrix is diagonal plus low rank, in real arithmetic.

A complex state :math:`s` of :math:`N/2` numbers is kept as the :math:`N` real ones :math:`x = [\Re s; \Im s]`.
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
    "group_rows",
    "input_form",
    "output_form",
    "per_feature",
    "rotate",
    "rotation",
    "ungroup",
]


def input_form(z: Tensor, dim: int = -1) -> Tensor:
    """[Re z; Im z] along an axis: how a state and what is added to it are written in real numbers."""
    return torch.cat([z.real, z.imag], dim=dim)


def output_form(z: Tensor) -> Tensor:
    """2 [Re z, -Im z]: the row whose product with [Re s; Im s] is 2 Re(z s)."""
    return 2 * torch.cat([z.real, -z.imag], dim=-1)


def rotation(a: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients with which :func:`rotate` multiplies a real-form state by the complex diagonal `a`."""
    return torch.cat([a.real, a.real], dim=-1), torch.cat([-a.imag, a.imag], dim=-1)


def add_direct(kernel: Tensor, direct: Tensor | None) -> Tensor:
    """Adds direct gains (C, H) to a response (C, H, L), as its value at lag zero: that saves a pass over the output."""
    if direct is None or not kernel.shape[-1]:
        return kernel
    zero = kernel.new_zeros(1, dtype=torch.long)
    return kernel.index_add(-1, zero, direct.to(kernel.dtype)[..., None])


def add_rotation(A: Tensor, a: Tensor) -> Tensor:
    """Adds the complex diagonal `a`, as a matrix [[Re a, -Im a], [Im a, Re a]] on real-form states, to A in place."""
    n = a.shape[-1]
    A.diagonal(dim1=-2, dim2=-1).add_(torch.cat([a.real, a.real], dim=-1))
    A.diagonal(n, dim1=-2, dim2=-1).sub_(a.imag)
    A.diagonal(-n, dim1=-2, dim2=-1).add_(a.imag)
    return A


def rotate(same: Tensor, cross: Tensor, x: Tensor) -> Tensor:
    """The complex product a ∘ s in real form: the real part of `a` keeps halves, the imaginary one swaps them."""
    return torch.addcmul(same * x, cross, x.roll(x.shape[-1] // 2, -1))


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
    r"""The coefficients of a step, per feature, in real form and in the working dtype, but for the poles.

    .. math:: x \leftarrow a \circ x - \sum_j p_j (q_j \cdot x) + b\, u, \qquad y_c = c_c \cdot x

    The poles are in float64, and so is their product with the state, before it is rounded to the state's dtype. A pole
    rounded to float32 turns a little too far, or decays a little too fast, at every step alike: over k steps the error
    grows with k. Rounding a product errs this way and that: it grows with √k.
    """

    same: Tensor
    """Real part of a, twice, float64; shape (H, N)."""
    cross: Tensor
    """Imaginary part of a, negative and positive, float64; shape (H, N)."""
    p: Tensor
    """Columns of the low-rank part; shape (r, H, N)."""
    q: Tensor
    """Rows of the low-rank part; shape (r, H, N)."""
    b: Tensor
    """Input column; shape (H, N)."""
    c: Tensor
    """Output rows; shape (C, H, N)."""

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input (*, H) and state (*, H, N) to output (*, C, H) and the next state."""
        new = rotate(self.same, self.cross, x.double()).to(x.dtype)
        for p, q in zip(self.p, self.q, strict=True):
            new = torch.addcmul(new, p, (q * x).sum(-1, keepdim=True), value=-1)
        new = torch.addcmul(new, self.b, u[..., None])
        return (self.c * new[..., None, :, :]).sum(-1), new
