"""Rows with different phases: each row gives the same as alone."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ssmkit
from family import CAUSAL, streamed
from ssmkit import S4, S4D, Checkpoint, MultiRate, Residual, S4Block, Sequential, TiedDropout, compile_step, states
from ssmkit.layers import pooling
from ssmkit.streaming import Engine
from ssmkit.testing import example_input, relative_error

# Layers with phases inside, and a few without.
NAMES = [name for name in CAUSAL if "MultiRate" in name or name in ("Checkpoint", "Branches, nested", "S4D", "S4Block")]
DEPTHS = st.lists(st.integers(0, 25), min_size=1, max_size=4)


def leaves(state):
    return [leaf for child in state for leaf in leaves(child)] if isinstance(state, tuple) else [state]


def steps(layer, u, state):
    system, out = layer.system(), [layer(u[:, :0])]
    for sample in u.unbind(1):
        y, state = layer.step(sample, state, system)
        out.append(y[:, None])
    return torch.cat(out, 1), state


def started(layer, depths, dtype, length=20):
    """One state of rows that have read different numbers of samples, the input and output that follow, and the end."""
    parts, inputs, outputs, ends = [], [], [], []
    for depth in depths:
        u = example_input(layer, 1, depth + length)
        _, state = layer.scan(u[:, :depth], layer.initial_state(1, dtype=dtype))
        y, end = layer.scan(u[:, depth:], state)
        parts.append(state)
        inputs.append(u[:, depth:])
        outputs.append(y)
        ends.append(end)
    return states.concatenate(parts), torch.cat(inputs), torch.cat(outputs), states.concatenate(ends)


def assert_same_state(actual, expected, bound):
    for a, b in zip(leaves(actual), leaves(expected), strict=True):
        rows = next(x for x in leaves(actual) if isinstance(x, torch.Tensor)).shape[:1]
        if isinstance(a, int) or not a.is_floating_point():
            assert torch.equal(torch.as_tensor(a).expand(rows), torch.as_tensor(b).expand(rows))
        else:
            assert relative_error(a, b) < bound


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=4)
@given(depths=DEPTHS, split=st.integers(0, 20))
def test_scans_and_steps_of_rows_at_different_phases(name, depths, split):
    layer = CAUSAL[name]().double().eval()
    with torch.no_grad():
        state, u, expected, end = started(layer, depths, torch.float64)
        y, after = layer.scan(u, state)
        assert relative_error(y, expected) < 1e-10
        assert_same_state(after, end, 1e-10)
        head, middle = layer.scan(u[:, :split], state)
        tail, after = steps(layer, u[:, split:], middle)
        assert relative_error(torch.cat([head, tail], 1), expected) < 1e-10
        assert_same_state(after, end, 1e-10)
        head, middle = steps(layer, u[:, :split], state)
        tail, after = layer.scan(u[:, split:], middle)
        assert relative_error(torch.cat([head, tail], 1), expected) < 1e-10
        assert_same_state(after, end, 1e-10)


@pytest.mark.parametrize("name", [name for name in NAMES if streamed(CAUSAL[name])])
@pytest.mark.parametrize("threads", [1, 2])
@settings(max_examples=3)
@given(depths=DEPTHS, split=st.integers(0, 20))
def test_the_engine_on_rows_at_different_phases(name, threads, depths, split):
    layer = CAUSAL[name]().eval()
    with torch.no_grad():
        state, u, expected, end = started(layer, depths, torch.float32)
        engine = Engine(layer, threads=threads)
        stream = engine.start(len(depths), state=state)
        y = torch.cat([stream.run(u[:, :split]), stream.run(u[:, split:])], 1)
        assert relative_error(y, expected) < 1e-5
        assert_same_state(stream.state, end, 1e-5)
        # The same as each row alone, to the bit.
        for i in range(len(depths)):
            alone = engine.start(1, state=states.select(state, [i]))
            assert torch.equal(alone.run(u[[i]]), y[[i]])
        again, after = engine.run(u[:, split:], layer.scan(u[:, :split], state)[1])
        assert relative_error(again, expected[:, split:]) < 1e-5
        assert_same_state(after, end, 1e-5)


def nested():
    inner = Sequential(S4D(8, 4), Residual(MultiRate(8, S4Block(16, S4D(16, 4)), 2)))
    return Sequential(nn.Linear(2, 4), Residual(MultiRate(4, inner, 3)), S4(4, 4), nn.Linear(4, 2)).eval()


def test_a_phase_is_an_integer_where_rows_agree_and_a_tensor_where_they_differ():
    net = nested()
    with torch.no_grad():
        early, late = (net.scan(torch.randn(2, n, 2), net.initial_state(2))[1] for n in (4, 8))
    assert (early[1][0][2], early[1][0][3][1][0][2]) == (1, 1)
    assert states.concatenate([early, early])[1][0][2] == 1
    both = states.concatenate([early, late])
    assert both[1][0][2].tolist() == [1, 1, 2, 2]
    # In the inner tier they agree again after one frame.
    assert both[1][0][3][1][0][2].tolist() == [1, 1, 0, 0]
    assert states.concatenate([both, early])[1][0][2].tolist() == [1, 1, 2, 2, 1, 1]
    assert states.concatenate([early, both])[1][0][2].tolist() == [1, 1, 1, 1, 2, 2]
    assert states.select(both, [3, 0])[1][0][2].tolist() == [2, 1]
    assert states.select(both, 2)[1][0][2].tolist() == 2
    assert states.repeat(both, 2)[1][0][2].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    moved = states.move(states.detach(both), dtype=torch.float64)
    assert (moved[1][0][2].dtype, moved[1][0][0].dtype) == (torch.int64, torch.float64)
    assert states.move(both, device="meta")[1][0][2].device.type == "meta"


def test_a_row_selected_without_its_batch_axis_continues():
    net = nested().double()
    with torch.no_grad():
        state, u, expected, _ = started(net, (3, 7, 11), torch.float64)
        row = states.select(state, 1)
        assert row[1][0][2].shape == ()
        y, after = net.scan(u[1, :19], row)
        assert relative_error(y, expected[1, :19]) < 1e-10
        y, after = net.step(u[1, 19], after)
        assert relative_error(y, expected[1, 19]) < 1e-10
        single = Engine(net).start(state=row).run(u[1].float())
        assert relative_error(single, expected[1]) < 1e-5


def test_several_batch_axes():
    """States are joined along the first axis, so their phases have no second axis."""
    net = nested().double()
    u = torch.randn(5, 3, 60, 2, dtype=torch.float64)
    with torch.no_grad():
        whole = net(u)
        parts = [
            net.scan(u[rows, :, :n], net.initial_state(len(rows), 3, dtype=torch.float64))[1]
            for rows, n in (([0, 1], 4), ([2], 9), ([3, 4], 14))
        ]
        state = states.concatenate(parts)
        assert state[1][0][2].shape == (5,)
        depths = (4, 4, 9, 14, 14)
        later = torch.stack([u[i, :, n : n + 40] for i, n in enumerate(depths)])
        expected = torch.stack([whole[i, :, n : n + 40] for i, n in enumerate(depths)])
        y, after = net.scan(later[:, :, :17], state)
        assert relative_error(y, expected[:, :, :17]) < 1e-10
        assert after[1][0][2].shape == (5, 3)
        y, after = net.step(later[:, :, 17], after)
        assert relative_error(y, expected[:, :, 17]) < 1e-10
        # A state after a scan and a joined one: the phase with fewer axes is expanded.
        mixed = states.concatenate([states.select(after, [0, 4]), states.select(state, [2])])
        assert mixed[1][0][2].shape == (3, 3)
        y, _ = net.scan(torch.cat([later[[0, 4], :, 18:], later[[2], :, :22]]), mixed)
        assert relative_error(y, torch.cat([expected[[0, 4], :, 18:], expected[[2], :, :22]])) < 1e-10
        y = Engine(net).start(5, 3, state=state).run(later.float())
        assert relative_error(y, expected) < 1e-5


@pytest.mark.parametrize("mode", ["step", "scan"])
def test_streams_that_are_restarted_one_by_one(mode):
    net = nested().double()
    u = torch.randn(4, 50, 2, dtype=torch.float64)
    state, begins, expected = net.initial_state(4, dtype=torch.float64), [0] * 4, []
    restarts = {5: [2], 13: [0, 3], 14: [2], 30: [1]}
    with torch.no_grad():
        outputs = []
        for k in range(50):
            if k in restarts:
                fresh = torch.zeros(4, dtype=torch.bool)
                fresh[restarts[k]] = True
                state = states.where(fresh, net.initial_state(4, dtype=torch.float64), state)
                for row in restarts[k]:
                    begins[row] = k
            if mode == "step":
                y, state = net.step(u[:, k], state)
            else:
                y, state = net.scan(u[:, k : k + 1], state)
                y = y[:, 0]
            outputs.append(y)
        for row, begin in enumerate(begins):
            expected = net(u[row, begin:])
            assert relative_error(torch.stack(outputs, 1)[row, begin:], expected) < 1e-10


@pytest.mark.parametrize("mode", ["step", "scan"])
def test_gradients_of_rows_at_different_phases(mode):
    net = nested().double()
    state, u, expected, _ = started(net, (0, 4, 11), torch.float64, length=15)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), list(net.parameters()), retain_graph=True)
    y, _ = net.scan(u, state) if mode == "scan" else steps(net, u, state)
    found = torch.autograd.grad((y * weight).sum(), list(net.parameters()))
    assert all(relative_error(a, b) < 1e-8 for a, b in zip(found, wanted, strict=True))


def test_the_masks_of_tied_dropout_stay_with_their_rows():
    net = Checkpoint(TiedDropout(2), MultiRate(2, Sequential(TiedDropout(4), nn.Linear(4, 4)), 3)).double()
    with torch.no_grad():
        state, u, expected, end = started(net, (1, 5, 6), torch.float64)
        y, after = net.scan(u, state)
        assert relative_error(y, expected) < 1e-12
        assert_same_state(after, end, 1e-12)


def test_compiled_steps_of_rows_at_different_phases():
    """The same numbers, and no compilation after the first samples."""
    net = nested()
    with torch.no_grad():
        state, u, expected, end = started(net, (0, 4, 11), torch.float32)
        step = compile_step(net)
        for k in range(20):
            with torch._dynamo.config.patch(error_on_recompile=k >= 2):
                y, state = step(u[:, k], state)
            assert relative_error(y, expected[:, k]) < 1e-5
    assert_same_state(state, end, 1e-5)


def test_steps_and_scans_do_not_read_the_values_of_phases():
    """They compile to one graph, which reading a value would break."""
    inner = Residual(MultiRate(8, Sequential(nn.Linear(16, 16)), 2))
    net = Sequential(nn.Linear(2, 4), MultiRate(4, inner, 3)).eval()
    with torch.no_grad():
        state, u, expected, _ = started(net, (0, 4, 11), torch.float32)
        system = net.system()
        step = torch.compile(partial(net.step, system=system), fullgraph=True, dynamic=False, backend="eager")
        scan = torch.compile(partial(net.scan, system=system), fullgraph=True, dynamic=False, backend="eager")
        y, after = step(u[:, 0], state)
        assert relative_error(y, expected[:, 0]) < 1e-5
        y, _ = scan(u[:, 1:], after)
        assert relative_error(y, expected[:, 1:]) < 1e-5


def test_generation_of_streams_at_different_phases():
    net = Sequential(nn.Embedding(20, 4), Residual(MultiRate(4, S4Block(8, S4D(8, 4)), 3)), nn.Linear(4, 20)).eval()
    engine = Engine(net)
    with torch.no_grad():
        state, _, expected, _ = started(net, (0, 4, 11, 1), torch.float32)
    logits, chance = expected[:, -1], torch.rand(4, 30)
    stream = engine.start(4, state=state)
    made = stream.generate(logits, chance, top_p=0.9)
    for i in range(4):
        alone = engine.start(1, state=states.select(state, [i]))
        one = alone.generate(logits[[i]], chance[[i]], top_p=0.9)
        assert torch.equal(one.classes, made.classes[[i]])
        assert torch.equal(one.nats, made.nats[[i]])
        assert torch.equal(one.logits, made.logits[[i]])
        assert_same_state(alone.state, states.select(stream.state, [i]), 1e-7)


def test_samples_past_the_end_are_the_last_one():
    """Never values beyond it in the memory: these could be NaN, and make gradients NaN."""
    x = torch.arange(12.0).reshape(2, 3, 2)
    y = pooling._samples(x, torch.tensor([2, 0]), 4)
    assert torch.equal(y, torch.stack([x[0, [2, 2, 2, 2]], x[1, [0, 1, 2, 2]]]))


@pytest.mark.parametrize("phase", [-1, 4, 1.0, torch.tensor(1.0), torch.tensor([0, 1, 2]), torch.zeros(2, 1).long()])
def test_values_that_are_not_phases_are_refused(phase):
    layer = MultiRate(2, S4D(4), pool=4)
    filling, emitting, _, inner = layer.initial_state(2)
    state = (filling, emitting, phase, inner)
    for call in (
        lambda: layer.step(torch.randn(2, 2), state),
        lambda: layer.scan(torch.randn(2, 9, 2), state),
        lambda: Engine(layer).start(2, state=state),
    ):
        with pytest.raises(
            ValueError, match=r"MultiRate: `state` must be \(frame being filled, frame being emitted, ph"
        ):
            call()


def test_states_that_cannot_be_joined_or_mixed_are_refused():
    with pytest.raises(ValueError, match="concatenate: `states` with different phases must hold a tensor, which tells"):
        states.concatenate([(3,), (4,)])
    assert states.concatenate([(3,), (3,)]) == (3,)
    with pytest.raises(ValueError, match="concatenate: `states` must be of one layer"):
        states.concatenate([(torch.zeros(2, 3), 1), (torch.zeros(2, 3), torch.zeros(2))])
    yes = torch.tensor([True, False])
    a, b = S4D(4, 8).initial_state(2), Sequential(S4D(4, 8)).initial_state(2)
    for pair in ((a, b), (b, a), (b, (*b, *b)), (a, 3), (3, a)):
        with pytest.raises(ValueError, match="where: `state` and `other` must be of one layer"):
            states.where(yes, *pair)
    with pytest.raises(
        ValueError,
        match=r"where: `state` and `other` must .* \(2, 4, 8\) on cpu, shape \(3, 4, 8\) on cpu and shape \(2,\)",
    ):
        states.where(yes, a, S4D(4, 8).initial_state(3))
    with pytest.raises(ValueError, match=r"where: `state` and `other` must .* \(2, 4, 8\) on cpu and shape \(3,\)"):
        states.where(torch.ones(3, dtype=torch.bool), a, a)


def test_where_takes_rows():
    net = nested()
    with torch.no_grad():
        a, b = (net.scan(torch.randn(3, n, 2), net.initial_state(3))[1] for n in (4, 8))
    condition = torch.tensor([True, False, True])
    mixed = states.where(condition, a, b)
    assert torch.equal(mixed[2], torch.stack([a[2][0], b[2][1], a[2][2]]))
    assert mixed[1][0][2].tolist() == [1, 2, 1]
    assert states.where(condition, a, a)[1][0][2] == 1
    assert states.where(condition, mixed, b)[1][0][2].tolist() == [1, 2, 1]
    assert states.where(~condition, 0, mixed[1][0][2]).tolist() == [1, 0, 1]
    grid = torch.tensor([[True, False], [False, False]])
    assert states.where(grid, torch.tensor([5, 6]), 7).tolist() == [[5, 7], [7, 7]]
    assert ssmkit.states.where is states.where
