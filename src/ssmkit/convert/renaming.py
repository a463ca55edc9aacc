"""Tables that map names of other libraries to names of ssmkit, and the conversion of state dicts by such tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Table", "check_tensors", "read", "write"]

Table: TypeAlias = dict[str, dict[str, tuple[int, ...]]]
"""For each name of another library: the tensors of ssmkit that it joins along the first axis, as names and shapes."""


def check_tensors(where: str, state_dict: Mapping[str, Tensor]) -> None:
    """Raises an error if a value is not a dictionary of tensors.

    Arguments:
        where: The name of the calling function, for the error.
        state_dict: The value.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"{where}: `state_dict` must be a dictionary of tensors, got a {type(state_dict).__name__}; a module has "
            "`state_dict()`."
        )
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{where}: `state_dict` must hold tensors, got a {type(value).__name__} as {name}.")


def read(where: str, state_dict: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Renames and splits the tensors of another library.

    Arguments:
        where: The name of the calling function, for errors.
        state_dict: Tensors by names of the other library.
        table: The table of names.

    Returns:
        Views of these tensors, by names of ssmkit.

    Raises:
        TypeError: If `state_dict` is no dictionary of tensors.
        ValueError: If a key is missing or unknown, or a shape is wrong.
    """
    _check(where, state_dict, {name: _joined(parts) for name, parts in table.items()})
    made: dict[str, Tensor] = {}
    for name, parts in table.items():
        first = 0
        for part, shape in parts.items():
            made[part] = state_dict[name][first : first + shape[0]]
            first += shape[0]
    return made


def write(where: str, state_dict: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Joins and renames tensors for another library, the inverse of :func:`read`.

    Arguments:
        where: The name of the calling function, for errors.
        state_dict: Tensors by names of ssmkit.
        table: The table of names.

    Returns:
        Tensors by names of the other library. Those that are not joined are the given ones.

    Raises:
        TypeError: If `state_dict` is no dictionary of tensors.
        ValueError: If a key is missing or unknown, or a shape is wrong.
    """
    _check(where, state_dict, {part: shape for parts in table.values() for part, shape in parts.items()})
    tensors = {name: [state_dict[part] for part in parts] for name, parts in table.items()}
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in tensors.items()}


def _joined(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the parts joined along the first axis."""
    shapes = list(parts.values())
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _check(where: str, state_dict: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    check_tensors(where, state_dict)
    missing = [name for name in shapes if name not in state_dict]
    unknown = [name for name in state_dict if name not in shapes]
    wrong = [name for name in shapes if name in state_dict and tuple(state_dict[name].shape) != shapes[name]]
    faults = [
        ("missing", missing),
        ("unknown", unknown),
        ("wrong shape", [f"{name} {tuple(state_dict[name].shape)}, expected {shapes[name]}" for name in wrong]),
    ]
    if found := "; ".join(f"{what}: {_listed(names)}" for what, names in faults if names):
        raise ValueError(
            f"{where}: `state_dict` must match the configuration or layer, got keys that do not ({found})."
        )


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
