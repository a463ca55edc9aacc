r"""S4D: a state-space layer with a diagonal state matrix."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from .. import _checks
from ..initializers import Init, poles
from ..systems import Diagonal, DiscreteDiagonal, TimedDiagonal
from ..systems.diagonal import DISCRETIZATIONS, Discretization
from .base import at_least_float32
from .featurewise import FeaturewiseLayer, pair

__all__ = ["S4D"]


@final
class S4D(FeaturewiseLayer):
    r"""Diagonal state-space layer (S4D).

    Each of the :math:`H` features is filtered by its own linear system

    .. math:: s'(t) = \Lambda \circ s(t) + B u(t), \qquad y(t) = 2 \Re\, C s(t) + D u(t),

    sampled every :math:`\Delta`, with :math:`s` one of each conjugate pair of a real state of size :math:`N`.
    :meth:`forward` applies it to a whole sequence as a convolution; :meth:`step` to one sample as a recurrence;
    :meth:`scan` to a chunk. They agree to rounding. Simpler and a little cheaper than :class:`ssmkit.S4`, and often as
    good.

    References:
        | On the Parameterization and Initialization of Diagonal State Space Models (Gu et al., 2022)
        | https://arxiv.org/abs/2206.11893

    Arguments:
        d_model: The number of features :math:`H`.
        d_state: The size :math:`N` of the real state of each feature; even, as poles come in conjugate pairs.
        init: Where :math:`\Lambda` and `B` start: `"legs"`, `"lin"`, `"inv"`, `"quad"`, `"real"`, the diagonal part of
            `"legt"`, `"lagt"` or `"fout"`, or a function :math:`N \mapsto (\Lambda, B)` of complex vectors of size
            :math:`N/2`, or :math:`N \mapsto (A, B)` of a real matrix and vector, whose diagonal part is taken.
        dt_min, dt_max: The range of the initial :math:`\Delta`, log-uniform.
        discretization: `"zoh"`, `"bilinear"`, or a function like :func:`ssmkit.systems.zoh`.
        n_ssm: How many different :math:`(\Lambda, B)` there are; feature :math:`h` uses number
            :math:`h \bmod n_{ssm}`. By default one per feature.
        tie_dt: Whether features that share a system share its :math:`\Delta` as well; then it is computed once.
        channels: Outputs per feature.
        bidirectional: Whether the output also depends on the future, through a second set of output gains; such a
            layer has only :meth:`forward`.
        dropout: The probability with which outputs are zeroed in training.
        device, dtype: Of the parameters; a real dtype.

    Shapes:
        - forward: `u` :math:`(*, L, H)` to `y` :math:`(*, L, channels \cdot H)`, any :math:`L \geq 0`.
        - step: `u` :math:`(*, H)` and a state to `y` :math:`(*, channels \cdot H)` and the next state.
        - scan: as forward, with a state in and out.
        - state: :math:`(*, H, N)`, real.

    Units:
        As in :class:`ssmkit.S4`. For samples at irregular times, `rate` is a tensor.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If `d_state` is not a positive even integer, `dt_min >= dt_max`, `n_ssm` does not divide
            `d_model`, or `init` or `discretization` is unknown.

    Example:
        >>> layer = ssmkit.S4D(d_model=4, d_state=8, init="lin")
        >>> layer(torch.randn(2, 50, 4)).shape
        torch.Size([2, 50, 4])
        >>> ssmkit.S4D(4, discretization="foh")
        Traceback (most recent call last):
            ...
        ValueError: S4D: unknown `discretization` 'foh'; the known ones are bilinear, zoh. Did you mean 'zoh'?
    """

    SSM_PARAMETERS: ClassVar[tuple[str, ...]] = ("log_dt", "log_A_real", "A_imag", "B")
    SYSTEM = (DiscreteDiagonal, TimedDiagonal)

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        init: str | Init = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        discretization: str | Discretization = "zoh",
        n_ssm: int | None = None,
        tie_dt: bool = False,
        channels: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            d_state=d_state,
            dt_min=dt_min,
            dt_max=dt_max,
            n_ssm=n_ssm,
            tie_dt=tie_dt,
            channels=channels,
            bidirectional=bidirectional,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        _checks.choice("S4D", "discretization", discretization, DISCRETIZATIONS)
        self.init, self.discretization = init, discretization
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all parameters."""
        start = poles("S4D", self.init, self.d_state, rank=0)
        self._reset_shared(start.Lambda, start.B)

    def _discretize(self, dt: Tensor, dtype: torch.dtype, D: Tensor) -> DiscreteDiagonal:
        return Diagonal(self._poles, pair(self.B), pair(self.C)).discretize(dt, self.discretization, dtype, D)

    def timed(self, rate: Tensor) -> TimedDiagonal:
        """Makes the system for samples at irregular times, with gradients to the weights and to the rates.

        Arguments:
            rate: For each sample the interval that ends at it, in steps, with shape :math:`(*, L)`, or :math:`(*)` for
                a step.

        Returns:
            The system.
        """
        rule = DISCRETIZATIONS[self.discretization] if isinstance(self.discretization, str) else self.discretization
        D, dt = self.D.to(at_least_float32(self.C.dtype)), self.log_dt.double().exp()
        return TimedDiagonal(self._poles, pair(self.B), pair(self.C), D, dt, rate, rule)
