"""What the tutorials share: audio of the repository, a player, and the look of figures."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import torch
from torch import Tensor

PIANO = Path(__file__).parents[2] / "examples/data/piano"


def piano(seconds: float, start: float = 0.0, name: str = "heldout/take20-minute1.flac") -> tuple[Tensor, int]:
    """Samples of a piano clip between -1 and 1, float32, with shape (length), and their rate in hertz."""
    rate = sf.info(PIANO / name).samplerate
    first, length = round(start * rate), round(seconds * rate)
    samples, _ = sf.read(PIANO / name, start=first, frames=length, dtype="float32")
    return torch.from_numpy(samples), rate


class Player:
    """Audio as a player in a page: samples with shape (length) or (length, channels), scaled to full loudness."""

    def __init__(self, samples: Tensor, rate: int) -> None:
        x = samples.detach().double().numpy()
        file = io.BytesIO()
        sf.write(file, 0.9 * x / max(np.abs(x).max(), 1e-9), rate, format="WAV", subtype="PCM_16")
        self.wav = file.getvalue()

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.wav).decode()
        return f'<audio controls preload="none" src="data:audio/wav;base64,{data}"></audio>'


def reset_figures(conf: dict[str, Any], name: str) -> None:
    """Called by the gallery before each tutorial: figures that can be read on a telephone, too."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.figsize": (5.6, 3.2),
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.titlesize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )
