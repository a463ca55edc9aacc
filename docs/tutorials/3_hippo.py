r"""
HiPPO: remembering a signal
===========================

After this page you know what the state of an S4 layer holds at the start of training: a sketch of the recent past,
from which the signal can be drawn again. You know what `init`, `d_state` and the step size `dt` do to it.
"""

import math

import matplotlib.pyplot as plt
import torch
from numpy.polynomial.legendre import legvander

import ssmkit
from common import piano
from ssmkit import hippo
from ssmkit.systems import dense_bilinear

audio, rate = piano(seconds=0.25, start=3)
spectrum = torch.fft.rfft(audio.double())
spectrum[75:] = 0  # only tones below 300 Hz, which can be seen in a figure
u = torch.fft.irfft(spectrum)

# %%
# A memory of fixed size
# ----------------------
#
# A stream of samples arrives. How much of its past can :math:`N` numbers hold, if each sample may be used once, when
# it arrives? HiPPO (`arXiv:2008.07669 <https://arxiv.org/abs/2008.07669>`_) gives an answer: let the :math:`N`
# numbers be the coefficients of the past in a basis of polynomials. They then follow a linear differential equation,
#
# .. math:: x'(t) = A x(t) + B u(t),
#
# and the choice of the basis gives the matrices. :func:`ssmkit.hippo.legt` (LegT) keeps a window of unit length and
# forgets all before it. :func:`ssmkit.hippo.legs` (LegS) keeps all of the past, in polynomials of :math:`e^{-s}`,
# where :math:`s` is the age: the older, the coarser. Here are the first polynomials of both.


def polynomials(measure, ages, N):
    """The first N basis functions at some ages, with shape (ages, N)."""
    z = 1 - 2 * ages if measure is hippo.legt else 2 * torch.exp(-ages) - 1
    return torch.from_numpy(legvander(z.numpy(), N - 1)) * (2 * torch.arange(N) + 1).sqrt()


figure, axes = plt.subplots(1, 2, sharey=True)
for axis, measure, longest in zip(axes, (hippo.legt, hippo.legs), (1, 5), strict=True):
    ages = torch.linspace(0, longest, 500).double()
    axis.plot(ages, polynomials(measure, ages, 5))
    axis.set(title={hippo.legt: "LegT", hippo.legs: "LegS"}[measure], xlabel="age (units of time)")
plt.show()

# %%
# Writing and reading
# -------------------
#
# One unit of time is :math:`1 / \Delta` samples. We take 400 samples, which are 50 ms here, and 64 numbers. The loop
# is the whole memory: one product with a matrix for each sample.


def write(measure, u, unit, N=64):
    """The states of the memory after each sample, with shape (length, N); `unit` is the unit of time in samples."""
    A, B = (torch.from_numpy(matrix)[None] for matrix in measure(N))
    A, B = (matrix[0] for matrix in dense_bilinear(A, B, torch.tensor([1 / unit], dtype=torch.float64)))
    x, states = torch.zeros(N).double(), []
    for sample in u:
        x = A @ x + B * sample
        states.append(x)
    return torch.stack(states)


def read(measure, x, unit, length):
    """The last `length` samples before a state, drawn again from the state alone."""
    ages = (torch.arange(length).double().flip(0) + 0.5) / unit
    return polynomials(measure, ages, len(x)) @ x


unit = 400
states = write(hippo.legt, u, unit)
milliseconds = 1000 * torch.arange(len(u)) / rate
figure, axes = plt.subplots(3, 1, sharex=True, sharey=True, figsize=(5.6, 4.8))
for axis, now in zip(axes, (600, 1200, 1900), strict=True):
    drawn = read(hippo.legt, states[now - 1], unit, unit)
    error = (drawn - u[now - unit : now]).norm() / u[now - unit : now].norm()
    axis.plot(milliseconds, u, color="silver", linewidth=2, label="signal")
    axis.plot(milliseconds[now - unit : now], drawn, color="C0", linewidth=1, label="from the state")
    axis.axvline(milliseconds[now], color="C3", linewidth=1)
    axis.set_title(f"LegT after {milliseconds[now]:.0f} ms: error {error:.1%}")
    assert error < 0.1
axes[0].set_ylim(-0.7, 0.5)
axes[0].legend(loc="lower left", fontsize=9, ncols=2)
axes[-1].set_xlabel("time (ms)")
plt.show()

# %%
# The red line is the present. Nothing but the 64 numbers was kept, and they give the last 50 ms again, up to an error
# of less than a tenth. What came before is gone.
#
# All of the past, or a window?
# -----------------------------
#
# LegS with the same step has no window. It is most exact for what has just happened, and gets coarser with age, until
# nothing is left. LegT is more exact in its window, and knows nothing of the time before.

now, past = 1900, 1600
ages = milliseconds[:past]  # the age of the present is zero
figure, axes = plt.subplots(2, 1, sharex=True, figsize=(5.6, 4.2))
axes[0].plot(ages, u[now - past : now].flip(0), color="silver", linewidth=2, label="signal")
sizes = {}
for measure, length, color in ((hippo.legs, past, "C1"), (hippo.legt, unit, "C0")):
    drawn = read(measure, write(measure, u, unit)[now - 1], unit, length)
    error = (drawn - u[now - length : now]).flip(0)
    sizes[measure] = error.unfold(0, 80, 20).square().mean(-1).sqrt() / u.square().mean().sqrt()
    axes[0].plot(ages[:length], drawn.flip(0), color=color, linewidth=1, label=measure.__name__)
    axes[1].plot(ages[40 : len(sizes[measure]) * 20 + 40 : 20], sizes[measure], color=color)
axes[0].set(title="Signal and memory", ylim=(-0.7, 0.5))
axes[0].legend(loc="lower right", fontsize=9, ncols=3)
axes[1].set(title="Error relative to the signal", xlabel="age (ms)")
plt.show()
assert sizes[hippo.legs][0] < sizes[hippo.legs][-1]

# %%
# What the step size does
# -----------------------
#
# The step size stretches time. A unit that is four times as long (`dt` divided by four) reaches four times as far
# back, and since the 64 numbers are shared out over a longer time, details get lost. More states bring most of them
# back: this is what `d_state` costs and gives.

figure, axes = plt.subplots(3, 1, sharex=True, sharey=True, figsize=(5.6, 4.8))
errors = []
for axis, (length, N) in zip(axes, ((400, 64), (1600, 64), (1600, 256)), strict=True):
    drawn = read(hippo.legt, write(hippo.legt, u, length, N)[now - 1], length, length)
    errors.append(float((drawn - u[now - length : now]).norm() / u[now - length : now].norm()))
    axis.plot(milliseconds, u, color="silver", linewidth=2)
    axis.plot(milliseconds[now - length : now], drawn, linewidth=1)
    axis.set_title(f"dt = 1/{length}, d_state = {N}: error {errors[-1]:.1%}")
axes[-1].set_xlabel("time (ms)")
plt.show()
assert errors[0] < errors[1] > errors[2]

# %%
# The same memory in a layer
# --------------------------
#
# :class:`ssmkit.S4` starts with such a memory for each feature, each with a step of its own. By default it is LegS. The
# layer keeps the state in another basis, :math:`x = 2 \Re V s`, in which the matrix is diagonal plus low rank; that
# makes it fast. We give a layer our step, let it scan the same samples, and compare its state with that of the loop.

layer = ssmkit.S4(d_model=1, d_state=64, dtype=torch.float64)
with torch.no_grad():
    layer.log_dt.fill_(-math.log(unit))
    _, state = layer.scan(u[:now, None], layer.initial_state())
A, B = hippo.legs(64)
V = torch.from_numpy(hippo.diagonalize(A, B, hippo.low_rank_correction(A, hippo.legs)).V[:, :32])
x = 2 * (V @ torch.view_as_complex(state.unflatten(-1, (-1, 2)))[0]).real
error = ssmkit.testing.relative_error(x, write(hippo.legs, u, unit)[now - 1])
print(f"difference of the two states: {error:.1e}")
assert error < 1e-9

# %%
# In training the matrices move, and the layer learns what is worth remembering. The paper of S4 (`arXiv:2111.00396
# <https://arxiv.org/abs/2111.00396>`_, Section 4.4) compares this start with a random one, which does worse. The
# features draw their steps between `dt_min` and `dt_max`: their units of time last from `1 / dt_max` to `1 / dt_min`
# samples.
#
# What to read next
# -----------------
#
# :doc:`/choosing` turns this into rules. :doc:`/mathematics` has the formulas. :mod:`ssmkit.hippo` has two more
# measures, with Laguerre functions and with sines. :doc:`/gallery/4_sashimi` builds a network that generates sound
# from such layers.
