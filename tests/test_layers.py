"""What the options of the state-space layers do, beyond the laws that all keep."""

import copy

import pytest
import torch

import ssmkit
from ssmkit import S4, S4D, ops
from ssmkit.testing import relative_error

BOTH = pytest.mark.parametrize("cls", [S4, S4D])


@BOTH
def test_defaults(cls):
    layer = cls(256)
    assert (layer.d_state, layer.init, layer.n_ssm, layer.channels) == (64, "legs", 256, 1)
    dt = layer.log_dt.exp()
    assert dt.shape == (256,)
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 1e-1 * 1.001
    u = torch.randn(2, 100, 256)
    assert layer(u).shape == u.shape
    assert cls.__name__ in repr(layer)
    assert "256, d_state=64" in repr(layer)


@BOTH
@pytest.mark.parametrize("N", [2, 6, 32])
def test_d_state(cls, N):
    layer = cls(3, N)
    assert layer.initial_state(5).shape == (5, 3, N)
    assert layer.C.shape == (1, 3, N // 2, 2)


@BOTH
def test_forward_is_the_kernel(cls):
    layer = cls(3, 8, channels=2, dtype=torch.float64)
    u = torch.randn(2, 40, 3, dtype=torch.float64)
    direct = (layer.D * u[:, :, None]).flatten(-2)
    assert relative_error(layer(u), ops.naive_causal_conv(u, layer.kernel(40)) + direct) < 1e-12


@BOTH
def test_channels_stand_outside_and_features_inside(cls):
    """Channel c of feature h is output c·H + h, and is the single-channel layer with C[c] and D[c]."""
    layer = cls(3, 8, channels=2, dtype=torch.float64)
    u = torch.randn(1, 20, 3, dtype=torch.float64)
    for c in range(2):
        single = cls(3, 8, dtype=torch.float64)
        weights = {
            name: value[c : c + 1] if name in ("C", "D") else value for name, value in layer.state_dict().items()
        }
        single.load_state_dict(weights)
        assert relative_error(single(u), layer(u)[..., 3 * c : 3 * c + 3]) < 1e-12


@BOTH
@pytest.mark.parametrize("tie_dt", [False, True])
def test_tied_systems(cls, tie_dt):
    """Feature h uses system h mod n_ssm: an untied layer with the same systems spelt out is the same map."""
    tied = cls(6, 8, n_ssm=2, tie_dt=tie_dt, dtype=torch.float64)
    assert tied.log_dt.shape == ((2,) if tie_dt else (6,))
    assert tied.A_imag.shape == (2, 4)
    with torch.no_grad():
        for parameter in tied.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    untied = cls(6, 8, dtype=torch.float64)
    per_feature = torch.arange(6) % 2
    untied.load_state_dict(
        {
            name: value[per_feature] if value.shape[0] == 2 and name not in ("C", "D") else value
            for name, value in tied.state_dict().items()
        }
    )
    u = torch.randn(2, 150, 6, dtype=torch.float64)
    assert relative_error(tied(u), untied(u)) < 1e-12
    a, _ = tied.scan(u, tied.initial_state(2, dtype=torch.float64))
    b, _ = untied.scan(u, untied.initial_state(2, dtype=torch.float64))
    assert relative_error(a, b) < 1e-12


@BOTH
def test_a_fully_tied_system_is_computed_once(cls):
    system = cls(16, 8, n_ssm=1, tie_dt=True).system()
    A = system.dense.A if isinstance(system, ssmkit.systems.DiscreteDPLR) else system.a
    assert len(A) == 1
    assert system.kernel(10).shape == (1, 16, 10)


@BOTH
def test_rate_runs_a_model_at_another_sampling_rate(cls):
    """At twice the step, on every other sample of a smooth signal, the output is every other sample of the output."""
    layer = cls(2, 16, init="legs", dt_min=1e-3, dt_max=1e-2, dtype=torch.float64)
    t = torch.arange(4000, dtype=torch.float64)
    u = torch.stack([torch.sin(t / 150), torch.cos(t / 200) - 1], -1)[None]
    full, half = layer(u)[:, ::2], layer(u[:, ::2], layer.system(rate=2.0))
    assert relative_error(half, full) < 0.01
    assert relative_error(layer(u[:, ::2]), full) > 0.1
    state = layer.initial_state(1, dtype=torch.float64)
    scanned, _ = layer.scan(u[:, ::2], state, layer.system(rate=2.0))
    assert relative_error(scanned, half) < 1e-10


@BOTH
def test_rate_multiplies_dt(cls):
    layer = cls(2, 8, dtype=torch.float64)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.log_dt.add_(torch.tensor(2.0).log())
    assert relative_error(layer.system(rate=2.0).kernel(30), other.kernel(30)) < 1e-6


@BOTH
def test_dropout_follows_training(cls):
    layer = cls(64, 4, dropout=0.5)
    with torch.no_grad():
        layer.D.fill_(1.0)
        layer.C.zero_()
    u = torch.ones(4, 50, 64)
    state = layer.initial_state(4)
    for y in (layer(u), layer.scan(u, state)[0], layer.step(u[:, 0], state)[0]):
        assert ((y == 0) | ((y - 2).abs() < 1e-5)).all()
        assert abs((y == 0).float().mean() - 0.5) < 0.15
    layer.eval()
    for y in (layer(u), layer.scan(u, state)[0], layer.step(u[:, 0], state)[0]):
        assert relative_error(y, torch.ones_like(y)) < 1e-5


@BOTH
def test_device_and_dtype_are_keyword_only(cls):
    layer = cls(3, 8, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}
    with pytest.raises(TypeError):
        cls(3, 8, "legs")


@BOTH
@pytest.mark.parametrize("L", [1, 2, 5, 64, 1000])
def test_any_length_at_any_time(cls, L):
    """A shorter input's output is the beginning of a longer one's, whatever was run before."""
    layer = cls(3, 8, dtype=torch.float64)
    u = torch.randn(1, 1000, 3, dtype=torch.float64)
    whole = layer(u)
    layer(u[:, :77])
    assert relative_error(layer(u[:, :L]), whole[:, :L]) < 1e-10


@BOTH
def test_float64_input_is_not_rounded(cls):
    layer = cls(3, 8)
    u = torch.randn(1, 30, 3)
    y = layer(u.double())
    assert y.dtype == torch.float64
    assert relative_error(y, layer(u).double()) < 1e-5


@BOTH
def test_a_system_is_a_value_of_the_weights(cls):
    """Made once, it stays what it was; gradients flow through it."""
    layer = cls(3, 8)
    u, state = torch.randn(2, 3), layer.initial_state(2)
    system = layer.system()
    before, _ = layer.step(u, state, system)
    with torch.no_grad():
        layer.C.mul_(3)
        layer.B.mul_(2)
    again, _ = layer.step(u, state, system)
    assert torch.equal(before, again)
    assert not torch.equal(before, layer.step(u, state)[0])
    y, _ = layer.step(u, state, layer.system())
    y.sum().backward()
    assert all(p.grad is not None for name, p in layer.named_parameters() if name not in ("D",))


@BOTH
def test_truncated_backpropagation(cls):
    layer = cls(3, 8)
    optimizer = torch.optim.AdamW(ssmkit.param_groups(layer, 1e-2))
    state = layer.initial_state(2)
    target = torch.randn(2, 120, 3)
    for chunk in target.split(40, 1):
        y, state = layer.scan(chunk, ssmkit.states.detach(state))
        optimizer.zero_grad()
        (y - chunk).square().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in layer.parameters())


@BOTH
def test_layers_train_with_every_optimiser_that_wants_real_parameters(cls):
    layer = cls(3, 8)
    for optimizer in (
        torch.optim.AdamW(layer.parameters(), fused=True),
        torch.optim.SGD(layer.parameters(), lr=1e-3, momentum=0.9),
    ):
        optimizer.zero_grad()
        layer(torch.randn(1, 20, 3)).square().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in layer.parameters())


BAD = {
    "d_state odd": (lambda c: c(4, 7), ValueError, "must be a positive even integer .*conjugate pairs.*, got 7"),
    "d_state zero": (lambda c: c(4, 0), ValueError, "must be a positive even integer .*, got 0"),
    "d_state negative": (lambda c: c(4, -2), ValueError, "must be a positive even integer .*, got -2"),
    "d_state float": (lambda c: c(4, 8.0), TypeError, r"`d_state` must be an integer, got 8.0 \(float\)"),
    "d_model zero": (lambda c: c(0), ValueError, "`d_model` must be at least 1, got 0"),
    "dt order": (lambda c: c(4, dt_min=0.1, dt_max=0.1), ValueError, "`dt_min` must be less than `dt_max`, got 0.1"),
    "dt sign": (lambda c: c(4, dt_min=-1.0), ValueError, "`dt_min` must be a positive number"),
    "n_ssm": (lambda c: c(4, n_ssm=3), ValueError, "`n_ssm` must divide `d_model`, got 3 and 4"),
    "channels": (lambda c: c(4, channels=0), ValueError, "`channels` must be at least 1"),
    "dropout": (lambda c: c(4, dropout=1.0), ValueError, "`dropout` must be at least 0 and less than 1"),
    "complex dtype": (lambda c: c(4, dtype=torch.complex64), ValueError, "`dtype` must be a real floating dtype"),
    "init": (lambda c: c(4, init="legss"), ValueError, "unknown `init` 'legss'.*Did you mean 'legs'"),
    "width": (lambda c: c(4)(torch.randn(2, 9, 5)), ValueError, r"last axis of `u` must be 4, got shape \(2, 9, 5\)"),
    "rank of input": (lambda c: c(4)(torch.randn(4)), ValueError, r"`u` must have shape \(\*, length, 4\).*use `step`"),
    "integers": (lambda c: c(4)(torch.ones(2, 9, 4).long()), TypeError, "must be a real floating tensor.*nn.Embedding"),
    "complex input": (lambda c: c(4)(torch.ones(2, 9, 4) + 0j), TypeError, "must be a real floating tensor"),
    "a list": (lambda c: c(4)([1.0]), TypeError, "`u` must be a tensor, got list"),
    "step width": (lambda c: c(4).step(torch.randn(2, 5), c(4).initial_state(2)), ValueError, "last axis of `u`"),
    "step integers": (lambda c: c(4).step(torch.ones(2, 4).int(), c(4).initial_state(2)), TypeError, "real floating"),
    "state of another batch": (
        lambda c: c(4).step(torch.randn(2, 4), c(4).initial_state(3)),
        ValueError,
        r"`state` must have shape \(2, 4, 64\), got shape \(3, 4, 64\); a state belongs to one layer",
    ),
    "state of another layer": (
        lambda c: c(4).scan(torch.randn(2, 9, 4), c(4, 8).initial_state(2)),
        ValueError,
        r"`state` must have shape \(2, 4, 64\), got shape \(2, 4, 8\)",
    ),
    "state of a container": (
        lambda c: c(4).scan(torch.randn(2, 9, 4), ()),
        ValueError,
        "`state` must have shape .* got a tuple",
    ),
    "system of another size": (
        lambda c: c(4).scan(torch.randn(2, 9, 4), c(4).initial_state(2), c(4, 8).system()),
        ValueError,
        r"`system` must be what this layer's `system\(\)` returns.*\(1, 4, 64\), got .*\(1, 4, 8\)",
    ),
    "system of another kind": (
        lambda c: c(4)(torch.randn(2, 9, 4), (S4D if c is S4 else S4)(4).system()),
        ValueError,
        "`system` must be what this layer's",
    ),
    "no system": (
        lambda c: c(4).step(torch.randn(2, 4), c(4).initial_state(2), ()),
        ValueError,
        "`system` must be what this layer's .* got a tuple",
    ),
    "rate of another kind": (lambda c: c(4).system(rate="a"), TypeError, r"`rate` must be a number, got 'a' \(str\)"),
    "rate": (lambda c: c(4).system(rate=0.0), ValueError, "`rate` must be a positive number"),
    "kernel length": (lambda c: c(4).kernel(-1), ValueError, "`L` must be at least 0"),
}


@BOTH
@pytest.mark.parametrize("case", BAD)
def test_bad_input(cls, case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=f"^{cls.__name__}: .*{message}"):
        call(cls)


def test_discretisation_names():
    with pytest.raises(ValueError, match="S4: `discretization` must be 'bilinear', got 'zoh'.*S4D has 'zoh' too"):
        S4(4, discretization="zoh")
    with pytest.raises(ValueError, match="S4D: unknown `discretization` 'bilinar'.*Did you mean 'bilinear'"):
        S4D(4, discretization="bilinar")


@pytest.mark.parametrize("option", [{}, {"channels": 3}, {"n_ssm": 2, "tie_dt": True}])
@pytest.mark.parametrize("cls", [S4, S4D])
def test_a_stream_does_not_see_how_many_run_beside_it(cls, option):
    """Few streams step by products and sums, many by matrix products: states, outputs and gradients are the same."""
    layer = cls(4, 8, **option).double()
    system = layer.system()
    u = torch.randn(3, 2, 4, 4, dtype=torch.double)

    def run(batch):
        state, out = layer.initial_state(*batch[0].shape[:-1]), []
        for sample in batch:
            y, state = layer.step(sample, state, system)
            out.append(y)
        return torch.stack(out), state

    y, state = run(u)
    (loss_gradient,) = torch.autograd.grad(y.square().sum(), layer.log_dt, retain_graph=True)
    single = [[run(u[:, i, j]) for j in range(4)] for i in range(2)]
    for i, row in enumerate(single):
        for j, (alone, end) in enumerate(row):
            assert torch.allclose(y[:, i, j], alone)
            assert torch.allclose(state[i, j], end)
    total = sum(alone.square().sum() for row in single for alone, _ in row)
    (expected,) = torch.autograd.grad(total, layer.log_dt)
    assert torch.allclose(loss_gradient, expected)


@BOTH
def test_a_system_holds_all_that_it_was_made_of(cls):
    """Handed in after the weights have changed, it gives what it gave before, in all three modes: D is in it too."""
    layer, u = cls(3, 8).double(), torch.randn(2, 7, 3, dtype=torch.double)
    system, before = layer.system(), layer(u)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1)
    stepped, _ = layer.step(u[:, 0], layer.initial_state(2), system)
    scanned, _ = layer.scan(u, layer.initial_state(2), system)
    assert torch.allclose(layer(u, system), before)
    assert torch.allclose(scanned, before)
    assert torch.allclose(stepped, before[:, 0])
