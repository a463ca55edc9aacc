"""Whether torch.func or forward mode is active: operations then take their plain forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["gradients_with_graph", "transformed"]


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


def gradients_with_graph(
    run: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The backward pass of a function of torch's own operations, as a graph that can be differentiated again.

    torch's `once_differentiable` does not notice a second derivative if the gradients of the outputs are constants, as
    those of a sum are; the result is then wrong.

    Arguments:
        run: From the arguments to a sequence of outputs.
        arguments: Tensors, which may have graphs.
        gradients: Those of the outputs.

    Returns:
        The gradients of the arguments, or None where an argument needs none or the outputs do not depend on it.

    Example:
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> (g,) = gradients_with_graph(lambda x: (x**3,), (x,), (torch.tensor(1.0),))
        >>> g.detach(), torch.autograd.grad(g, x)[0]
        (tensor(12.), tensor(12.))
    """
    with torch.enable_grad():
        # Views, since one argument may have been computed from another one.
        views = [x.view_as(x) for x in arguments]
        wanted = [x for x in views if x.requires_grad]
        pairs = [(y, g) for y, g in zip(run(*views), gradients, strict=True) if y.requires_grad]
        outputs, given = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=True, allow_unused=True))
    return tuple(next(found) if x.requires_grad else None for x in views)
