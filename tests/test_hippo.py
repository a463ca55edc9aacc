"""The HiPPO matrices are right, and not only consistent with themselves."""

from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import laguerre, legendre

from ssmkit import hippo

MEASURES = [hippo.legs, hippo.legt, hippo.lagt, hippo.fout]
REAL_PART = {hippo.legs: -0.5, hippo.legt: 0.0, hippo.lagt: 0.0, hippo.fout: 0.0}
CLIP = Path(__file__).parents[1] / "examples/data/piano/heldout/out002.flac"


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("N", [*range(2, 65, 2), 100, 128, 200, 256])
def test_diagonalisation_gives_the_matrix_back(measure, N):
    A, B = measure(N)
    system = hippo.diagonalize(A, B, hippo.low_rank_correction(A, measure))
    V, scale = system.V, np.abs(A).max()
    back = V @ (np.diag(system.Lambda) - system.P @ system.P.conj().T) @ V.conj().T
    assert np.abs(back - A).max() <= 1e-10 * scale
    assert np.abs(V @ V.conj().T - np.eye(N)).max() <= 1e-10
    assert np.abs(V @ system.B - B).max() <= 1e-10 * np.abs(B).max()
    assert np.abs(system.Lambda.real - REAL_PART[measure]).max() <= 1e-10
    assert A.dtype == B.dtype == np.float64


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("N", [2, 8, 64, 256])
def test_poles_come_in_conjugate_pairs(measure, N):
    A, B = measure(N)
    Lambda, P, B, V = hippo.diagonalize(A, B, hippo.low_rank_correction(A, measure))
    for whole, axis in ((Lambda, 0), (P, 0), (B, 0), (V, 1)):
        half, rest = np.split(whole, 2, axis=axis)
        assert np.abs(rest - half.conj()).max() <= 1e-9 * max(1, np.abs(whole).max())
    assert (Lambda.imag[: N // 2] >= 0).all()


@pytest.mark.parametrize("measure", MEASURES)
def test_half_of_the_pairs_is_the_whole_system(measure):
    """2 Re of a half reproduces the real impulse response (FouT's double pole at zero included)."""
    N = 16
    A, B = measure(N)
    C = np.random.default_rng(0).standard_normal(N)
    Lambda, P, B2, V = hippo.diagonalize(A, B, hippo.low_rank_correction(A, measure))
    h = N // 2
    for s in (0.3 + 2j, 5.0, 1e-3 + 40j):
        whole = C @ np.linalg.solve(s * np.eye(N) - A, B)
        # Feedback through P runs over both halves, so a half is not a system of its own: close the loop by hand.
        resolvent = [1 / (s - Lambda), 1 / (s - Lambda.conj())]
        inner = sum(p.conj().T @ (r[:h, None] * p) for p, r in ((P[:h], resolvent[0]), (P[:h].conj(), resolvent[1])))
        drive = sum(
            p.conj().T @ (r[:h] * b)
            for p, r, b in ((P[:h], resolvent[0], B2[:h]), (P[:h].conj(), resolvent[1], B2[:h].conj()))
        )
        back = np.linalg.solve(np.eye(P.shape[1]) + inner, drive)
        out = sum(
            (C @ v[:, :h] * r[:h]) @ (b - p @ back)
            for v, r, b, p in (
                (V, resolvent[0], B2[:h], P[:h]),
                (V.conj(), resolvent[1], B2[:h].conj(), P[:h].conj()),
            )
        )
        assert abs(out - whole) <= 1e-9 * abs(whole)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("N", [4, 30])
def test_derived_correction_is_the_written_one(measure, N):
    A, _ = measure(N)
    written, derived = hippo.low_rank_correction(A, measure), hippo.low_rank_correction(A)
    assert np.allclose(derived @ derived.T, written @ written.T, atol=1e-9 * np.abs(A).max())
    assert derived.shape == written.shape


@settings(max_examples=20)
@given(N=st.integers(1, 10).map(lambda n: 2 * n), rank=st.integers(0, 3), seed=st.integers(0, 99))
def test_any_normal_plus_low_rank_matrix_is_diagonalised(N, rank, seed):
    rng = np.random.default_rng(seed)
    S, p = rng.standard_normal((N, N)), rng.standard_normal((N, min(rank, N - 1)))
    A = S - S.T - 0.7 * np.eye(N) - p @ p.T
    system = hippo.diagonalize(A, rng.standard_normal(N), hippo.low_rank_correction(A))
    back = system.V @ (np.diag(system.Lambda) - system.P @ system.P.conj().T) @ system.V.conj().T
    assert np.abs(back - A).max() < 1e-8


def _bilinear(A, dt):
    eye = np.eye(len(A))
    return np.linalg.solve(eye - dt / 2 * A, eye + dt / 2 * A), np.linalg.inv(eye - dt / 2 * A)


def test_legs_memory_reconstructs_a_real_signal():
    """x' = (A x + B u) / t holds the Legendre coefficients of all of the past: the error falls with N."""
    signal, _ = sf.read(CLIP, start=160_000, stop=160_000 + 1500)
    # A tenth of a second of a chord; a short average leaves what 128 polynomials can follow.
    signal = np.convolve(signal, np.hanning(100) / np.hanning(100).sum(), mode="same")
    T = len(signal)
    errors = []
    for N in (16, 32, 64, 128):
        A, B = hippo.legs(N)
        x = np.zeros(N)
        x[0] = signal[0]
        eye = np.eye(N)
        for k in range(1, T):
            u = (signal[k - 1] + signal[k]) / 2
            # Bilinear in time, with 1/t taken at both ends of the step.
            right = x + A @ x / (2 * k) + B * u * (1 / (2 * k) + 1 / (2 * k + 2))
            x = np.linalg.solve(eye - A / (2 * (k + 1)), right)
        basis = legendre.legvander(2 * (np.arange(T) + 0.5) / T - 1, N - 1) * np.sqrt(2 * np.arange(N) + 1)
        errors.append(np.sqrt(np.mean((basis @ x - signal) ** 2) / np.mean(signal**2)))
    assert all(more > 1.5 * less for more, less in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < 0.05, errors


@pytest.mark.parametrize(
    ("measure", "bounds"), [(hippo.legt, {8: 0.17, 16: 2e-5}), (hippo.fout, {8: 7e-3, 64: 1.2e-3})]
)
def test_windows_hold_the_coefficients_of_the_last_unit_of_time(measure, bounds):
    """The state of LegT and FouT is the projection of the window on the basis that the docstring names."""
    steps = 2000
    t = np.arange(3 * steps) / steps
    u = np.sin(2 * np.pi * t) + 0.5 * np.cos(2 * np.pi * 2 * t + 1)
    errors = []
    for N in bounds:
        A, B = measure(N)
        transition, solve = _bilinear(A, 1 / steps)
        x = np.zeros(N)
        for value in u:
            x = transition @ x + solve @ B * value / steps
        age = (np.arange(steps) + 0.5) / steps
        if measure is hippo.legt:
            basis = legendre.legvander(1 - 2 * age, N - 1) * np.sqrt(2 * np.arange(N) + 1)
        else:
            n = np.arange(1, N // 2)
            waves = np.stack([np.cos(2 * np.pi * np.outer(age, n)), np.sin(2 * np.pi * np.outer(age, n))], -1)
            basis = np.concatenate(
                [np.ones((steps, 1)), np.zeros((steps, 1)), np.sqrt(2) * waves.reshape(steps, -1)], axis=1
            )
        expected = basis.T @ u[::-1][:steps] / steps
        errors.append(np.abs(x - expected).max())
    assert all(error < bound for error, bound in zip(errors, bounds.values(), strict=True)), errors
    # LegT's error falls faster than any power of N. FouT's window is periodic: its coefficients are good for signals
    # with whole periods, and their error falls slowly.
    assert errors[0] > (1000 if measure is hippo.legt else 3) * errors[1], errors


def test_lagt_holds_laguerre_coefficients():
    N, steps = 12, 400
    t = np.arange(40 * steps) / steps
    u = np.exp(-((t - 37) ** 2))
    A, B = hippo.lagt(N)
    transition, solve = _bilinear(A, 1 / steps)
    x = np.zeros(N)
    for value in u:
        x = transition @ x + solve @ B * value / steps
    age = t + 0.5 / steps
    basis = laguerre.lagvander(age, N - 1) * np.exp(-age / 2)[:, None]
    assert np.abs(x - basis.T @ u[::-1] / steps).max() < 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hippo.legs(0), "legs: `N` must be at least 1, got 0"),
        (lambda: hippo.fout(7), "fout: `N` must be a positive even integer"),
        (lambda: hippo.diagonalize(np.eye(3), np.ones(3), np.ones((3, 1))), "`N` must be a positive even integer"),
        (lambda: hippo.diagonalize(np.ones((2, 2)), np.ones(2), np.ones((2, 1))), "plus a skew-symmetric matrix"),
        (lambda: hippo.diagonalize(np.eye(2), np.ones(3), np.ones((2, 1))), r"`B` must have shape \(2,\)"),
        (lambda: hippo.low_rank_correction(np.ones((2, 3))), "must be a square matrix"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
