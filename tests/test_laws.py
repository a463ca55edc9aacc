"""The laws of the contract, for every layer and option."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ssmkit
from family import BIDIRECTIONAL, CAUSAL, COMPOSED, SSM
from ssmkit.testing import assert_modes_agree, example_input, relative_error

LENGTHS = st.one_of(st.sampled_from([1, 2, 3, 127, 128, 129, 257]), st.integers(1, 70))
BATCHES = st.lists(st.integers(1, 3), max_size=2)


def leaves(state):
    if isinstance(state, tuple):
        return [leaf for child in state for leaf in leaves(child)]
    return [state] if isinstance(state, torch.Tensor) else []


def _modes_agree(name, dtype, batch, L, data):
    layer = CAUSAL[name]().to(dtype)
    split = data.draw(st.integers(0, L))
    assert_modes_agree(layer, example_input(layer, *batch, L), splits=[split])


@pytest.mark.parametrize("name", CAUSAL)
@given(batch=BATCHES, L=LENGTHS, data=st.data())
def test_modes_agree(name, batch, L, data):
    """forward = scan = steps, split anywhere; causal; pure: to 1e-10 in float64."""
    _modes_agree(name, torch.float64, batch, L, data)


@pytest.mark.numerical
@pytest.mark.parametrize("name", CAUSAL)
@given(batch=BATCHES, L=LENGTHS, data=st.data())
def test_modes_agree_in_float32(name, batch, L, data):
    """The same, to 1e-4."""
    _modes_agree(name, torch.float32, batch, L, data)


@pytest.mark.parametrize("name", CAUSAL)
def test_three_scans_agree_with_one(name):
    layer = CAUSAL[name]().double().eval()
    u = example_input(layer, 2, 150)
    state, parts = layer.initial_state(2, dtype=torch.float64), []
    for chunk in u.split([7, 0, 131, 12], dim=1):
        y, state = layer.scan(chunk, state)
        parts.append(y)
    assert relative_error(torch.cat(parts, 1), layer(u)) < 1e-10


@pytest.mark.parametrize("name", CAUSAL)
def test_a_state_does_not_keep_its_chunk_in_memory(name):
    layer = CAUSAL[name]().eval()
    with torch.no_grad():
        _, state = layer.scan(example_input(layer, 2, 40), layer.initial_state(2))
    for part in leaves(state):
        assert part.untyped_storage().nbytes() <= part.nbytes


@pytest.mark.parametrize("name", CAUSAL)
def test_gradients_agree_and_reach_every_parameter(name):
    """The gradients of forward, scan and steps are the same, and none is missing or zero."""
    layer = CAUSAL[name]().double().eval()
    u = example_input(layer, 2, 140)  # More than one chunk of a scan.
    weight = torch.randn_like(layer(u))

    def gradients(y):
        return torch.autograd.grad((y * weight).sum(), list(layer.parameters()))

    def steps():
        state, out = layer.initial_state(2, dtype=torch.float64), []
        system = layer.system()
        for sample in u.unbind(1):
            y, state = layer.step(sample, state, system)
            out.append(y)
        return torch.stack(out, 1)

    if not list(layer.parameters()):
        return
    whole = gradients(layer(u))
    scanned = gradients(layer.scan(u, layer.initial_state(2, dtype=torch.float64))[0])
    stepped = gradients(steps())
    for (label, _), a, b, c in zip(layer.named_parameters(), whole, scanned, stepped, strict=True):
        assert a.abs().max() > 0, label
        assert relative_error(b, a) < 1e-8, label
        assert relative_error(c, a) < 1e-8, label


# A mask has no effect in eval mode, and a frame of one sample is never partly full.
WITHOUT_GRADIENT = ("TiedDropout", "S4Block, tied dropout", "MultiRate, pool 1", "LearnedStart of a network")


@pytest.mark.parametrize("name", [n for n in CAUSAL if n not in WITHOUT_GRADIENT])
@pytest.mark.parametrize("mode", ["scan", "step"])
def test_gradients_reach_the_initial_state(name, mode):
    layer = CAUSAL[name]().double().eval()
    u = example_input(layer, 2, 40)
    _, state = layer.scan(u[:, :11], layer.initial_state(2, dtype=torch.float64))
    state = ssmkit.states.detach(state)
    tensors = leaves(state)
    if not tensors:
        pytest.skip("a layer without memory")
    for tensor in tensors:
        tensor.requires_grad_()
    if mode == "scan":
        y, _ = layer.scan(u[:, 11:], state)
    else:
        rows = []
        for sample in u[:, 11:].unbind(1):
            y, state = layer.step(sample, state)
            rows.append(y)
        y = torch.stack(rows, 1)
    grads = torch.autograd.grad((y * torch.randn_like(y)).sum(), tensors, allow_unused=True)
    assert all(g is not None and (not g.numel() or (g.isfinite().all() and g.abs().max() > 0)) for g in grads)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_empty_sequences_work(name, batch):
    layer = CAUSAL[name]().eval()
    u = example_input(layer, *batch, 0)
    width = layer(example_input(layer, *batch, 3)).shape[-1]
    assert layer(u).shape == (*batch, 0, width)
    state = layer.initial_state(*batch)
    y, after = layer.scan(u, state)
    assert y.shape == (*batch, 0, width)
    assert [torch.equal(a, b) for a, b in zip(leaves(after), leaves(state), strict=True)] == [True] * len(leaves(state))


@pytest.mark.numerical
@pytest.mark.parametrize("name", BIDIRECTIONAL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=5)
@given(L=st.integers(0, 40))
def test_bidirectional_is_the_sum_over_past_and_future(name, dtype, L):
    layer = BIDIRECTIONAL[name]().to(dtype)
    u = example_input(layer, 2, L)
    k = layer.kernel(L)
    past, future = k[: layer.channels], k[layer.channels :]
    expected = torch.zeros(2, L, layer.channels, layer.d_model, dtype=dtype)
    for at in range(L):
        for j in range(L):
            gain = past[..., at - j] if j <= at else future[..., j - at - 1]
            expected[:, at] = expected[:, at] + gain * u[:, j, None]
    expected = expected + layer.D * u[:, :, None]
    assert relative_error(layer(u), expected.flatten(-2)) < (1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_bidirectional_refuses_to_run_as_a_recurrence(name):
    layer = BIDIRECTIONAL[name]()
    u = example_input(layer, 2, 5)
    for call in (
        lambda: layer.initial_state(2),
        lambda: layer.step(u[:, 0], torch.zeros(2)),
        lambda: layer.scan(u, torch.zeros(2)),
    ):
        with pytest.raises(ValueError, match="is bidirectional: its output depends on the future"):
            call()


@pytest.mark.parametrize("name", {**CAUSAL, **{f"bidirectional {n}": f for n, f in BIDIRECTIONAL.items()}})
def test_save_and_load(name):
    make = {**CAUSAL, **{f"bidirectional {n}": f for n, f in BIDIRECTIONAL.items()}}[name]
    layer, other = make().eval(), make().eval()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    u = example_input(layer, 2, 20)
    assert torch.equal(other(u), layer(u))
    assert torch.equal(copy.deepcopy(layer)(u), layer(u))
    assert type(layer).__name__ in repr(layer)


@pytest.mark.parametrize("name", {**SSM, **BIDIRECTIONAL})
def test_parameters_are_real_and_depend_on_no_length(name):
    layer = {**SSM, **BIDIRECTIONAL}[name]()
    shapes = {n: v.shape for n, v in layer.state_dict().items()}
    assert not any(v.is_complex() for v in layer.state_dict().values())
    assert not list(layer.buffers())
    for L in (3, 50, 7):
        layer(example_input(layer, 1, L))
    assert {n: v.shape for n, v in layer.state_dict().items()} == shapes


@pytest.mark.parametrize("name", CAUSAL)
def test_a_state_stays_valid_after_an_optimiser_step(name):
    """A system depends on the weights from which it was made; a state depends on the data."""
    layer = CAUSAL[name]().double().train(False)
    if not list(layer.parameters()):
        return
    u = example_input(layer, 2, 24)
    old = layer.system()
    _, state = layer.scan(u[:, :12], layer.initial_state(2, dtype=torch.float64), old)
    y_before, _ = layer.scan(u[:, 12:], state, old)
    y_before.square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1e-3).step()
    y_after, _ = layer.scan(u[:, 12:], ssmkit.states.detach(state))
    y_again, _ = layer.scan(u[:, 12:], ssmkit.states.detach(state), layer.system())
    assert relative_error(y_again, y_after) == 0
    assert relative_error(y_after, y_before) > 0


def networks():
    yield "block", lambda: ssmkit.Sequential(nn.Linear(2, 4), ssmkit.S4Block(4), ssmkit.MultiRate(4, ssmkit.S4D(8, 4)))
    yield "SSM", lambda: ssmkit.S4(3, 8)


@pytest.mark.numerical
@pytest.mark.parametrize(("label", "make"), list(networks()))
def test_low_precision_keeps_states_and_systems_in_float32(label, make):
    layer = make().bfloat16().eval()
    u = example_input(layer, 2, 20)
    y = layer(u)
    assert u.dtype == y.dtype == torch.bfloat16
    state = layer.initial_state(2)
    scanned, after = layer.scan(u, state)
    assert {t.dtype for t in leaves(state) + leaves(after)} == {torch.float32}
    rows = []
    for sample in u.unbind(1):
        row, state = layer.step(sample, state)
        rows.append(row)
    assert relative_error(scanned, y) < 0.05
    assert relative_error(torch.stack(rows, 1), y) < 0.05


@pytest.mark.parametrize("name", CAUSAL)
def test_states_have_the_given_device_and_dtype(name):
    """The given device and dtype, by default those of the weights, and at least float32."""
    layer = CAUSAL[name]()

    def made(**options):
        tensors = leaves(layer.initial_state(2, 3, **options))
        assert all(tensor.shape[:2] == (2, 3) for tensor in tensors)
        return {(tensor.device.type, tensor.dtype) for tensor in tensors}

    empty = set() if not made() else None
    for options, place, dtype in (
        ({"device": "meta"}, "meta", torch.float32),
        ({"dtype": torch.float64}, "cpu", torch.float64),
        ({"dtype": torch.bfloat16, "device": "meta"}, "meta", torch.float32),
    ):
        assert made(**options) == ({(place, dtype)} if empty is None else empty)
    if list(layer.parameters()):
        layer.to("meta", torch.float64)
        # A mask has no weights.
        masks = any(isinstance(module, ssmkit.TiedDropout) for module in layer.modules())
        assert made() - ({("cpu", torch.float32)} if masks else set()) == (
            {("meta", torch.float64)} if empty is None else empty
        )


ON_META = ["S4", "S4D", "S5", "LRU", "ShortConv", "S6", "SSD", "S4Block, GLU, dropout", "MultiRate", "Mamba", "Mamba2"]


@pytest.mark.parametrize("name", ON_META)
def test_meta_tensors_have_the_shapes_of_every_mode(name):
    """Also with a given system, which makes and keeps its parts; torch has no autocast on this device."""
    layer = CAUSAL[name]().eval()
    u = example_input(layer, 2, 40)
    for autocast in (False, True):
        shapes = []
        for device in ("cpu", "meta"):
            v, made = u.to(device), copy.deepcopy(layer).to(device)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y, state, system = made(v), made.initial_state(2, device=device), made.system()
                found = [y, *(made.scan(v, state, part)[0] for part in (None, system))]
                found += [made.step(v[:, 0], state, part)[0] for part in (None, system)]
            assert {x.device.type for x in found} == {device}
            shapes.append([x.shape for x in found])
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", CAUSAL)
def test_empty_sequences_have_gradients(name):
    layer = CAUSAL[name]().eval()
    u = example_input(layer, 2, 0)
    if u.is_floating_point():
        u.requires_grad_()
    for y in (layer(u), layer.scan(u, layer.initial_state(2))[0]):
        y.sum().backward()
        assert not any(p.grad.any() for p in layer.parameters() if p.grad is not None)


LONG = {
    "S4": lambda: ssmkit.S4(2),
    "S4, fout": lambda: ssmkit.S4(2, init="fout"),
    "S4D": lambda: ssmkit.S4D(2),
    "S4D, fout": lambda: ssmkit.S4D(2, init="fout"),
    "S4D, N=256": lambda: ssmkit.S4D(2, 256),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("dt", [(1e-5, 2e-5), (1e-4, 1e-2), (1e-3, 1e-1)])
def test_float32_holds_over_long_sequences(name, dt):
    """Neither slow nor fast poles drift: 20,000 samples, with time scales up to a billion samples."""
    layer = LONG[name]()
    with torch.no_grad():
        layer.log_dt.copy_(torch.tensor(dt).log())
    u = torch.randn(1, 20_000, 2)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(u.double())
        system = layer.system()
        state, rows = layer.initial_state(1), []
        for sample in u.unbind(1):
            y, state = layer.step(sample, state, system)
            rows.append(y)
        scanned, _ = layer.scan(u, layer.initial_state(1), system)
    assert relative_error(layer(u).detach(), exact) < 1e-5
    assert relative_error(scanned, exact) < 1e-5
    assert relative_error(torch.stack(rows, 1), exact) < 2e-5


@pytest.mark.parametrize("make", [ssmkit.S4, ssmkit.S4D])
def test_a_million_samples(make):
    layer, u = make(2), torch.randn(1, 1 << 20, 2)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(u.double())
        assert relative_error(layer(u), exact) < 1e-5
        assert relative_error(layer.scan(u, layer.initial_state(1))[0], exact) < 2e-6


@pytest.mark.parametrize("make", [ssmkit.S4, ssmkit.S4D])
def test_a_thousand_states(make):
    layer = make(1, 1024).double()
    assert_modes_agree(layer, example_input(layer, 40))


def test_the_family_is_complete():
    """The family has every layer that the package exports."""
    made = {type(module) for make in CAUSAL.values() for module in make().modules()}
    exported = [getattr(ssmkit, n) for n in ssmkit.__all__ if isinstance(getattr(ssmkit, n), type)]
    bases = (ssmkit.SequenceLayer, ssmkit.ForwardLayer, ssmkit.StateSpaceLayer)
    missing = [c for c in exported if c not in made and c not in bases]
    assert not missing
    assert not set(SSM) & set(COMPOSED)
