"""Initial parameters."""

import numpy as np
import pytest
import torch

from ssmkit import S4, S4D, hippo, initializers
from ssmkit.initializers import poles
from ssmkit.testing import relative_error


def test_diagonal_formulas():
    n = np.arange(4)
    assert np.allclose(initializers.lin(8)[0], -0.5 + 1j * np.pi * n)
    assert np.allclose(initializers.inv(8)[0], -0.5 + 1j * 8 / np.pi * (8 / (2 * n + 1) - 1))
    assert np.allclose(initializers.quad(8)[0], -0.5 + 1j / np.pi * (1 + 2 * n) ** 2)
    assert np.allclose(initializers.real(8)[0], -(n + 1))
    for init in initializers.DIAGONAL.values():
        assert np.array_equal(init(8)[1], np.ones(4))


@pytest.mark.parametrize("name", initializers.HIPPO)
def test_names_and_functions_are_the_same(name):
    for cls in (S4, S4D):
        torch.manual_seed(1)
        named = cls(4, 16, init=name)
        torch.manual_seed(1)
        called = cls(4, 16, init=initializers.HIPPO[name])
        for (label, a), b in zip(named.state_dict().items(), called.state_dict().values(), strict=True):
            assert torch.equal(a, b), label


def as_complex(pairs):
    return torch.view_as_complex(pairs.detach()).numpy()


def matrix_of(name, N):
    """A real matrix and vector of a measure, and the columns that diagonalise the matrix: one of each pair."""
    measure = initializers.HIPPO[name]
    A, B = measure(N)
    return A, B, hippo.diagonalize(A, B, hippo.low_rank_correction(A, measure)).V[:, : N // 2]


@pytest.mark.parametrize("cls", [S4, S4D])
@pytest.mark.parametrize("name", initializers.HIPPO)
def test_layers_start_at_the_poles_and_gains_of_the_measure(cls, name):
    """Real parts of at most -1e-4; S4 has B, and S4D half of it, in every one of its systems."""
    N = 16
    layer = cls(3, N, init=name, dtype=torch.float64)
    A, B, V = matrix_of(name, N)
    P = hippo.low_rank_correction(A, initializers.HIPPO[name])
    poles = np.linalg.eigvals(A + P @ P.T)
    above = np.sort(poles.imag[poles.imag > 1e-9])
    above = np.concatenate([np.zeros(N // 2 - len(above)), above])
    gains = 2 * (V @ as_complex(layer.B)[..., None])[..., 0].real
    for system in range(3):
        assert np.allclose(layer.A_imag[system].detach(), above, atol=1e-9 * np.abs(A).max())
        assert np.allclose(gains[system], B if cls is S4 else B / 2, rtol=1e-10, atol=1e-10)
    real = {"legs": -0.5}.get(name, -1e-4)
    assert np.allclose(-layer.log_A_real.exp().detach(), real, rtol=1e-9)


@pytest.mark.parametrize("name", initializers.DIAGONAL)
def test_layers_start_at_the_named_poles(name):
    layer = S4D(3, 16, init=name, dtype=torch.float64)
    Lambda, B = initializers.DIAGONAL[name](16)
    assert np.allclose(-layer.log_A_real.exp().detach(), np.broadcast_to(Lambda.real, (3, 8)), rtol=1e-12)
    assert np.allclose(layer.A_imag.detach(), np.broadcast_to(Lambda.imag, (3, 8)), rtol=1e-12)
    assert np.array_equal(as_complex(layer.B), np.broadcast_to(B, (3, 8)))


def test_poles_of_the_user_are_used_unchanged():
    """Gains too, except poles that are not strictly stable; called for every layer, as they may be random."""
    asked = []

    def init(N):
        asked.append(N)
        return np.array([-2.0 + 1j, 3j, 0.5 - 4j]), np.array([1 + 2j, len(asked), -1j])

    first, second = (S4D(2, 6, init=init, dtype=torch.float64) for _ in range(2))
    assert np.allclose(-first.log_A_real.exp().detach(), [[-2, -1e-4, -1e-4]] * 2, rtol=1e-12)
    assert first.A_imag.tolist() == [[1, 3, -4]] * 2
    assert np.array_equal(as_complex(first.B), [[1 + 2j, 1, -1j]] * 2)
    assert np.array_equal(as_complex(second.B), [[1 + 2j, 2, -1j]] * 2)
    assert asked == [6, 6]


@pytest.mark.parametrize("cls", [S4, S4D])
def test_a_matrix_of_the_user_is_used_unchanged(cls):
    A, B, V = matrix_of("legt", 8)
    layer = cls(2, 8, init=lambda N: (3 * A, 5 * B), dtype=torch.float64)
    gains = 2 * (V @ as_complex(layer.B)[0]).real
    assert np.allclose(gains, 5 * B if cls is S4 else 5 * B / 2, rtol=1e-9)


def test_the_registry():
    assert {"legs": hippo.legs, "legt": hippo.legt, "lagt": hippo.lagt, "fout": hippo.fout} == initializers.HIPPO
    assert {name: getattr(initializers, name) for name in ("lin", "inv", "quad", "real")} == initializers.DIAGONAL


def assert_standard_normal(numbers):
    """Mean, variance, fourth moment and correlation of neighbours: within 5.5 standard deviations of each estimate.

    A good sample fails once in millions of times. With the 65,536 numbers and more of the tests below, the variance is
    bounded to 3 %.
    """
    x = numbers.detach().double().flatten()
    n = len(x)
    half = n // 2
    for found, expected, variance in (
        (x.mean(), 0, 1),
        (x.square().mean(), 1, 2),
        (x.pow(4).mean(), 3, 96),
        ((x[:-1] * x[1:]).mean(), 0, 1),
        ((x[:half] * x[half : 2 * half]).mean(), 0, 2),
    ):
        assert abs(found - expected) < 5.5 * (variance / n) ** 0.5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cls", [S4, S4D])
def test_outputs_start_normal(cls, seed):
    """D standard normal; C complex with variance 1, 1/2 in each part; for every output and both directions."""
    torch.manual_seed(torch.initial_seed() + seed)
    layer = cls(16384, 4, n_ssm=1, channels=2, bidirectional=True)
    for c in range(4):
        assert_standard_normal(layer.C[c] * 2**0.5)
    for part in range(2):
        assert_standard_normal(layer.C[..., part] * 2**0.5)
    assert_standard_normal(layer.C.movedim(0, -1) * 2**0.5)
    assert_standard_normal(cls(65536, 2, n_ssm=1).D)
    assert_standard_normal(cls(16384, 2, n_ssm=1, channels=4).D.T)


@pytest.mark.parametrize("seed", range(3))
def test_a_rank_above_that_of_the_measure_starts_small(seed):
    """Complex normal numbers with variance 1e-4, next to the columns of the measure."""
    torch.manual_seed(torch.initial_seed() + seed)
    plain, wide = poles("S4", "legt", 64), poles("S4", "legt", 64, rank=2 + 1024)
    assert torch.equal(wide.P[:, :2], plain.P)
    assert torch.equal(wide.Lambda, plain.Lambda)
    assert torch.equal(wide.B, plain.B)
    extra = torch.view_as_real(wide.P[:, 2:])
    assert_standard_normal(extra * 2**0.5 / 1e-2)


def assert_log_uniform(logs, low, high):
    """By the largest distance between distribution functions (Dvoretzky, Kiefer and Wolfowitz), and at both ends.

    A good sample fails once in a million times.
    """
    x = ((logs.detach().double() - np.log(low)) / np.log(high / low)).sort().values
    n = len(x)
    assert -1e-6 <= x[0] < 14 / n
    assert 1 - 14 / n < x[-1] <= 1 + 1e-6
    steps = torch.arange(n + 1) / n
    distance = torch.maximum((x - steps[:-1]).abs(), (x - steps[1:]).abs()).max()
    assert distance < (np.log(2e6) / (2 * n)) ** 0.5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cls", [S4, S4D])
def test_steps_start_log_uniform(cls, seed):
    torch.manual_seed(torch.initial_seed() + seed)
    assert_log_uniform(cls(16384, 2, n_ssm=1).log_dt, 1e-3, 1e-1)
    assert_log_uniform(cls(16384, 2, n_ssm=8192, tie_dt=True, dt_min=1e-5, dt_max=3.0).log_dt, 1e-5, 3.0)


@pytest.mark.parametrize("cls", [S4, S4D])
def test_a_reset_draws_again_from_the_same_distribution(cls):
    layer = cls(4, 8, init="legt", **({"rank": 3} if cls is S4 else {}))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    layer.reset_parameters()
    after = layer.state_dict()
    for name in ("log_A_real", "A_imag", "B"):
        assert torch.equal(after[name], before[name])
    for name in ("log_dt", "C", "D"):
        assert not torch.isclose(after[name], before[name]).any()
        assert (after[name] != 7).all()
    if cls is S4:
        assert torch.equal(after["P"][:, :, :2], before["P"][:, :, :2])
        assert not torch.isclose(after["P"][:, :, 2], before["P"][:, :, 2]).any()


@pytest.mark.parametrize(("name", "rank"), [("legs", 1), ("legt", 2), ("lagt", 1), ("fout", 1)])
def test_s4_is_the_hippo_system(name, rank):
    """The parameters give the matrix that they were made from (except the clamp at -1e-4)."""
    N = 16
    layer = S4(2, N, init=name, dtype=torch.float64)
    assert layer.P.shape == (2, N // 2, rank, 2)
    A, B = initializers.HIPPO[name](N)
    V = hippo.diagonalize(A, B, hippo.low_rank_correction(A, initializers.HIPPO[name])).V
    Lambda = torch.complex(-layer.log_A_real.exp(), layer.A_imag)[0].detach().numpy()
    P = torch.view_as_complex(layer.P)[0].detach().numpy()
    full_lambda, full_P = np.concatenate([Lambda, Lambda.conj()]), np.concatenate([P, P.conj()])
    back = V @ (np.diag(full_lambda) - full_P @ full_P.conj().T) @ V.conj().T
    assert np.abs(back - A).max() <= 1.01e-4 + 1e-9 * np.abs(A).max()


def test_s4d_legs_tends_to_s4_legs():
    """Theorem 3 of the S4D paper: (Λ, B/2) tends to (A, B) as N grows, in its response to smooth input."""
    t = torch.arange(3000, dtype=torch.float64) * 1e-3
    u = (torch.sin(3 * t) + torch.exp(-(((t - 1) / 0.1) ** 2)))[None, :, None]
    errors = []
    for N in (16, 64, 256):
        A, B = hippo.legs(N)
        V = torch.from_numpy(hippo.diagonalize(A, B, hippo.low_rank_correction(A, hippo.legs)).V[:, : N // 2])
        full, diagonal = S4(1, N, dtype=torch.float64), S4D(1, N, discretization="bilinear", dtype=torch.float64)
        with torch.no_grad():
            for layer in (full, diagonal):
                layer.log_dt.fill_(float(np.log(1e-3)))
                # Read the first coordinate of the HiPPO state: e₀ in the diagonal basis.
                layer.C.copy_(torch.view_as_real(V[0]).expand_as(layer.C))
                layer.D.zero_()
            errors.append(relative_error(diagonal(u), full(u)))
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors


def test_extra_rank_is_trainable():
    layer = S4(2, 8, rank=3)
    layer(torch.randn(1, 30, 2)).square().sum().backward()
    assert (layer.P.grad.abs().amax(dim=(0, 1, 3)) > 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: S4(4, init="legss"), r"S4: unknown `init` 'legss'; the known ones are fout, .*Did you mean 'legs'\?"),
        (lambda: S4(4, init="lin"), "S4: `init` 'lin' has no low-rank term; use S4D"),
        (lambda: S4(4, init="legt", rank=1), "S4: `rank` must be at least 2 for this `init`"),
        (lambda: S4(4, rank=0), "S4: `rank` must be at least 1, got 0; a layer of rank 0 is S4D"),
        (lambda: S4(4, 8, init=lambda N: (np.eye(3), np.ones(3))), r"`init` must return A \(8, 8\) and B \(8,\)"),
        (lambda: S4D(4, 8, init=lambda N: (np.ones(3), np.ones(3))), r"or poles and gains \(4,\) each"),
        (lambda: poles("S4", "legs", 7), "positive even integer"),
        (lambda: poles("S4", "legs", 8, -1), "S4: `rank` must be at least 0, got -1"),
        (lambda: S4(4, rank=-1), "S4: `rank` must be at least 1, got -1"),
        (lambda: S4(4, 8, init=lambda N: (-np.ones(4), np.ones(4))), r"`init` must return A \(8, 8\) .*got \(4,\)"),
        (lambda: S4(4, 8, init=lambda N: (-np.eye(8), np.ones(7))), r"got \(8, 8\) and \(7,\)"),
        (lambda: S4D(4, 8, init=lambda N: (-np.ones(4), np.ones(3))), r"got \(4,\) and \(3,\)"),
        (lambda: initializers.inv(3), "inv: `N` must be a positive even integer"),
        (lambda: initializers.quad(0), "quad: `N` must be a positive even integer"),
        (lambda: initializers.log_uniform((3,), 0.5, 0.5), "log_uniform: `low` must be less than `high`, got 0.5"),
        (lambda: initializers.log_uniform((3,), 0.0, 0.5), "log_uniform: `low` must be a positive number, got 0.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_init_must_be_a_name_or_a_function():
    with pytest.raises(TypeError, match="S4D: `init` must be a name or a function"):
        S4D(4, init=3)


def test_a_function_of_the_user_is_called_for_every_layer():
    """It may be random: only the measures of the library are cached."""
    speeds = iter((1.0, 2.0))

    def decay(N):
        return -next(speeds) * np.eye(N), np.ones(N)

    assert torch.allclose(poles("S4", decay, 4).Lambda.real, torch.tensor(-1.0).double())
    assert torch.allclose(poles("S4", decay, 4).Lambda.real, torch.tensor(-2.0).double())
