"""Training of a byte-level language model: text, settings, the loop, and its likelihood on held-out text."""

from __future__ import annotations

import lzma
import math
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sashimi.problems import Problem
from ssmkit import Mamba, Mamba2, Sequential, param_groups
from ssmkit.convert import Architecture

SUFFIXES = (".md", ".py", ".rst", ".txt")
HELD_OUT = 20
"""One of this many files is held out."""


@dataclass(frozen=True)
class Settings:
    """Settings of a training run. The same settings and text give the same model."""

    data: Path | None = None
    """A text file, whose last twentieth is held out, or a folder with .py, .rst, .md and .txt files, also in
    subfolders, of which every twentieth is held out. By default the installed sources of Python's standard library."""
    layer: Literal["mamba", "mamba2"] = "mamba2"
    """The state-space layer."""
    d_model: int = 128
    """Width of the network."""
    layers: int = 4
    """Number of blocks."""
    d_state: int = 32
    """States of each inner feature."""
    headdim: int = 32
    """Inner features per head, for mamba2."""
    steps: int = 800
    """Training steps."""
    batch: int = 4
    """Excerpts per step."""
    excerpt: int = 512
    """Bytes per excerpt."""
    lr: float = 4e-3
    """Highest learning rate. It rises linearly over the first twentieth of the steps, and falls to zero by a cosine."""
    weight_decay: float = 0.05
    """Decay of the weights that have one."""
    seed: int = 0
    """Seed of the weights and excerpts."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "excerpt"):
            if getattr(self, name) < 1:
                raise Problem(f"--{name} must be at least 1, not {getattr(self, name)}.")

    @property
    def architecture(self) -> Architecture:
        """Sizes and options of the network.

        Raises:
            Problem: If the sizes do not fit together.
        """
        options = {"d_model": self.d_model, "d_state": self.d_state}
        if self.layer == "mamba2":
            options["headdim"] = self.headdim
        try:
            return Architecture(
                Mamba if self.layer == "mamba" else Mamba2, options, n_layers=self.layers, vocab_size=256
            )
        except ValueError as error:
            raise Problem(str(error)) from error

    def rate(self, step: int) -> float:
        """The factor of the learning rate at a step."""
        rise = max(1, self.steps // 20)
        if step < rise:
            return (step + 1) / rise
        return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, self.steps - rise))


@dataclass(frozen=True)
class Text:
    """Bytes for training, and held-out bytes for evaluation."""

    training: Tensor
    held_out: Tensor
    files: int


def read_text(data: Path | None) -> Text:
    """Reads the text for training.

    Raises:
        Problem: If it cannot be read, or there are too few files.
    """
    source = data if data is not None else Path(sysconfig.get_path("stdlib"))
    try:
        if source.is_file():
            whole = source.read_bytes()
            cut = len(whole) - len(whole) // HELD_OUT
            return Text(_tensor(whole[:cut]), _tensor(whole[cut:]), 1)
        # In the standard library only files at the top: its folders also have tests and installed packages.
        paths = sorted(source.glob("*.py" if data is None else "**/*"))
        parts = [path.read_bytes() for path in paths if path.suffix in SUFFIXES and path.is_file()]
    except OSError as error:
        raise Problem(f"{source} cannot be read ({error}).") from error
    held_out = b"".join(parts[HELD_OUT - 1 :: HELD_OUT])
    training = b"".join(part for i, part in enumerate(parts) if i % HELD_OUT != HELD_OUT - 1)
    if not held_out:
        raise Problem(f"{source} has {len(parts)} text files, and {HELD_OUT} are needed; give another --data.")
    return Text(_tensor(training), _tensor(held_out), len(parts))


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)


def excerpts(text: Tensor, settings: Settings, step: int) -> Tensor:
    """The excerpts of a step, with one byte more than the input. They depend only on the seed and the step."""
    size = settings.excerpt + 1
    random = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    starts = torch.randint(len(text) - size + 1, (settings.batch,), generator=random)
    return torch.stack([text[start : start + size] for start in starts.tolist()]).long()


def train(
    network: Sequential,
    text: Tensor,
    settings: Settings,
    report: Callable[[int, float], None] = lambda step, bits: None,
    device: str = "cpu",
) -> None:
    """Trains a network in place.

    Arguments:
        network: The network.
        text: The bytes to train on.
        settings: The settings.
        report: A function that is called after every step with its number and its loss in bits per byte.
        device: Where to compute.

    Raises:
        Problem: If the text is shorter than an excerpt, or the loss is not finite.
    """
    if len(text) <= settings.excerpt:
        raise Problem(f"the text has {len(text)} bytes, less than one excerpt; give more text, or a smaller --excerpt.")
    network.to(device).train()
    groups = param_groups(network, lr=settings.lr, weight_decay=settings.weight_decay, ssm_lr=settings.lr)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate)
    for step in range(settings.steps):
        part = excerpts(text, settings, step).to(device)
        loss = F.cross_entropy(network(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
        if not math.isfinite(bits := loss.item() / math.log(2)):
            raise Problem(f"the loss of step {step + 1} is not finite; give a smaller --lr.")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step + 1, bits)
    network.eval()


@torch.no_grad()
def bits_per_byte(network: Sequential, text: Tensor, chunk: int = 2048) -> float:
    """Negative log-likelihood of a text in bits per byte, from the second byte on.

    The text is one stream: the state is carried from chunk to chunk.

    Arguments:
        network: The network.
        text: The bytes, at least two.
        chunk: The number of bytes that are read at a time.
    """
    network.eval()
    device = next(network.parameters()).device
    system, state, total = network.system(), network.initial_state(1), 0.0
    read, said = text[None, :-1].long().to(device), text[None, 1:].long().to(device)
    for u, target in zip(read.split(chunk, 1), said.split(chunk, 1), strict=True):
        logits, state = network.scan(u, state, system)
        total += float(F.cross_entropy(logits.mT, target, reduction="sum"))
    return total / math.log(2) / read.shape[1]


def baselines(text: Text, held_out: Tensor) -> dict[str, float]:
    """Bits per byte of the held-out text by methods without a network, which use the same training text.

    The bigram model counts pairs of bytes. LZMA compresses the training text with and without the held-out text at its
    end; the difference is what the held-out text needs.
    """
    counts = torch.zeros(256, 256, dtype=torch.double)
    pairs = text.training.long()
    counts.view(-1).index_add_(0, 256 * pairs[:-1] + pairs[1:], torch.ones(len(pairs) - 1, dtype=torch.double))
    p = (counts + 0.01) / (counts + 0.01).sum(1, keepdim=True)
    said = held_out.long()
    before, both = (
        len(lzma.compress(part.numpy().tobytes(), preset=6))
        for part in (text.training, torch.cat([text.training, held_out]))
    )
    return {"bigram": float(-p[said[:-1], said[1:]].log2().mean()), "lzma": 8 * (both - before) / len(held_out)}
