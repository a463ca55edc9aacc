"""
A Mamba of transformers, on a CPU
=================================

After this page you can load the weights of a Mamba model that was made with transformers, check that ssmkit gives the
same logits and the same tokens, read prompts in chunks of any length, and generate text with a compiled program.
Nothing is downloaded: the model is a small one with random weights, saved to a folder as any other. A folder that you
have downloaded is read in the same way.
"""

import json
import os
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

import matplotlib.pyplot as plt
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import ssmkit
from ssmkit import convert
from ssmkit.streaming import Engine

torch.manual_seed(0)
transformers.logging.set_verbosity_error()  # it would recommend its CUDA kernels
transformers.logging.disable_progress_bar()
print(f"transformers {transformers.__version__}")

# %%
# A folder with a model
# ---------------------

config = transformers.MambaConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=4,
    tie_word_embeddings=False,
    bos_token_id=None,  # special tokens of the default vocabulary, which has 50,280 tokens
    eos_token_id=None,
    pad_token_id=None,
)
theirs = transformers.MambaForCausalLM(config).eval()
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
theirs.save_pretrained(folder)
print(*sorted(path.name for path in folder.iterdir()), sep="\n")

# %%
# The same model in ssmkit
# ------------------------
#
# :class:`ssmkit.convert.Architecture` reads the configuration, and refuses options that ssmkit does not have. The
# network is a composition of layers, which you may change, and :func:`ssmkit.convert.from_transformers` renames the
# weights.

architecture = convert.Architecture.from_transformers(json.loads((folder / "config.json").read_text()))
d_model, vocabulary = architecture.options["d_model"], architecture.vocab_size


def block():
    mixer = architecture.layer(**architecture.options)
    return ssmkit.Residual({"norm": nn.RMSNorm(d_model, architecture.eps), "mixer": mixer})


model = ssmkit.Sequential(
    {
        "embedding": nn.Embedding(vocabulary, d_model),
        "blocks": ssmkit.Sequential(*(block() for _ in range(architecture.n_layers))),
        "norm": nn.RMSNorm(d_model, architecture.eps),
        "head": nn.Linear(d_model, vocabulary, bias=False),
    }
).eval()
weights = convert.from_transformers(load_file(folder / "model.safetensors"), architecture)
print(model.load_state_dict(weights))

# %%
# The same logits
# ---------------
#
# The prompt is a text as bytes, which are the tokens of this model.

prompt = torch.tensor([list(transformers.MambaConfig.__doc__.encode()[:200])])
with torch.no_grad():
    expected = theirs(prompt).logits
    logits = model(prompt)
print(
    f"largest difference of a logit: {(logits - expected).abs().max():.1e}, of logits up to {expected.abs().max():.1f}"
)
assert ssmkit.testing.relative_error(logits, expected) < 1e-4

# %%
# A prompt in chunks
# ------------------
#
# A long prompt does not fit into one call, and a conversation arrives in parts. In ssmkit `scan` takes the state and
# returns the next one, and chunks give what the whole gives. transformers has a cache for the same purpose.

chunks = prompt.split(50, dim=1)
with torch.no_grad():
    system, state, parts = model.system(), model.initial_state(1), []
    for chunk in chunks:
        part, state = model.scan(chunk, state, system)
        parts.append(part)
    cache, their_parts = None, []
    for chunk in chunks:
        output = theirs(chunk, cache=cache, use_cache=True)
        cache = output.cache
        their_parts.append(output.logits)
ours = torch.cat(parts, dim=1)
assert ssmkit.testing.relative_error(ours, expected) < 1e-4

figure, axes = plt.subplots()
for name, values in [("transformers", torch.cat(their_parts, dim=1)), ("ssmkit", ours)]:
    axes.semilogy((values - expected).abs().amax(-1)[0].clamp(min=1e-9), label=name)
axes.set(title="Chunks of 50 tokens", xlabel="position in the prompt (tokens)", ylabel="largest error of a logit")
axes.legend()

# %%
# An error near 1e-6 is the rounding of float32. If the line of transformers is far above it from the second chunk on,
# its Mamba starts every call with several tokens from a state of zero, as versions 5.23 and 5.24 do. It raises no
# error. Read a prompt in one call there, or token by token.
#
# The same tokens
# ---------------
#
# The state after the prompt continues in any mode. :class:`ssmkit.streaming.Engine` runs the network as one compiled
# program; at a temperature of 0 it takes the likeliest token.

tokens = 100
stream = Engine(model).start(1, state=state)
begin = time.perf_counter()
text = stream.generate(ours[:, -1], torch.rand(1, tokens), temperature=0.0).classes
seconds = time.perf_counter() - begin

begin = time.perf_counter()
with torch.no_grad():
    expected_text = theirs.generate(prompt, max_new_tokens=tokens, do_sample=False)[:, prompt.shape[1] :]
their_seconds = time.perf_counter() - begin
assert torch.equal(text, expected_text)
print(f"the same {tokens} tokens: {text[0, :12].tolist()} ...")
print(f"tokens per second: ssmkit {tokens / seconds:.0f}, transformers {tokens / their_seconds:.0f}")

# %%
# Several prompts
# ---------------
#
# Prompts of different lengths need no padding. Each is read alone, the states are joined to a batch, and the streams
# continue together:

prompts = [prompt[:, :200], prompt[:, :31], prompt[:, :120]]
with torch.no_grad():
    read = [model.scan(one, model.initial_state(1), system) for one in prompts]
state = ssmkit.states.concatenate([state for _, state in read])
last = torch.cat([logits[:, -1] for logits, _ in read])
texts = Engine(model).start(3, state=state).generate(last, torch.rand(3, tokens), temperature=0.0).classes
assert torch.equal(texts[0], text[0])

# %%
# And back
# --------
#
# A model that was trained with ssmkit is written for transformers in the same way. There and back gives the same bits:

again = convert.to_transformers(model.state_dict(), architecture)
original = load_file(folder / "model.safetensors")
assert all(torch.equal(again[name], original[name]) for name in original)
temporary.cleanup()

# %%
# What to read next
# -----------------
#
# - :doc:`/language`: Mamba-2, models of mamba-ssm, and a program that reads folders, trains and generates.
# - :doc:`/states`: several continuations of one prompt, rejected drafts, saved states.
# - :doc:`/streaming`: what a compiled program can run, and how fast.
