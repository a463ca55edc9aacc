"""Audio files and 8-bit samples: reading, quantising, cutting into excerpts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from torch import Tensor

SUFFIXES = (".wav", ".flac", ".ogg")
MU = 255


class DataError(ValueError):
    """Something is wrong with the audio that was handed over; the message says what and what to do."""


def mu_law_encode(x: Tensor) -> Tensor:
    """Quantises samples in [-1, 1] to 256 classes, finer near silence: x = 0 is class 128."""
    companded: Tensor = x.sign() * torch.log1p(MU * x.abs().clamp(max=1)) / np.log1p(MU)
    return ((companded + 1) / 2 * MU + 0.5).floor().to(torch.uint8)


def mu_law_decode(q: Tensor) -> Tensor:
    """The samples in [-1, 1] that the classes stand for."""
    companded = q.float() / MU * 2 - 1
    samples: Tensor = companded.sign() * torch.expm1(companded.abs() * np.log1p(MU)) / MU
    return samples


@dataclass(frozen=True)
class Clip:
    """A piece of audio in 8-bit classes."""

    path: Path
    samples: Tensor
    """Classes 0 to 255, uint8; shape (length)."""
    sample_rate: int


def read_clip(path: Path) -> Clip:
    """Reads an audio file; several channels are averaged to one.

    Raises:
        DataError: If the file is not audio or holds less than two samples.
    """
    try:
        samples, sample_rate = sf.read(path, dtype="float32", always_2d=True)
    except (sf.LibsndfileError, OSError) as error:
        raise DataError(f"{path} cannot be read as audio ({error}); remove it from the folder.") from error
    if len(samples) < 2:
        raise DataError(f"{path} holds {len(samples)} samples; remove it from the folder.")
    return Clip(path, mu_law_encode(torch.from_numpy(samples.mean(axis=1))), sample_rate)


def read_folder(folder: Path) -> list[Clip]:
    """Reads the WAV, FLAC and OGG files of a folder, in the order of their names.

    Raises:
        DataError: If the folder is missing or holds no audio, if a file is not audio, or if sample rates differ.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the folder that holds the audio files.")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"{folder} holds no audio; put {', '.join(SUFFIXES)} files into it.")
    clips = [read_clip(path) for path in paths]
    for clip in clips:
        if clip.sample_rate != clips[0].sample_rate:
            raise DataError(
                f"{folder} mixes sample rates: {clips[0].path.name} has {clips[0].sample_rate} Hz and "
                f"{clip.path.name} {clip.sample_rate} Hz; resample them to one."
            )
    return clips


def split_clips(clips: list[Clip], fraction: float = 0.1) -> tuple[list[Clip], list[Clip]]:
    """Holds out the last clips, by file: at least one, and at most all but one.

    Raises:
        DataError: If there is only one clip.
    """
    if len(clips) < 2:
        raise DataError(f"{clips[0].path.parent} holds one clip; at least two are needed, one of them held out.")
    held_out = min(len(clips) - 1, max(1, round(fraction * len(clips))))
    return clips[:-held_out], clips[-held_out:]


def input_and_target(samples: Tensor) -> tuple[Tensor, Tensor]:
    """What a model reads and what it is to say: samples 0 … N-1, and samples 1 … N."""
    samples = samples.long()
    return samples[..., :-1], samples[..., 1:]


class Excerpts:
    """Draws random excerpts of equal length from clips of any length, every start equally likely.

    Raises:
        DataError: If no clip is long enough.
    """

    def __init__(self, clips: list[Clip], length: int, batch: int, seed: int) -> None:
        self.length, self.batch = length, batch
        self.samples = [clip.samples for clip in clips if len(clip.samples) > length]
        if not self.samples:
            longest = max(len(clip.samples) for clip in clips)
            raise DataError(
                f"every clip is shorter than an excerpt of {length} samples and its successor (the longest has "
                f"{longest}); lower the excerpt length."
            )
        self.starts = torch.tensor([len(samples) - length for samples in self.samples]).cumsum(0)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        """A batch of inputs and targets, both with shape (batch, length)."""
        rows = []
        for start in torch.randint(int(self.starts[-1]), (self.batch,), generator=self.generator).tolist():
            clip = int(torch.searchsorted(self.starts, start, right=True))
            end = int(self.starts[clip]) - start + self.length
            rows.append(self.samples[clip][end - self.length - 1 : end])
        return input_and_target(torch.stack(rows))


def write_wav(path: Path, classes: Tensor, sample_rate: int) -> None:
    """Writes 8-bit classes as a 16-bit WAV file."""
    sf.write(path, mu_law_decode(classes).numpy(), sample_rate, subtype="PCM_16")
