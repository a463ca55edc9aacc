"""The files of a run, written so that a crash at any moment leaves the last valid state."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ssmkit import Sequential

from .baselines import BASELINES
from .checked import TensorFile, is_whole, parse_object, read_text, signed
from .config import Settings, from_json, read, to_json
from .problems import Problem

MODEL, CONFIG, LOG, STATE = "model.safetensors", "config.json", "log.jsonl", "state.json"
RESULT = "evaluation.json"
_LONGEST_LINE = 1 << 16
"""Bytes of a line of the log."""


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A path to write to; that file replaces `path` atomically, after it has been synced to the disk.

    Raises:
        Problem: If it cannot be written; `path` is then unchanged.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    except OSError as error:
        raise Problem(f"{path} cannot be written ({error.strerror}); what was there before is untouched.") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder, if it does not exist.

    Raises:
        Problem: If it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"{path} cannot be made ({error.strerror}); give another --out.") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with writing(path) as part:
        part.write_text(text, "utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Writes a safetensors file atomically."""
    with writing(path) as part:
        # Not `save_file`: it writes to its own temporary file, which would remain after a kill.
        part.write_bytes(save({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        Problem: If it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise Problem(f"{path} cannot be read as safetensors ({error}).") from error


def write_checked(path: Path, tensors: dict[str, Tensor], **card: Any) -> None:
    """Writes a safetensors file with a checksum and a card that says what the tensors are, whole or not at all."""
    write_tensors(path, tensors, **signed(card, tensors))


@dataclass(frozen=True)
class Trained:
    """A model file: the network and the settings it was trained with."""

    model: Sequential
    settings: Settings
    step: int
    """Training steps so far."""


def save_model(path: Path, weights: dict[str, Tensor], settings: Settings, step: int) -> None:
    """Writes weights with all that is needed to use them, and nothing of the machine: not where files were."""
    write_checked(path, weights, step=step, settings=to_json(replace(settings, data=None, init_from=None)))


def load_model(path: Path) -> Trained:
    """Reads a model file, or that of a run's folder, which also has the path of its training audio.

    Nothing is made in memory that is much larger than the file, whatever its header says.

    Raises:
        Problem: If there is none, or it is not one of this program, or damaged.
    """
    where = path / MODEL if path.is_dir() else path
    if not where.is_file():
        raise Problem(f"{where} does not exist; give a model file or the folder of a run, or train one first.")
    file = TensorFile(where)
    if not {"step", "settings"} <= set(file.card):
        raise Problem(f"{where} does not say what network it belongs to; it was not written by this program.")
    step, text = file.card["step"], file.card["settings"]
    if not is_whole(step) or not isinstance(text, str):
        raise Problem(f"{where} has a damaged header (step {step!r}).")
    settings = from_json(text, where)
    if settings.least_size > file.numbers:
        raise Problem(
            f"{where} holds the weights of another architecture than its header says ({file.numbers:,} numbers, and "
            f"the network has at least {settings.least_size:,})."
        )
    try:
        model = settings.model()
    except (ValueError, TypeError) as error:
        raise Problem(f"{where} has a damaged header ({error}).") from error
    file.check(model.state_dict())
    # Models that were written before there was a checksum have nothing else in their card.
    model.load_state_dict(file.read(unsigned=set(file.card) == {"step", "settings"}))
    if path.is_dir() and (path / CONFIG).is_file():
        settings = replace(settings, data=read(path / CONFIG).data)
    return Trained(model.eval(), settings, step)


def load_result(folder: Path) -> dict[str, float]:
    """The bits per sample that `evaluate` has written to the folder of a run.

    Raises:
        Problem: If they cannot be read.
    """
    path = folder / RESULT
    try:
        found = parse_object(read_text(path))
        if "network" not in found or not set(found) <= {*BASELINES, "network"} or not _are_numbers(found):
            raise ValueError("it does not hold the bits per sample of the network and of the baselines")
    except (OSError, ValueError) as error:
        raise Problem(f"{path} is damaged ({error}); remove it, and it is made again.") from error
    return found


def _are_numbers(values: Mapping[str, Any]) -> bool:
    """Whether all values out of a JSON text are finite numbers."""
    return all((isinstance(x, float) and math.isfinite(x)) or is_whole(x) for x in values.values())


class Run:
    """The folder of a training run.

    `config.json` holds the settings, `log.jsonl` a line per step, `model.safetensors` the model for use. A checkpoint
    is a separate safetensors file; `state.json` names the valid one, and is replaced atomically after the checkpoint
    has been synced to the disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log: TextIO

    @property
    def state(self) -> dict[str, Any] | None:
        """The content of `state.json`; None before the first checkpoint.

        Raises:
            Problem: If it cannot be read.
        """
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            state = parse_object(read_text(path))
            step, name = state.get("step"), state.get("checkpoint")
            if not isinstance(step, int) or not is_whole(step) or name != _checkpoint(step):
                raise ValueError(f"step {step!r}, checkpoint {name!r}")
        except (OSError, ValueError) as error:
            raise Problem(f"{path} is damaged ({error}); give another --out.") from error
        return {"step": step, "checkpoint": name}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Makes the folder, and keeps it from other runs while this lasts; the system ends that with the process.

        Raises:
            Problem: If another run has it, or it cannot be made.
        """
        make_folder(self.folder)
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Problem(
                    f"{self.folder} is in use by another run; wait until it ends, or give another --out."
                ) from error
            except OSError:
                pass  # a file system without locks
            yield
        finally:
            os.close(handle)

    def open(self, settings: Settings) -> None:
        """Makes the folder, or checks that it holds a run that can continue with these settings.

        Only `steps` may differ, and `schedule` if it gives the same rates for the steps so far.

        Raises:
            Problem: If it holds something else, or cannot be written.
        """
        config = self.folder / CONFIG
        if config.exists():
            there = read(config)
            old, new = asdict(there), asdict(settings)
            if odd := [name for name in new if name not in ("steps", "schedule") and new[name] != old[name]]:
                raise Problem(
                    f"{self.folder} holds a run with other settings ({odd[0]} is {old[odd[0]]} there and "
                    f"{new[odd[0]]} here); give another --out, or continue with --config {config}."
                )
            done = self.state["step"] if self.state else 0
            before = replace(settings, schedule=there.schedule)
            if (
                first := next((k for k in range(min(done, settings.steps)) if before.rate(k) != settings.rate(k)), None)
            ) is not None:
                raise Problem(
                    f"{self.folder} has made {done:,} steps with the schedule {there.schedule}, and "
                    f"{settings.schedule} differs from it after step {first:,}; give --schedule {there.schedule}, more "
                    f"--steps, or another --out."
                )
            if done > settings.steps:
                raise Problem(
                    f"{self.folder} has {done:,} steps behind it, more than --steps {settings.steps:,}; give at least "
                    f"{done:,}, or another --out."
                )
        elif self.folder.exists() and self.state is not None:
            raise Problem(f"{self.folder} holds a checkpoint without its {CONFIG}; give another --out.")
        make_folder(self.folder)

    def begin(self, settings: Settings, step: int) -> None:
        """Writes the settings, and drops what a crash left behind after a step: the run goes on from there."""
        kept = [line for line in self.history() if line["step"] <= step]
        if (self.folder / CONFIG).exists():  # else whatever lies here is not ours
            current = (self.state or {}).get("checkpoint")
            for path in (*self.folder.glob(".*.part"), *self.folder.glob("checkpoint-*.safetensors")):
                if path.name != current:
                    path.unlink()
        write_text(self.folder / CONFIG, to_json(settings))
        write_text(self.folder / LOG, "".join(json.dumps(line) + "\n" for line in kept))

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Writes a checkpoint and removes the one before it."""
        old, name = self.state, _checkpoint(step)
        os.fsync(self._log.fileno())
        write_checked(self.folder / name, tensors, step=step)
        write_text(self.folder / STATE, json.dumps({"step": step, "checkpoint": name}) + "\n")
        if old is not None and old["checkpoint"] != name:
            (self.folder / old["checkpoint"]).unlink(missing_ok=True)

    def load(self, expected: Mapping[str, Tensor] | None = None) -> tuple[int, dict[str, Tensor]] | None:
        """The last checkpoint: the steps behind it, and its tensors; None if there is none.

        Arguments:
            expected: Tensors of the names, dtypes and shapes that it is to hold.

        Raises:
            Problem: If it is damaged, or holds others.
        """
        if (state := self.state) is None:
            return None
        file = TensorFile(self.folder / state["checkpoint"])
        if expected is not None:
            file.check(expected)
        tensors = file.read()
        if file.card.get("step") != state["step"]:
            raise Problem(f"{file.path} is not the checkpoint of step {state['step']:,}; give another --out.")
        return state["step"], tensors

    @contextmanager
    def logging(self) -> Iterator[None]:
        """:meth:`log` may be called inside this context.

        Raises:
            Problem: If the log cannot be written.
        """
        try:
            with (self.folder / LOG).open("a") as self._log:
                yield
        except OSError as error:
            raise Problem(f"{self.folder / LOG} cannot be written ({error.strerror}).") from error

    def log(self, **values: float) -> None:
        """Adds a line to the log."""
        self._log.write(json.dumps(values) + "\n")
        self._log.flush()

    def history(self) -> list[dict[str, float]]:
        """The lines of the log. A crash may damage those after the last checkpoint: the first such line ends it.

        Raises:
            Problem: If it is damaged before.
        """
        path, done = self.folder / LOG, (self.state or {"step": 0})["step"]
        lines: list[dict[str, float]] = []
        reached, number = 0, 0
        if path.exists():
            with path.open("rb") as file:
                while text := file.readline(_LONGEST_LINE):
                    number += 1
                    try:
                        line = parse_object(text)
                        if not _are_numbers(line) or "bits" not in line or not is_whole(line.get("step"), reached + 1):
                            raise ValueError("it is not a line of the log")
                    except ValueError:
                        break
                    lines.append(line)
                    reached = line["step"]
        if number and reached < done:
            raise Problem(
                f"{path} is damaged after step {reached:,}, and the run has {done:,} steps behind it; remove it to go "
                f"on without it."
            )
        return lines


def _checkpoint(step: int) -> str:
    """The name of the checkpoint after so many steps."""
    return f"checkpoint-{step:08d}.safetensors"
