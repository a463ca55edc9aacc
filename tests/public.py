"""Mamba and Mamba-2 language models from weights under their public names, sample by sample in float64.

Written from the definitions: nothing of the package is called, and what is read are the weights and the words of the
configuration of transformers. Sizes are those of the weights.
"""

import json
from pathlib import Path

import numpy as np
import torch


def _silu(v):
    return v / (1 + np.exp(-v))


def _softplus(v):
    return np.maximum(v, 0) + np.log1p(np.exp(-np.abs(v)))


def _norm(v, weight, eps, groups=1):
    parts = v.reshape(groups, -1)
    return (parts / np.sqrt((parts**2).mean(1, keepdims=True) + eps)).reshape(-1) * weight


def _conv(w, rows):
    """The causal convolution of the last rows (oldest first, at most as many as there are taps)."""
    taps = w["conv1d.weight"][:, 0]
    y = np.array(w.get("conv1d.bias", np.zeros(len(taps))))
    for back, row in enumerate(reversed(rows[-taps.shape[1] :])):
        y = y + taps[:, -1 - back] * row
    return y


def mamba_mixer(w, u):
    """The output (L, d) of a mixer of Mamba for an input (L, d): rows of in_proj are [x, z], of x_proj [dt, B, C]."""
    E, N = w["A_log"].shape
    R = w["dt_proj.weight"].shape[1]
    A = -np.exp(w["A_log"])
    h, rows, y = np.zeros((E, N)), [], []
    for sample in u:
        xz = w["in_proj.weight"] @ sample + w.get("in_proj.bias", 0.0)
        rows.append(xz[:E])
        x = _silu(_conv(w, rows))
        dt, B, C = np.split(w["x_proj.weight"] @ x, [R, R + N])
        dt = _softplus(w["dt_proj.weight"] @ dt + w["dt_proj.bias"])
        for e in range(E):
            h[e] = np.exp(dt[e] * A[e]) * h[e] + dt[e] * B * x[e]
        out = (h @ C + w["D"] * x) * _silu(xz[E:])
        y.append(w["out_proj.weight"] @ out + w.get("out_proj.bias", 0.0))
    return np.array(y)


def mamba2_mixer(w, u, groups=1, limits=(0.0, np.inf), before=False):
    """The output (L, d) of a mixer of Mamba-2 for an input (L, d): rows of in_proj are [z, x, B, C, dt].

    `before` says that the norm comes before the gate.
    """
    H, E, mixed = len(w["A_log"]), w["out_proj.weight"].shape[1], len(w["conv1d.weight"])
    P, N = E // H, (mixed - E) // (2 * groups)
    D = w["D"].reshape(H, -1) * np.ones((H, P))
    h, rows, y = np.zeros((H, P, N)), [], []
    for sample in u:
        z, xBC, dt = np.split(w["in_proj.weight"] @ sample + w.get("in_proj.bias", 0.0), [E, E + mixed])
        rows.append(xBC)
        x, B, C = np.split(_silu(_conv(w, rows)), [E, E + groups * N])
        x, B, C = x.reshape(H, P), B.reshape(groups, N), C.reshape(groups, N)
        dt = np.clip(_softplus(dt + w["dt_bias"]), *limits)
        out = np.zeros((H, P))
        for i in range(H):
            group = i // (H // groups)
            h[i] = np.exp(-dt[i] * np.exp(w["A_log"][i])) * h[i] + dt[i] * np.outer(x[i], B[group])
            out[i] = h[i] @ C[group] + D[i] * x[i]
        out = out.reshape(E)
        if "norm.weight" not in w:
            out = out * _silu(z)
        elif before:
            out = _norm(out, w["norm.weight"], 1e-5, groups) * _silu(z)
        else:
            out = _norm(out * _silu(z), w["norm.weight"], 1e-5, groups)
        y.append(w["out_proj.weight"] @ out + w.get("out_proj.bias", 0.0))
    return np.array(y)


def logits(weights, config, tokens):
    """The logits (L, tokens) of a whole model for tokens (L), from weights under the names of either library."""
    w = {name: value.detach().double().numpy() for name, value in weights.items()}
    embedding = w.get("backbone.embeddings.weight", w.get("backbone.embedding.weight"))
    eps = config["layer_norm_epsilon"]
    u = embedding[list(tokens)]
    for i in range(config["num_hidden_layers"]):
        prefix = f"backbone.layers.{i}."
        mixer = {name[len(prefix + "mixer.") :]: v for name, v in w.items() if name.startswith(prefix + "mixer.")}
        v = np.array([_norm(sample, w[prefix + "norm.weight"], eps) for sample in u])
        if config["model_type"] == "mamba":
            u = u + mamba_mixer(mixer, v)
        else:
            u = u + mamba2_mixer(mixer, v, config["n_groups"], config.get("time_step_limit", (0.0, np.inf)))
    u = np.array([_norm(sample, w["backbone.norm_f.weight"], eps) for sample in u])
    return u @ w.get("lm_head.weight", embedding).T


def shapes(config):
    """The shapes of the weights of a model of transformers, by their names."""
    d, layers, N, K = (config[name] for name in ("hidden_size", "num_hidden_layers", "state_size", "conv_kernel"))
    E, tokens, mixer = config["expand"] * d, config["vocab_size"], {}
    if config["model_type"] == "mamba":
        R = config["time_step_rank"]
        mixer = {"in_proj.weight": (2 * E, d), "conv1d.weight": (E, 1, K), "x_proj.weight": (R + 2 * N, E)}
        mixer |= {"dt_proj.weight": (E, R), "dt_proj.bias": (E,), "A_log": (E, N), "D": (E,)}
    else:
        H, mixed = config["num_heads"], E + 2 * config["n_groups"] * N
        mixer = {"in_proj.weight": (E + mixed + H, d), "conv1d.weight": (mixed, 1, K), "dt_bias": (H,), "A_log": (H,)}
        mixer |= {"D": (H,), "norm.weight": (E,)}
    mixer["out_proj.weight"] = (d, E)
    if config["use_conv_bias"]:
        mixer["conv1d.bias"] = mixer["conv1d.weight"][:1]
    if config["use_bias"]:
        mixer |= {f"{name}.bias": mixer[f"{name}.weight"][:1] for name in ("in_proj", "out_proj")}
    found = {"backbone.embeddings.weight": (tokens, d), "backbone.norm_f.weight": (d,), "lm_head.weight": (tokens, d)}
    for i in range(layers):
        found[f"backbone.layers.{i}.norm.weight"] = (d,)
        found |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    return found


def weights(config):
    """Weights of a model in float32 from a generator with a fixed seed, not as they start: every part matters."""
    rng, found = np.random.default_rng(7), {}
    for name, shape in sorted(shapes(config).items()):
        value = 2 * rng.random(shape) - 1
        if name.endswith("A_log"):
            value = value + np.log(np.arange(1, shape[-1] + 1))
        elif name.endswith(("dt_proj.bias", "dt_bias")):
            value = 2 * value - 3
        elif "norm" in name or name.endswith(".D"):
            value = 1 + 0.3 * value
        elif "proj.weight" in name:
            value = 1.7 * value / shape[-1] ** 0.5
        elif "embeddings" in name:
            value = 0.3 * value
        found[name] = torch.tensor(value, dtype=torch.float32)
    if config["tie_word_embeddings"]:
        found["lm_head.weight"] = found["backbone.embeddings.weight"]
    return found


_SIZES = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3, "expand": 2, "layer_norm_epsilon": 1e-5}
_MAMBA = {**_SIZES, "model_type": "mamba", "state_size": 8, "conv_kernel": 4, "time_step_rank": 2}
_MAMBA2 = {**_SIZES, "model_type": "mamba2", "state_size": 8, "conv_kernel": 4, "num_heads": 6, "head_dim": 8}
_MAMBA2 |= {"chunk_size": 16}
_PLAIN = {"use_bias": False, "use_conv_bias": True, "tie_word_embeddings": True}
_OTHER = {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False}
MODELS = {
    "mamba": {**_MAMBA, **_PLAIN},
    "mamba, every option": {
        **_MAMBA, **_OTHER, "time_step_rank": 5, "conv_kernel": 3, "expand": 3, "layer_norm_epsilon": 1e-2
    },
    "mamba2": {**_MAMBA2, **_PLAIN, "n_groups": 1},
    "mamba2, every option": {
        **_MAMBA2, **_OTHER, "n_groups": 3, "conv_kernel": 3, "expand": 3, "head_dim": 12, "time_step_limit": [0.0, 0.1]
    },
}  # fmt: skip
"""Configurations as transformers reads them."""

RECORDED = Path(__file__).with_name("transformers.json")
"""What transformers computes from these weights; `python tests/public.py` writes it, if transformers is installed."""
TOKENS = 40


def prompt(config):
    """The tokens of a prompt."""
    return np.random.default_rng(8).integers(config["vocab_size"], size=50).tolist()


def theirs(config):
    """The model of transformers with these weights."""
    import transformers

    kind = {"mamba": "Mamba", "mamba2": "Mamba2"}[config["model_type"]]
    settings = {name: value for name, value in config.items() if name != "model_type"}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings, **special))
    model.load_state_dict(weights(config))
    return model.eval()


def continued(model, tokens, length):
    """The likeliest tokens after a prompt by `generate` of transformers."""
    given = torch.tensor([tokens])
    made = model.generate(given, max_new_tokens=length, do_sample=False, attention_mask=torch.ones_like(given))
    return made[0, len(tokens) :].tolist()


def record():
    """Writes what transformers computes."""
    import transformers

    found = {}
    with torch.no_grad():
        for name, config in MODELS.items():
            model, tokens = theirs(config), prompt(config)
            said = model(torch.tensor([tokens])).logits[0]
            # As transformers computes in float32, more digits than these would be its own.
            found[name] = {
                "logits": [[round(float(value), 6) for value in said[k, :6]] for k in (0, 1, 20, -1)],
                "greedy": continued(model, tokens, TOKENS),
            }
    RECORDED.write_text(json.dumps({"version": transformers.__version__, "models": found}, indent=1) + "\n")


if __name__ == "__main__":
    record()
