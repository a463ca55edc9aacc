"""Whether torch.func or forward mode is active: operations then take their plain forms."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["transformed"]


def transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is active.

    The autograd functions of this package write to buffers, and have neither a rule for vmap nor one for forward mode.
    Where this is true, an operation uses a plain form instead, of torch's own operations and without writes in place,
    which all transforms can take, in any order and number. Its intermediate tensors are kept for a backward pass.

    It is true for a gradient alone too: jacrev and vjp record one, and apply vmap to its backward pass later.

    Returns:
        True under `grad`, `vjp`, `jvp`, `vmap` and what is made of them, and in a level of dual numbers.

    Example:
        >>> _ = torch.func.vmap(lambda u: print(transformed()) or u)(torch.ones(2))
        True
        >>> transformed()
        False
    """
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0
