"""Mamba language models: train one of bytes, let one write, or take the weights of others.

Without arguments it trains a small network on the sources of Python's standard library, as they are installed, says how
many bits it needs for a byte of sources that it has not seen beside what needs no network, and lets it write. The model
is left in `runs/language`, in the files of transformers. Each part of that is a command of its own.

A folder with the weights of others, such as state-spaces/mamba-130m-hf, is read as it was downloaded:

    generate --model FOLDER --prompt "The first thing that"
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import torch
import tyro
from tqdm import tqdm
from tyro.conf import OmitArgPrefixes, arg, subcommand

from language.generation import generate, read_prompts
from language.model import LanguageModel, Library, load_model, new_model, save_model
from language.training import Settings, baselines, bits_per_byte, read_text, train
from language.vocabulary import Writer, vocabulary
from sashimi.generation import Sampling, make_engine
from sashimi.problems import Problem, exit_status

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUN = Path("runs/language")


@dataclass(frozen=True)
class Train:
    """Train a small model of bytes on text, and measure it on text that it has not seen. Ctrl-C ends the training and
    keeps what it has learned."""

    settings: OmitArgPrefixes[Settings] = field(default_factory=Settings)
    out: Path = RUN
    """Folder for the model, in the files of transformers."""
    measure: int = 100_000
    """Bytes of held-out text to measure with."""
    device: str = DEVICE
    """Where to compute."""


@dataclass(frozen=True)
class Generate:
    """Let a model write, by default what it writes as it goes."""

    model: Path = RUN
    """Folder with `config.json` and `model.safetensors` (or `pytorch_model.bin`), of transformers or of mamba-ssm."""
    prompt: tuple[str, ...] = ("def ",)
    """Texts to go on from, of any lengths; each is continued by itself."""
    prompt_file: Path | None = None
    """A file to go on from, instead of a text."""
    length: int = 400
    """The most tokens to write after each."""
    samples: int = 1
    """Texts per prompt."""
    temperature: float = 0.8
    """Below 1 the draw is bolder, at 0 it is greedy."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0 for all."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability; 1 for all."""
    stop: tuple[int, ...] | None = None
    """Tokens that end a text, by default those that the model's configuration names; none if no number follows."""
    seed: int = 0
    """Of the draw: the same seed writes the same."""
    chunk: int = 512
    """Tokens of a prompt that are read at a time; fewer need less memory."""
    tokenizer: Path | None = None
    """A tokenizer.json, by default the one in the model's folder; models of 256 tokens without one are of bytes."""
    numbers: bool = False
    """Prompts and texts are token numbers."""
    engine: Literal["auto", "program", "compile", "step"] = "auto"
    """What runs the network: a compiled program (on a CPU the fastest, and the default there), its step under
    torch.compile, or its step as it is."""
    threads: int | None = None
    """Of a compiled program; by default one for one text."""
    device: str = DEVICE
    """Where to compute."""


@dataclass(frozen=True)
class Convert:
    """Write a model for the other library, or once more for the same."""

    model: Path
    """Folder of a model, of transformers or of mamba-ssm."""
    out: Path
    """Folder to write."""
    to: Library | None = None
    """The library; by default the one that the model comes from."""


def run_train(args: Train) -> None:
    """Trains, measures and writes the model."""
    settings = args.settings
    text = read_text(settings.data)
    if args.measure < 2:
        raise Problem(f"--measure must be at least 2, not {args.measure}.")
    torch.manual_seed(settings.seed)
    model = new_model(settings.architecture)
    parameters = sum(p.numel() for p in model.network.parameters())
    print(f"{len(text.training):,} bytes of {text.files} files to train on, {len(text.held_out):,} held out")
    print(f"{parameters:,} parameters", flush=True)
    interval = 0.5 if sys.stderr.isatty() else 30
    with tqdm(total=settings.steps, desc="training", unit="step", mininterval=interval, dynamic_ncols=True) as progress:

        def report(step: int, bits: float) -> None:
            progress.set_postfix_str(f"{bits:.2f} bits per byte", refresh=False)
            progress.update()

        try:
            train(model.network, text.training, settings, report, args.device)
        except KeyboardInterrupt:
            print("\nstopped; the model is kept as it is", file=sys.stderr)
    save_model(model, args.out)
    held_out = text.held_out[: args.measure]
    print("held-out negative log-likelihood, bits per byte")
    for name, value in baselines(text, held_out).items():
        print(f"  {name:<8} {value:6.3f}")
    print(f"  {'network':<8} {bits_per_byte(model.network, held_out):6.3f}")
    print(f"{args.out}")


def prompts_of(args: Generate) -> list[str]:
    """The texts to go on from."""
    if args.prompt_file is None:
        return list(args.prompt)
    try:
        return [args.prompt_file.read_text()]
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"{args.prompt_file} cannot be read ({error}).") from error


def run_generate(args: Generate) -> None:
    """Writes texts to standard output: one as it is made, several one after another once all are done."""
    for name in ("length", "samples", "chunk", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise Problem(f"--{name} must be at least 1, not {value}.")
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    model: LanguageModel = load_model(args.model)
    words = vocabulary(args.model, model.architecture.vocab_size, args.tokenizer, args.numbers)
    network = model.network.to(args.device)
    prompts = [words.encode(prompt) for prompt in prompts_of(args)]
    streams = read_prompts(network, prompts, args.samples, seed=args.seed, chunk=args.chunk)
    engine = make_engine(network, args.engine, args.threads)
    stop = set(model.stop if args.stop is None else args.stop)
    writers = [Writer(words) for _ in range(len(prompts) * args.samples)]
    alone = len(writers) == 1
    texts = [writer.add(prompts[i // args.samples]) for i, writer in enumerate(writers)]
    if alone:
        print(texts[0], end="", flush=True)
    begin, tokens = time.perf_counter(), 0
    for parts in generate(engine, streams, args.length, sampling, stop=stop, block=8 if alone else 32):
        for i, part in enumerate(parts):
            texts[i] += (new := writers[i].add([token for token in part.tolist() if token not in stop]))
            if alone:
                print(new, end="", flush=True)
            tokens += len(part)
    rest = [writer.add([], last=True) for writer in writers]
    if alone:
        print(rest[0])
    else:
        for i, text in enumerate(texts):
            print(f"--- {i + 1} of {len(texts)}\n{text}{rest[i]}")
    taken = time.perf_counter() - begin
    print(f"{tokens} tokens in {taken:.2f} s: {tokens / taken:.1f} a second", file=sys.stderr)


def run_convert(args: Convert) -> None:
    """Writes a model for a library."""
    model = load_model(args.model)
    save_model(model, args.out, args.to, args.model)
    print(f"{args.out}, for {args.to or model.library}")


def run_all() -> None:
    """The short run from end to end."""
    run_train(Train())
    run_generate(Generate())


Command: TypeAlias = Train | Generate | Convert


def run_command(arguments: list[str]) -> None:
    """Runs what the command line says; all in small if it says nothing."""
    if not arguments:
        return run_all()
    commands = (
        Annotated[Train, subcommand("train")]
        | Annotated[Generate, subcommand("generate")]
        | Annotated[Convert, subcommand("convert")]
    )
    command: Command = tyro.cli(Annotated[commands, arg(name="")], args=arguments, description=__doc__)
    runs: dict[type, Callable[..., None]] = {Train: run_train, Generate: run_generate, Convert: run_convert}
    runs[type(command)](command)


def main(arguments: list[str]) -> int:
    """Runs the program."""
    return exit_status("language_model", lambda: run_command(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
