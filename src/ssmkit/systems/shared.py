"""A diagonal system that several inputs and outputs share (S5, LRU)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks
from ..ops.complex import from_interleaved, interleaved, multiply_interleaved, output_rows, to_pairs
from ..ops.recurrence import recurrence
from .base import System, own, part
from .words import Vector, Words

__all__ = ["SharedDiagonal"]


@dataclass(frozen=True, eq=False)
class SharedDiagonal(System):
    r"""A discrete system with one state for all inputs and a diagonal state matrix.

    .. math:: s_k = a \circ s_{k-1} + B u_k, \qquad y_k = \Re (C s_k) + D \circ u_k

    States are the real tensors :math:`[\Re s_1, \Im s_1, \dots]` of size :math:`2 P`. If `a` holds one pole of each
    conjugate pair, pass :math:`2 C`: the output of a pair is twice the real part of one.

    References:
        | Simplified State Space Layers for Sequence Modeling (Smith et al., 2023), Section 3
        | https://arxiv.org/abs/2208.04933
        | Resurrecting Recurrent Neural Networks for Long Sequences (Orvieto et al., 2023), Section 3
        | https://arxiv.org/abs/2303.06349

    Arguments:
        a: Poles, complex, with shape :math:`(P)`.
        B: The input matrix, complex, with shape :math:`(P, d_{input})`.
        C: The output matrix, complex, with shape :math:`(d_{output}, P)`.
        D: Feedthrough, real, with shape :math:`(d_{input})`, which is then :math:`d_{output}` as well. Sequences and
            states are computed in its dtype, and at least in float32.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.complex64)
        >>> system = SharedDiagonal(one[0] / 2, one, one, torch.zeros(1))
        >>> y, state = system.scan(torch.tensor([[[1.0], [0.0], [1.0]]]), system.initial_state(1))
        >>> y.flatten(), state
        (tensor([1.0000, 0.5000, 1.2500]), tensor([[1.2500, 0.0000]]))
    """

    a: Tensor
    """Poles, complex128; shape (P)."""
    B: Tensor
    """Input matrix, complex128; shape (P, d_input)."""
    C: Tensor
    """Output matrix, complex128; shape (d_output, P)."""
    D: Tensor
    """Feedthrough, in the working dtype; shape (d_input)."""

    def __post_init__(self) -> None:
        a, B, C, D = (tuple(x.shape) for x in (self.a, self.B, self.C, self.D))
        if len(a) != 1 or len(B) != 2 or (B[0], C, D) != (*a, (B[1], *a), B[1:]):
            raise ValueError(
                "SharedDiagonal: `a`, `B`, `C` and `D` must have shapes (P,), (P, H), (H, P) and (H,), "
                f"got {a}, {B}, {C} and {D}."
            )
        for name in ("a", "B", "C"):
            object.__setattr__(self, name, own(getattr(self, name), torch.complex128))
        _checks.floating("SharedDiagonal", "D", self.D)
        object.__setattr__(self, "D", own(self.D, torch.promote_types(self.D.dtype, torch.float32)))

    @property
    def d_input(self) -> int:
        """The columns of B."""
        return self.B.shape[1]

    @property
    def d_output(self) -> int:
        """The rows of C."""
        return self.C.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of D."""
        return self.D.dtype

    @property
    def state_shape(self) -> tuple[int, ...]:
        """(2 P), interleaved."""
        return (2 * len(self.a),)

    @part
    def real_matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Poles as pairs (P, 2) and B (d_input, 2 P) in float64, C (2 P, d_output) in the working dtype."""
        out = output_rows(self.C).mT / 2
        return to_pairs(self.a), interleaved(self.B.mT), out.to(self.dtype).contiguous()

    def scan(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input (B, L, d_input) and state (B, 2 P) to output (B, L, d_output) and the next state; L at least 1."""
        _, into, out = self.real_matrices()
        states, last = recurrence(self.a, from_interleaved(u @ into.to(u.dtype)), from_interleaved(x))
        return interleaved(states) @ out.to(u.dtype) + self.D.to(u.dtype) * u, interleaved(last)

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input :math:`(*, d_{input})` and state :math:`(*, 2 P)` to output :math:`(*, d_{output})` and next state."""
        poles, into, out = self.real_matrices()
        # In float64, rounded once: with a pole near 1, float32 errors keep their sign for many steps, and add up.
        new = (multiply_interleaved(poles, x.double()) + u.double() @ into).to(x.dtype)
        return new @ out.to(u.dtype) + self.D.to(u.dtype) * u, new

    def prepare(self) -> None:
        """Makes the real matrices."""
        self.real_matrices()

    def write(self, words: Words, u: Vector) -> Vector:
        """A product, the recurrence of all states, and another product."""
        _, into, out = self.real_matrices()
        x = words.recur(self.a, words.linear(into.mT, u))
        return words.add(words.linear(out.mT, x), words.scale(self.D, u))
