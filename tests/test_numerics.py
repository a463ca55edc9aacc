"""Accuracy of float32 kernels, memory of streams, and the cost model of Krylov products."""

import copy
import sys
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ssmkit import S4, S4D
from ssmkit.testing import relative_error
from test_ops import peak_memory

STEPS = torch.tensor([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])


@pytest.mark.numerical
@pytest.mark.parametrize("cls", [S4, S4D])
@pytest.mark.parametrize("init", ["legs", "legt", "fout"])
@pytest.mark.parametrize(
    ("N", "L", "bound"), [(16, 16384, 2e-6), (64, 1000, 2e-6), (64, 1 << 17, 5e-6), (256, 4096, 2e-6)]
)
@torch.no_grad()
def test_float32_kernels(cls, init, N, L, bound):
    """Against float64 from the same float32 parameters; `benchmarks/accuracy.py` has the whole grid."""
    layer = cls(len(STEPS), N, init=init)
    layer.log_dt.copy_(STEPS.log())
    single, double = layer.kernel(L)[0], copy.deepcopy(layer).double().kernel(L)[0]
    assert max(relative_error(a, b) for a, b in zip(single, double, strict=True)) < bound


@pytest.mark.numerical
@pytest.mark.parametrize("N", [64, 256])
@pytest.mark.parametrize("L", [1000, 16384])
@pytest.mark.parametrize("init", ["legs", "legt", "fout"])
def test_float32_gradients_of_s4(init, L, N):
    """Computed in float32 from float64 factors, compared with all in float64, for each parameter."""
    layer = S4(len(STEPS), N, init=init)
    with torch.no_grad():
        layer.log_dt.copy_(STEPS.log())
    weight = torch.randn(1, len(STEPS), L)
    gradients = []
    for made in (layer, copy.deepcopy(layer).double()):
        (made.kernel(L) * weight).sum().backward()
        gradients.append({name: p.grad for name, p in made.named_parameters() if p.grad is not None})
    single, double = gradients
    for name, exact in double.items():
        assert relative_error(single[name], exact) < 3e-5, name


@pytest.mark.parametrize("cls", [S4, S4D])
def test_a_stream_runs_in_constant_memory(cls):
    layer = cls(2, 8)
    system = layer.system()

    @torch.no_grad()
    def stream(chunks):
        state = layer.initial_state(1)
        for _ in range(chunks):
            _, state = layer.scan(torch.ones(1, 4096, 2), state, system)

    stream(1)
    assert peak_memory(lambda: stream(12)) < 1.05 * peak_memory(lambda: stream(3))


@pytest.mark.parametrize("L", [1, 2, 100, 1 << 14, 1_000_000])
@pytest.mark.parametrize("M", [1, 2, 16])
@pytest.mark.parametrize("N", [2, 64, 512])
def test_the_cost_model_of_krylov_products(N, M, L):
    """It counts multiplications and memory correctly, and no other layout of this length is cheaper."""
    krylov = sys.modules["ssmkit.ops.krylov"]
    layout = krylov._layout(N, M, L)
    covers = layout.blocks << layout.wide << layout.baby
    assert covers >= L
    assert covers - (1 << layout.wide + layout.baby) < L
    for baby in range(21):
        for wide in range(21 - baby):
            other = krylov._Layout(baby, wide, -(-L // (1 << baby + wide)))
            assert layout.cost(N, M) <= other.cost(N, M)
    if N < 512:
        A, b, c = torch.zeros(1, N, N), torch.zeros(1, N), torch.zeros(1, M, N)
        with FlopCounterMode(display=False) as counter:
            table, columns, rows = krylov._factors(A, b, c, L)
            krylov._product(rows, columns, L)
        with mock.patch.object(krylov, "_READ_ROWS", 0):
            assert counter.get_total_flops() == 2 * layout.cost(N, M)
        # Columns and rows are in memory twice: before and after the last doubling, and as the cast.
        numbers = sum(x.numel() for x in table) + 2 * (columns.numel() + rows.numel())
        assert krylov._factor_numbers(N, M, L) == numbers
