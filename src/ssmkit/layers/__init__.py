"""Layers and containers that run as a convolution, as a recurrence and in chunks."""

from .base import ForwardLayer as ForwardLayer
from .base import SequenceLayer as SequenceLayer
from .block import S4Block as S4Block
from .branches import Concatenate as Concatenate
from .branches import Product as Product
from .chain import Checkpoint as Checkpoint
from .chain import Residual as Residual
from .chain import Sequential as Sequential
from .dropout import TiedDropout as TiedDropout
from .learned_start import LearnedStart as LearnedStart
from .lru import LRU as LRU
from .mamba import S6 as S6
from .mamba import Mamba as Mamba
from .mamba2 import SSD as SSD
from .mamba2 import GroupedRMSNorm as GroupedRMSNorm
from .mamba2 import Mamba2 as Mamba2
from .pointwise import Pointwise as Pointwise
from .pooling import DownPool as DownPool
from .pooling import MultiRate as MultiRate
from .pooling import UpPool as UpPool
from .s4 import S4 as S4
from .s4d import S4D as S4D
from .s5 import S5 as S5
from .short_conv import ShortConv as ShortConv
from .statespace import StateSpaceLayer as StateSpaceLayer

__all__ = [
    "LRU",
    "S4",
    "S4D",
    "S5",
    "S6",
    "SSD",
    "Checkpoint",
    "Concatenate",
    "DownPool",
    "ForwardLayer",
    "GroupedRMSNorm",
    "LearnedStart",
    "Mamba",
    "Mamba2",
    "MultiRate",
    "Pointwise",
    "Product",
    "Residual",
    "S4Block",
    "SequenceLayer",
    "Sequential",
    "ShortConv",
    "StateSpaceLayer",
    "TiedDropout",
    "UpPool",
]
