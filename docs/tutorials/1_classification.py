r"""
S4 in your own network: classification
======================================

After this page you can put a state-space layer into a network of your own, train it to classify sequences, and run
the same network on a stream, one sample at a time.

The data are 1,797 handwritten digits of 8 × 8 pixels from scikit-learn. We make it harder than it has to be: the
network reads a digit as one sequence of 64 numbers, row by row, and never sees the picture.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import nn

import ssmkit

torch.manual_seed(0)
digits = load_digits()
pixels = torch.from_numpy(digits.data).float()[..., None] / 16  # (digits, 64, 1): batch, length, features
labels = torch.from_numpy(digits.target)
train, test = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=0)

figure, axes = plt.subplots(1, 2, width_ratios=[1, 2])
axes[0].imshow(pixels[test[0], :, 0].view(8, 8), cmap="Greys")
axes[0].set_title(f"A {labels[test[0]]}")
axes[0].axis("off")
axes[1].plot(pixels[test[0], :, 0], drawstyle="steps-mid")
axes[1].set(title="What the network reads", xlabel="sample", ylabel="grey level")
plt.show()

# %%
# The network
# -----------
#
# :class:`ssmkit.S4D` maps `(batch, length, d_model)` to the same shape, so that it fits where a convolution, an LSTM
# or attention would be. It filters each feature along time; the linear map after it mixes the features. The rest is
# what you know: norms, residual connections, a mean over time, and a linear head. :class:`ssmkit.S4` and
# :class:`ssmkit.S5` could be put in place of `S4D` without another change.
#
# One choice matters: the range of the step sizes, `dt_min` to `dt_max`. A feature with step :math:`\Delta` remembers
# about :math:`2.3 / \Delta` samples at the start of training. Our sequences have 64 samples, so we let the features
# remember between about 5 and 100.


class Classifier(nn.Module):
    def __init__(self, width=48, depth=2, classes=10):
        super().__init__()
        self.encoder = nn.Linear(1, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.layers = nn.ModuleList(ssmkit.S4D(width, d_state=32, dt_min=0.02, dt_max=0.5) for _ in range(depth))
        self.mixes = nn.ModuleList(
            nn.Sequential(nn.GELU(), nn.Linear(width, 2 * width), nn.GLU()) for _ in range(depth)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, u):
        y = self.encoder(u)
        for norm, layer, mix in zip(self.norms, self.layers, self.mixes, strict=True):
            y = y + mix(layer(norm(y)))
        return self.head(y.mean(dim=1))


model = Classifier()
print(sum(p.numel() for p in model.parameters()), "parameters")

# %%
# Training
# --------
#
# The loop is the usual one. :func:`ssmkit.param_groups` gives poles and step sizes a smaller learning rate and no
# weight decay.

epochs, batch = 12, 32
groups = ssmkit.param_groups(model, lr=1e-2, weight_decay=0.01)
optimizer = torch.optim.AdamW(groups)
steps = epochs * -(-len(train) // batch)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], total_steps=steps)
losses = []
for _ in range(epochs):
    for picked in torch.tensor(train)[torch.randperm(len(train))].split(batch):
        loss = nn.functional.cross_entropy(model(pixels[picked]), labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())

smooth = torch.tensor(losses).unfold(0, 20, 1).mean(-1)
plt.figure()
plt.semilogy(range(20, len(losses) + 1), smooth)
plt.gca().set(title="Loss, mean of 20 steps", xlabel="step", ylabel="cross-entropy (nats)")
plt.show()

# %%
# Is it good? A number needs another one beside it. Logistic regression on the same pixels is a strong baseline here:
# it sees all pixels of a digit at once, each always at the same place.

model.eval()
with torch.no_grad():
    guesses = model(pixels[test]).argmax(-1)
accuracy = (guesses == labels[test]).float().mean().item()
baseline = LogisticRegression(max_iter=1000).fit(pixels[train, :, 0], labels[train])
print(f"S4D, pixel by pixel:              {accuracy:.3f}")
print(f"logistic regression, all at once: {baseline.score(pixels[test, :, 0], labels[test]):.3f}")
assert accuracy > 0.94

# %%
# The test set is small: a difference of one percent is a few digits, and another seed can change it. But all that the
# network knows of the shape of a digit comes from the memory of its layers: without it, it could only count grey
# levels.
#
# One sample at a time
# --------------------
#
# The same layers run as a recurrence. `layer.system()` prepares a layer once, `layer.initial_state()` is its memory
# at rest, and `layer.step` takes one sample and the memory and returns one output and the next memory. The mean over
# time becomes a running mean. So the network can say what it thinks after each pixel.


@torch.no_grad()
def stream(model, u):
    """The scores of the classes after each sample of one sequence."""
    systems = [layer.system() for layer in model.layers]
    states = [layer.initial_state() for layer in model.layers]
    total, scores = 0, []
    for k, sample in enumerate(u, start=1):
        y = model.encoder(sample)
        for i, (norm, layer, mix) in enumerate(zip(model.norms, model.layers, model.mixes, strict=True)):
            filtered, states[i] = layer.step(norm(y), states[i], systems[i])
            y = y + mix(filtered)
        total = total + y
        scores.append(model.head(total / k))
    return torch.stack(scores)


scores = stream(model, pixels[test[0]])
with torch.no_grad():
    whole = model(pixels[test[:1]])[0]
print(f"largest difference from the whole sequence at once: {(scores[-1] - whole).abs().max():.1e}")
assert ssmkit.testing.relative_error(scores[-1], whole) < 1e-4

plt.figure()
image = plt.imshow(scores.softmax(-1).T, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="none")
plt.gca().set(title=f"Reading a {labels[test[0]]}", xlabel="pixels read", ylabel="class", yticks=range(10))
plt.colorbar(image, label="probability")
plt.show()

# %%
# The last column is the answer for the whole digit, the same as before up to rounding. The others were never trained:
# see how the network guesses early, and changes its mind when a row of pixels decides.
#
# What to read next
# -----------------
#
# :doc:`/gallery/2_three_modes` shows the third way to run a layer, in chunks. :doc:`/choosing` helps to choose a
# layer and its step sizes, and :doc:`/series` is a complete program that classifies series of different lengths.
