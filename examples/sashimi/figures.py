"""Pictures of a run: the loss curve, and spectrograms of real against generated audio."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt


def loss_curve(path: Path, losses: list[float], held_out: float, baselines: dict[str, float]) -> None:
    """Draws the loss of every step, its running mean, and what it is to be compared with."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="training, each step")
    width = max(1, len(losses) // 40)
    mean = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], mean, color="C0", label=f"training, mean of {width} steps")
    for (name, value), color in zip(baselines.items(), ("0.6", "C1", "C3"), strict=True):
        axes.axhline(value, color=color, linestyle="--", linewidth=1, label=f"{name} counts, held out: {value:.2f}")
    axes.axhline(held_out, color="C2", linewidth=1.5, label=f"network, held out: {held_out:.2f}")
    axes.set(xlabel="step", ylabel="bits per sample", ylim=(min(held_out, min(mean)) - 0.5, 8.3))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def overfitting_curve(path: Path, losses: list[float]) -> None:
    """Draws the loss of every epoch."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(np.arange(len(losses)), losses, marker=".")
    axes.set(xlabel="epoch", ylabel="bits per sample", ylim=(0, 8.3))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def spectrograms(path: Path, clips: dict[str, np.ndarray], sample_rate: int) -> None:
    """Draws one spectrogram per clip of samples in [-1, 1], on one scale in dB below full scale."""
    figure, rows = plt.subplots(len(clips), 1, figsize=(8, 2.4 * len(clips)), layout="constrained", squeeze=False)
    for axes, (name, samples) in zip(rows[:, 0], clips.items(), strict=True):
        size = min(1024, max(2, len(samples)))
        image = axes.specgram(
            samples,
            NFFT=size,
            noverlap=size * 3 // 4,
            Fs=sample_rate,
            scale="dB",
            mode="magnitude",
            vmin=-110,
            vmax=-30,
            cmap="magma",
        )[3]
        axes.set(title=name, ylabel="Hz", ylim=(0, min(5000, sample_rate / 2)))
    rows[-1, 0].set(xlabel="seconds")
    figure.colorbar(image, ax=rows[:, 0].tolist(), label="dB")
    figure.savefig(path, dpi=120)
    plt.close(figure)
