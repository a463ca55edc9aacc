"""A user's own layer, made of public names in at most forty lines, works like any other layer."""

import copy
import inspect
import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import ssmkit
from ssmkit.testing import assert_modes_agree, relative_error


class LRU(ssmkit.StateSpaceLayer):
    """x_k = λ x_(k-1) + γ B u_k, y_k = Re(C x_k) + D u_k, with λ = exp(-exp ν + i exp θ) and γ = sqrt(1 - |λ|²)."""

    SSM_PARAMETERS = ("nu", "theta", "B")

    def __init__(self, d_model, d_state=64, r_min=0.5, r_max=0.99):
        super().__init__(d_model, d_model, (2 * d_state,))
        radius = (torch.rand(d_state) * (r_max**2 - r_min**2) + r_min**2).sqrt()
        self.nu = nn.Parameter((-radius.log()).log())
        self.theta = nn.Parameter((2 * math.pi * torch.rand(d_state)).log())
        self.B = nn.Parameter(torch.randn(d_state, d_model, 2) / (2 * d_model) ** 0.5)
        self.C = nn.Parameter(torch.randn(d_model, d_state, 2) / d_state**0.5)
        self.D = nn.Parameter(torch.randn(d_model))

    def discretize(self, rate):
        if rate != 1:
            raise ValueError(f"LRU: `rate` must be 1, as this layer has no step size, got {rate}.")
        size = torch.exp(-self.nu.double().exp())
        B, C = (torch.view_as_complex(x.double()) for x in (self.B, self.C))
        gain = (1 - size**2).sqrt()[:, None]
        return ssmkit.systems.SharedDiagonal(torch.polar(size, self.theta.double().exp()), gain * B, C, self.D)


PLACES = {
    "alone": lambda: LRU(3, 5),
    "Sequential": lambda: ssmkit.Sequential(nn.Linear(3, 4), LRU(4, 5), nn.GELU()),
    "Residual": lambda: ssmkit.Residual(nn.LayerNorm(3), LRU(3, 5)),
    "S4Block": lambda: ssmkit.S4Block(3, LRU(3, 5), glu=True),
    "Checkpoint": lambda: ssmkit.Checkpoint(LRU(3, 5), nn.GELU()),
    "MultiRate": lambda: ssmkit.MultiRate(2, LRU(4, 5), pool=2),
}


def test_it_takes_forty_lines_and_public_names():
    source = inspect.getsource(LRU)
    assert len(source.splitlines()) <= 40
    assert "._" not in source.replace(".__init__", "")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_keeps_the_contract_everywhere(place, dtype):
    assert_modes_agree(PLACES[place]().to(dtype), length=70)


@pytest.mark.parametrize("place", PLACES)
def test_gradients_agree_and_reach_every_parameter(place):
    layer = PLACES[place]().double()
    u = torch.randn(2, 40, layer.d_input, dtype=torch.double)
    scanned, _ = layer.scan(u, layer.initial_state(2, dtype=u.dtype))
    whole, chunked = (torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (layer(u), scanned))
    for a, b in zip(whole, chunked, strict=True):
        assert a.abs().max() > 0
        assert relative_error(b, a) < 1e-9


def test_it_is_trained_like_any_other():
    groups = ssmkit.param_groups(ssmkit.S4Block(3, LRU(3, 5)), lr=4e-3, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (1e-3, 0, 3),
        (4e-3, 0, 7),
        (4e-3, 0.1, 5),
    ]


@torch.no_grad()
def test_its_steps_are_accurate_for_poles_near_one_in_float32():
    """Poles with a time constant of a million samples; with a pole in float32 the error would be 2e-4."""
    layer = LRU(2, 8, 1 - 1e-6, 1 - 1e-7)
    exact, u = copy.deepcopy(layer).double(), torch.randn(3000, 2) + 1
    (system, state), (other, expected) = ((x.system(), x.initial_state()) for x in (layer, exact))
    for sample in u:
        _, state = layer.step(sample, state, system)
        _, expected = exact.step(sample.double(), expected, other)
    assert relative_error(state, expected) < 1e-5


@torch.no_grad()
def test_it_takes_any_mix_of_dtypes():
    for weights, sequence, kept in itertools.product([torch.float32, torch.float64], repeat=3):
        layer, u = LRU(3, 5).to(weights), torch.randn(2, 30, 3, dtype=sequence)
        state = layer.initial_state(2, dtype=kept)
        y, (scanned, after), (stepped, following) = layer(u), layer.scan(u, state), layer.step(u[:, 0], state)
        assert {y.dtype, scanned.dtype, stepped.dtype} == {sequence}
        assert {after.dtype, following.dtype} == {kept}
        assert relative_error(scanned, y) < 1e-5
        assert relative_error(stepped, y[:, 0]) < 1e-5


def test_an_empty_sequence_has_gradients_of_zero():
    layer, u = LRU(3, 5), torch.randn(2, 0, 3, requires_grad=True)
    for y in (layer(u), layer.scan(u, layer.initial_state(2))[0]):
        assert y.shape == u.shape
        assert not any(g.any() for g in torch.autograd.grad(y.sum(), [u, *layer.parameters()]))


@pytest.mark.parametrize("place", PLACES)
def test_it_runs_as_a_program(place):
    layer = PLACES[place]().eval()
    u, start = torch.randn(2, 200, layer.d_input), layer.initial_state(2)
    y, end = ssmkit.streaming.Engine(layer).run(u, start)
    with torch.no_grad():
        expected, reached = layer.scan(u, start)
    assert relative_error(y, expected) < 1e-5
    for a, b in zip(tree_leaves(end), tree_leaves(reached), strict=True):
        assert relative_error(a, b) < 1e-5 if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("place", ["S4Block", "MultiRate"])
def test_its_step_compiles(place):
    layer = PLACES[place]().eval()
    step, state = ssmkit.compile_step(layer), layer.initial_state(2)
    expected = state
    for u in torch.randn(5, 2, layer.d_input):
        y, state = step(u, state)
        other, expected = layer.step(u, expected)
        assert relative_error(y, other) < 1e-5


def test_it_is_saved_in_low_precision_and_runs_under_autocast():
    layer = LRU(3, 5)
    u = torch.randn(2, 30, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(u), layer.float()(u))
    y = layer.bfloat16()(u.bfloat16())
    assert y.dtype == torch.bfloat16
    assert layer.initial_state(2).dtype == layer.system().dtype == torch.float32
    with torch.no_grad():
        assert relative_error(y, copy.deepcopy(layer).float()(u)) < 0.05


def test_bad_input_gives_an_error_with_its_name():
    layer, u = LRU(3, 5), torch.randn(2, 9, 3)
    for call, message in (
        (lambda: layer(torch.randn(2, 9, 4)), "the last axis of `u` must be 3"),
        (lambda: layer.scan(u, torch.zeros(2, 9)), r"`state` must have shape \(2, 10\), got shape \(2, 9\)"),
        (lambda: layer.step(u[:, 0], layer.initial_state(3)), r"`state` must have shape \(2, 10\)"),
        (lambda: layer(u, LRU(3, 4).system()), r"a SharedDiagonal of widths 3 and 3 and state \(10,\), got a Shared"),
        (lambda: layer(u, ()), "`system` must be what this layer's .* got a tuple"),
        (lambda: layer.system(2.0), "`rate` must be 1"),
        (lambda: layer.system(0.0), "`rate` must be a positive number"),
    ):
        with pytest.raises(ValueError, match=f"^LRU: .*{message}"):
            call()
    a, B, C, D = (torch.randn(*s, dtype=torch.complex64) for s in ((5,), (5, 3), (3, 5), (3,)))
    with pytest.raises(ValueError, match=r"^SharedDiagonal: .* got \(5,\), \(5, 3\), \(3, 5\) and \(1, 3\)"):
        ssmkit.systems.SharedDiagonal(a, B, C, D.real[None])
    with pytest.raises(TypeError, match="^SharedDiagonal: `D` must be a real floating tensor, got torch.complex64"):
        ssmkit.systems.SharedDiagonal(a, B, C, D)


class Ahead(ssmkit.StateSpaceLayer):
    """A layer that is not causal."""

    def __init__(self):
        super().__init__(3, 3, None)
        self.inner = ssmkit.S4D(3, 4, bidirectional=True)

    def discretize(self, rate):
        return self.inner.discretize(rate)


def test_a_layer_that_is_not_causal_has_only_forward():
    layer, u = Ahead(), torch.randn(2, 9, 3)
    assert torch.equal(layer(u), layer.inner(u))
    for call in (
        lambda: layer.scan(u, torch.zeros(2)),
        lambda: layer.step(u[:, 0], torch.zeros(2)),
        layer.initial_state,
    ):
        with pytest.raises(
            ValueError, match="^Ahead: `.*` needs causal layers, and Ahead is not causal; use `forward`.$"
        ):
            call()


class Sharing(LRU):
    """A layer whose system shares its memory with a parameter."""

    def discretize(self, rate):
        system = super().discretize(rate)
        object.__setattr__(system, "D", self.D)
        return system


def test_a_system_that_shares_memory_with_a_parameter_is_found():
    with pytest.raises(AssertionError, match="^Sharing: a system changed with the parameters .* own copies"):
        assert_modes_agree(Sharing(3, 5))
