"""The compiled part of the engine: what every instruction does, and the loops that run a program sample by sample.

It imports nothing else of ssmkit, so that the compiled code depends on the sources in this folder alone.
"""

from .compiling import SOURCES as SOURCES
from .instructions import INSTRUCTION as INSTRUCTION
from .instructions import Activation as Activation
from .instructions import Instruction as Instruction
from .instructions import Op as Op
from .interpreter import generate as generate
from .interpreter import run as run
from .layout import LANE as LANE
from .layout import lines as lines
from .teams import share as share

__all__ = ["INSTRUCTION", "LANE", "SOURCES", "Activation", "Instruction", "Op", "generate", "lines", "run", "share"]
