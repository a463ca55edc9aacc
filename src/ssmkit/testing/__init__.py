r"""Functions by which tests check the contract of sequence layers."""

from .batches import assert_packing_is_independent, assert_padding_has_no_effect, assert_reset_is_start
from .common import example_input, relative_error
from .foreign import Foreign
from .modes import assert_modes_agree
from .runs import assert_deterministic, assert_long_sequences_agree

__all__ = [
    "Foreign",
    "assert_deterministic",
    "assert_long_sequences_agree",
    "assert_modes_agree",
    "assert_packing_is_independent",
    "assert_padding_has_no_effect",
    "assert_reset_is_start",
    "example_input",
    "relative_error",
]
