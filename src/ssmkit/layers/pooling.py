r"""Several rates in one network: pooling, unpooling, and the wrapper that runs a layer at a lower rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, cast, final

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks
from ..states import State, where
from .base import SequenceLayer, System, at_least_float32, refuse_forward_only
from .pointwise import UNFIT, refuse_input

__all__ = ["DownPool", "MultiRate", "UpPool"]


@final
class DownPool(nn.Module):
    r"""Lowers the rate: `pool` samples, side by side, become one frame of a wider sequence.

    .. math:: z_m = W\, \mathrm{vec}(u_{mp}, \dots, u_{mp+p-1}) + b

    A frame is ordered (feature, sample). A last frame that is not full is padded with zeros. This module has only
    `forward`; :class:`MultiRate` makes a sequence layer of it.

    References:
        | It's Raw! Audio Generation with State-Space Models (Goel et al., 2022), Section 4.2
        | https://arxiv.org/abs/2202.09729

    Arguments:
        d_model: The width it takes.
        pool: The number of samples :math:`p` in a frame.
        expand: The factor by which it widens the sequence.
        device, dtype: Of the parameters.

    Raises:
        ValueError: If a size is less than 1; in :meth:`forward`, if the last axis of `u` is not `d_model`.

    Example:
        >>> ssmkit.DownPool(2, pool=4, expand=2)(torch.randn(1, 64, 2)).shape
        torch.Size([1, 16, 4])
    """

    CHANGES_RATE: ClassVar[bool] = True
    """By this attribute containers refuse it: it is not position-wise."""

    def __init__(
        self,
        d_model: int,
        pool: int = 4,
        expand: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_input = _checks.integer("DownPool", "d_model", d_model)
        self.pool = _checks.integer("DownPool", "pool", pool)
        self.d_output = d_model * _checks.integer("DownPool", "expand", expand)
        self.linear = nn.Linear(d_model * pool, self.d_output, **_checks.given("DownPool", device, dtype))

    def forward(self, u: Tensor) -> Tensor:
        """Maps samples :math:`(*, L, d_{model})` to :math:`\\lceil L / p \\rceil` frames."""
        _checks.sequence("DownPool", "u", u, self.d_input)
        u = F.pad(u, (0, 0, 0, -u.shape[-2] % self.pool))
        return _linear("DownPool", "u", self.linear, rearrange(u, "... (l s) h -> ... l (h s)", s=self.pool))


@final
class UpPool(nn.Module):
    r"""Raises the rate: every frame becomes `pool` samples, **one frame later**.

    .. math:: (y_{mp}, \dots, y_{mp+p-1}) = \mathrm{vec}^{-1}(W w_{m-1} + b), \qquad y_0 = \dots = y_{p-1} = 0

    A frame depends on all of its samples, and may affect only later ones: the shift by one frame makes the network
    causal, so that it can run as a recurrence. This module has only `forward`; :class:`MultiRate` makes a sequence
    layer of it.

    References:
        | It's Raw! Audio Generation with State-Space Models (Goel et al., 2022), Section 4.2
        | https://arxiv.org/abs/2202.09729

    Arguments:
        d_model: The width it returns; it takes `expand` times that.
        pool: The number of samples :math:`p` in a frame.
        expand: The factor by which it narrows the sequence.
        device, dtype: Of the parameters.

    Raises:
        ValueError: If a size is less than 1; in :meth:`forward`, if the last axis of `w` is not `expand * d_model`.

    Example:
        >>> ssmkit.UpPool(2, pool=4, expand=2)(torch.randn(1, 16, 4)).shape
        torch.Size([1, 64, 2])
    """

    CHANGES_RATE: ClassVar[bool] = True
    """By this attribute containers refuse it: it is not position-wise."""

    def __init__(
        self,
        d_model: int,
        pool: int = 4,
        expand: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_output = _checks.integer("UpPool", "d_model", d_model)
        self.pool = _checks.integer("UpPool", "pool", pool)
        self.d_input = d_model * _checks.integer("UpPool", "expand", expand)
        self.linear = nn.Linear(self.d_input, d_model * pool, **_checks.given("UpPool", device, dtype))

    def forward(self, w: Tensor) -> Tensor:
        """Maps frames :math:`(*, M, expand \\cdot d_{model})` to samples :math:`(*, M p, d_{model})`."""
        _checks.sequence("UpPool", "w", w, self.d_input)
        return self.samples(F.pad(self.frames(w), (0, 0, 1, 0))[..., : w.shape[-2], :])

    def frames(self, w: Tensor) -> Tensor:
        """The outputs of the frames, before the shift: :math:`(*, d_{model} p)`."""
        return _linear("UpPool", "w", self.linear, w)

    def samples(self, frames: Tensor) -> Tensor:
        """Lays frames :math:`(*, M, d_{model} p)` out as samples :math:`(*, M p, d_{model})`."""
        return rearrange(frames, "... l (h s) -> ... (l s) h", s=self.pool)


@final
class MultiRate(SequenceLayer):
    r"""Runs a layer at a lower rate: :class:`DownPool`, the layer, :class:`UpPool`.

    .. math:: y_k = \mathrm{UpPool}(f(\mathrm{DownPool}(u)))_k

    depends on the full frames before sample :math:`k`, and not on the frame of sample :math:`k` itself. :meth:`step`
    gives an output at every sample; once in `pool` samples, when a frame is full, it runs the layer inside.

    The state holds the frame being filled, the frame being emitted, the phase (how many samples of the frame have been
    read) and the state of the layer inside. The phase is an integer if all rows of the batch have the same, and an
    integer tensor of the batch's shape if they differ; then a step runs the layer inside at every sample, and keeps its
    result only for the rows whose frame is full.

    Around a layer that is not causal, :meth:`forward` is the only mode. It runs all frames, the last one padded with
    zeros, and without the shift.

    References:
        | It's Raw! Audio Generation with State-Space Models (Goel et al., 2022), Section 4.2
        | https://arxiv.org/abs/2202.09729

    Arguments:
        d_model: The width outside.
        layer: The layer inside, which takes and gives width `expand * d_model`.
        pool: The number of samples in a frame.
        expand: The factor by which the sequence inside is wider.
        device, dtype: Of the parameters of the pooling.

    Shapes:
        - forward, scan: `u` :math:`(*, L, d_{model})` to `y` :math:`(*, L, d_{model})`, any :math:`L \geq 0`.
        - step: `u` :math:`(*, d_{model})` to `y` :math:`(*, d_{model})`.

    Raises:
        TypeError: If `layer` is not a sequence layer.
        ValueError: If the widths do not fit; in :meth:`system`, if `rate` is not 1 (frames are counted in samples); in
            the other methods but :meth:`forward`, if the layer inside is not causal.

    Example:
        >>> layer = ssmkit.MultiRate(2, ssmkit.S4D(4), pool=4)
        >>> u = torch.randn(1, 10, 2)
        >>> y, state = layer.scan(u[:, :7], layer.initial_state(1))
        >>> y_next, state = layer.step(u[:, 7], state)
        >>> torch.allclose(y_next, layer(u)[:, 7], atol=1e-5)
        True
    """

    d_input: int
    d_output: int

    def __init__(
        self,
        d_model: int,
        layer: SequenceLayer,
        pool: int = 4,
        expand: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(layer, SequenceLayer):
            raise TypeError(
                f"MultiRate: `layer` must be a `ssmkit.SequenceLayer`, got {type(layer).__name__}; "
                "wrap position-wise modules in `ssmkit.Sequential`."
            )
        for name, value in (("d_model", d_model), ("pool", pool), ("expand", expand)):
            _checks.integer("MultiRate", name, value)
        _checks.given("MultiRate", device, dtype)
        self.down = DownPool(d_model, pool, expand, device=device, dtype=dtype)
        self.layer = layer
        self.up = UpPool(d_model, pool, expand, device=device, dtype=dtype)
        inside = self.down.d_output
        if layer.d_input not in (None, inside) or layer.d_output not in (None, inside):
            raise ValueError(
                f"MultiRate: `layer` must take and give width {inside} (`expand * d_model`), "
                f"got {layer.d_input} in and {layer.d_output} out."
            )
        self.d_input = self.d_output = d_model
        self.pool = pool
        self.causal = layer.causal

    def forward_only_part(self) -> tuple[str, SequenceLayer]:
        """The part inside that is not causal: its path, and the part itself."""
        path, part = self.layer.forward_only_part()
        return "layer" + (f".{path}" if path else ""), part

    def forward(self, u: Tensor, system: System = None) -> Tensor:
        """Maps a whole sequence of any length, from rest."""
        _checks.sequence("MultiRate", "u", u, self.d_input)
        if not self.causal:
            frames = self.up.frames(self.layer(self.down(u), system))
            return self.up.samples(frames)[..., : u.shape[-2], :].to(u.dtype)
        # The last frame, full or not, affects no output of this sequence.
        full = max(0, u.shape[-2] - 1) // self.pool * self.pool
        frames = self.up.frames(self.layer(self.down(u[..., :full, :]), system))
        return self.up.samples(F.pad(frames, (0, 0, 1, 0)))[..., : u.shape[-2], :].to(u.dtype)

    def system(self, rate: float | Tensor = 1.0) -> System:
        """The system of the layer inside.

        Arguments:
            rate: 1, since frames are counted in samples.

        Returns:
            What the layer inside returns.

        Raises:
            ValueError: If `rate` is not 1.
        """
        _checks.rate("MultiRate", rate)
        if isinstance(rate, Tensor) or rate != 1.0:
            got = "a tensor" if isinstance(rate, Tensor) else repr(rate)
            raise ValueError(
                f"MultiRate: `rate` must be 1, got {got}: frames are counted in samples, so that a pooled network "
                "runs at the rate it was trained at; resample the audio instead."
            )
        return self.layer.system()

    def initial_state(
        self, *batch_shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Makes a state at rest, at the first sample of a frame."""
        if not self.causal:
            refuse_forward_only("MultiRate", "initial_state", self)
        weight = self.down.linear.weight
        _checks.batch("MultiRate", batch_shape)
        given = _checks.given("MultiRate", device, dtype)
        filling = torch.zeros(
            *batch_shape,
            self.pool,
            self.d_input,
            device=weight.device if device is None else given["device"],
            dtype=at_least_float32(given["dtype"] or weight.dtype),
        )
        # Two tensors: torch.export takes one that occurs twice for a single argument, and torch.compile guards it.
        return filling, torch.zeros_like(filling), 0, self.layer.initial_state(*batch_shape, device=device, dtype=dtype)

    def step(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps one sample; runs the layer inside when it fills a frame."""
        return self.step_by(lambda z, inner: self.layer.step(z, inner, system), u, state)

    def step_by(
        self, step: Callable[[Tensor, State], tuple[Tensor, State]], u: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """:meth:`step` with another step of the layer inside, such as a compiled one.

        Arguments:
            step: A function from an input and a state of the layer inside to an output and the next state.
            u: The input, with shape :math:`(*, d_{model})`.
            state: The state of the stream.

        Returns:
            The output, with shape :math:`(*, d_{model})`, and the next state.
        """
        if not self.causal:
            refuse_forward_only("MultiRate", "step", self)
        _checks.floating("MultiRate", "u", u)
        _checks.last_axis("MultiRate", "u", u, self.d_input)
        filling, emitting, phase, inner = self.parts(state, u.shape[:-1], u)
        y = emitting.select(-2, phase) if isinstance(phase, int) else _samples(emitting, phase, 1).squeeze(-2)
        filling = torch.cat([filling.narrow(-2, 1, self.pool - 1), u.to(filling.dtype).unsqueeze(-2)], dim=-2)
        phase = (phase + 1) % self.pool
        if not isinstance(phase, int) or phase == 0:
            z = self.down(filling.to(u.dtype))[..., 0, :]
            w, new = step(z, inner)
            frame = self.up.samples(self.up.frames(w)[..., None, :]).to(filling.dtype)
            full: State = (torch.zeros_like(filling), frame, new)
            if not isinstance(phase, int):
                full = where(phase == 0, full, (filling, emitting, inner))
            filling, emitting, inner = cast(tuple[Tensor, Tensor, State], full)
        return y.to(u.dtype), (filling, emitting, phase, inner)

    def scan(self, u: Tensor, state: State, system: System = None) -> tuple[Tensor, State]:
        """Maps a chunk of any length; a chunk may end inside a frame."""
        if not self.causal:
            refuse_forward_only("MultiRate", "scan", self)
        _checks.sequence("MultiRate", "u", u, self.d_input)
        filling, emitting, phase, inner = self.parts(state, u.shape[:-2], u)
        if not isinstance(phase, int):
            return self._scan_rows(u, filling, emitting, phase, inner, system)
        samples = torch.cat([filling[..., self.pool - phase :, :], u.to(filling.dtype)], dim=-2)
        full = samples.shape[-2] // self.pool * self.pool
        z = self.down(samples[..., :full, :].to(u.dtype))
        w, inner = self.layer.scan(z, inner, system)
        emitted = torch.cat([emitting, self.up.samples(self.up.frames(w)).to(filling.dtype)], dim=-2)
        y = emitted[..., phase : phase + u.shape[-2], :].to(u.dtype)
        rest = samples[..., full:, :]
        filling = F.pad(rest, (0, 0, self.pool - rest.shape[-2], 0))
        # A copy: a view would keep the whole chunk in memory.
        return y, (filling, emitted[..., full:, :].clone(), rest.shape[-2], inner)

    def _scan_rows(
        self, u: Tensor, filling: Tensor, emitting: Tensor, phase: Tensor, inner: State, system: System
    ) -> tuple[Tensor, State]:
        """:meth:`scan` of rows with different phases, which does not read their values."""
        L, pool = u.shape[-2], self.pool
        samples = torch.cat([filling, u.to(filling.dtype)], dim=-2)
        # L samples fill L // pool frames in all rows, and one more in rows whose phase is large enough.
        common, more = L // pool, L % pool > 0
        count = common + more
        z = self.down(_samples(samples, pool - phase, count * pool).to(u.dtype))
        w, inner = self.layer.scan(z[..., :common, :], inner, system)
        if more:
            w_last, inner_last = self.layer.scan(z[..., common:, :], inner, system)
            inner = where(phase + L >= count * pool, inner_last, inner)
            w = torch.cat([w, w_last], dim=-2)
        emitted = torch.cat([emitting, self.up.samples(self.up.frames(w)).to(filling.dtype)], dim=-2)
        y = _samples(emitted, phase, L).to(u.dtype)
        after = (phase + L) % pool
        emitting = _samples(emitted, phase + L - after, pool)
        read = torch.arange(pool, device=u.device) >= (pool - after).unsqueeze(-1)
        filling = torch.where(read.unsqueeze(-1), samples[..., L:, :], 0.0)
        return y, (filling, emitting, after, inner)

    def parts(
        self, state: State, batch_shape: Sequence[int], like: Tensor | None = None
    ) -> tuple[Tensor, Tensor, int | Tensor, State]:
        """Checks a state and takes it apart.

        Arguments:
            state: A state of this layer.
            batch_shape: The batch axes that it must have.
            like: The input, on whose device it must be; by default on any.

        Returns:
            The frame being filled, with its samples at the end, and the frame being emitted, both with shape
            :math:`(*, pool, d_{model})`; the phase, an integer or a tensor with shape :math:`(*)`; and the state of the
            layer inside.

        Raises:
            ValueError: If the state is of another layer or batch shape.
        """
        batch = tuple(batch_shape)
        if not isinstance(state, tuple) or len(state) != 4 or not self._is_phase(state[2], batch, like):
            raise ValueError(
                "MultiRate: `state` must be (frame being filled, frame being emitted, phase, inner state) with a "
                f"phase from 0 to {self.pool - 1}; make it with this layer's `initial_state(*batch_shape)`."
            )
        filling, emitting = (
            _checks.state("MultiRate", frame, (*batch, self.pool, self.d_input), like) for frame in state[:2]
        )
        phase = cast(int | Tensor, state[2])
        if isinstance(phase, Tensor) and phase.ndim < len(batch):
            # Concatenated states have phases for the first batch axis only.
            phase = phase.reshape(*phase.shape, *(1,) * (len(batch) - phase.ndim)).expand(batch)
        return filling, emitting, phase, state[3]

    def _is_phase(self, value: State, batch: tuple[int, ...], like: Tensor | None) -> bool:
        if isinstance(value, Tensor):
            if like is not None and value.device != like.device:
                return False
            return value.dtype in (torch.int64, torch.int32) and value.shape == batch[: value.ndim]
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < self.pool

    def extra_repr(self) -> str:
        """The factor of the rate."""
        return f"pool={self.pool}"


def _linear(where: str, name: str, linear: nn.Linear, u: Tensor) -> Tensor:
    """A linear map, whose errors become one sentence."""
    try:
        y: Tensor = linear(u)
    except UNFIT as error:
        refuse_input(where, name, u, linear, error)
    return y


def _samples(x: Tensor, start: Tensor, length: int) -> Tensor:
    """`length` samples of x (*, L, d), from another start in each row; outside of x, its first or last sample."""
    index = start.unsqueeze(-1) + torch.arange(length, device=x.device)
    return x.take_along_dim(index.clamp(0, x.shape[-2] - 1).unsqueeze(-1), dim=-2)
