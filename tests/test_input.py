"""Input at the limits: what is refused and in which words, and what works although it is unusual."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import fuzz
import ssmkit
from family import BIDIRECTIONAL, CAUSAL, SHARED_BIDIRECTIONAL
from ssmkit import LRU, S4, S4D, S5, S6, Concatenate, MultiRate, Sequential, states
from ssmkit.streaming import Engine

U = torch.randn(2, 9, 4)


def _state(layer, dtype=torch.float32, **given):
    return layer.initial_state(2).to(dtype=dtype, **given)


def _with_phase(phase):
    layer = MultiRate(4, S4D(8), 3)
    first, second, _, inner = layer.initial_state(2)
    return layer, (first, second, phase, inner)


def _scan_with_phase(phase):
    layer, state = _with_phase(phase)
    return layer.scan(U, state)


def _run_with_phase(phase):
    layer, state = _with_phase(phase)
    return Engine(layer).run(U, state)


def _generate(**given):
    model = Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    right = {"logits": torch.zeros(5), "uniform": torch.rand(3)}
    return Engine(model).start().generate(**right | given)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: S4(4, dt_max=math.inf), ValueError, "S4: `dt_max` must be a positive number, got inf."),
        (lambda: S4(4, dt_max=1e300), ValueError, "S4: `dt_max` must be at most 1e+12, got 1e+300."),
        (lambda: S4(4, dt_max=10**400), ValueError, "S4: `dt_max` must be a number that a float can hold."),
        (lambda: S4D(4).system(1e300), ValueError, "S4D: `rate` must be at most 1e+12, got 1e+300."),
        (lambda: S4(4, 4, init=fuzz._nan), ValueError, "S4: `init` must return finite numbers, got others for N = 4."),
        (
            lambda: S4D(4, init=lambda N: np.ones(N)),
            TypeError,
            "S4D: `init` must return a pair of arrays, got array([",
        ),
        (
            lambda: S4D(4, discretization=3),
            TypeError,
            "S4D: `discretization` must be a name or a function, got 3 (int).",
        ),
        (
            lambda: S4D(4, 4, discretization=lambda *_: None).system(),
            ValueError,
            "Diagonal: `discretization` must return a pair of tensors with shape (4, 2).",
        ),
        (lambda: S4(4, bidirectional=2), TypeError, "S4: `bidirectional` must be True or False, got 2 (int)."),
        (lambda: S4(4, rank=1.5), TypeError, "S4: `rank` must be an integer, got 1.5 (float)."),
        (lambda: S4(10**30), ValueError, "S4: `d_model` must be less than 2147483648."),
        (lambda: S4(4, dtype="float32"), TypeError, "S4: `dtype` must be a torch.dtype, got 'float32' (str)."),
        (
            lambda: S4D(4, 512, init="inv", dtype=torch.float16),
            ValueError,
            "S4D: `dtype` must hold the initial values, up to 8.33e+04, got torch.float16.",
        ),
        (
            lambda: S4(4, device="nonsense"),
            ValueError,
            "S4: `device` must be a device that torch has here, got 'nonsense' (str).",
        ),
        (lambda: S4D(4).initial_state(-1), ValueError, "S4D: `batch_shape` must be at least 0, got -1."),
        (lambda: S4D(4).step(None, _state(S4D(4))), TypeError, "S4D: `u` must be a tensor, got NoneType."),
        (
            lambda: S4D(4).step(U[:, 0], _state(S4D(4), torch.int64)),
            TypeError,
            "S4D: `state` must be a real floating tensor, got torch.int64.",
        ),
        (
            lambda: S4D(4).scan(U, _state(S4D(4), torch.complex64)),
            TypeError,
            "S4D: `state` must be a real floating tensor, got torch.complex64.",
        ),
        (
            lambda: S4D(4).scan(U, _state(S4D(4)).to_sparse()),
            TypeError,
            "S4D: `state` must be a dense tensor, got layout torch.sparse_coo.",
        ),
        (
            lambda: S4D(4).step(U[:, 0], _state(S4D(4), device="meta")),
            ValueError,
            "S4D: `state` must be on the device of `u`, cpu, got meta.",
        ),
        (
            lambda: S4D(4)(U, S4D(4, device="meta").system()),
            ValueError,
            "S4D: `u` must be on the device of `system`, meta, got cpu.",
        ),
        (
            lambda: Sequential(nn.Linear(4, 4))(U.double()),
            ValueError,
            "Pointwise: `u` must be an input of Linear, got torch.float64 of shape (2, 9, 4) (",
        ),
        (
            lambda: Sequential(nn.Embedding(4, 4)).step(torch.tensor([4]), ((),)),
            ValueError,
            "Pointwise: `u` must be an input of Embedding, got torch.int64 of shape (1,) (index out of range in self).",
        ),
        (
            lambda: Sequential(nn.Embedding(4, 4))(torch.zeros(1, dtype=torch.long, device="meta")),
            ValueError,
            "Pointwise: `u` must be on the device of `module`, cpu, got meta.",
        ),
        (
            lambda: ssmkit.DownPool(4)(U.double()),
            ValueError,
            "DownPool: `u` must be an input of Linear, got torch.float64 of shape (2, 3, 16) (",
        ),
        (
            lambda: _scan_with_phase(-1),
            ValueError,
            "MultiRate: `state` must be (frame being filled, frame being emitted,",
        ),
        (
            lambda: _scan_with_phase(100),
            ValueError,
            "MultiRate: `state` must be (frame being filled, frame being emitted,",
        ),
        (
            lambda: _run_with_phase(torch.tensor([0, 100])),
            ValueError,
            "Engine: phases in `state` must be from 0 to 2, got 0 to 100.",
        ),
        (
            lambda: Engine(S4D(4)).run(U, _state(S4D(4), torch.int64)),
            TypeError,
            "Engine: `state` must be a real floating tensor, got torch.int64.",
        ),
        (
            lambda: Engine(S4D(4)).run(U.to("meta"), _state(S4D(4))),
            ValueError,
            "Engine: `u` must have values, got a tensor on the device meta.",
        ),
        (lambda: Engine(S4D(4)).start(-1), ValueError, "Engine.start: `batch_shape` must be at least 0, got -1."),
        (
            lambda: _generate(uniform=torch.tensor([0.5, 1.0])),
            ValueError,
            "Stream.generate: numbers in `uniform` must be at least 0 and less than 1, got 0.5 to 1.0.",
        ),
        (
            lambda: _generate(logits=None),
            TypeError,
            "Stream.generate: `logits` must be a tensor, got NoneType.",
        ),
        (
            lambda: states.select(_state(S4D(4, 4)), [5]),
            ValueError,
            "select: `index` must take rows of the first axis, got [5] (list) for a tensor of shape (2, 4, 4).",
        ),
        (
            lambda: states.detach(None),
            TypeError,
            "detach: `state` must be a dense real tensor, a phase (an integer of at",
        ),
        (
            lambda: states.where(torch.ones(2), _state(S4D(4)), _state(S4D(4))),
            TypeError,
            "where: `condition` must be a boolean tensor, got ",
        ),
        (
            lambda: states.to_dict(_state(S4D(4)), prefix=3),
            TypeError,
            "to_dict: `prefix` must be a string, got 3 (int).",
        ),
        (
            lambda: ssmkit.param_groups("x", 0.1),
            TypeError,
            "param_groups: `model` must be a torch module, got 'x' (str).",
        ),
        (
            lambda: ssmkit.compile_step(nn.Linear(2, 2)),
            TypeError,
            "compile_step: `model` must be a `ssmkit.SequenceLayer`, got Linear.",
        ),
        (
            lambda: ssmkit.sequences.collate([(U[0], 1), (U[1],)]),
            ValueError,
            "collate: `samples` must hold the same number of values each, and begin with a sequence.",
        ),
        (
            lambda: ssmkit.sequences.forward_padded(S4D(4), U, torch.ones(2, dtype=torch.long, device="meta")),
            ValueError,
            "forward_padded: `lengths` must have values, got a tensor on the device meta.",
        ),
    ],
)
def test_refused_in_one_sentence(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)
    assert fuzz.refusal(caught.value)


def _inputs(layer, *batch):
    if any(isinstance(m, nn.Embedding) for m in layer.modules()):
        return torch.randint(7, batch)
    return torch.randn(*batch, layer.d_input or 3, dtype=torch.double)


def _double(make):
    return make().double().eval()


@pytest.mark.parametrize("name", CAUSAL)
def test_empty_batches_in_every_mode(name):
    layer = _double(CAUSAL[name])
    for batch in [(0,), (2, 0)]:
        u, state = _inputs(layer, *batch, 5), layer.initial_state(*batch)
        y, _ = layer.scan(u, state)
        first, _ = layer.step(u.select(len(batch), 0), state)
        assert layer(u).shape == y.shape == (*batch, 5, layer.d_output or y.shape[-1])
        assert first.shape == (*batch, y.shape[-1])


def _strided(x):
    """The same numbers, in every second element of the memory and with its axes in another order."""
    wide = x.new_empty(*x.shape[:-1][::-1], 2 * x.shape[-1]).permute(*reversed(range(x.ndim - 1)), x.ndim - 1)
    wide[..., ::2] = x
    return wide[..., ::2]


@pytest.mark.parametrize("name", CAUSAL)
def test_inputs_and_states_of_any_strides(name):
    layer = _double(CAUSAL[name])
    u = _inputs(layer, 1, 6)
    _, state = layer.scan(u, layer.initial_state(1))
    with torch.no_grad():
        expanded = u.expand(3, *u.shape[1:])
        torch.testing.assert_close(layer(expanded), layer(expanded.contiguous()))
        strided_state = states._map("test", _strided, state)
        for mode, v in (("scan", u), ("step", u[:, 0])):
            wanted = getattr(layer, mode)(v, state)
            torch.testing.assert_close(getattr(layer, mode)(_strided(v), strided_state), wanted)


@pytest.mark.parametrize("name", [*BIDIRECTIONAL, *SHARED_BIDIRECTIONAL])
def test_inputs_of_any_strides_to_layers_that_are_not_causal(name):
    layer = _double({**BIDIRECTIONAL, **SHARED_BIDIRECTIONAL}[name])
    u = _inputs(layer, 1, 6).expand(3, -1, -1)
    torch.testing.assert_close(layer(u), layer(_strided(u)))
    assert layer(u[:0]).shape == (0, 6, layer.d_output)


@pytest.mark.parametrize("name", fuzz.MODELS)
def test_states_of_another_dtype_are_converted_alike_in_all_modes(name):
    model = fuzz.MODELS[name]().eval()
    if not model.causal:
        return
    u = fuzz.right_input(model, 2, 9)
    with torch.no_grad():
        _, state = model.scan(u, model.initial_state(2))
        wanted = model.scan(u, state)[0]
        for dtype in (torch.float64, torch.bfloat16):
            other = states._map("test", lambda x, dtype=dtype: x.to(dtype) if x.is_floating_point() else x, state)
            runs = [model.scan(u, other), model.step(u[:, 0], other), Engine(model).run(u, other)]
            rounding = 1e-5 if dtype == torch.float64 else 0.05
            for y, after in runs:
                y = y if y.ndim > 2 else y[:, None]
                size = wanted.abs().max()
                assert (y - wanted[:, : y.shape[1]]).abs().max() < rounding * size
                assert [t.dtype for t in states._tensors(after)] == [t.dtype for t in states._tensors(other)]


@pytest.mark.parametrize("name", fuzz.MODELS)
def test_a_nan_stays_in_its_sequence(name):
    model = fuzz.MODELS[name]().eval()
    u = fuzz.right_input(model, 2, 30)
    if not u.is_floating_point():
        return
    u[0, 20] = torch.nan
    with torch.no_grad():
        assert model(u)[1].isfinite().all()
        if not model.causal:
            return
        assert model.scan(u, model.initial_state(2))[0][1].isfinite().all()
        state, system = model.initial_state(2), model.system()
        for k in range(20):
            y, state = model.step(u[:, k], state, system)
            assert y.isfinite().all()
        y, state = model.step(u[:, 20], state, system)
        assert y[1].isfinite().all()


@pytest.mark.numerical
@pytest.mark.parametrize("steps", [(1e-8, 2e-8), (1e-8, 10.0), (9.0, 10.0), (1e11, 1e12)], ids=str)
@pytest.mark.parametrize("layer", [S4, S4D, S5, S6], ids=lambda layer: layer.__name__)
def test_step_sizes_of_any_size(layer, steps):
    given = {"dt_min": steps[0], "dt_max": steps[1]} | ({"dt_init_floor": 1e-9} if layer is S6 else {})
    small = layer(4, 8, **given).eval()
    exact = layer(4, 8, **given).double().eval()
    exact.load_state_dict(small.state_dict())
    u = torch.randn(2, 64, 4)
    with torch.no_grad():
        for rate in (1e-8, 1.0, 1e6):
            wanted, system = exact(u.double(), exact.system(rate)), small.system(rate)
            y, state = small.scan(u, small.initial_state(2), system)
            assert fuzz.finite(state)
            for found in (y, small(u, system)):
                assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_training_keeps_systems_stable():
    # An integrator is the target that pulls all poles to the border of stability.
    model = Concatenate(S4(1, 2), S4D(1, 2), S5(1, 2), LRU(1, 2))
    head = nn.Linear(4, 1)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(1000):
        u = torch.randn(2, 16, 1)
        loss = (head(model(u)) - u.cumsum(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    s4, s4d, s5, lru = model
    with torch.no_grad():
        poles, P = s4._poles, torch.view_as_complex(s4.P.double())
        poles, P = torch.cat([poles, poles.conj()], -1), torch.cat([P, P.conj()], -2)
        assert torch.linalg.eigvals(torch.diag_embed(poles) - P @ P.mH).real.max() < 0
        assert s4d._poles.real.max() < 0
        assert s5._poles.real.max() < 0
        assert lru.system().a.abs().max() < 1
        assert loss.isfinite()
        assert fuzz.finite(model.scan(torch.randn(1, 5000, 1), model.initial_state(1)))
