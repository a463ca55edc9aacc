"""Batches from lists of sequences and back, and pooling over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from .. import _checks
from .arguments import Lengths, beginnings, is_left, row_lengths
from .rows import stack_padded

__all__ = ["collate", "pack", "pad", "pool", "unpack", "unpad"]


def pad(sequences: Sequence[Tensor], *, side: str = "right") -> tuple[Tensor, Tensor]:
    """Makes a padded batch of sequences of different lengths.

    Like `torch.nn.utils.rnn.pad_sequence`, but it also returns the lengths, for the other functions.

    Arguments:
        sequences: Tensors with shapes :math:`(n_b, *)` and one dtype, which differ only in length; it may be 0.
        side: The side of the padding, "right" or "left".

    Returns:
        The batch, with shape :math:`(B, L, *)` and zeros for padding, and the lengths, integers with shape :math:`(B)`
        on the CPU.

    Raises:
        TypeError: If `sequences` are not tensors.
        ValueError: If there are none, if they differ in more than their lengths, or `side` is unknown.

    Example:
        >>> u, lengths = pad([torch.ones(3, 2), torch.ones(1, 2)])
        >>> u.shape, lengths
        (torch.Size([2, 3, 2]), tensor([3, 1]))
    """
    left = is_left("pad", side)
    items = _alike("pad", sequences)
    return stack_padded(items, 0, left=left), torch.tensor([len(x) for x in items])


def unpad(batch: Tensor, lengths: Lengths, *, side: str = "right") -> list[Tensor]:
    """Splits a padded batch into its sequences: the inverse of :func:`pad`.

    Arguments:
        batch: A padded batch, with shape :math:`(B, L, *)`.
        lengths: The lengths, integers from 0 to :math:`L`, with shape :math:`(B)`; they are read on the CPU.
        side: Where the padding is, "right" or "left".

    Returns:
        The sequences, with shapes :math:`(n_b, *)`.

    Raises:
        TypeError: If `lengths` are not integers.
        ValueError: If `lengths` do not fit the batch, or `side` is unknown.

    Example:
        >>> [tuple(x.shape) for x in unpad(torch.zeros(2, 3, 4), [3, 1])]
        [(3, 4), (1, 4)]
    """
    left = is_left("unpad", side)
    sizes = _lengths("unpad", "batch", lengths, batch).tolist()
    return [row[len(row) - n :] if left else row[:n] for row, n in zip(batch.unbind(0), sizes, strict=True)]


def pack(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Makes a packed row: sequences one after another.

    Arguments:
        sequences: Tensors with shapes :math:`(n_s, *)` and one dtype, which differ only in length; it is at least 1.

    Returns:
        The row, with shape :math:`(L, *)`, and its boundaries: the cumulative lengths :math:`0, n_0, n_0 + n_1` and so
        on to :math:`L`, integers with shape :math:`(S + 1)` on the CPU.

    Raises:
        TypeError: If `sequences` are not tensors.
        ValueError: If there are none, if one is empty, or if they differ in more than their lengths.

    Example:
        >>> u, boundaries = pack([torch.ones(3, 2), torch.ones(1, 2)])
        >>> u.shape, boundaries
        (torch.Size([4, 2]), tensor([0, 3, 4]))
    """
    items = _alike("pack", sequences)
    sizes = [len(x) for x in items]
    if 0 in sizes:
        raise ValueError(
            f"pack: `sequences` must have at least one sample each, got none in sequence {sizes.index(0)}."
        )
    return torch.cat(items), torch.tensor([0, *sizes]).cumsum(0)


def unpack(row: Tensor, boundaries: Lengths) -> list[Tensor]:
    """Splits a packed row into its sequences: the inverse of :func:`pack`.

    Arguments:
        row: A row, with shape :math:`(L, *)`.
        boundaries: Where sequences begin, as in :func:`forward_packed`: cumulative lengths, or booleans with shape
            :math:`(L)`.

    Returns:
        The sequences, with shapes :math:`(n_s, *)`.

    Raises:
        TypeError: If `boundaries` are neither integers nor booleans.
        ValueError: If `boundaries` do not fit the row.

    Example:
        >>> [tuple(x.shape) for x in unpack(torch.zeros(4, 2), [0, 3, 4])]
        [(3, 2), (1, 2)]
    """
    if not _checks.tensor("unpack", "row", row).ndim:
        raise ValueError("unpack: `row` must have shape (L, *), got a tensor without axes.")
    L = len(row)
    (places,) = beginnings("unpack", boundaries, (), L, whole=True)
    return list(row.split([after - place for place, after in zip(places, [*places[1:], L], strict=False)]))


def pool(y: Tensor, lengths: Lengths, how: str = "mean", *, side: str = "right") -> Tensor:
    r"""Pools the rows of a padded batch over time, without their padding.

    .. math:: \frac{1}{n_b} \sum_{k < n_b} y_{b,k}, \qquad y_{b, n_b - 1}, \qquad \max_{k < n_b} y_{b,k}

    Values in the padding, NaN included, have no effect, and their gradient is exactly 0.

    Arguments:
        y: A padded batch, with shape :math:`(B, L, *)`.
        lengths: The lengths :math:`n_b`, integers from 0 to :math:`L`, with shape :math:`(B)`.
        how: "mean", "last" or "max".
        side: Where the padding is, "right" or "left".

    Returns:
        A value for each row, with shape :math:`(B, *)`; zeros for a row without samples.

    Raises:
        TypeError: If `y` is not a real floating tensor, or `lengths` are not integers.
        ValueError: If `lengths` do not fit the batch, or `how` or `side` is unknown.

    Example:
        >>> y = torch.tensor([[[1.0], [5.0], [3.0]], [[2.0], [torch.nan], [torch.nan]]])
        >>> for how in ("mean", "last", "max"):
        ...     print(how, pool(y, [3, 1], how).flatten())
        mean tensor([3., 2.])
        last tensor([3., 2.])
        max tensor([5., 2.])
    """
    left = is_left("pool", side)
    _checks.floating("pool", "y", y)
    _checks.known("pool", "how", how, ("mean", "last", "max"))
    n = _lengths("pool", "y", lengths, y).to(y.device)
    L = y.shape[1]
    if not L:
        return y.sum(1)
    behind = [1] * (y.ndim - 2)
    place, count = torch.arange(L, device=y.device), n[:, None]
    kept = (place >= L - count if left else place < count).reshape(-1, L, *behind)
    some = (n > 0).reshape(-1, *behind)
    if how == "mean":
        return torch.where(kept, y, 0).sum(1) / n.clamp(min=1).reshape(-1, *behind).to(y.dtype)
    if how == "max":
        return torch.where(some, torch.where(kept, y, -torch.inf).amax(1), 0)
    last = torch.full_like(n, L - 1) if left else (n - 1).clamp(0, L - 1)
    return torch.where(some, y.take_along_dim(last.reshape(-1, 1, *behind), dim=1).squeeze(1), 0)


def collate(samples: Sequence[Any], *, packed: bool = False, side: str = "right") -> tuple[Any, ...]:
    """Makes a batch of samples whose sequences have different lengths: a `collate_fn` for torch's `DataLoader`.

    A sample is a sequence, or a tuple of a sequence and other values, such as a target. Values that are tensors of the
    same length as the sequence, in all samples, are padded or packed like the sequences; others are collated by
    `torch.utils.data.default_collate`. Options are set by `functools.partial`.

    Arguments:
        samples: Sequences with shapes :math:`(n, *)`, or tuples that begin with one.
        packed: Whether to make a packed row (:func:`pack`) instead of a padded batch (:func:`pad`).
        side: The side of the padding, "right" or "left".

    Returns:
        The batch, its lengths or, if packed, its boundaries, and the other values.

    Raises:
        TypeError: If a sequence is not a tensor.
        ValueError: If there are no samples, or sequences differ in more than their lengths.

    Example:
        >>> samples = [(torch.randn(n, 3), n % 2) for n in (4, 7, 5)]
        >>> loader = torch.utils.data.DataLoader(samples, batch_size=3, collate_fn=ssmkit.sequences.collate)
        >>> for u, lengths, target in loader:
        ...     print(u.shape, lengths, target)
        torch.Size([3, 7, 3]) tensor([4, 7, 5]) tensor([0, 1, 1])
    """
    _checks.flags("collate", packed=packed)
    if not isinstance(samples, (list, tuple)) or not samples:
        raise ValueError(f"collate: `samples` must be a list of at least one sample, got {_checks.shown(samples)}.")
    rows = [x if isinstance(x, (tuple, list)) else (x,) for x in samples]
    if len({len(row) for row in rows}) > 1 or not rows[0]:
        raise ValueError("collate: `samples` must hold the same number of values each, and begin with a sequence.")
    columns = list(zip(*rows, strict=True))
    sequences = _alike("collate", columns[0])

    def together(items: Sequence[Any]) -> tuple[Tensor, Tensor]:
        return pack(items) if packed else pad(items, side=side)

    rest = []
    for column in columns[1:]:
        per_sample = all(
            isinstance(x, Tensor) and x.ndim and len(x) == len(u) for x, u in zip(column, sequences, strict=True)
        )
        rest.append(together(column)[0] if per_sample else default_collate(list(column)))
    return (*together(sequences), *rest)


def _lengths(where: str, name: str, value: Lengths, batch: Tensor) -> Tensor:
    """The lengths (B) of a batch (B, L, *)."""
    if _checks.tensor(where, name, batch).ndim < 2:
        raise ValueError(f"{where}: `{name}` must have shape (B, L, *), got {tuple(batch.shape)}.")
    return row_lengths(where, value, batch.shape[:2]).reshape(len(batch))


def _alike(where: str, sequences: Sequence[Any]) -> list[Tensor]:
    """Tensors that differ only in length."""
    if not isinstance(sequences, (list, tuple)):
        raise TypeError(f"{where}: `sequences` must be a list of tensors, got {_checks.shown(sequences)}.")
    items = list(sequences)
    if not items:
        raise ValueError(f"{where}: `sequences` must hold at least one sequence.")
    for i, x in enumerate(items):
        _checks.tensor(where, "sequences", x)
        alike = x.dtype == items[0].dtype and x.device == items[0].device
        if not x.ndim or x.shape[1:] != items[0].shape[1:] or not alike:
            raise ValueError(
                f"{where}: `sequences` must differ only in length, got {x.dtype} of shape {tuple(x.shape)} "
                f"(sequence {i}) and {items[0].dtype} of shape {tuple(items[0].shape)}."
            )
    return items
