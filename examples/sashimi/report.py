"""One self-contained HTML page about a run."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from . import figures
from .console import Stage, silent
from .measures import Measures
from .storage import Run, Trained, writing


@dataclass(frozen=True)
class Sound:
    """A clip on the page."""

    title: str
    listen: str
    """What to listen for, in a sentence or two."""
    path: Path
    samples: np.ndarray
    """Its samples, in [-1, 1]."""
    measures: Measures
    """The measures of the part after the prompt."""


def _picture(figure: Figure) -> str:
    """A figure as the source of an image element."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_report(
    path: Path, run: Run, trained: Trained, result: dict[str, float], sounds: list[Sound], begin: Stage = silent
) -> None:
    """Writes the page: settings, losses, likelihoods, clips to listen to, and layers before and after training.

    Arguments:
        path: The file to write.
        run: The run's folder.
        trained: Its model.
        result: Bits per sample on held-out audio: the baselines, and the `network`.
        sounds: WAV files, put into the page whole.
        begin: Called at the beginning of the work.

    Raises:
        Problem: If the log is damaged, or the page cannot be written.
    """
    settings, history = trained.settings, run.history()
    taps = figures.taps(settings.model(), trained.model, settings.d_model, settings.pool, settings.sample_rate)
    report = begin("drawing", 2 * len(sounds) + len(taps) + bool(history))

    def picture(figure: Figure) -> str:
        drawn = _picture(figure)
        report(1)
        return drawn

    clips = []
    for sound in sounds:
        samples, rate = sound.samples, settings.sample_rate
        clips.append(
            {
                "title": sound.title,
                "listen": sound.listen,
                "measures": sound.measures,
                "seconds": len(samples) / rate,
                "level": 20 * np.log10(np.sqrt(np.mean(samples**2)) + 1e-9),
                "audio": "data:audio/wav;base64," + base64.b64encode(sound.path.read_bytes()).decode(),
                "waveform": picture(figures.waveform(samples, rate)),
                "spectrogram": picture(figures.spectrograms({"": samples}, rate)),
            }
        )
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = templates.get_template("report.html.jinja").render(
        run=run.folder.name,
        step=trained.step,
        parameters=sum(p.numel() for p in trained.model.parameters()),
        settings=asdict(settings),
        result=result,
        loss=picture(figures.loss_curve(history, result)) if history else None,
        clips=clips,
        layers=[{"name": tap.name, "picture": picture(figures.layer_portrait(tap))} for tap in taps],
    )
    with writing(path) as part:
        part.write_text(page, "utf-8", errors="xmlcharrefreplace")
