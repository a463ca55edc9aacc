r"""Diagonal systems for samples at irregular times: each sample is discretised with its own interval.

Such a system depends on the data and is valid for one call. It holds the continuous system and the rates. The poles
:math:`e^{\Delta r_k \Lambda}` are computed inside the loop over blocks of samples and never held for a whole sequence,
so that memory does not grow with the number of states.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from ..ops.blocks import in_blocks
from ..ops.complex import from_interleaved, interleaved, output_rows
from ..ops.recurrence import recurrence
from .base import ForwardSystem, System, own
from .diagonal import Discretization, less_one

__all__ = ["TimedDiagonal", "TimedShared", "fit_rate"]

_S = TypeVar("_S", bound=ForwardSystem)

_BLOCK = 1 << 16
"""Complex numbers in the states of a block; about twelve tensors of this size exist at a time."""
_SAMPLES = 64
"""The minimum length of a block; one state is kept per block."""


def fit_rate(where: str, system: _S, shape: Sequence[int], *, time: bool) -> _S:
    """Checks the rates of a system against the input, and brings them into the shape that its modes take.

    Arguments:
        where: The name of the layer, for the error.
        system: A system.
        shape: The axes of the input in front of its features: batch and length, or the batch of a single sample.
        time: Whether the last of them is the length.

    Returns:
        The same system, with rates (1, L) or (B, L) for the flat batch of `forward` and `scan`, and unchanged rates for
        `step`. A system of one rate is returned unchanged.

    Raises:
        ValueError: If there is not one rate per sample.
    """
    rate, shape = system.time_stamps, tuple(shape)
    if rate is None:
        return system
    try:
        fits = torch.broadcast_shapes(rate.shape, shape) == shape
    except RuntimeError:
        fits = False
    if time and not (fits and rate.ndim and rate.shape[-1] == shape[-1]):
        raise ValueError(
            f"{where}: the rates of `system` must have shape {shape} or its last axes, one for each sample of `u`, got "
            f"{tuple(rate.shape)}; a rate for all samples is a Python number."
        )
    if not fits:
        raise ValueError(
            f"{where}: the rates of `system` must have the batch shape {shape} or its last axes, as `step` takes one "
            f"sample, got {tuple(rate.shape)}."
        )
    if time:
        agree = all(size == 1 for size in rate.shape[:-1])
        rate = rate.reshape(1, -1) if agree else rate.expand(shape).reshape(prod(shape[:-1]), shape[-1])
    fitted = copy.copy(system)
    object.__setattr__(fitted, "rate", rate)
    return fitted


@dataclass(frozen=True, eq=False)
class TimedDiagonal(System):
    r"""A diagonal system per feature, for samples at irregular times.

    .. math:: s_k = \bar\Lambda(\Delta r_k) \circ s_{k-1} + \bar B(\Delta r_k) u_k, \qquad y_k = 2 \Re (C s_k) + D u_k

    There are G systems for H features with C outputs each, and feature h uses system h mod G. States are those of
    :class:`DiscreteDiagonal`. Zero-order hold is exact for inputs that are constant over each interval.
    """

    Lambda: Tensor
    """Poles, complex128, in 1/time; shape (S, N/2), where S divides G."""
    B: Tensor
    """Input gains, complex128, in 1/time; shape (S, N/2)."""
    C: Tensor
    """Output gains, complex128; shape (C, H, N/2)."""
    D: Tensor
    """Feedthrough, in the working dtype; shape (C, H)."""
    dt: Tensor
    """Step sizes, float64; shape (G)."""
    rate: Tensor
    """For each sample the interval that ends at it, in steps, float64; shape (1, L) or (B, L), and :math:`(*)` for a
    step."""
    method: Discretization
    """The rule, such as :func:`zoh`."""

    def __post_init__(self) -> None:
        for name in ("Lambda", "B", "C"):
            object.__setattr__(self, name, own(getattr(self, name), torch.complex128))
        for name in ("dt", "rate"):
            object.__setattr__(self, name, own(getattr(self, name), torch.float64))
        object.__setattr__(self, "D", own(self.D))

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
        """That of D."""
        return self.D.dtype

    @property
    def state_shape(self) -> tuple[int, ...]:
        """(H, N), interleaved."""
        return self.C.shape[1], 2 * self.C.shape[2]

    def _systems(self) -> tuple[Tensor, Tensor, Tensor]:
        """Poles and gains (G, N/2), and output rows (C, H/G, G, N)."""
        G = len(self.dt)
        Lambda, B = (v.repeat(G // len(v), 1) for v in (self.Lambda, self.B))
        return Lambda, B, output_rows(self.C).unflatten(1, (-1, G))

    def scan(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input (B, L, H) and state (B, H, N) to output (B, L, C H) and the next state; L at least 1."""
        (rows, L, _), G = u.shape, len(self.dt)
        Lambda, B, C = self._systems()
        # Feature h is s G + g.
        v, rate = u.unflatten(-1, (-1, G)), self.rate.reshape(-1, L)
        state = from_interleaved(x.double()).unflatten(1, (-1, G))
        each = state[0, :, 0].numel()
        # With N samples per block or more, the first states of all blocks are at most twice as large as the output.
        T = min(L, max(_SAMPLES, x.shape[-1], _BLOCK // max(1, rows * G * each)))
        # Blocks hold all systems, or some of them, or some rows of one, so that they have about the same size.
        systems = max(1, min(G, _BLOCK // max(1, rows * T * each)))
        batch = max(1, min(rows, _BLOCK // max(1, T * each)))
        rates = [rate] * -(-rows // batch) if len(rate) == 1 else rate.split(batch)
        parts: list[Tensor] = []
        ends: list[Tensor] = []
        split = ((Lambda, 0), (B, 0), (C, 2), (self.dt, 0), (state, 2), (v, 3))
        for *constants, first, part in zip(*(z.split(systems, dim=dim) for z, dim in split), strict=True):
            found = [
                in_blocks(self._block, T, x_rows, constants, (u_rows, r_rows))
                for x_rows, u_rows, r_rows in zip(first.split(batch), part.split(batch), rates, strict=True)
            ]
            for joined, pieces in zip((parts, ends), zip(*found, strict=True), strict=True):
                joined.append(torch.cat(pieces))
        y = torch.cat(parts, dim=-1).flatten(2)
        new = interleaved(torch.cat(ends, dim=2).flatten(1, 2))
        return y + (self.D.to(u.dtype) * u.unsqueeze(-2)).flatten(-2), new.to(x.dtype)

    def _block(
        self, x: Tensor, Lambda: Tensor, B: Tensor, C: Tensor, dt: Tensor, u: Tensor, rate: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Some systems over some samples: outputs (b, T, C, s, g) without D, and the next state (b, s, g, n)."""
        less, varying, fixed = less_one(self.method, Lambda, B, dt[:, None] * rate[..., None, None])
        entered = fixed * u.double()[..., None]
        states, last = recurrence(1 + less.unsqueeze(-3), varying.unsqueeze(-3) * entered, x, dim=1)
        return torch.einsum("btsgn,csgn->btcsg", interleaved(states), C).to(u.dtype), last

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input :math:`(*, H)` and state :math:`(*, H, N)` to output :math:`(*, C H)` and the next state."""
        Lambda, B, C = self._systems()
        a, b = (v.unsqueeze(-3) for v in self.method(Lambda, B, self.dt[:, None] * self.rate[..., None, None]))
        state = from_interleaved(x.double()).unflatten(-2, C.shape[1:3])
        new = interleaved(a * state + b * u.double().unflatten(-1, C.shape[1:3])[..., None])
        y = torch.einsum("...sgn,csgn->...csg", new, C).flatten(-2).to(u.dtype)
        return (y + self.D.to(u.dtype) * u.unsqueeze(-2)).flatten(-2), new.flatten(-3, -2).to(x.dtype)


@dataclass(frozen=True, eq=False)
class TimedShared(System):
    r"""A diagonal system that several inputs and outputs share, for samples at irregular times.

    .. math:: s_k = \bar\Lambda(\Delta r_k) \circ s_{k-1} + \bar B(\Delta r_k) u_k, \qquad
        y_k = \Re (C s_k) + D \circ u_k

    States are those of :class:`SharedDiagonal`. As there, pass :math:`2 C` if `Lambda` holds one pole of each conjugate
    pair.
    """

    Lambda: Tensor
    """Poles, complex128, in 1/time; shape (P)."""
    B: Tensor
    """The input matrix, complex128, in 1/time; shape (P, d_input)."""
    C: Tensor
    """The output matrix, complex128; shape (d_output, P)."""
    D: Tensor
    """Feedthrough, in the working dtype; shape (d_input)."""
    dt: Tensor
    """Step sizes, float64; shape (P)."""
    rate: Tensor
    """For each sample the interval that ends at it, in steps, float64; shape (1, L) or (B, L), and :math:`(*)` for a
    step."""
    method: Discretization
    """The rule, such as :func:`zoh`."""

    def __post_init__(self) -> None:
        for name in ("Lambda", "B", "C"):
            object.__setattr__(self, name, own(getattr(self, name), torch.complex128))
        for name in ("dt", "rate"):
            object.__setattr__(self, name, own(getattr(self, name), torch.float64))
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
        """That of D."""
        return self.D.dtype

    @property
    def state_shape(self) -> tuple[int, ...]:
        """(2 P), interleaved."""
        return (2 * len(self.Lambda),)

    def scan(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input (B, L, d_input) and state (B, 2 P) to output (B, L, d_output) and the next state; L at least 1."""
        into, out = interleaved(self.B.mT).to(u.dtype), (output_rows(self.C).mT / 2).to(u.dtype)
        T = max(_SAMPLES, _BLOCK // max(1, len(u) * len(self.Lambda)))
        constants, rate = (self.Lambda, self.dt, into, out), self.rate.reshape(-1, u.shape[1])
        y, last = in_blocks(self._block, T, from_interleaved(x.double()), constants, (u, rate))
        return torch.addcmul(y, self.D.to(u.dtype), u), interleaved(last).to(x.dtype)

    def _block(
        self, x: Tensor, Lambda: Tensor, dt: Tensor, into: Tensor, out: Tensor, u: Tensor, rate: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Some samples: outputs without D, and the next state."""
        less, varying, fixed = less_one(self.method, Lambda, torch.ones_like(Lambda), dt * rate[..., None])
        entered = fixed * from_interleaved((u @ into).double())
        states, last = recurrence(1 + less, varying * entered, x, dim=1)
        return interleaved(states).to(u.dtype) @ out, last

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input :math:`(*, d_{input})` and state :math:`(*, 2 P)` to output :math:`(*, d_{output})` and next state."""
        a, gain = self.method(self.Lambda, torch.ones_like(self.Lambda), self.dt * self.rate[..., None])
        entered = from_interleaved(u.double() @ interleaved(self.B.mT))
        new = interleaved(a * from_interleaved(x.double()) + gain * entered)
        y = (new @ output_rows(self.C).mT / 2).to(u.dtype)
        return torch.addcmul(y, self.D.to(u.dtype), u), new.to(x.dtype)
