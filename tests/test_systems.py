"""Systems: the dense one is the reference for the others, and the order of every rule is measured."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmkit import systems
from ssmkit.initializers import HIPPO, poles
from ssmkit.systems import DPLR, Dense, Diagonal
from ssmkit.testing import relative_error

LENGTHS = st.one_of(st.sampled_from([1, 2, 127, 128, 129, 300]), st.integers(1, 60))


def random_poles(*shape, slow=1e-3):
    real = -torch.exp(torch.rand(shape, dtype=torch.float64) * -math.log(slow)) * slow
    return torch.complex(real, 10 * torch.rand(shape, dtype=torch.float64))


def random_complex(*shape):
    return torch.randn(*shape, dtype=torch.complex128)


def dplr(S, H, n, rank, channels=1):
    return DPLR(random_poles(S, n), random_complex(S, n, rank), random_complex(S, n), random_complex(channels, H, n))


def diagonal(S, H, n, channels=1):
    return Diagonal(random_poles(S, n), random_complex(S, n), random_complex(channels, H, n))


def steps(system, u, x):
    rows = []
    for sample in u.unbind(1):
        y, x = system.step(sample, x)
        rows.append(y.flatten(1))
    return torch.stack(rows, 1), x


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_closed_form_is_the_dense_bilinear_rule(rank, groups):
    """Diagonal plus rank r, without a solve, against (I - Δ/2 A)⁻¹ (I + Δ/2 A): to 1e-12."""
    system = dplr(groups, 4, 5, rank, channels=2)
    dt = torch.logspace(-5, 0, 4, dtype=torch.float64)[:groups] if groups > 1 else torch.tensor([0.1]).double()
    closed, oracle = (s.discretize(dt, dtype=torch.float64) for s in (system, system.dense()))
    assert relative_error(closed.dense.A, oracle.A) < 1e-12
    assert relative_error(closed.dense.b, oracle.b) < 1e-12
    assert relative_error(closed.dense.c, oracle.c) < 1e-12


@pytest.mark.parametrize("init", HIPPO)
@pytest.mark.parametrize("N", [2, 16, 64])
def test_closed_form_holds_for_hippo(init, N):
    start = poles("S4", init, N)
    dt = torch.logspace(-5, -1, 3, dtype=torch.float64)
    system = DPLR(start.Lambda[None], start.P[None], start.B[None], random_complex(1, 3, N // 2))
    closed, oracle = (s.discretize(dt, dtype=torch.float64) for s in (system, system.dense()))
    assert relative_error(closed.dense.A, oracle.A) < 1e-12
    assert relative_error(closed.dense.b, oracle.b) < 1e-12
    # A bilinear step of a dissipative system is a contraction.
    assert torch.linalg.matrix_norm(closed.dense.A, 2).max() <= 1 + 1e-12


MAKERS = {
    "diagonal, zoh": lambda g, h, c: (diagonal(g, h, 4, c), "zoh"),
    "diagonal, bilinear": lambda g, h, c: (diagonal(g, h, 4, c), "bilinear"),
    "rank 1": lambda g, h, c: (dplr(g, h, 4, 1, c), None),
    "rank 2": lambda g, h, c: (dplr(g, h, 4, 2, c), None),
}


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=15)
@given(L=LENGTHS, groups=st.sampled_from([1, 2, 4]), channels=st.integers(1, 2), batch=st.integers(1, 3))
def test_structured_systems_agree_with_the_dense_system(name, L, groups, channels, batch):
    """Kernel, steps and scan of a structured system agree with steps of the dense system, in outputs and states."""
    system, method = MAKERS[name](groups, 4, channels)
    dt = torch.exp(torch.empty(groups, dtype=torch.float64).uniform_(math.log(1e-5), math.log(0.5)))
    fast = system.discretize(dt, *([method] if method else []), dtype=torch.float64)
    oracle = system.dense().discretize(dt, method or "bilinear", torch.float64)
    u, x = torch.randn(batch, L, 4, dtype=torch.float64), torch.randn(batch, 4, 8, dtype=torch.float64)
    y, end = steps(oracle, u, x)
    for other, other_end in (steps(fast, u, x), fast.scan(u, x), oracle.scan(u, x)):
        assert relative_error(other, y) < 1e-10
        assert relative_error(other_end, end) < 1e-10
    impulse = torch.zeros(1, L, 4, dtype=torch.float64)
    impulse[:, 0] = 1
    response, _ = steps(oracle, impulse, torch.zeros(1, 4, 8, dtype=torch.float64))
    expected = response[0].T.reshape(channels, 4, L)
    for kernel in (fast.kernel(L), oracle.kernel(L)):
        assert relative_error(kernel, expected) < 1e-10


def errors_of(system, discretize, signal, duration, counts):
    """The error at the end of an interval, for falling steps, against a fine zero-order hold of the dense system."""
    out = []
    for count in counts:
        dt = duration / count
        times = (torch.arange(count, dtype=torch.float64) + 1) * dt
        discrete = discretize(torch.tensor([dt], dtype=torch.float64))
        u = signal(times - dt / 2)[None, :, None]
        y, _ = discrete.scan(u, torch.zeros(1, 1, 8, dtype=torch.float64))
        out.append(y[0, -1, 0])
    return out


@pytest.mark.parametrize("kind", ["diagonal", "rank 1", "dense"])
def test_bilinear_is_of_second_order(kind):
    """Halving the step quarters the error."""
    system = dplr(1, 1, 4, 1) if kind != "diagonal" else diagonal(1, 1, 4)
    discretize = {
        "diagonal": lambda dt: system.discretize(dt, "bilinear", torch.float64),
        "rank 1": lambda dt: system.discretize(dt, torch.float64),
        "dense": lambda dt: system.dense().discretize(dt, "bilinear", torch.float64),
    }[kind]
    counts = [256, 512, 1024]
    found = errors_of(system, discretize, lambda t: torch.sin(3 * t), 2.0, [*counts, 1 << 16])
    errors = [abs(y - found[-1]).item() for y in found[:-1]]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert abs(math.log2(coarse / fine) - 2) < 0.1, errors


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_zoh_is_exact_for_piecewise_constant_input(kind):
    """With steps thirty-two times finer and the same piecewise-constant input, nothing changes."""
    system = diagonal(1, 1, 4)
    coarse_dt, fine = 0.2, 32
    levels = torch.randn(20, dtype=torch.float64)

    def run(dt, u):
        dt = torch.tensor([dt], dtype=torch.float64)
        discrete = (system if kind == "diagonal" else system.dense()).discretize(dt, "zoh", torch.float64)
        return discrete.scan(u[None, :, None], torch.zeros(1, 1, 8, dtype=torch.float64))[0][0, :, 0]

    coarse, refined = run(coarse_dt, levels), run(coarse_dt / fine, levels.repeat_interleave(fine))
    assert relative_error(coarse, refined[fine - 1 :: fine]) < 1e-11
    # Also compared with the solution in closed form: s' = λ s + B u for constant u.
    s = torch.zeros(4, dtype=torch.complex128)
    for level, y in zip(levels, coarse, strict=True):
        grow = torch.exp(system.Lambda[0] * coarse_dt)
        s = grow * s + (grow - 1) / system.Lambda[0] * system.B[0] * level
        assert abs(2 * (system.C[0, 0] * s).sum().real - y) < 1e-10 * coarse.abs().max()


def test_zoh_keeps_its_precision_near_zero():
    """(e^z - 1)/z has no cancellation: relative to the series, to 1e-15."""
    Lambda = torch.tensor([0, -1e-9, -1e-9 + 1e-12j, -1e-4 + 1e-5j], dtype=torch.complex128)
    dt = torch.tensor(1e-3, dtype=torch.float64)
    a, b = systems.zoh(Lambda, torch.ones(4, dtype=torch.complex128), dt)
    z = dt * Lambda
    series = dt * (1 + z / 2 + z**2 / 6)
    assert ((b - series).abs() / series.abs()).max() < 1e-15
    assert torch.allclose(a, z.exp(), rtol=1e-15)


def test_zoh_has_a_gradient_at_zero():
    Lambda = torch.zeros(1, dtype=torch.complex128, requires_grad=True)
    _, b = systems.zoh(Lambda, torch.ones(1, dtype=torch.complex128), torch.tensor(0.5, dtype=torch.float64))
    (grad,) = torch.autograd.grad(b.real.sum(), Lambda)
    assert grad.isfinite().all()


def test_gradients_flow_through_the_closed_form():
    """By gradcheck, and compared with the dense rule."""
    system = dplr(2, 4, 3, 2)
    dt = torch.tensor([0.1, 0.3], dtype=torch.float64).requires_grad_()
    leaves = [t.requires_grad_() for t in system]
    weight = torch.randn(1, 4, 20, dtype=torch.float64)
    grads = [
        torch.autograd.grad((s.discretize(dt, dtype=torch.float64).kernel(20) * weight).sum(), [dt, *leaves])
        for s in (system, system.dense())
    ]
    for a, b in zip(*grads, strict=True):
        assert ((a - b).abs().max() / b.abs().max()) < 1e-9


def test_unknown_rules_are_refused():
    with pytest.raises(
        ValueError, match=r"unknown `method` 'zo'; the known ones are bilinear, zoh. Did you mean 'zoh'"
    ):
        diagonal(1, 1, 2).discretize(torch.ones(1), "zo")
    with pytest.raises(ValueError, match="unknown `method` 'euler'"):
        Dense(torch.eye(2)[None], torch.ones(1, 2), torch.ones(1, 1, 2)).discretize(torch.ones(1), "euler")
