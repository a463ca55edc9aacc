"""The weights of one Mamba or Mamba-2 block, which has the same names in transformers and mamba-ssm."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..layers import Mamba, Mamba2
from .renaming import Table, read, write

__all__ = ["from_mixer", "mixer_table", "to_mixer"]

# The modules and parameters of a mixer, and those of ssmkit that each joins, in the order of the rows. The norm of
# Mamba2 is at one of two places.
_MAMBA = {
    "in_proj": ("layers.mixer.layers.x.layers.in_proj.module", "layers.mixer.layers.z.layers.in_proj.module"),
    "conv1d": ("layers.mixer.layers.x.layers.conv",),
    "x_proj": ("layers.mixer.layers.x.layers.ssm.x_proj",),
    "dt_proj": ("layers.mixer.layers.x.layers.ssm.dt_proj",),
    "A_log": ("layers.mixer.layers.x.layers.ssm.A_log",),
    "D": ("layers.mixer.layers.x.layers.ssm.D",),
    "out_proj": ("layers.out_proj.module",),
}
_MAMBA2 = {
    "in_proj": (
        "layers.mixer.layers.z.layers.in_proj.module",
        "layers.mixer.layers.ssm.layers.input.layers.xBC.layers.in_proj.module",
        "layers.mixer.layers.ssm.layers.input.layers.dt.module",
    ),
    "conv1d": ("layers.mixer.layers.ssm.layers.input.layers.xBC.layers.conv",),
    "dt_bias": ("layers.mixer.layers.ssm.layers.ssd.dt_bias",),
    "A_log": ("layers.mixer.layers.ssm.layers.ssd.A_log",),
    "D": ("layers.mixer.layers.ssm.layers.ssd.D",),
    "norm": ("layers.norm.module", "layers.mixer.layers.ssm.layers.norm.module"),
    "out_proj": ("layers.out_proj.module",),
}


def mixer_table(layer: type[Mamba | Mamba2], shapes: Mapping[str, tuple[int, ...]]) -> Table:
    """The table of names for the weights of a mixer.

    Arguments:
        layer: The class of the block in ssmkit.
        shapes: The shapes of its weights, by name.

    Returns:
        The table, without the weights that the block does not have.
    """
    table: Table = {}
    for theirs, ours in (_MAMBA if layer is Mamba else _MAMBA2).items():
        for leaf in (".weight", ".bias", ""):
            if parts := {name + leaf: shapes[name + leaf] for name in ours if name + leaf in shapes}:
                table[theirs + leaf] = parts
    return table


def _table(where: str, layer: Mamba | Mamba2) -> Table:
    if not isinstance(layer, (Mamba, Mamba2)):
        raise TypeError(f"{where}: `layer` must be a `ssmkit.Mamba` or `ssmkit.Mamba2`, got a {type(layer).__name__}.")
    return mixer_table(type(layer), {name: tuple(value.shape) for name, value in layer.state_dict().items()})


def from_mixer(state_dict: Mapping[str, Tensor], layer: Mamba | Mamba2) -> dict[str, Tensor]:
    """Converts the weights of one block from transformers or mamba-ssm.

    The block is a `MambaMixer` or `Mamba2Mixer` of transformers, or a `Mamba` or `Mamba2` of mamba-ssm.

    Arguments:
        state_dict: The weights, with keys such as `in_proj.weight`.
        layer: The block of ssmkit for these weights. Only its shapes are read.

    Returns:
        The weights for `layer.load_state_dict`, as views of the given tensors.

    Raises:
        TypeError: If `state_dict` is no dictionary of tensors, or `layer` is not one of these blocks.
        ValueError: If keys are missing or unknown, or shapes are wrong; the message names them.

    Example:
        >>> layer, other = ssmkit.Mamba2(8, headdim=4), ssmkit.Mamba2(8, headdim=4)
        >>> weights = to_mixer(layer.state_dict(), layer)
        >>> weights["in_proj.weight"].shape  # rows of z, x, B, C and dt
        torch.Size([292, 8])
        >>> other.load_state_dict(from_mixer(weights, other))
        <All keys matched successfully>
        >>> u = torch.randn(2, 20, 8)
        >>> torch.equal(layer(u), other(u))
        True
    """
    return read("from_mixer", state_dict, _table("from_mixer", layer))


def to_mixer(state_dict: Mapping[str, Tensor], layer: Mamba | Mamba2) -> dict[str, Tensor]:
    """Converts the weights of one block to transformers or mamba-ssm, the inverse of :func:`from_mixer`.

    Arguments:
        state_dict: The weights of a block of ssmkit.
        layer: The block. Only its shapes are read.

    Returns:
        The weights for `load_state_dict` of a mixer.

    Raises:
        TypeError: If `state_dict` is no dictionary of tensors, or `layer` is not one of these blocks.
        ValueError: If keys are missing or unknown, or shapes are wrong; the message names them.

    Example:
        >>> layer = ssmkit.Mamba(8)
        >>> sorted(to_mixer(layer.state_dict(), layer))[:4]
        ['A_log', 'D', 'conv1d.bias', 'conv1d.weight']
    """
    return write("to_mixer", state_dict, _table("to_mixer", layer))
