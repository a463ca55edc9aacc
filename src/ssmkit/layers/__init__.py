"""Layers and containers that run as a convolution, as a recurrence and in chunks."""

from .base import SequenceLayer as SequenceLayer
from .block import S4Block as S4Block
from .containers import Checkpoint as Checkpoint
from .containers import Pointwise as Pointwise
from .containers import Residual as Residual
from .containers import Sequential as Sequential
from .containers import TiedDropout as TiedDropout
from .pooling import DownPool as DownPool
from .pooling import MultiRate as MultiRate
from .pooling import UpPool as UpPool
from .s4 import S4 as S4
from .s4d import S4D as S4D

__all__ = [
    "S4",
    "S4D",
    "Checkpoint",
    "DownPool",
    "MultiRate",
    "Pointwise",
    "Residual",
    "S4Block",
    "SequenceLayer",
    "Sequential",
    "TiedDropout",
    "UpPool",
]
