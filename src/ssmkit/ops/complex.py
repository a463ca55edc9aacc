r"""The formats in which complex numbers are kept as real ones; all conversions are in this file.

Parameters are *pairs*, a last axis of size 2 with the real and the imaginary part. A complex state :math:`s` of
:math:`N/2` numbers is kept *interleaved*, as the :math:`N` real numbers :math:`x = [\Re s_1, \Im s_1, \Re s_2, \dots]`.
All functions also accept conjugate views.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .transforms import transformed

__all__ = [
    "add_rotation",
    "add_rotation_adjoint",
    "from_interleaved",
    "from_pairs",
    "interleaved",
    "multiply_interleaved",
    "output_rows",
    "times_rows",
    "to_pairs",
]


def to_pairs(z: Tensor) -> Tensor:
    """Real and imaginary part in a last axis of size 2; copies only a conjugate view."""
    return torch.view_as_real(z.resolve_conj())


def from_pairs(x: Tensor) -> Tensor:
    """The complex tensor that pairs stand for; no copy if the pairs are contiguous."""
    if torch.compiler.is_compiling():
        # torch.compile fails on complex views of real tensors at graph breaks.
        return torch.complex(*x.unbind(-1))
    return torch.view_as_complex(x if x.stride(-1) == 1 else x.contiguous())


def interleaved(z: Tensor, dim: int = -1) -> Tensor:
    """Real and imaginary parts one after the other along an axis, which becomes twice as long."""
    if dim == -1:
        return to_pairs(z).flatten(-2)
    return torch.stack([z.real, z.imag], dim=dim).flatten(dim - 1, dim)


def from_interleaved(x: Tensor) -> Tensor:
    """The inverse of :func:`interleaved`, along the last axis."""
    return from_pairs(x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2))


def output_rows(z: Tensor) -> Tensor:
    r"""The real rows :math:`2 [\Re z, -\Im z]`, whose product with an interleaved :math:`s` is :math:`2 \Re (z s)`."""
    # No view: under torch.compile, vmap has no rule for the imaginary part of the gradient, which would be one, too.
    return 2 * interleaved(z.conj_physical())


def times_rows(rows: Tensor, a: Tensor) -> Tensor:
    """The rows of z a, from the rows of z that :func:`output_rows` made and a complex diagonal."""
    return interleaved(from_interleaved(rows) * a.conj())


def multiply_interleaved(a: Tensor, x: Tensor) -> Tensor:
    """The interleaved a s, from a as pairs and s interleaved; torch.compile does not support complex numbers."""
    (a_re, a_im), (re, im) = a.unbind(-1), x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a_re * re - a_im * im, a_im * re + a_re * im], -1).flatten(-2)


def add_rotation(A: Tensor, a: Tensor) -> Tensor:
    """Adds the complex diagonal `a` to A, as blocks [[Re a, -Im a], [Im a, Re a]] on interleaved states.

    In place, except under torch.func, where `a` may be batched and A may not.
    """
    if transformed():
        return A + multiply_interleaved(to_pairs(a).unsqueeze(-3), torch.eye(A.shape[-1]).to(A)).mT
    A.diagonal(dim1=-2, dim2=-1).add_(a.real.repeat_interleave(2, -1))
    A[..., 0::2, 1::2].diagonal(dim1=-2, dim2=-1).sub_(a.imag)
    A[..., 1::2, 0::2].diagonal(dim1=-2, dim2=-1).add_(a.imag)
    return A


def add_rotation_adjoint(G: Tensor) -> Tensor:
    """The gradient of `a` from that of the matrix that :func:`add_rotation` made."""
    re, im = (G.diagonal(dim1=-2, dim2=-1), G[..., 1::2, 0::2] - G[..., 0::2, 1::2])
    return torch.complex(re[..., 0::2] + re[..., 1::2], im.diagonal(dim1=-2, dim2=-1))
