"""Train a SaShiMi on audio, measure it, generate audio, and show what it has learned.

Without arguments it trains a small network on five minutes of one piano piece in this repository, prints the negative
log-likelihood of a sixth minute in bits per sample and that of baselines without a network, generates audio, and writes
all results and a page to `runs/youtubemix`. Each part is also a command.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import soundfile as sf
import torch
import tyro
from tqdm import tqdm
from tyro.conf import OmitArgPrefixes, arg, subcommand

from sashimi import config, figures
from sashimi.audio import Split, WavWriter, open_recording, open_split, write_wav
from sashimi.baselines import measure_baselines
from sashimi.config import Settings
from sashimi.evaluation import evaluate, evaluate_by_step
from sashimi.generation import Sampling, Streams, generate, load_streams, make_engine, prime, save_streams
from sashimi.measures import measure
from sashimi.overfitting import LENGTH, Epoch, overfit
from sashimi.problems import Problem, exit_status
from sashimi.report import Sound, write_report
from sashimi.storage import MODEL, Run, Trained, load_model, make_folder, write_text
from sashimi.training import Trainer, join_world, train

EMBEDDED = Path(__file__).parent / "data" / "piano"
PIANO = Path(__file__).parent / "models" / "piano.safetensors"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUN = Path("runs/youtubemix")
RESULT = "evaluation.json"


@dataclass(frozen=True)
class Train:
    """Train on a folder of audio. The same command continues a run that was stopped in any way.

    On several GPUs or machines: torchrun --nproc-per-node N examples/sashimi_youtubemix.py train ...
    """

    settings: OmitArgPrefixes[Settings] = field(default_factory=Settings)
    preset: Literal["small", "paper", "notebook", "sc09"] = "small"
    """Settings to start from: the short run, those of the SaShiMi paper for piano, those of the notebook from which
    this project started, or those of the paper for one-second clips. Other flags change single settings."""
    config: Path | None = None
    """A settings file to start from, such as the config.json of a run."""
    out: Path = RUN
    """Folder of the run."""
    checkpoint_every: int = 200
    """Steps from checkpoint to checkpoint."""
    device: str = DEVICE
    """Where to compute."""


@dataclass(frozen=True)
class Evaluate:
    """Measure a model on held-out audio, by `forward` and on a part of it by `step`, and baselines without a
    network: frequencies of classes, and an adaptive linear filter."""

    model: Path = RUN
    """A model file, or the folder of a run."""
    data: Path | None = None
    """Folder of audio, by default that of the training; the split is the same."""
    step_samples: int = 2000
    """Samples that are also measured by `step`."""
    device: str = DEVICE
    """Where to compute."""


@dataclass(frozen=True)
class Generate:
    """Generate audio with a model. The file is written block by block, and Ctrl-C keeps the blocks so far.

    With a player: generate --stream --seconds inf | aplay
    """

    model: Path = PIANO
    """A model file, or the folder of a run; by default a small model of one piano piece, included in the example."""
    out: Path = Path("generated.wav")
    """WAV file to write; of a batch, one file per stream with a number."""
    seconds: float = 4.0
    """Length of the generated audio; inf continues until Ctrl-C, or until the player is closed."""
    stream: bool = False
    """Write the WAV to standard output during generation, instead of to a file."""
    batch: int = 1
    """Number of streams."""
    temperature: float = 0.9
    """Logits are divided by it; at 0 the likeliest sample is taken."""
    top_k: int = 0
    """Draw from this many of the likeliest samples; 0 for all."""
    top_p: float = 0.95
    """Draw from the likeliest samples that together have this probability; 1 for all, which sometimes gives one that
    the network cannot continue."""
    greedy: bool = False
    """Always take the likeliest sample."""
    seed: int = 0
    """Seed of the draw: the same seed generates the same audio."""
    prime: Path | None = None
    """Audio file to continue, at the model's sample rate; the output begins with it."""
    prime_seconds: float | None = None
    """Length of the part of that file, by default all of it."""
    resume: Path | None = None
    """State file of an earlier generation to continue, which is beside its WAV file; with its batch and its seed."""
    engine: Literal["auto", "program", "compile", "step"] = "auto"
    """What runs the network: a compiled program (on a CPU, where it is by far the fastest and the default), its step
    under torch.compile, or its eager step."""
    threads: int | None = None
    """Threads of a compiled program; by default one for one stream. Two are faster on two idle cores."""
    device: str = DEVICE
    """Where to compute."""


@dataclass(frozen=True)
class Overfit:
    """The overfitting test at full size: one minute of audio in one training step (width 128, state 512, 2 blocks per
    tier, Adam at 1e-3). Prints the time and the peak memory of every step."""

    data: Path | None = None
    """Folder of audio whose first file is learned; by default the clips of the example."""
    out: Path = Path("runs/overfit")
    """Folder for the loss curve."""
    epochs: int = 50
    """Training steps."""
    seed: int = 0
    """Seed of the weights."""
    device: str = DEVICE
    """Where to compute."""


@dataclass(frozen=True)
class Report:
    """Write one HTML page about a run: settings, losses, likelihoods, audio clips and their share of lasting
    tones, and layers before and after training."""

    run: Path = RUN
    """Folder of the run."""
    out: Path | None = None
    """The page, by default report.html in that folder."""
    seconds: float = 4.0
    """Length of the generated clips."""
    device: str = DEVICE
    """Where to compute."""


def bar(total: int | None, what: str, start: int = 0) -> tqdm[None]:
    """A progress bar over samples; if the output is a file, it prints a line every half minute instead."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(
        total=total, initial=start, desc=what, unit="sample", unit_scale=True, mininterval=interval, dynamic_ncols=True
    )


def recordings(settings: Settings, data: Path | None = None) -> Split:
    """The audio of a run."""
    split = open_split(data or settings.data or EMBEDDED, settings.sample_rate)
    if split.notice:
        print(split.notice, file=sys.stderr)
    return split


def device_of(name: str) -> torch.device:
    """The device of a name."""
    return join_world(name).device


def run_train(args: Train) -> None:
    """Trains, or continues a training run."""
    settings, world = args.settings, join_world(args.device)
    if settings.data is not None:
        settings = replace(settings, data=settings.data.resolve())
    split = recordings(settings)
    trainer, run = Trainer(settings, split, world), Run(args.out)
    if world.first:
        run.open(settings)
        parameters = sum(p.numel() for p in trainer.model.parameters())
        print(f"{len(split.training)} clips to train on, {len(split.held_out)} held out, {settings.sample_rate} Hz")
        print(f"{parameters:,} parameters")
    world.wait()
    size = settings.batch * settings.excerpt
    with ExitStack() as stack:
        progress: tqdm[None] | None = None

        def begin(step: int) -> None:
            nonlocal progress
            if not world.first:
                return
            if step:
                print(f"continuing after step {step:,} of {settings.steps:,}")
            progress = stack.enter_context(bar(settings.steps * size, "training", step * size))

        def report(step: int, loss: float) -> None:
            if progress is not None:
                progress.set_postfix_str(f"step {step:,}, {loss:.2f} bits", refresh=False)
                progress.update(size)

        train(trainer, run, every=args.checkpoint_every, begin=begin, report=report)


def run_evaluate(args: Evaluate) -> None:
    """Measures a model and prints the table."""
    trained = load_model(args.model)
    quantizer = trained.settings.quantizer
    split = recordings(trained.settings, args.data)
    model = trained.model.to(device_of(args.device))
    result = measure_baselines(split.training, split.held_out, quantizer)
    result["network"] = evaluate(model, split.held_out, quantizer)
    print("held-out negative log-likelihood, bits per sample")
    for name, value in result.items():
        share = (
            f"   ({value / result['bigram']:.3f} of the bigram's)" if name == "network" and "bigram" in result else ""
        )
        print(f"  {name:<8} {value:6.3f}{share}")
    if args.step_samples:
        first = split.held_out[0]
        part = min(args.step_samples, len(first) - 1)
        by_step = evaluate_by_step(model, first, quantizer, part)
        by_forward = evaluate(model, [first], quantizer, part + 1)
        print(f"the first {part:,} samples: {by_forward:.6f} by forward, {by_step:.6f} by step")
    if args.model.is_dir():
        write_text(args.model / RESULT, json.dumps(result) + "\n")


def prompt_of(args: Generate, settings: Settings) -> torch.Tensor:
    """The classes of the file to continue; none without a file."""
    if args.prime is None:
        return torch.zeros(0, dtype=torch.long)
    recording = open_recording(args.prime)
    if recording.sample_rate != settings.sample_rate:
        raise Problem(
            f"{args.prime} has {recording.sample_rate} Hz and the model {settings.sample_rate} Hz; resample the file."
        )
    stop = None if args.prime_seconds is None else int(args.prime_seconds * settings.sample_rate)
    classes = settings.quantizer.encode(recording.read(0, stop))
    if not len(classes):
        raise Problem("--prime-seconds leaves nothing of the prompt; give more, or no --prime.")
    return classes


def start(args: Generate, trained: Trained) -> tuple[Streams, torch.Tensor]:
    """The streams to continue, and the prompt that the output begins with."""
    if args.resume is not None:
        if args.prime is not None:
            raise Problem("--resume continues a generation, --prime continues an audio file; give one of them.")
        return load_streams(args.resume, trained.model), torch.zeros(0, dtype=torch.long)
    settings = trained.settings
    prompt = prompt_of(args, settings)
    device = next(trained.model.parameters()).device
    # Silence for a frame of the slowest tier, since the network needs input before the first sample is drawn.
    quiet = torch.full((math.prod(settings.pool),), settings.quantizer.silence)
    return prime(trained.model, (prompt if len(prompt) else quiet).to(device), args.batch, args.seed), prompt


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Delays Ctrl-C to the end of a block, so that file, count and state are of the same number of samples."""
    asked: list[int] = []
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def ask(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt  # a second one does not wait for the end of a block
        asked.append(number)

    if ours:
        signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def run_generate(args: Generate) -> None:
    """Generates a WAV file block by block."""
    trained = load_model(args.model)
    trained.model.to(device_of(args.device))
    settings, quantizer = trained.settings, trained.settings.quantizer
    if args.batch < 1:
        raise Problem(f"--batch must be at least 1, not {args.batch}.")
    if not args.seconds > 0:
        raise Problem(f"--seconds must be above 0, not {args.seconds}.")
    if args.threads is not None and args.threads < 1:
        raise Problem(f"--threads must be at least 1, not {args.threads}.")
    if args.stream and args.batch > 1:
        raise Problem("--stream writes one stream; give no --batch.")
    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_k, args.top_p)
    streams, prompt = start(args, trained)
    engine = make_engine(trained.model, args.engine, args.threads)
    batch = len(streams.logits)
    length = sys.maxsize if math.isinf(args.seconds) else round(args.seconds * settings.sample_rate)
    paths: list[Path | None] = [None if args.stream else args.out]
    if batch > 1:
        paths = [args.out.with_stem(f"{args.out.stem}-{i:0{len(str(batch - 1))}}") for i in range(batch)]
    threads = torch.get_num_threads()
    if batch == 1:
        torch.set_num_threads(1)  # a step of one stream is too small to divide
    bits, done, stopped, begin = torch.zeros(batch, dtype=torch.double), 0, False, time.perf_counter()
    with ExitStack() as stack:
        files = [stack.enter_context(WavWriter(path, settings.sample_rate)) for path in paths]
        progress = stack.enter_context(bar(None if math.isinf(args.seconds) else batch * length, "generating"))
        try:
            for file in files:
                file.write(quantizer.decode(prompt))
            asked = stack.enter_context(interrupts())
            for classes, nll in generate(engine, streams, length, sampling):
                for file, row in zip(files, quantizer.decode(classes.cpu()), strict=True):
                    file.write(row)
                bits += nll.double().sum(1).cpu()
                done += classes.shape[1]
                progress.update(classes.numel())
                if asked:
                    stopped = True
                    break
        except KeyboardInterrupt:
            stopped = True
        except BrokenPipeError:
            pass  # the player was closed
    torch.set_num_threads(threads)
    if not args.stream:
        save_streams(args.out.with_suffix(".state"), streams, trained.model)
    seconds, taken = done / settings.sample_rate, time.perf_counter() - begin
    for file, total in zip(files, bits.tolist(), strict=True):
        likelihood = f"{total / done:.3f} bits per sample" if done else "nothing"
        print(f"{file.path}: {seconds:.2f} s generated, {likelihood}", file=sys.stderr if args.stream else sys.stdout)
    print(f"in {taken:.2f} s: {batch * seconds / taken:.2f} times real time", file=sys.stderr)
    if stopped:
        sys.exit(130)


def run_overfit(args: Overfit) -> None:
    """Overfits one clip, prints each step and draws the loss."""
    clip = open_split(args.data or EMBEDDED, 16000).training[0]
    device = device_of(args.device)
    make_folder(args.out)
    print(f"overfitting {clip.path.name}: {min(LENGTH, len(clip) - 1):,} samples in one step, {device}")

    def report(epoch: int, result: Epoch) -> None:
        peak = result.peak / 2**30
        print(f"epoch {epoch}: {result.bits:.3f} bits, {result.seconds:.1f} s, peak {peak:.2f} GiB", flush=True)

    results = overfit(clip, args.epochs, seed=args.seed, device=str(device), report=report)
    figures.save(figures.overfitting_curve([result.bits for result in results]), args.out / "overfit.png")
    print(f"overfit.png in {args.out}")


def run_report(args: Report) -> None:
    """Generates clips with the run's model, if there are none, and writes the page."""
    if not args.run.is_dir():
        raise Problem(f"{args.run} is not the folder of a run; train one first.")
    trained, run = load_model(args.run), Run(args.run)
    settings = trained.settings
    written = (args.run / MODEL).stat().st_mtime

    def stale(path: Path) -> bool:
        """Whether a file is older than the model, or missing."""
        return not path.is_file() or path.stat().st_mtime < written

    if stale(args.run / RESULT):
        run_evaluate(Evaluate(args.run, device=args.device))
    result = json.loads((args.run / RESULT).read_text())
    first = recordings(settings).held_out[0]
    prompt, length = min(2.0, len(first) / settings.sample_rate / 2), args.seconds
    names = {name: args.run / f"{name}.wav" for name in ("real", "primed", "unprimed")}
    if any(stale(path) for path in names.values()):
        quantizer = settings.quantizer
        head = first.read(0, round((prompt + length) * settings.sample_rate))
        write_wav(names["real"], quantizer.decode(quantizer.encode(head)), settings.sample_rate)
        unprimed = Generate(args.run, names["unprimed"], length, device=args.device)
        run_generate(replace(unprimed, out=names["primed"], prime=names["real"], prime_seconds=prompt))
        run_generate(unprimed)
    titles = {
        "real": ("real, held out", "A recording that the network has not heard. Listen to how tones begin and fade."),
        "primed": (
            f"generated after {prompt:.1f} s of it",
            f"The first {prompt:.1f} s are from the recording. Listen whether its tones then fade naturally, and "
            "whether new tones follow at the same pace.",
        ),
        "unprimed": (
            "generated from silence",
            "All generated. Listen for tones that begin and fade, and for noise between them.",
        ),
    }
    sounds = []
    for name, path in names.items():
        samples, rate = sf.read(path, dtype="float32")
        measures = measure(samples[0 if name == "unprimed" else round(prompt * rate) :], rate)
        print(f"{path.name}: {measures.partials:.1f} partials, life {measures.life:.2f} s, share {measures.share:.2f}")
        sounds.append(Sound(*titles[name], path, samples, measures))
    page = args.out or args.run / "report.html"
    write_report(page, run, trained, result, sounds)
    clips = {sound.title: sound.samples for sound in sounds}
    figures.save(figures.spectrograms(clips, settings.sample_rate), page.with_name("spectrograms.png"))
    if history := run.history():
        figures.save(figures.loss_curve(history, result), page.with_name("loss.png"))
    print(f"{page}")


def run_all() -> None:
    """The short run from end to end."""
    begin = time.perf_counter()
    run_train(Train(device="cpu"))
    run_evaluate(Evaluate(device="cpu"))
    run_report(Report(device="cpu"))
    print(f"{', '.join(sorted(p.name for p in RUN.iterdir() if p.suffix in ('.wav', '.png', '.html')))} in {RUN}")
    print(f"{time.perf_counter() - begin:.0f} s in all")


Command: TypeAlias = Train | Evaluate | Generate | Overfit | Report


def parse(arguments: list[str]) -> Command:
    """The command line, with the defaults of the preset or the settings file that it names."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="small")
    early.add_argument("--config", type=Path)
    known, _ = early.parse_known_args(arguments)
    settings = Settings()
    if arguments[:1] == ["train"]:
        settings = config.preset(known.preset) if known.config is None else config.read(known.config)
    commands = (
        Annotated[Train, subcommand("train", default=Train(settings))]
        | Annotated[Evaluate, subcommand("evaluate")]
        | Annotated[Generate, subcommand("generate")]
        | Annotated[Overfit, subcommand("overfit")]
        | Annotated[Report, subcommand("report")]
    )
    command: Command = tyro.cli(
        Annotated[commands, arg(name="")],
        args=arguments,
        description=__doc__,
    )
    return command


def run_command(arguments: list[str]) -> None:
    """Runs a command line; the short run if it is empty."""
    runs: dict[type, Callable[..., None]] = {
        Train: run_train,
        Evaluate: run_evaluate,
        Generate: run_generate,
        Overfit: run_overfit,
        Report: run_report,
    }
    if not arguments:
        run_all()
    else:
        command = parse(arguments)
        runs[type(command)](command)


def main(arguments: list[str]) -> int:
    """Runs the example."""
    return exit_status("sashimi_youtubemix", lambda: run_command(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
