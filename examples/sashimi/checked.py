"""Reading what may be damaged: short JSON files, and safetensors files with a checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .problems import Problem

CARD = "sashimi"
"""The entry of a safetensors file's metadata that says what the tensors are: a JSON object. There is only this one,
since safetensors writes several in any order, and the same run should write the same file."""
_CHECKSUM = "sha256"
_KINDS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST = 1 << 20
"""Bytes of a short text file."""


def is_whole(value: object, least: int = 0) -> bool:
    """Whether a value out of a JSON text is an integer of at least so much."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def read_text(path: Path) -> str:
    """A text file of at most a mebibyte.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is longer, or not UTF-8.
    """
    if (size := path.stat().st_size) > _LONGEST:
        raise ValueError(f"it has {size:,} bytes")
    return path.read_text("utf-8")


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The object in a JSON text.

    Raises:
        ValueError: If the text is something else.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def checksum(card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a card and of the names, dtypes, shapes and bytes of tensors, as a hexadecimal number."""
    ordered = sorted(tensors.items())
    head = [card, [[name, str(x.dtype), list(x.shape)] for name, x in ordered]]
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for _, x in ordered:
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def signed(card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata of a safetensors file with these tensors: the card and the checksum."""
    return {CARD: json.dumps({**card, _CHECKSUM: checksum(card, tensors)})}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, whose name need not be UTF-8, as safetensors wants it.

    Raises:
        Problem: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            odd = os.fsencode(path).decode(errors="ignore") != str(path)
            with safe_open(f"/dev/fd/{file.fileno()}" if odd else path, "pt") as tensors:
                yield tensors
    except (OSError, SafetensorError) as error:
        raise Problem(f"{path} cannot be read as safetensors ({error}).") from error


class TensorFile:
    """A safetensors file of which only the header has been read.

    Attributes:
        path: Where it is.
        card: What it says of itself, empty if it is of another program.
        sizes: The dtype (None if this program does not know it) and the shape of every tensor.

    Raises:
        Problem: If it does not exist, or its header cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise Problem(f"{path} does not exist or is not a file.")
        with _opened(path) as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            self.sizes = {name: (_KINDS.get(x.get_dtype()), tuple(x.get_shape())) for name, x in parts.items()}
            metadata = file.metadata() or {}
        try:
            self.card = parse_object(metadata[CARD]) if CARD in metadata else {}
        except ValueError as error:
            raise Problem(f"{path} has a damaged header ({error}).") from error
        self._checksum = self.card.pop(_CHECKSUM, None)

    @property
    def numbers(self) -> int:
        """How many numbers the tensors hold."""
        return sum(prod(shape) for _, shape in self.sizes.values())

    def check(self, expected: Mapping[str, Tensor], kind: str = "the weights") -> None:
        """Compares names, dtypes and shapes; nothing of the file is in memory yet.

        Arguments:
            expected: Tensors like those that the file is to hold.
            kind: What they are, for the message.

        Raises:
            Problem: If one of them differs.
        """
        wanted = {name: (x.dtype, tuple(x.shape)) for name, x in expected.items()}
        odd = [name for name, size in wanted.items() if self.sizes.get(name) != size]
        odd += sorted(set(self.sizes) - set(wanted))
        if odd:
            (name, *_), found = odd, self.sizes.get(odd[0])
            what = (
                f"{name} is missing"
                if found is None
                else f"{name} is {found[0] or 'of an unknown dtype'} of shape {list(found[1])}"
            )
            rule = f"not {wanted[name][0]} of shape {list(wanted[name][1])}" if name in wanted else "and has no place"
            what += "" if found is None else f", {rule}"
            raise Problem(f"{self.path} holds {kind} of another architecture, or is incomplete ({what}).")

    def read(self, *, unsigned: bool = False) -> dict[str, Tensor]:
        """The tensors.

        Arguments:
            unsigned: Accept a file without a checksum.

        Raises:
            Problem: If they do not match the checksum, or hold numbers that are not finite.
        """
        with _opened(self.path) as file:
            tensors = {name: file.get_tensor(name) for name in self.sizes}
        if self._checksum is None and not unsigned:
            raise Problem(f"{self.path} has no checksum; it is damaged, or was not written by this program.")
        if self._checksum is not None and self._checksum != checksum(self.card, tensors):
            raise Problem(f"{self.path} is damaged, as it does not match its checksum; use another copy of it.")
        if odd := [name for name, x in tensors.items() if not x.isfinite().all()]:
            raise Problem(f"{self.path} holds numbers that are not finite ({odd[0]}).")
        return tensors
