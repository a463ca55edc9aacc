"""Figures of a run: losses, waveforms, spectrograms, and the state-space layers before and after training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ssmkit import SequenceLayer
from ssmkit.layers.featurewise import FeaturewiseLayer
from ssmkit.systems import DiscreteDiagonal


def save(figure: Figure, path: Path) -> None:
    """Writes a figure and closes it."""
    figure.savefig(path, dpi=120)
    plt.close(figure)


def loss_curve(history: list[dict[str, float]], result: dict[str, float]) -> Figure:
    """The loss of every step, its running mean, held-out losses, and the baselines."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = np.array([line["step"] for line in history])
    losses = np.array([line["bits"] for line in history])
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="training, each step")
    width = max(1, len(losses) // 40)
    mean = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], mean, color="C0", label=f"training, mean of {width} steps")
    checks = [(line["step"], line["held_out"]) for line in history if "held_out" in line]
    if checks:
        axes.plot(*zip(*checks, strict=True), "o-", color="C2", markersize=3, label="held out, first seconds")
    colors = {"uniform": "0.6", "unigram": "C1", "bigram": "C3", "adaptive": "C4", "network": "C2"}
    for name, value in result.items():
        style = "-" if name == "network" else "--"
        axes.axhline(value, color=colors[name], linestyle=style, linewidth=1, label=f"{name}, held out: {value:.2f}")
    lowest = min([*mean, *result.values()])
    axes.set(xlabel="step", ylabel="bits per sample", ylim=(lowest - 0.5, max(result.values()) + 0.3))
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def overfitting_curve(losses: list[float]) -> Figure:
    """The loss of every epoch."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(np.arange(len(losses)), losses, marker=".")
    axes.set(xlabel="epoch", ylabel="bits per sample", ylim=(0, 8.3))
    return figure


def waveform(samples: np.ndarray, sample_rate: int) -> Figure:
    """Samples in [-1, 1] against time: the range of the samples of each pixel."""
    figure, axes = plt.subplots(figsize=(8, 1.4), layout="constrained")
    size = max(1, len(samples) // 1600)
    rows = samples[: len(samples) // size * size].reshape(-1, size)
    axes.fill_between(np.arange(len(rows)) * size / sample_rate, rows.min(1), rows.max(1), linewidth=0.3)
    axes.set(xlabel="seconds", ylim=(-1, 1), xlim=(0, len(samples) / sample_rate))
    return figure


def spectrograms(clips: dict[str, np.ndarray], sample_rate: int) -> Figure:
    """One spectrogram per clip of samples in [-1, 1], on one scale in dB below full scale."""
    figure, rows = plt.subplots(len(clips), 1, figsize=(8, 2.4 * len(clips)), layout="constrained", squeeze=False)
    for axes, (name, samples) in zip(rows[:, 0], clips.items(), strict=True):
        size = min(1024, max(2, len(samples) // 2))
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
    return figure


@dataclass(frozen=True)
class Tap:
    """A state-space layer in a network, before and after training."""

    name: str
    before: FeaturewiseLayer
    after: FeaturewiseLayer
    sample_rate: float
    """The rate at which the layer runs, in Hz."""


def taps(before: SequenceLayer, after: SequenceLayer, d_model: int, pool: Sequence[int], sample_rate: int) -> list[Tap]:
    """The last state-space layer of every tier."""
    found: dict[int, Tap] = {}
    blocks: Counter[int] = Counter()
    for old, new in zip(before.modules(), after.modules(), strict=True):
        if isinstance(old, FeaturewiseLayer) and isinstance(new, FeaturewiseLayer):
            tier = int(np.log2(old.d_model / d_model))
            blocks[tier] += 1
            rate = sample_rate / int(np.prod(pool[:tier]))
            found[tier] = Tap(f"Tier {tier + 1}, block {blocks[tier]}, at {rate:,.0f} Hz", old, new, rate)
    return [found[tier] for tier in sorted(found)]


@torch.no_grad()
def _time_scales(layer: FeaturewiseLayer) -> np.ndarray:
    """The number of samples in which each pole decays to 1/e."""
    system = layer.system()
    poles = system.a if isinstance(system, DiscreteDiagonal) else torch.linalg.eigvals(system.dense.A)
    scales: np.ndarray = (-1 / poles.abs().clamp(1e-6, 1 - 1e-9).log()).flatten().numpy()
    return scales


@torch.no_grad()
def layer_portrait(tap: Tap, features: int = 4) -> Figure:
    """Kernels of some features, the time scales of all poles, and the mean spectrum, before and after training."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
    length = 2048
    both = (("before", tap.before, "0.6"), ("after", tap.after, "C0"))
    edges = np.logspace(-1, 4.5, 60) / tap.sample_rate * 1e3
    for name, layer, color in both:
        kernel = layer.kernel(length)[0].double().numpy()
        spread = np.abs(kernel[:features]).max(1, keepdims=True) + 1e-12
        time = np.arange(length) / tap.sample_rate * 1e3
        for i, row in enumerate(kernel[:features] / spread):
            left.plot(time, row - 2.2 * i, color=color, linewidth=0.8, label=name if i == 0 else None)
        middle.hist(_time_scales(layer) / tap.sample_rate * 1e3, bins=edges, histtype="step", color=color, label=name)
        spectrum = 20 * np.log10(np.abs(np.fft.rfft(kernel)).mean(0) + 1e-9)
        right.semilogx(
            np.fft.rfftfreq(length, 1 / tap.sample_rate)[1:], spectrum[1:], color=color, linewidth=1, label=name
        )
    left.set(title=f"kernels of {features} features, scaled", xlabel="ms", yticks=[], xlim=(0, time[length // 4]))
    middle.set(title="time scales of all poles", xlabel="ms until 1/e", xscale="log")
    right.set(title="spectrum, mean over features", xlabel="Hz", ylabel="dB")
    figure.legend(*middle.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure
