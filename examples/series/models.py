"""A classifier of series: encoder, blocks, pooling over time, head."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from sashimi.checked import TensorFile
from sashimi.problems import Problem
from sashimi.storage import make_folder, write_checked
from ssmkit import S4D, S4Block, Sequential, sequences

FILE = "model.safetensors"
_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a network."""

    d_model: int = 64
    """Width of the network."""
    blocks: int = 3
    """Number of blocks."""
    d_state: int = 16
    """State size of each feature."""
    dt_min: float = 1e-3
    """Smallest step size at the start of training."""
    dt_max: float = 1e-1
    """Largest step size at the start of training."""
    dropout: float = 0.1
    """Probability of dropout, with one mask for the whole sequence."""

    @classmethod
    def of(cls, file: TensorFile) -> Sizes:
        """The sizes in the header of a file, compared with its length before anything of that size is made.

        Raises:
            KeyError, TypeError, ValueError: If they are damaged.
        """
        if set(file.card["sizes"]) != {field.name for field in fields(cls)}:
            raise ValueError("its sizes are not those of this program")
        sizes = cls(**file.card["sizes"])
        if not 0 < sizes.d_model * sizes.d_state * max(1, sizes.blocks) <= 8 * file.numbers:
            raise ValueError("its sizes do not fit its weights")
        return sizes

    def encoder(self, d_input: int) -> Sequential:
        """A linear map to the width, blocks and a norm.

        Raises:
            Problem: If the sizes do not fit.
        """
        layer = functools.partial(S4D, d_state=self.d_state, dt_min=self.dt_min, dt_max=self.dt_max)
        try:
            blocks = [S4Block(self.d_model, layer, dropout=self.dropout, tie_dropout=True) for _ in range(self.blocks)]
            return Sequential(nn.Linear(d_input, self.d_model), *blocks, nn.LayerNorm(self.d_model))
        except ValueError as error:
            raise Problem(str(error)) from error


class Classifier(nn.Module):
    """Classifies series of any length: the mean output of the encoder over time, and a linear map.

    Every channel is given twice: on a logarithmic scale of its own, in which small and large values differ, and without
    its mean and size, so that the shape can be recognised at any size.

    Arguments:
        channels: Channels of a series.
        classes: The names of the classes.
        sizes: The sizes of the encoder.

    Example:
        >>> model = Classifier(1, ("a", "b", "c"), Sizes(d_model=8, blocks=1))
        >>> model([torch.randn(50, 1), torch.randn(20, 1)]).shape
        torch.Size([2, 3])
    """

    unit: Tensor

    def __init__(self, channels: int, classes: tuple[str, ...], sizes: Sizes) -> None:
        super().__init__()
        self.classes, self.sizes = classes, sizes
        self.register_buffer("unit", torch.ones(channels))
        self.encoder = sizes.encoder(2 * channels)
        self.head = nn.Linear(sizes.d_model, len(classes))

    def measure(self, series: list[Tensor]) -> None:
        """Sets the unit of the logarithmic scale: the median size of the values of each channel."""
        self.unit.copy_(torch.cat(series).abs().median(0).values.clamp(min=1e-6))

    def inputs(self, x: Tensor) -> Tensor:
        """The input of the encoder, with shape (length, 2 channels)."""
        shape = (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-6)
        return torch.cat([torch.asinh(x / self.unit), shape], dim=-1)

    def forward(self, series: list[Tensor]) -> Tensor:
        """Series with shapes (length, channels) to logits with shape (B, classes)."""
        u, lengths = sequences.pad([self.inputs(x) for x in series])
        y = sequences.forward_padded(self.encoder, u, lengths)
        logits: Tensor = self.head(sequences.pool(y, lengths, "mean"))
        return logits


def save(model: Classifier, folder: Path) -> None:
    """Writes a model with its configuration and a checksum."""
    make_folder(folder)
    card = {"sizes": asdict(model.sizes), "classes": model.classes, "channels": len(model.unit)}
    write_checked(folder / FILE, model.state_dict(), **card)


def read(folder: Path, make: Callable[[TensorFile], _Model]) -> _Model:
    """Reads a model whose network `make` makes from the header of the file.

    Raises:
        Problem: If there is none, or it is damaged.
    """
    file = TensorFile(folder / FILE)
    try:
        model = make(file)
    except (KeyError, TypeError, ValueError) as error:
        raise Problem(f"{file.path} has a damaged header ({error}).") from error
    file.check(model.state_dict())
    model.load_state_dict(file.read())
    return model.eval()


def load(folder: Path) -> Classifier:
    """Reads a classifier.

    Raises:
        Problem: If there is none, or it is damaged.
    """

    def make(file: TensorFile) -> Classifier:
        sizes = Sizes.of(file)
        classes, channels = tuple(file.card["classes"]), file.card["channels"]
        if not 0 < channels * sizes.d_model <= file.numbers:
            raise ValueError("its channels do not fit its weights")
        return Classifier(channels, classes, sizes)

    return read(folder, make)
