"""Audio files and quantised samples: finding, decoding of excerpts, resampling, quantising, splitting by file."""

from __future__ import annotations

import math
import os
import wave
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

import numpy as np
import soundfile as sf
import soxr
import torch
from torch import Tensor

from .problems import Problem

SUFFIXES = (".wav", ".flac", ".ogg")
IGNORED = -100
"""The target of a sample that does not count, as in `cross_entropy`."""
_MARGIN = 256
"""Source samples beyond both ends of an excerpt that the resampling filter gets to see."""
_MOST_FRAMES = 1 << 40
"""Of a file: some months of audio at any rate."""
_DECODED = 1 << 20
"""Samples that are decoded at a time."""


@dataclass(frozen=True)
class Quantizer:
    """Samples in [-1, 1] to classes and back, to within half a step.

    With `"mu-law"` the steps are finer near silence, with `"linear"` they are equal.
    """

    kind: Literal["mu-law", "linear"] = "mu-law"
    bits: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise Problem(f"samples have 1 to 16 bits, not {self.bits}.")

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return 1 << self.bits

    @property
    def silence(self) -> int:
        """The class of a sample of value zero."""
        return self.classes // 2

    def encode(self, x: Tensor) -> Tensor:
        """Samples, clipped to [-1, 1], to classes, int64."""
        x = x.double().clamp(-1, 1)
        top = self.classes - 1
        if self.kind == "mu-law":
            x = x.sign() * torch.log1p(top * x.abs()) / math.log1p(top)
        return ((x + 1) / 2 * top + 0.5).floor().long()

    def decode(self, classes: Tensor) -> Tensor:
        """The samples that the classes stand for, float32."""
        top = self.classes - 1
        x = classes.double() / top * 2 - 1
        if self.kind == "mu-law":
            x = x.sign() * torch.expm1(x.abs() * math.log1p(top)) / top
        return x.float()


@dataclass(frozen=True)
class Recording:
    """An audio file, whose excerpts are decoded when they are read: none of it is kept in memory."""

    path: Path
    frames: int
    """Samples per channel in the file."""
    source_rate: int
    """The sample rate of the file, in Hz."""
    sample_rate: int
    """The rate at which it is read, in Hz."""

    def __len__(self) -> int:
        """Samples at `sample_rate`."""
        return self.frames * self.sample_rate // self.source_rate

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Samples start to stop as floats, channels averaged, and resampled if necessary; other reads have no effect.

        Raises:
            Problem: If the file turns out to be damaged.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        if stop <= start:
            return torch.zeros(0)
        if self.source_rate == self.sample_rate:
            return torch.from_numpy(self._decode(start, stop))
        # `up` samples of the target last as long as `down` of the source: decoding begins at a common point.
        up, down = (r // math.gcd(self.sample_rate, self.source_rate) for r in (self.sample_rate, self.source_rate))
        block = max(0, start // up - -(-_MARGIN // down))
        last = min(self.frames, -(-stop * down // up) + _MARGIN)
        samples = soxr.resample(self._decode(block * down, last), self.source_rate, self.sample_rate)
        found = samples[start - block * up : stop - block * up]
        return torch.from_numpy(np.pad(found, (0, stop - start - len(found))))

    def _decode(self, start: int, stop: int) -> np.ndarray:
        parts: list[np.ndarray] = []
        try:
            with sf.SoundFile(os.fsencode(self.path)) as file:
                file.seek(start)
                # Part by part: a damaged header may announce more than fits into memory.
                for first in range(start, stop, _DECODED):
                    part = file.read(min(_DECODED, stop - first), dtype="float32", always_2d=True)
                    parts.append(part.mean(axis=1))
                    if len(part) < _DECODED:
                        break
        except (sf.LibsndfileError, OSError, RuntimeError) as error:
            raise Problem(f"{self.path} cannot be read as audio ({_reason(error)}); replace or remove it.") from error
        samples = np.concatenate(parts)
        if len(samples) < stop - start:
            raise Problem(
                f"{self.path} ends at sample {start + len(samples):,} of {self.frames:,}; it is damaged, remove it."
            )
        if not (finite := np.isfinite(samples)).all():
            raise Problem(
                f"{self.path} holds a value that is not finite at sample {start + int(finite.argmin()):,}; replace or "
                f"remove it."
            )
        return samples

    def chunks(self, length: int) -> Iterator[Tensor]:
        """The whole recording, `length` samples at a time."""
        for start in range(0, len(self), length):
            yield self.read(start, start + length)


def _reason(error: Exception) -> str:
    """Why a file cannot be read, without its name."""
    text = error.error_string if isinstance(error, sf.LibsndfileError) else getattr(error, "strerror", None)
    return str(text or error).rstrip(".")


def open_recording(
    path: Path, sample_rate: int | None = None, *, remedy: str = "remove it from the folder"
) -> Recording:
    """Looks at an audio file's header.

    Arguments:
        path: The file.
        sample_rate: The rate at which to read it, by default its own.
        remedy: What a user is to do with a file that cannot be read.

    Raises:
        Problem: If the file does not exist, is not audio or holds less than two samples.
    """
    try:
        with path.open("rb"):  # it says better than the decoder why a file cannot be opened
            pass
        info = sf.info(os.fsencode(path))
    except FileNotFoundError as error:
        raise Problem(f"{path} cannot be read as audio, since it does not exist.") from error
    except (sf.LibsndfileError, OSError, RuntimeError) as error:
        raise Problem(f"{path} cannot be read as audio ({_reason(error)}); {remedy}.") from error
    recording = Recording(path, info.frames, info.samplerate, sample_rate or info.samplerate)
    if info.frames > _MOST_FRAMES:
        raise Problem(f"{path} announces {info.frames:,} samples, so it is damaged; {remedy}.")
    if len(recording) < 2:
        raise Problem(f"{path} holds {info.frames} samples; {remedy}.")
    return recording


def _refuse(error: OSError) -> NoReturn:
    raise Problem(f"{error.filename} cannot be read ({error.strerror}); change its permissions.") from error


def open_folder(folder: Path, sample_rate: int) -> list[Recording]:
    """The WAV, FLAC and OGG files of a folder and its subfolders, in the order of their paths.

    Raises:
        Problem: If the folder is missing, cannot be read or holds no audio, or if a file is not audio.
    """
    if sample_rate < 1:
        raise Problem(f"--sample-rate must be at least 1, not {sample_rate}.")
    if not folder.is_dir():
        raise Problem(f"{folder} is not a folder; give the folder that holds the audio files.")

    found = [Path(where) / name for where, _, names in os.walk(folder, onerror=_refuse) for name in names]
    paths = sorted(path for path in found if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise Problem(f"{folder} holds no audio; put {', '.join(SUFFIXES)} files into it.")
    return [open_recording(path, sample_rate) for path in paths]


@dataclass(frozen=True)
class Split:
    """Recordings to train on, and held-out recordings."""

    training: list[Recording]
    held_out: list[Recording]

    @property
    def notice(self) -> str:
        """A sentence about the resampling of files; empty if no file is resampled."""
        files = [*self.training, *self.held_out]
        odd = sorted({r.source_rate for r in files if r.source_rate != r.sample_rate})
        if not odd:
            return ""
        count = sum(r.source_rate != r.sample_rate for r in files)
        rates = ", ".join(f"{rate:,}" for rate in odd)
        return f"{count} of {len(files)} files are resampled from {rates} Hz to {files[0].sample_rate:,} Hz"


def open_split(folder: Path, sample_rate: int, fraction: float = 0.1) -> Split:
    """Splits a folder by file.

    If the folder has subfolders `train` and `heldout`, these are the split; otherwise the last tenth of the files is
    held out, at least one and at most all but one.

    Raises:
        Problem: If there is only one file, and as :func:`open_folder`.
    """
    try:
        parted = folder.is_dir() and {"train", "heldout"} <= {
            entry.name for entry in os.scandir(folder) if entry.is_dir()
        }
    except OSError as error:
        _refuse(error)
    if parted:
        return Split(open_folder(folder / "train", sample_rate), open_folder(folder / "heldout", sample_rate))
    files = open_folder(folder, sample_rate)
    if len(files) < 2:
        raise Problem(f"{folder} holds one clip; at least two are needed, one of them held out.")
    held_out = min(len(files) - 1, max(1, round(fraction * len(files))))
    return Split(files[:-held_out], files[-held_out:])


def input_and_target(samples: Tensor) -> tuple[Tensor, Tensor]:
    """What a model reads and what it predicts: samples 0 … N-1, and samples 1 … N."""
    return samples[..., :-1], samples[..., 1:]


def mix(*numbers: int) -> int:
    """A seed that depends on all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class Excerpts:
    """Random excerpts of equal length from recordings of any length, every start equally likely.

    The excerpts of a step depend only on the seed and the number of the step, not on earlier draws or on the number of
    processes that share the batch: a run can be continued at any step.

    Arguments:
        recordings: The recordings.
        quantizer: How samples become classes.
        length: Samples per excerpt, not counting the last target.
        seed: Of the draw.
        pad: Pad recordings that are too short with silence that does not count, instead of leaving them out.

    Raises:
        Problem: If no recording is long enough.
    """

    def __init__(
        self, recordings: list[Recording], quantizer: Quantizer, length: int, seed: int, *, pad: bool = False
    ) -> None:
        self.quantizer, self.length, self.seed = quantizer, length, seed
        self.recordings = [r for r in recordings if pad or len(r) > length]
        if not self.recordings:
            longest = max(len(r) for r in recordings)
            raise Problem(
                f"every clip is shorter than an excerpt of {length} samples and one more (the longest has {longest}); "
                "lower --excerpt, or pad with silence by --pad."
            )
        self.starts = torch.tensor([max(1, len(r) - length) for r in self.recordings]).cumsum(0)

    def draw(self, step: int, batch: int, first: int = 0, last: int | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, with shape (rows, length): rows `first` to `last` of a batch."""
        generator = torch.Generator().manual_seed(mix(self.seed, step))
        draws = torch.randint(int(self.starts[-1]), (batch,), generator=generator).tolist()
        inputs, targets = zip(*(self._cut(start) for start in draws[first:last]), strict=True)
        return torch.stack(inputs), torch.stack(targets)

    def _cut(self, draw: int) -> tuple[Tensor, Tensor]:
        index = int(torch.searchsorted(self.starts, draw, right=True))
        start = draw - int(self.starts[index - 1] if index else 0)
        classes = self.quantizer.encode(self.recordings[index].read(start, start + self.length + 1))
        missing = self.length + 1 - len(classes)
        x, y = input_and_target(torch.nn.functional.pad(classes, (0, missing), value=self.quantizer.silence))
        if missing:
            y = y.clone()
            y[len(y) - missing :] = IGNORED
        return x, y


_ENDLESS = (1 << 30) - 64
"""The most frames of two bytes for the 32 bits of the length in a WAV header."""


class WavWriter:
    """A 16-bit WAV that is written block by block, to a file or to standard output.

    A file is a complete WAV file after every write. For a pipe the header has the largest length, so that players do
    not stop.

    Raises:
        Problem: If it cannot be written.
    """

    def __init__(self, path: Path | None, sample_rate: int, channels: int = 1) -> None:
        if path is not None and path.suffix.lower() != ".wav":
            raise Problem(f"{path} cannot be written: the output is a WAV file, so its name must end in .wav.")
        self.path = path or Path("standard output")
        try:
            # A duplicate, so that closing it does not close standard output.
            self._file: BinaryIO = path.open("wb") if path else os.fdopen(os.dup(1), "wb")
        except OSError as error:
            raise Problem(f"{path} cannot be written ({error.strerror}); give another file.") from error
        # Not soundfile, which updates the length in the header only when the file is closed.
        self._wave = wave.open(self._file)  # noqa: SIM115
        self._grows = self._file.seekable()
        self._wave.setparams((channels, 2, sample_rate, 0 if self._grows else _ENDLESS // channels, "NONE", ""))

    def write(self, samples: Tensor) -> None:
        """Adds samples in [-1, 1], of several channels with shape (length, channels).

        Raises:
            Problem: If the disk is full; what was written before stays.
            BrokenPipeError: If nobody reads the pipe any more.
        """
        frames = (samples.double() * 32767).round().to(torch.int16).numpy().astype("<i2").tobytes()
        try:
            if self._grows:
                self._wave.writeframes(frames)
            else:
                self._wave.writeframesraw(frames)
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Problem(f"{self.path} cannot be written on ({error.strerror}); earlier blocks are kept.") from error

    def __enter__(self) -> WavWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._wave.close()
        with suppress(OSError):
            self._file.close()


def write_wav(path: Path, samples: Tensor, sample_rate: int) -> None:
    """Writes samples in [-1, 1] as a 16-bit WAV file."""
    with WavWriter(path, sample_rate) as file:
        file.write(samples)
