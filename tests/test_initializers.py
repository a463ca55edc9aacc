"""Where parameters start."""

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


@pytest.mark.parametrize("name", [*initializers.HIPPO, *initializers.DIAGONAL])
def test_layers_start_strictly_stable(name):
    layer = S4D(4, 32, init=name, dtype=torch.float64)
    assert (-layer.log_A_real.exp() <= -1e-4 + 1e-12).all()


@pytest.mark.parametrize(("name", "rank"), [("legs", 1), ("legt", 2), ("lagt", 1), ("fout", 1)])
def test_s4_is_the_hippo_system(name, rank):
    """The parameters, put back together, are the matrix that they came from (but for the clamp at -1e-4)."""
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


def test_steps_are_log_uniform():
    logs = initializers.log_uniform((20_000,), 1e-3, 1e-1) / np.log(10)
    assert logs.min() >= -3
    assert logs.max() <= -1
    assert abs(logs.mean() + 2) < 0.02
    assert abs(logs.std() - 2 / 12**0.5) < 0.02


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
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_init_must_be_a_name_or_a_function():
    with pytest.raises(TypeError, match="S4D: `init` must be a name or a function"):
        S4D(4, init=3)


def test_a_function_of_the_user_is_asked_for_every_layer():
    """It may be random: only the measures of the library are kept."""
    speeds = iter((1.0, 2.0))

    def decay(N):
        return -next(speeds) * np.eye(N), np.ones(N)

    assert torch.allclose(poles("S4", decay, 4).Lambda.real, torch.tensor(-1.0).double())
    assert torch.allclose(poles("S4", decay, 4).Lambda.real, torch.tensor(-2.0).double())
