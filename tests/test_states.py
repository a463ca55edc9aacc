"""States as values: the functions on them, and streams that continue from the results."""

import pytest
import torch
from torch import nn

from ssmkit import S4, S4D, MultiRate, Residual, Sequential, states
from ssmkit.testing import relative_error


def model():
    return Sequential(nn.Linear(2, 4), S4(4, 8), Residual(MultiRate(4, S4D(8, 4)))).double()


@pytest.fixture
def running():
    net, u = model(), torch.randn(4, 30, 2, dtype=torch.float64)
    _, state = net.scan(u[:, :13], net.initial_state(4, dtype=torch.float64))
    rest, _ = net.scan(u[:, 13:], state)
    return net, u[:, 13:], state, rest


@pytest.mark.parametrize("index", [slice(1, 3), [3, 0], torch.tensor([2, 2]), torch.tensor([True, False, True, True])])
def test_select(running, index):
    net, u, state, rest = running
    y, _ = net.scan(u[index], states.select(state, index))
    assert relative_error(y, rest[index]) < 1e-12


def test_selecting_one_row_drops_the_batch_axis(running):
    net, u, state, rest = running
    y, _ = net.scan(u[2], states.select(state, 2))
    assert relative_error(y, rest[2]) < 1e-12


def test_repeat(running):
    net, u, state, rest = running
    y, _ = net.scan(u.repeat_interleave(3, 0), states.repeat(state, 3))
    assert relative_error(y, rest.repeat_interleave(3, 0)) < 1e-12


def test_concatenate_undoes_select(running):
    net, u, state, rest = running
    parts = [states.select(state, [i]) for i in (3, 1)]
    y, _ = net.scan(u[[3, 1]], states.concatenate(parts))
    assert relative_error(y, rest[[3, 1]]) < 1e-12


def test_batches_of_unequal_size_are_joined(running):
    net, u, state, rest = running
    parts = [states.select(state, slice(0, 3)), states.select(state, [3]), states.select(state, slice(1, 3))]
    rows = [0, 1, 2, 3, 1, 2]
    y, _ = net.scan(u[rows], states.concatenate(parts))
    assert relative_error(y, rest[rows]) < 1e-12
    assert states.concatenate(((0, torch.zeros(2, 3)), (0, torch.zeros(0, 3))))[1].shape == (2, 3)


def test_detach_and_move(running):
    net, u, state, rest = running
    detached = states.detach(state)
    assert state[1].requires_grad
    assert not detached[1].requires_grad
    single = states.move(detached, dtype=torch.float32)
    assert single[1].dtype == single[2][0][0].dtype == torch.float32
    assert single[2][0][2] == state[2][0][2]
    assert states.move(detached, device="meta")[1].device.type == "meta"
    y, _ = net.scan(u, states.move(single, dtype=torch.float64))
    assert relative_error(y, rest) < 1e-5


def test_bad_input(running):
    _, _, state, _ = running
    with pytest.raises(ValueError, match="concatenate: `states` must hold at least one state"):
        states.concatenate([])
    shapes = [(2, 4, 8), (2, 4, 16), (2, 3, 8), (2, 4, 8, 1), (2, 4)]
    for wrong in shapes[1:]:
        for pair in (shapes[0], wrong), (wrong, shapes[0]):
            with pytest.raises(ValueError, match="concatenate: the states must be of one layer, got trees that differ"):
                states.concatenate([((), torch.zeros(shape)) for shape in pair])
    for other in (S4D(4).initial_state(1), Sequential(S4(4), S4(4), S4(4)).initial_state(1), ((), 3, ())):
        with pytest.raises(ValueError, match="concatenate: the states must be of one layer"):
            states.concatenate([state, other])
    with pytest.raises(ValueError, match="move: `dtype` must be torch.float32 or torch.float64, got torch.bfloat16"):
        states.move(state, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="move: `dtype` must be"):
        states.move(state, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"select: `index` must be an integer, .*, got True \(bool\)"):
        states.select(state, True)
    with pytest.raises(ValueError, match="repeat: `times` must be at least 1"):
        states.repeat(state, 0)


def test_concatenating_a_single_state_returns_it(running):
    net, u, state, rest = running
    y, _ = net.scan(u, states.concatenate([state]))
    assert torch.equal(y, rest)
