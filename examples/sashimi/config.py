"""The settings of a training run: defaults, presets, and the settings file of a run."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ssmkit import Sequential

from .audio import Quantizer
from .model import sashimi
from .problems import Problem


@dataclass(frozen=True)
class Settings:
    """All that a run depends on. The same settings give the same run."""

    data: Path | None = None
    """Folder of WAV, FLAC or OGG files, of any length and sample rate, mono or stereo, also in subfolders. Subfolders
    `train` and `heldout` are the split; otherwise the last tenth of the files is held out. By default the clips of the
    example."""
    sample_rate: int = 8000
    """Sample rate of the model, in Hz; files at another rate are resampled."""
    bits: int = 8
    """Bits per sample."""
    quantization: Literal["mu-law", "linear"] = "mu-law"
    """Steps between samples: finer near silence, or equal."""
    excerpt: int = 16384
    """Samples per training excerpt."""
    pad: bool = False
    """Pad files shorter than an excerpt with silence that does not count; without it they are left out."""

    d_model: int = 32
    """Width of the top tier."""
    d_state: int = 64
    """State size of each feature."""
    blocks: int = 2
    """Blocks per tier."""
    pool: tuple[int, ...] = (4, 4)
    """Factors of the rate from tier to tier."""
    layer: Literal["s4", "s4d"] = "s4d"
    """State matrix: diagonal plus low rank, or diagonal."""
    glu: bool = False
    """Gate the output of every block."""
    dropout: float = 0.0
    """Dropout inside the blocks."""

    steps: int = 950
    """Training steps."""
    batch: int = 1
    """Excerpts per step, over all processes."""
    accumulate: int = 1
    """Passes into which each process splits its part of the batch, to save memory."""
    recompute: bool = False
    """Compute the activations of each block again in the backward pass, to save memory."""
    bf16: bool = False
    """Compute in bfloat16 where that is safe; the state-space core stays in float32."""
    lr: float = 8e-3
    """Highest learning rate."""
    ssm_lr: float = 4e-3
    """Highest learning rate of the state-space parameters (poles, input gains, step sizes)."""
    weight_decay: float = 0.01
    """Weight decay, of the parameters that have one."""
    schedule: Literal["cosine", "constant", "tail"] = "cosine"
    """Learning rate after the warm-up: a cosine down to zero, constant, or a cosine over the last quarter only. A run
    can continue with another schedule if both have the same rates for the steps so far."""
    warmup: float = 0.05
    """Part of the steps in which the learning rate rises."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    noise: int = 0
    """Most classes by which each input sample is changed at random in training, up or down: the network learns to
    continue inexact samples, as its own are. Targets are not changed."""
    noise_until: float = 0.75
    """Part of the steps with that noise."""
    ema: float = 0.0
    """Decay of the averaged weights per step (0.999 averages over about 1,000 steps); 0 for no averages. The model file
    has the averaged weights."""
    seed: int = 0
    """Seed of weights, excerpts and dropout."""

    @property
    def quantizer(self) -> Quantizer:
        """How samples become classes."""
        return Quantizer(self.quantization, self.bits)

    def rate(self, step: int) -> float:
        """The factor of the learning rate at a step: a linear rise, then the schedule."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return (step + 1) / rise
        begin = {"cosine": rise, "constant": self.steps, "tail": max(rise, self.steps - self.steps // 4)}[self.schedule]
        return 0.5 + 0.5 * math.cos(math.pi * max(0, step - begin) / max(1, self.steps - begin))

    def model(self) -> Sequential:
        """The network, with its initial weights."""
        torch.manual_seed(self.seed)
        return sashimi(
            self.d_model,
            self.blocks,
            d_state=self.d_state,
            layer=self.layer,
            pool=self.pool,
            glu=self.glu,
            dropout=self.dropout,
            checkpoint=self.recompute,
            d_output=self.quantizer.classes,
        )


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "paper": {
        "sample_rate": 16_000,
        "d_model": 64,
        "blocks": 8,
        "layer": "s4",
        "glu": True,
        "excerpt": 128_000,
        "steps": 200_000,
        "lr": 4e-3,
        "ssm_lr": 1e-3,
        "ema": 0.999,
    },
    "notebook": {
        "sample_rate": 16_000,
        "d_model": 128,
        "d_state": 512,
        "blocks": 2,
        "layer": "s4",
        "excerpt": 128_000,
        "steps": 20_000,
        "lr": 1e-3,
        "ssm_lr": 1e-3,
        "weight_decay": 0.0,
        "schedule": "constant",
        "recompute": True,
    },
    "sc09": {
        "sample_rate": 16_000,
        "d_model": 64,
        "blocks": 8,
        "layer": "s4",
        "glu": True,
        "excerpt": 16_000,
        "pad": True,
        "batch": 32,
        "steps": 200_000,
        "lr": 1e-3,
        "ssm_lr": 1e-3,
        "ema": 0.999,
    },
}
"""Named settings: the short run, those of the SaShiMi paper for piano, those of the notebook from which this project
started, and those of the paper for one-second clips."""


def preset(name: str) -> Settings:
    """The settings of a name.

    Raises:
        Problem: If the name is unknown.
    """
    if name not in PRESETS:
        raise Problem(f"there is no preset {name!r}; there are {', '.join(PRESETS)}.")
    return Settings(**PRESETS[name])


def to_json(settings: Settings) -> str:
    """The text of a settings file."""
    return json.dumps(dataclasses.asdict(settings), indent=1, default=str) + "\n"


def from_json(text: str, where: Path) -> Settings:
    """Reads the text of :func:`to_json`; missing settings have their defaults.

    Raises:
        Problem: If it is not a settings file.
    """
    try:
        values = json.loads(text)
        known = {field.name: field for field in dataclasses.fields(Settings)}
        if unknown := sorted(set(values) - set(known)):
            raise Problem(f"{where} has the unknown settings {', '.join(unknown)}; is it of another version?")
        for name, value in values.items():
            if name == "data":
                values[name] = None if value is None else Path(value)
            elif name == "pool":
                values[name] = tuple(value)
            elif not isinstance(value, (type(known[name].default), int)):
                raise Problem(f"{where}: {name} cannot be {value!r}.")
        return Settings(**values)
    except (ValueError, TypeError) as error:
        raise Problem(f"{where} is not a settings file ({error}).") from error


def read(path: Path) -> Settings:
    """The settings in a file.

    Raises:
        Problem: If it cannot be read, or is not a settings file.
    """
    try:
        return from_json(path.read_text(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"{path} cannot be read ({error}).") from error
