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


@pytest.mark.parametrize("phases", ["agree", "differ"])
def test_a_state_is_saved_and_loaded(running, phases, tmp_path):
    net, u, state, rest = running
    if phases == "differ":
        state = states.concatenate([states.select(state, [0]), states.select(net.scan(u[:, :1], state)[1], [1])])
        assert isinstance(state[2][0][2], torch.Tensor)
    tensors = states.to_dict(state)
    assert all(x.is_contiguous() and not x.requires_grad for x in tensors.values())
    torch.save(tensors, tmp_path / "state.pt")
    again = states.from_dict(torch.load(tmp_path / "state.pt", weights_only=True), net.initial_state())
    if phases == "agree":
        y, _ = net.scan(u, again)
        assert torch.equal(y, rest)
        assert again[2][0][2] == state[2][0][2] == 1
    else:
        for a, b in zip(net.scan(u[:2], again), net.scan(u[:2], state), strict=True):
            assert torch.equal(*(x if isinstance(x, torch.Tensor) else x[1] for x in (a, b)))
        assert torch.equal(again[2][0][2], state[2][0][2])


def test_named_tensors_are_copies_that_share_no_memory(running):
    """Formats for tensors refuse those that share memory, as the frames of a state at rest do."""
    net = running[0]
    rest = net.initial_state(4)
    tensors = states.to_dict(rest)
    assert len({x.data_ptr() for x in tensors.values()}) == len(tensors)
    tensors["state.1"].add_(1)
    assert not rest[1].any()
    assert list(tensors) == ["state.1", "state.2.0.0", "state.2.0.1", "state.2.0.2", "state.2.0.3"]
    assert list(states.to_dict(S4D(4).initial_state(2), "voice")) == ["voice"]
    assert states.to_dict(()) == {}
    assert states.from_dict({}, ()) == ()


def test_states_stand_beside_weights_in_one_file(running, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    net, u, state, rest = running
    names = {**net.state_dict(), **states.to_dict(state, "left"), **states.to_dict(net.initial_state(2), "leftover")}
    safetensors.save_file(names, tmp_path / "all.safetensors")
    loaded = safetensors.load_file(tmp_path / "all.safetensors")
    y, _ = net.scan(u, states.from_dict(loaded, net.initial_state(), "left"))
    assert torch.equal(y, rest)


def test_named_tensors_of_another_layer_get_a_sentence(running):
    net, _, state, _ = running
    tensors, like = states.to_dict(state), net.initial_state()
    for wrong, message in (
        ({k: v for k, v in tensors.items() if k != "state.2.0.1"}, "'state.2.0.1' is missing"),
        ({**tensors, "state.3": torch.ones(1)}, "'state.3' is not in it"),
        ({**tensors, "state": torch.ones(1)}, "'state' is not in it"),
        ({**tensors, "state.2.0.2": torch.ones(4)}, "'state.2.0.2' is torch.float32"),
        ({**tensors, "state.1": torch.ones(4).long()}, "'state.1' is torch.int64"),
        ({}, "'state.1' is missing"),
    ):
        with pytest.raises(
            ValueError, match=f"^from_dict: `tensors` must be of the same layer as `like`, and {message}"
        ):
            states.from_dict(wrong, like)


def test_a_rejected_draft_is_rolled_back(running):
    """A state is a value: what came after it is forgotten by going on from it."""
    net, u, state, rest = running
    net.scan(torch.randn_like(u), state)
    for _ in range(3):
        net.step(torch.randn_like(u[:, 0]), state)
    y, _ = net.scan(u, state)
    assert torch.equal(y, rest)


def test_bad_input(running):
    _, _, state, _ = running
    with pytest.raises(ValueError, match="concatenate: `states` must hold at least one state"):
        states.concatenate([])
    shapes = [(2, 4, 8), (2, 4, 16), (2, 3, 8), (2, 4, 8, 1), (2, 4)]
    for wrong in shapes[1:]:
        for pair in (shapes[0], wrong), (wrong, shapes[0]):
            with pytest.raises(
                ValueError, match="concatenate: `states` must be of one layer, .* got trees that differ"
            ):
                states.concatenate([((), torch.zeros(shape)) for shape in pair])
    for other in (S4D(4).initial_state(1), Sequential(S4(4), S4(4), S4(4)).initial_state(1), ((), 3, ())):
        with pytest.raises(ValueError, match="concatenate: `states` must be of one layer"):
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
