"""The HiPPO matrices are correct, not only consistent with each other."""

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
CLIP = Path(__file__).parents[1] / "examples/data/piano/heldout/take20-minute1.flac"


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
    """2 Re of one half gives the real impulse response, also with FouT's double pole at zero."""
    N = 16
    A, B = measure(N)
    C = np.random.default_rng(0).standard_normal(N)
    Lambda, P, B2, V = hippo.diagonalize(A, B, hippo.low_rank_correction(A, measure))
    h = N // 2
    for s in (0.3 + 2j, 5.0, 1e-3 + 40j):
        whole = C @ np.linalg.solve(s * np.eye(N) - A, B)
        # Feedback through P is a sum over both halves, so one half is not a system: form the closed loop here.
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
def test_the_derived_correction_is_the_one_in_closed_form(measure, N):
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


def _basis(measure, N):
    """Nodes and weights of a quadrature over the ages of a measure, its basis functions and their slopes there.

    With LegS, ages are fractions of the whole past. The basis at age 0, and at the end of a window, comes last.
    """
    if measure in (hippo.legs, hippo.legt):
        x, weight = legendre.leggauss(N + 2)
        age, weight, root = (1 - x) / 2, weight / 2, np.sqrt(2 * np.arange(N) + 1)

        def values(s):
            return legendre.legvander(1 - 2 * np.asarray(s), N - 1) * root

        slopes = np.stack([legendre.legval(x, legendre.legder(np.eye(N)[n])) for n in range(N)], 1) * -2 * root
        return age, weight, values(age), slopes, values([0.0])[0], values([1.0])[0]
    if measure is hippo.lagt:
        # The quadrature has the weight exp(-s), which contains the factors exp(-s/2) of both functions of a product.
        age, weight = laguerre.laggauss(N + 2)
        values = laguerre.lagvander(age, N - 1)
        slopes = np.stack([laguerre.lagval(age, laguerre.lagder(np.eye(N)[n])) for n in range(N)], 1) - values / 2
        return age, weight, values, slopes, np.ones(N), np.zeros(N)
    age = np.arange(4 * N) / (4 * N)
    n = 2 * np.pi * np.arange(N // 2)
    angle = np.outer(age, n)
    scale = np.where(n > 0, np.sqrt(2.0), 1.0)
    values = np.stack([scale * np.cos(angle), scale * np.sin(angle)], -1).reshape(-1, N)
    slopes = np.stack([-n * scale * np.sin(angle), n * scale * np.cos(angle)], -1).reshape(-1, N)
    return age, np.full(4 * N, 1 / (4 * N)), values, slopes, values[0], values[0]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("N", [2, 6, 12])
def test_measures_follow_from_their_bases(measure, N):
    """Differentiating the coefficients x_n(t) = ∫ g_n(s) u(t - s) ds gives A and B, by quadrature of the basis g.

    By parts x' = g(0) u(t) - g(end) u(t - end) + ∫ g'(s) u(t - s) ds, with g' = D g. LegT takes the value that leaves
    its window from the coefficients, Σ_k x_k g_k(end). FouT has a periodic basis: its coefficients give the mean of
    u(t) and u(t - end). LagT fades and has no end. The window of LegS grows, so that
    t x' = g(0) u + ∫ ((1 - s) g(s))' u ds.
    """
    age, weight, values, slopes, first, last = _basis(measure, N)
    gram = (weight[:, None] * values).T @ values
    filled = np.eye(N)
    if measure is hippo.fout:
        filled[1, 1] = 0  # the sine of frequency zero
    assert np.allclose(gram, filled, atol=1e-10)
    if measure is hippo.legs:
        slopes = (1 - age)[:, None] * slopes - values
    D = (weight[:, None] * slopes).T @ values
    A, B = measure(N)
    expected_A, expected_B = D, first
    if measure is hippo.legt:
        expected_A = D - np.outer(last, last)
    if measure is hippo.fout:
        # u(t) and u(t - 1) are the values on both sides of a jump; the coefficients give their mean:
        # u(t - 1) = 2 g(0)·x - u(t).
        expected_A, expected_B = D - 2 * np.outer(first, last), 2 * first
    assert np.abs(A - expected_A).max() <= 1e-9 * np.abs(A).max()
    assert np.abs(B - expected_B).max() <= 1e-12


def _bilinear(A, dt):
    eye = np.eye(len(A))
    return np.linalg.solve(eye - dt / 2 * A, eye + dt / 2 * A), np.linalg.inv(eye - dt / 2 * A)


def test_legs_memory_reconstructs_a_real_signal():
    """x' = (A x + B u) / t holds the Legendre coefficients of the whole past: the error falls with N."""
    signal, _ = sf.read(CLIP, start=180_000, stop=180_000 + 750)
    # A tenth of a second of a chord; a short average removes what 128 polynomials cannot represent.
    signal = np.convolve(signal, np.hanning(50) / np.hanning(50).sum(), mode="same")
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


def _skew(N, seed=0):
    S = np.random.default_rng(seed).standard_normal((N, N))
    return S - S.T


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("measure", MEASURES)
def test_the_derived_rank_does_not_depend_on_the_unit_of_time(measure, scale):
    """Rounding errors of large matrices do not count as rank, and small matrices keep their rank."""
    A, _ = measure(32)
    P = hippo.low_rank_correction(scale * A)
    assert P.shape == hippo.low_rank_correction(A, measure).shape
    expected = scale * hippo.low_rank_correction(A) @ hippo.low_rank_correction(A).T
    assert np.abs(P @ P.T - expected).max() < 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize(("size", "rank"), [(0.0, 0), (1e-12, 0), (1e-8, 1), (1e-4, 1)])
def test_the_rank_counts_what_is_larger_than_rounding(size, rank):
    """A low-rank term that is small compared with the matrix counts; rounding errors do not."""
    p = np.random.default_rng(1).standard_normal(8)
    A = _skew(8) - 0.5 * np.eye(8) - size * np.outer(p, p) / (p @ p)
    P = hippo.low_rank_correction(A)
    assert P.shape == (8, rank)
    assert np.abs(P @ P.T + A - _skew(8) + 0.5 * np.eye(8)).max() < 1e-11


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e5])
@pytest.mark.parametrize(("error", "accepted"), [(1e-10, True), (1e-9, True), (1e-7, False), (1e-5, False)])
def test_matrices_are_normal_to_a_hundred_millionth(scale, error, accepted):
    """Relative to their largest number, or to 1: rounding errors are accepted, larger ones are not."""
    A = scale * (_skew(8) / np.abs(_skew(8)).max() - 0.5 * np.eye(8))
    A[3, 3] += error * max(1.0, scale)
    none = np.zeros((8, 0))
    if accepted:
        system = hippo.diagonalize(A, np.ones(8), none)
        back = (system.V * system.Lambda) @ system.V.conj().T
        assert np.abs(back - A).max() < 2 * error * max(1.0, scale)
    else:
        with pytest.raises(ValueError, match="must be a multiple of the identity plus a skew-symmetric matrix"):
            hippo.diagonalize(A, np.ones(8), none)


@pytest.mark.parametrize(("slow", "kept"), [(1e-13, False), (1e-9, True), (1e-6, True)])
def test_small_frequencies_are_not_taken_as_zero(slow, kept):
    """Only zeros up to rounding errors count as zero; their pairs come from the kernel, and are conjugate."""
    rotation = np.linalg.qr(np.random.default_rng(2).standard_normal((6, 6)))[0]
    omega = np.array([slow, 0, 1.0, 0, 3.0])
    A = rotation @ (np.diag(omega, 1) - np.diag(omega, -1) - 0.5 * np.eye(6)) @ rotation.T
    system = hippo.diagonalize(A, np.ones(6), np.zeros((6, 0)))
    assert np.allclose(system.Lambda.imag[:3], [slow if kept else 0, 1, 3], rtol=1e-5, atol=0)
    assert np.abs(system.V[:, 3:] - system.V[:, :3].conj()).max() == 0
    # The error of eigenvectors with close eigenvalues is the rounding error divided by their distance.
    assert np.abs(system.V @ system.V.conj().T - np.eye(6)).max() < (1e-15 / slow if kept else 1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hippo.legs(0), "legs: `N` must be at least 1, got 0"),
        (lambda: hippo.fout(7), "fout: `N` must be a positive even integer"),
        (lambda: hippo.diagonalize(np.eye(3), np.ones(3), np.ones((3, 1))), "`N` must be a positive even integer"),
        (lambda: hippo.diagonalize(np.ones((2, 2)), np.ones(2), np.ones((2, 1))), "plus a skew-symmetric matrix"),
        (lambda: hippo.diagonalize(np.eye(2), np.ones(3), np.ones((2, 1))), r"`B` must have shape \(2,\)"),
        (lambda: hippo.diagonalize(np.eye(2), np.ones(2), np.ones((3, 1))), r"got \(2,\) and \(3, 1\)"),
        (lambda: hippo.diagonalize(np.eye(2), np.ones(2), np.ones(2)), r"got \(2,\) and \(2,\)"),
        (lambda: hippo.diagonalize(np.ones(4), np.ones(2), np.ones(2)), "must be a square matrix"),
        (lambda: hippo.legt(-1), "legt: `N` must be at least 1, got -1"),
        (lambda: hippo.lagt(0), "lagt: `N` must be at least 1, got 0"),
        (lambda: hippo.low_rank_correction(np.ones((2, 3))), "must be a square matrix"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
