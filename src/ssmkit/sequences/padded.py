"""Padded batches: sequences of different lengths in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers.base import SequenceLayer, System
from ..states import State
from .arguments import Lengths, batched_state, is_left, model_and_input, one_rate, row_lengths, time_axis
from .rows import forward_rows, scan_rows

__all__ = ["forward_padded", "scan_padded"]


def forward_padded(
    model: SequenceLayer, u: Tensor, lengths: Lengths, *, side: str = "right", system: System = None
) -> Tensor:
    r"""Runs a padded batch, each row as if it were alone.

    .. math:: y_{b,k} = f(u_{b,0}, \dots, u_{b,n_b - 1})_k \quad \text{for } k < n_b, \qquad y_{b,k} = 0
        \quad \text{behind}

    for padding on the right; with padding on the left the sequences are at the end of their rows. The values in the
    padding, NaN included, do not change a bit of the output, and their gradient is exactly 0. The output of a row
    equals that of its sequence alone up to rounding.

    A causal model runs once over the whole batch, with zeros in the padding. So a position-wise module of your own must
    accept zeros and have a finite derivative there. A model that is not causal runs once for each different length, on
    rows without padding.

    Arguments:
        model: A sequence layer or container, causal or not.
        u: The input, with shape :math:`(B, *, L, d_{input})`, or :math:`(B, *, L)` of class indices. Axes between
            the first axis and time belong to a row.
        lengths: The lengths :math:`n_b`, integers from 0 to :math:`L`, with shape :math:`(B)`. For a layer over A axes,
            such as images, also with shape :math:`(B, A)`: the sizes along the last A axes in front of the features.
        side: Where the padding is, "right" or "left".
        system: What the model's `system()` returned; by default it is made here. It may have a tensor of rates if the
            padding is on the right; those of the padding have no effect, but must be positive.

    Returns:
        The output, with shape :math:`(B, *, L, d_{output})`, zero where `u` is padding.

    Raises:
        TypeError: If `model` is not a sequence layer, or `lengths` are not integers.
        ValueError: If `lengths` have another shape, are negative or more than the samples of `u`, if `side` is unknown,
            or if the system has a tensor of rates and the padding is on the left.
            For a causal model, values of `lengths` on another device than the CPU are not read, but clamped to
            these limits.

    Example:
        >>> model = ssmkit.Sequential(ssmkit.S4D(4), torch.nn.GELU())
        >>> u = torch.randn(2, 9, 4)
        >>> u[1, 5:] = torch.nan
        >>> y = ssmkit.sequences.forward_padded(model, u, [9, 5])
        >>> torch.allclose(y[1, :5], model(u[1, :5]), atol=1e-5), y[1, 5:].abs().max().item()
        (True, 0.0)
    """
    model, u, sizes, left = _arguments("forward_padded", model, u, lengths, side)
    if left or not model.causal or sizes.ndim == 2:
        one_rate("forward_padded", system)
    if not model.causal or sizes.ndim == 2:
        if not len(u):
            return cast(Tensor, model(u, system))
        per_row = [row if sizes.ndim == 2 else [row] for row in sizes.tolist()]
        rows = [_cut(row, n, left) for row, n in zip(u.unbind(0), per_row, strict=True)]
        outputs = forward_rows(model, rows, system)
        return torch.stack([_widened(y, _sizes(u), n, left) for y, n in zip(outputs, per_row, strict=True)])
    time = time_axis(u)
    L = u.shape[time]
    n = sizes.to(u.device).clamp(0, L)
    place = torch.arange(L, device=u.device)
    padding = place >= n[:, None]
    if not left:
        y: Tensor = model(torch.where(_along(padding, u, time), 0, u), system)
        return torch.where(_along(padding, y, -2), 0, y)
    # The shifted tensors are new, so zeros can be written into them.
    u = _shifted(u, L - n, time)
    y = _shifted(model(u.masked_fill_(_along(padding, u, time), 0), system), n - L, -2)
    return y.masked_fill_(_along(place < L - n[:, None], y, -2), 0)


def scan_padded(
    model: SequenceLayer, u: Tensor, state: State, lengths: Lengths, *, side: str = "right", system: System = None
) -> tuple[Tensor, State]:
    r"""Runs chunks of different lengths in a padded batch, each row as if it were alone, carrying the states.

    The returned state of each row is the state after its :math:`n_b` samples; later chunks and steps continue from it.
    Different phases (of :class:`ssmkit.MultiRate`) become an integer tensor. The padding is not read: the lengths are
    split into at most :math:`\log_2 L + 1` common lengths, and the rows with such a piece run together. So every
    sample runs once. Lengths are read on the CPU.

    Arguments:
        model: A causal sequence layer or container.
        u: The input, with shape :math:`(B, *, L, d_{input})`, or :math:`(B, *, L)` of class indices.
        state: The states of the streams, of batch shape :math:`(B, *)`.
        lengths: The lengths :math:`n_b`, integers from 0 to :math:`L`, with shape :math:`(B)`; a row of length 0 keeps
            its state.
        side: Where the padding is, "right" or "left".
        system: What the model's `system()` returned; by default it is made here.

    Returns:
        The output, with shape :math:`(B, *, L, d_{output})`, zero where `u` is padding, and the next state.

    Raises:
        TypeError: If `model` is not a sequence layer, or `lengths` are not integers.
        ValueError: If `lengths` have another shape, are negative or more than the samples of `u`, if `side` is unknown,
            if the system has a tensor of rates, or if the model is not causal.

    Example:
        >>> model = ssmkit.S4D(4)
        >>> prompts, lengths = ssmkit.sequences.pad([torch.randn(9, 4), torch.randn(5, 4)])
        >>> y, state = ssmkit.sequences.scan_padded(model, prompts, model.initial_state(2), lengths)
        >>> _, alone = model.scan(prompts[1:, :5], model.initial_state(1))
        >>> torch.allclose(state[1:], alone, atol=1e-5)
        True
    """
    model, u, sizes, left = _arguments("scan_padded", model, u, lengths, side, axes=1)
    one_rate("scan_padded", system)
    batched_state("scan_padded", state, u.shape[: time_axis(u) + u.ndim], "u")
    if not len(u):
        return model.scan(u, state, system)
    per_row = [[length] for length in sizes.tolist()]
    rows = [_cut(row, n, left) for row, n in zip(u.unbind(0), per_row, strict=True)]
    outputs, state = scan_rows(model, rows, state, system)
    return torch.stack([_widened(y, _sizes(u), n, left) for y, n in zip(outputs, per_row, strict=True)]), state


def _along(mask: Tensor, x: Tensor, time: int) -> Tensor:
    """A mask (B, L) with the axes of x (B, *, L) or (B, *, L, d)."""
    shape = [1] * x.ndim
    shape[0], shape[time] = mask.shape
    return mask.reshape(shape)


def _arguments(
    where: str, model: SequenceLayer, u: Tensor, of_rows: Lengths, of_side: str, axes: int | None = None
) -> tuple[SequenceLayer, Tensor, Tensor, bool]:
    """Checked arguments; lengths as a tensor, and whether padding is on the left."""
    model, u = model_and_input(where, model, u, 2)
    left = is_left(where, of_side)
    sizes = _sizes(u)
    found = row_lengths(where, of_rows, (len(u), *sizes[-axes if axes else 0 :]))
    return model, u, found if axes is None else found.reshape(len(u)), left


def _sizes(u: Tensor) -> tuple[int, ...]:
    """The sizes of the axes behind the batch and in front of the features."""
    return tuple(u.shape[1 : u.ndim + time_axis(u) + 1])


def _cut(row: Tensor, n: Sequence[int], left: bool) -> Tensor:
    """A row without its padding."""
    time = time_axis(row)
    for back, length in enumerate(reversed(n)):
        size = row.shape[time - back]
        row = row.narrow(time - back, size - length if left else 0, length)
    return row


def _widened(y: Tensor, axes: Sequence[int], n: Sequence[int], left: bool) -> Tensor:
    """An output with its padding, of zeros."""
    padding = [0, 0]
    for size, length in zip(reversed(axes), reversed(n), strict=False):
        padding += [size - length, 0] if left else [0, size - length]
    return F.pad(y, padding)


def _shifted(x: Tensor, by: Tensor, time: int) -> Tensor:
    """Shifts every row of x by its own number of samples; what is shifted in is arbitrary."""
    x = x.movedim(time, 1)
    B, L = x.shape[:2]
    index = (torch.arange(L, device=x.device) + by[:, None]).clamp(0, max(0, L - 1))
    index = index + L * torch.arange(B, device=x.device)[:, None]
    # Whole rows are copied, which is several times faster than a gather of single numbers.
    shifted: Tensor = x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, (B, L)).movedim(1, time)
    return shifted
