"""Accuracy of float32 kernels, memory of streams, and the cost model of Krylov products."""

import copy
import sys

import pytest
import torch

from ssmkit import S4, S4D
from ssmkit.testing import relative_error
from test_ops import peak_memory

STEPS = torch.tensor([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])


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
def test_baby_and_giant_steps_are_balanced(L, M):
    """No other split of the doublings makes smaller factors: J baby steps and M rows of L/J giant steps."""
    krylov = sys.modules["ssmkit.ops.krylov"]
    bits, baby = krylov._split(M, L)
    assert 1 << bits >= L > (1 << bits) // 2 or L == 1
    sizes = [(1 << b) + M * (1 << (bits - b)) for b in range(bits + 1)]
    assert sizes[baby] == min(sizes)
    N = 8
    assert krylov._factor_numbers(N, M, L) == bits * N * N + 2 * N * sizes[baby]
