"""Time stamps: a tensor of rates, an interval for each sample, in all modes; values, gradients, memory and errors."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import oracle
import ssmkit
from family import HEADS, SELECTIVE, SHARED, SSM, TIMED
from ssmkit import (
    LRU,
    S4,
    S4D,
    S5,
    S6,
    Mamba,
    MultiRate,
    Sequential,
    ShortConv,
    StateSpaceLayer,
    layers,
    sequences,
    systems,
)
from ssmkit.systems import timed
from ssmkit.testing import example_input, relative_error
from test_laws import BATCHES, leaves
from test_layers import with_numbers_of_its_own

EXACT = [name for name in TIMED if name in SSM | SHARED and "bilinear" not in name and "callable" not in name]


def intervals(*shape, dtype=torch.float64):
    """From a fifth of a step to five steps, log-uniform."""
    return 5 ** (2 * torch.rand(shape, dtype=dtype) - 1)


def steps(layer, u, state, rate):
    """A step per sample, with a system made for it."""
    rows = []
    for k, sample in enumerate(u.unbind(rate.ndim - 1)):
        y, state = layer.step(sample, state, layer.system(rate[..., k]))
        rows.append(y)
    return torch.stack(rows, rate.ndim - 1), state


def _modes_agree(name, dtype, batch, L, data):
    layer = TIMED[name]().to(dtype).eval()
    u, rate = example_input(layer, *batch, L), intervals(*batch, L, dtype=dtype)
    bound = 1e-10 if dtype == torch.float64 else 1e-4
    with torch.no_grad():
        y, rest = layer(u, layer.system(rate)), layer.initial_state(*batch, dtype=dtype)
        scanned, end = layer.scan(u, rest, layer.system(rate))
        stepped, last = steps(layer, u, rest, rate)
        assert relative_error(scanned, y) < bound
        assert relative_error(stepped, y) < bound
        split = data.draw(st.integers(0, L))
        left, state = layer.scan(u[(..., *_before(u, batch, split))], rest, layer.system(rate[..., :split]))
        right, both = layer.scan(u[(..., *_after(u, batch, split))], state, layer.system(rate[..., split:]))
        assert relative_error(torch.cat([left, right], len(batch)), y) < bound
        for a, b, c in zip(leaves(end), leaves(last), leaves(both), strict=True):
            assert relative_error(b, a) < bound
            assert relative_error(c, a) < bound


def _before(u, batch, split):
    return (slice(None, split), *[slice(None)] * (u.ndim - len(batch) - 1))


def _after(u, batch, split):
    return (slice(split, None), *[slice(None)] * (u.ndim - len(batch) - 1))


@pytest.mark.parametrize("name", TIMED)
@given(batch=BATCHES, L=st.integers(1, 40), data=st.data())
def test_modes_agree(name, batch, L, data):
    """forward = scan = steps, split anywhere."""
    _modes_agree(name, torch.float64, batch, L, data)


@pytest.mark.numerical
@pytest.mark.parametrize("name", TIMED)
@given(batch=BATCHES, L=st.integers(1, 40), data=st.data())
def test_modes_agree_in_float32(name, batch, L, data):
    _modes_agree(name, torch.float32, batch, L, data)


@pytest.mark.parametrize("name", TIMED)
@torch.no_grad()
def test_equal_intervals_are_the_regular_system(name, monkeypatch):
    """A tensor of ones, and of any other number, as that number; over more than one block."""
    monkeypatch.setattr(timed, "_BLOCK", 1)
    layer = TIMED[name]().double().eval()
    u = example_input(layer, 2, 150)
    for rate in (1.0, 0.3):
        found = layer(u, layer.system(torch.full((150,), rate, dtype=torch.float64)))
        assert relative_error(found, layer(u, layer.system(rate))) < 1e-10


@pytest.mark.parametrize("name", [name for name in TIMED if name in SSM | SHARED | SELECTIVE | HEADS])
@torch.no_grad()
def test_layers_are_the_loops_over_their_samples(name):
    layer, L = with_numbers_of_its_own(TIMED[name]().double()), 30
    u, rate = torch.randn(L, layer.d_input, dtype=torch.float64), intervals(L)
    loop = {S4D: oracle.timed_forward, S5: oracle.shared_forward, S6: oracle.selective}.get(type(layer), oracle.ssd)
    expected, last = (torch.from_numpy(v) for v in loop(layer, u.numpy(), rate.numpy()))
    y, state = layer.scan(u, layer.initial_state(), layer.system(rate))
    if last.is_complex():
        # One of each pair, real and imaginary parts interleaved; the oracle has both.
        last = torch.view_as_real(last[..., : layer.d_state // 2].contiguous()).flatten(-2)
    assert relative_error(y, expected) < 1e-12
    assert relative_error(state, last) < 1e-12


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_samples_that_are_left_out_leave_the_state_as_it_is(name):
    """Zero-order hold is exact: of an input that is constant over the gaps, one sample per gap gives the same state."""
    layer = TIMED[name]().double().eval()
    gaps = torch.randint(1, 6, (60,))
    u = torch.randn(2, 60, layer.d_input, dtype=torch.float64)
    whole, end = layer.scan(u.repeat_interleave(gaps, 1), layer.initial_state(2))
    y, state = layer.scan(u, layer.initial_state(2), layer.system(gaps.double()))
    assert relative_error(state, end) < 1e-10
    assert relative_error(y, whole[:, gaps.cumsum(0) - 1]) < 1e-10


@torch.no_grad()
def test_other_rules_are_not_exact():
    """So that the test before this one means something."""
    layer = S4D(3, 8, discretization="bilinear", dt_min=0.1, dt_max=0.2).double()
    u, gaps = torch.randn(1, 60, 3, dtype=torch.float64), torch.randint(1, 6, (60,))
    _, end = layer.scan(u.repeat_interleave(gaps, 1), layer.initial_state(1))
    assert relative_error(layer.scan(u, layer.initial_state(1), layer.system(gaps.double()))[1], end) > 1e-4


@pytest.mark.parametrize("name", TIMED)
def test_gradients_agree_and_reach_parameters_and_time_stamps(name, monkeypatch):
    """Over more than one block; with rates of their own for all rows, and rates that they share."""
    monkeypatch.setattr(timed, "_BLOCK", 1)
    layer = TIMED[name]().double().eval()
    for shape in ((2, 90), (90,)):
        u, rate = example_input(layer, 2, 90), intervals(*shape).requires_grad_()
        wanted = {**dict(layer.named_parameters()), "rate": rate}
        y, state = layer.scan(u, layer.initial_state(2), layer.system(rate))
        weights = [torch.randn_like(v) for v in (y, *leaves(state))]

        def gradients(y, *ends, weights=weights, wanted=wanted):
            total = sum((v * w).sum() for v, w in zip((y, *ends), weights, strict=False))
            return torch.autograd.grad(total, list(wanted.values()), retain_graph=True)

        stepped, last = steps(layer, u, layer.initial_state(2), rate.expand(2, 90))
        scanned, looped = gradients(y, *leaves(state)), gradients(stepped, *leaves(last))
        for label, a, b in zip(wanted, scanned, looped, strict=True):
            assert a.abs().max() > 0, label
            assert relative_error(a, b) < 1e-8, label
        for label, a, b in zip(wanted, gradients(layer(u, layer.system(rate))), gradients(y), strict=True):
            assert relative_error(a, b) < 1e-10, label


@pytest.mark.parametrize("name", ["S4D", "S4D, tied channels", "S5", "S6", "SSD"])
def test_gradients_of_the_time_stamps_are_those_of_differences(name):
    layer = TIMED[name]().double()
    u = example_input(layer, 1, 5)

    def of(rate):
        return layer(u, layer.system(rate))

    assert torch.autograd.gradcheck(of, (intervals(5).requires_grad_(),), atol=1e-6)


@pytest.mark.parametrize("rule", [systems.zoh, systems.bilinear])
@pytest.mark.parametrize("make", [S4D, S5])
def test_a_rule_of_ones_own_does_as_well(make, rule):
    """It has no short form, and is differentiated as it is."""
    layer = make(3, 8, discretization=rule).double()
    other = copy.deepcopy(layer)
    other.discretization = lambda Lambda, B, dt: rule(Lambda, B, dt)
    u, rate, found = torch.randn(2, 70, 3, dtype=torch.float64), intervals(2, 70), []
    for each in (layer, other):
        y = each(u, each.system(rate))
        found.append((y, *torch.autograd.grad(y.square().sum(), list(each.parameters()))))
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < 1e-10


@pytest.mark.parametrize("rule", [systems.zoh, systems.bilinear])
@torch.no_grad()
def test_a_pole_at_zero_integrates(rule):
    one = torch.ones(1, 1, dtype=torch.complex128)
    rate, u = intervals(40), torch.randn(1, 40, 1, dtype=torch.float64)
    dt, D = torch.full((1,), 0.5), torch.zeros(1, 1, dtype=torch.float64)
    system = systems.TimedDiagonal(0 * one, one, one[None] / 2, D, dt, rate, rule)
    expected = (0.5 * rate * u[0, :, 0]).cumsum(0)
    assert relative_error(system.forward(u)[0, :, 0], expected) < 1e-12
    shared = systems.TimedShared(0 * one[0], one, one, D[0], dt, rate, rule)
    assert relative_error(shared.forward(u)[0, :, 0], expected) < 1e-12


@pytest.mark.parametrize("name", ["S4D, slow", "S4D, fast", "S4D, fout", "S5, slow", "S5, fast"])
@torch.no_grad()
def test_float32_holds_over_long_sequences(name):
    layer = TIMED[name]()
    u, rate = torch.randn(1, 20_000, layer.d_input), intervals(20_000, dtype=torch.float32)
    double = copy.deepcopy(layer).double()
    assert relative_error(layer(u, layer.system(rate)), double(u.double(), double.system(rate))) < 1e-5


@pytest.mark.parametrize("name", ["S4D", "S5", "S6", "SSD", "Mamba", "S4Block of S5"])
@torch.no_grad()
def test_rates_broadcast_over_the_batch(name):
    layer = TIMED[name]().double().eval()
    u, rate = example_input(layer, 2, 3, 20), intervals(3, 20)
    y = layer(u, layer.system(rate.expand(2, 3, 20)))
    assert relative_error(layer(u, layer.system(rate)), y) < 1e-12
    assert relative_error(layer(u, layer.system(rate[None])), y) < 1e-12
    state = layer.initial_state(2, 3)
    stepped, _ = layer.step(u[:, :, 0], state, layer.system(rate[:, 0]))
    assert relative_error(stepped, y[:, :, 0]) < 1e-12
    one, _ = layer.step(u[:, :, 0], state, layer.system(rate[1, 0]))
    assert relative_error(one[:, 1], y[:, 1, 0]) < 1e-12
    # Rates that all rows share are discretised once.
    if isinstance(layer, ssmkit.StateSpaceLayer):
        assert timed.fit_rate("", layer.system(rate[0]), (2, 3, 20), time=True).time_stamps.shape == (1, 20)
    # A row of one's own in the second axis alone.
    y = layer(u, layer.system(rate[:2, None]))
    assert relative_error(y[1], layer(u[1], layer.system(rate[1]))) < 1e-12


@pytest.mark.parametrize("name", ["S4D", "S5", "S6", "SSD"])
@torch.no_grad()
def test_a_system_owns_what_it_was_made_of(name):
    layer = TIMED[name]().double().eval()
    u, rate = example_input(layer, 2, 20), intervals(2, 20)
    system = layer.system(rate)
    y = layer(u, system)
    rate.mul_(2)
    for parameter in layer.parameters():
        parameter.add_(0.1)
    assert torch.equal(layer(u, system), y)
    assert torch.equal(layer(u, copy.deepcopy(system)), y)


@pytest.mark.parametrize("name", TIMED)
@pytest.mark.parametrize("batch", [(), (2, 3), (0,)])
def test_empty_sequences_work(name, batch):
    layer = TIMED[name]().eval()
    for L in (0, 4) if 0 in batch else (0,):
        u, rate = example_input(layer, *batch, L), intervals(*batch, L, dtype=torch.float32).requires_grad_()
        y = layer(u, layer.system(rate))
        assert y.shape[:-1] == (*batch, L)
        y.sum().backward()
        assert not rate.grad.any()


@torch.no_grad()
def test_a_batch_without_rows_still_wants_its_rates():
    for L in (0, 4):
        with pytest.raises(ValueError, match=f"^S4D: the rates of `system` must have shape \\(0, {L}\\)"):
            S4D(3)(torch.zeros(0, L, 3), S4D(3).system(torch.ones(5)))


def test_under_autocast_and_torch_func_it_is_the_same():
    for layer in (S4D(4, 8), S5(4, 8)):
        u, rate = torch.randn(2, 70, 4), intervals(2, 70, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(u, layer.system(rate)), layer.float()(u, layer.system(rate)))

        def loss(r, layer=layer, u=u):
            return layer(u, layer.system(r)).square().sum()

        (expected,) = torch.autograd.grad(loss(rate.requires_grad_()), [rate])
        assert relative_error(torch.func.grad(loss)(rate.detach()), expected) < 1e-5


@pytest.mark.parametrize("name", ["S4D", "S5"])
def test_it_compiles(name):
    layer = TIMED[name]()
    u, rate = torch.randn(2, 20, 3), intervals(2, 20, dtype=torch.float32).requires_grad_()
    found = []
    for run in (layer.forward, torch.compile(layer.forward, backend="aot_eager")):
        y = run(u, layer.system(rate))
        found.append((y, *torch.autograd.grad(y.square().sum(), [rate, layer.B])))
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < 1e-5


@torch.no_grad()
def test_any_mix_of_dtypes_is_taken():
    for weights in (torch.float32, torch.float64, torch.bfloat16):
        for sequence in (torch.float32, torch.float64, torch.bfloat16):
            for layer in (S4D(3, 8), S5(3, 8), S6(3, 2), layers.SSD(4, 2, headdim=2)):
                layer, u = layer.to(weights), torch.randn(2, 9, layer.d_input).to(sequence)
                system = layer.system(torch.ones(9, dtype=torch.float16))
                state = layer.initial_state(2)
                y, after = layer.scan(u, state, system)
                assert (y.dtype, after.dtype) == (sequence, state.dtype)
                assert relative_error(y, layer(u)) < 2e-2


@torch.no_grad()
def test_padded_rows_have_rates_of_their_own():
    model = Sequential(S4D(3, 4), nn.GELU(), S6(3, 2)).double()
    u, rate = torch.randn(2, 9, 3, dtype=torch.float64), intervals(2, 9)
    y = sequences.forward_padded(model, u, [9, 4], system=model.system(rate))
    assert relative_error(y[1, :4], model(u[1, :4], model.system(rate[1, :4]))) < 1e-12
    assert not y[1, 4:].any()
    state, system = model.initial_state(2), model.system(rate)
    y, after = model.step(u[:, 0], state, model.system(rate[:, 0]))
    begun = torch.tensor([True, False])
    again, _ = sequences.step_packed(model, u[:, 0], after, begun, system=model.system(rate[:, 0]))
    assert relative_error(again[0], y[0]) < 1e-12
    for name, call in (
        ("forward_padded", lambda: sequences.forward_padded(model, u, [9, 4], side="left", system=system)),
        ("scan_padded", lambda: sequences.scan_padded(model, u, state, [9, 9], system=system)),
        ("forward_packed", lambda: sequences.forward_packed(model, u[0], [0, 9], system=model.system(rate[0]))),
        ("scan_packed", lambda: sequences.scan_packed(model, u[0], state, [0], system=model.system(rate[0]))),
    ):
        with pytest.raises(ValueError, match=f"^{name}: the rate of `system` must be a number, got a tensor, which"):
            call()


class Own(StateSpaceLayer):
    """A layer that does not know of time stamps."""

    def __init__(self):
        super().__init__(3, 3, (3, 4))
        self.inside = S4D(3, 4)

    def discretize(self, rate):
        return self.inside.discretize(rate)


def test_bad_input_gets_a_sentence():
    u, rate, layer = torch.randn(2, 9, 3), torch.ones(2, 9), S4D(3, 8)
    state, many = layer.initial_state(2), "`system` must have shape \\(2, 9\\) or its last axes"
    for call, error, message in (
        (lambda: S4(3).system(rate), ValueError, "S4: `rate` must be a number, got a tensor: its matrix is not"),
        (
            lambda: LRU(3).system(rate),
            ValueError,
            "LRU: `rate` must be 1, since this .*, got a tensor; S5 and",
        ),
        (lambda: ShortConv(3).system(rate), ValueError, "ShortConv: `rate` must be 1, as the taps .*, got a tensor"),
        (lambda: Own().system(rate), ValueError, "Own: `rate` must be a number, as this layer takes no time stamps"),
        (lambda: MultiRate(3, S4D(6)).system(rate), ValueError, "MultiRate: `rate` must be 1, got a tensor: frames"),
        (lambda: Sequential(nn.Linear(3, 3), S4(3)).system(rate), ValueError, "S4: `rate` must be a number"),
        (lambda: S4D(3, bidirectional=True).system(rate), ValueError, "S4D: `rate` must .* not causal, got a tensor"),
        (lambda: S5(3, 4, bidirectional=True).system(rate), ValueError, "S5: `rate` must .* not causal, got a tensor"),
        (lambda: layer.system(rate.long()), TypeError, "S4D: `rate` must be a number or a .* got torch.int64"),
        (lambda: Sequential(nn.GELU()).system(rate.long()), TypeError, "Pointwise: `rate` must be a number or a"),
        (lambda: layer.system(torch.ones(9, dtype=torch.cfloat)), TypeError, "S4D: `rate` .* got torch.complex64"),
        (lambda: layer.system(float("nan")), ValueError, "S4D: `rate` must be a positive number, got nan"),
        (lambda: layer.system([1.0] * 9), TypeError, "S4D: `rate` must be a number, got"),
        (
            lambda: layer(u, layer.system(rate[:, :8])),
            ValueError,
            f"S4D: the rates of {many}.* got \\(2, 8\\)",
        ),
        (
            lambda: layer(u, layer.system(rate[:, :1])),
            ValueError,
            f"S4D: the rates of {many}.* got \\(2, 1\\)",
        ),
        (lambda: layer(u, layer.system(rate[0, 0])), ValueError, f"S4D: .*{many}.* got \\(\\); a rate for all samples"),
        (lambda: layer(u, layer.system(rate[:, None])), ValueError, f"S4D: .*{many}.* got \\(2, 1, 9\\)"),
        (lambda: layer(u, layer.system(torch.ones(3, 9))), ValueError, f"S4D: .*{many}.* got \\(3, 9\\)"),
        (lambda: layer.scan(u, state, layer.system(rate[0, :8])), ValueError, f"S4D: .*{many}.* got \\(8,\\)"),
        (lambda: S6(3)(u, S6(3).system(rate[:, :8])), ValueError, f"S6: .*{many}.* got \\(2, 8\\)"),
        (lambda: Mamba(3)(u, Mamba(3).system(rate[:, :8])), ValueError, f"S6: .*{many}.* got \\(2, 8\\)"),
        (
            lambda: layer.step(u[:, 0], state, layer.system(rate)),
            ValueError,
            "S4D: the rates of `system` must have the batch shape \\(2,\\) .* got \\(2, 9\\)",
        ),
        (lambda: layer.step(u[:, 0], state, layer.system(torch.ones(3))), ValueError, "S4D: .* batch shape .*\\(3,\\)"),
        (
            lambda: layer.kernel(9, layer.system(rate)),
            ValueError,
            "S4D: `kernel` needs a system of one rate, got",
        ),
        (lambda: S4(3, 8)(u, layer.system(rate)), ValueError, "S4: `system` must be .*, got a TimedDiagonal"),
        (lambda: LRU(3, 8)(u, S5(3, 8).system(rate)), ValueError, "LRU: `system` must be .*, got a TimedShared"),
    ):
        with pytest.raises(error, match=f"^({message})"):
            call()


@pytest.mark.parametrize("make", [lambda: S4D(4, 8), lambda: S5(4, 8), lambda: S6(4, 2), lambda: Mamba(4, 2)])
def test_compiled_steps_and_programs_refuse_them(make):
    model = Sequential(nn.Linear(4, 4), make())
    system = model.system(torch.tensor(0.5))
    with pytest.raises(ValueError, match="^compile_step: the rate of `system` must be a number, got a tensor"):
        ssmkit.compile_step(model, system)
    pytest.importorskip("numba")
    with pytest.raises(ValueError, match="^Engine: the rate of `system` must be a number, got a tensor, which is"):
        ssmkit.streaming.Engine(model, system)
