"""Helpers for the tests of the SaShiMi example."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from sashimi import audio, training  # noqa: E402

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
