"""Composable state-space layers for PyTorch, whose convolution, recurrence and scan agree to rounding."""

import importlib
from typing import TYPE_CHECKING, Any

from . import convert as convert
from . import hippo as hippo
from . import initializers as initializers
from . import ops as ops
from . import sequences as sequences
from . import states as states
from . import systems as systems
from . import testing as testing
from .layers import LRU as LRU
from .layers import S4 as S4
from .layers import S4D as S4D
from .layers import S5 as S5
from .layers import S6 as S6
from .layers import Checkpoint as Checkpoint
from .layers import Concatenate as Concatenate
from .layers import DownPool as DownPool
from .layers import ForwardLayer as ForwardLayer
from .layers import LearnedStart as LearnedStart
from .layers import Mamba as Mamba
from .layers import Mamba2 as Mamba2
from .layers import MultiRate as MultiRate
from .layers import Pointwise as Pointwise
from .layers import Product as Product
from .layers import Residual as Residual
from .layers import S4Block as S4Block
from .layers import SequenceLayer as SequenceLayer
from .layers import Sequential as Sequential
from .layers import ShortConv as ShortConv
from .layers import StateSpaceLayer as StateSpaceLayer
from .layers import TiedDropout as TiedDropout
from .layers import UpPool as UpPool
from .optim import param_groups as param_groups
from .stepping import compile_step as compile_step

if TYPE_CHECKING:
    from . import streaming as streaming

__version__ = "0.1.0"

__all__ = [
    "LRU",
    "S4",
    "S4D",
    "S5",
    "S6",
    "Checkpoint",
    "Concatenate",
    "DownPool",
    "ForwardLayer",
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
    "compile_step",
    "convert",
    "hippo",
    "initializers",
    "ops",
    "param_groups",
    "sequences",
    "states",
    "systems",
    "testing",
]


def __getattr__(name: str) -> Any:
    # `streaming` needs numba, which is optional and takes long to import.
    if name == "streaming":
        return importlib.import_module(".streaming", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "streaming"})
