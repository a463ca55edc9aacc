"""The options of the state-space layers, beyond the laws for all layers."""

import inspect
import math

import pytest
import torch
from torch import nn

import oracle
import ssmkit
from family import BIDIRECTIONAL, SSM
from ssmkit import S4, S4D, ops
from ssmkit.testing import relative_error

BOTH = pytest.mark.parametrize("cls", [S4, S4D])

LAYERS = {**SSM, **{f"bidirectional {name}": make for name, make in BIDIRECTIONAL.items()}}
# Measured with ten seeds: 4e-14 and 8e-7.
ORACLE_BOUNDS = {torch.float64: 1e-12, torch.float32: 3e-6}


def with_numbers_of_its_own(layer):
    """Changes every number of a layer, so that no two features, poles or outputs are equal."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.eval()


@pytest.mark.parametrize(
    ("dtype", "rate"), [(torch.float64, 1.0), (torch.float64, 0.3), (torch.float64, 2.5), (torch.float32, 1.0)]
)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_layers_are_the_dense_systems_of_their_parameters(name, rate, dtype):
    """Step sizes, poles, gains, the low-rank term, the rule, tied systems, channels, both directions and D."""
    layer, L = with_numbers_of_its_own(LAYERS[name]().to(dtype)), 24
    system = layer.system(rate)
    expected = torch.from_numpy(oracle.kernel(layer, L, rate))
    assert relative_error(layer.kernel(L, system), expected) < ORACLE_BOUNDS[dtype]
    u = torch.randn(L, layer.d_model, dtype=dtype)
    expected = torch.from_numpy(oracle.forward(layer, u.double().numpy(), rate))
    assert relative_error(layer(u, system), expected) < ORACLE_BOUNDS[dtype]


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_change_of_a_parameter_by_a_thousandth_is_noticed(name):
    """Also of step sizes: the error is then far above the bound of the test above."""
    layer, L = with_numbers_of_its_own(LAYERS[name]().double()), 24
    # Slower poles would hardly have an effect within so few samples.
    layer.log_A_real.clamp_(min=-1)
    layer.log_dt.clamp_(min=math.log(1e-2))
    u = torch.randn(L, layer.d_model, dtype=torch.float64)
    y, u = layer(u), u.numpy()
    assert relative_error(y, torch.from_numpy(oracle.forward(layer, u))) < ORACLE_BOUNDS[torch.float64]
    for label, parameter in layer.named_parameters():
        kept = parameter.clone()
        # Added to a logarithm, it makes a step or a pole larger by a thousandth.
        parameter.add_(1e-3) if label.startswith("log") else parameter.mul_(1.001)
        error = relative_error(y, torch.from_numpy(oracle.forward(layer, u)))
        assert error > 1e3 * ORACLE_BOUNDS[torch.float64], label
        parameter.copy_(kept)


DEFAULTS = {
    S4: {
        "d_state": 64,
        "init": "legs",
        "rank": None,
        "dt_min": 1e-3,
        "dt_max": 1e-1,
        "discretization": "bilinear",
        "n_ssm": None,
        "tie_dt": False,
        "channels": 1,
        "bidirectional": False,
        "dropout": 0.0,
        "dtype": None,
    },
    S4D: {
        "d_state": 64,
        "init": "legs",
        "dt_min": 1e-3,
        "dt_max": 1e-1,
        "discretization": "zoh",
        "n_ssm": None,
        "tie_dt": False,
        "channels": 1,
        "bidirectional": False,
        "dropout": 0.0,
        "dtype": None,
    },
    ssmkit.S4Block: {"layer": S4, "glu": False, "ff": 2, "dropout": 0.0, "tie_dropout": False, "dtype": None},
    ssmkit.TiedDropout: {"p": 0.5},
    ssmkit.DownPool: {"pool": 4, "expand": 2, "dtype": None},
    ssmkit.UpPool: {"pool": 4, "expand": 2, "dtype": None},
    ssmkit.MultiRate: {"pool": 4, "expand": 2, "dtype": None},
    ssmkit.param_groups: {"weight_decay": 0.0, "ssm_lr": 1e-3},
    ssmkit.compile_step: {"system": None},
    ssmkit.initializers.poles: {"rank": None},
    ssmkit.hippo.low_rank_correction: {"measure": None},
    ssmkit.states.move: {"dtype": None},
    ops.krylov: {"dtype": None},
    ssmkit.systems.Diagonal.discretize: {"method": "zoh", "dtype": torch.float32, "D": None},
    ssmkit.systems.DPLR.discretize: {"dtype": torch.float32, "D": None},
    ssmkit.systems.Dense.discretize: {"method": "bilinear", "dtype": None, "D": None},
}


@pytest.mark.parametrize("call", DEFAULTS, ids=lambda call: call.__qualname__)
def test_default_arguments(call):
    """A change of a default would change the results of users' code."""
    parameters = inspect.signature(call).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    assert defaults.pop("device", None) is None
    assert defaults == DEFAULTS[call]


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
def test_outputs_are_ordered_by_channel_and_feature(cls):
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
    """Feature h uses system h mod n_ssm: an untied layer with repeated systems gives the same output."""
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
    """At twice the step, every other sample of a smooth input gives every other sample of the output."""
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
    """The output of a shorter input is the beginning of that of a longer one, and depends on no earlier call."""
    layer = cls(3, 8, dtype=torch.float64)
    u = torch.randn(1, 1000, 3, dtype=torch.float64)
    whole = layer(u)
    layer(u[:, :77])
    assert relative_error(layer(u[:, :L]), whole[:, :L]) < 1e-10


@BOTH
@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
@pytest.mark.parametrize("sequence", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
def test_outputs_have_the_dtype_of_the_input_and_states_keep_their_own(cls, batch, weights, sequence, kept):
    """For any dtype of the weights, with few streams and with many; `forward` does not round float64 input."""
    layer = cls(3, 8, dtype=weights)
    u = torch.randn(batch, 30, 3, dtype=sequence)
    y, state = layer(u), layer.initial_state(batch, dtype=kept)
    scanned, after = layer.scan(u, state)
    stepped, next_state = layer.step(u[:, 0], state)
    assert {y.dtype, scanned.dtype, stepped.dtype} == {sequence}
    assert {state.dtype, after.dtype, next_state.dtype} == {kept}
    assert relative_error(scanned, y) < 1e-5
    assert relative_error(stepped, y[:, 0]) < 1e-5
    with torch.no_grad():
        layer.C.zero_()
        layer.D.fill_(1.0)
    assert relative_error(layer(u), u) < (1e-14 if sequence == torch.float64 else 1e-6)


@BOTH
def test_a_system_is_a_value_of_the_weights(cls):
    """It does not change, and gradients flow through it."""
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
def test_layers_train_with_every_optimiser_that_needs_real_parameters(cls):
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
        r"`system` must be what this layer's `system\(\)` returns.*state \(4, 64\), got .*state \(4, 8\)",
    ),
    "system of another kind": (
        lambda c: c(4)(torch.randn(2, 9, 4), (S4D if c is S4 else S4)(4).system()),
        ValueError,
        "`system` must be what this layer's",
    ),
    "system of a causal layer": (
        lambda c: c(4, bidirectional=True)(torch.randn(2, 9, 4), c(4).system()),
        ValueError,
        r"`system` must be what this layer's .* a TwoSided of widths 4 and 4 and no state, got .* state \(4, 64\)",
    ),
    "system that looks ahead": (
        lambda c: c(4).scan(torch.randn(2, 9, 4), c(4).initial_state(2), c(4, bidirectional=True).system()),
        ValueError,
        "`system` must be what this layer's .* got a TwoSided of widths 4 and 4 and no state",
    ),
    "both ways, of another size": (
        lambda c: c(4, bidirectional=True)(torch.randn(2, 9, 4), c(4, 8, bidirectional=True).system()),
        ValueError,
        "`system` must be what this layer's",
    ),
    "both ways, of another kind": (
        lambda c: c(4, bidirectional=True)(
            torch.randn(2, 9, 4), (S4D if c is S4 else S4)(4, bidirectional=True).system()
        ),
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
    with pytest.raises(ValueError, match="S4: `discretization` must be 'bilinear', .* got 'zoh'; S4D also has 'zoh'"):
        S4(4, discretization="zoh")
    with pytest.raises(ValueError, match="S4D: unknown `discretization` 'bilinar'.*Did you mean 'bilinear'"):
        S4D(4, discretization="bilinar")


@pytest.mark.parametrize("option", [{}, {"channels": 3}, {"n_ssm": 2, "tie_dt": True}])
@pytest.mark.parametrize("cls", [S4, S4D])
def test_a_stream_does_not_depend_on_the_number_of_streams(cls, option):
    """Few streams use elementwise products, many use matrix products: states, outputs and gradients are the same."""
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
            assert relative_error(y[:, i, j], alone) < 1e-12
            assert relative_error(state[i, j], end) < 1e-12
    total = sum(alone.square().sum() for row in single for alone, _ in row)
    (expected,) = torch.autograd.grad(total, layer.log_dt)
    assert relative_error(loss_gradient, expected) < 1e-12


@BOTH
def test_a_system_holds_all_that_it_was_made_of(cls):
    """After a change of the weights it gives the same output, in all three modes: it holds D too."""
    layer, u = cls(3, 8).double(), torch.randn(2, 7, 3, dtype=torch.double)
    system, before = layer.system(), layer(u)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1)
    stepped, _ = layer.step(u[:, 0], layer.initial_state(2), system)
    scanned, _ = layer.scan(u, layer.initial_state(2), system)
    assert relative_error(layer(u, system), before) < 1e-12
    assert relative_error(scanned, before) < 1e-12
    assert relative_error(stepped, before[:, 0]) < 1e-12


@BOTH
def test_autocast_leaves_every_mode_in_float32(cls):
    """To the bit, for few streams and for many (by matrix products), with systems made inside and outside."""
    layer, u = cls(3, 8, channels=2), torch.randn(6, 30, 3)
    state, system = layer.initial_state(6), layer.system()

    def run(system):
        yield layer.kernel(30, system)
        yield layer(u, system)
        yield from layer.scan(u, state, system)
        for batch in (1, 4, 6):
            yield from layer.step(u[:batch, 0], state[:batch] + 1, system)

    plain = list(run(None))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [list(run(given)) for given in (None, system, layer.system())]
        low = layer.step(u[:, 0].bfloat16(), state, system)[0], layer(u.bfloat16(), system)
    for made in inside:
        assert all(torch.equal(a, b) for a, b in zip(made, plain, strict=True))
    assert {y.dtype for y in low} == {torch.bfloat16}


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_sequence_has_gradients(name):
    """All gradients exist and are zero."""
    layer = LAYERS[name]()
    u = torch.randn(2, 0, layer.d_model, requires_grad=True)
    outputs = [layer(u), layer.kernel(0)]
    if not layer.bidirectional:
        outputs.append(layer.scan(u, layer.initial_state(2))[0])
    for y in outputs:
        y.sum().backward()
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        assert len(gradients) >= 4
        assert not any(g.any() for g in gradients)
        layer.zero_grad(set_to_none=True)
    assert u.grad.shape == u.shape


NUMBERS = {
    "d_model": lambda x: S4(x),
    "d_state": lambda x: S4D(4, x),
    "n_ssm": lambda x: S4(4, n_ssm=x),
    "channels": lambda x: S4D(4, channels=x),
    "rank": lambda x: S4(4, rank=x),
    "rank of poles": lambda x: ssmkit.initializers.poles("S4", "legs", 8, x),
    "dt_min": lambda x: S4(4, dt_min=x, dt_max=2.0),
    "dt_max": lambda x: S4D(4, dt_max=x),
    "low": lambda x: ssmkit.initializers.log_uniform((3,), x, 2.0),
    "high": lambda x: ssmkit.initializers.log_uniform((3,), 0.1, x),
    "dropout": lambda x: S4(4, dropout=x),
    "rate": lambda x: S4D(4).system(x),
    "rate of Pointwise": lambda x: ssmkit.Pointwise(nn.Tanh()).system(x),
    "rate of TiedDropout": lambda x: ssmkit.TiedDropout(4).system(x),
    "rate of MultiRate": lambda x: ssmkit.MultiRate(2, S4D(4)).system(x),
    "L": lambda x: S4(4).kernel(x),
    "p": lambda x: ssmkit.TiedDropout(4, x),
    "dropout of S4Block": lambda x: ssmkit.S4Block(4, dropout=x),
    "ff": lambda x: ssmkit.S4Block(4, ff=x),
    "pool": lambda x: ssmkit.DownPool(4, x),
    "expand": lambda x: ssmkit.UpPool(4, 2, x),
    "lr": lambda x: ssmkit.param_groups(S4D(4), x),
    "ssm_lr": lambda x: ssmkit.param_groups(S4D(4), 1e-3, ssm_lr=x),
    "weight_decay": lambda x: ssmkit.param_groups(S4D(4), 1e-3, x),
    "times": lambda x: ssmkit.states.repeat(torch.zeros(2, 3), x),
    "index": lambda x: ssmkit.states.select(torch.zeros(2, 3), x),
    "N of legs": lambda x: ssmkit.hippo.legs(x),
    "N of legt": lambda x: ssmkit.hippo.legt(x),
    "N of lagt": lambda x: ssmkit.hippo.lagt(x),
    "N of fout": lambda x: ssmkit.hippo.fout(x),
    "N of lin": lambda x: ssmkit.initializers.lin(x),
    "L of vandermonde": lambda x: ops.vandermonde(torch.ones(2) + 0j, torch.ones(2) + 0j, x),
    "L of cauchy": lambda x: ops.cauchy_roots_of_unity(torch.ones(2) + 0j, torch.zeros(2) + 0j, x),
    "L of krylov": lambda x: ops.krylov(torch.eye(2), torch.ones(2), torch.ones(1, 2), x),
}


@pytest.mark.parametrize("value", [True, False, math.inf, math.nan, "1"])
@pytest.mark.parametrize("name", NUMBERS)
def test_values_that_are_not_numbers_are_refused(name, value):
    """By one sentence with the argument and the received value."""
    if name == "index" and not isinstance(value, bool):
        return
    with pytest.raises((TypeError, ValueError), match=f"`{name.split(' of ')[0]}` must be .*, got {value!r}"):
        NUMBERS[name](value)
