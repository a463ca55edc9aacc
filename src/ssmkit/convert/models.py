"""The weights of whole language models of transformers and mamba-ssm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .architecture import Architecture
from .mixers import mixer_table
from .renaming import Table, check_tensors, read, write

__all__ = ["from_mamba_ssm", "from_transformers", "to_mamba_ssm", "to_transformers"]

# The only name in which the two libraries differ; transformers also reads that of mamba-ssm.
_TRANSFORMERS, _MAMBA_SSM = "backbone.embeddings.weight", "backbone.embedding.weight"
_HEAD = "lm_head.weight"
_OURS, _OUR_HEAD = "layers.embedding.module.weight", "layers.head.module.weight"


def _table(architecture: Architecture, embedding: str) -> Table:
    d, tokens = architecture.options["d_model"], architecture.vocab_size
    mixer = mixer_table(architecture.layer, architecture.layer_shapes())
    table: Table = {embedding: {_OURS: (tokens, d)}}
    for i in range(architecture.n_layers):
        theirs, ours = f"backbone.layers.{i}", f"layers.blocks.layers.{i}.layers"
        table[f"{theirs}.norm.weight"] = {f"{ours}.norm.module.weight": (d,)}
        for name, parts in mixer.items():
            table[f"{theirs}.mixer.{name}"] = {f"{ours}.mixer.{part}": shape for part, shape in parts.items()}
    table["backbone.norm_f.weight"] = {"layers.norm.module.weight": (d,)}
    table[_HEAD] = {_OUR_HEAD: (tokens, d)}
    return table


def _tie(where: str, state_dict: Mapping[str, Tensor], embedding: str, head: str) -> dict[str, Tensor]:
    """Adds the head or the embedding of a tied model if only one of the two is given, as in most files."""
    weights = dict(state_dict)
    found = [weights[name] for name in (embedding, head) if name in weights]
    if len(found) == 2 and not torch.equal(*found):
        raise ValueError(
            f"{where}: {head} and {embedding} must be equal, as the configuration ties them, got different tensors; "
            "correct the configuration."
        )
    for one, other in ((embedding, head), (head, embedding)):
        if one in weights:
            weights[other] = weights[one]
    return weights


def _from(
    where: str, state_dict: Mapping[str, Tensor], architecture: Architecture, embedding: str
) -> dict[str, Tensor]:
    check_tensors(where, state_dict)
    other = _MAMBA_SSM if embedding == _TRANSFORMERS else _TRANSFORMERS
    if embedding not in state_dict:
        state_dict = {embedding if name == other else name: value for name, value in state_dict.items()}
    if architecture.tied:
        state_dict = _tie(where, state_dict, embedding, _HEAD)
    return read(where, state_dict, _table(architecture, embedding))


def _to(where: str, state_dict: Mapping[str, Tensor], architecture: Architecture, embedding: str) -> dict[str, Tensor]:
    check_tensors(where, state_dict)
    if architecture.tied:
        state_dict = _tie(where, state_dict, _OURS, _OUR_HEAD)
    return write(where, state_dict, _table(architecture, embedding))


def from_transformers(state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | Architecture) -> dict[str, Tensor]:
    """Converts the weights of `MambaForCausalLM` or `Mamba2ForCausalLM` from transformers.

    Arguments:
        state_dict: The weights, with keys such as `backbone.embeddings.weight`. A tied `lm_head.weight` may be missing.
        config: The dictionary in `config.json`, or the :class:`Architecture` from it.

    Returns:
        The weights of the network shown in :mod:`ssmkit.convert`, for its `load_state_dict`, as views of the given
        tensors.

    Raises:
        TypeError: If `state_dict` is no dictionary of tensors, or as :meth:`Architecture.from_transformers`.
        ValueError: If keys are missing or unknown, or shapes are wrong, which the message names; if a tied head
            differs from the embedding; or as :meth:`Architecture.from_transformers`.

    Example:
        >>> config = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
        >>> architecture = Architecture.from_transformers(config)
        >>> mixer = architecture.layer(**architecture.options)
        >>> block = ssmkit.Residual({"norm": torch.nn.RMSNorm(8, architecture.eps), "mixer": mixer})
        >>> model = ssmkit.Sequential(
        ...     {
        ...         "embedding": torch.nn.Embedding(16, 8),
        ...         "blocks": ssmkit.Sequential(block),
        ...         "norm": torch.nn.RMSNorm(8, architecture.eps),
        ...         "head": torch.nn.Linear(8, 16, bias=False),
        ...     }
        ... )
        >>> model["head"].module.weight = model["embedding"].module.weight  # tied
        >>> weights = to_transformers(model.state_dict(), config)
        >>> weights["backbone.layers.0.mixer.in_proj.weight"].shape
        torch.Size([32, 8])
        >>> model.load_state_dict(from_transformers(weights, config))
        <All keys matched successfully>
    """
    architecture = config if isinstance(config, Architecture) else Architecture.from_transformers(config)
    return _from("from_transformers", state_dict, architecture, _TRANSFORMERS)


def to_transformers(state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | Architecture) -> dict[str, Tensor]:
    """Converts weights to `MambaForCausalLM` or `Mamba2ForCausalLM` of transformers.

    The inverse of :func:`from_transformers`.

    Arguments:
        state_dict: The weights of the network shown in :mod:`ssmkit.convert`.
        config: The dictionary for `config.json`, or the :class:`Architecture` from which it is made.

    Returns:
        The weights for `load_state_dict` in transformers. A tied head is the same tensor as the embedding; in files it
        is left out.

    Raises:
        TypeError: If `state_dict` is no dictionary of tensors, or as :meth:`Architecture.from_transformers`.
        ValueError: As :func:`from_transformers`, and as :meth:`Architecture.to_transformers`.

    Example:
        >>> architecture = Architecture(ssmkit.Mamba, {"d_model": 8}, n_layers=1, vocab_size=16)
        >>> to_transformers({}, architecture)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: to_transformers: `state_dict` must match ... (missing: layers.embedding.module.weight, ...
    """
    architecture = config if isinstance(config, Architecture) else Architecture.from_transformers(config)
    architecture.to_transformers()  # raises an error if transformers has no such network
    return _to("to_transformers", state_dict, architecture, _TRANSFORMERS)


def from_mamba_ssm(state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | Architecture) -> dict[str, Tensor]:
    """Converts the weights of `MambaLMHeadModel` from mamba-ssm.

    Arguments:
        state_dict: The weights, with keys such as `backbone.embedding.weight`. A tied `lm_head.weight` may be missing.
        config: The dictionary in `config.json`, or the :class:`Architecture` from it.

    Returns:
        The weights of the network shown in :mod:`ssmkit.convert`, for its `load_state_dict`, as views of the given
        tensors.

    Raises:
        TypeError: If `state_dict` is no dictionary of tensors, or as :meth:`Architecture.from_mamba_ssm`.
        ValueError: If keys are missing or unknown, or shapes are wrong, which the message names; if a tied head
            differs from the embedding; or as :meth:`Architecture.from_mamba_ssm`.

    Example:
        >>> from_mamba_ssm({}, {"d_model": 8, "ssm_cfg": {"layer": "Mamba3"}})
        Traceback (most recent call last):
            ...
        ValueError: Architecture: unknown `layer` 'Mamba3'; the known ones are Mamba1, Mamba2. Did you mean 'Mamba2'?
    """
    architecture = config if isinstance(config, Architecture) else Architecture.from_mamba_ssm(config)
    return _from("from_mamba_ssm", state_dict, architecture, _MAMBA_SSM)


def to_mamba_ssm(state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | Architecture) -> dict[str, Tensor]:
    """Converts weights to `MambaLMHeadModel` of mamba-ssm.

    The inverse of :func:`from_mamba_ssm`.

    Arguments:
        state_dict: The weights of the network shown in :mod:`ssmkit.convert`.
        config: The dictionary for `config.json`, or the :class:`Architecture` from which it is made.

    Returns:
        The weights for `load_state_dict` in mamba-ssm. A tied head is the same tensor as the embedding.

    Raises:
        TypeError: If `state_dict` is no dictionary of tensors, or as :meth:`Architecture.from_mamba_ssm`.
        ValueError: As :func:`from_mamba_ssm`, and as :meth:`Architecture.to_mamba_ssm`.

    Example:
        >>> to_mamba_ssm({}, Architecture(ssmkit.Mamba, {"d_model": 8}, n_layers=1, vocab_size=16, eps=1e-6))
        Traceback (most recent call last):
            ...
        ValueError: Architecture: `eps` must be 1e-05 (the only one in mamba-ssm), got 1e-06.
    """
    architecture = config if isinstance(config, Architecture) else Architecture.from_mamba_ssm(config)
    architecture.to_mamba_ssm()  # raises an error if mamba-ssm has no such network
    return _to("to_mamba_ssm", state_dict, architecture, _MAMBA_SSM)
