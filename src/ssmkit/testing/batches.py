r"""Laws about batches of sequences: padding, packing and resets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import sequences, states
from ..layers.base import SequenceLayer
from ..states import State
from .common import RTOL, clone, evaluating, example_input, same, same_state, state_dtype, time_axis, weights

__all__ = ["assert_packing_is_independent", "assert_padding_has_no_effect", "assert_reset_is_start"]


def assert_padding_has_no_effect(
    layer: SequenceLayer,
    u: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    *,
    length: int = 37,
    rtol: float | None = None,
) -> None:
    r"""Asserts that padding does not change outputs, states and gradients.

    In eval mode, with :func:`ssmkit.sequences.forward_padded` and, for a causal layer,
    :func:`ssmkit.sequences.scan_padded`, and padding on either side:

    - outputs and states are those of each row alone, up to an error;
    - the values in the padding do not change a bit of them, and outputs are zero in the padding;
    - with NaN in the padding, the gradients of parameters and input are finite, and exactly 0 in the padding.

    Arguments:
        layer: A sequence layer or container, causal or not.
        u: A batch of shape :math:`(B, *, L, d_{input})`, or :math:`(B, *, L)` of class indices; by default a drawn
            batch of 6.
        lengths: The lengths of its rows; by default some from 0 to :math:`L`, two of them equal.
        length: The length :math:`L` of a drawn batch.
        rtol: The largest error allowed to the rows alone, as in :func:`assert_modes_agree`.

    Raises:
        AssertionError: If the law is broken; the message says how.

    Example:
        >>> assert_padding_has_no_effect(ssmkit.S4Block(4, ssmkit.S4(4, bidirectional=True)).double())
    """
    u = example_input(layer, 6, length) if u is None else u
    L = u.shape[time_axis(u)]
    # Two of one length, which run together in any case.
    some = (L // 3, 0, L, 1, L // 3, 2 * L // 3)
    given = [some[k % len(some)] for k in range(len(u))] if lengths is None else list(lengths)
    with evaluating(layer):
        for side in ("right", "left"):
            _Padding(layer, u, given, side, rtol).check()


class _Padding:
    def __init__(self, layer: SequenceLayer, u: Tensor, lengths: list[int], side: str, rtol: float | None) -> None:
        self.layer, self.u, self.lengths, self.side = layer, u, lengths, side
        self.name, self.rtol = type(layer).__name__, rtol
        L = u.shape[time_axis(u)]
        self.spans = [slice(0, n) if side == "right" else slice(L - n, L) for n in lengths]
        inside = torch.zeros(len(u), L, dtype=torch.bool, device=u.device)
        for row, span in zip(inside, self.spans, strict=True):
            row[span] = True
        shape = [1] * u.ndim
        shape[0], shape[time_axis(u)] = inside.shape
        self.inside = inside.reshape(shape)

    def check(self) -> None:
        with torch.no_grad():
            # Some modules of other libraries refuse empty sequences.
            self.outputs("forward_padded", self.forward, lambda row: self.layer(row) if row.numel() else None)
        self.gradients("forward_padded", self.forward)
        if not self.layer.causal:
            return
        with torch.no_grad():
            # A state that is not zero, from another input.
            rest = self.layer.initial_state(
                *self.u.shape[: time_axis(self.u)], device=self.u.device, dtype=state_dtype(self.u)
            )
            _, self.state = self.layer.scan(self.u.flip(time_axis(self.u)), rest)
            before = clone(self.state)
            row = iter(range(len(self.u)))
            alone: list[State] = []

            def scanned(u: Tensor) -> Tensor:
                i = next(row)
                y, state = self.layer.scan(u, states.select(before, slice(i, i + 1)))
                alone.append(state)
                return y

            self.outputs("scan_padded", lambda u: self.scan(u)[0], scanned)
            found = self.scan(self.u)[1]
            same_state(
                self.name,
                f"{self.where('scan_padded')} after NaN",
                "before",
                self.scan(self.filled(0))[1],
                found,
                rtol=0,
            )
            for i, state in enumerate(alone):
                what = f"row {i} of {self.where('scan_padded')}"
                mine = states.select(found, slice(i, i + 1))
                same_state(self.name, what, "the row alone", mine, state, rtol=self.bound(self.layer(self.u).dtype))
        self.gradients("scan_padded", lambda u: self.scan(u)[0])

    def forward(self, u: Tensor) -> Tensor:
        return sequences.forward_padded(self.layer, u, self.lengths, side=self.side)

    def scan(self, u: Tensor) -> tuple[Tensor, State]:
        return sequences.scan_padded(self.layer, u, self.state, self.lengths, side=self.side)

    def where(self, what: str) -> str:
        return f"`{what}` with padding on the {self.side}"

    def bound(self, dtype: torch.dtype) -> float:
        return RTOL[dtype] if self.rtol is None else self.rtol

    def filled(self, kind: int) -> Tensor:
        """The batch with other padding: NaN, or large numbers; of classes, the first, or others in another order."""
        if self.u.is_floating_point():
            return torch.where(self.inside, self.u, (torch.nan, 1e4)[kind])
        return torch.where(self.inside, self.u, (torch.zeros_like(self.u), self.u.flip(0, time_axis(self.u)))[kind])

    def outputs(self, what: str, run: Callable[[Tensor], Tensor], alone: Callable[[Tensor], Tensor | None]) -> None:
        y = run(self.u)
        for kind in range(2):
            other = run(self.filled(kind))
            same(self.name, f"{self.where(what)}, holding other values,", "before", other, y, rtol=0)
        for i, span in enumerate(self.spans):
            row = self.u[i : i + 1].narrow(time_axis(self.u), span.start, self.lengths[i])
            mine = y[i : i + 1].narrow(-2, span.start, self.lengths[i])
            expected, named = alone(row), f"row {i} of {self.where(what)}"
            if expected is not None:
                same(self.name, named, "the row alone", mine, expected, rtol=self.bound(y.dtype), scale=y)
        behind = self.inside if self.u.is_floating_point() else self.inside[..., None]
        if bool(torch.where(behind, 0, y).any()):
            raise AssertionError(f"{self.name}: {self.where(what)} is not zero where the padding is.")

    def gradients(self, what: str, run: Callable[[Tensor], Tensor]) -> None:
        u = self.filled(0)
        floats = u.is_floating_point()
        wanted = [p for p in self.layer.parameters() if p.requires_grad] + ([u.requires_grad_()] if floats else [])
        if not wanted:
            return
        with torch.enable_grad():
            y = run(u)
        if not y.requires_grad:
            return
        found = torch.autograd.grad((y * weights(y)).sum(), wanted, allow_unused=True)
        if any(g is not None and not bool(g.isfinite().all()) for g in found):
            raise AssertionError(f"{self.name}: {self.where(what)}, holding NaN, gives gradients that are not finite.")
        if floats and found[-1] is not None and bool(torch.where(self.inside, 0, found[-1]).any()):
            raise AssertionError(f"{self.name}: {self.where(what)} gives the padding a gradient.")


def assert_packing_is_independent(
    layer: SequenceLayer,
    u: Tensor | None = None,
    boundaries: Sequence[int] | None = None,
    *,
    length: int = 61,
    rtol: float | None = None,
) -> None:
    r"""Asserts that the sequences of a packed row do not depend on each other.

    In eval mode, with :func:`ssmkit.sequences.forward_packed` and, for a causal layer,
    :func:`ssmkit.sequences.scan_packed` in chunks and :func:`ssmkit.sequences.step_packed`:

    - outputs are those of each sequence alone, up to an error;
    - the values of other sequences, NaN included, do not change a bit of them;
    - the gradient of the outputs of a sequence with respect to the others is exactly 0.

    Arguments:
        layer: A sequence layer or container, causal or not.
        u: A row of shape :math:`(L, d_{input})`, or :math:`(L)` of class indices; by default drawn.
        boundaries: Cumulative lengths of its sequences; by default of four, the shortest of one sample.
        length: The length :math:`L` of a drawn row, at least 4.
        rtol: The largest error allowed to the sequences alone, as in :func:`assert_modes_agree`.

    Raises:
        AssertionError: If the law is broken; the message says how.

    Example:
        >>> assert_packing_is_independent(ssmkit.Mamba(4).double())
    """
    u = (example_input(layer, 1, length) if u is None else u[None]).detach()
    L = u.shape[1]
    edges = [0, max(1, L // 4), max(1, L // 4) + 1, max(2, L // 2) + 1, L] if boundaries is None else list(boundaries)
    with evaluating(layer):
        runs: dict[str, Callable[[Tensor], Tensor]] = {
            "forward_packed": lambda u: sequences.forward_packed(layer, u, edges)
        }
        if layer.causal:
            starts = sequences.starts_from_boundaries(edges)[None].to(u.device)
            runs["scan_packed"] = lambda u: _chunks(layer, u, starts, sorted({0, 1, L // 3, L // 2, L}))
            runs["step_packed"] = lambda u: _steps(layer, u, starts)
        for what, run in runs.items():
            _packing(layer, what, run, u, edges, rtol)


def _chunks(layer: SequenceLayer, u: Tensor, starts: Tensor, cuts: list[int]) -> Tensor:
    """A row in chunks, which begin and end inside sequences."""
    state, parts = layer.initial_state(1, device=u.device, dtype=state_dtype(u)), []
    for begin, end in zip(cuts, cuts[1:], strict=False):
        y, state = sequences.scan_packed(layer, u[:, begin:end], state, starts[:, begin:end])
        parts.append(y)
    return torch.cat(parts, 1)


def _steps(layer: SequenceLayer, u: Tensor, starts: Tensor) -> Tensor:
    """A row sample by sample."""
    state, rows, system = layer.initial_state(1, device=u.device, dtype=state_dtype(u)), [], layer.system()
    for k, sample in enumerate(u.unbind(1)):
        y, state = sequences.step_packed(layer, sample, state, starts[:, k], system=system)
        rows.append(y)
    return torch.stack(rows, 1)


def _packing(
    layer: SequenceLayer,
    what: str,
    run: Callable[[Tensor], Tensor],
    u: Tensor,
    edges: list[int],
    rtol: float | None,
) -> None:
    name, floats = type(layer).__name__, u.is_floating_point()
    u = u.clone().requires_grad_(floats)
    with torch.enable_grad():
        y = run(u)
    rtol = RTOL[y.dtype] if rtol is None else rtol
    for number, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        mine, own = y[:, begin:end], f"sequence {number} of `{what}`"
        others = torch.full_like(u, torch.nan) if floats else u.flip(1)
        others[:, begin:end] = u[:, begin:end].detach()
        with torch.enable_grad():
            # With gradients as before, since parts that a system keeps without them have other roundings.
            changed = run(others.requires_grad_(floats))[:, begin:end]
            alone = layer(u[:, begin:end])
        same(name, own, "the sequence alone", mine, alone, rtol=rtol, scale=y)
        same(name, f"{own}, among others,", "before", changed, mine, rtol=0)
        if floats and y.requires_grad:
            (found,) = torch.autograd.grad((mine * weights(mine)).sum(), u, retain_graph=True)
            found = found.clone()
            found[:, begin:end] = 0
            if bool((found != 0).any()):
                raise AssertionError(f"{name}: {own} has a gradient with respect to another sequence.")


def assert_reset_is_start(
    layer: SequenceLayer, u: Tensor | None = None, *, length: int = 27, rtol: float | None = None
) -> None:
    """Asserts that a reset restarts a stream and does not change the others.

    In eval mode, after half of the samples, with :func:`ssmkit.sequences.reset`, steps and scans:

    - outputs of a stream after its reset are those from the initial state, up to an error;
    - earlier samples, NaN included, do not change a bit of them;
    - outputs of the other streams are those without a reset, up to an error.

    Arguments:
        layer: A causal sequence layer or container.
        u: A batch of shape :math:`(B, L, d_{input})`, or :math:`(B, L)` of class indices, of at least two rows; by
            default a drawn batch of 3.
        length: The length :math:`L` of a drawn batch.
        rtol: The largest error allowed, as in :func:`assert_modes_agree`.

    Raises:
        AssertionError: If the law is broken; the message says how.
        ValueError: If the layer is not causal.

    Example:
        >>> assert_reset_is_start(ssmkit.MultiRate(2, ssmkit.S4D(4)).double())
    """
    u = example_input(layer, 3, length) if u is None else u
    half = u.shape[1] // 2
    rows = torch.arange(len(u), device=u.device) % 2 == 0
    name = type(layer).__name__
    with evaluating(layer), torch.no_grad():
        start = layer.initial_state(len(u), device=u.device, dtype=state_dtype(u))
        # Contiguous, since products of other memory layouts may have other roundings.
        past, future = u[:, :half].contiguous(), u[:, half:].contiguous()
        chosen = rows.reshape(-1, *[1] * (u.ndim - 1))
        heard = torch.where(chosen, torch.nan if u.is_floating_point() else past.flip(1), past)
        state, other = (layer.scan(x, start)[1] for x in (past, heard))
        for mode, run in (("scan", layer.scan), ("step", lambda x, state: _stepped(layer, x, state))):
            y, _ = run(future, sequences.reset(layer, state, rows))
            changed, _ = run(future, sequences.reset(layer, other, rows))
            same(name, f"`{mode}` after a reset, with another past,", "before", changed, y, rtol=0)
            bound = RTOL[y.dtype] if rtol is None else rtol
            fresh, _ = run(future, start)
            on, _ = run(future, state)
            same(name, f"`{mode}` of a stream that was reset", "the start", y[rows], fresh[rows], rtol=bound)
            same(name, f"`{mode}` of a stream beside it", "going on", y[~rows], on[~rows], rtol=bound)


def _stepped(layer: SequenceLayer, u: Tensor, state: State) -> tuple[Tensor, State]:
    rows, system = [], layer.system()
    for sample in u.unbind(1):
        y, state = layer.step(sample, state, system)
        rows.append(y)
    return torch.stack(rows, 1), state
