"""Containers manage the systems and states of their layers, and refuse modules that cannot run step by step."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn

import ssmkit
from ssmkit import (
    S4,
    S4D,
    Checkpoint,
    Concatenate,
    DownPool,
    MultiRate,
    Pointwise,
    Product,
    Residual,
    S4Block,
    Sequential,
    TiedDropout,
    UpPool,
)
from ssmkit.testing import relative_error

POINTWISE = [
    nn.Linear(4, 4),
    nn.LayerNorm(4),
    nn.RMSNorm(4),
    nn.GELU(),
    nn.ReLU(),
    nn.SiLU(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.GLU(),
    nn.PReLU(),
    nn.Softmax(-1),
    nn.LogSoftmax(dim=-1),
    nn.Dropout(0.1),
    nn.Identity(),
    nn.Sequential(nn.Linear(4, 8), nn.GELU()),
    torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
]

MIXING = [
    nn.Conv1d(4, 4, 3),
    nn.ConvTranspose1d(4, 4, 3),
    nn.LSTM(4, 4),
    nn.GRU(4, 4),
    nn.RNN(4, 4),
    nn.MultiheadAttention(4, 2),
    nn.TransformerEncoderLayer(4, 2),
    nn.BatchNorm1d(4),
    nn.InstanceNorm1d(4),
    nn.GroupNorm(2, 4),
    nn.MaxPool1d(2),
    nn.AvgPool1d(2),
    nn.Dropout1d(),
    nn.LayerNorm((9, 4)),
    nn.RMSNorm((9, 4)),
    nn.GLU(dim=1),
    nn.Softmax(dim=1),
    nn.PReLU(4),
    nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3)),
]


UNKNOWN = [
    nn.GRUCell(4, 4),
    nn.AdaptiveAvgPool1d(2),
    nn.Flatten(),
    nn.Upsample(scale_factor=2),
    nn.EmbeddingBag(4, 4),
    nn.Conv2d(4, 4, 3),
    nn.Bilinear(4, 4, 4),
]


@pytest.mark.parametrize("module", POINTWISE, ids=lambda m: type(m).__name__)
def test_pointwise_modules_go_in_as_they_are(module):
    ssmkit.testing.assert_modes_agree(Sequential(nn.Linear(3, 4), module, nn.Identity()))


@pytest.mark.parametrize("module", MIXING, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("container", [Sequential, Residual, Pointwise, Product])
def test_modules_that_mix_time_steps_are_refused(module, container):
    with pytest.raises(
        ValueError, match=f"^{container.__name__}: .*(mixes time steps|must have dim=-1|must normalise|takes axis 1)"
    ):
        container(module)


@pytest.mark.parametrize("module", UNKNOWN, ids=lambda m: type(m).__name__)
def test_other_modules_of_torch_are_refused_as_unknown(module):
    for container in (Sequential, Residual, Product):
        with pytest.raises(ValueError, match=f"^{container.__name__}: .* is not known to be position-wise"):
            container(module)


class Own(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner or nn.Identity()

    def forward(self, u):
        return self.inner(u) * 2


def test_unknown_modules_are_refused_with_a_hint():
    with pytest.raises(ValueError, match=r"Own is not known to be position-wise.*ssmkit.Pointwise\(module\)"):
        Sequential(S4D(4, 4), Own())
    with pytest.raises(ValueError, match="Own is not known"):
        Sequential(nn.Sequential(nn.Linear(4, 4), Own()))
    ssmkit.testing.assert_modes_agree(Sequential(S4D(4, 4), Pointwise(Own())))
    with pytest.raises(ValueError, match="Pointwise: `module` must be position-wise, and Conv1d mixes time steps"):
        Pointwise(Own(nn.Conv1d(4, 4, 3)))
    with pytest.raises(
        ValueError, match="S4D is a sequence layer with a state of its own; put it in a container directly"
    ):
        Pointwise(S4D(4))
    with pytest.raises(ValueError, match="S4D is a sequence layer"):
        Sequential(nn.Sequential(S4D(4)))


@pytest.mark.parametrize("container", [Sequential, Residual, Pointwise])
def test_pooling_modules_are_refused(container):
    for pool in (DownPool(4), UpPool(4)):
        with pytest.raises(ValueError, match=r"Pool changes the rate; use `ssmkit.MultiRate`"):
            container(pool)


def test_only_modules_go_in():
    with pytest.raises(TypeError, match="Sequential: `layers` must be torch modules, got <"):
        Sequential(torch.relu.__call__ if False else (lambda u: u))
    with pytest.raises(TypeError, match="Pointwise: `module` must be a torch module, got int"):
        Pointwise(3)
    with pytest.raises(TypeError, match="MultiRate: `layer` must be a `ssmkit.SequenceLayer`, got Linear"):
        MultiRate(2, nn.Linear(4, 4))
    for wrong in (3, lambda d: d):
        with pytest.raises(TypeError, match="S4Block: `layer` must be a sequence layer or a function .*, got int"):
            S4Block(4, wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Sequential(S4D(4), S4D(5)),
            r"Sequential: `layers` must fit, and layer 1 \(S4D\) takes width 5, but the layer before it gives 4",
        ),
        (lambda: Sequential(nn.Linear(3, 4), nn.GLU(), S4D(4)), r"takes width 4, but the layer before it gives 2"),
        (lambda: Sequential(nn.Embedding(9, 4), nn.Linear(5, 4)), "takes width 5, but the layer before it gives 4"),
        (lambda: Residual(nn.Linear(4, 5)), "Residual: `layers` must give back the width they take, got 4 in and 5"),
        (lambda: Residual(S4D(4, channels=2)), "got 4 in and 8 out"),
        (lambda: MultiRate(4, S4D(4)), r"MultiRate: `layer` must take and give width 8 \(`expand \* d_model`\)"),
        (lambda: S4Block(4, S4D(5)), r"S4Block: `layer` must take width 4 \(`d_model`\), got 5"),
        (lambda: S4Block(4, lambda d: S4D(d + 1)), r"S4Block: `layer` must take width 4 \(`d_model`\), got 5"),
        (lambda: S4Block(4, Pointwise(Own())), r"S4Block: `layer` must know its output width \(`d_output`\)"),
        (lambda: S4Block(4, nn.Conv1d(4, 4, 3)), "S4Block: `layer` must be position-wise, and Conv1d mixes time steps"),
        (lambda: S4Block(4, dtype=torch.complex64), "S4Block: `dtype` must be a real floating dtype"),
        (lambda: MultiRate(0, S4D(4)), "MultiRate: `d_model` must be at least 1, got 0"),
        (lambda: MultiRate(2, S4D(4), pool=0), "MultiRate: `pool` must be at least 1, got 0"),
        (lambda: MultiRate(2, S4D(4), expand=0), "MultiRate: `expand` must be at least 1, got 0"),
        (lambda: MultiRate(2, S4D(4), dtype=torch.complex64), "MultiRate: `dtype` must be a real floating dtype"),
        (lambda: S4Block(0), "S4Block: `d_model` must be at least 1"),
        (lambda: S4Block(4, ff=0), "S4Block: `ff` must be at least 1"),
        (lambda: S4Block(4, dropout=1.5), "S4Block: `dropout` must be at least 0 and less than 1"),
        (lambda: TiedDropout(4, 1.0), "TiedDropout: `p` must be at least 0 and less than 1"),
    ],
)
def test_widths_are_checked_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_widths_are_known():
    model = Sequential(nn.GELU(), nn.Linear(3, 8), nn.GLU(), S4D(4, 4, channels=2), nn.Dropout())
    assert (model.d_input, model.d_output) == (3, 8)
    assert Sequential(nn.Embedding(9, 4)).d_input is None
    assert Sequential(nn.GLU(), nn.Linear(2, 5)).d_input is None
    assert S4Block(6, S4D(6, 4)).d_output == 6


def test_residual_checks_shapes_at_run_time():
    layer = Residual(nn.GLU())
    with pytest.raises(ValueError, match=r"Residual: `layers` must keep the shape \(2, 9, 4\)"):
        layer(torch.randn(2, 9, 4))


def test_values_are_tuples_of_the_childrens():
    model = Sequential(nn.Linear(3, 4), S4D(4, 8), Residual(S4D(4, 2)))
    state, system = model.initial_state(5), model.system()
    assert state[0] == system[0] == ()
    assert state[1].shape == (5, 4, 8)
    assert state[2][0].shape == (5, 4, 2)
    assert len(system) == 3
    assert system[2][0].kernel(3).shape == (1, 4, 3)


def test_a_chain_is_a_sequence_of_its_layers():
    model = Sequential(nn.Linear(3, 4), S4D(4, 8), nn.GELU(), S4Block(4, S4D(4, 4)))
    assert len(model) == 4
    assert list(model) == [model[0], model[1], model[2], model[3]]
    assert isinstance(model[0].module, nn.Linear)
    assert model[-1] is model[3]
    assert isinstance(model[-1][0][1], S4D)
    assert len(Sequential()) == 0
    with pytest.raises(IndexError):
        model[4]
    u = torch.randn(2, 9, 3)
    assert torch.equal(Sequential(*model)(u), model(u))
    assert torch.equal(model[2:](model[:2](u)), model(u))
    tail = model[1:]
    assert type(tail) is type(Residual(S4D(4))[:1]) is type(model[-1][::-1]) is Sequential
    assert (tail.d_input, tail.d_output, len(tail)) == (4, 4, 3)
    assert tail[0] is model[1]


@pytest.mark.parametrize("kind", [dict, OrderedDict])
@pytest.mark.parametrize("container", [Sequential, Residual, Checkpoint, Product, Concatenate])
def test_a_dictionary_gives_names(container, kind):
    model = container(kind(body=S4D(4, 8), head=nn.Linear(4, 4)))
    assert isinstance(model["body"], S4D)
    assert model["head"] is model[1]
    assert {name.rsplit(".", 1)[0] for name in model.state_dict()} == {"layers.body", "layers.head.module"}
    other = container(kind(body=S4D(4, 8), head=nn.Linear(4, 4)))
    other.load_state_dict(model.state_dict())
    u = torch.randn(2, 9, 4)
    assert torch.equal(model(u), other(u))
    with pytest.raises(KeyError):
        model["tail"]


def test_a_slice_keeps_names_as_torch_does():
    model = Sequential({"a": S4D(4), "b": nn.GELU(), "c": S4D(4)})
    assert model[1:]["c"] is model["c"]
    assert all(key.startswith("layers.1.") for key in Sequential(S4D(4), S4D(4))[1:].state_dict())


@pytest.mark.parametrize("name", ["", "a.b", "forward", "training"])
def test_names_that_torch_cannot_keep_are_refused(name):
    with pytest.raises(ValueError, match="Sequential: a name in `layers` must have no dot and be no attribute of"):
        Sequential({name: S4D(4)})


def test_keys_of_numbered_layers_are_those_of_saved_models():
    keys = list(Sequential(nn.Linear(3, 4), Residual(S4D(4, 8)), S4Block(4, S4D(4))).state_dict())
    assert keys[:3] == ["layers.0.module.weight", "layers.0.module.bias", "layers.1.layers.0.log_dt"]
    assert "layers.2.layers.1.layers.3.module.bias" in keys


def test_shares_give_each_layer_its_part():
    model = Sequential(nn.Linear(3, 4), S4D(4, 8))
    system, state = model.system(), model.initial_state(2)
    assert [layer for layer, _ in model.shares(None)] == list(model)
    assert [part for _, part in model.shares(None)] == [None, None]
    for (layer, part, first, second), i in zip(model.shares(system, state, state), range(2), strict=True):
        assert layer is model[i]
        assert part is system[i]
        assert first is second is state[i]


@pytest.mark.parametrize("wrong", [(), ((), ()), torch.zeros(2), ((), torch.zeros(2, 4, 8), 0)])
def test_foreign_states_are_refused(wrong):
    model = Sequential(nn.Linear(3, 4), S4D(4, 8), Residual(S4D(4, 2)))
    for call in (lambda: model.step(torch.randn(2, 3), wrong), lambda: model.scan(torch.randn(2, 9, 3), wrong)):
        with pytest.raises(ValueError, match="`state` must be a tuple of"):
            call()


def test_foreign_systems_are_refused():
    model = Sequential(nn.Linear(3, 4), S4D(4, 8))
    with pytest.raises(ValueError, match="`system` must be a tuple of 2, one per layer, got a tuple of 0"):
        model(torch.randn(2, 9, 3), ())
    model = Sequential(nn.Linear(3, 4), S4(4, 8))
    with pytest.raises(ValueError, match="`system` must be a tuple of 2, one per layer, got a DiscreteDPLR"):
        model.step(torch.randn(2, 3), model.initial_state(2), S4(4, 8).system())
    with pytest.raises(ValueError, match="Pointwise: `state` must be ()"):
        model.step(torch.randn(2, 3), (torch.zeros(2), model.initial_state(2)[1]))


def test_a_system_reaches_the_children():
    """The rate reaches all layers, and a given system is used."""
    model = Sequential(nn.Linear(3, 4), Residual(S4D(4, 8)))
    u = torch.randn(2, 20, 3)
    fast = model.system(rate=2.0)
    assert relative_error(model(u, fast), model(u)) > 1e-3
    scanned, _ = model.scan(u, model.initial_state(2), fast)
    assert relative_error(scanned, model(u, fast)) < 1e-5


def test_a_checkpoint_keeps_only_its_input():
    """The same gradients as without, with dropout too, and far less memory between the passes."""
    block = S4Block(4, S4D(4, 8), dropout=0.3)
    u = torch.randn(2, 50, 4)
    kept = {}
    for name, layer in (("plain", Sequential(block)), ("checkpoint", Checkpoint(block))):
        block.zero_grad()
        torch.manual_seed(1)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            y = layer(u)
        y.square().sum().backward()
        kept[name] = sum(saved), [p.grad.clone() for p in block.parameters()]
    assert kept["checkpoint"][0] < kept["plain"][0] / 5
    for a, b in zip(kept["plain"][1], kept["checkpoint"][1], strict=True):
        assert relative_error(a, b) < 1e-6


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, u):
        self.calls += 1
        return u.sin()


@pytest.mark.parametrize("mode", ["forward", "scan"])
def test_a_checkpoint_runs_its_layers_again_in_the_backward_pass(mode):
    """Once, with the same gradients as a chain that keeps everything, that of the state too."""
    counted, ssm = Counted(), S4D(4, 8)
    layers = [nn.Linear(4, 4), Pointwise(counted), ssm]
    u, start = torch.randn(2, 20, 4), torch.randn(2, 4, 8)
    gradients = []
    for layer, calls in ((Sequential(*layers), (1, 1)), (Checkpoint(*layers), (1, 2))):
        counted.calls = 0
        u.requires_grad_().grad = None
        start.requires_grad_().grad = None
        y, end = (layer(u), None) if mode == "forward" else layer.scan(u, ((), (), start))
        before = counted.calls
        ssm.zero_grad()
        (y.square().sum() + (0 if end is None else end[2].square().sum())).backward()
        assert (before, counted.calls) == calls
        gradients.append([u.grad, ssm.C.grad, ssm.log_dt.grad] + ([] if end is None else [start.grad]))
    for kept, again in zip(*gradients, strict=True):
        assert relative_error(kept, again) < 1e-6
        assert kept.any()


def test_tied_dropout_keeps_its_mask_over_time_and_modes():
    layer = TiedDropout(50, 0.4)
    u = torch.ones(3, 20, 50)
    y = layer(u)
    assert (y == y[:, :1]).all()
    assert not torch.equal(y[0], y[1])
    assert abs((y == 0).float().mean() - 0.4) < 0.15
    assert set(y.unique().tolist()) == {0.0, (torch.ones(()) / 0.6).item()}
    state = layer.initial_state(3)
    scanned, after = layer.scan(u, state)
    stepped, _ = layer.step(u[:, 0], after)
    assert (scanned == stepped[:, None]).all()
    layer.eval()
    assert torch.equal(layer.scan(u, state)[0], u)


def test_s4block_is_the_notebooks_block():
    """LayerNorm, layer, GELU, Linear, residual; LayerNorm, Linear, GELU, Linear, residual."""
    block = S4Block(4, S4D(4, 8))
    first, second = block.layers
    norm, ssm, act, linear = first.layers
    norm2, up, act2, down = second.layers
    u = torch.randn(2, 30, 4)
    v = u + linear(act(ssm(norm(u))))
    assert relative_error(block(u), v + down(act2(up(norm2(v))))) < 1e-6
    assert [type(x.module) for x in (norm, act, linear, norm2, up, act2, down)] == [
        nn.LayerNorm,
        nn.GELU,
        nn.Linear,
        nn.LayerNorm,
        nn.Linear,
        nn.GELU,
        nn.Linear,
    ]
    assert up.module.out_features == 8
    dropping = S4Block(4, S4D(4, 8), dropout=0.1)
    assert sum(isinstance(m, nn.Dropout) for m in dropping.modules()) == 2
    assert all(isinstance(S4Block(4, layer)[0][1], S4D) for layer in (S4D, S4D(4), lambda d: S4D(d)))
    assert S4Block(4, partial(S4D, d_state=16))[0][1].d_state == 16
    assert isinstance(S4Block(4)[0][1], S4)
    gated = S4Block(4, S4D(4, 8), glu=True)
    assert isinstance(gated.layers[0].layers[-1].module, nn.GLU)
    assert gated.layers[0].layers[-2].module.out_features == 8


@pytest.mark.parametrize("tied", [False, True])
def test_dropout_of_an_s4block(tied):
    """After both activations, with their width; tied over time, or drawn for every sample."""
    block = S4Block(4, S4D(4, 8, channels=2), ff=3, dropout=0.25, tie_dropout=tied)
    drops = [m for m in block.modules() if isinstance(m, (TiedDropout, nn.Dropout))]
    assert [(type(m), m.p) for m in drops] == [(TiedDropout if tied else nn.Dropout, 0.25)] * 2
    if tied:
        assert [m.d_model for m in drops] == [8, 12]
    for branch in block.layers:
        kinds = [type(getattr(m, "module", m)) for m in branch.layers]
        assert kinds.index(nn.GELU) + 1 == kinds.index(type(drops[0]))
    masks = [[], []]
    for drop, seen in zip(drops, masks, strict=True):
        drop.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output / inputs[0]))
    block(torch.randn(2, 50, 4))
    for (mask,) in masks:
        assert ((mask == 0) | ((mask - 1 / 0.75).abs() < 1e-5)).all()
        assert ((mask - mask[:, :1]).abs() < 1e-5).all() == tied


def test_an_s4block_needs_to_know_widths():
    with pytest.raises(ValueError, match="S4Block: `layer` must know its output width"):
        S4Block(4, Sequential(nn.GELU()))


HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda *_: seen.append(1)),
    "forward, before": lambda module, seen: module.register_forward_pre_hook(lambda *_: seen.append(1)),
    "backward": lambda module, seen: module.register_full_backward_hook(lambda *_: seen.append(1)),
    "backward, before": lambda module, seen: module.register_full_backward_pre_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_positionwise_modules_run_in_every_mode(hook):
    linear, seen = nn.Linear(2, 2), []
    net = Sequential(linear)
    u = torch.randn(1, 3, 2, requires_grad=True)
    HOOKS[hook](linear, seen)
    for count, run in enumerate((net, lambda u: net.scan(u, ((),))[0], lambda u: net.step(u[:, 0], ((),))[0]), 1):
        run(u).sum().backward()
        assert len(seen) == count


def test_hooks_of_layers_run_when_a_layer_is_called():
    """The hooks of containers, and of layers with a system, run in `forward` alone."""
    layer, seen = S4D(2, 4), []
    net = Sequential(layer)
    for module in (layer, net):
        module.register_forward_hook(lambda module, *_: seen.append(module))
        module.register_forward_pre_hook(lambda module, _: seen.append(module))
    u = torch.randn(1, 3, 2)
    net(u)
    assert seen == [net, layer, layer, net]
    _, state = net.scan(u, net.initial_state(1))
    net.step(u[:, 0], state)
    assert len(seen) == 4


def test_what_hooks_return_is_used_in_every_mode():
    linear = nn.Linear(2, 2)
    net = Sequential(linear)
    u = torch.randn(1, 3, 2)
    linear.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    linear.register_forward_hook(lambda module, inputs, output: output + 1)
    expected = nn.functional.linear(2 * u, linear.weight, linear.bias) + 1
    assert relative_error(net(u), expected) < 1e-6
    assert relative_error(net.scan(u, ((),))[0], expected) < 1e-6
    assert relative_error(net.step(u[:, 0], ((),))[0], expected[:, 0]) < 1e-6


def test_device_and_dtype_reach_all_parameters():
    block = S4Block(4, partial(S4D, d_state=8), device="meta", dtype=torch.float64)
    pooled = MultiRate(2, S4D(4, device="meta", dtype=torch.float64), device="meta", dtype=torch.float64)
    for module in (block, pooled, S4Block(4, device="meta", dtype=torch.float64)):
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float64)}
