"""Strings that ring along: a state-space layer as an instrument, on audio as it comes in.

Reads audio block by block from a file or standard input, lets the strings of a piano without dampers sound with it,
and writes as it goes. A string's partial is a pole: the imaginary part is its pitch and the real part how fast it dies
away. All of them together are one S4D layer of one feature, run sample by sample.

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
    """Let the strings of a piano ring with what is heard."""

    audio: Positional[Path] = Path(__file__).parent / "data" / "piano" / "heldout" / "take20-minute1.flac"
    """Audio file, or - for WAV on standard input; by default a clip that comes with the example."""
    out: Path | None = None
    """WAV file to write; by default to standard output."""
    wet: float = 0.1
    """Loudness of the strings' answer to noise beside that of the noise; music, which meets their pitch, is answered
    louder."""
    seconds: float = 4.0
    """Time in which the lowest string falls by 60 dB; the highest needs a tenth of it."""
    partials: int = 6
    """Partials of every string."""
    block: int = 256
    """Samples from read to write."""


def strings(sample_rate: int, seconds: float = 4.0, partials: int = 6, wet: float = 0.1, seed: int = 0) -> S4D:
    r"""Piano strings as a layer of one feature: :math:`h(t) = 2 \Re \sum_n C_n e^{\lambda_n t}`.

    Each partial has :math:`\Im \lambda = 2 \pi f` with a frequency f a little above its multiple of the string's, as
    stiff strings have it, and :math:`\Re \lambda = -\ln 1000 / T`, with T the time in which it falls by 60 dB.

    Arguments:
        sample_rate: Samples per second.
        seconds: T of the lowest string.
        partials: Partials per string; those above two fifths of the sample rate are left out.
        wet: The loudness of the response to noise, beside the direct sound at 1.
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
        # White noise comes out with the norm of the kernel times its loudness.
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
    """The same of 16-bit WAV on standard input, as much as there is at a time."""
    try:
        # Not soundfile: it wants to go back and forth in a file.
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
    """Lets the strings ring."""
    if args.block < 1 or args.partials < 1 or not args.seconds > 0 or args.wet < 0:
        raise Problem("--block and --partials must be at least 1, --seconds above 0 and --wet at least 0.")
    rate, channels, blocks = pipe_blocks(args.block) if str(args.audio) == "-" else file_blocks(args.audio, args.block)
    # A stream per channel: they share the strings, and not what is heard.
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
        raise Problem("there was no sound to ring with.")
    factor = taken * rate / heard
    print(
        f"{heard / rate:.2f} s at {rate} Hz in {taken:.2f} s of computing: real-time factor {factor:.4f}, "
        f"{1 / factor:.0f} times as fast as it sounds; the slowest block of {args.block} samples took "
        f"{1e3 * longest:.2f} ms of its {1e3 * args.block / rate:.1f} ms",
        file=sys.stderr,
    )
    if clipped:
        print(f"{clipped} samples were too loud and have been clipped; give less --wet.", file=sys.stderr)


def main(arguments: list[str]) -> int:
    """Runs the program."""
    command: Args = tyro.cli(Annotated[Args, tyro.conf.arg(name="")], args=arguments, description=__doc__)
    return exit_status("ringing_strings", lambda: run(command))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
