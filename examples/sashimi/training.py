"""Training of an autoregressive network, on one or several processes, and continuing a run from its last checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ssmkit import Sequential, param_groups

from .audio import IGNORED, Excerpts, Split, mix
from .config import Settings, check
from .evaluation import evaluate
from .problems import Problem
from .storage import MODEL, Run, Trained, load_model, save_model

_ARCHITECTURE = ("d_model", "d_state", "blocks", "pool", "layer", "glu", "bits")
"""The settings that decide names and shapes of the weights."""
VALIDATION = 5
"""Seconds of held-out audio that are measured at every checkpoint."""


@dataclass(frozen=True)
class World:
    """The processes that share a run: those started by `torchrun`, or a single one."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Barrier of all processes."""
        if self.size > 1:
            dist.barrier()

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in one of the processes."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag), device=self.device)))


def join_world(device: str) -> World:
    """Connects to the other processes, if `torchrun` started some.

    Raises:
        Problem: If the device does not exist.
    """
    size, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise Problem(f"there is no device {device!r}; give cpu, cuda or cuda:N.") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise Problem("this machine has no GPU that torch can use; give --device cpu.")
        if chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return World(rank, size, chosen)


def bits(logits: Tensor, target: Tensor) -> Tensor:
    """The mean negative log-likelihood of the targets, in bits per sample."""
    return F.cross_entropy(logits.flatten(0, -2).float(), target.flatten()) / math.log(2)


def _check(settings: Settings, world: World) -> None:
    check(settings)
    parts = world.size * settings.accumulate
    if settings.batch % parts:
        raise Problem(
            f"a batch of {settings.batch} cannot be shared by {world.size} processes in {settings.accumulate} "
            f"parts each; give a multiple of {parts} as --batch."
        )
    if settings.bf16 and world.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise Problem("this GPU has no bfloat16; leave --bf16 out.")
    size, memory = 4 * settings.least_size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise Problem(
            f"these settings do not make a network that can be trained: its weights need at least "
            f"{size / 2**30:,.0f} GiB, and this machine has {memory / 2**30:,.0f} GiB."
        )


class Trainer:
    """A network in training: weights, averaged weights, optimiser.

    Arguments:
        settings: The settings of the run.
        split: The recordings.
        world: The processes that share the run.

    Raises:
        Problem: If the settings do not make sense, or no recording is long enough.
    """

    def __init__(self, settings: Settings, split: Split, world: World) -> None:
        _check(settings, world)
        self.settings, self.split, self.world = settings, split, world
        self.excerpts = Excerpts(split.training, settings.quantizer, settings.excerpt, settings.seed, pad=settings.pad)
        try:
            self.model = settings.model().to(world.device)
            groups = param_groups(self.model, settings.lr, settings.weight_decay, ssm_lr=settings.ssm_lr)
            self.optimizer = torch.optim.AdamW(groups)
        except (ValueError, TypeError) as error:
            raise Problem(f"these settings do not make a network that can be trained: {error}") from error
        self.average = None
        if settings.ema:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.network: nn.Module = DistributedDataParallel(self.model) if world.size > 1 else self.model

    @property
    def best(self) -> Sequential:
        """The network for use: with averaged weights, if there are any."""
        if self.average is None:
            return self.model
        return cast(Sequential, self.average.module)

    def start_from(self, trained: Trained, where: Path) -> None:
        """Takes the weights of a trained network in place of the initial ones.

        Arguments:
            trained: The trained network.
            where: The file that it is from.

        Raises:
            Problem: If its architecture is not that of the settings.
        """
        for name in _ARCHITECTURE:
            theirs, ours = getattr(trained.settings, name), getattr(self.settings, name)
            if theirs != ours:
                option = name.replace("_", "-")
                raise Problem(f"{where} was trained with --{option} {theirs}, and this run has {ours}; give the same.")
        # By order: the names differ with --recompute, which does not change the network.
        weights = dict(zip(self.model.state_dict(), trained.model.state_dict().values(), strict=True))
        self.model.load_state_dict(weights)  # the average begins with the weights after the first step

    def tensors(self) -> dict[str, Tensor]:
        """All that a run needs to go on."""
        found = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        if self.average is not None:
            found |= {f"average.{name}": x for name, x in self.average.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state.get(parameter)
            if not state:  # before its first gradient, which is the same as zeros
                zeros = torch.zeros_like(parameter)
                state = {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            found |= {f"optimizer.{name}.{key}": x for key, x in state.items()}
        return found

    def load(self, step: int, tensors: dict[str, Tensor], where: Path) -> None:
        """Takes up what :meth:`tensors` gave.

        Arguments:
            step: The steps behind it.
            tensors: Tensors of the same names, dtypes and shapes.
            where: The file that they are from.

        Raises:
            Problem: If the optimiser's are not what so many steps can have left.
        """

        def part(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}

        states = {parameter: part(f"optimizer.{name}.") for name, parameter in self.model.named_parameters()}
        for state in states.values():
            if not 0 <= float(state["step"]) <= step or (state["exp_avg_sq"] < 0).any():
                raise Problem(f"{where} holds a state of the optimiser that {step:,} steps do not leave.")
        self.model.load_state_dict(part("model."))
        if self.average is not None:
            self.average.load_state_dict(part("average."))
        for parameter, state in states.items():
            # The count of steps stays where AdamW keeps it: on the CPU.
            self.optimizer.state[parameter] = {
                key: x if key == "step" else x.to(parameter.device) for key, x in state.items()
            }

    def step(self, number: int, x: Tensor, y: Tensor) -> tuple[float, float]:
        """One optimiser step on this process's rows of the batch; the loss in bits and the norm of the gradient.

        Raises:
            Problem: If one of them is not finite; the weights are then unchanged.
        """
        settings, device = self.settings, self.world.device
        torch.manual_seed(mix(settings.seed, number, self.world.rank))
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * settings.rate(number)
        x, y = x.to(device), y.to(device)
        if settings.noise and number < settings.noise_until * settings.steps:
            moved = x + torch.randint(-settings.noise, settings.noise + 1, x.shape, device=device)
            x = moved.clamp(0, settings.quantizer.classes - 1)
        counted = self.world.sum((y != IGNORED).sum())
        self.network.train()
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.double, device=device)
        pairs = list(zip(x.chunk(settings.accumulate), y.chunk(settings.accumulate), strict=True))
        for i, (inputs, targets) in enumerate(pairs):
            last = i == len(pairs) - 1
            hold = self.network.no_sync() if isinstance(self.network, DistributedDataParallel) and not last else None
            with hold or nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
                    logits = self.network(inputs)
                nll = F.cross_entropy(
                    logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
                )
                # DistributedDataParallel averages gradients over processes, but the sum is needed.
                (nll * (self.world.size / (counted * math.log(2)))).backward()
            total += nll.detach()
        loss = float(self.world.sum(total) / (counted * math.log(2)))
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
            raise Problem(f"{what} at step {number + 1}; lower --lr or --clip. The last checkpoint is unchanged.")
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return loss, norm


def train(
    trainer: Trainer,
    run: Run,
    *,
    every: int = 200,
    begin: Callable[[int], None] = lambda step: None,
    report: Callable[[int, float], None] = lambda step, loss: None,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Trains until the settings' number of steps is reached, from the run's last checkpoint if it has one.

    A new run starts from the weights of `settings.init_from`, if it is given.

    Arguments:
        trainer: The network in training.
        run: The run's folder.
        every: Steps from checkpoint to checkpoint.
        begin: Called with the number of steps that the checkpoint already has behind it.
        report: Called after every step with the number of steps behind it and the loss in bits.
        stop: Called after every step; if it says so, the step is made a checkpoint, and the last one for now.

    Returns:
        The number of steps behind the run.

    Raises:
        Problem: If the loss is no longer finite, the disk is full, or a file turns out to be damaged.
    """
    settings, world = trainer.settings, trainer.world
    share = settings.batch // world.size
    rows = (world.rank * share, (world.rank + 1) * share)
    done = 0
    if (found := run.load(trainer.tensors())) is not None:
        done, tensors = found
        trainer.load(done, tensors, run.folder)
    elif settings.init_from is not None:
        trainer.start_from(load_model(settings.init_from), settings.init_from)
    if world.first:
        run.begin(settings, done)
    begin(done)
    with ThreadPoolExecutor(1) as ahead, run.logging() if world.first else nullcontext():

        def fetch(step: int) -> Future[tuple[Tensor, Tensor]]:
            return ahead.submit(trainer.excerpts.draw, step, settings.batch, *rows)

        coming = fetch(done)
        for step in range(done, settings.steps):
            x, y = coming.result()
            if step + 1 < settings.steps:
                coming = fetch(step + 1)
            loss, norm = trainer.step(step, x, y)
            last = step + 1 == settings.steps
            stopped = world.any(stop()) and not last
            if world.first:
                line = {"step": step + 1, "bits": loss, "norm": norm, "lr": trainer.optimizer.param_groups[0]["lr"]}
                due = last or (step + 1) % every == 0
                if due:
                    seconds = VALIDATION * settings.sample_rate
                    line["held_out"] = evaluate(trainer.best, trainer.split.held_out[:1], settings.quantizer, seconds)
                run.log(**line)
                if due or stopped:
                    _save(trainer, run, step + 1)
            report(step + 1, loss)
            if stopped:
                return step + 1
    return settings.steps


def _save(trainer: Trainer, run: Run, step: int) -> None:
    tensors = trainer.tensors()
    if odd := [name for name, x in tensors.items() if not x.isfinite().all()]:
        raise Problem(
            f"{odd[0]} is no longer finite after step {step}; lower --lr or --clip. The last checkpoint stays as it is."
        )
    # The model first: a run killed in between has it, and writes it again.
    save_model(run.folder / MODEL, trainer.best.state_dict(), trainer.settings, step)
    run.save(step, tensors)
