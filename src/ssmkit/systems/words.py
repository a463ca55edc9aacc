"""The operations with which a system writes its step, so that a compiled program can run it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["Vector", "Words"]

Vector: TypeAlias = Any
"""The handle of a vector that exists when the program runs."""


class Words(ABC):
    r"""The operations with which :meth:`System.write` writes a step, on vectors that exist when the program runs.

    Each operation takes coefficients (tensors) and handles of vectors, and returns the handle of a new vector.
    :meth:`System.write` gets the handle of the input and returns that of the output. A handle has no public attributes.

    The operations :meth:`recur`, :meth:`per_feature`, :meth:`taps`, :meth:`select` and :meth:`heads` keep a state.
    Their states, in the order in which they are written, make up the system's state tensor.

    Example:
        >>> class Sum(ssmkit.systems.SharedDiagonal):
        ...     "The sum of the states, without an output matrix."
        ...     def write(self, words, u):
        ...         _, into, out = self.real_matrices()
        ...         x = words.recur(self.a, words.linear(into.mT, u))
        ...         return words.add(words.linear(out.mT, x), words.scale(self.D, u))
    """

    @abstractmethod
    def linear(self, weight: Tensor, v: Vector, bias: Tensor | None = None) -> Vector:
        """The product with a matrix of shape (outputs, inputs), and a bias."""

    @abstractmethod
    def scale(self, gain: Tensor, v: Vector) -> Vector:
        """The elementwise product with a tensor."""

    @abstractmethod
    def add(self, v: Vector, w: Vector) -> Vector:
        """The sum of two vectors."""

    @abstractmethod
    def multiply(self, v: Vector, w: Vector) -> Vector:
        """The elementwise product of two vectors."""

    @abstractmethod
    def softplus(self, v: Vector) -> Vector:
        """log(1 + e^v), elementwise."""

    @abstractmethod
    def recur(self, a: Tensor, v: Vector) -> Vector:
        r"""The new state :math:`x \leftarrow a \circ x + v` for complex poles (P); `v` and `x` are interleaved, 2 P."""

    @abstractmethod
    def per_feature(self, coefficients: Any, v: Vector) -> Vector:
        """The step of one system per feature, from its `step_coefficients()`; state (H, N), interleaved."""

    @abstractmethod
    def taps(self, w: Tensor, bias: Tensor, v: Vector) -> Vector:
        """A causal filter with taps (K, H), the last one for the present sample, and a bias (H); state (K - 1, H)."""

    @abstractmethod
    def select(
        self, A: Tensor, dt: Vector, B: Vector | Tensor, C: Vector | Tensor, D: Tensor, v: Vector, groups: int
    ) -> Vector:
        r"""The step of :class:`Selective`: :math:`h \leftarrow e^{\Delta A} h + \Delta v B^\top, y = h C + D v`.

        Real poles A (E, N), step sizes (E), gains of G groups (G N) or, if they are constant, tensors (E, N), and D
        (E); state (E, N).
        """

    @abstractmethod
    def heads(
        self,
        A: Tensor,
        dt_bias: Tensor,
        D: Tensor,
        v: Vector,
        *,
        d_state: int,
        groups: int,
        dt_limit: tuple[float, float],
        rate: float,
    ) -> Vector:
        """The step of :class:`Heads`; `v` is its input; state (H, P, N)."""
