"""
An audio effect in real time
============================

After this page you can build a filter whose poles you set by hand, run it on a stream of audio in blocks of 64
samples, and see how much of the time of a block it takes. The effect is a steel plate, as in the reverberation units
of old studios: a plate has many modes, and each mode is a decaying oscillation, which is a pole of a state-space
layer.
"""

import math
import time

import matplotlib.pyplot as plt
import numpy as np
import soxr
import torch

import ssmkit
from common import Player, piano
from ssmkit.streaming import Engine

torch.manual_seed(0)
SAMPLE_RATE, BLOCK = 48_000, 64

# %%
# The input
# ---------
#
# Four seconds of a piano, resampled to 48 kHz, then a second of silence; the same on both channels.

PLAYED, SILENT = 4 * SAMPLE_RATE, SAMPLE_RATE
recording, rate = piano(seconds=4)
clip = torch.from_numpy(soxr.resample(recording.numpy(), rate, SAMPLE_RATE))[:PLAYED]
clip = torch.cat([0.5 * clip / clip.abs().max(), torch.zeros(SILENT)])
dry = torch.stack([clip, clip], dim=-1)  # (length, channels): audio as every layer reads it
Player(dry, SAMPLE_RATE)

# %%
# Poles by hand
# -------------
#
# :class:`ssmkit.S4D` filters each feature, here a channel, by :math:`h(t) = 2 \Re \sum_n C_n B_n e^{\lambda_n t}`,
# and adds `D` times its input. So a mode of frequency `f` that falls by 60 dB in `T` seconds is the pole
# :math:`\lambda = -\ln 1000 / T + 2 \pi i f`, and its loudness is the size of `C`. The two channels have different
# modes, which makes the sound wide. High modes decay sooner.

MODES = 400


def plate(seconds=2.0, wet=0.15):
    """A layer that adds the sound of a plate; its lowest modes fall by 60 dB in so many seconds."""
    layer = ssmkit.S4D(2, d_state=2 * MODES)
    hertz = 70.0 * 100.0 ** ((torch.arange(MODES) + torch.rand(2, MODES)) / MODES)  # from 70 Hz to 7 kHz
    falls = seconds * (hertz / 70.0) ** -0.3
    with torch.no_grad():
        layer.log_dt.fill_(-math.log(SAMPLE_RATE))  # the poles are per second, and a sample is this long
        layer.log_A_real.copy_((math.log(1000.0) / falls).log())
        layer.A_imag.copy_(2 * math.pi * hertz)
        layer.B.copy_(torch.tensor([1.0, 0.0]))
        layer.C.copy_(torch.view_as_real(torch.polar(hertz**-0.25, 2 * math.pi * torch.rand(2, MODES))))
        layer.C.mul_(wet / layer.kernel(SAMPLE_RATE).norm(dim=-1).mean())  # as loud for noise as `wet` times its input
        layer.D.fill_(1.0)
    return layer


layer = plate()
with torch.no_grad():
    wet = layer(dry)  # the whole recording, as a convolution
print(f"loudest sample: {wet.abs().max():.2f}")
Player(wet, SAMPLE_RATE)

# %%
# The frequency response of the left channel shows the modes as peaks:

response = torch.fft.rfft(layer.kernel(2 * SAMPLE_RATE)[0, 0].detach()).abs()
figure, axes = plt.subplots()
axes.semilogx(torch.arange(len(response)) / 2, 20 * response.clamp(min=1e-6).log10(), linewidth=0.6)
axes.set(
    title="The plate without the direct sound",
    xlabel="frequency (Hz)",
    ylabel="gain (dB)",
    xlim=(50, 10_000),
    ylim=(-70, 20),
)

# %%
# In blocks
# ---------
#
# An audio driver hands over a block and wants one back before the next arrives. `scan` maps a block and carries the
# state. The system is made once, before the stream begins. The blocks together are the whole:

blocks = dry.split(BLOCK)
with torch.no_grad():
    system, state, parts, spent = layer.system(), layer.initial_state(), [], {"scan": []}
    for block in blocks:
        begin = time.perf_counter()
        part, state = layer.scan(block, state, system)
        spent["scan"].append(time.perf_counter() - begin)
        parts.append(part)
assert ssmkit.testing.relative_error(torch.cat(parts), wet) < 1e-4

# %%
# Without the state every block would begin at rest, and the plate would fall silent 750 times a second, which is
# heard as a rattle:

some = slice(1500, 1512)  # blocks
with torch.no_grad():
    restarted = torch.cat([layer(block, system) for block in blocks[some]])
milliseconds = 1e3 * torch.arange(len(restarted)) / SAMPLE_RATE
figure, axes = plt.subplots()
axes.plot(milliseconds, torch.cat(parts[some])[:, 0], label="state carried")
axes.plot(milliseconds, restarted[:, 0], "--", label="from rest in each block")
axes.set(title="Twelve blocks", xlabel="time (ms)", ylabel="amplitude")
axes.legend()

# %%
# As a compiled program
# ---------------------
#
# :class:`ssmkit.streaming.Engine` compiles the network to a program that reads sample by sample. It has the same
# states, and works with networks of any causal layers.

stream, parts, spent["engine"] = Engine(layer).start(), [], []
for block in blocks:
    begin = time.perf_counter()
    part = stream.run(block)
    spent["engine"].append(time.perf_counter() - begin)
    parts.append(part)
assert ssmkit.testing.relative_error(torch.cat(parts), wet) < 1e-4

deadline = 1e3 * BLOCK / SAMPLE_RATE
print(f"time for a block in real time: {deadline:.2f} ms")
figure, axes = plt.subplots()
for name, seconds in spent.items():
    taken = 1e3 * np.sort(seconds[1:])  # the first block also computes what the system keeps
    print(
        f"{name:6s}  median {np.median(taken):.3f} ms, 99 % of the blocks within {taken[int(0.99 * len(taken))]:.3f} ms"
    )
    axes.plot(taken, 100 * np.arange(1, len(taken) + 1) / len(taken), label=name)
axes.axvline(deadline, color="tab:red", linestyle=":", label="real time")
axes.set(title="Time per block", xlabel="time (ms)", ylabel="blocks that took less (%)", xscale="log")
axes.legend()

# %%
# The times depend on the machine that built this page. Where a few blocks take much longer than the others, they
# waited for another program on the same core; audio programs ask the operating system for a higher priority.
#
# Turn a knob while it plays
# --------------------------
#
# A state depends on the sound so far and not on the weights, so the weights may change between two blocks. Here a
# hand is put on the plate after the last note: from the same state, the same modes decay ten times as fast.

with torch.no_grad():
    _, state = layer.scan(dry[:PLAYED], layer.initial_state(), system)
    ringing, _ = layer.scan(dry[PLAYED:], state, system)
    layer.log_A_real.add_(math.log(10.0))
    damped, _ = layer.scan(dry[PLAYED:], state)
assert torch.allclose(ringing, wet[PLAYED:], atol=1e-4)

figure, axes = plt.subplots()
for label, sound in [("left alone", ringing), ("damped", damped)]:
    level = 10 * sound.square().mean(-1).unflatten(0, (-1, 480)).mean(-1).clamp(min=1e-9).log10()
    axes.plot(torch.arange(len(level)) / 100, level, label=label)
axes.set(title="After the last note", xlabel="time (s)", ylabel="level (dB)", ylim=(-90, 0))
axes.legend()
Player(torch.cat([wet[:PLAYED], damped]), SAMPLE_RATE)

# %%
# What to read next
# -----------------
#
# - :doc:`/streaming`: networks as compiled programs, several streams, sampling.
# - `examples/ringing_strings.py`: piano strings in the same way, as a program that reads from a pipe.
# - :ref:`rate`: the same layer at 44.1 kHz, `layer.system(rate=48 / 44.1)`.
