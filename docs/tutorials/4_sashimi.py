r"""
SaShiMi from parts: a network that generates sound
==================================================

After this page you can build a network with several rates from layers, train it on raw audio, and generate sound with
it, sample by sample. SaShiMi (`arXiv:2202.09729 <https://arxiv.org/abs/2202.09729>`_) is such a network. Ours is
small and trains for seconds, so do not expect music.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from common import Player, piano
from ssmkit import S4D, MultiRate, Residual, S4Block, Sequential, param_groups
from ssmkit.testing import assert_modes_agree

# %%
# Audio as classes
# ----------------
#
# The network predicts the next sample as one of 256 classes. The mu-law makes them finer near silence, where the ear
# is more exact. We train on a minute of piano, and test on another recording.


def encode(x):
    return ((x.sign() * torch.log1p(255 * x.abs()) / math.log(256) + 1) * 127.5).round().long()


def decode(classes):
    x = classes / 127.5 - 1
    return x.sign() * torch.expm1(x.abs() * math.log(256)) / 255


audio, rate = piano(seconds=60, name="train/take01-minute1.flac")
heard, unheard = encode(audio), encode(piano(seconds=10, start=2)[0])
print(f"{len(heard):,} samples at {rate:,} Hz")
Player(audio[: 8 * rate], rate)

# %%
# The network
# -----------
#
# Sound has structure at many scales: a period of a tone lasts some dozens of samples, a note thousands. SaShiMi
# therefore runs most of its layers at lower rates. A tier does three things:
#
# - :class:`ssmkit.MultiRate` joins `pool` samples to a wider frame, runs the tier below on the frames, and spreads its
#   outputs over samples again, one frame later, so that nothing looks into the future;
# - :class:`ssmkit.Residual` adds the input of all this to its output;
# - :class:`ssmkit.S4Block` then works at the rate of this tier.
#
# :class:`ssmkit.Sequential` puts them in order. All of these have a state and a `step`, and so has the network. The
# classes are ordered, which the network would have to learn first. So similar classes start with similar vectors:
# cosines of the class with random frequencies and phases.


def tier(width, pools):
    block = S4Block(width, S4D)
    if not pools:
        return Residual(block)
    lower = MultiRate(width, tier(2 * width, pools[1:]), pool=pools[0])
    return Sequential(Residual(lower), block)


torch.manual_seed(0)
angles = 8 * math.pi * torch.rand(32) * torch.linspace(-1, 1, 256)[:, None] + 2 * math.pi * torch.rand(32)
embedding = nn.Embedding.from_pretrained(math.sqrt(2) * torch.cos(angles), freeze=False)
model = Sequential(embedding, tier(32, pools=(4, 4)), nn.LayerNorm(32), nn.Linear(32, 256))
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

# %%
# Training
# --------
#
# The output at a sample is a score for each class of the next sample. The loss is the cross-entropy in bits: how many
# bits a sample would cost in a compressed file.


def bits(model, classes):
    scores = model(classes[..., :-1])
    return nn.functional.cross_entropy(scores.flatten(0, -2), classes[..., 1:].flatten()) / math.log(2)


steps, batch, length = 120, 4, 1024
optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], steps)
losses = []
for _ in range(steps):
    starts = torch.randint(len(heard) - length, (batch,))
    loss = bits(model, torch.stack([heard[start : start + length] for start in starts]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    losses.append(loss.item())

# %%
# Bits mean little alone. So we also count how many bits a sample costs if only the frequencies of classes are known, or
# only those of pairs of neighbours. The network needs fewer: it looks further back than one sample.

model.eval()
torch.set_grad_enabled(False)
pairs = torch.zeros(256, 256).index_put((heard[:-1], heard[1:]), torch.ones(len(heard) - 1), accumulate=True) + 0.01
results = {
    "frequencies of classes": -(pairs.sum(0) / pairs.sum()).log2()[unheard[1:]].mean().item(),
    "frequencies of pairs": -(pairs / pairs.sum(1, keepdim=True)).log2()[unheard[:-1], unheard[1:]].mean().item(),
    "the network": bits(model, unheard).item(),
}
plt.figure()
plt.plot(losses, color="silver")
for color, (name, value) in zip(("C1", "C2", "C0"), results.items(), strict=True):
    print(f"{name:23}{value:.2f} bits per sample")
    plt.axhline(value, color=color, linestyle="--", label=f"{name}, other recording")
plt.gca().set(title="Training", xlabel="step", ylabel="bits per sample", ylim=(4.5, 10))
plt.legend(loc="upper right", fontsize=9)
plt.show()
assert results["the network"] < results["frequencies of pairs"]

# %%
# Generation
# ----------
#
# Training read whole excerpts in parallel. For generation the same network runs as a recurrence: `scan` reads one
# second of the other recording, and `step` continues it. Each new sample is drawn from the predicted distribution and
# becomes the next input. The states of all tiers travel in one value. A batch gives two continuations at once.

prompt = unheard[rate : 2 * rate].expand(2, -1)
system = model.system()
scores, state = model.scan(prompt, model.initial_state(2), system)
scores, drawn = scores[:, -1], []
for _ in range(rate // 2):
    sample = torch.distributions.Categorical(logits=scores / 0.9).sample()
    scores, state = model.step(sample, state, system)
    drawn.append(sample)
clips = decode(torch.cat([prompt, torch.stack(drawn, dim=1)], dim=1))
assert_modes_agree(model, prompt[:, :200])
torch.set_grad_enabled(True)

figure, axes = plt.subplots(2, 1, sharex=True, figsize=(5.6, 4.2))
axes[0].plot(torch.arange(len(clips[0])) / rate, clips[0], linewidth=0.5)
axes[0].set(title="One second of the recording, then the network", ylabel="sample")
axes[1].specgram(clips[0].numpy(), NFFT=512, Fs=rate, noverlap=384, vmin=-120, cmap="Greys")
axes[1].set(xlabel="time (s)", ylabel="frequency (Hz)", ylim=(0, 2000))
plt.show()

# %%
# The first continuation:

Player(clips[0], rate)

# %%
# And the second:

Player(clips[1], rate)

# %%
# What to expect
# --------------
#
# The first second is the recording, with the partials of its tones as horizontal lines. What follows has most of its
# energy at low frequencies, as the recording has, but no lines: it is noise with clicks, no tones that last and fade.
# The loss does not show this: it counts one sample at a time, and a tone is a matter of thousands. The same parts do
# better with more width and time. :doc:`/sashimi` has clips of a network that trained for about six core-hours,
# and a program that trains, measures and generates.
#
# What to read next
# -----------------
#
# :doc:`/rates` explains the pooling. :doc:`/streaming` generates much faster than a loop in Python.
