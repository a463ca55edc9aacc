"""A start that is learnt: what its parameters are, where they enter, and that gradients reach them and leave states."""

import copy

import pytest
import torch
from torch import nn

import ssmkit
from family import CAUSAL, COMPOSED, started
from ssmkit import (
    LRU,
    S4,
    S4D,
    S5,
    Checkpoint,
    LearnedStart,
    MultiRate,
    Residual,
    S4Block,
    Sequential,
    ShortConv,
    states,
)
from ssmkit.testing import example_input, relative_error
from test_laws import leaves

STARTED = [name for name in COMPOSED if "LearnedStart" in name]


def own(layer):
    return dict(layer.named_parameters(recurse=False))


def test_there_is_a_parameter_for_every_tensor_that_holds_the_past():
    layer = LearnedStart(
        Sequential(nn.Linear(2, 4), S4(4, 6), Residual(MultiRate(4, Sequential(S5(8, 6), ShortConv(8, 1)))), LRU(4, 6))
    )
    assert {name: tuple(p.shape) for name, p in own(layer).items()} == {
        "start_1": (4, 6),
        # The frame being emitted, and what is inside; not the one being filled, nor the phase, nor what has no numbers.
        "start_2_0_1": (4, 4),
        "start_2_0_3_0": (6,),
        "start_3": (6,),
    }
    assert own(LearnedStart(S4D(3, 4))).keys() == {"start"}
    assert not own(LearnedStart(Sequential(nn.Linear(2, 3), nn.GELU())))


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_at_first_nothing_changes(name):
    """Zeros: the layer is as it was from rest, whatever it is."""
    layer = CAUSAL[name]().double().eval()
    wrapped, u = LearnedStart(layer), example_input(layer, 2, 30)
    assert not any(p.any() for p in own(wrapped).values())
    assert relative_error(wrapped(u), layer(u)) < 1e-10
    for a, b in zip(leaves(wrapped.initial_state(2)), leaves(layer.initial_state(2)), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype


@torch.no_grad()
def test_streams_begin_in_it():
    layer = started(Sequential(S4D(3, 4), MultiRate(3, S5(6, 4), pool=3))).double()
    state = layer.initial_state(2, 5)
    for value, name in ((state[0], "start_0"), (state[1][1], "start_1_1"), (state[1][3], "start_1_3")):
        parameter = own(layer)[name]
        assert torch.equal(value, parameter.expand(2, 5, *parameter.shape))
    assert not state[1][0].any()
    assert state[1][2] == 0
    u = torch.randn(2, 5, 20, 3, dtype=torch.float64)
    expected, _ = layer.layer.scan(u, state)
    assert torch.equal(layer(u), expected)
    assert relative_error(layer.layer(u), expected) > 1e-3
    # The first frame that is heard is learnt.
    assert torch.equal(layer(u)[0, 0, :3], layer(u + 1)[0, 0, :3])
    layer.reset_parameters()
    assert relative_error(layer(u), layer.layer(u)) < 1e-10


@torch.no_grad()
def test_a_state_stays_as_it_is_when_the_start_changes():
    layer = started(S4D(3, 4))
    state = layer.initial_state(2)
    before = state.clone()
    layer.start.add_(1)
    assert torch.equal(state, before)


@torch.no_grad()
def test_masks_are_drawn_and_not_learnt():
    layer = started(S4Block(3, S4D(3, 4), dropout=0.5, tie_dropout=True))
    assert own(layer).keys() == {"start_0_1"}
    mask = layer.initial_state(100)[0][3]
    assert set(mask.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("name", STARTED)
def test_gradients_are_those_of_the_steps_in_every_mode(name):
    """To the start, from the outputs and from the last state."""
    layer = CAUSAL[name]().double().eval()
    wanted = [p for n, p in layer.named_parameters() if "start" in n]
    if not wanted:
        pytest.skip("a network without memory")
    u, found = example_input(layer, 2, 20), []
    state, rows = layer.initial_state(2), []
    for sample in u.unbind(1):
        y, state = layer.step(sample, state)
        rows.append(y)
    scanned, last = layer.scan(u, layer.initial_state(2))
    weights = [torch.randn_like(v) for v in (scanned, *leaves(last))]
    whole = [torch.stack(rows, 1), *leaves(state)], [scanned, *leaves(last)]
    for values in (*whole, [whole[0][0]], [scanned], [layer(u)]):
        total = sum((v * w).sum() for v, w in zip(values, weights, strict=False))
        found.append(torch.autograd.grad(total, wanted, retain_graph=True))
    for a, b, c, d, e in zip(*found, strict=True):
        assert c.abs().max() > 0
        for value, expected in ((b, a), (d, c), (e, c)):
            assert relative_error(value, expected) < 1e-10


@pytest.mark.parametrize("name", [n for n in CAUSAL if n not in ("TiedDropout", "Pointwise", "Pointwise, own module")])
def test_gradients_flow_through_the_last_state(name):
    """A loss on what is heard after a prompt: the same as of the whole, by the state in between."""
    layer = CAUSAL[name]().double().eval()
    u, parameters = example_input(layer, 2, 24), list(layer.parameters())
    _, state = layer.scan(u[:, :13], layer.initial_state(2))
    later, _ = layer.scan(u[:, 13:], state)
    weight = torch.randn_like(later)
    found = torch.autograd.grad((later * weight).sum(), parameters, allow_unused=True)
    expected = torch.autograd.grad((layer(u)[:, 13:] * weight).sum(), parameters, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None) or not (a if b is None else b).any()
        if a is not None and b is not None:
            assert relative_error(a, b) < 1e-8


def test_it_learns_where_a_stream_begins():
    """The state of a decay that is heard without input, from its output."""
    torch.manual_seed(0)
    layer = LearnedStart(S4D(2, 4, dt_min=0.1, dt_max=0.2)).double()
    truth = copy.deepcopy(layer)
    with torch.no_grad():
        truth.start.normal_()
    u = torch.zeros(1, 30, 2, dtype=torch.float64)
    target = truth(u).detach()
    optimizer = torch.optim.LBFGS([layer.start], max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16)

    def loss():
        optimizer.zero_grad()
        value = (layer(u) - target).square().mean()
        value.backward()
        return value

    first = loss().item()
    optimizer.step(loss)
    assert loss().item() < 1e-6 * first


def test_it_is_trained_without_decay():
    model = Sequential(LearnedStart(S4D(3, 8)), LearnedStart(LRU(3, 8)))
    groups = ssmkit.param_groups(model, lr=4e-3, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (1e-3, 0.0, 8),
        (4e-3, 0.0, 2),
        (4e-3, 0.1, 4),
    ]


@torch.no_grad()
def test_it_takes_rates_and_time_stamps_of_the_layer_inside():
    layer = started(S5(3, 4)).double()
    u, rate = torch.randn(2, 9, 3, dtype=torch.float64), torch.rand(2, 9, dtype=torch.float64) + 0.5
    expected, _ = layer.layer.scan(u, layer.initial_state(2), layer.layer.system(rate))
    assert torch.equal(layer(u, layer.system(rate)), expected)
    assert relative_error(layer(u, layer.system(2.0)), layer(u)) > 1e-3


@torch.no_grad()
def test_dtypes_are_those_of_any_layer():
    layer = started(S4D(3, 4)).double()
    assert layer.initial_state(2, dtype=torch.float32).dtype == torch.float32
    # The start is not rounded to the dtype of the input.
    u = torch.zeros(1, 5, 3)
    assert layer(u).dtype == torch.float32
    assert torch.equal(layer(u), layer.layer.scan(u, layer.initial_state(1))[0])
    assert layer.bfloat16().initial_state(2).dtype == torch.float32
    embedding = started(Sequential(nn.Embedding(5, 3), S4D(3, 4))).double()
    assert embedding(torch.tensor([[1, 2]])).dtype == torch.float64


@torch.no_grad()
def test_compiled_steps_and_programs_begin_in_it():
    model = started(Residual(MultiRate(3, Sequential(S4D(6, 4), nn.GELU())), S4D(3, 4))).eval()
    u = torch.randn(2, 12, 3)
    expected = model(u)
    step, state, rows = ssmkit.compile_step(model), model.initial_state(2), []
    for sample in u.unbind(1):
        y, state = step(sample, state)
        rows.append(y)
    assert relative_error(torch.stack(rows, 1), expected) < 1e-4
    pytest.importorskip("numba")
    engine = ssmkit.streaming.Engine(model)
    y, last = engine.run(u, model.initial_state(2))
    assert relative_error(y, expected) < 1e-4
    for a, b in zip(leaves(last), leaves(state), strict=True):
        assert relative_error(a, b) < 1e-4
    # Where the model began when the engine was made: as its weights, a copy.
    for parameter in own(model).values():
        parameter.add_(1)
    stream = engine.start(2, 1)
    assert relative_error(stream.run(u[:, None]), expected[:, None]) < 1e-4
    assert [x.shape[:2] for x in leaves(stream.state)] == [(2, 1)] * len(leaves(stream.state))
    assert relative_error(engine.run(u, model.initial_state(2))[0], expected) > 1e-3


def test_a_compiled_step_goes_through_it_to_what_is_inside():
    """The layers between two changes of the rate are compiled as one, and the phases stay outside."""
    model = started(Sequential(nn.Linear(3, 3), MultiRate(3, S4D(6, 4), pool=2))).eval()
    step, state = ssmkit.compile_step(model), model.initial_state(2)
    assert step.__qualname__ == ssmkit.compile_step(model.layer).__qualname__
    with torch.no_grad():
        for sample in torch.randn(6, 2, 3):
            expected, after = model.step(sample, state)
            y, state = step(sample, state)
            assert relative_error(y, expected) < 1e-5
            assert state[1][2] == after[1][2]


def test_checkpoints_keep_its_gradients():
    layer = Checkpoint(started(S4D(3, 4)), nn.GELU()).double()
    u = torch.randn(2, 9, 3, dtype=torch.float64)
    (a,) = torch.autograd.grad(layer(u).square().sum(), [layer[0].start])
    plain = Sequential(*layer)
    (b,) = torch.autograd.grad(plain(u).square().sum(), [layer[0].start])
    assert relative_error(a, b) < 1e-12
    assert a.any()


def test_bad_input_gets_a_sentence():
    for call, error, message in (
        (lambda: LearnedStart(nn.Linear(3, 3)), TypeError, "LearnedStart: `layer` must be a .* got Linear; wrap"),
        (
            lambda: LearnedStart(S4D(3, bidirectional=True)),
            ValueError,
            "LearnedStart: `initial_state` needs causal layers, and S4D is not causal",
        ),
        (
            lambda: LearnedStart(Sequential(S4D(3), S4D(3, bidirectional=True))),
            ValueError,
            r"LearnedStart: `initial_state` needs causal layers, and `layers.1` \(S4D\) is not causal",
        ),
        (lambda: LearnedStart(S4D(3))(torch.randn(2, 5, 4)), ValueError, "S4D: the last axis of `u` must be 3"),
        (lambda: LearnedStart(S4(3)).system(torch.ones(5)), ValueError, "S4: `rate` must be a number"),
        (lambda: LearnedStart(MultiRate(3, S4D(6))).system(2.0), ValueError, "MultiRate: `rate` must be 1, got 2.0"),
    ):
        with pytest.raises(error, match=f"^({message})"):
            call()


def test_widths_are_those_inside():
    assert Sequential(nn.Linear(3, 4), LearnedStart(S4D(4, channels=2)), nn.Linear(8, 2)).d_output == 2
    with pytest.raises(
        ValueError, match="^Sequential: `layers` must fit, and layer 1 .LearnedStart. takes width 4, but"
    ):
        Sequential(nn.Linear(3, 5), LearnedStart(S4D(4)))
    assert states.detach(LearnedStart(S4D(4)).initial_state()).shape == (4, 64)
