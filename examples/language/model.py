"""The network of a Mamba language model, composed of ssmkit's layers, and the folder in which it is stored."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from sashimi.problems import Problem
from sashimi.storage import make_folder, read_tensors, write_tensors, write_text, writing
from ssmkit import Residual, Sequential, convert
from ssmkit.convert import Architecture

CONFIG, WEIGHTS, INDEX, PICKLE = "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
OTHERS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files that are copied when a model is written to another folder."""

Library: TypeAlias = Literal["transformers", "mamba-ssm"]


def language_model(architecture: Architecture) -> Sequential:
    """A Mamba language model, from tokens to the logits of the next token.

    The weights are initialised as in mamba-ssm: embeddings with a standard deviation of 0.02, and the last linear map
    of every layer divided by the square root of the number of layers, which keeps the size of their sum.

    Arguments:
        architecture: Its sizes and options.

    Example:
        >>> import ssmkit
        >>> model = language_model(Architecture(ssmkit.Mamba, {"d_model": 8}, n_layers=2, vocab_size=256))
        >>> model(torch.randint(256, (3, 20))).shape
        torch.Size([3, 20, 256])
    """
    d, tokens = architecture.options["d_model"], architecture.vocab_size

    def block() -> Residual:
        mixer = architecture.layer(**architecture.options)
        with torch.no_grad():
            mixer["out_proj"].get_parameter("module.weight").div_(math.sqrt(architecture.n_layers))
        return Residual({"norm": nn.RMSNorm(d, architecture.eps), "mixer": mixer})

    embedding = nn.Embedding(tokens, d)
    nn.init.normal_(embedding.weight, std=0.02)
    network = Sequential(
        {
            "embedding": embedding,
            "blocks": Sequential(*(block() for _ in range(architecture.n_layers))),
            "norm": nn.RMSNorm(d, architecture.eps),
            "head": nn.Linear(d, tokens, bias=False),
        }
    )
    if architecture.tied:
        tie(network)
    return network


def tie(network: Sequential) -> None:
    """Makes the head share the weights of the embedding."""
    network["head"].get_submodule("module").register_parameter(
        "weight", network["embedding"].get_parameter("module.weight")
    )


@dataclass(frozen=True)
class LanguageModel:
    """A network with its configuration."""

    network: Sequential
    architecture: Architecture
    config: dict[str, Any]
    """The dictionary in `config.json`, with special tokens."""

    @property
    def library(self) -> Library:
        """The library of the configuration."""
        return library_of(self.config)

    @property
    def stop(self) -> list[int]:
        """The tokens that end a text, from the configuration."""
        token = self.config.get("eos_token_id")
        return [] if token is None else [token] if isinstance(token, int) else list(token)


def library_of(config: dict[str, Any]) -> Library:
    """The library of a configuration: those of mamba-ssm have no `model_type`."""
    return "transformers" if "model_type" in config else "mamba-ssm"


def new_model(architecture: Architecture) -> LanguageModel:
    """A model with initial weights."""
    return LanguageModel(language_model(architecture), architecture, _config(architecture, "transformers"))


def _config(architecture: Architecture, library: Library) -> dict[str, Any]:
    if library == "mamba-ssm":
        return architecture.to_mamba_ssm()
    # Else transformers would use its defaults, which may be other tokens of this vocabulary.
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return {**architecture.to_transformers(), **special}


def load_model(folder: Path) -> LanguageModel:
    """Reads a folder with `config.json` and weights of transformers or mamba-ssm, and converts them to float32.

    Raises:
        Problem: If a file is missing or damaged, or ssmkit has no such network.
    """
    config = _read_config(folder)
    try:
        if library_of(config) == "transformers":
            architecture = Architecture.from_transformers(config)
            weights = convert.from_transformers(_read_weights(folder), architecture)
        else:
            architecture = Architecture.from_mamba_ssm(config)
            weights = convert.from_mamba_ssm(_read_weights(folder), architecture)
    except (TypeError, ValueError) as error:
        raise Problem(f"{folder} cannot be converted ({error})") from error
    # Without memory or initial values: the weights are assigned below.
    with torch.device("meta"):
        network = language_model(architecture)
    network.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    if architecture.tied:
        tie(network)
    return LanguageModel(network.eval(), architecture, config)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise Problem(f"{path} does not exist; give the folder of a model.")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Problem(f"{path} cannot be read ({error}).") from error
    if not isinstance(config, dict):
        raise Problem(f"{path} is not a configuration.")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights, from one file, or from several that are listed in an index."""
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)[0]
    if (index := folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Problem(f"{index} cannot be read ({error!r}).") from error
        return {key: value for name in names for key, value in read_tensors(folder / name)[0].items()}
    if (path := folder / PICKLE).is_file():
        try:
            weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise any error
            raise Problem(f"{path} cannot be read ({error!r}).") from error
        return weights
    raise Problem(f"{folder} has no weights; it needs {WEIGHTS}, {INDEX} or {PICKLE}.")


def save_model(model: LanguageModel, folder: Path, library: Library | None = None, source: Path | None = None) -> None:
    """Writes a folder that transformers or mamba-ssm can load.

    Arguments:
        model: The model.
        folder: The folder to write.
        library: The library, by default that of the model's configuration.
        source: The folder from which the model was read; its tokenizer files are copied.

    Raises:
        Problem: If the library cannot represent the network, or a file cannot be written.
    """
    library = library or model.library
    weights = {name: value.detach().cpu() for name, value in model.network.state_dict().items()}
    make = convert.to_transformers if library == "transformers" else convert.to_mamba_ssm
    try:
        config = model.config if library == model.library else _config(model.architecture, library)
        tensors = make(weights, model.architecture)
    except ValueError as error:
        raise Problem(f"the model cannot be written for {library} ({error})") from error
    make_folder(folder)
    if library == "transformers":
        if model.architecture.tied:
            del tensors["lm_head.weight"]
        write_tensors(folder / WEIGHTS, tensors, format="pt")
    else:
        with writing(folder / PICKLE) as part:
            torch.save(tensors, part)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    for name in OTHERS:
        if source is not None and (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)
