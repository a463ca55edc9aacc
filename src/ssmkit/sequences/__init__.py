r"""Sequences of different lengths in one batch, for every layer by the contract alone.

A **padded** batch has a row for each sequence, and lengths. A **packed** batch has sequences one after another in long
rows, and boundaries. In both, no output depends on another sequence or on padding, to the bit, and no gradient reaches
them.
"""

from .lists import collate, pack, pad, pool, unpack, unpad
from .packed import (
    forward_packed,
    reset,
    scan_packed,
    segments_from_starts,
    starts_from_boundaries,
    starts_from_segments,
    step_packed,
)
from .padded import forward_padded, scan_padded

__all__ = [
    "collate",
    "forward_packed",
    "forward_padded",
    "pack",
    "pad",
    "pool",
    "reset",
    "scan_packed",
    "scan_padded",
    "segments_from_starts",
    "starts_from_boundaries",
    "starts_from_segments",
    "step_packed",
    "unpack",
    "unpad",
]
