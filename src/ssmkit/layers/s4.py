r"""S4: a state-space layer with a diagonal-plus-low-rank state matrix."""

from __future__ import annotations

from typing import ClassVar, NoReturn, final

import torch
from torch import Tensor, nn

from .. import _checks
from ..initializers import Init, poles
from ..ops.complex import to_pairs
from ..systems import DPLR, DiscreteDPLR
from .featurewise import FeaturewiseLayer, pair

__all__ = ["S4"]


@final
class S4(FeaturewiseLayer):
    r"""Structured state-space layer (S4) with a diagonal-plus-low-rank state matrix.

    Each of the :math:`H` features is filtered by its own linear system

    .. math:: s'(t) = (\Lambda - P P^*)\, s(t) + B u(t), \qquad y(t) = 2 \Re\, C s(t) + D u(t),

    sampled every :math:`\Delta` by the bilinear rule, with :math:`s` one of each conjugate pair of a real state of size
    :math:`N`. :meth:`forward` applies it to a whole sequence as a convolution; :meth:`step` to one sample as a
    recurrence; :meth:`scan` to a chunk. They agree to rounding. `C` is the true output matrix: no weight depends on a
    length.

    References:
        | Efficiently Modeling Long Sequences with Structured State Spaces (Gu et al., 2022)
        | https://arxiv.org/abs/2111.00396 (Theorem 1; Appendix C)
        | It's Raw! Audio Generation with State-Space Models (Goel et al., 2022)
        | https://arxiv.org/abs/2202.09729 (Section 4.1: the stable form with :math:`Q = P`)

    Arguments:
        d_model: The number of features :math:`H`.
        d_state: The size :math:`N` of the real state of each feature; even, as poles come in conjugate pairs. The first
            layer of a size diagonalises an :math:`N \times N` matrix, which takes seconds for a thousand states; later
            layers use the result.
        init: Where `A` and `B` start: `"legs"`, `"legt"`, `"lagt"`, `"fout"`, or a function :math:`N \mapsto (A, B)`
            such as :func:`ssmkit.hippo.legs`.
        rank: The rank of :math:`P`; by default that of the initialisation (1, and 2 for LegT).
        dt_min, dt_max: The range of the initial :math:`\Delta`, log-uniform.
        discretization: `"bilinear"`, which keeps the matrix diagonal plus low rank (zero-order hold does not).
        n_ssm: How many different :math:`(\Lambda, P, B)` there are; feature :math:`h` uses number
            :math:`h \bmod n_{ssm}`. By default one per feature.
        tie_dt: Whether features that share a system share its :math:`\Delta` as well; then it is computed once.
        channels: Outputs per feature.
        bidirectional: Whether the output also depends on the future, through a second set of output matrices; such a
            layer has only :meth:`forward`.
        dropout: The probability with which outputs are zeroed in training.
        device, dtype: Of the parameters; a real dtype.

    Shapes:
        - forward: `u` :math:`(*, L, H)` to `y` :math:`(*, L, channels \cdot H)`, any :math:`L \geq 0`.
        - step: `u` :math:`(*, H)` and a state to `y` :math:`(*, channels \cdot H)` and the next state.
        - scan: as forward, with a state in and out.
        - state: :math:`(*, H, N)`, real.

    Units:
        :math:`\Delta` is one sample in the time unit of :math:`A`. That unit is arbitrary: only :math:`\Delta A`
        matters, and a pole :math:`\lambda` is forgotten over about :math:`1 / (\Delta\, |\Re \lambda|)` samples; for
        :math:`\Re \lambda = -1/2` and the default range 0.001 to 0.1, that is 2000 down to 20 samples.

    Raises:
        TypeError: If a size or the rank is not an integer.
        ValueError: If `d_state` is not a positive even integer, `dt_min >= dt_max`, `n_ssm` does not divide
            `d_model`, `init` is unknown, `rank` is less than that of `init`, or `discretization` is not `"bilinear"`.

    Note:
        :meth:`step` and :meth:`scan` take the discretised system from :meth:`system` when given one; a loop should make
        it once. After an optimiser step, make a new one. Train `log_dt`, `log_A_real`, `A_imag`, `B` and `P` at a
        smaller rate and without weight decay: see :func:`ssmkit.param_groups`.

    Example:
        >>> layer = ssmkit.S4(d_model=4, d_state=8).double()
        >>> u = torch.randn(2, 50, 4, dtype=torch.float64)
        >>> y = layer(u)
        >>> y.shape
        torch.Size([2, 50, 4])
        >>> state, system = layer.initial_state(2), layer.system()
        >>> for k in range(50):
        ...     y_k, state = layer.step(u[:, k], state, system)
        >>> torch.allclose(y_k, y[:, -1])
        True
        >>> ssmkit.S4(d_model=4, d_state=7)
        Traceback (most recent call last):
            ...
        ValueError: S4: `d_state` must be a positive even integer (poles come in conjugate pairs), got 7.
    """

    SSM_PARAMETERS: ClassVar[tuple[str, ...]] = ("log_dt", "log_A_real", "A_imag", "B", "P")
    SYSTEM = DiscreteDPLR

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        init: str | Init = "legs",
        rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        discretization: str = "bilinear",
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
        if not (isinstance(discretization, str) and discretization == "bilinear"):
            raise ValueError(
                f"S4: `discretization` must be 'bilinear', the rule that keeps the matrix diagonal plus low rank, got "
                f"{discretization!r}; S4D also has 'zoh'."
            )
        if isinstance(rank, int) and rank == 0:
            raise ValueError(f"S4: `rank` must be at least 1, got {rank}; a layer of rank 0 is S4D.")
        if rank is not None:
            _checks.integer("S4", "rank", rank)
        self.init, self.rank = init, rank
        P = poles("S4", init, d_state, rank).P
        self.P = nn.Parameter(torch.empty(self.n_ssm, *P.shape, 2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all parameters."""
        start = poles("S4", self.init, self.d_state, self.rank)
        self._reset_shared(start.Lambda, start.B)
        with torch.no_grad():
            self.P.copy_(to_pairs(start.P).expand_as(self.P))

    def timed(self, rate: Tensor) -> NoReturn:
        """Refuses."""
        raise ValueError(
            "S4: `rate` must be a number, got a tensor: its matrix is not diagonal, and would have to be inverted for "
            "every sample; use S4D or S5."
        )

    def _discretize(self, dt: Tensor, dtype: torch.dtype, D: Tensor) -> DiscreteDPLR:
        return DPLR(self._poles, pair(self.P), pair(self.B), pair(self.C)).discretize(dt, dtype, D)
