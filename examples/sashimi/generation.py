"""Generation of audio sample by sample: the loop, the drawing of samples, and the engines that run the network."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmkit import MultiRate, Sequential, compile_step
from ssmkit.states import State, repeat

from .checked import TensorFile, is_whole
from .problems import Problem
from .storage import write_checked


@dataclass(frozen=True)
class Sampling:
    """How a sample is drawn from its logits."""

    temperature: float = 1.0
    """Below 1 the draw is less bold and keeps to likely classes, above 1 it is bolder; at 0 it takes the likeliest."""
    top_k: int = 0
    """Draw from this many of the likeliest classes; 0 for all."""
    top_p: float = 1.0
    """Draw from the likeliest classes that together have this probability; 1 for all."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise Problem(f"--temperature must be at least 0 and finite, not {self.temperature}.")
        if self.top_k < 0:
            raise Problem(f"--top-k must be at least 0, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise Problem(f"--top-p must be above 0 and at most 1, not {self.top_p}.")

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Classes (batch) from logits (batch, classes) and numbers in [0, 1) (batch), by inverting the distribution."""
        if self.temperature == 0:
            return logits.argmax(-1)
        p = torch.softmax(logits if self.temperature == 1 else logits / self.temperature, -1)
        if self.top_k and self.top_k < p.shape[-1]:
            p = p * (p >= p.topk(self.top_k).values[..., -1:])
        if self.top_p < 1:
            ordered, order = p.sort(descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered
            ordered = ordered * (before < self.top_p * p.sum(-1, keepdim=True))
            p = torch.zeros_like(p).scatter(-1, order, ordered)
        cumulated = p.cumsum(-1, dtype=torch.double)
        last = p.shape[-1] - 1
        below = cumulated.narrow(-1, 0, last) <= (uniform * cumulated.select(-1, last)).unsqueeze(-1)
        return below.sum(-1)


class Block(NamedTuple):
    """What an engine has drawn, and the state of the streams."""

    classes: Tensor
    """Shape (batch, samples)."""
    bits: Tensor
    """Negative log-likelihood of each under the network at temperature 1; shape (batch, samples)."""
    logits: Tensor
    """Logits of the next sample; shape (batch, classes)."""
    state: State
    """The state after the last sample."""


class SamplingEngine(Protocol):
    """Runs a network sample by sample; all functions below take any such object."""

    def run(self, logits: Tensor, state: State, uniform: Tensor, sampling: Sampling) -> Block:
        """Draws a sample for each random number (batch, samples), and feeds each back."""
        ...


class ProgramEngine:
    """The network as a compiled program, with sampling, on the CPU."""

    def __init__(self, model: Sequential, threads: int | None = None) -> None:
        from ssmkit import streaming

        self.program = streaming.Engine(model.eval(), threads=threads)

    def run(self, logits: Tensor, state: State, uniform: Tensor, sampling: Sampling) -> Block:
        """See :class:`SamplingEngine`."""
        stream = self.program.start(len(logits), state=state)
        made = stream.generate(
            logits, uniform, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
        )
        return Block(made.classes, made.nats / math.log(2), made.logits, stream.state)


class StepEngine:
    """The network's own `step`, with the system made once, eager or under torch.compile."""

    def __init__(self, model: Sequential, *, compiled: bool = False) -> None:
        self.model = model.eval()
        with torch.no_grad():
            self.step = compile_step(model) if compiled else partial(model.step, system=model.system())

    @torch.inference_mode()
    def run(self, logits: Tensor, state: State, uniform: Tensor, sampling: Sampling) -> Block:
        """See :class:`SamplingEngine`."""
        classes, predictions = [], []
        onednn: Any = torch.backends.mkldnn
        before = onednn.enabled
        # For one small vector, oneDNN's GELU takes eight times as long as torch's own.
        onednn.enabled = False
        try:
            for column in uniform.unbind(1):
                predictions.append(logits)
                classes.append(sampling.draw(logits, column))
                logits, state = self.step(classes[-1], state)
        finally:
            onednn.enabled = before
        drawn = torch.stack(classes, 1)
        nats = F.cross_entropy(torch.stack(predictions, 2), drawn, reduction="none")
        return Block(drawn, nats / math.log(2), logits, state)


ENGINES: dict[str, Callable[[Sequential, int | None], SamplingEngine]] = {
    "program": ProgramEngine,
    "compile": lambda model, threads: StepEngine(model, compiled=True),
    "step": lambda model, threads: StepEngine(model),
}
"""The engines by name."""


def make_engine(model: Sequential, name: str = "auto", threads: int | None = None) -> SamplingEngine:
    """The engine of a name; `"auto"` is a compiled program on a CPU, and the network's own `step` elsewhere.

    Raises:
        Problem: If the engine is a compiled program and numba is missing.
    """
    if name == "auto":
        name = "program" if next(model.parameters()).device.type == "cpu" else "step"
    try:
        return ENGINES[name](model, threads)
    except ImportError as error:
        raise Problem(f"{error}; or give --engine step.") from error


@dataclass
class Streams:
    """A batch of streams that are being generated: all that is needed to continue them."""

    logits: Tensor
    state: State
    random: torch.Generator
    samples: int = 0
    """Samples generated so far."""


@torch.no_grad()
def prime(model: Sequential, prompt: Tensor, batch: int = 1, seed: int = 0, window: int = 1 << 18) -> Streams:
    """Reads a prompt (length) of classes in parallel, and starts a batch of streams from its end."""
    model.eval()
    system, state = model.system(), model.initial_state(1)
    for part in prompt[None].split(window, dim=1):
        logits, state = model.scan(part, state, system)
    random = torch.Generator().manual_seed(seed)
    return Streams(logits[:, -1].repeat_interleave(batch, 0), repeat(state, batch), random)


def generate(
    engine: SamplingEngine, streams: Streams, length: int, sampling: Sampling, *, block: int = 800
) -> Iterator[tuple[Tensor, Tensor]]:
    """Continues streams, block by block, and updates `streams` after each block.

    Arguments:
        engine: What runs the network.
        streams: The streams to continue.
        length: Samples to generate.
        sampling: How they are drawn.
        block: Samples per yield.

    Yields:
        Classes and their negative log-likelihood in bits, each with shape (batch, samples).
    """
    device = streams.logits.device
    for start in range(0, length, block):
        size = (min(block, length - start), len(streams.logits))
        uniform = torch.rand(size, generator=streams.random, dtype=torch.double).to(device)
        made = engine.run(streams.logits, streams.state, uniform.mT, sampling)
        streams.logits, streams.state = made.logits, made.state
        streams.samples += size[0]
        yield made.classes, made.bits


def fingerprint(model: Sequential) -> str:
    """A hash of the weights of a network."""
    digest = hashlib.sha256()
    for name, x in model.state_dict().items():
        digest.update(name.encode() + x.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _leaves(state: State) -> Iterator[Tensor | int]:
    """The tensors and phases of a state, in the order of its tree, which is that of the network."""
    if isinstance(state, tuple):
        for child in state:
            yield from _leaves(child)
    else:
        yield state


def _named(state: State) -> dict[str, Tensor]:
    """The tensors of a state by their numbers."""
    return {f"state.{i}": x for i, x in enumerate(x for x in _leaves(state) if isinstance(x, Tensor))}


def save_streams(path: Path, streams: Streams, model: Sequential) -> None:
    """Writes streams to a file, to be continued another time."""
    tensors = {"logits": streams.logits, "random": streams.random.get_state(), **_named(streams.state)}
    phases = [x for x in _leaves(streams.state) if isinstance(x, int)]
    write_checked(path, tensors, phases=phases, samples=streams.samples, model=fingerprint(model))


def load_streams(path: Path, model: Sequential) -> Streams:
    """Reads the file of :func:`save_streams`.

    Raises:
        Problem: If it is something else, belongs to a network with other weights, or is damaged.
    """
    file, rest = TensorFile(path), model.initial_state(1)
    if set(file.card) != {"phases", "samples", "model"} or not {"logits", "random"} <= set(file.sizes):
        raise Problem(f"{path} is not the saved state of a generation.")
    if file.card["model"] != fingerprint(model):
        raise Problem(f"{path} was generated by another model; give that one by --model.")
    weight, random = next(model.parameters()), torch.Generator()
    batch = (*file.sizes["logits"][1], 0)[0]
    shapes = {"logits": (batch, model.d_output), **{name: (batch, *x.shape[1:]) for name, x in _named(rest).items()}}
    meta = {name: torch.empty(shape, dtype=weight.dtype, device="meta") for name, shape in shapes.items()}
    file.check({"random": random.get_state(), **meta}, "the state")
    tensors = file.read()
    pools = [module.pool for module in model.modules() if isinstance(module, MultiRate)]
    phases, samples = file.card["phases"], file.card["samples"]
    fits = isinstance(phases, list) and len(phases) == len(pools) and batch > 0 and is_whole(samples)
    if not fits or not all(is_whole(k) and k < pool for k, pool in zip(phases, pools, strict=True)):
        raise Problem(f"{path} is damaged (phases {phases!r}, {samples!r} samples, {batch} streams).")
    try:
        random.set_state(tensors["random"])
    except RuntimeError as error:
        raise Problem(f"{path} is damaged ({error}).") from error
    parts, numbers = iter(_named(rest)), iter(phases)

    def grow(like: State) -> State:
        if isinstance(like, tuple):
            return tuple(grow(child) for child in like)
        return int(next(numbers)) if isinstance(like, int) else tensors[next(parts)].to(weight.device)

    return Streams(tensors["logits"].to(weight.device), grow(rest), random, samples)
