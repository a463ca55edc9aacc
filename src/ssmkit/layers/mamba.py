r"""Mamba: the selective state-space layer, and the block around it."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from .. import _checks
from ..initializers import softplus_steps
from ..systems import Selective
from .branches import Product
from .chain import Chain, Sequential
from .short_conv import ShortConv
from .statespace import StateSpaceLayer

__all__ = ["S6", "Mamba"]


def _rank(where: str, dt_rank: int | None, width: int) -> int:
    """The rank of the map to step sizes: by default a sixteenth of a width."""
    return math.ceil(width / 16) if dt_rank is None else _checks.integer(where, "dt_rank", dt_rank)


@final
class S6(StateSpaceLayer):
    r"""Selective state-space layer (S6), the core of Mamba: step sizes and gains depend on the input.

    .. math::
        h_k &= e^{\Delta_k A} \circ h_{k-1} + (\Delta_k \circ u_k) B_k^\top, \qquad y_k = h_k C_k + D \circ u_k, \\
        \Delta_k &= \mathrm{softplus}(W_\Delta r_k + b_\Delta), \qquad [r_k, B_k, C_k] = W u_k

    for each of :math:`E` features with N real states. A sample can be kept (large :math:`\Delta`) or ignored (small
    :math:`\Delta`), which is not possible with fixed coefficients. For signals such as audio, where this is not needed,
    :class:`ssmkit.S4D` is much cheaper.

    References:
        | Mamba: Linear-Time Sequence Modeling with Selective State Spaces (Gu and Dao, 2023), Section 3
        | https://arxiv.org/abs/2312.00752

    As in the authors' code, :math:`B` enters by Euler's rule, :math:`\Delta B`, and not by a zero-order hold.

    Arguments:
        d_model: The number of features :math:`E`.
        d_state: The states :math:`N` of each feature.
        dt_rank: The rank of the map from the input to step sizes; by default :math:`\lceil E / 16 \rceil`.
        ngroups: Groups of neighbouring features with :math:`B_k` and :math:`C_k` of their own.
        variable_B, variable_C: Whether the gains depend on the input; else they are parameters, :math:`(E, N)`.
        dt_min, dt_max: The range of the initial :math:`\Delta` for an input of zero, log-uniform.
        dt_init_floor: The smallest initial :math:`\Delta`.
        dropout: The probability with which outputs are zeroed in training.
        device, dtype: Of the parameters; a real dtype.

    Shapes:
        - forward: `u` :math:`(*, L, E)` to `y` :math:`(*, L, E)`, any :math:`L \geq 0`.
        - step: `u` :math:`(*, E)` and a state to `y` :math:`(*, E)` and the next state.
        - scan: as forward, with a state in and out.
        - state: :math:`(*, E, N)`.
        - `x_proj.weight` :math:`(R + 2 G N, E)`, `dt_proj.weight` :math:`(E, R)`, `dt_proj.bias` :math:`(E)`, `A_log`
          :math:`(E, N)` with :math:`A = -e^{A_{log}}`, `D` :math:`(E)`.

    Units:
        :math:`\Delta` is in the time unit of :math:`A`; `rate` is a factor of it, or a tensor with one factor per
        sample.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, if `ngroups` does not divide `d_model`, or if `dt_min >= dt_max`.

    Example:
        >>> layer = ssmkit.S6(32, d_state=8)
        >>> layer(torch.randn(2, 50, 32)).shape, layer.initial_state(2).shape
        (torch.Size([2, 50, 32]), torch.Size([2, 32, 8]))
    """

    SSM_PARAMETERS: ClassVar[tuple[str, ...]] = ("A_log", "D", "B")
    SYSTEM = Selective

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        *,
        dt_rank: int | None = None,
        ngroups: int = 1,
        variable_B: bool = True,
        variable_C: bool = True,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init_floor: float = 1e-4,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checks.flags("S6", variable_B=variable_B, variable_C=variable_C)
        _checks.integer("S6", "d_model", d_model)
        _checks.integer("S6", "d_state", d_state)
        super().__init__(d_model, d_model, (d_model, d_state), dropout=dropout)
        self.d_model, self.d_state, self.dt_rank = d_model, d_state, _rank("S6", dt_rank, d_model)
        self.ngroups = _checks.integer("S6", "ngroups", ngroups)
        if d_model % ngroups:
            raise ValueError(f"S6: `ngroups` must divide `d_model`, got {ngroups} and {d_model}.")
        self.dt_min, self.dt_max = _checks.positive_range("S6", "dt_min", dt_min, "dt_max", dt_max)
        self.dt_init_floor = _checks.step_size("S6", "dt_init_floor", dt_init_floor)
        given = _checks.given("S6", device, dtype)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **given))

        varying = ngroups * d_state * (variable_B + variable_C)
        self.x_proj = nn.Linear(d_model, self.dt_rank + varying, bias=False, **given)
        self.dt_proj = nn.Linear(self.dt_rank, d_model, **given)
        self.A_log = parameter(d_model, d_state)
        self.D = parameter(d_model)
        self.B = None if variable_B else parameter(d_model, d_state)
        self.C = None if variable_C else parameter(d_model, d_state)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        r"""Initialises all parameters: :math:`A_n = -n`, `D = 1`; fixed gains `B` with 1, and `C` at random."""
        self.x_proj.reset_parameters()
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.d_state + 1, dtype=torch.double).log().expand_as(self.A_log))
            self.D.fill_(1.0)
            nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            self.dt_proj.bias.copy_(softplus_steps((self.d_model,), self.dt_min, self.dt_max, self.dt_init_floor))
            if self.B is not None:
                self.B.fill_(1.0)
            if self.C is not None:
                self.C.copy_(torch.randn(self.C.shape) / self.d_state**0.5)

    def timed(self, rate: Tensor) -> Selective:
        r"""Makes the system for samples at irregular times: :math:`\Delta_k` is multiplied by :math:`rate_k`.

        The result is not exact, as :math:`B` enters by Euler's rule.

        Arguments:
            rate: For each sample the interval that ends at it, in steps, with shape :math:`(*, L)`, or :math:`(*)` for
                a step.

        Returns:
            The system.
        """
        return self._system(rate)

    def discretize(self, rate: float) -> Selective:
        """Makes the system of the current weights, with gradients to them.

        Arguments:
            rate: The factor of the step sizes.

        Returns:
            The system.
        """
        return self._system(rate)

    def _system(self, rate: float | Tensor) -> Selective:
        return Selective(
            -self.A_log.double().exp(),
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            self.D,
            self.B,
            self.C,
            self.ngroups,
            rate,
        )

    def extra_repr(self) -> str:
        """The main arguments, and others if they are set."""
        shown = f"{self.d_model}, d_state={self.d_state}, dt_rank={self.dt_rank}"
        return shown + (f", ngroups={self.ngroups}" if self.ngroups > 1 else "")


@final
class Mamba(Chain):
    r"""Mamba block: a selective state-space layer between two linear maps, with a short convolution and a gate.

    .. math::
        y = W_{out} \left( \mathrm{S6}\left(\mathrm{SiLU}(\mathrm{ShortConv}(W_x u))\right) \odot \mathrm{SiLU}(W_z u)
        \right)

    It has neither a norm nor a residual connection: a network is made of
    `ssmkit.Residual(torch.nn.RMSNorm(d), ssmkit.Mamba(d))`. It is a chain of torch's linear maps,
    :class:`ssmkit.Product`, :class:`ssmkit.ShortConv` and :class:`ssmkit.S6`, so that its state holds those of the
    convolution and of the recurrence.

    References:
        | Mamba: Linear-Time Sequence Modeling with Selective State Spaces (Gu and Dao, 2023), Section 3.4
        | https://arxiv.org/abs/2312.00752

    Arguments:
        d_model: The width of input and output.
        d_state: The states :math:`N` of each inner feature.
        d_conv: The taps of the short convolution.
        expand: The number of inner features as a multiple of `d_model`.
        dt_rank: The rank of the map to step sizes; by default :math:`\lceil d_{model} / 16 \rceil`.
        conv_bias: Whether the short convolution has a bias.
        bias: Whether the linear maps :math:`W_x, W_z, W_{out}` have one.
        dt_min, dt_max: The range of the initial :math:`\Delta`, log-uniform.
        dt_init_floor: The smallest initial :math:`\Delta`.
        device, dtype: Of the parameters; a real dtype.

    Shapes:
        - forward: `u` :math:`(*, L, d_{model})` to `y` of the same shape, any :math:`L \geq 0`.
        - step: `u` :math:`(*, d_{model})` and a state to `y` and the next state.
        - scan: as forward, with a state in and out.
        - state: tuples, with the last :math:`d_{conv} - 1` inputs of the convolution and the :math:`(*, E, N)` of S6.
        - parts by name: `block["mixer"]["x"]` has `in_proj`, `conv`, `activation` and `ssm`, `block["mixer"]["z"]` has
          `in_proj` and `activation`, and `block["out_proj"]` is the last linear map.

    Units:
        As in :class:`ssmkit.S6`: `rate` is a factor of its step sizes. The short convolution counts samples.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, or if `dt_min >= dt_max`.

    Example:
        >>> block = ssmkit.Mamba(16)
        >>> block(torch.randn(2, 50, 16)).shape
        torch.Size([2, 50, 16])
        >>> block["mixer"]["x"]["ssm"].A_log.shape
        torch.Size([32, 16])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        *,
        dt_rank: int | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init_floor: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv), ("expand", expand)):
            _checks.integer("Mamba", name, value)
        _checks.flags("Mamba", conv_bias=conv_bias, bias=bias)
        _checks.positive_range("Mamba", "dt_min", dt_min, "dt_max", dt_max)
        _checks.step_size("Mamba", "dt_init_floor", dt_init_floor)
        given = _checks.given("Mamba", device, dtype)
        E = expand * d_model
        core = S6(
            E,
            d_state,
            dt_rank=_rank("Mamba", dt_rank, d_model),
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            **given,
        )
        conv = ShortConv(E, d_conv, bias=conv_bias, any_rate=True, **given)
        x = {"in_proj": nn.Linear(d_model, E, bias=bias, **given), "conv": conv, "activation": nn.SiLU(), "ssm": core}
        z = {"in_proj": nn.Linear(d_model, E, bias=bias, **given), "activation": nn.SiLU()}
        out_proj = nn.Linear(E, d_model, bias=bias, **given)
        super().__init__({"mixer": Product({"x": Sequential(x), "z": Sequential(z)}), "out_proj": out_proj})
