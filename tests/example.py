"""Helpers for the tests of the SaShiMi example."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from sashimi import audio, config, storage, training  # noqa: E402

PIANO = EXAMPLES / "data/piano"
CPU = training.World(0, 1, torch.device("cpu"))


def clip(path, classes, rate=16000):
    """A recording of given 8-bit classes, linearly quantised."""
    samples = audio.Quantizer("linear").decode(torch.as_tensor(classes))
    sf.write(path, samples.numpy(), rate, subtype="FLOAT")
    return audio.open_recording(path)


def write(path, seconds=0.5, rate=16000, channels=1, subtype="PCM_16", seed=0):
    """A noisy tone; returns its samples."""
    t = np.arange(int(seconds * rate)) / rate
    rng = np.random.default_rng(seed)
    wave = 0.5 * np.sin(2 * np.pi * 220 * t) + 0.05 * rng.standard_normal(len(t))
    sf.write(path, np.stack([wave] * channels, -1), rate, subtype=subtype)
    return wave


def run(*arguments, cwd, **options):
    """Runs the example as a user does."""
    command = [sys.executable, str(EXAMPLES / "sashimi_youtubemix.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=250, **options)


def small_run(folder, steps=4, **changes):
    """A run of a few steps of a small network on four short files, in this process; its folder and its settings."""
    (folder / "data").mkdir()
    for i, name in enumerate(("a.wav", "b.flac", "c.wav", "d.wav")):
        write(folder / "data" / name, 0.3, seed=i)
    small = {"sample_rate": 16000, "excerpt": 256, "d_model": 4, "d_state": 4, "blocks": 1, "steps": steps}
    settings = config.Settings(data=folder / "data", **{**small, **changes})
    found = storage.Run(folder / "run")
    found.open(settings)
    trainer = training.Trainer(settings, audio.open_split(folder / "data", 16000), CPU)
    training.train(trainer, found, every=2)
    return folder / "run", settings


def snapshot(folder):
    """What is in the files of a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_sentence(status, err, message):
    """The program has ended with one sentence that matches a pattern."""
    assert status == 1, err
    assert re.search(f"^sashimi_youtubemix: .*{message}", err), err
    assert len(err.strip().splitlines()) == 1, err
