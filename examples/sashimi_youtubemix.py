"""Train a SaShiMi on audio, measure it, generate audio, and show what it has learned.

Without arguments it trains a small network on five minutes of one piano piece in this repository, prints the negative
log-likelihood of a sixth minute in bits per sample and that of baselines without a network, generates audio, and writes
all results and a page to `runs/youtubemix`. Each part is also a command.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # While the imports run there is nothing to keep: Ctrl-C ends the program at once.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tyro.conf import arg, subcommand

from sashimi import config, figures
from sashimi.audio import Recording, Split, WavWriter, open_recording, open_split, write_wav
from sashimi.baselines import measure_baselines
from sashimi.commands import PIANO as PIANO
from sashimi.commands import RUN, Command, Evaluate, Generate, Overfit, Report, Train
from sashimi.config import LARGEST_SEED, Settings
from sashimi.console import announced, bar, interrupts, stages
from sashimi.evaluation import evaluate, evaluate_by_step
from sashimi.generation import (
    Sampling,
    SamplingEngine,
    Streams,
    generate,
    load_streams,
    make_engine,
    prime,
    save_streams,
)
from sashimi.measures import measure
from sashimi.overfitting import LENGTH, Epoch, overfit
from sashimi.problems import Problem, exit_status
from sashimi.report import Sound, write_report
from sashimi.storage import MODEL, RESULT, Run, Trained, load_model, load_result, make_folder, write_text
from sashimi.training import Trainer, join_world, train

EMBEDDED = Path(__file__).parent / "data" / "piano"


def need(option: str, value: object, holds: bool, rule: str) -> None:
    """Makes sure that an option is in its range.

    Raises:
        Problem: If it is not.
    """
    if not holds:
        raise Problem(f"--{option} must be {rule}, not {value}.")


def recordings(settings: Settings, data: Path | None = None) -> Split:
    """The audio of a run."""
    split = open_split(data or settings.data or EMBEDDED, settings.sample_rate)
    if split.notice:
        print(split.notice, file=sys.stderr)
    return split


def device_of(name: str) -> torch.device:
    """The device of a name."""
    return join_world(name).device


def run_train(args: Train, *, advise: bool = True) -> None:
    """Trains, or goes on training."""
    settings, world = args.settings, join_world(args.device)
    need("checkpoint-every", args.checkpoint_every, args.checkpoint_every >= 1, "at least 1")
    config.check(settings)
    if settings.data is not None:
        settings = replace(settings, data=settings.data.resolve())
    if settings.init_from is not None:
        settings = replace(settings, init_from=settings.init_from.resolve())
    split = recordings(settings)
    trainer, run = Trainer(settings, split, world), Run(args.out)
    size = settings.batch * settings.excerpt
    with ExitStack() as stack:
        if world.first:
            stack.enter_context(run.in_use())
            run.open(settings)
            parameters = sum(p.numel() for p in trainer.model.parameters())
            print(f"{len(split.training)} clips to train on, {len(split.held_out)} held out, {settings.sample_rate} Hz")
            print(f"{parameters:,} parameters", flush=True)
        world.wait()
        progress = stack.enter_context(ExitStack())
        shown = None

        def begin(step: int) -> None:
            nonlocal shown
            if not world.first:
                return
            if step:
                print(f"continuing after step {step:,} of {settings.steps:,}", flush=True)
            shown = progress.enter_context(bar(settings.steps * size, "training", step * size))

        def report(step: int, loss: float) -> None:
            if shown is not None:
                shown.set_postfix_str(f"step {step:,}, {loss:.2f} bits", refresh=False)
                shown.update(size)

        asked = stack.enter_context(interrupts(patient=world.size > 1))
        done = train(trainer, run, every=args.checkpoint_every, begin=begin, report=report, stop=lambda: bool(asked))
        progress.close()
        if asked:
            if world.first:
                print(f"saved at step {done:,} of {settings.steps:,}; the same command goes on from there")
            sys.exit(130)
    if world.first and advise:
        print_advice(run, done)


def print_advice(run: Run, step: int) -> None:
    """Says where the model is, and what can be done with it."""
    print(f"{run.folder / MODEL} is the model after {step:,} steps; what to do next:")
    program, folder = os.path.relpath(__file__), shlex.quote(str(run.folder))
    for command, what in (
        ("evaluate --model", "measure it"),
        ("generate --model", "hear it"),
        ("report --run", "see it"),
    ):
        print(f"  python {shlex.quote(program)} {command} {folder}  # {what}")


def run_evaluate(args: Evaluate) -> None:
    """Measures a model and prints the table."""
    need("step-samples", args.step_samples, args.step_samples >= 0, "at least 0")
    trained = load_model(args.model)
    quantizer = trained.settings.quantizer
    split = recordings(trained.settings, args.data)
    model = trained.model.to(device_of(args.device))
    first, total = split.held_out[0], sum(len(recording) - 1 for recording in split.held_out)
    part = min(args.step_samples, len(first) - 1)
    with stages() as begin:
        result = measure_baselines(split.training, split.held_out, quantizer, begin)
        result["network"] = evaluate(model, split.held_out, quantizer, report=begin("network", total))
        if part:
            by_step = evaluate_by_step(model, first, quantizer, part, report=begin("network, step by step", part))
            by_forward = evaluate(model, [first], quantizer, part + 1)
    print("held-out negative log-likelihood, bits per sample")
    for name, value in result.items():
        print(f"  {name:<8} {value:6.3f}")
    if part:
        print(f"the first {part:,} samples: {by_forward:.6f} by forward, {by_step:.6f} by step")
    if args.model.is_dir():
        write_text(args.model / RESULT, json.dumps(result) + "\n")


def prompt_of(args: Generate, settings: Settings) -> torch.Tensor:
    """The classes of the file to continue; none without a file."""
    if args.prime is None:
        return torch.zeros(0, dtype=torch.long)
    recording = open_recording(args.prime, remedy="give another file to --prime")
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


def prepare(args: Generate, trained: Trained, streams: Streams, sampling: Sampling) -> SamplingEngine:
    """The engine, compiled; a line says so if that takes long."""
    if args.engine != "compile":
        with announced("preparing the network: its program is compiled once per machine, for about 20 seconds"):
            return make_engine(trained.model, args.engine, args.threads)
    with announced("preparing the network: torch compiles its step, which may take minutes the first time"):
        engine = make_engine(trained.model, args.engine, args.threads)
        # One frame of the slowest tier, since each phase is compiled by itself; the streams stay where they are.
        uniform = torch.zeros(len(streams.logits), math.prod(trained.settings.pool), dtype=torch.double)
        engine.run(streams.logits, streams.state, uniform.to(streams.logits.device), sampling)
        return engine


def check_generate(args: Generate) -> None:
    """Makes sure that the options of a generation make sense.

    Raises:
        Problem: If they do not.
    """
    cores, seconds = os.cpu_count() or 1, args.prime_seconds
    need("batch", args.batch, args.batch >= 1, "at least 1")
    need("seconds", args.seconds, args.seconds > 0, "above 0")
    need("seed", args.seed, 0 <= args.seed <= LARGEST_SEED, f"at least 0 and at most {LARGEST_SEED}")
    need("prime-seconds", seconds, seconds is None or 0 < seconds < math.inf, "above 0 and finite")
    if args.threads is not None:
        need("threads", args.threads, args.threads >= 1, "at least 1")
        need("threads", args.threads, args.threads <= cores, f"at most {cores}, the cores of this machine")
    if args.stream and args.batch > 1:
        raise Problem("--stream plays one stream; give no --batch.")


def run_generate(args: Generate) -> None:
    """Generates into a WAV file that grows as it goes."""
    check_generate(args)
    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_k, args.top_p)
    trained = load_model(args.model)
    trained.model.to(device_of(args.device))
    settings, quantizer = trained.settings, trained.settings.quantizer
    streams, prompt = start(args, trained)
    engine, batch = prepare(args, trained, streams, sampling), len(streams.logits)
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
    need("epochs", args.epochs, args.epochs >= 1, "at least 1")
    need("seed", args.seed, 0 <= args.seed <= LARGEST_SEED, f"at least 0 and at most {LARGEST_SEED}")
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


def open_clip(path: Path) -> Recording:
    """A clip that the report has made."""
    return open_recording(path, remedy="remove it, and it is made again")


def run_report(args: Report) -> None:
    """Lets the run's model play, if it has not yet, and writes the page."""
    need("seconds", args.seconds, 0 < args.seconds < math.inf, "above 0 and finite")
    if not args.run.is_dir():
        raise Problem(f"{args.run} is not the folder of a run; train one first.")
    trained, run = load_model(args.run), Run(args.run)
    settings, history = trained.settings, run.history()
    written = (args.run / MODEL).stat().st_mtime

    def stale(path: Path) -> bool:
        """Whether a file is older than the model, or missing."""
        return not path.is_file() or path.stat().st_mtime < written

    def length_of(path: Path) -> int:
        """The samples of a clip; none if it is stale."""
        return 0 if stale(path) else open_clip(path).frames

    first, rate = recordings(settings).held_out[0], settings.sample_rate
    prompt = min(2.0, len(first) / rate / 2)
    generated, heard = round(args.seconds * rate), int(prompt * rate)
    clips = {"real": min(len(first), round((prompt + args.seconds) * rate))}
    clips |= {"primed": heard + generated, "unprimed": generated}
    names = {name: args.run / f"{name}.wav" for name in clips}
    playing = any(length_of(names[name]) != length for name, length in clips.items())
    if stale(args.run / RESULT):
        run_evaluate(Evaluate(args.run, device=args.device))
    result = load_result(args.run)
    if playing:
        quantizer = settings.quantizer
        write_wav(names["real"], quantizer.decode(quantizer.encode(first.read(0, clips["real"]))), rate)
        unprimed = Generate(args.run, names["unprimed"], args.seconds, device=args.device)
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
        samples = open_clip(path).read().numpy()
        measures = measure(samples[0 if name == "unprimed" else heard :], rate)
        print(f"{path.name}: {measures.partials:.1f} partials, life {measures.life:.2f} s, share {measures.share:.2f}")
        sounds.append(Sound(*titles[name], path, samples, measures))
    page = args.out or args.run / "report.html"
    with stages("picture") as begin:
        write_report(page, run, trained, result, sounds, begin)
    pictures = {sound.title: sound.samples for sound in sounds}
    figures.save(figures.spectrograms(pictures, rate), page.with_name("spectrograms.png"))
    if history:
        figures.save(figures.loss_curve(history, result), page.with_name("loss.png"))
    print(f"{page}")


def run_all() -> None:
    """The short run from end to end."""
    begin = time.perf_counter()
    run_train(Train(device="cpu"), advise=False)
    run_evaluate(Evaluate(model=RUN, device="cpu"))
    run_report(Report(device="cpu"))
    print(f"{', '.join(sorted(p.name for p in RUN.iterdir() if p.suffix in ('.wav', '.png', '.html')))} in {RUN}")
    print(f"{time.perf_counter() - begin:.0f} s in all")
    program = Path(sys.argv[0])
    print(f"results, with players: {RUN / 'report.html'}")
    print(f"a model that trained for longer:   python {program} generate --seconds 20")
    print(f"training on your own recordings:   python {program} train --data DIR --out runs/mine --steps 10000")


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
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
