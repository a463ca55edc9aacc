"""Several rates: shapes, causality across frames, phases."""

import pytest
import torch
from torch import nn

from ssmkit import S4D, DownPool, MultiRate, Pointwise, Residual, S4Block, Sequential, UpPool
from ssmkit.testing import relative_error


def test_the_notebooks_shapes():
    z = DownPool(2)(torch.randn(1, 64, 2))
    assert z.shape == (1, 16, 4)
    assert UpPool(2)(z).shape == (1, 64, 2)


def test_frames_are_ordered_by_feature_and_sample():
    down, up = DownPool(2, pool=3, expand=3), UpPool(2, pool=3, expand=3)
    with torch.no_grad():
        for linear in (down.linear, up.linear):
            linear.weight.copy_(torch.eye(6))
            linear.bias.zero_()
    u = torch.arange(12.0).reshape(1, 6, 2)
    assert down(u)[0, 0].tolist() == [0, 2, 4, 1, 3, 5]
    # The input of a frame is emitted one frame later.
    assert torch.equal(up(down(u))[:, 3:], u[:, :3])
    assert torch.equal(up(down(u))[:, :3], torch.zeros(1, 3, 2))


@pytest.mark.parametrize("L", [0, 1, 4, 5, 63])
def test_down_pool_pads_the_last_frame(L):
    down = DownPool(2)
    u = torch.randn(3, L, 2)
    assert down(u).shape == (3, -(-L // 4), 4)
    padded = nn.functional.pad(u, (0, 0, 0, -L % 4))
    assert torch.equal(down(u), down(padded))


@pytest.mark.parametrize("L", [0, 1, 3, 4, 5, 8, 17])
@pytest.mark.parametrize("pool", [1, 2, 3, 4])
def test_the_wrapper_is_down_pool_layer_up_pool(L, pool):
    layer = MultiRate(2, S4D(4, 4), pool).double()
    u = torch.randn(3, L, 2, dtype=torch.float64)
    expected = layer.up(layer.layer(layer.down(u)))[:, :L]
    assert relative_error(layer(u), expected) < 1e-12


def test_a_frame_has_an_effect_from_the_next_one_on():
    """∂y_k/∂u_j is nonzero if and only if j is in a frame before that of k."""
    pool, L = 4, 14
    layer = MultiRate(1, S4D(2, 4), pool).double()
    u = torch.randn(L, 1, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, u)[:, 0, :, 0]
    for k in range(L):
        heard = k // pool * pool
        # An FFT convolution is causal to rounding.
        assert (jacobian[k, heard:].abs() < 1e-12).all()
        if heard:
            assert (jacobian[k, :heard].abs() > 1e-6).all()


def test_every_step_gives_an_output_and_the_inner_layer_runs_once_a_frame():
    class Counted(nn.Module):
        calls = 0

        def forward(self, u):
            Counted.calls += 1
            return u

    layer = MultiRate(2, Sequential(Pointwise(Counted())), pool=4)
    state, phases = layer.initial_state(1), []
    for k in range(8):
        y, state = layer.step(torch.randn(1, 2), state)
        assert y.shape == (1, 2)
        phases.append((state[2], Counted.calls))
        assert (y == 0).all() == (k < 4)
    assert phases == [(1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1), (3, 1), (0, 2)]


def test_phases_are_integers_for_the_whole_batch():
    layer = Residual(MultiRate(2, Sequential(MultiRate(4, S4D(8, 4), 2)), 3)).double()
    u = torch.randn(2, 50, 2, dtype=torch.float64)
    state = layer.initial_state(2, dtype=torch.float64)
    expected = layer(u)
    at = 0
    for size in (1, 5, 2, 0, 17, 25):
        y, state = layer.scan(u[:, at : at + size], state)
        assert relative_error(y, expected[:, at : at + size]) < 1e-10
        at += size
        outer, inner = state[0][2], state[0][3][0][2]
        assert (outer, inner) == (at % 3, at // 3 % 2)


def test_another_rate_is_refused():
    layer = Sequential(MultiRate(2, S4D(4)))
    with pytest.raises(ValueError, match="MultiRate: `rate` must be 1, got 2.0: frames are counted in samples"):
        layer.system(rate=2.0)
    with pytest.raises(ValueError, match="MultiRate: `rate` must be 1, got 0.5"):
        layer.system(rate=0.5)


def test_gradients_do_not_leak_from_the_future():
    model = Sequential(
        nn.Linear(1, 4), Residual(MultiRate(4, Residual(MultiRate(8, S4Block(16, S4D(16, 4)), 4)), 4)), nn.Linear(4, 1)
    ).double()
    u = torch.randn(1, 70, 1, dtype=torch.float64, requires_grad=True)
    model(u)[0, 40].sum().backward()
    assert (u.grad[0, 41:].abs() < 1e-12).all()
    assert u.grad[0, :41].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DownPool(2)(torch.randn(1, 8, 3)), ValueError, "DownPool: the last axis of `u` must be 2"),
        (lambda: UpPool(2)(torch.randn(1, 8, 3)), ValueError, "UpPool: the last axis of `w` must be 4"),
        (lambda: DownPool(2)(torch.ones(1, 8, 2).int()), TypeError, "DownPool: `u` must be a real floating tensor"),
        (lambda: DownPool(2, pool=0), ValueError, "DownPool: `pool` must be at least 1"),
        (lambda: UpPool(2, expand=0), ValueError, "UpPool: `expand` must be at least 1"),
        (lambda: MultiRate(2, S4D(4)).step(torch.randn(1, 2), ()), ValueError, "MultiRate: `state` must be"),
        (
            lambda: MultiRate(2, S4D(4)).step(torch.randn(1, 2), MultiRate(2, S4D(4)).initial_state(3)),
            ValueError,
            r"MultiRate: `state` must have shape \(1, 4, 2\), got shape \(3, 4, 2\)",
        ),
        (
            lambda: MultiRate(2, S4D(4)).scan(torch.randn(1, 9, 2), MultiRate(2, S4D(4), 3).initial_state(1)),
            ValueError,
            r"must have shape \(1, 4, 2\), got shape \(1, 3, 2\)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
