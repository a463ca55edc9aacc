"""Train a SaShiMi on piano audio, measure it on a clip it has not heard, and let it play.

Without arguments it trains a small network on three one-minute clips that lie beside this file, prints the negative
log-likelihood of a fourth in bits per sample beside what counting reaches, and writes what it generates, the loss curve
and spectrograms to `runs/youtubemix`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from sashimi import figures
from sashimi.audio import (
    DataError,
    Excerpts,
    mu_law_decode,
    read_folder,
    split_clips,
    write_wav,
)
from sashimi.baselines import count_baselines
from sashimi.generation import SILENCE, generate, prime
from sashimi.model import sashimi
from sashimi.overfitting import LENGTH, Epoch, overfit
from sashimi.training import evaluate, train
from ssmkit.states import concatenate

EMBEDDED = Path(__file__).parent / "data" / "piano"


@dataclass(frozen=True)
class Config:
    """Train a SaShiMi on audio and let it play."""

    data: Path | None = None
    """Folder of WAV, FLAC or OGG clips of one sample rate, stereo averaged to mono; the last tenth of the files is held
    out. By default the clips that come with the example."""
    out: Path = Path("runs/youtubemix")
    """Folder for the WAV files and figures."""
    steps: int = 1300
    """Training steps."""
    excerpt: int = 8192
    """Samples per training excerpt."""
    batch: int = 1
    """Excerpts per step."""
    lr: float = 8e-3
    """Highest learning rate; state-space parameters stay at 1e-3 or below."""
    weight_decay: float = 0.01
    """Decay of the weights that have one."""
    d_model: int = 32
    """Width of the top tier."""
    d_state: int = 64
    """State size of each feature."""
    blocks: int = 2
    """Blocks per tier."""
    layer: Literal["s4", "s4d"] = "s4d"
    """State matrix: diagonal plus low rank, or diagonal."""
    glu: bool = False
    """Gate the output of every block."""
    seconds: float = 4.0
    """Length of each generated clip."""
    prime: float = 2.0
    """Seconds of held-out audio that the primed clip continues."""
    temperature: float = 1.0
    """Of generation; below 1 bolder, 0 takes the most likely sample."""
    seed: int = 0
    """Of weights, excerpts and generation."""
    overfit: bool = False
    """Instead: the overfitting test at full size, on the first minute of the first clip (width 128, state 512, 2
    blocks, Adam at 1e-3); prints the time and the peak memory of every step."""
    epochs: int = 50
    """Steps of the overfitting test."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Of the overfitting test."""


def bar(total: int, what: str, unit: str) -> tqdm[None]:
    """A progress bar; into a file it prints a line every half minute instead of ten a second."""
    return tqdm(total=total, desc=what, unit=unit, mininterval=0.5 if sys.stderr.isatty() else 30, dynamic_ncols=True)


def run(config: Config) -> None:
    """Trains, measures, generates, draws."""
    start = time.perf_counter()
    if config.data is None:
        training, held_out = read_folder(EMBEDDED / "train"), read_folder(EMBEDDED / "heldout")
    else:
        training, held_out = split_clips(read_folder(config.data))
    sample_rate = training[0].sample_rate
    excerpts = Excerpts(training, config.excerpt, config.batch, config.seed)
    config.out.mkdir(parents=True, exist_ok=True)
    print(f"{len(training)} clips to train on, {len(held_out)} held out, {sample_rate} Hz")

    torch.manual_seed(config.seed)
    model = sashimi(config.d_model, config.blocks, d_state=config.d_state, layer=config.layer, glu=config.glu)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    with bar(config.steps, "training", "step") as progress:

        def report(step: int, loss: float) -> None:
            progress.set_postfix_str(f"{loss:.2f} bits", refresh=False)
            progress.update()

        losses = train(model, excerpts, config.steps, lr=config.lr, weight_decay=config.weight_decay, report=report)

    baselines = count_baselines(training, held_out)
    nll = evaluate(model, held_out)
    print("held-out negative log-likelihood, bits per sample")
    for name, value in baselines.items():
        print(f"  {name:<8} {value:6.3f}")
    print(f"  {'network':<8} {nll:6.3f}   ({nll / baselines['bigram']:.3f} of the bigram's)")

    # Both streams in one batch; a multi-rate state is shared at one phase, so the prompt is a whole number of frames.
    prompt = held_out[0].samples[: max(16, int(config.prime * sample_rate) // 16 * 16)][None]
    silence = torch.full((1, 16), SILENCE, dtype=torch.uint8)
    streams = [prime(model, prompt), prime(model, silence)]
    logits = torch.cat([logits for logits, _ in streams])
    state = concatenate([state for _, state in streams])
    length = int(config.seconds * sample_rate)
    with bar(length, "generating", "sample") as progress:
        primed, unprimed = generate(
            model,
            logits,
            state,
            length,
            temperature=config.temperature,
            seed=config.seed,
            report=lambda k: progress.update(),
        )
    real = held_out[0].samples[: prompt.shape[1] + length]
    clips = {
        "real": real,
        "primed": torch.cat([prompt[0], primed.to(torch.uint8)]),
        "unprimed": unprimed.to(torch.uint8),
    }
    for name, classes in clips.items():
        write_wav(config.out / f"{name}.wav", classes, sample_rate)
    figures.loss_curve(config.out / "loss.png", losses, nll, baselines)
    titles = {
        "real": "real, held out",
        "primed": f"generated after {prompt.shape[1] / sample_rate:.1f} s of it",
        "unprimed": "generated from silence",
    }
    figures.spectrograms(
        config.out / "spectrograms.png",
        {titles[name]: mu_law_decode(classes).numpy() for name, classes in clips.items()},
        sample_rate,
    )
    print(f"{', '.join(sorted(p.name for p in config.out.iterdir()))} in {config.out}")
    print(f"{time.perf_counter() - start:.0f} s in all")


def run_overfitting(config: Config) -> None:
    """Overfits one clip, prints each step and draws the loss."""
    clip = read_folder(config.data or EMBEDDED / "train")[0]
    config.out.mkdir(parents=True, exist_ok=True)
    print(f"overfitting {clip.path.name}: {min(LENGTH, len(clip.samples) - 1):,} samples in one step, {config.device}")

    def report(epoch: int, result: Epoch) -> None:
        peak = result.peak / 2**30
        print(f"epoch {epoch}: {result.bits:.3f} bits, {result.seconds:.1f} s, peak {peak:.2f} GiB", flush=True)

    results = overfit(clip, config.epochs, seed=config.seed, device=config.device, report=report)
    figures.overfitting_curve(config.out / "overfit.png", [result.bits for result in results])
    print(f"overfit.png in {config.out}")


def main(config: Annotated[Config, tyro.conf.arg(name="")]) -> int:
    """Runs the example; what is wrong with the data is said in one sentence."""
    try:
        (run_overfitting if config.overfit else run)(config)
    except DataError as error:
        print(f"sashimi_youtubemix: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
