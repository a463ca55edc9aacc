"""The recurrence x_k = a_k x_(k-1) + v_k and the forms of complex numbers, against their definitions."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmkit.ops import complex as forms
from ssmkit.ops import naive_recurrence, recurrence
from ssmkit.testing import relative_error
from test_ops import peak_memory

LENGTHS = st.one_of(st.sampled_from([1, 2, 255, 256, 257, 400]), st.integers(1, 60))
# Shapes of the coefficients for an input (2, L, 3, 4) whose axis of time is 1.
COEFFICIENTS = {
    "one for all": lambda L: (1,),
    "per number": lambda L: (3, 4),
    "per head": lambda L: (3, 1),
    "per head and batch": lambda L: (2, 1, 3, 1),
    "over time": lambda L: (L, 3, 4),
    "over time, for all": lambda L: (L, 1, 1),
    "over time, per head": lambda L: (2, L, 3, 1),
    "over time, in full": lambda L: (2, L, 3, 4),
}


def drawn(*shape, complex_):
    return torch.randn(shape, dtype=torch.complex128 if complex_ else torch.float64)


def complex_(*shape):
    return drawn(*shape, complex_=True)


def real(z):
    return torch.view_as_real(z.resolve_conj()) if z.is_complex() else z


def closeness(actual, expected):
    return relative_error(real(actual), real(expected))


def results_and_gradients(f, arguments, weights, **options):
    leaves = [z.clone().requires_grad_() for z in arguments]
    found = f(*leaves, **options)
    total = sum(real(y * w).sum() for y, w in zip(found, weights, strict=True))
    return [*found, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("shape", COEFFICIENTS)
@settings(max_examples=12)
@given(L=LENGTHS, complex_a=st.booleans(), complex_v=st.booleans())
def test_values_and_gradients_are_those_of_the_definition(shape, L, complex_a, complex_v):
    a = 0.7 * drawn(*COEFFICIENTS[shape](L), complex_=complex_a)
    v, x = drawn(2, L, 3, 4, complex_=complex_v), drawn(2, 3, 4, complex_=complex_v)
    weights = [drawn(2, L, 3, 4, complex_=complex_a or complex_v), drawn(2, 3, 4, complex_=complex_a or complex_v)]
    fast, naive = (results_and_gradients(f, (a, v, x), weights, dim=1) for f in (recurrence, naive_recurrence))
    for actual, expected in zip(fast, naive, strict=True):
        assert actual.dtype == expected.dtype
        assert closeness(actual, expected) < 1e-10


@pytest.mark.parametrize("dim", [0, -3, 2, -1])
def test_time_may_be_any_axis(dim):
    v = torch.randn(300, 2, 280, dtype=torch.float64) if dim in (0, -3) else torch.randn(2, 3, 300, dtype=torch.float64)
    a, x = torch.tensor([0.9], dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    for actual, expected in zip(recurrence(a, v, x, dim=dim), naive_recurrence(a, v, x, dim=dim), strict=True):
        assert relative_error(actual, expected) < 1e-12


def test_input_and_state_broadcast():
    """The gradients of an input for all heads and of a state for the whole batch are sums over their uses."""
    a, v, x = 0.5 * drawn(3, 4, complex_=True), drawn(2, 300, 1, 4, complex_=False), drawn(4, complex_=False)
    weights = [drawn(2, 300, 3, 4, complex_=True), drawn(2, 3, 4, complex_=True)]
    fast, naive = (results_and_gradients(f, (a, v, x), weights, dim=1) for f in (recurrence, naive_recurrence))
    assert [y.shape for y in fast] == [(2, 300, 3, 4), (2, 3, 4), a.shape, v.shape, x.shape]
    assert max(closeness(y, z) for y, z in zip(fast, naive, strict=True)) < 1e-10


@pytest.mark.parametrize("L", [5, 300])
def test_only_some_gradients_may_be_computed(L):
    """Only of the last state, and only to one argument."""
    arguments = (0.9 * torch.rand(L, 1), torch.randn(L, 2), torch.randn(2))
    for at in range(3):
        grads = []
        for f in (recurrence, naive_recurrence):
            leaves = [z.double().requires_grad_(i == at) for i, z in enumerate(arguments)]
            grads.append(torch.autograd.grad(f(*leaves)[1].sum(), leaves[at])[0])
        assert relative_error(*grads) < 1e-12


def test_an_empty_sequence_leaves_the_state_unchanged():
    a, v, x = (z.requires_grad_() for z in (torch.rand(3), torch.randn(2, 0, 3), torch.randn(2, 3)))
    states, last = recurrence(a, v, x)
    assert states.shape == (2, 0, 3)
    assert torch.equal(last, x)
    assert torch.autograd.grad(last.sum() + states.sum(), x)[0].eq(1).all()
    assert recurrence(a, v[:0], x[:0])[0].shape == (0, 0, 3)
    assert recurrence(a, torch.randn(0, 300, 3))[1].shape == (0, 3)


def test_it_starts_at_zero_without_a_state():
    a, v = torch.rand(2, 300, 3), torch.randn(2, 300, 3)
    for with_state, without in zip(recurrence(a, v, torch.zeros(2, 3)), recurrence(a, v), strict=True):
        assert torch.equal(with_state, without)


def test_a_zero_coefficient_restarts_the_recurrence():
    """States after a coefficient of zero do not depend on samples before it, to the bit."""
    a, v = torch.rand(700, 3), torch.randn(700, 3)
    for at in (0, 1, 64, 100, 699):
        reset = a.clone()
        reset[at] = 0
        other = v.clone()
        other[:at] = 7
        assert torch.equal(recurrence(reset, v)[0][at:], recurrence(reset, other)[0][at:])


def test_first_and_second_derivatives():
    for L, a_shape in ((1, (3,)), (5, (3,)), (5, (5, 1)), (300, (1,))):
        a, v, x = (z.requires_grad_() for z in (0.5 * complex_(*a_shape), complex_(L, 3), complex_(3)))
        options = {"fast_mode": L > 100, "atol": 1e-6}
        assert torch.autograd.gradcheck(recurrence, (a, v, x), **options)
        assert torch.autograd.gradgradcheck(recurrence, (a, v, x), **options)


@pytest.mark.parametrize("decay", [1e-6, 1e-3, 1e-1])
def test_single_precision_does_not_drift(decay):
    """20,000 samples in float32, with poles in float64, compared with all in float64."""
    a = torch.polar(torch.full((8,), -decay, dtype=torch.float64).exp(), torch.linspace(0, 3, 8, dtype=torch.float64))
    v = torch.randn(20_000, 8)
    exact, _ = naive_recurrence(a, v.double())
    states, last = recurrence(a, v)
    assert states.dtype == torch.complex64
    assert closeness(states, exact) < 1e-5
    assert torch.equal(last, states[-1])


def test_gradients_at_float32_are_those_at_float64():
    a, v = (
        torch.polar(torch.tensor([0.9999, 0.9]), torch.tensor([0.1, 2.0])),
        torch.randn(5000, 2, dtype=torch.complex64),
    )
    weights = [torch.randn(5000, 2, dtype=torch.complex64), torch.zeros(2)]
    single = results_and_gradients(recurrence, (a, v), weights)
    double = results_and_gradients(recurrence, (a.to(torch.complex128), v.to(torch.complex128)), weights)
    for actual, expected in zip(single, double, strict=True):
        assert closeness(actual, expected) < 3e-5


def test_memory_is_a_few_times_input_and_output():
    a, v, G = (torch.randn(*s, dtype=torch.complex64) for s in ((64,), (4, 8192, 64), (4, 8192, 64)))
    a = a / (a.abs() + 0.1)
    leaves = [a.requires_grad_(), v.requires_grad_()]
    size = 2 * v.numel() * v.element_size()

    def both():
        recurrence(*leaves)[0].backward(G)

    both()
    assert peak_memory(both) < 3 * size


def test_it_runs_under_torch_func_and_compiled():
    a, v = torch.rand(3, dtype=torch.float64), torch.randn(2, 9, 3, dtype=torch.float64)

    def loss(a, v):
        return recurrence(a, v)[0].square().sum()

    leaf = a.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, v), leaf)
    assert relative_error(torch.func.grad(loss)(a, v), expected) < 1e-12
    assert relative_error(torch.compile(recurrence, backend="aot_eager")(a, v)[0], recurrence(a, v)[0]) < 1e-12


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: recurrence([1.0], torch.ones(2, 3)), TypeError, "`a` must be a floating or complex tensor, got list"),
        (lambda: recurrence(torch.ones(3).int(), torch.ones(2, 3)), TypeError, "`a` must be .* got torch.int32"),
        (lambda: recurrence(torch.ones(3), torch.ones(2, 3).int()), TypeError, "`v` must be .* got torch.int32"),
        (lambda: recurrence(torch.ones(3), torch.ones(2, 3), 0.0), TypeError, "`x` must be .* got float"),
        (
            lambda: recurrence(torch.ones(1), torch.ones(2)),
            ValueError,
            "`dim` must be an axis of `v`, got -2",
        ),
        (lambda: recurrence(torch.ones(4), torch.ones(2, 3)), ValueError, r"must broadcast .* got \(4,\), \(2, 3\)"),
        (lambda: recurrence(torch.ones(5, 3), torch.ones(1, 3)), ValueError, "the length of `v`, got .* 1 samples"),
        (lambda: recurrence(torch.ones(3), torch.ones(2, 3), torch.ones(4)), ValueError, r"must broadcast .* \(4,\)"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=f"^recurrence: .*{message}"):
        call()


def test_forms_of_complex_numbers():
    """Pairs, interleaved numbers and rows agree, also for conjugate views and strided tensors."""
    z, s, a = (torch.randn(4, 3, dtype=torch.complex128) for _ in range(3))
    for w in (z, z.conj(), z.T.contiguous().T, copy.deepcopy(z)[:, [0, 2, 1]]):
        assert torch.equal(forms.from_pairs(forms.to_pairs(w)), w)
        assert torch.equal(forms.from_interleaved(forms.interleaved(w)), w)
        assert torch.equal(forms.interleaved(w, dim=-2).mT, forms.interleaved(w.mT))
        rows = forms.output_rows(w)
        product = (rows * forms.interleaved(s)).sum(-1)
        assert relative_error(product, 2 * (w * s).sum(-1).real) < 1e-12
        assert relative_error(forms.times_rows(rows, a), forms.output_rows(w * a)) < 1e-12
        turned = forms.multiply_interleaved(forms.to_pairs(w), forms.interleaved(s))
        assert relative_error(turned, forms.interleaved(w * s)) < 1e-12
        matrix = forms.add_rotation(torch.zeros(4, 6, 6, dtype=torch.float64), w)
        assert relative_error((matrix @ forms.interleaved(s)[..., None])[..., 0], forms.interleaved(w * s)) < 1e-12
    assert torch.equal(forms.from_pairs(forms.to_pairs(z).mT.contiguous().mT), z)
