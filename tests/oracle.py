"""Kernels and outputs of state-space layers from their parameters alone, by dense matrices and loops in complex128.

Nothing of the package is called: what is read of a layer are its parameters and its options. The matrices are those of
both halves of the conjugate pairs, so that there is no factor of two and no real part to take.
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
    L, H = u.shape
    y = np.zeros((L, layer.channels, H))
    for h, (A, b, C, D) in enumerate(discrete_systems(layer, rate)):
        x = np.zeros(len(A), dtype=complex)
        for k in range(L):
            x = A @ x + b * u[k, h]
            y[k, :, h] += [(c @ x).real + d * u[k, h] for c, d in zip(C, D, strict=False)]
        x = np.zeros(len(A), dtype=complex)
        for k in reversed(range(L) if layer.bidirectional else ()):
            y[k, :, h] += [(c @ x).real for c in C[layer.channels :]]
            x = A @ x + b * u[k, h]
    return y.reshape(L, layer.channels * H)
