"""The settings of a training run: defaults, presets, and the settings file of a run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from ssmkit import Sequential

from .audio import Quantizer
from .checked import is_whole, parse_object, read_text
from .model import least_size, sashimi
from .problems import Problem

LARGEST_SEED = 2**63 - 1
_LARGEST = 2**31 - 1
"""Of all other whole numbers."""
_LARGEST_STATE = 8192
"""Of d_state: initial poles are those of a dense matrix of that size."""
_TIERS = 16


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

    init_from: Path | None = None
    """A model file, or the folder of a run, whose weights a new run starts from (fine-tuning). Its network must be that
    of these settings; the optimiser starts anew."""
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

    @property
    def least_size(self) -> int:
        """A number of weights that the network has at least, known without making it."""
        return least_size(
            self.d_model, self.blocks, d_state=self.d_state, pool=self.pool, d_output=self.quantizer.classes
        )

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


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{
        name: (lambda value: value >= 1, "at least 1")
        for name in ("sample_rate", "excerpt", "blocks", "steps", "batch", "accumulate")
    },
    "d_state": (lambda value: value <= _LARGEST_STATE, f"at most {_LARGEST_STATE:,}"),
    "pool": (lambda value: len(value) < _TIERS, f"fewer than {_TIERS} factors"),
    "noise": (lambda value: value >= 0, "at least 0"),
    "noise_until": (lambda value: 0 <= value <= 1, "at least 0 and at most 1"),
    "warmup": (lambda value: 0 <= value <= 1, "at least 0 and at most 1"),
    "ema": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "clip": (lambda value: value > 0, "above 0"),
    "seed": (lambda value: 0 <= value <= LARGEST_SEED, f"at least 0 and at most {LARGEST_SEED}"),
}
"""Which values a setting may have, and the words for it. What else a network asks for, it says itself."""
_KINDS: dict[str, Any] = get_type_hints(Settings)


def check(settings: Settings, where: Path | None = None) -> None:
    """Makes sure that settings are in their ranges.

    Arguments:
        settings: The settings.
        where: The file that they are from; by default they are options of the command line.

    Raises:
        Problem: If one is not.
    """
    for name, kind in _KINDS.items():
        value = getattr(settings, name)
        if kind is float and not math.isfinite(value):
            rule = "a finite number"
        elif kind is int and name != "seed" and value > _LARGEST:
            rule = f"at most {_LARGEST:,}"
        elif name in _RANGES and not _RANGES[name][0](value):
            rule = _RANGES[name][1]
        else:
            continue
        option = f"--{name.replace('_', '-')}" if where is None else f"{where}: {name}"
        raise Problem(f"{option} must be {rule}, not {value}.")
    try:
        classes = settings.quantizer.classes
    except Problem as problem:
        if where is None:
            raise
        raise Problem(f"{where}: {problem}") from problem
    if settings.noise >= classes:
        raise Problem(f"noise of {settings.noise} is more than there are classes; lower --noise.")


def _read_value(kind: Any, value: Any) -> Any:
    """The value of a setting of that kind out of a JSON text.

    Raises:
        ValueError: If it is of another kind.
    """
    if kind is float and (isinstance(value, float) or (is_whole(value, -_LARGEST) and value <= _LARGEST)):
        return value
    if kind is int and is_whole(value, -_LARGEST):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if get_origin(kind) is tuple and isinstance(value, list) and all(is_whole(x, 1) for x in value):
        return tuple(value)
    if kind == Path | None and (value is None or isinstance(value, str)):
        return None if value is None else Path(value)
    raise ValueError(value)


def from_json(text: str, where: Path) -> Settings:
    """Reads the text of :func:`to_json`; missing settings have their defaults.

    Raises:
        Problem: If it is not a settings file.
    """
    try:
        values = parse_object(text)
    except ValueError as error:
        raise Problem(f"{where} is not a settings file ({error}).") from error
    if unknown := sorted(set(values) - set(_KINDS)):
        raise Problem(f"{where} has the unknown settings {', '.join(unknown)}; is it of another program?")
    for name, value in values.items():
        try:
            values[name] = _read_value(_KINDS[name], value)
        except ValueError as error:
            raise Problem(f"{where}: {name} cannot be {value!r}.") from error
    settings = Settings(**values)
    check(settings, where)
    return settings


def read(path: Path) -> Settings:
    """The settings in a file.

    Raises:
        Problem: If it cannot be read, or is not a settings file.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Problem(f"{path} cannot be read ({reason}).") from error
    return from_json(text, path)
