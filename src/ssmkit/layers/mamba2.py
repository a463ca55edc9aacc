r"""Mamba-2: a state-space layer with one decay per head, and the block around it."""

from __future__ import annotations

import math
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks
from ..initializers import softplus_steps
from ..systems import Heads
from .branches import Concatenate, Product
from .chain import Chain, Sequential
from .pointwise import Pointwise
from .short_conv import ShortConv
from .statespace import StateSpaceLayer

__all__ = ["SSD", "GroupedRMSNorm", "Mamba2"]


class GroupedRMSNorm(nn.RMSNorm):
    r"""Root-mean-square norm over equal groups of neighbouring features, with one weight per feature.

    .. math:: y_i = w_i \, u_i \Big/ \sqrt{\epsilon + \tfrac1{|g|} \sum_{j \in g} u_j^2}, \qquad i \in g

    Arguments:
        d_model: The number of features.
        groups: How many groups there are.
        eps: :math:`\epsilon`.
        device, dtype: Of the weight.

    Example:
        >>> norm = ssmkit.layers.GroupedRMSNorm(4, 2, eps=0.0)
        >>> norm(torch.tensor([3.0, 3.0, 0.5, -0.5])).detach()
        tensor([ 1.,  1.,  1., -1.])
    """

    def __init__(
        self,
        d_model: int,
        groups: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, eps, device=device, dtype=dtype)
        self.groups = groups

    def forward(self, u: Tensor) -> Tensor:
        """Normalises the last axis."""
        parts = u.unflatten(-1, (self.groups, -1))
        y: Tensor = F.rms_norm(parts, parts.shape[-1:], None, self.eps).flatten(-2) * self.weight
        return y


@final
class SSD(StateSpaceLayer):
    r"""The core of Mamba-2: heads with one decay each, whose step sizes and gains are a part of the input.

    .. math::
        h_k = e^{\Delta_k A} h_{k-1} + \Delta_k x_k B_k^\top, \qquad y_k = h_k C_k + D \circ x_k,
        \qquad \Delta_k = \mathrm{clip}(\mathrm{softplus}(r_k + b_\Delta))

    Its input is :math:`[x_k, B_k, C_k, r_k]`, with :math:`H P + 2 G N + H` numbers; :class:`ssmkit.Mamba2` makes them.

    References:
        | Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality
        | (Dao and Gu, 2024), Sections 5 to 7
        | https://arxiv.org/abs/2405.21060

    Arguments:
        d_model: The number of features :math:`H P` of :math:`x`.
        d_state: The states :math:`N` of each feature.
        headdim: The features :math:`P` of a head.
        ngroups: Groups G of neighbouring heads that share :math:`B_k` and :math:`C_k`.
        A_init_range: The range in which :math:`-A` starts, uniform.
        dt_min, dt_max: The range of the initial :math:`\Delta` for :math:`r = 0`, log-uniform.
        dt_init_floor: The smallest initial :math:`\Delta`.
        dt_limit: The smallest and the largest :math:`\Delta` at all times, in every mode.
        D_has_hdim: Whether :math:`D` has a number for each feature instead of one for each head.
        dropout: The probability with which outputs are zeroed in training.
        device, dtype: Of the parameters; a real dtype.

    Shapes:
        - forward: `u` :math:`(*, L, H P + 2 G N + H)` to `y` :math:`(*, L, H P)`, any :math:`L \geq 0`.
        - step, scan: likewise, with a state in and out.
        - state: :math:`(*, H, P, N)`.
        - `A_log` :math:`(H)` with :math:`A = -e^{A_{log}}`, `dt_bias` :math:`(H)`, `D` :math:`(H)` or :math:`(H P)`.

    Units:
        :math:`\Delta` is in the time unit of :math:`A`; `rate` is a factor of it, after the limits, or a
        tensor with one factor per sample.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, `headdim` does not divide the features or `ngroups` the heads, or a range
            is not valid.

    Example:
        >>> layer = ssmkit.layers.SSD(16, d_state=4, headdim=8)
        >>> layer.d_input, layer(torch.randn(2, 50, layer.d_input)).shape
        (26, torch.Size([2, 50, 16]))
    """

    SSM_PARAMETERS: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")
    SYSTEM = Heads

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        *,
        headdim: int = 64,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        D_has_hdim: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checks.flags("SSD", D_has_hdim=D_has_hdim)
        heads = _heads("SSD", "d_model", d_model, d_state, headdim, ngroups)
        width = d_model + 2 * ngroups * d_state + heads
        super().__init__(width, d_model, (heads, headdim, d_state), dropout=dropout)
        self.d_model, self.d_state, self.headdim, self.nheads, self.ngroups = d_model, d_state, headdim, heads, ngroups
        self.A_init_range = _range("SSD", "A_init_range", A_init_range)
        _checks.positive("SSD", "A_init_range[0]", A_init_range[0])
        self.dt_min, self.dt_max = _checks.positive_range("SSD", "dt_min", dt_min, "dt_max", dt_max)
        self.dt_init_floor = _checks.step_size("SSD", "dt_init_floor", dt_init_floor)
        self.dt_limit, self.D_has_hdim = _range("SSD", "dt_limit", dt_limit), D_has_hdim

        given = _checks.given("SSD", device, dtype)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **given))

        self.A_log, self.dt_bias = parameter(heads), parameter(heads)
        self.D = parameter(d_model if D_has_hdim else heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all parameters."""
        low, high = self.A_init_range
        with torch.no_grad():
            self.A_log.copy_((low + (high - low) * torch.rand(self.nheads, dtype=torch.double)).log())
            self.dt_bias.copy_(softplus_steps((self.nheads,), self.dt_min, self.dt_max, self.dt_init_floor))
            self.D.fill_(1.0)

    def timed(self, rate: Tensor) -> Heads:
        r"""Makes the system for samples at irregular times: :math:`\Delta_k` is multiplied by :math:`rate_k`.

        The result is not exact, as :math:`B` enters by Euler's rule.

        Arguments:
            rate: For each sample the interval that ends at it, in steps, with shape :math:`(*, L)`, or :math:`(*)` for
                a step.

        Returns:
            The system.
        """
        return self._system(rate)

    def discretize(self, rate: float) -> Heads:
        """Makes the system of the current weights, with gradients to them.

        Arguments:
            rate: The factor of the step sizes.

        Returns:
            The system.
        """
        return self._system(rate)

    def _system(self, rate: float | Tensor) -> Heads:
        D = self.D.reshape(self.nheads, -1).expand(-1, self.headdim)
        A = -self.A_log.double().exp()
        return Heads(A, self.dt_bias, D, self.d_state, self.ngroups, self.dt_limit, rate)

    def extra_repr(self) -> str:
        """The main arguments, and others if they are set."""
        shown = f"{self.d_model}, d_state={self.d_state}, headdim={self.headdim}"
        return shown + (f", ngroups={self.ngroups}" if self.ngroups > 1 else "")


@final
class Mamba2(Chain):
    r"""Mamba-2 block: heads with one decay each, between linear maps, with a short convolution, a gate and a norm.

    .. math::
        y = W_{out}\, \mathrm{RMSNorm}\left( \mathrm{SSD}\left([\mathrm{SiLU}(\mathrm{ShortConv}(W_{xBC} u)),
        W_\Delta u]\right) \odot \mathrm{SiLU}(W_z u) \right)

    It has no residual connection: a network is made of `ssmkit.Residual(torch.nn.RMSNorm(d), ssmkit.Mamba2(d))`.
    Compared with :class:`ssmkit.Mamba` it has many more states at the same cost, since a chunk is a few matrix
    products, but only one decay for a whole head.

    References:
        | Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality
        | (Dao and Gu, 2024), Section 7
        | https://arxiv.org/abs/2405.21060

    Arguments:
        d_model: The width of input and output.
        d_state: The states :math:`N` of each inner feature.
        d_conv: The taps of the short convolution.
        expand: The number of inner features as a multiple of `d_model`.
        headdim: The inner features of a head.
        ngroups: Groups of heads that share :math:`B` and :math:`C`; the norm has as many.
        rmsnorm: Whether there is a norm before the last linear map.
        norm_before_gate: Whether the norm comes before the gate.
        conv_bias: Whether the short convolution has a bias.
        bias: Whether the linear maps have one.
        A_init_range, dt_min, dt_max, dt_init_floor, dt_limit, D_has_hdim: As in :class:`ssmkit.layers.SSD`.
        device, dtype: Of the parameters; a real dtype.

    Shapes:
        - forward: `u` :math:`(*, L, d_{model})` to `y` of the same shape, any :math:`L \geq 0`.
        - step, scan: likewise, with a state in and out.
        - state: tuples, with the last :math:`d_{conv} - 1` inputs of the convolution and the :math:`(*, H, P, N)` of
          the heads.
        - parts by name: `block["mixer"]["ssm"]["input"]` has `xBC` (`in_proj`, `conv`, `activation`) and `dt`,
          `block["mixer"]["ssm"]["ssd"]` is the core, `block["mixer"]["z"]` has `in_proj` and `activation`; then come
          `block["norm"]` (in `block["mixer"]["ssm"]`, if it comes before the gate) and `block["out_proj"]`.

    Units:
        `rate` is a factor of the step sizes. The short convolution counts samples.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, `headdim` does not divide the features or `ngroups` the heads, or a range
            is not valid.

    Example:
        >>> block = ssmkit.Mamba2(16, d_state=8, headdim=8)
        >>> block(torch.randn(2, 50, 16)).shape
        torch.Size([2, 50, 16])
        >>> block["mixer"]["ssm"]["ssd"]
        SSD(32, d_state=8, headdim=8)
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        *,
        ngroups: int = 1,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        conv_bias: bool = True,
        bias: bool = False,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        D_has_hdim: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("d_model", d_model), ("d_conv", d_conv), ("expand", expand)):
            _checks.integer("Mamba2", name, value)
        _checks.flags(
            "Mamba2",
            rmsnorm=rmsnorm,
            norm_before_gate=norm_before_gate,
            conv_bias=conv_bias,
            bias=bias,
            D_has_hdim=D_has_hdim,
        )
        E = expand * d_model
        heads = _heads("Mamba2", "expand * d_model", E, d_state, headdim, ngroups)
        _range("Mamba2", "A_init_range", A_init_range)
        _checks.positive("Mamba2", "A_init_range[0]", A_init_range[0])
        _checks.positive_range("Mamba2", "dt_min", dt_min, "dt_max", dt_max)
        _checks.step_size("Mamba2", "dt_init_floor", dt_init_floor)
        _range("Mamba2", "dt_limit", dt_limit)
        given = _checks.given("Mamba2", device, dtype)

        def linear(d_in: int, d_out: int) -> nn.Module:
            return nn.Linear(d_in, d_out, bias=bias, **given)

        def norm() -> dict[str, nn.Module]:
            return {"norm": _norm(E, ngroups, **given)} if rmsnorm else {}

        core = SSD(
            E,
            d_state,
            headdim=headdim,
            ngroups=ngroups,
            A_init_range=A_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            D_has_hdim=D_has_hdim,
            **given,
        )
        mixed = E + 2 * ngroups * d_state
        conv = ShortConv(mixed, d_conv, bias=conv_bias, any_rate=True, **given)
        xBC = Sequential({"in_proj": linear(d_model, mixed), "conv": conv, "activation": nn.SiLU()})
        before, after = (norm(), {}) if norm_before_gate else ({}, norm())
        ssm = Sequential({"input": Concatenate({"xBC": xBC, "dt": linear(d_model, heads)}), "ssd": core, **before})
        z = Sequential({"in_proj": linear(d_model, E), "activation": nn.SiLU()})
        super().__init__({"mixer": Product({"ssm": ssm, "z": z}), **after, "out_proj": linear(E, d_model)})


def _norm(d_model: int, groups: int, **given: Any) -> nn.Module:
    if groups == 1:
        return nn.RMSNorm(d_model, 1e-5, **given)
    return Pointwise(GroupedRMSNorm(d_model, groups, **given))


def _heads(where: str, name: str, width: int, d_state: int, headdim: int, ngroups: int) -> int:
    """The number of heads, from checked sizes."""
    for label, value in ((name, width), ("d_state", d_state), ("headdim", headdim), ("ngroups", ngroups)):
        _checks.integer(where, label, value)
    if width % headdim:
        raise ValueError(f"{where}: `headdim` must divide `{name}`, got {headdim} and {width}.")
    heads = width // headdim
    if heads % ngroups:
        raise ValueError(f"{where}: `ngroups` must divide the number of heads, got {ngroups} and {heads}.")
    return heads


def _range(where: str, name: str, value: tuple[float, float]) -> tuple[float, float]:
    """A range (low, high) of numbers that are at least 0; the upper end may be infinite."""
    numbers = isinstance(value, (tuple, list)) and len(value) == 2
    if not numbers or not all(type(v) in (int, float) for v in value) or not 0 <= value[0] <= value[1]:
        raise ValueError(f"{where}: `{name}` must be two numbers (low, high) with 0 <= low <= high, got {value!r}.")
    return (float(value[0]), float(value[1]))
