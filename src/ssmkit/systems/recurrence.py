r"""One step of a discrete system whose state matrix is diagonal plus low rank, in real arithmetic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from ..ops.complex import from_interleaved, interleaved, multiply_interleaved, times_rows, to_pairs

__all__ = [
    "Recurrence",
    "add_direct",
    "group_rows",
    "per_feature",
    "ungroup",
]


_MATRICES = 4
"""Streams from which matrix products cost a step less than products and sums."""


def add_direct(kernel: Tensor, direct: Tensor | None) -> Tensor:
    """Adds direct gains (C, H) to a response (C, H, L), as its value at lag zero: that saves a pass over the output."""
    if direct is None or not kernel.shape[-1]:
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
    """The way back from :func:`group_rows`, whatever has become of the last axes: (G, C · H/G, …) to (C, H, …)."""
    return rearrange(rows, "g (c t) ... -> c (t g) ...", c=C)


class Recurrence(NamedTuple):
    r"""The coefficients of a step, per feature, in float64 but for the feedthrough.

    .. math:: s \leftarrow a \circ s - \sum_j p_j (q_j \cdot x) + b\, u, \qquad y = c\, (\bar A x + b\, u)

    The output is taken from the state before the step: its rows :math:`c \bar A` and the :math:`q_j` are then one
    product.

    All of a step is computed in float64, and the next state is rounded to the working dtype once. A slow mode hardly
    changes from one sample to the next, and neither do the rounding errors of its step: in float32 the errors of a
    rounded pole, of its product with the state or of the feedback :math:`q_j \cdot x` keep their sign for a long time,
    and their sum grows with the number of steps :math:`k`. The error of one rounding grows with :math:`\sqrt k` as long
    as there is input.
    """

    a: Tensor
    """Poles, complex128; shape (H, N/2)."""
    parts: Tensor
    """The same as real and imaginary parts, float64, shape (H, N/2, 2): torch.compile knows no complex numbers."""
    rows: Tensor
    """Rows c A, then rows q of the low-rank part, float64; shape (C + r, H, N)."""
    columns: Tensor
    """Input column b, then columns -p of the low-rank part, float64; shape (1 + r, H, N)."""
    direct: Tensor
    """c b, and the feedthrough D of a layer, in the working dtype; shape (C, H)."""
    D: Tensor | None = None
    """Those direct gains alone, for the first of the outputs: kernels do not have them, and scans add them."""

    @classmethod
    def of(cls, a: Tensor, p: Tensor, q: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Recurrence:
        """From poles (G, N/2), columns (G, N, r), rows (G, r, N), input (G, N) and outputs (C, H, N) in float64."""
        H = c.shape[1]
        a, p, q, b = (per_feature(x, H) for x in (a, p, q, b))
        observe = times_rows(c, a[None]) - torch.einsum("chn,hnr,hrm->chm", c, p, q)
        return cls(
            a,
            to_pairs(a),
            torch.cat([observe, rearrange(q, "h r n -> r h n")]),
            torch.cat([b[None], -rearrange(p, "h n r -> r h n")]),
            (c * b).sum(-1).to(dtype),
        )

    def with_direct(self, D: Tensor) -> Recurrence:
        """With the direct gains of a layer, for the first of the outputs; a copy, which later updates do not move."""
        rest = len(self.direct) - len(D)
        return self._replace(direct=self.direct + F.pad(D, (0, 0, 0, rest)), D=D.clone())

    @property
    def dtype(self) -> torch.dtype:
        """The working dtype, of outputs and of states that a layer makes."""
        return self.direct.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, N)."""
        (C, H), N = self.direct.shape, self.columns.shape[-1]
        return C, H, N

    def _rotated(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return multiply_interleaved(self.parts, x)
        return interleaved(self.a * from_interleaved(x))

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input (*, H) and state (*, H, N) to output (*, C, H) and the next state."""
        if x.ndim != 3:
            y, new = self.step(u.reshape(-1, u.shape[-1]), x.reshape(-1, *x.shape[-2:]))
            return y.reshape(*u.shape[:-1], *y.shape[-2:]), new.reshape(x.shape)
        outputs, dtype, exact, v = len(self.direct), x.dtype, x.double(), u.double()
        rotated = self._rotated(exact)
        if torch.compiler.is_compiling() or len(x) < _MATRICES:
            seen = (self.rows * exact.unsqueeze(-3)).sum(-1)
            new = torch.addcmul(rotated, self.columns[0], v.unsqueeze(-1))
            for j in range(1, len(self.columns)):
                new = torch.addcmul(new, self.columns[j], seen.select(-2, outputs + j - 1).unsqueeze(-1))
            return torch.addcmul(seen.narrow(-2, 0, outputs).to(dtype), self.direct, u.unsqueeze(-2)), new.to(dtype)
        # Features outside: the state that goes on is a transposed view, and the next step has it as it needs it.
        per_row = torch.bmm(exact.transpose(0, 1), self.rows.permute(1, 2, 0))
        added = torch.cat([v.T.unsqueeze(-1), per_row.narrow(-1, outputs, len(self.columns) - 1)], dim=-1)
        new = torch.baddbmm(rotated.transpose(0, 1), added, self.columns.transpose(0, 1))
        seen = per_row.narrow(-1, 0, outputs).permute(1, 2, 0).to(dtype)
        return torch.addcmul(seen, self.direct, u.unsqueeze(-2)), new.to(dtype).transpose(0, 1)
