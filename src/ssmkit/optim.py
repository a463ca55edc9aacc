r"""Parameter groups with the learning rates and weight decay of state-space networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from . import _checks
from .layers import LearnedStart

__all__ = ["param_groups"]

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_PLAIN = (*_NORMS, LearnedStart)
"""Modules whose own parameters have no weight decay."""


def _named(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module itself; those that parametrise one have its name."""
    if is_parametrized(module):
        for name, chain in module.parametrizations.items():  # type: ignore[union-attr, operator]
            yield from ((name, parameter) for parameter in chain.parameters())
    yield from module.named_parameters(recurse=False)


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, *, ssm_lr: float = 1e-3
) -> list[dict[str, Any]]:
    r"""Sorts the parameters of a model into the groups that state-space networks are trained with.

    - poles, low-rank terms, input gains and step sizes of the state-space layers (:math:`\Lambda, P, B, \Delta`): at
      the smaller of `lr` and `ssm_lr`, without decay;
    - biases, all parameters of norms, and learnt starts (:class:`ssmkit.LearnedStart`): at `lr`, without decay;
    - all others: at `lr`, with decay.

    Every trainable parameter is in exactly one group, once, even if the model uses it several times; empty groups are
    left out. What parametrises a parameter (`torch.nn.utils.parametrize`) is in the group of that parameter. A
    layer of your own names its state-space parameters in a class attribute `SSM_PARAMETERS`, a tuple.

    References:
        | Efficiently Modeling Long Sequences with Structured State Spaces (Gu et al., 2022), Appendix D.2
        | https://arxiv.org/abs/2111.00396

    Arguments:
        model: A network with any layers.
        lr: The learning rate.
        weight_decay: The decay of the parameters that have one.
        ssm_lr: The largest learning rate of the state-space parameters.

    Returns:
        Groups for the first argument of any optimiser in `torch.optim`.

    Raises:
        TypeError: If `model` is not a torch module.
        ValueError: If a rate is not positive or the decay is negative.

    Example:
        >>> groups = ssmkit.param_groups(ssmkit.S4Block(8), lr=4e-3, weight_decay=0.01)
        >>> [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups]
        [(0.001, 0.0, 5), (0.004, 0.0, 7), (0.004, 0.01, 5)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups: `model` must be a torch module, got {_checks.shown(model)}.")
    _checks.positive("param_groups", "lr", lr)
    _checks.positive("param_groups", "ssm_lr", ssm_lr)
    _checks.at_least("param_groups", "weight_decay", weight_decay, 0.0)
    ssm: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        names = getattr(module, "SSM_PARAMETERS", ())
        for name, parameter in _named(module):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            if name in names:
                ssm.append(parameter)
            elif "bias" in name or isinstance(module, _PLAIN):
                plain.append(parameter)
            else:
                decayed.append(parameter)
    groups = ((ssm, min(lr, ssm_lr), 0.0), (plain, lr, 0.0), (decayed, lr, weight_decay))
    return [{"params": group, "lr": rate, "weight_decay": decay} for group, rate, decay in groups if group]
