"""Train a byte-level Mamba language model, and generate text with it or with models of transformers and mamba-ssm.

Without arguments it trains a small network on the installed sources of Python's standard library, prints the negative
log-likelihood of held-out sources in bits per byte and that of baselines without a network, and generates text. The
model is written to `runs/language`, in the format of transformers. Each part is also a command.

Folders of public models, such as state-spaces/mamba-130m-hf, are read as they were downloaded:

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
    """Train a small byte-level model on text, and measure it on held-out text. Ctrl-C ends the training and writes the
    model so far."""

    settings: OmitArgPrefixes[Settings] = field(default_factory=Settings)
    out: Path = RUN
    """Folder for the model, in the format of transformers."""
    measure: int = 100_000
    """Bytes of held-out text for the measurement."""
    device: str = DEVICE
    """Where to compute."""


@dataclass(frozen=True)
class Generate:
    """Generate text with a model."""

    model: Path = RUN
    """Folder with `config.json` and `model.safetensors` (or `pytorch_model.bin`) of transformers or mamba-ssm."""
    prompt: tuple[str, ...] = ("def ",)
    """Texts to continue, of any lengths; each is continued separately."""
    prompt_file: Path | None = None
    """A file to continue, instead of a text."""
    length: int = 400
    """Largest number of tokens to generate per text."""
    samples: int = 1
    """Number of texts per prompt."""
    temperature: float = 0.8
    """Logits are divided by it; at 0 the likeliest token is taken."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 for all."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability; 1 for all."""
    stop: tuple[int, ...] | None = None
    """Tokens that end a text, by default those of the model's configuration; without a number, none."""
    seed: int = 0
    """Seed of the draw: the same seed generates the same texts."""
    chunk: int = 512
    """Tokens of a prompt that are read at a time; a smaller number needs less memory."""
    tokenizer: Path | None = None
    """A tokenizer.json, by default the one in the model's folder. Without one, a model of 256 tokens is byte-level."""
    numbers: bool = False
    """Use token numbers instead of text."""
    engine: Literal["auto", "program", "compile", "step"] = "auto"
    """What runs the network: a compiled program (on a CPU, where it is by far the fastest and the default), its step
    under torch.compile, or its eager step."""
    threads: int | None = None
    """Threads of a compiled program; by default one for one text."""
    device: str = DEVICE
    """Where to compute."""


@dataclass(frozen=True)
class Convert:
    """Write a model in the format of transformers or mamba-ssm."""

    model: Path
    """Folder of a model of transformers or mamba-ssm."""
    out: Path
    """Folder to write."""
    to: Library | None = None
    """The library; by default that of the model."""


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
            print("\nstopped; the model so far is written", file=sys.stderr)
    save_model(model, args.out)
    held_out = text.held_out[: args.measure]
    print("held-out negative log-likelihood, bits per byte")
    for name, value in baselines(text, held_out).items():
        print(f"  {name:<8} {value:6.3f}")
    print(f"  {'network':<8} {bits_per_byte(model.network, held_out):6.3f}")
    print(f"{args.out}")


def prompts_of(args: Generate) -> list[str]:
    """The texts to continue."""
    if args.prompt_file is None:
        return list(args.prompt)
    try:
        return [args.prompt_file.read_text()]
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"{args.prompt_file} cannot be read ({error}).") from error


def run_generate(args: Generate) -> None:
    """Prints texts: a single one during generation, several at the end."""
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
    """Writes a model in the format of a library."""
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
