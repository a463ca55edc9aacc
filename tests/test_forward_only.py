"""Layers that are not causal: in containers, their outputs, and the modes that are refused."""

import re

import pytest
import torch
from torch import nn

import ssmkit
from family import BIDIRECTIONAL, CAUSAL, FORWARD_ONLY, GRIDS, Grid
from ssmkit import S4D, MultiRate, Residual, Sequential, compile_step
from ssmkit.streaming import Engine
from ssmkit.testing import assert_modes_agree, example_input, relative_error

ALL = {**FORWARD_ONLY, **{f"grid, {name}": make for name, make in GRIDS.items()}}


@pytest.mark.parametrize("name", ALL)
def test_containers_pass_on_that_a_layer_is_not_causal(name):
    layer = ALL[name]()
    assert layer.causal is False
    assert Sequential(nn.LayerNorm(layer.d_input), layer).causal is False


def test_layers_have_the_attribute_causal():
    assert all(make().causal is True for make in CAUSAL.values())
    assert all(make().causal is False for make in BIDIRECTIONAL.values())


@pytest.mark.parametrize("name", ALL)
def test_every_input_and_every_parameter_has_an_effect(name):
    layer = ALL[name]().double()
    shape = (3, 8) if name.startswith("grid") else (8,)
    u = example_input(layer, *shape).requires_grad_()
    y = layer(u)
    assert y.shape == (*shape, layer.d_output)
    for k in (0, 3, 7):
        # With norms in front of products, each output has a nonzero gradient with respect to all samples.
        (grad,) = torch.autograd.grad((y[..., k, :] * torch.randn_like(y[..., k, :])).sum(), u, retain_graph=True)
        assert bool((grad.abs().amax(-1) > 0).all())
    grads = torch.autograd.grad((y * torch.randn_like(y)).sum(), list(layer.parameters()))
    assert all(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_its_rows_and_a_system_may_be_given(name):
    layer = ALL[name]().double().eval()
    shape = (3, 10) if name.startswith("grid") else (10,)
    u = example_input(layer, 2, *shape)
    y = layer(u)
    for i in range(2):
        assert relative_error(layer(u[i]), y[i]) < 1e-12
    assert torch.equal(layer(u, layer.system()), y)
    assert layer(u[..., :0, :]).shape == (*u.shape[:-2], 0, layer.d_output)


PARTS = {
    "Sequential": "`layers.2` (S4)",
    "Sequential, nested": "`layers.1.layers.0` (S4D)",
    "Checkpoint": "`layers.1` (S4D)",
    "Residual": "`layers.1` (S4D)",
    "S4Block": "`layers.0.layers.1` (S4)",
    "Product": "`layers.1` (S4D)",
    "Concatenate": "`layers.0` (S4D)",
    "MultiRate": "`layer` (S4D)",
    "MultiRate, nested": "`layer.layers.1.layers.0.layer` (S4D)",
    "grid, layer": "Grid",
    "grid, Sequential": "`layers.1` (Grid)",
    "grid, Checkpoint": "`layers.0` (Grid)",
    "grid, Residual": "`layers.1` (Grid)",
    "grid, S4Block": "`layers.0.layers.1` (Grid)",
    "grid, Product": "`layers.0` (Grid)",
    "grid, Concatenate": "`layers.0` (Grid)",
    "grid, MultiRate": "`layer` (Grid)",
}


@pytest.mark.parametrize("name", ALL)
def test_other_modes_are_refused_with_the_name_of_the_part(name):
    layer = ALL[name]()
    u = torch.randn(2, 9, layer.d_input)
    kind = type(layer).__name__
    calls = {
        (kind, "initial_state"): lambda: layer.initial_state(2),
        (kind, "step"): lambda: layer.step(u[:, 0], ()),
        (kind, "scan"): lambda: layer.scan(u, ()),
        ("Engine", "run"): lambda: Engine(layer),
        ("compile_step", "step"): lambda: compile_step(layer),
    }
    for (where, method), call in calls.items():
        sentence = f"{where}: `{method}` needs causal layers, and {PARTS[name]} is not causal; use `forward`."
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            call()
    with pytest.raises(ValueError, match="`initial_state` needs causal layers"):
        assert_modes_agree(layer, u)


@pytest.mark.parametrize("container", [Sequential, Residual, lambda layer: MultiRate(2, Sequential(layer), 4, 2)])
def test_what_a_user_marks_as_not_causal_is_named(container):
    layer = S4D(4, 8)
    layer.causal = False
    with pytest.raises(ValueError, match=r"(layer\.)?layers.0` \(S4D\) is not causal"):
        container(layer).initial_state(1)


# --- several rates ----------------------------------------------------------------------------------------------------


def test_around_a_layer_that_is_not_causal_a_single_frame_has_an_effect():
    torch.manual_seed(0)
    y = MultiRate(2, S4D(4, 8, bidirectional=True), 4, 2)(torch.randn(1, 4, 2))
    assert (y.abs() > 0).all()


@pytest.mark.parametrize("L", [16, 13])
def test_around_a_layer_that_is_not_causal_every_frame_has_an_effect_everywhere(L):
    layer = MultiRate(2, S4D(4, 8, bidirectional=True), 4, 2).double()
    jacobian = torch.autograd.functional.jacobian(layer, torch.randn(L, 2, dtype=torch.float64))
    assert (jacobian.abs().amax((1, 3)) > 1e-9).all()


@pytest.mark.parametrize("L", [0, 1, 3, 4, 5, 8, 17])
@pytest.mark.parametrize("pool", [1, 2, 3, 4])
def test_around_a_layer_that_is_not_causal_frames_are_not_shifted(L, pool):
    layer = MultiRate(2, S4D(4, 4, bidirectional=True), pool).double()
    u = torch.randn(3, L, 2, dtype=torch.float64)
    frames = layer.up.frames(layer.layer(layer.down(u)))
    assert relative_error(layer(u), layer.up.samples(frames)[:, :L]) < 1e-12


def test_around_a_layer_that_is_not_causal_a_system_is_used():
    layer = MultiRate(2, S4D(4, 4, bidirectional=True))
    u, system = torch.randn(3, 17, 2), layer.system()
    y = layer(u)
    with torch.no_grad():
        layer.layer.D.add_(1)
    assert torch.equal(layer(u, system), y)
    assert relative_error(layer(u), y) > 1e-3


def test_around_a_layer_over_two_axes_the_last_one_is_pooled():
    layer = MultiRate(2, Grid(4), 3).double()
    u = torch.randn(5, 7, 2, dtype=torch.float64)
    frames = layer.up.frames(layer.layer(layer.down(u)))
    assert relative_error(layer(u), layer.up.samples(frames)[:, :7]) < 1e-12


def test_a_forward_layer_needs_only_forward_and_system():
    class Flip(ssmkit.ForwardLayer):
        d_input = d_output = 3

        def system(self, rate=1.0):
            return ()

        def forward(self, u, system=None):
            return u.flip(-2)

    u = torch.randn(2, 9, 3)
    assert torch.equal(Sequential(Flip(), Flip())(u), u)
    with pytest.raises(TypeError, match="abstract"):
        ssmkit.ForwardLayer()
