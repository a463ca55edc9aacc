r"""Laws about repeated runs and long sequences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..layers.base import SequenceLayer
from ..states import State
from .common import RTOL, evaluating, example_input, leaves, same, same_state, state_dtype, time_axis, weights

__all__ = ["assert_deterministic", "assert_long_sequences_agree"]


def assert_deterministic(layer: SequenceLayer, u: Tensor | None = None, *, length: int = 37) -> None:
    """Asserts that equal inputs give equal bits in every run.

    In all modes of the layer, with the gradients of parameters and input; in eval mode, and in training with equal
    seeds.

    Arguments:
        layer: A sequence layer or container, causal or not.
        u: A batch of shape :math:`(B, *, L, d_{input})`, or :math:`(B, *, L)` of class indices; by default a drawn
            batch of 2.
        length: The length :math:`L` of a drawn batch.

    Raises:
        AssertionError: If two runs differ; the message says in what.

    Example:
        >>> assert_deterministic(ssmkit.S4Block(4, dropout=0.5))
    """
    u = example_input(layer, 2, length) if u is None else u
    training = {module: module.training for module in layer.modules()}
    try:
        for mode in (False, True):
            layer.train(mode)
            with torch.random.fork_rng():
                runs = [_everything(layer, u) for _ in range(2)]
            for what, first, second in zip(runs[0], runs[0].values(), runs[1].values(), strict=True):
                equal = len(first) == len(second) and all(
                    torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(first, second, strict=True)
                )
                if not equal:
                    where = "training with one seed" if mode else "eval mode"
                    raise AssertionError(f"{type(layer).__name__}: {what} differs from run to run in {where}.")
    finally:
        for module, was in training.items():
            module.training = was


def _everything(layer: SequenceLayer, u: Tensor) -> dict[str, list[Any]]:
    """The outputs, states and gradients of all modes."""
    torch.manual_seed(0)
    time = time_axis(u)
    u = u.detach().clone().requires_grad_(u.is_floating_point())
    wanted = [p for p in layer.parameters() if p.requires_grad] + ([u] if u.is_floating_point() else [])
    found: dict[str, list[Any]] = {}

    def note(what: str, y: Tensor, state: State) -> None:
        found[f"`{what}`"] = [y, *leaves(state)]
        if y.requires_grad:
            grads = torch.autograd.grad((y * weights(y)).sum(), wanted, allow_unused=True)
            found[f"the gradient of `{what}`"] = [g for g in grads if g is not None]

    with torch.enable_grad():
        note("forward", layer(u), ())
        if layer.causal:
            rest = layer.initial_state(*u.shape[:time], device=u.device, dtype=state_dtype(u))
            note("scan", *layer.scan(u, rest))
            note("step", *layer.step(u.select(time, 0), rest))
    return found


def assert_long_sequences_agree(
    layer: SequenceLayer,
    u: Tensor | None = None,
    *,
    length: int = 1 << 17,
    cuts: Iterable[int] | None = None,
    rtol: float | None = None,
) -> None:
    r"""Asserts that a long sequence in pieces gives the same as at once, without drift.

    In eval mode: :meth:`~ssmkit.SequenceLayer.scan` of the pieces is :meth:`~ssmkit.SequenceLayer.scan` of the whole
    and :meth:`~ssmkit.SequenceLayer.forward`, in outputs and in the last state.

    Arguments:
        layer: A causal sequence layer or container.
        u: A sequence of shape :math:`(*, L, d_{input})`, or :math:`(*, L)` of class indices; by default a drawn batch
            of 1.
        length: The length :math:`L` of a drawn sequence, by default :math:`2^{17}`.
        cuts: Where the sequence is cut; by default into pieces of about an eighth, a half and three eighths.
        rtol: The largest error allowed, as in :func:`assert_modes_agree`.

    Raises:
        AssertionError: If the law is broken; the message says how.
        ValueError: If the layer is not causal.

    Example:
        >>> assert_long_sequences_agree(ssmkit.S4D(2), length=1 << 14)
    """
    u = example_input(layer, 1, length) if u is None else u
    time, name = time_axis(u), type(layer).__name__
    L = u.shape[time]
    # Not at powers of two, where internal chunks may end.
    edges = [0, *sorted({L // 8 + 1, L // 8 + L // 2 + 3} if cuts is None else cuts), L]
    with evaluating(layer), torch.no_grad():
        state = rest = layer.initial_state(*u.shape[:time], device=u.device, dtype=state_dtype(u))
        system, parts = layer.system(), []
        whole, end = layer.scan(u, rest, system)
        for piece in u.split([b - a for a, b in zip(edges, edges[1:], strict=False)], time):
            y, state = layer.scan(piece, state, system)
            parts.append(y)
        bound = RTOL[whole.dtype] if rtol is None else rtol
        y = torch.cat(parts, -2)
        same(name, f"{L} samples in pieces", "`scan` of the whole", y, whole, rtol=bound)
        same_state(name, f"{L} samples in pieces", "`scan` of the whole", state, end, rtol=bound)
        same(name, f"{L} samples in pieces", "`forward`", y, layer(u, system), rtol=bound)
