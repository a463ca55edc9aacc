"""Loops over blocks of samples: the blocks' sizes change no number, and memory does not grow with states."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from family import TIMED
from ssmkit import S4D, S5
from ssmkit.ops.blocks import in_blocks
from ssmkit.systems import timed
from ssmkit.testing import example_input, relative_error
from test_timed import intervals


@given(
    rows=st.integers(1, 4),
    L=st.integers(1, 20),
    block=st.sampled_from([1, 24, 100, 10**6]),
    samples=st.sampled_from([1, 3, 64]),
    shared=st.booleans(),
    name=st.sampled_from(["S4D, tied channels", "S4D", "S5, wide"]),
)
def test_blocks_of_any_size_give_the_same(rows, L, block, samples, shared, name):
    """Of samples, of systems and of rows."""
    layer = TIMED[name]().double()
    u, rate = example_input(layer, rows, L).requires_grad_(), intervals(*(() if shared else (rows,)), L)
    rate.requires_grad_()
    wanted = [u, rate, *layer.parameters()]

    def found():
        y, state = layer.scan(u, torch.ones(rows, *layer.state_shape).double(), layer.system(rate))
        return y, state, *torch.autograd.grad(y.square().sum() + state.sum(), wanted)

    expected = found()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timed, "_BLOCK", block)
        patch.setattr(timed, "_SAMPLES", samples)
        for a, b in zip(found(), expected, strict=True):
            assert relative_error(a, b) < 1e-11


@pytest.mark.parametrize("constant", [True, False])
def test_second_derivatives(constant):
    """Also where the gradients of the outputs are constant, so that only the saved tensors have a graph."""

    def block(x, gain, u):
        states = [x]
        for u_k in u.unbind(1):
            states.append((gain * states[-1]).sin() + u_k)
        return torch.stack(states[1:], 1), states[-1]

    tensors = [torch.randn(3, dtype=torch.double, requires_grad=True) for _ in range(2)]
    u = torch.randn(3, 5, dtype=torch.double, requires_grad=True)

    def loss(run):
        y, last = run(tensors[0], tensors[1], u)
        return (y.sum() + 2 * last.sum()) if constant else (y**2).sum() + (last**3).sum()

    found, expected = (
        [
            g
            for first in torch.autograd.grad(loss(run), [*tensors, u], create_graph=True)
            for g in torch.autograd.grad(first.sin().sum(), [*tensors, u], retain_graph=True, allow_unused=True)
        ]
        for run in (lambda x, gain, u: in_blocks(block, 2, x, [gain], [u]), block)
    )
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or relative_error(a, b) < 1e-12


class Largest(TorchDispatchMode):
    """Keeps the bytes of the largest tensor that is made, and the numbers of the largest complex one."""

    bytes = numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
                self.numbers = max(self.numbers, tensor.numel() * tensor.is_complex())
        return out


@pytest.mark.parametrize("make", [lambda N: S4D(4, N), lambda N: S5(4, N)], ids=["S4D", "S5"])
def test_no_tensor_grows_with_length_and_states(make, monkeypatch):
    """Neither forwards nor backwards is there one of (batch, length, features, states), nor of (length, states)."""
    monkeypatch.setattr(timed, "_BLOCK", 1 << 11)
    rows, L, H, N = 2, 2048, 4, 128
    layer, u = make(N), torch.randn(rows, L, H)
    with Largest() as seen:
        layer(u, layer.system(intervals(rows, L, dtype=torch.float32))).square().sum().backward()
    # Two float64 outputs, or the shortest block: of one row and system of S4D, and of all rows of S5.
    block = 16 * (N // 2) * (max(64, N) if isinstance(layer, S4D) else 64 * rows)
    assert seen.bytes <= max(16 * rows * L * H, block)
    assert 8 * seen.bytes < 16 * (N // 2) * rows * L


@pytest.mark.parametrize(("rows", "H"), [(16, 8), (2, 64), (1, 3)])
def test_blocks_are_of_the_size_that_is_wanted(rows, H, monkeypatch):
    """Many rows, many features or neither: 2,048 numbers, but for first states and parameters."""
    monkeypatch.setattr(timed, "_BLOCK", 1 << 11)
    layer, u = S4D(H, 8), torch.randn(rows, 256, H)
    for rate in (intervals(256), intervals(rows, 256)):
        with Largest() as seen:
            layer(u, layer.system(rate)).square().sum().backward()
        assert (1 << 10) <= seen.numbers <= (1 << 11)


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_number_of_states():
    kept = {}

    def pack(x, kept=kept):
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    for N in (16, 128):
        layer, u = S4D(16, N), torch.randn(2, 1024, 16)
        system = layer.system(torch.ones(1024))
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = layer(u, system)
        # Inputs, first states of blocks, and what the parameters become; all states would be 2 N outputs.
        assert sum(kept.values()) < 4.5 * 4 * y.numel()


def test_in_blocks_is_a_loop_in_values_and_gradients():
    """For any function; constants, sequences and the first state."""

    def block(x, gain, u, v):
        rows = []
        for k in range(u.shape[1]):
            x = (gain * x + u[:, k]).tanh() * v[:, k]
            rows.append(x)
        return torch.stack(rows, 1), x.clone()

    x, gain, u, v = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3), (3,), (2, 11, 3), (1, 11, 1)))
    for needed in ((0, 1, 2, 3), (0,), (1, 3), (2,)):
        inputs = [z.detach().requires_grad_(i in needed) for i, z in enumerate((x, gain, u, v))]
        wanted = [inputs[i] for i in needed]
        results = []
        for samples in (11, 4, 1):
            y, last = in_blocks(block, samples, inputs[0], inputs[1:2], inputs[2:])
            results.append((y, last, *torch.autograd.grad(y.square().sum() + last.sum(), wanted)))
        y, last = block(*inputs)
        expected = y, last, *torch.autograd.grad(y.square().sum() + last.sum(), wanted)
        for result in results:
            for a, b in zip(result, expected, strict=True):
                assert relative_error(a, b) < 1e-12
