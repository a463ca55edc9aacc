"""Resonating strings: a state-space layer as an instrument, on a stream of audio.

Reads audio block by block from a file or standard input, adds the resonance of piano strings without dampers, and
writes each block. A partial of a string is a pole: the imaginary part is its pitch and the real part its decay. All
poles together are one S4D layer of one feature, run sample by sample.

    python examples/ringing_strings.py piano.wav --out ringing.wav
    python examples/sashimi_youtubemix.py generate --stream --seconds inf | python examples/ringing_strings.py - | aplay
"""

from __future__ import annotations

import math
import sys
import time
import wave
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile as sf
import torch
import tyro
from torch import Tensor
from tyro.conf import Positional

from sashimi.audio import WavWriter
from sashimi.problems import Problem, exit_status
from ssmkit import S4D
from ssmkit.streaming import Engine

LOWEST = 27.5
"""The A at the left end of the keyboard, in hertz."""
KEYS = 88


@dataclass(frozen=True)
class Args:
    """Let the strings of a piano resonate with audio."""

    audio: Positional[Path] = Path(__file__).parent / "data" / "piano" / "heldout" / "take20-minute1.flac"
    """Audio file, or - for WAV on standard input; by default a clip of the example."""
    out: Path | None = None
    """WAV file to write; by default standard output."""
    wet: float = 0.1
    """Loudness of the strings relative to the input if that is noise; for music at their pitches they are louder."""
    seconds: float = 4.0
    """Time in which the lowest string falls by 60 dB; the highest needs a tenth of it."""
    partials: int = 6
    """Partials of every string."""
    block: int = 256
    """Samples per block."""


def strings(sample_rate: int, seconds: float = 4.0, partials: int = 6, wet: float = 0.1, seed: int = 0) -> S4D:
    r"""Piano strings as a layer of one feature: :math:`h(t) = 2 \Re \sum_n C_n e^{\lambda_n t}`.

    Each partial has :math:`\Im \lambda = 2 \pi f`, where f is a little above the multiple of the string's frequency
    since strings are stiff, and :math:`\Re \lambda = -\ln 1000 / T`, where T is the time in which it falls by 60 dB.

    Arguments:
        sample_rate: Samples per second.
        seconds: T of the lowest string.
        partials: Partials per string; those above two fifths of the sample rate are left out.
        wet: The loudness of the response to noise, relative to the direct sound.
        seed: Of the phases.
    """
    string = LOWEST * 2 ** (torch.arange(KEYS, dtype=torch.double) / 12)[:, None]
    number = torch.arange(1, partials + 1, dtype=torch.double)
    frequency = string * number * (1 + 4e-4 * number**2).sqrt()
    falls = seconds * 0.1 ** (torch.arange(KEYS, dtype=torch.double)[:, None] / (KEYS - 1)) / number.sqrt()
    heard = frequency < 0.4 * sample_rate
    poles = torch.complex(-math.log(1000) / falls, 2 * math.pi * frequency)[heard].numpy()
    phases = torch.rand(len(poles), generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    layer = S4D(1, 2 * len(poles), init=lambda N: (poles, np.ones(N // 2, dtype=complex)))
    with torch.no_grad():
        layer.log_dt.fill_(-math.log(sample_rate))
        strength = (1 / number).expand_as(frequency)[heard].float()
        layer.C.copy_(torch.view_as_real(torch.polar(strength, (2 * math.pi * phases).float())))
        # The loudness of filtered white noise is its own times the norm of the kernel.
        layer.C.mul_(wet / layer.kernel(int(seconds * sample_rate)).norm())
        layer.D.fill_(1.0)
    return layer


def file_blocks(path: Path, size: int) -> tuple[int, int, Iterator[Tensor]]:
    """Sample rate, channels and blocks (length, channels) of a file."""
    try:
        file = sf.SoundFile(path)
    except (OSError, sf.LibsndfileError) as error:
        raise Problem(f"{path} cannot be read as audio ({error}).") from error
    blocks = (torch.from_numpy(x) for x in file.blocks(size, dtype="float32", always_2d=True))
    return file.samplerate, file.channels, blocks


def pipe_blocks(size: int) -> tuple[int, int, Iterator[Tensor]]:
    """The same for 16-bit WAV on standard input, with blocks as they arrive."""
    try:
        # Not soundfile, which needs a seekable file.
        source = wave.open(sys.stdin.buffer)  # noqa: SIM115
    except (wave.Error, EOFError) as error:
        raise Problem(f"standard input is not WAV ({error}).") from error
    channels, width = source.getnchannels(), source.getsampwidth()
    if width != 2:
        raise Problem(f"WAV on standard input must have 16 bits per sample, not {8 * width}.")

    def blocks() -> Iterator[Tensor]:
        while data := source.readframes(size):
            yield torch.from_numpy(np.frombuffer(data, "<i2").reshape(-1, channels) / np.float32(32768))

    return source.getframerate(), channels, blocks()


def run(args: Args) -> None:
    """Lets the strings resonate."""
    if args.block < 1 or args.partials < 1 or not args.seconds > 0 or args.wet < 0:
        raise Problem("--block and --partials must be at least 1, --seconds above 0 and --wet at least 0.")
    rate, channels, blocks = pipe_blocks(args.block) if str(args.audio) == "-" else file_blocks(args.audio, args.block)
    # A stream per channel: all have the same strings, but their own input.
    stream = Engine(strings(rate, args.seconds, args.partials, args.wet)).start(channels)
    heard, clipped, taken, longest = 0, 0, 0.0, 0.0
    with ExitStack() as stack:
        file = stack.enter_context(WavWriter(args.out, rate, channels))
        try:
            for block in blocks:
                begin = time.perf_counter()
                y = stream.run(block.T[..., None])[..., 0].T
                spent = time.perf_counter() - begin
                taken, longest, heard = taken + spent, max(longest, spent), heard + len(block)
                clipped += int((y.abs() > 1).sum())
                file.write(y.clamp(-1, 1))
        except (KeyboardInterrupt, BrokenPipeError):
            pass
    if not heard:
        raise Problem("the input holds no samples.")
    factor = taken * rate / heard
    print(
        f"{heard / rate:.2f} s at {rate} Hz in {taken:.2f} s of computing: real-time factor {factor:.4f}, "
        f"{1 / factor:.0f} times faster than real time; the slowest block of {args.block} samples took "
        f"{1e3 * longest:.2f} ms of its {1e3 * args.block / rate:.1f} ms",
        file=sys.stderr,
    )
    if clipped:
        print(f"{clipped} samples were too loud and have been clipped; give less --wet.", file=sys.stderr)


def main(arguments: list[str]) -> int:
    """Runs the command."""
    command: Args = tyro.cli(Annotated[Args, tyro.conf.arg(name="")], args=arguments, description=__doc__)
    return exit_status("ringing_strings", lambda: run(command))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
