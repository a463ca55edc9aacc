"""The files of a run, written so that a crash at any moment leaves the last valid state."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ssmkit import Sequential

from .config import Settings, from_json, read, to_json
from .problems import Problem

MODEL, CONFIG, LOG, STATE = "model.safetensors", "config.json", "log.jsonl", "state.json"


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
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise Problem(f"{path} cannot be written ({error.strerror}); the file there is unchanged.") from error


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
        part.write_text(text)


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


def load_into(model: torch.nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Loads weights into a network.

    Raises:
        Problem: If they are those of another network.
    """
    own = model.state_dict()
    odd = [name for name in own if name not in tensors or tensors[name].shape != own[name].shape]
    if odd or len(tensors) != len(own):
        what = f"{odd[0]} has another shape or is missing" if odd else f"it holds {sorted(set(tensors) - set(own))[0]}"
        raise Problem(f"{where} holds the weights of another architecture ({what}).")
    model.load_state_dict(tensors)


@dataclass(frozen=True)
class Trained:
    """A model file: the network and the settings it was trained with."""

    model: Sequential
    settings: Settings
    step: int
    """Training steps so far."""


def save_model(path: Path, weights: dict[str, Tensor], settings: Settings, step: int) -> None:
    """Writes weights with all that is needed to use them, but without paths of this machine."""
    # One entry: safetensors writes several in any order, and the same run should write the same file.
    card = json.dumps({"step": step, "settings": to_json(replace(settings, data=None))})
    write_tensors(path, weights, sashimi=card)


def load_model(path: Path) -> Trained:
    """Reads a model file, or that of a run's folder, which also has the path of its training audio.

    Raises:
        Problem: If there is none, or it is not a file of :func:`save_model`.
    """
    file = path / MODEL if path.is_dir() else path
    if not file.is_file():
        raise Problem(f"{file} does not exist; give a model file or the folder of a run, or train one first.")
    weights, metadata = read_tensors(file)
    if "sashimi" not in metadata:
        raise Problem(f"{file} does not say what network it belongs to; it was not written by `train`.")
    try:
        card = json.loads(metadata["sashimi"])
        step, text = int(card["step"]), str(card["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(f"{file} has a damaged header ({error}).") from error
    settings = from_json(text, file)
    model = settings.model()
    load_into(model, weights, file)
    if path.is_dir() and (path / CONFIG).is_file():
        settings = replace(settings, data=read(path / CONFIG).data)
    return Trained(model.eval(), settings, step)


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
            state = json.loads(path.read_text())
            return {"step": int(state["step"]), "checkpoint": str(state["checkpoint"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Problem(f"{path} is damaged ({error}); give another --out.") from error

    def open(self, settings: Settings) -> None:
        """Makes the folder, or checks that it holds a run that can continue with these settings.

        Only `steps` may differ, and `schedule` if it gives the same rates for the steps so far.

        Raises:
            Problem: If it holds something else, or cannot be written.
        """
        config = self.folder / CONFIG
        if config.exists():
            try:
                there = from_json(config.read_text(), config)
            except OSError as error:
                raise Problem(f"{config} cannot be read ({error}).") from error
            old, new = asdict(there), asdict(settings)
            if odd := [name for name in new if name not in ("steps", "schedule") and new[name] != old[name]]:
                raise Problem(
                    f"{self.folder} holds a run with other settings ({odd[0]} is {old[odd[0]]} there and "
                    f"{new[odd[0]]} here); give another --out, or continue with --config {config}."
                )
            done = self.state["step"] if self.state else 0
            before = replace(settings, schedule=there.schedule)
            if (first := next((k for k in range(done) if before.rate(k) != settings.rate(k)), None)) is not None:
                raise Problem(
                    f"{self.folder} has made {done:,} steps with the schedule {there.schedule}, and "
                    f"{settings.schedule} differs from it after step {first:,}; give --schedule {there.schedule}, more "
                    f"--steps, or another --out."
                )
        elif self.folder.exists() and self.state is not None:
            raise Problem(f"{self.folder} holds a checkpoint without its {CONFIG}; give another --out.")
        make_folder(self.folder)

    def begin(self, settings: Settings, step: int) -> None:
        """Writes the settings, and removes remains of a crash after a step: the run continues from that step."""
        if (self.folder / CONFIG).exists():  # otherwise the files here are not ours
            current = (self.state or {}).get("checkpoint")
            for path in (*self.folder.glob(".*.part"), *self.folder.glob("checkpoint-*.safetensors")):
                if path.name != current:
                    path.unlink()
        write_text(self.folder / CONFIG, to_json(settings))
        kept = [line for line in self.history() if line["step"] <= step]
        write_text(self.folder / LOG, "".join(json.dumps(line) + "\n" for line in kept))

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Writes a checkpoint and removes the one before it."""
        old = self.state
        name = f"checkpoint-{step:08d}.safetensors"
        os.fsync(self._log.fileno())
        write_tensors(self.folder / name, tensors)
        write_text(self.folder / STATE, json.dumps({"step": step, "checkpoint": name}) + "\n")
        if old is not None and old["checkpoint"] != name:
            (self.folder / old["checkpoint"]).unlink(missing_ok=True)

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """The last checkpoint: its number of steps and its tensors; None if there is none.

        Raises:
            Problem: If it is damaged.
        """
        if (state := self.state) is None:
            return None
        return state["step"], read_tensors(self.folder / state["checkpoint"])[0]

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
        """The lines of the log, without a line that a crash has cut off."""
        path = self.folder / LOG
        lines = []
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        return lines
