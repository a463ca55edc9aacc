"""The commands of the program and their options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from tyro.conf import OmitArgPrefixes

from .config import Settings

PIANO = Path(__file__).parents[1] / "models" / "piano.safetensors"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUN = Path("runs/youtubemix")


@dataclass(frozen=True)
class Train:
    """Train on a folder of audio. The same command takes up a run that was stopped, however it was stopped.

    On several GPUs or machines: torchrun --nproc-per-node N examples/sashimi_youtubemix.py train ...
    """

    settings: OmitArgPrefixes[Settings] = field(default_factory=Settings)
    preset: Literal["small", "paper", "notebook", "sc09"] = "small"
    """Settings to start from: the short run, the SaShiMi paper's for piano, the notebook's that this project grew from,
    the paper's for one-second clips. Other flags change single ones."""
    config: Path | None = None
    """A settings file to start from, as it lies beside every run."""
    out: Path = RUN
    """Folder of the run."""
    checkpoint_every: int = 200
    """Steps from checkpoint to checkpoint."""
    device: str = DEVICE
    """Where to compute."""


@dataclass(frozen=True)
class Evaluate:
    """Measure a model on held-out audio, by `forward` and on a part of it by `step`, beside what needs no
    network: counting, and an adaptive linear filter."""

    model: Path = PIANO
    """A model file, or the folder of a run; by default a small model of one piano piece that comes along."""
    data: Path | None = None
    """Folder of audio, by default that of the training; the split is the same."""
    step_samples: int = 2000
    """Samples that are measured by `step` as well."""
    device: str = DEVICE
    """Where to compute."""


@dataclass(frozen=True)
class Generate:
    """Let a model play. The file grows while it runs, and Ctrl-C keeps what there is.

    Into a player: generate --stream --seconds inf | aplay
    """

    model: Path = PIANO
    """A model file, or the folder of a run; by default a small model of one piano piece that comes along."""
    out: Path = Path("generated.wav")
    """WAV file to write; of a batch, one file per stream with a number."""
    seconds: float = 4.0
    """Length of what is generated; inf goes on until Ctrl-C, or until the player that listens is closed."""
    stream: bool = False
    """Write the WAV to standard output, as it is made, instead of to a file."""
    batch: int = 1
    """Streams side by side."""
    temperature: float = 0.9
    """Below 1 the draw is less bold and keeps to likely samples, above 1 it is bolder; at 0 it is greedy."""
    top_k: int = 0
    """Draw from so many of the likeliest samples; 0 for all."""
    top_p: float = 0.9
    """Draw from the likeliest samples that together have this probability; 1 for all, now and then one that a network
    cannot go on from."""
    greedy: bool = False
    """Always take the likeliest sample."""
    seed: int = 0
    """Of the draw: the same seed plays the same."""
    prime: Path | None = None
    """Audio file to go on from, at the model's sample rate; the output begins with it."""
    prime_seconds: float | None = None
    """How much of that file, by default all of it."""
    resume: Path | None = None
    """State file of an earlier generation to go on from: it lies beside its WAV file. Its batch and its draw go on."""
    engine: Literal["auto", "program", "compile", "step"] = "auto"
    """What runs the network: a compiled program (on a CPU, where it is the fastest by far, and the default there), its
    step under torch.compile, or its step as it is."""
    threads: int | None = None
    """Of a compiled program, at most the machine's cores; by default one for one stream. Two are faster if two cores
    have nothing else to do."""
    device: str = DEVICE
    """Where to compute."""


@dataclass(frozen=True)
class Overfit:
    """The overfitting test at full size: one minute of audio in one training step (width 128, state 512, 2 blocks per
    tier, Adam at 1e-3). Prints the time and the peak memory of every step."""

    data: Path | None = None
    """Folder of audio whose first file is learned; by default the clips that come with the example."""
    out: Path = Path("runs/overfit")
    """Folder for the loss curve."""
    epochs: int = 50
    """Training steps."""
    seed: int = 0
    """Of the weights."""
    device: str = DEVICE
    """Where to compute."""


@dataclass(frozen=True)
class Report:
    """Write one HTML page about a run: settings, losses, likelihoods, clips to hear and how much of them
    are tones that last, layers before and after."""

    run: Path = RUN
    """Folder of the run."""
    out: Path | None = None
    """The page, by default report.html in that folder."""
    seconds: float = 4.0
    """Length of the generated clips."""
    device: str = DEVICE
    """Where to compute."""


Command: TypeAlias = Train | Evaluate | Generate | Overfit | Report
