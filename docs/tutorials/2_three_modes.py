r"""
One model, three ways: convolution, recurrence, chunks
======================================================

After this page you can run the same network over a whole recording, over a stream in blocks of any length, and one
sample at a time, and you know how far the results differ: by rounding, and by nothing else.
"""

import time

import matplotlib.pyplot as plt
import torch
from torch import nn

import ssmkit
from common import Player, piano

torch.manual_seed(0)
audio, rate = piano(seconds=4, start=2)
u = audio[:, None]  # (length, features); a batch axis in front is possible, too
print(f"{len(u):,} samples at {rate:,} Hz")
Player(audio, rate)

# %%
# The network has two S4 blocks (norm, S4, activation and linear map, then a feed-forward network). Its weights are
# random: this page is about numbers, and a trained network would do the same.

torch.set_grad_enabled(False)
model = ssmkit.Sequential(nn.Linear(1, 16), ssmkit.S4Block(16), ssmkit.S4Block(16), nn.Linear(16, 1)).eval()

# %%
# The three ways
# --------------
#
# **A whole sequence**, as in training. Each layer computes the response of its filter to an impulse, its kernel, and
# convolves the sequence with it by FFT:


def whole(model, u):
    return model(u)


# %%
# **One sample at a time**, as in generation and in control. `step` takes a sample and the state, which is all that
# the network knows of the past, and returns the output and the next state. `system` holds what depends on the weights
# alone, so a loop makes it once.


def steps(model, u):
    system, state, outputs = model.system(), model.initial_state(), []
    for sample in u:
        y, state = model.step(sample, state, system)
        outputs.append(y)
    return torch.stack(outputs)


# %%
# **Chunks of any length**, as for a stream that arrives in blocks, or for a long prompt before generation. `scan`
# takes a chunk and the state after the last one.


def chunks(model, u, lengths):
    system, state, outputs = model.system(), model.initial_state(), []
    for chunk in u.split(lengths):
        y, state = model.scan(chunk, state, system)
        outputs.append(y)
    return torch.cat(outputs)


def measured(run, model, u, *arguments):
    start = time.perf_counter()
    y = run(model, u, *arguments)
    seconds = time.perf_counter() - start
    print(f"{run.__name__:7}{len(u) / rate / seconds:8.1f} times as fast as the music")
    return y


second = u[:rate]  # the steps are the slowest way: one second is enough for them
y_whole = measured(whole, model, u)
y_chunks = measured(chunks, model, u, 512)
y_steps = measured(steps, model, second)

# %%
# How exact are they?
# -------------------
#
# In float64 the same model gives a reference. The figure shows the error of each way in float32, relative to the
# largest output, and beside them a common mistake: to call the model on each chunk as if it were a sequence of its
# own. There the state is lost, and the output is wrong after every cut.

reference = whole(model.double(), u.double())
model.float()
restarted = torch.cat([model(chunk) for chunk in u.split(512)])

curves = {"chunks without a state": restarted, "whole": y_whole, "chunks": y_chunks, "steps": y_steps}
plt.figure()
for name, y in curves.items():
    error = (y.double() - reference[: len(y)]).abs()[:rate, 0] / reference.abs().max()
    largest = error.unfold(0, 40, 40).amax(-1)  # in every 5 ms
    plt.semilogy(torch.arange(len(largest)) * 40 / rate, largest, label=name)
plt.gca().set(title="Error in float32", xlabel="time (s)", ylabel="relative error", ylim=(1e-9, 10))
plt.legend(ncols=2, loc="upper center")
plt.show()

relative_error = ssmkit.testing.relative_error
for name, y in curves.items():
    print(f"{name:23}{relative_error(y.double(), reference[: len(y)]):10.1e}")
assert all(relative_error(y.double(), reference[: len(y)]) < 1e-4 for y in (y_whole, y_chunks, y_steps))
assert relative_error(restarted.double(), reference) > 1e-2

# %%
# The three ways differ as much from each other as each differs from the reference: by the rounding of float32. In
# float64 all of them agree to many more digits. It does not matter where a sequence is cut, either:

model.double()
second = second.double()
expected = whole(model, second)
for lengths in (1000, 64, 7, [1, 0, 5000, 2, rate - 5003]):
    error = relative_error(chunks(model, second, lengths), expected)
    print(f"chunks of {lengths}: {error:.1e}")
    assert error < 1e-10

# %%
# One state for all
# -----------------
#
# Since the ways agree, they can be mixed: read a prompt by `scan`, continue by `step`. The state is a plain value
# that you hold. You can keep it, copy it, and continue from it as often as you like; the model does not remember
# anything.

system = model.system()
start = model.initial_state()
_, middle = model.scan(second[:5000], start, system)
by_step, _ = model.step(second[5000], middle, system)
by_scan, _ = model.scan(second[5000:5100], middle, system)  # from the same state
torch.set_grad_enabled(True)
assert relative_error(by_step, expected[5000]) < 1e-10
assert relative_error(by_scan, expected[5000:5100]) < 1e-10

# %%
# What to read next
# -----------------
#
# :doc:`/modes` has recipes for each way, and a table of what works where. :doc:`/streaming` runs a network as a
# compiled program, which is much faster than steps in Python. :doc:`/gallery/3_hippo` shows what the state of a layer
# remembers.
