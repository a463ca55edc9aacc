"""Kernels and outputs of state-space layers from their parameters alone, by dense matrices and loops in complex128.

No function of the package is called: only parameters and options of a layer are read. The matrices are those of both
halves of the conjugate pairs, so that no factor of two and no real part is needed. Loops over samples take one rate for
all samples, or one per sample.
"""

import numpy as np


def _parameters(layer):
    return {name: value.detach().double().numpy() for name, value in layer.state_dict().items()}


def _pair(z):
    return z[..., 0] + 1j * z[..., 1]


def _both(z):
    return np.concatenate([z, z.conj()])


def _discretise(A, B, dt, rule):
    if rule == "bilinear":
        eye = np.eye(len(A))
        left = np.linalg.inv(eye - dt / 2 * A)
        return left @ (eye + dt / 2 * A), left @ (dt * B)
    # Zero-order hold of a diagonal matrix: B times the integral of exp(lambda t) over one step.
    poles = np.diag(A)
    assert rule == "zoh"
    assert (np.diag(poles) == A).all()
    return np.diag(np.exp(dt * poles)), np.expm1(dt * poles) / poles * B


def _rates(rate, L):
    return np.broadcast_to(rate, (L,))


def discrete_systems(layer, rate=1.0):
    """For each feature h: the matrix A, the column b, and the rows c and D of its outputs."""
    p = _parameters(layer)
    rule = getattr(layer, "discretization", "bilinear")
    rule = rule if isinstance(rule, str) else rule.__name__
    steps = rate * np.exp(p["log_dt"])
    for h in range(layer.d_model):
        s = h % layer.n_ssm
        A = np.diag(_both(-np.exp(p["log_A_real"][s]) + 1j * p["A_imag"][s]))
        if "P" in p:
            P = _both(_pair(p["P"][s]))
            A = A - P @ P.conj().T
        A, b = _discretise(A, _both(_pair(p["B"][s])), steps[h % len(steps)], rule)
        yield A, b, [_both(c) for c in _pair(p["C"][:, h])], p["D"][:, h]


def kernel(layer, L, rate=1.0):
    """The kernels (outputs, H, L), one product with the matrix after another."""
    rows = []
    for A, x, C, _ in discrete_systems(layer, rate):
        row = np.empty((len(C), L))
        for k in range(L):
            values = [c @ x for c in C]
            assert np.abs(np.imag(values)).max() <= 1e-9 * max(1.0, np.abs(values).max())
            row[:, k] = np.real(values)
            x = A @ x
        rows.append(row)
    return np.stack(rows, axis=1)


def forward(layer, u, rate=1.0):
    """The output (L, channels H) for an input (L, H): x = A x + b u, y = c x + D u, sample by sample.

    The second half of the outputs of a bidirectional layer runs backwards, over the samples after the present one.
    """
    return timed_forward(layer, u, rate)[0]


def timed_forward(layer, u, rate):
    """The output of :func:`forward`, and the last state (H, N) of what looks back, both halves of the pairs."""
    L, H = u.shape
    y = np.zeros((L, layer.channels, H))
    # Made for every rate once: with one rate for all samples, once.
    systems = {r: list(discrete_systems(layer, r)) for r in set(_rates(rate, L).tolist())}
    ends = []
    for h in range(H):
        x = np.zeros(layer.d_state, dtype=complex)
        for k, r in enumerate(_rates(rate, L)):
            A, b, C, D = systems[r][h]
            x = A @ x + b * u[k, h]
            y[k, :, h] += [(c @ x).real + d * u[k, h] for c, d in zip(C, D, strict=False)]
        ends.append(x)
        x = np.zeros(layer.d_state, dtype=complex)
        for k in reversed(range(L) if layer.bidirectional else ()):
            y[k, :, h] += [(c @ x).real for c in C[layer.channels :]]
            x = A @ x + b * u[k, h]
    return y.reshape(L, layer.channels * H), np.stack(ends)


def _s5(p, layer, rate):
    """Poles, input matrix and output rows (ways, H, N) of both halves of the pairs, and D."""
    poles = _both(np.minimum(p["A_real"], -1e-4 if layer.clip_eigs else np.inf) + 1j * p["A_imag"])
    steps = rate * np.exp(np.concatenate([p["log_dt"], p["log_dt"]]))
    B, C = _both(_pair(p["B"])), np.moveaxis(_both(np.moveaxis(_pair(p["C"]), -1, 0)), 0, -1)
    rule = layer.discretization if isinstance(layer.discretization, str) else layer.discretization.__name__
    if rule == "bilinear":
        a, gain = (1 + steps / 2 * poles) / (1 - steps / 2 * poles), steps / (1 - steps / 2 * poles)
    else:
        assert rule == "zoh"
        a, gain = np.exp(steps * poles), np.expm1(steps * poles) / poles
    return a, gain[:, None] * B, C, p["D"]


def _lru(p, layer, rate):
    assert rate == 1
    a = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    return a, np.exp(p["gamma_log"])[:, None] * _pair(p["B"]), _pair(p["C"])[None], p["D"]


def shared_forward(layer, u, rate=1.0):
    """The output (L, H) and the last state of S5 and LRU for an input (L, H), sample by sample; all in complex128.

    For a bidirectional layer, the second C reads the states of the reversed sequence.
    """
    make, p = (_s5 if type(layer).__name__ == "S5" else _lru), _parameters(layer)
    systems = [make(p, layer, r) for r in _rates(rate, len(u))]
    _, _, C, D = systems[0]
    y, last = D * u, None
    for rows, order in zip(C, (range(len(u)), reversed(range(len(u)))), strict=False):
        s = np.zeros(C.shape[-1], dtype=complex)
        for k in order:
            a, B, _, _ = systems[k]
            s = a * s + B @ u[k]
            y[k] += (rows @ s).real
        last = s if last is None else last
    return y, last


def short_conv(layer, u):
    """The output (L, H) of ShortConv for an input (L, H)."""
    p = _parameters(layer)
    w, y = p["weight"][:, 0], np.zeros_like(u)
    for k in range(len(u)):
        y[k] = p.get("bias", 0.0)
        for j in range(w.shape[1]):
            if k - j >= 0:
                y[k] += w[:, -1 - j] * u[k - j]
    return y


def selective(layer, u, rate=1.0):
    """The output (L, E) and the last state (E, N) of S6 for an input (L, E), one feature and state at a time."""
    p = _parameters(layer)
    L, E = u.shape
    N, R, G = layer.d_state, layer.dt_rank, layer.ngroups
    h, y = np.zeros((E, N)), np.zeros((L, E))
    for k in range(L):
        found = p["x_proj.weight"] @ u[k]
        rest = found[R:]
        gains = {}
        for name in "BC":
            if name in p:
                gains[name] = p[name]
            else:
                groups, rest = rest[: G * N].reshape(G, N), rest[G * N :]
                gains[name] = np.stack([groups[e * G // E] for e in range(E)])
        assert not len(rest)
        dt = _rates(rate, L)[k] * np.log1p(np.exp(p["dt_proj.weight"] @ found[:R] + p["dt_proj.bias"]))
        for e in range(E):
            for n in range(N):
                h[e, n] = np.exp(-dt[e] * np.exp(p["A_log"][e, n])) * h[e, n] + dt[e] * gains["B"][e, n] * u[k, e]
            y[k, e] = gains["C"][e] @ h[e] + p["D"][e] * u[k, e]
    return y, h


def ssd(layer, u, rate=1.0):
    """The output (L, H P) and the last state (H, P, N) of SSD for an input (L, H P + 2 G N + H)."""
    p = _parameters(layer)
    H, P, N, G = layer.nheads, layer.headdim, layer.d_state, layer.ngroups
    h, y = np.zeros((H, P, N)), np.zeros((len(u), H, P))
    for k, row in enumerate(u):
        x, B, C, r = np.split(row, np.cumsum([H * P, G * N, G * N]))
        for i in range(H):
            dt = _rates(rate, len(u))[k] * np.clip(np.log1p(np.exp(r[i] + p["dt_bias"][i])), *layer.dt_limit)
            v, b, c = x[i * P : (i + 1) * P], *(g.reshape(G, N)[i * G // H] for g in (B, C))
            h[i] = np.exp(-dt * np.exp(p["A_log"][i])) * h[i] + dt * np.outer(v, b)
            y[k, i] = h[i] @ c + (p["D"][i * P : (i + 1) * P] if layer.D_has_hdim else p["D"][i]) * v
    return y.reshape(len(u), -1), h


def mamba2(layer, u, rate=1.0):
    """The output (L, d) of a Mamba-2 block, from its parts."""
    p = _parameters(layer)

    def linear(name, v):
        return v @ p[f"{name}.module.weight"].T + p.get(f"{name}.module.bias", 0.0)

    def silu(v):
        return v / (1 + np.exp(-v))

    def norm(v):
        name = next((name for name in p if name.endswith("norm.module.weight")), None)
        if name is None:
            return v
        parts = v.reshape(len(v), core.ngroups, -1)
        return (parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-5)).reshape(v.shape) * p[name]

    ssm, core = "layers.mixer.layers.ssm.layers", layer["mixer"]["ssm"]["ssd"]
    mixed = linear(f"{ssm}.input.layers.xBC.layers.in_proj", u)
    mixed = silu(short_conv(layer["mixer"]["ssm"]["input"]["xBC"]["conv"], mixed))
    y, _ = ssd(core, np.concatenate([mixed, linear(f"{ssm}.input.layers.dt", u)], axis=1), rate)
    gate = silu(linear("layers.mixer.layers.z.layers.in_proj", u))
    before = any(name.startswith(ssm) and "norm" in name for name in p)
    return linear("layers.out_proj", norm(y) * gate if before else norm(y * gate))


def mamba(layer, u, rate=1.0):
    """The output (L, d) of a Mamba block, from its parts."""
    p = _parameters(layer)

    def linear(name, v):
        return v @ p[f"{name}.module.weight"].T + p.get(f"{name}.module.bias", 0.0)

    def silu(v):
        return v / (1 + np.exp(-v))

    x = silu(short_conv(layer["mixer"]["x"]["conv"], linear("layers.mixer.layers.x.layers.in_proj", u)))
    y, _ = selective(layer["mixer"]["x"]["ssm"], x, rate)
    return linear("layers.out_proj", y * silu(linear("layers.mixer.layers.z.layers.in_proj", u)))
