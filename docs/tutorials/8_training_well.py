"""
Training well, and what goes wrong
==================================

After this page you can set the step sizes, the learning rates, the scale of the inputs and the precision of a
state-space network, and recognise a wrong setting by its loss curve. The problem is small and real: handwritten
digits of scikit-learn, read pixel by pixel. The network answers after the last of the 64 pixels, so that it has to
remember the first.
"""

import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import ssmkit

digits = load_digits()
order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
pixels = torch.tensor(digits.images).float().flatten(1)[order, :, None] / 16  # (digits, 64, 1), from 0 to 1
labels = torch.tensor(digits.target)[order]
TRAIN, TEST = slice(0, 1400), slice(1400, None)


def network(dt_min=0.02, dt_max=0.5, width=32):
    """Two residual blocks, between a linear map from one pixel and one to ten classes."""
    torch.manual_seed(0)
    layers = [ssmkit.S4D(width, d_state=16, dt_min=dt_min, dt_max=dt_max) for _ in range(2)]
    blocks = [ssmkit.Residual(nn.LayerNorm(width), layer, nn.GELU(), nn.Linear(width, width)) for layer in layers]
    return ssmkit.Sequential(nn.Linear(1, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 10))


def groups(model, lr=1e-2):
    return torch.optim.AdamW(ssmkit.param_groups(model, lr=lr, weight_decay=0.01))


def fit(model, optimizer=groups, inputs=pixels, autocast=False, steps=150):
    """Trains, prints the accuracy on the test digits, and returns the loss of every step."""
    optimizer = optimizer(model)
    random = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(TRAIN.stop, (32,), generator=random)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(inputs[chosen])[:, -1]
        loss = nn.functional.cross_entropy(logits.float(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        right = model(inputs[TEST])[:, -1].argmax(-1) == labels[TEST]
    print(f"{100 * right.double().mean():.0f} % of the test digits, loss {end(losses):.2f}")
    return losses


def end(losses):
    """The mean of the last thirty losses."""
    return sum(losses[-30:]) / 30


def compare(title, runs):
    _, axes = plt.subplots()
    for name, losses in runs.items():
        axes.plot(torch.tensor(losses).unfold(0, 10, 1).mean(-1), label=name)  # the mean of ten steps
    axes.axhline(math.log(10), color="grey", linestyle=":", label="guessing")
    axes.set(title=title, xlabel="step", ylabel="loss (nats)", ylim=(0, 3.6))
    axes.legend(loc="upper right", ncols=2, fontsize=9)
    plt.show()


# %%
# The step sizes
# --------------
#
# Here most things go wrong. At the start an S4D with step size :math:`\Delta` remembers about :math:`2.3 / \Delta`
# samples, and training moves :math:`\Delta` slowly. Our sequences have 64 samples, so the right range lets features
# remember from some five to some hundred. We compare it with a memory of at most two samples, and with one of more
# than twenty thousand:

model = network()
before = model[1][1].log_dt.detach().clone()
good = fit(model)
short = fit(network(dt_min=1.0, dt_max=10.0))
long = fit(network(dt_min=1e-5, dt_max=1e-4))
compare("Step sizes", {"memory fits": good, "too short": short, "too long": long})
assert end(good) < 0.7 * end(short) < end(long)

# %%
# A memory that is too short looks like a network that is too small: the loss falls, and stops too high. A memory that
# is much too long looks like a bug: the loss stays at guessing, because within a sequence the states of such a layer
# hardly move. Training does not repair a wrong range. This is how far it has moved the step sizes of the first layer in
# the good run:

moved = (model[1][1].log_dt.detach() - before).abs().exp()
print(f"by a factor of {moved.median():.2f} in the median, and of {moved.max():.2f} at most")

# %%
# The learning rates
# ------------------
#
# A small change of a pole changes all later outputs. So poles, step sizes and input gains have a rate of 0.001 of
# their own, and no weight decay; :func:`ssmkit.param_groups` sorts the parameters. The rest of the network then bears
# a high rate, here 0.05. With this rate for everything, training is noisy and ends higher:

separate = fit(network(), lambda model: groups(model, lr=5e-2))
same = fit(network(), lambda model: torch.optim.AdamW(model.parameters(), lr=5e-2, weight_decay=0.01))
compare("Learning rate 0.05", {"groups": separate, "one for all": same})
assert end(separate) < end(same)

# %%
# If a loss is noisy or jumps, look at its learning rates first.
#
# The scale of the inputs
# -----------------------
#
# Sensors have offsets: the same digits on a pedestal of 100. The norms inside the network cannot help, since they see
# the offset and hardly the digit. Subtract the mean of the training data and divide by their deviation, for each
# feature:

raw = 100 + pixels
normal = (raw - raw[TRAIN].mean((0, 1))) / raw[TRAIN].std((0, 1))
offset = fit(network(), inputs=raw)
scaled = fit(network(), inputs=normal)
compare("Scale of the inputs", {"normalised": scaled, "raw": offset})
assert end(scaled) < 0.7 * end(offset)

# %%
# Precision
# ---------
#
# Under autocast the linear maps compute in bfloat16 and the state-space layers in float32: the curve is that of
# float32. With weights in bfloat16 the curve may look the same, and yet a part of the network is not trained: the
# logarithm of a step size is near -2, where neighbouring bfloat16 numbers differ by 0.016 or 0.008, and an update of
# 0.001 is rounded away.

mixed = fit(network(), autocast=True)
model = network().to(torch.bfloat16)
before = model[1][1].log_dt.detach().clone()
half = fit(model, inputs=pixels.to(torch.bfloat16))
compare("Precision", {"float32": good, "autocast": mixed, "bfloat16 weights": half})
assert abs(end(mixed) - end(good)) < 0.2
stuck = (model[1][1].log_dt == before)[before < -1]
print(f"{100 * stuck.double().mean():.0f} % of the step sizes below e^-1 have not moved at all")
assert stuck.all()

# %%
# A short list
# ------------
#
# #. Normalise the inputs, and read sequences of different lengths with their lengths (:doc:`5_lengths`).
# #. Set `dt_min` and `dt_max` from the memory that the task needs, in samples.
# #. Use residual blocks with norms, such as :class:`ssmkit.S4Block`, and the groups of :func:`ssmkit.param_groups`.
# #. Train in float32 or with autocast.
#
# What to read next
# -----------------
#
# - :doc:`/choosing`: layers, initialisations, and a formula for the range of the step sizes.
# - :doc:`/numerics` and :doc:`/memory`: how exact results are, and what to do if a network does not fit.
# - :doc:`/modes`: training on sequences that are too long for one step.
