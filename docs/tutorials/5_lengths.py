"""
Sequences of different lengths
==============================

After this page you can train on sequences of different lengths, classify them in batches of any composition, and pack
them without padding. The data are real: twelve features of speech for each of 640 utterances of a Japanese vowel, by
nine speakers. The task is to tell who speaks. An utterance has between 7 and 29 samples.
"""

import matplotlib.pyplot as plt
import torch
from sktime.datasets import load_japanese_vowels
from torch import nn

import ssmkit
from ssmkit import sequences

torch.manual_seed(0)


def load(split):
    """Utterances with shapes (length, 12), and the numbers of their speakers."""
    table, speakers = load_japanese_vowels(split=split, return_X_y=True, return_type="nested_univ")
    rows = [torch.stack([torch.tensor(channel.to_numpy()) for channel in row], -1).float() for row in table.to_numpy()]
    return rows, torch.tensor([int(speaker) - 1 for speaker in speakers])


train, speakers = load("train")
test, test_speakers = load("test")
print(f"{len(train)} utterances to train on, {len(test)} to test")

# %%
# Most batches would hold short and long utterances together:

lengths = torch.tensor([len(x) for x in train + test])
figure, axes = plt.subplots()
axes.hist(lengths, bins=range(5, 31))
axes.set(title="How long the utterances are", xlabel="length (samples)", ylabel="utterances")

# %%
# A classifier
# ------------
#
# The network is an encoder, the mean of its outputs over time, and a linear map. :func:`~ssmkit.sequences.pad` makes a
# batch and its lengths, :func:`~ssmkit.sequences.forward_padded` runs the encoder, and :func:`~ssmkit.sequences.pool`
# computes the mean of each row without its padding. Only these three know of lengths; the layers do not.


class Classifier(nn.Module):
    """Logits for a list of utterances; `careless` forgets their lengths."""

    def __init__(self, careless=False, d_model=32):
        super().__init__()
        blocks = [ssmkit.S4Block(d_model, ssmkit.S4D(d_model, d_state=16, dt_min=0.01, dt_max=1.0)) for _ in range(2)]
        self.encoder = ssmkit.Sequential(nn.Linear(12, d_model), *blocks, nn.LayerNorm(d_model))
        self.head = nn.Linear(d_model, 9)
        self.careless = careless

    def forward(self, utterances, longest=0):
        u, lengths = sequences.pad(utterances)
        u = nn.functional.pad(u, (0, 0, 0, max(0, longest - u.shape[1])))  # more padding, as from a longer neighbour
        if self.careless:
            return self.head(self.encoder(u).mean(dim=1))
        y = sequences.forward_padded(self.encoder, u, lengths)
        return self.head(sequences.pool(y, lengths, "mean"))


def fit(model, steps=150):
    optimizer = torch.optim.AdamW(ssmkit.param_groups(model, lr=5e-3, weight_decay=0.05))
    for _ in range(steps):
        chosen = torch.randint(len(train), (32,))
        loss = nn.functional.cross_entropy(model([train[i] for i in chosen]), speakers[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, longest=0):
    batches = [test] if longest else [[x] for x in test]  # without padding, every utterance runs alone
    classes = torch.cat([model(batch, longest).argmax(-1) for batch in batches])
    return (classes == test_speakers).double().mean().item()


careful, careless = fit(Classifier()), fit(Classifier(careless=True))

# %%
# What goes wrong without lengths
# -------------------------------
#
# The second model takes the mean over the padding too. In training nothing looks wrong: its loss falls as well. But
# its answer for an utterance depends on how far the batch is padded, that is, on the other utterances in it. Here
# every test utterance is padded to different lengths:

padded_to = [0, 30, 60, 120, 240]
figure, axes = plt.subplots()
for name, model, marker in [("with lengths", careful, "o-"), ("without", careless, "s--")]:
    reached = [100 * accuracy(model, longest) for longest in padded_to]
    print(f"{name:12s}", "  ".join(f"{x:.1f} %" for x in reached))
    axes.plot(padded_to, reached, marker, label=name)
axes.set(title="Test accuracy", xlabel="padded to (samples); 0: no padding", ylabel="right (%)", ylim=(0, 103))
axes.legend()

# %%
# With lengths the answer is the same whatever else is in the batch: not only the class, but every bit of the outputs
# of the encoder. Padding may even hold NaN, and it has no gradient.

with torch.no_grad():
    u, lengths = sequences.pad(test[:50])
    y = sequences.forward_padded(careful.encoder, u, lengths)
    padding = torch.arange(u.shape[1]) >= lengths[:, None]
    spoilt = u.masked_fill(padding[..., None], float("nan"))
    assert torch.equal(sequences.forward_padded(careful.encoder, spoilt, lengths), y)
    alone = careful.encoder(test[7])
    assert torch.allclose(y[7, : len(test[7])], alone, atol=1e-5)

# %%
# Packed rows
# -----------
#
# If lengths differ much, most of a padded batch is padding. A packed row holds the utterances one after another, with
# their boundaries, and the outputs are the same. No utterance sees the one before it:

row, boundaries = sequences.pack(test)
padded, _ = sequences.pad(test)
print(f"packed: {len(row)} samples; padded: {padded.shape[0] * padded.shape[1]} samples")
with torch.no_grad():
    packed = sequences.unpack(sequences.forward_packed(careful.encoder, row, boundaries), boundaries)
    assert torch.allclose(packed[7], alone, atol=1e-5)
    joined = careful.encoder(row)[boundaries[7] : boundaries[8]]  # as one long sequence, without boundaries
print(f"error without boundaries: {ssmkit.testing.relative_error(joined, alone):.2f}")

# %%
# While it is spoken
# ------------------
#
# Utterances of different lengths can also be read as streams: :func:`~ssmkit.sequences.scan_padded` returns the state
# of each at its own last sample, and `step` continues all of them together.

with torch.no_grad():
    begun, lengths = sequences.pad([x[:-1] for x in test[:50]])
    system = careful.encoder.system()
    _, state = sequences.scan_padded(careful.encoder, begun, careful.encoder.initial_state(50), lengths, system=system)
    last, _ = careful.encoder.step(torch.stack([x[-1] for x in test[:50]]), state, system)
    assert torch.allclose(last[7], alone[-1], atol=1e-4)

# %%
# What to read next
# -----------------
#
# - :doc:`/sequences`: padding on the left, layers that look ahead, restarts of single streams, and what it all costs.
# - :doc:`/series`: a complete program on this data set and others, beside two baselines.
# - :doc:`/choosing`: why `dt_min` and `dt_max` are larger here than by default.
