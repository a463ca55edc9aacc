"""State-space systems as values: continuous ones discretise, discrete ones have a kernel, a step and a scan."""

from .base import ForwardSystem as ForwardSystem
from .base import System as System
from .base import own as own
from .base import part as part
from .dense import Dense as Dense
from .dense import DiscreteDense as DiscreteDense
from .dense import dense_bilinear as dense_bilinear
from .dense import dense_zoh as dense_zoh
from .diagonal import Diagonal as Diagonal
from .diagonal import DiscreteDiagonal as DiscreteDiagonal
from .diagonal import bilinear as bilinear
from .diagonal import zoh as zoh
from .dplr import DPLR as DPLR
from .dplr import DiscreteDPLR as DiscreteDPLR
from .heads import Heads as Heads
from .selective import Selective as Selective
from .shared import SharedDiagonal as SharedDiagonal
from .taps import Taps as Taps
from .timed import TimedDiagonal as TimedDiagonal
from .timed import TimedShared as TimedShared
from .two_sided import BothWays as BothWays
from .two_sided import TwoSided as TwoSided
from .words import Words as Words

__all__ = [
    "DPLR",
    "BothWays",
    "Dense",
    "Diagonal",
    "DiscreteDPLR",
    "DiscreteDense",
    "DiscreteDiagonal",
    "ForwardSystem",
    "Heads",
    "Selective",
    "SharedDiagonal",
    "System",
    "Taps",
    "TimedDiagonal",
    "TimedShared",
    "TwoSided",
    "Words",
    "bilinear",
    "dense_bilinear",
    "dense_zoh",
    "own",
    "part",
    "zoh",
]
