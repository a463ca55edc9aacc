"""Every fast operation agrees with its naive version, in values and gradients, and needs little memory."""

import math
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmkit import ops
from ssmkit.ops.blocks import in_blocks
from ssmkit.ops.scan import _Carry
from ssmkit.testing import relative_error

LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from([64, 97, 128, 255, 256, 257]))
LONG = 1 << 17


def decaying(*shape, slow=1e-4, dtype=torch.complex128):
    """Nodes inside the unit circle, with time constants up to 1 / slow."""
    radius = torch.exp(-torch.logspace(math.log10(slow), 0, shape[-1], dtype=torch.float64)).expand(shape)
    return torch.polar(radius, torch.rand(shape, dtype=torch.float64) * 2 * math.pi).to(dtype)


def same_values_and_gradients(fast, naive, *arguments, tolerance=1e-9):
    arguments = [a.detach().requires_grad_() for a in arguments]
    values = [f(*arguments) for f in (fast, naive)]
    assert values[0].shape == values[1].shape
    assert values[0].dtype == values[1].dtype
    if not values[0].numel():
        return
    if not values[1].requires_grad:
        assert not values[1].any()
        return
    weight = torch.randn_like(values[1])
    grads = [
        torch.autograd.grad(
            (v * weight).sum().abs() if v.is_complex() else (v * weight).sum(), arguments, materialize_grads=True
        )
        for v in values
    ]
    for actual, expected in [(values[0], values[1]), *zip(*grads, strict=True)]:
        parts = [(actual, expected)]
        if actual.is_complex():
            parts = [(torch.view_as_real(actual), torch.view_as_real(expected))]
        assert all(relative_error(a.detach(), b.detach()) < tolerance for a, b in parts)


def random_complex(*shape, dtype=torch.complex128):
    return torch.randn(*shape, dtype=torch.complex128).to(dtype)


@settings(max_examples=30)
@given(L=LENGTHS, N=st.integers(1, 9), batch=st.lists(st.integers(1, 3), max_size=2))
def test_vandermonde(L, N, batch):
    x = decaying(*batch, N)
    same_values_and_gradients(
        lambda v, x: ops.vandermonde(v, x, L), lambda v, x: ops.naive_vandermonde(v, x, L), random_complex(*batch, N), x
    )


@settings(max_examples=30)
@given(L=LENGTHS, N=st.integers(1, 9), batch=st.lists(st.integers(1, 3), max_size=2), real=st.booleans())
def test_vandermonde_transpose(L, N, batch, real):
    u = torch.randn(*batch, L, dtype=torch.float64) if real else random_complex(*batch, L)
    same_values_and_gradients(ops.vandermonde_transpose, ops.naive_vandermonde_transpose, u, decaying(*batch, N))


def test_vandermonde_transpose_is_the_transpose():
    x, v, u = decaying(5), random_complex(5), random_complex(300)
    left = (ops.vandermonde(v, x, 300) * u).sum()
    right = (ops.vandermonde_transpose(u, x) * v).sum()
    assert torch.allclose(left, right, rtol=1e-10)


def test_vandermonde_accepts_zero_as_a_node():
    x = torch.zeros(1, dtype=torch.complex128, requires_grad=True)
    y = ops.vandermonde(torch.ones(1, dtype=torch.complex128), x, 5)
    assert y.real.tolist() == [1, 0, 0, 0, 0]
    (grad,) = torch.autograd.grad(y.real.sum(), x)
    assert grad == 1


@settings(max_examples=30)
@given(
    L=st.integers(1, 60), N=st.integers(1, 9), batch=st.lists(st.integers(1, 3), max_size=2), block=st.integers(1, 64)
)
def test_cauchy(L, N, batch, block):
    z, w = random_complex(L) + 3, random_complex(*batch, N) - 3
    with mock.patch.object(sys.modules["ssmkit.ops.cauchy"], "_BLOCK", block):
        same_values_and_gradients(
            ops.cauchy, lambda v, z, w: ops.naive_cauchy(v, z.expand(*batch, L), w), random_complex(*batch, N), z, w
        )


@settings(max_examples=30)
@given(
    L=st.one_of(st.sampled_from([0, 1, 2]), st.integers(1, 70)),
    N=st.integers(1, 9),
    batch=st.lists(st.integers(1, 3), max_size=2),
)
def test_cauchy_at_the_roots_of_unity(L, N, batch):
    turn = 2 * math.pi / max(1, L) * torch.arange(L, dtype=torch.float64)
    z = torch.polar(torch.ones_like(turn), turn)
    same_values_and_gradients(
        lambda v, w: ops.cauchy_roots_of_unity(v, w, L),
        lambda v, w: ops.naive_cauchy(v, z.expand(*batch, L), w),
        random_complex(*batch, N),
        0.9 * decaying(*batch, N),
    )


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_cauchy_at_the_roots_of_unity_for_lengths_zero_and_one(dtype):
    """For L = 1 the node is 1; for L = 0 the result is empty, with the right shape and dtype."""
    v, w = random_complex(2, 3, dtype=dtype), (0.5 * random_complex(2, 3)).to(dtype)
    one, none = (ops.cauchy_roots_of_unity(v, w, L) for L in (1, 0))
    assert torch.allclose(one[:, 0], (v / (1 - w)).sum(-1))
    assert (one.shape, none.shape) == ((2, 1), (2, 0))
    assert one.dtype == none.dtype == dtype


def contraction(*batch, N, slow=1e-3):
    """A real matrix whose powers shrink, with slow and fast poles."""
    q = torch.linalg.qr(torch.randn(*batch, N, N, dtype=torch.float64))[0]
    return q * torch.exp(-torch.logspace(math.log10(slow), 0, N, dtype=torch.float64))


@settings(max_examples=30)
@given(L=LENGTHS, N=st.integers(1, 8), M=st.integers(1, 5), batch=st.lists(st.integers(1, 3), max_size=2))
def test_krylov(L, N, M, batch):
    b, c = torch.randn(*batch, N, dtype=torch.float64), torch.randn(*batch, M, N, dtype=torch.float64)
    same_values_and_gradients(
        lambda A, b, c: ops.krylov(A, b, c, L),
        lambda A, b, c: ops.naive_krylov(A, b, c, L),
        contraction(*batch, N=N),
        b,
        c,
    )


@pytest.mark.parametrize("block", [1, 3000])
def test_krylov_is_the_same_in_blocks_of_any_size(block):
    b, c = torch.randn(5, 6, dtype=torch.float64), torch.randn(3, 5, 2, 6, dtype=torch.float64)
    with mock.patch.object(sys.modules["ssmkit.ops.krylov"], "_BLOCK", block):
        same_values_and_gradients(
            lambda A, b, c: ops.krylov(A, b, c, 77),
            lambda A, b, c: ops.naive_krylov(A, b, c, 77),
            contraction(5, N=6),
            b,
            c,
        )


@settings(max_examples=30)
@given(
    L=st.integers(0, 60),
    M=st.integers(0, 70),
    H=st.integers(1, 5),
    C=st.integers(1, 3),
    batch=st.lists(st.integers(1, 3), max_size=2),
)
def test_causal_conv(L, M, H, C, batch):
    u, k = torch.randn(*batch, L, H, dtype=torch.float64), torch.randn(C, H, M, dtype=torch.float64)
    same_values_and_gradients(ops.causal_conv, ops.naive_causal_conv, u, k)


@pytest.mark.parametrize("block", [1, 200, 1 << 30])
def test_convolution_is_the_same_in_blocks_of_any_size(monkeypatch, block):
    monkeypatch.setitem(sys.modules["ssmkit.ops.conv"]._BLOCK, "cpu", block)
    u, k = torch.randn(3, 20, 70, dtype=torch.float64), torch.randn(2, 70, 20, dtype=torch.float64)
    same_values_and_gradients(ops.causal_conv, ops.naive_causal_conv, u, k)


@pytest.mark.parametrize("L", [0, 1, 2, 9, 16])
def test_two_sided_conv(L):
    u = torch.randn(2, L, 3, dtype=torch.float64)
    k, r = torch.randn(2, 4, 3, L, dtype=torch.float64)

    def naive(u, k, r):
        rest = torch.nn.functional.pad(u[..., 1:, :], (0, 0, 0, 1)).flip(-2)
        return ops.naive_causal_conv(u, k) + ops.naive_causal_conv(rest, r).flip(-2)

    if L == 0:
        assert ops.two_sided_conv(u, k, r).shape == (2, 0, 12)
        return
    same_values_and_gradients(ops.two_sided_conv, naive, u, k, r)


def test_second_derivatives():
    u, k = torch.randn(1, 5, 2, dtype=torch.float64), torch.randn(1, 2, 5, dtype=torch.float64)
    v, z, w = random_complex(2), random_complex(3) + 3, random_complex(2) - 3
    x = decaying(2, slow=0.1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda v, x: ops.vandermonde(v, x, 7), (v.requires_grad_(), x))
    assert torch.autograd.gradgradcheck(ops.vandermonde_transpose, (u[0].mT.detach().requires_grad_(), x))
    assert torch.autograd.gradgradcheck(ops.causal_conv, (u.requires_grad_(), k.requires_grad_()))
    A, b, c = contraction(2, N=3), torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 2, 3, dtype=torch.float64)
    system = (A.requires_grad_(), b, c.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda A, b, c: ops.krylov(A, b, c, 7), system)
    poles, matrix = torch.randn(2, 1, 2, dtype=torch.complex128), torch.randn(2, 4, 4, dtype=torch.float64)
    for power in (poles, matrix):
        added, state = torch.randn(2, 4, 1, 4, dtype=torch.float64), torch.randn(2, 1, 4, dtype=torch.float64)
        carried = [x.requires_grad_() for x in (added, state, power)]
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda r, x, p: _Carry.apply(r, x, p, False), carried)
    assert torch.autograd.gradgradcheck(ops.cauchy, (v.requires_grad_(), z.requires_grad_(), w.requires_grad_()))


@pytest.mark.parametrize("L", [1, 7])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_gradients_of_krylov_that_are_not_there(L, block):
    """A single sample does not depend on `A`; and an output that is not used has no gradient."""
    shapes = ((2, 3, 3), (2, 3), (2, 2, 3))
    system = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    with mock.patch.object(sys.modules["ssmkit.ops.krylov"], "_BLOCK", block):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda A, b, c: ops.krylov(A, b, c, L), system)
        for second in (False, True):
            unused = torch._C._functions.UndefinedGrad()(ops.krylov(*system, L))
            found = torch.autograd.grad(unused.sum(), system, create_graph=second, allow_unused=True)
            assert all(g is None or not g.any() for g in found)


def check_single_precision(f, *arguments, against=None):
    """float32 within 5e-5 of float64 computed from the same float32 inputs, values and gradients."""
    low = [a.detach().requires_grad_() for a in arguments]
    high = [a.detach().to(torch.promote_types(a.dtype, torch.float64)).requires_grad_() for a in arguments]
    y, exact = f(*low), f(*high)
    scale = exact.detach().abs() if against is None else against
    assert ((y.detach() - exact.detach()).abs() / scale.max()).max() < 5e-5
    weight = torch.randn_like(exact).to(y.dtype)
    loss = [(r * weight.to(r.dtype)).sum() for r in (y, exact)]
    loss = [r.real if r.is_complex() else r for r in loss]
    grads = [torch.autograd.grad(r, a) for r, a in zip(loss, (low, high), strict=True)]
    for g, e in zip(*grads, strict=True):
        assert (g - e).abs().max() / e.abs().max() < 5e-5


@pytest.mark.numerical
@pytest.mark.parametrize("L", [1000, LONG])
def test_single_precision_of_vandermonde(L):
    v, x = random_complex(2, 16, dtype=torch.complex64), decaying(2, 16, slow=1e-5, dtype=torch.complex64)
    check_single_precision(lambda v, x: ops.vandermonde(v, x, L), v, x)
    check_single_precision(ops.vandermonde_transpose, torch.randn(2, L), x)


@pytest.mark.numerical
@pytest.mark.parametrize("L", [1000, LONG])
def test_single_precision_of_krylov(L):
    A = contraction(2, N=8, slow=1e-5).float()
    check_single_precision(lambda A, b, c: ops.krylov(A, b, c, L), A, torch.randn(2, 8), torch.randn(2, 2, 8))


@pytest.mark.numerical
@pytest.mark.parametrize("L", [1000, LONG])
def test_single_precision_of_causal_conv(L):
    k = torch.randn(1, 3, L) * torch.exp(-torch.arange(L) / (L / 8))
    check_single_precision(ops.causal_conv, torch.randn(2, L, 3), k)


@pytest.mark.numerical
@pytest.mark.parametrize("L", [1000, LONG])
def test_single_precision_of_cauchy(L):
    """Relative to the sum of the sizes of the terms, as terms cancel; values and gradients."""
    turn = 2 * math.pi / L * torch.arange(L, dtype=torch.float64)
    z = torch.polar(torch.ones_like(turn), turn).to(torch.complex64)
    v, w = random_complex(2, 16, dtype=torch.complex64), (0.99 * decaying(2, 16)).to(torch.complex64)
    weight = random_complex(2, L, dtype=torch.complex64)
    low = [t.requires_grad_() for t in (v, z, w)]
    high = [t.detach().to(torch.complex128).requires_grad_() for t in low]
    values = [ops.cauchy(*low), ops.cauchy(*high)]
    grads = [
        torch.autograd.grad((y * weight.to(y.dtype)).sum().real, inputs)
        for y, inputs in zip(values, (low, high), strict=True)
    ]
    with torch.no_grad():
        terms = (v[..., None] / (z - w[..., None])).abs()
        slopes = terms / (z - w[..., None]).abs() * weight.abs()[:, None]
        sizes = [terms.sum(-2), (terms * weight.abs()[:, None] / v.abs()[..., None]).sum(-1), slopes.sum((0, 1))]
        sizes.append(slopes.sum(-1))
    pairs = zip((values[0], *grads[0]), (values[1], *grads[1]), sizes, strict=True)
    assert all(((a - b).abs() / size).max() < 5e-5 for a, b, size in pairs)
    check_single_precision(lambda v, w: ops.cauchy_roots_of_unity(v, w, L), v, w)


def peak_memory(run):
    """The most bytes of tensors alive at once, from the profiler's record of allocations."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    alive = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def test_no_fast_path_holds_all_terms():
    """Memory stays far below that of an (H, N, L) array, in both passes."""
    H, N, L = 4, 64, 1 << 15
    everything = H * N * L * 8
    v, x = (t.requires_grad_() for t in (random_complex(H, N, dtype=torch.complex64), decaying(H, N).cfloat()))
    z = torch.polar(torch.full((L,), 2.0), torch.linspace(0, 6, L)).requires_grad_()
    A = contraction(H, N=N).float().requires_grad_()
    b, c = torch.randn(H, N, requires_grad=True), torch.randn(H, 1, N, requires_grad=True)
    u = torch.randn(1, L, H, requires_grad=True)
    runs = {
        "vandermonde": lambda: ops.vandermonde(v, x, L).abs().sum().backward(),
        "vandermonde_transpose": lambda: ops.vandermonde_transpose(u.mT, x).abs().sum().backward(),
        "cauchy": lambda: ops.cauchy(v, z, x).abs().sum().backward(),
        "cauchy_roots_of_unity": lambda: ops.cauchy_roots_of_unity(v, 0.99 * x, L).abs().sum().backward(),
        "krylov": lambda: ops.krylov(A, b, c, L).sum().backward(),
    }
    peaks = {name: peak_memory(run) / everything for name, run in runs.items() if name != "cauchy"}
    assert max(peaks.values()) < 0.6, peaks
    # The blocks of `cauchy` have a fixed size, so the problem must be much larger than one.
    big = torch.polar(torch.full((1 << 19,), 2.0), torch.linspace(0, 6, 1 << 19))
    assert peak_memory(lambda: ops.cauchy(v, big, x).abs().sum().backward()) < 0.5 * H * N * len(big) * 8


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.vandermonde(torch.ones(2), torch.ones(2), 3), TypeError, "must be complex"),
        (lambda: ops.vandermonde(torch.ones(2) + 0j, torch.ones(3) + 0j, 3), ValueError, "agree in their last axis"),
        (lambda: ops.vandermonde(torch.ones(2) + 0j, torch.ones(2) + 0j, -1), ValueError, "`L` must be at least 0"),
        (lambda: ops.vandermonde_transpose(torch.ones(2), torch.ones(2)), TypeError, "`x` must be a complex tensor"),
        (lambda: ops.cauchy(torch.ones(2) + 0j, torch.ones(2), torch.ones(2) + 0j), TypeError, "`z` must be a complex"),
        (lambda: ops.cauchy(torch.ones(2) + 0j, torch.ones(2) + 0j, torch.ones(3) + 0j), ValueError, "last axis"),
        (lambda: ops.krylov(torch.ones(2, 3), torch.ones(2), torch.ones(1, 2), 3), ValueError, "`A` must have shape"),
        (lambda: ops.krylov(torch.ones(2, 2).long(), torch.ones(2), torch.ones(1, 2), 3), TypeError, "real floating"),
        (lambda: ops.causal_conv(torch.ones(5, 2), torch.ones(1, 3, 5)), ValueError, "last axis of `u` must be 3"),
        (lambda: ops.causal_conv(torch.ones(5, 2), torch.ones(2, 5)), ValueError, "kernel must have shape"),
        (lambda: ops.causal_conv(torch.ones(5, 2).int(), torch.ones(1, 2, 5)), TypeError, "real floating"),
        (
            lambda: ops.two_sided_conv(torch.ones(5, 2), torch.ones(1, 2, 5), torch.ones(1, 2, 4)),
            ValueError,
            "`k_reverse` must have shape",
        ),
        (
            lambda: ops.two_sided_conv(torch.ones(5, 2), torch.ones(1, 2, 4), torch.ones(1, 2, 4)),
            ValueError,
            r"two_sided_conv: `k` must have shape \(1, 2, 5\)",
        ),
        (
            lambda: ops.two_sided_conv(torch.ones(5, 2), torch.ones(1, 2, 6), torch.ones(1, 2, 5)),
            ValueError,
            r"two_sided_conv: `k` must have shape \(1, 2, 5\)",
        ),
        (
            lambda: ops.two_sided_conv(torch.ones(5, 2), torch.ones(1, 2, 5), torch.ones(2, 2, 5)),
            ValueError,
            r"two_sided_conv: `k_reverse` must have shape \(1, 2, 5\)",
        ),
        (
            lambda: ops.two_sided_conv(torch.ones(5, 2), torch.ones(1, 2, 5), torch.ones(1, 2, 5).int()),
            TypeError,
            "two_sided_conv: `k_reverse` must be a real floating tensor",
        ),
        (
            lambda: ops.two_sided_conv(torch.ones(5, 2), torch.ones(1, 2, 5) + 0j, torch.ones(1, 2, 5)),
            TypeError,
            "two_sided_conv: `k` must be a real floating tensor",
        ),
        (lambda: ops.causal_conv(torch.ones(2), torch.ones(1, 2, 5)), ValueError, r"`u` must have shape \(\*, length"),
        (
            lambda: ops.cauchy_roots_of_unity(torch.ones(2), torch.ones(2) + 0j, 3),
            TypeError,
            "cauchy_roots_of_unity: `v` and `w` must be complex",
        ),
        (
            lambda: ops.cauchy_roots_of_unity(torch.ones(1) + 0j, torch.zeros(3) + 0j, 3),
            ValueError,
            "cauchy_roots_of_unity: `v` and `w` must agree in their last axis",
        ),
        (
            lambda: ops.cauchy_roots_of_unity(torch.ones(1) + 0j, torch.zeros(1) + 0j, -1),
            ValueError,
            "cauchy_roots_of_unity: `L` must be at least 0",
        ),
        (
            lambda: ops.krylov(torch.eye(2), torch.ones(2), torch.ones(1, 2), -1),
            ValueError,
            "krylov: `L` must be at least 0",
        ),
        (lambda: ops.krylov(torch.eye(2), torch.ones(3), torch.ones(1, 2), 3), ValueError, "`b` \\(\\*, N\\)"),
        (lambda: ops.krylov(torch.eye(2), torch.ones(2), torch.ones(2), 3), ValueError, "`c` \\(\\*, M, N\\)"),
        (lambda: ops.vandermonde(torch.ones(()) + 0j, torch.ones(1) + 0j, 3), ValueError, "agree in their last axis"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


AUTOGRAD_FUNCTIONS = {
    "cauchy": lambda z: ops.cauchy(z[:, :4], z, z[:, :4] + 2).real,
    "vandermonde": lambda z: ops.vandermonde(z, z / 8, 50).real,
    "vandermonde_transpose": lambda z: ops.vandermonde_transpose(z.real, z / 8).real,
    "krylov": lambda z: ops.krylov(torch.stack([z[:, :4].real] * 4, -1) / 9, z[:, :4].real, z[:, None, :4].imag, 40),
    "causal_conv": lambda z: ops.causal_conv(z.real.mT[None], z.imag[None]),
    "recurrence": lambda z: ops.recurrence(z.real / 4, z.imag, dim=-1)[0],
    "selective_scan": lambda z: ops.selective_scan(
        z.real[..., None], z.imag[..., None].square(), -torch.ones(1, 1), *[z.imag[..., None, None]] * 2
    ),
    "carry": lambda z: _Carry.apply(
        z.real[:, :, None, None].expand(3, 64, 2, 4),
        z.imag[:, :2, None].expand(3, 2, 4),
        z.real[:, :4, None] * z.imag[:, None, :4] / 4,
        False,
    ),
    "in_blocks": lambda z: in_blocks(
        lambda x, M, u: (u @ M, x + 0),
        16,
        z.real[:, 0],
        [z.real[0, :8, None] * z.imag[0, :8]],
        [z.real[..., None].expand(3, 64, 8)],
    ),
}


@pytest.mark.parametrize("name", AUTOGRAD_FUNCTIONS)
def test_backward_passes_are_in_full_precision_inside_autocast(name):
    z = random_complex(3, 64, dtype=torch.complex64).requires_grad_()
    y = AUTOGRAD_FUNCTIONS[name](z)
    y = y[0] if isinstance(y, tuple) else y
    loss = y.square().sum()
    (expected,) = torch.autograd.grad(loss, z, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(loss, z)
    assert expected.isfinite().all()
    assert torch.equal(found, expected)
