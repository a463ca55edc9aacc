"""The sizes and options of Mamba language models, from configurations of other libraries and to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import _checks
from ..layers import Mamba, Mamba2

__all__ = ["Architecture"]

_EPS = 1e-5
"""Epsilon of the norm inside of Mamba2, and of all norms in mamba-ssm."""

# Options in transformers, with their names in ssmkit and their defaults in transformers.
_OF_BOTH: dict[str, tuple[str, Any]] = {
    "conv_kernel": ("d_conv", 4),
    "expand": ("expand", 2),
    "use_conv_bias": ("conv_bias", True),
    "use_bias": ("bias", False),
    "time_step_min": ("dt_min", 1e-3),
    "time_step_max": ("dt_max", 1e-1),
    "time_step_floor": ("dt_init_floor", 1e-4),
}
_OF_MAMBA: dict[str, tuple[str, Any]] = {
    "hidden_size": ("d_model", 768),
    "state_size": ("d_state", 16),
    "time_step_rank": ("dt_rank", "auto"),
    **_OF_BOTH,
}
_OF_MAMBA2: dict[str, tuple[str, Any]] = {
    "hidden_size": ("d_model", 4096),
    "state_size": ("d_state", 128),
    "head_dim": ("headdim", 64),
    "n_groups": ("ngroups", 8),
    "time_step_limit": ("dt_limit", (0.0, math.inf)),
    **_OF_BOTH,
}

# Fields of configurations of mamba-ssm, with their defaults there.
_FIELDS: dict[str, Any] = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
# Options in `ssm_cfg` that do not change the output of trained weights: initial values, and ways to compute the same.
_NO_EFFECT = {
    "chunk_size",
    "conv_init",
    "dt_init",
    "dt_scale",
    "sequence_parallel",
    "use_fast_path",
    "use_mem_eff_path",
}

_MODEL_TYPES: dict[str, type[Mamba | Mamba2]] = {"mamba": Mamba, "mamba2": Mamba2}
_SSM_LAYERS: dict[str, type[Mamba | Mamba2]] = {"Mamba1": Mamba, "Mamba2": Mamba2}


def _require(name: str, value: Any, allowed: Iterable[Any], why: str) -> None:
    """Raises an error if a value is not one of those that can be represented."""
    if value not in (allowed := list(allowed)):
        wanted = " or ".join(repr(item) for item in allowed)
        raise ValueError(f"Architecture: `{name}` must be {wanted} ({why}), got {value!r}.")


def _dictionary(config: Any) -> None:
    if not isinstance(config, Mapping):
        raise TypeError(
            f"Architecture: `config` must be a dictionary as in `config.json`, got a {type(config).__name__}; a "
            "configuration of transformers has `to_dict()`."
        )


def _option(name: str, value: Any) -> Any:
    """A value of a configuration as an argument of a layer."""
    if name == "dt_rank" and value == "auto":
        return None
    if isinstance(value, (list, tuple)):
        return tuple(_option(name, item) for item in value)
    if isinstance(value, Mapping) and set(value) == {"__float__"}:  # infinity in files of transformers
        return float(value["__float__"])
    return value


def _defaults(layer: type[Mamba | Mamba2]) -> dict[str, Any]:
    """The optional arguments of a layer, with their defaults."""
    # Not from `inspect.signature`: sphinx replaces the defaults there by text.
    init = vars(layer)["__init__"]
    names = init.__code__.co_varnames[: init.__code__.co_argcount]
    positional = zip(reversed(names), reversed(init.__defaults__), strict=False)
    found = {**dict(positional), **init.__kwdefaults__}
    return {name: value for name, value in found.items() if name not in ("device", "dtype")}


@dataclass(frozen=True)
class Architecture:
    r"""The sizes and options of a Mamba language model, with the names of ssmkit.

    Arguments:
        layer: :class:`ssmkit.Mamba` or :class:`ssmkit.Mamba2`.
        options: The arguments of the layer, including `d_model`. Missing ones get the defaults of the layer.
        n_layers: The number of blocks.
        vocab_size: The number of tokens, which is the number of rows of the embedding.
        eps: The :math:`\epsilon` of the norms before the layers and before the head.
        tied: Whether the head shares the weights of the embedding.

    Raises:
        TypeError: If a size is not an integer, or an option is not one of the layer.
        ValueError: If a size is not positive, or the layer refuses an option.

    Example:
        >>> architecture = Architecture(ssmkit.Mamba, {"d_model": 8}, n_layers=2, vocab_size=256)
        >>> architecture.options["d_state"]
        16
        >>> architecture.layer(**architecture.options)(torch.randn(2, 50, 8)).shape
        torch.Size([2, 50, 8])
    """

    layer: type[Mamba | Mamba2]
    options: Mapping[str, Any]
    n_layers: int
    vocab_size: int
    eps: float = _EPS
    tied: bool = True

    def __post_init__(self) -> None:
        _require("layer", self.layer, [Mamba, Mamba2], "a class of ssmkit")
        for name in ("n_layers", "vocab_size"):
            _checks.integer("Architecture", name, getattr(self, name))
        _checks.positive("Architecture", "eps", self.eps)
        object.__setattr__(self, "options", {**_defaults(self.layer), **self.options})
        self.layer_shapes()

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights of one layer, by name.

        Returns:
            The shapes.

        Example:
            >>> Architecture(ssmkit.Mamba, {"d_model": 8}, n_layers=2, vocab_size=256).layer_shapes()[
            ...     "layers.out_proj.module.weight"
            ... ]
            (8, 16)
        """
        with torch.device("meta"):  # needs no memory, and draws no random numbers
            return {name: tuple(value.shape) for name, value in self.layer(**self.options).state_dict().items()}

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> Architecture:
        """Reads a configuration of `MambaForCausalLM` or `Mamba2ForCausalLM` of transformers.

        Missing entries have the defaults of transformers. Entries that do not change the output of given weights are
        ignored (special tokens, dtypes, initial values, ways to compute the same), and so are those that transformers
        ignores.

        Arguments:
            config: The dictionary in `config.json`.

        Returns:
            The architecture.

        Raises:
            TypeError: If `config` is no dictionary, or a size is not an integer.
            ValueError: If `model_type` is unknown, or ssmkit cannot represent an option.

        Example:
            >>> config = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 256}
            >>> Architecture.from_transformers(config).options["d_state"]
            16
        """
        _dictionary(config)
        layer = _MODEL_TYPES[_checks.known("Architecture", "model_type", config.get("model_type"), _MODEL_TYPES)]
        _require("hidden_act", config.get("hidden_act", "silu"), ["silu", "swish"], "the activation of the layers")
        first = layer is Mamba
        names = _OF_MAMBA if first else _OF_MAMBA2
        made = cls(
            layer,
            {ours: _option(ours, config.get(theirs, default)) for theirs, (ours, default) in names.items()},
            n_layers=config.get("num_hidden_layers", 32 if first else 64),
            vocab_size=config.get("vocab_size", 50280 if first else 32768),
            eps=config.get("layer_norm_epsilon", _EPS),
            tied=config.get("tie_word_embeddings", first),
        )
        width = made.options["expand"] * made.options["d_model"]
        if first:
            _require("intermediate_size", config.get("intermediate_size", width), [width], "expand * hidden_size")
        else:
            features = config.get("num_heads", 128) * made.options["headdim"]
            _require("num_heads * head_dim", features, [width], "expand * hidden_size")
            _require("layer_norm_epsilon", made.eps, [_EPS], "the one of the norm inside of Mamba2")
        return made

    def to_transformers(self) -> dict[str, Any]:
        r"""Writes the configuration for transformers.

        Returns:
            The dictionary for `config.json`, or for `MambaConfig` and `Mamba2Config`. It has no special tokens, such as
            `eos_token_id`: unless you add them, transformers uses its defaults.

        Raises:
            ValueError: If transformers cannot represent an option. Its Mamba2 always has a norm, after the gate, one
                `D` per head, and one :math:`\epsilon` for all norms, which must be that of ssmkit, :math:`10^{-5}`.

        Example:
            >>> architecture = Architecture(ssmkit.Mamba2, {"d_model": 64, "headdim": 16}, n_layers=2, vocab_size=256)
            >>> architecture.to_transformers()["num_heads"]
            8
        """
        first, options = self.layer is Mamba, self.options
        kind = "mamba" if first else "mamba2"
        config = {
            "architectures": [f"{kind.capitalize()}ForCausalLM"],
            "model_type": kind,
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.n_layers,
            "layer_norm_epsilon": self.eps,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
        }
        for theirs, (ours, default) in (_OF_MAMBA if first else _OF_MAMBA2).items():
            config[theirs] = default if options[ours] is None else options[ours]
        if not first:
            for name, value in (("rmsnorm", True), ("norm_before_gate", False), ("D_has_hdim", False)):
                _require(name, options[name], [value], "the only one in transformers")
            _require("eps", self.eps, [_EPS], "transformers uses it for the norm inside of Mamba2 too")
            config["num_heads"] = options["expand"] * options["d_model"] // options["headdim"]
            if config.pop("time_step_limit") != (0.0, math.inf):  # the default, and JSON has no infinity
                config["time_step_limit"] = list(options["dt_limit"])
        return config

    @classmethod
    def from_mamba_ssm(cls, config: Mapping[str, Any]) -> Architecture:
        """Reads a configuration of `MambaLMHeadModel` of mamba-ssm.

        Missing fields have the defaults of mamba-ssm. As in mamba-ssm, the number of tokens is rounded up to a multiple
        of `pad_vocab_size_multiple`.

        Arguments:
            config: The dictionary in `config.json`.

        Returns:
            The architecture.

        Raises:
            TypeError: If `config` is no dictionary, if a size is not an integer, or if `ssm_cfg` has an option that is
                not one of the layer.
            ValueError: If a field is unknown, or ssmkit cannot represent an option (attention, feed-forward parts,
                LayerNorm, Mamba3).

        Example:
            >>> config = {"d_model": 8, "n_layer": 2, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba1"}}
            >>> Architecture.from_mamba_ssm(config).vocab_size
            50280
        """
        _dictionary(config)
        for name in config:
            _checks.known("Architecture", "field", name, _FIELDS)
        config = {**_FIELDS, **config}
        given = dict(config["ssm_cfg"] or {})
        layer = _SSM_LAYERS[_checks.known("Architecture", "layer", given.pop("layer", "Mamba1"), _SSM_LAYERS)]
        _require("d_intermediate", config["d_intermediate"], [0], "feed-forward parts are not supported")
        _require("attn_layer_idx", list(config["attn_layer_idx"] or []), [[]], "attention is not supported")
        _require("rms_norm", config["rms_norm"], [True], "LayerNorm is not supported")
        _require("process_group", given.pop("process_group", None), [None], "several processes are not supported")
        inner = given.pop("d_ssm", None) if layer is Mamba2 else None
        options = {name: _option(name, value) for name, value in given.items() if name not in _NO_EFFECT}
        multiple = _checks.integer("Architecture", "pad_vocab_size_multiple", config["pad_vocab_size_multiple"])
        tokens = _checks.integer("Architecture", "vocab_size", config["vocab_size"])
        made = cls(
            layer,
            {**options, "d_model": config["d_model"]},
            n_layers=config["n_layer"],
            vocab_size=-(-tokens // multiple) * multiple,
            tied=config["tie_embeddings"],
        )
        width = made.options["expand"] * made.options["d_model"]
        _require("d_ssm", inner, [None, width], "expand * d_model")
        return made

    def to_mamba_ssm(self) -> dict[str, Any]:
        """Writes the configuration for mamba-ssm.

        Returns:
            The dictionary for `config.json`, or for its `MambaConfig`.

        Raises:
            ValueError: If `eps` is not 1e-5, the only one in mamba-ssm.

        Example:
            >>> architecture = Architecture(ssmkit.Mamba, {"d_model": 8}, n_layers=2, vocab_size=256)
            >>> architecture.to_mamba_ssm()["ssm_cfg"]["layer"]
            'Mamba1'
        """
        _require("eps", self.eps, [_EPS], "the only one in mamba-ssm")
        given = {name: list(v) if isinstance(v, tuple) else v for name, v in self.options.items() if name != "d_model"}
        if self.layer is Mamba:
            given["dt_rank"] = "auto" if given["dt_rank"] is None else given["dt_rank"]
        elif given["dt_limit"] == [0.0, math.inf]:
            del given["dt_limit"]  # the default, and JSON has no infinity
        return {
            **_FIELDS,
            "d_model": self.options["d_model"],
            "n_layer": self.n_layers,
            "vocab_size": self.vocab_size,
            "ssm_cfg": {"layer": "Mamba1" if self.layer is Mamba else "Mamba2", **given},
            "pad_vocab_size_multiple": 1,
            "tie_embeddings": self.tied,
        }
