r"""Dropout with one mask per sequence."""

from __future__ import annotations

from typing import cast, final

import torch
from torch import Tensor

from .. import _checks
from ..states import State
from .base import SequenceLayer, System, at_least_float32

__all__ = ["TiedDropout"]


@final
class TiedDropout(SequenceLayer):
    r"""Dropout with one mask for the whole sequence: a feature is dropped at every time step, or at none.

    :meth:`forward` and :meth:`initial_state` draw a new mask for every sequence of the batch; in :meth:`step` and
    :meth:`scan` the mask is the state, so that a stream keeps it. It is applied in training only.

    References:
        | A Theoretically Grounded Application of Dropout in Recurrent Neural Networks (Gal and Ghahramani, 2016)
        | https://arxiv.org/abs/1512.05287

    Arguments:
        d_model: The number of features :math:`H`.
        p: The probability with which a feature is dropped; what is kept is scaled by :math:`1 / (1 - p)`.

    Raises:
        ValueError: If `p` is not at least 0 and less than 1.

    Example:
        >>> layer = ssmkit.TiedDropout(4, p=0.5)
        >>> y = layer(torch.ones(2, 100, 4))
        >>> bool((y == y[:, :1]).all())
        True
    """

    def __init__(self, d_model: int, p: float = 0.5) -> None:
        super().__init__()
        self.d_input = self.d_output = self.d_model = _checks.integer("TiedDropout", "d_model", d_model)
        self.p = _checks.probability("TiedDropout", "p", p)

    def forward(self, u: Tensor, system: System = None) -> Tensor:
        """Maps a whole sequence with a mask drawn for it."""
        _checks.sequence("TiedDropout", "u", u, self.d_model)
        mask = self.initial_state(*u.shape[:-2], device=u.device, dtype=u.dtype)
        return self._apply_mask(u, cast(Tensor, mask)[..., None, :])

    def system(self, rate: float | Tensor = 1.0) -> System:
        """Nothing to discretise: `()`, at any rate."""
        _checks.rate("TiedDropout", rate)
        return ()

    def initial_state(
        self, *batch_shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Draws the mask of a stream: 0 for a dropped feature and 1 / (1 - p) for a kept one."""
        _checks.batch("TiedDropout", batch_shape)
        given = _checks.given("TiedDropout", device, dtype)
        kept = torch.rand(*batch_shape, self.d_model, device=given["device"]) >= self.p
        return kept.to(at_least_float32(dtype or torch.float32)) / (1 - self.p)

    def step(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps one sample with the mask of the state."""
        _checks.last_axis("TiedDropout", "u", _checks.floating("TiedDropout", "u", u), self.d_model)
        mask = _checks.state("TiedDropout", state, u.shape, u)
        return self._apply_mask(u, mask), mask

    def scan(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps a chunk with the mask of the state."""
        _checks.sequence("TiedDropout", "u", u, self.d_model)
        mask = _checks.state("TiedDropout", state, (*u.shape[:-2], self.d_model), u)
        return self._apply_mask(u, mask[..., None, :]), mask

    def _apply_mask(self, u: Tensor, mask: Tensor) -> Tensor:
        return u * mask.to(u.dtype) if self.training else u

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.d_model}, p={self.p}"
