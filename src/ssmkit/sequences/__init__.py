r"""Sequences of different lengths in one batch, for every layer by the contract alone.

A **padded** batch has one row per sequence, and lengths. A **packed** row has sequences one after another, and
boundaries. In both, padding and other sequences do not change a bit of the output of a sequence, and their gradients
are exactly 0.
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
