"""The step under torch.compile: the same numbers, and no compilation twice."""

import warnings

import pytest
import torch
from torch import nn

import ssmkit
from ssmkit import S4, S4D, MultiRate, Pointwise, Residual, S4Block, Sequential, ShortConv, compile_step, stepping
from ssmkit.testing import relative_error


class Twice(nn.Module):
    def forward(self, u):
        return 2 * u


def tensors(state):
    if isinstance(state, tuple):
        return [tensor for child in state for tensor in tensors(child)]
    return [state] if isinstance(state, torch.Tensor) else []


def network():
    inmost = Sequential(ShortConv(16), S4D(16, 4))
    inner = Sequential(Residual(MultiRate(8, S4Block(16, inmost), 2)), Pointwise(Twice()))
    return Sequential(nn.Embedding(9, 4), Residual(MultiRate(4, inner, 3)), S4Block(4, S4(4, 4)), nn.Linear(4, 9))


def test_compiled_steps_are_steps_and_nothing_is_compiled_after_the_first_frame():
    model = network().eval()
    step, system = compile_step(model), model.system()
    for batch in ((5,), ()):
        state = expected_state = model.initial_state(*batch)
        u = torch.randint(9, (30, *batch))
        for k in range(30):
            # One frame of the slowest tier is 6 samples.
            with torch._dynamo.config.patch(error_on_recompile=k >= 6):
                y, state = step(u[k], state)
            with torch.no_grad():
                expected, expected_state = model.step(u[k], expected_state, system)
            assert relative_error(y, expected) < 1e-5
            assert not any(value.requires_grad for value in (y, *tensors(state)))
    assert state[1][0][2] == expected_state[1][0][2] == 0
    with torch.no_grad():
        continued = model.scan(u, state)[0]
        assert relative_error(continued, model.scan(u, expected_state)[0]) < 1e-5


CHAINS = {
    "two before a MultiRate": lambda: Sequential(S4D(4, 4), nn.Linear(4, 4), MultiRate(4, S4D(8, 4), 2), nn.Tanh()),
    "two MultiRates": lambda: Sequential(MultiRate(4, S4D(8, 4), 2), Residual(MultiRate(4, S4D(8, 4), 3)), nn.Tanh()),
    "nothing but a MultiRate": lambda: MultiRate(4, Sequential(nn.Linear(8, 8), S4D(8, 4)), 2),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("grad", [True, False])
def test_every_part_of_a_chain_has_its_own_state_and_system(monkeypatch, name, grad):
    """For any place of the change of rate; with gradients enabled outside and disabled."""
    # This tests the compiled parts, not what torch makes of them.
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    model = CHAINS[name]().double().eval()
    step, system = compile_step(model, model.system(1.0)), model.system()
    state = expected_state = model.initial_state(3, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        for u in torch.randn(14, 3, 4, dtype=torch.float64):
            y, state = step(u, state)
            expected, expected_state = model.step(u, expected_state, system)
            assert relative_error(y, expected) < 1e-12
            assert len(tensors(state)) == len(tensors(expected_state))
            assert not any(value.requires_grad for value in (y, *tensors(state)))
            assert expected.requires_grad == grad or not expected.any()


def test_the_system_is_a_constant():
    model = S4D(3, 4)
    step, state = compile_step(model), model.initial_state()
    u = torch.randn(3)
    before, _ = step(u, state)
    with torch.no_grad():
        model.D.add_(1)
    assert torch.equal(step(u, state)[0], before)
    slow, _ = compile_step(model, model.system(0.5))(u, state)
    assert relative_error(slow, model.step(u, state, model.system(0.5))[0]) < 1e-5


def test_without_a_compiler_it_is_eager_and_warns(monkeypatch):
    monkeypatch.setattr(stepping, "_missing_compiler", lambda device: "no such thing")
    model = network()
    with pytest.warns(UserWarning, match="stays eager .no such thing"):
        step = compile_step(model)
    state, u = model.initial_state(2), torch.randint(9, (2,))
    y, _ = step(u, state)
    assert torch.equal(y, model.step(u, state)[0].detach())
    assert not y.requires_grad


def test_the_missing_compiler_is_named(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("No working C++ compiler")

    stepping._missing_compiler.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    assert stepping._missing_compiler("cpu") == "RuntimeError: No working C++ compiler"
    stepping._missing_compiler.cache_clear()


def test_torch_compile_works_on_this_machine():
    """Without a compiler the tests above would test little."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert stepping._missing_compiler("cpu") is None
    assert ssmkit.compile_step is compile_step
