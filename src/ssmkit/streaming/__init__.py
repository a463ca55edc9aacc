"""Streams in real time: causal models as compiled programs.

Needs `numba`: ``pip install 'ssmkit[streaming]'``. It is not imported before ``ssmkit.streaming`` is first used.
"""

try:
    import numba as numba
except ImportError as error:
    raise ImportError(
        "ssmkit.streaming needs numba, which is an optional part of ssmkit: pip install 'ssmkit[streaming]'"
    ) from error

from .engine import Engine as Engine
from .engine import Generated as Generated
from .engine import Stream as Stream

__all__ = ["Engine", "Generated", "Stream"]
