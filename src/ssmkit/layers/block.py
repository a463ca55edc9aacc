r"""The residual block that SaShiMi and most S4 networks are built of."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import nn

from .. import _checks
from .base import SequenceLayer
from .chain import Chain, Residual
from .dropout import TiedDropout
from .pointwise import as_layer, output_width
from .s4 import S4

__all__ = ["S4Block"]


@final
class S4Block(Chain):
    r"""A pre-norm residual block around a sequence layer, followed by one around a feed-forward network.

    .. math:: v = u + W_1\, \mathrm{GELU}(\mathrm{S4}(\mathrm{LayerNorm}(u))), \qquad
        y = v + W_3\, \mathrm{GELU}(W_2\, \mathrm{LayerNorm}(v))

    With `glu`, :math:`W_1` gives twice the width and a gated linear unit halves it, as in the paper.

    References:
        | It's Raw! Audio Generation with State-Space Models (Goel et al., 2022), Figure 1
        | https://arxiv.org/abs/2202.09729

    Arguments:
        d_model: The width :math:`H`.
        layer: The sequence layer, which takes width `d_model`, or a function that makes it. The function may be a
            class; it is called with `d_model`, and with `device` and `dtype` if they are given. Options of the layer
            are given by `functools.partial(ssmkit.S4D, d_state=16)`.
        glu: Whether the first linear map is followed by a gated linear unit.
        ff: The width of the feed-forward network, as a multiple of `d_model`.
        dropout: The probability of dropout after every activation.
        tie_dropout: Whether dropout uses one mask for the whole sequence.
        device, dtype: Of the parameters, except those of a `layer` that already exists.

    Raises:
        TypeError: If `layer` is neither a torch module nor a function that makes one.
        ValueError: If a size is less than 1, or if `layer` does not take width `d_model` or has no known `d_output`.

    Example:
        >>> block = ssmkit.S4Block(8, ssmkit.S4D, glu=True)
        >>> block(torch.randn(2, 30, 8)).shape
        torch.Size([2, 30, 8])
        >>> block = ssmkit.S4Block(8, ssmkit.S4(8, d_state=16, rank=2))
    """

    def __init__(
        self,
        d_model: int,
        layer: SequenceLayer | Callable[..., SequenceLayer] = S4,
        *,
        glu: bool = False,
        ff: int = 2,
        dropout: float = 0.0,
        tie_dropout: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checks.integer("S4Block", "d_model", d_model)
        _checks.integer("S4Block", "ff", ff)
        _checks.probability("S4Block", "dropout", dropout)
        _checks.flags("S4Block", glu=glu, tie_dropout=tie_dropout)
        given = _checks.given("S4Block", device, dtype)
        if not isinstance(layer, nn.Module) and callable(layer):
            layer = layer(d_model, **{name: value for name, value in given.items() if value is not None})
        if not isinstance(layer, nn.Module):
            raise TypeError(
                f"S4Block: `layer` must be a sequence layer or a function of `d_model` that makes one, got "
                f"{type(layer).__name__}."
            )
        layer = as_layer("S4Block", "layer", layer)
        if layer.d_input not in (None, d_model):
            raise ValueError(f"S4Block: `layer` must take width {d_model} (`d_model`), got {layer.d_input}.")
        width = output_width(layer, d_model)
        if width is None:
            raise ValueError("S4Block: `layer` must know its output width (`d_output`).")

        def drop(d: int) -> list[nn.Module]:
            if not dropout:
                return []
            return [TiedDropout(d, dropout) if tie_dropout else nn.Dropout(dropout)]

        def norm() -> nn.Module:
            return nn.LayerNorm(d_model, device=device, dtype=dtype)

        def linear(d_in: int, d_out: int) -> nn.Module:
            return nn.Linear(d_in, d_out, device=device, dtype=dtype)

        gate = [nn.GLU()] if glu else []
        super().__init__(
            Residual(norm(), layer, nn.GELU(), *drop(width), linear(width, d_model * (2 if glu else 1)), *gate),
            Residual(
                norm(),
                linear(d_model, ff * d_model),
                nn.GELU(),
                *drop(ff * d_model),
                linear(ff * d_model, d_model),
            ),
        )
