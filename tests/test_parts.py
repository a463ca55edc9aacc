"""Systems are values: their kept parts carry no graph, and no later change of a layer changes them."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import ssmkit
from ssmkit.testing import relative_error
from test_own_layer import LRU

KINDS = {
    "S4": lambda: ssmkit.S4(3, 8),
    "S4, tied": lambda: ssmkit.S4(4, 8, n_ssm=2, tie_dt=True, channels=2, init="legt"),
    "S4D": lambda: ssmkit.S4D(3, 8),
    "LRU": lambda: LRU(3, 5),
}
MODES = {
    "scan": lambda layer, u, system: layer.scan(u, layer.initial_state(2, dtype=u.dtype), system)[0],
    "step": lambda layer, u, system: layer.step(u[:, 0], layer.initial_state(2, dtype=u.dtype) + 1, system)[0],
    "forward": lambda layer, u, system: layer(u, system),
}
ALL = pytest.mark.parametrize("kind", KINDS)
EACH = pytest.mark.parametrize("mode", MODES)


def made(kind):
    layer = KINDS[kind]().double()
    return layer, torch.randn(2, 70, layer.d_input, dtype=torch.double)


def gradients(layer, y):
    return torch.autograd.grad(y.square().sum(), list(layer.parameters()), allow_unused=True)


def same(found, expected):
    pairs = list(zip(found, expected, strict=True))
    assert [a is None for a, _ in pairs] == [b is None for _, b in pairs]
    return any(a is not None for a, _ in pairs) and all(relative_error(a, b) < 1e-10 for a, b in pairs if a is not None)


def kept(system):
    def flat(value):
        return [x for v in value for x in flat(v)] if isinstance(value, tuple) else [value]

    return flat(tuple(system.__dict__.get("_parts", {}).values()))


@ALL
@EACH
@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_gradients_are_correct_after_a_use_without_them(kind, mode, first):
    layer, u = made(kind)
    system = layer.system()
    with first():
        MODES[mode](layer, u, system)
    found = gradients(layer, MODES[mode](layer, u, system))
    assert same(found, gradients(layer, MODES[mode](layer, u, layer.system())))


@ALL
@EACH
@pytest.mark.parametrize("make", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_a_system_without_a_graph_gives_gradients_to_the_input(kind, mode, make, first):
    layer, u = made(kind)
    with make():
        system = layer.system()
    with first():
        MODES[mode](layer, u, system)
    u.requires_grad_()
    (found,) = torch.autograd.grad(MODES[mode](layer, u, system).square().sum(), u)
    (expected,) = torch.autograd.grad(MODES[mode](layer, u, None).square().sum(), u)
    assert relative_error(found, expected) < 1e-10


@ALL
@EACH
def test_two_backward_passes_through_coefficients_that_are_leaves(kind, mode):
    layer, u = made(kind)
    with torch.no_grad():
        system = layer.system()
        MODES[mode](layer, u, system)
    leaves = [tensor.requires_grad_() for tensor in system.coefficients]
    passes = []
    for _ in range(2):
        passes.append(torch.autograd.grad(MODES[mode](layer, u, system).sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*passes, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in passes[0])


@ALL
@pytest.mark.parametrize("given", [True, False])
def test_checkpoint_takes_a_system(kind, given):
    layer, u = made(kind)
    chain = ssmkit.Checkpoint(layer)
    state = chain.initial_state(2, dtype=u.dtype)
    y, _ = chain.scan(u.requires_grad_(), state, chain.system() if given else None)
    assert same(gradients(layer, y), gradients(layer, layer(u)))


@pytest.mark.parametrize("kind", ["S4, tied", "S4D", "LRU"])
@EACH
@pytest.mark.parametrize("made_where", ["outside, without a graph", "outside", "inside"])
def test_compile(kind, mode, made_where):
    layer, u = made(kind)
    with torch.set_grad_enabled(made_where != "outside, without a graph"):
        system = layer.system() if made_where != "inside" else None
    torch._dynamo.reset()
    compiled = torch.compile(lambda u: MODES[mode](layer, u, system), backend="aot_eager", dynamic=False)
    y = compiled(u)
    assert relative_error(y, MODES[mode](layer, u, system)) < 1e-10
    if made_where == "inside":
        assert same(gradients(layer, y), gradients(layer, MODES[mode](layer, u, None)))


@ALL
def test_a_prepared_step_compiles_as_one_graph_and_keeps_its_parts(kind):
    layer, u = made(kind)
    with torch.no_grad():
        system = layer.system()
        system.prepare()
        before = kept(system)
        torch._dynamo.reset()
        compiled = torch.compile(lambda u: MODES["step"](layer, u, system), backend="aot_eager", fullgraph=True)
        assert relative_error(compiled(u), MODES["step"](layer, u, system)) < 1e-10
        assert before
        assert all(a is b for a, b in zip(before, kept(system), strict=True))


@ALL
@pytest.mark.parametrize("prepared", [True, False])
def test_export(kind, prepared):
    layer, u = made(kind)
    with torch.no_grad():
        system = layer.system()
        if prepared:
            system.prepare()

    class Step(nn.Module):
        def forward(self, u, x):
            return layer.step(u, x, system)

    x = layer.initial_state(2, dtype=u.dtype)
    program = torch.export.export(Step(), (u[:, 0], x))
    assert not any(isinstance(tensor, FakeTensor) for tensor in kept(system))
    found, expected = program.module()(u[:, 0], x), layer.step(u[:, 0], x, system)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


@ALL
def test_a_fake_run_keeps_nothing(kind):
    """With fake tensors, which compute only shapes."""
    layer, u = made(kind)
    with torch.no_grad():
        system = layer.system()
        with FakeTensorMode(allow_non_fake_inputs=True):
            system.step(u[:, 0], system.initial_state(2))
    assert not kept(system)
    assert type(layer.step(u[:, 0], layer.initial_state(2), system)[0]) is torch.Tensor


@ALL
@EACH
def test_torch_func_keeps_no_parts(kind, mode):
    layer, u = made(kind)
    with torch.no_grad():
        system = layer.system()
    torch.func.grad(lambda u: MODES[mode](layer, u, system).sum())(u)
    assert not kept(system)
    parameters = dict(layer.named_parameters())
    names = list(parameters)

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (u,)).square().sum()

    found = torch.func.grad(loss)(parameters)
    assert same([found[name] for name in names], gradients(layer, layer(u)))


@ALL
@pytest.mark.parametrize("used", [True, False])
def test_parameters_changed_in_place_do_not_change_a_system(kind, used):
    """To the bit, with parts made before and with parts made after."""
    layer, u = made(kind)
    with torch.no_grad():
        system, other = layer.system(), layer.system()
        before = [mode(layer, u, other) for mode in MODES.values()]
        if used:
            assert all(torch.equal(mode(layer, u, system), y) for mode, y in zip(MODES.values(), before, strict=True))
        for parameter in layer.parameters():
            parameter.add_(0.1)
        for mode, y in zip(MODES.values(), before, strict=True):
            assert torch.equal(mode(layer, u, system), y)
            assert not torch.equal(mode(layer, u, None), y)


@ALL
def test_replaced_copied_and_pickled_systems_have_no_parts(kind):
    layer, u = made(kind)
    with torch.no_grad():
        system = layer.system()
        y = MODES["scan"](layer, u, system)
        assert kept(system)
        other = dataclasses.replace(system, D=system.D + 1)
        assert not kept(other)
        more = u.repeat(1, 1, layer.d_output // layer.d_input)
        assert relative_error(MODES["scan"](layer, u, other), y + more) < 1e-10
        for again in (copy.copy(system), copy.deepcopy(system), pickle.loads(pickle.dumps(system))):
            assert not kept(again)
            # Nor the device: a pickle may be read on another one.
            assert set(vars(again)) == {field.name for field in dataclasses.fields(again)}
            assert torch.equal(MODES["scan"](layer, u, again), y)


def test_autocast_does_not_affect_kept_parts():
    system = ssmkit.S4(3, 8).system()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        system.chunk_coefficients(32)
        LRU(3, 5).system().prepare()
    assert {tensor.dtype for tensor in kept(system) if tensor is not None} == {torch.float32, torch.complex128}


def bytes_of(system):
    tensors = [t for t in [*system.coefficients, *kept(system)] if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_a_system_that_only_steps_holds_no_matrix():
    """O(N) numbers per feature: a dense matrix for each feature would be 1 GiB."""
    layer = ssmkit.S4(512, 512)
    with torch.no_grad():
        system = layer.system()
        layer.step(torch.randn(1, 512), layer.initial_state(1), system)
    assert bytes_of(system) < 40 * 2**20


def test_a_scan_keeps_two_chunks_at_most():
    """For inputs of any lengths: a part for each of two chunk lengths, and none for the rest."""
    layer = ssmkit.S4(2, 8)
    with torch.no_grad():
        system, state = layer.system(), layer.initial_state(1)
        for length in (1, 5, 31, 32, 33, 100, 513, 20_000, 17_001):
            _, state = layer.scan(torch.randn(1, length, 2), state, system)
    assert len(system.__dict__["_parts"]) == 2
