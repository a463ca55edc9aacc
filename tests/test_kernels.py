"""Every instruction, with few samples: with numba's compiler, and again without it.

Without it, by NUMBA_DISABLE_JIT=1, the lines of the kernels run as Python, so that their coverage can be measured.
"""

import pytest
import torch
from torch import nn

from ssmkit import S4, S4D, S5, S6, Mamba2, MultiRate, Residual, S4Block, Sequential, ShortConv, TiedDropout
from ssmkit.streaming import Engine
from ssmkit.testing import relative_error
from test_streaming import POINTWISE, by_hand

# numpy warns in Python, where compiled code does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LAYERS = {
    "rank 0": lambda: S4D(5, 6),
    "rank 1": lambda: S4(5, 6),
    "rank 2, channels": lambda: S4(5, 6, rank=2, channels=2),
    "real poles at rest": lambda: S4D(5, 6, init="real", dt_min=1.0, dt_max=2.0),
    "one system for all inputs": lambda: S5(5, 6),
    "taps": lambda: ShortConv(5, 3),
    "one tap": lambda: ShortConv(5, 1, bias=False),
    "selective": lambda: S6(5, 3, dt_min=0.1, dt_max=1.0),
    "selective at a rate, fixed gains": lambda: Sequential(
        nn.Linear(5, 6), S6(6, 2, ngroups=2, variable_B=False), S6(6, 2, ngroups=3, variable_C=False)
    ),
    "heads": lambda: Mamba2(5, 3, headdim=5, ngroups=2, dt_limit=(0.01, 0.5)),
    "gates": lambda: Sequential(nn.Linear(5, 14), nn.GLU(), S4D(7, 4, channels=2), nn.GLU(), nn.Linear(7, 6)),
    "frames": lambda: Residual(MultiRate(5, S4Block(10, S4D(10, 4)), pool=3), nn.RMSNorm(5)),
}


@pytest.mark.parametrize("module", [m for m in POINTWISE if not isinstance(m, nn.Embedding)], ids=str)
@torch.no_grad()
def test_modules(module):
    u = torch.cat([torch.randn(2, 4, 6) * scale for scale in (1e-4, 1.0, 5.0)], 1)
    y = Engine(Sequential(TiedDropout(6), module.eval())).start(2).run(u)
    assert relative_error(y, module(u)) < 1e-6


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_layers(name):
    layer = LAYERS[name]()
    u = torch.cat([torch.randn(2, 30, 5), torch.zeros(2, 30, 5)], 1)
    stream = Engine(layer).start(2)
    y = torch.cat([stream.run(u[:, :7]), stream.run(u[:, 7:])], 1)
    assert relative_error(y, layer.double()(u.double())) < 2e-6
    _, end = layer.scan(u.double(), layer.initial_state(2, dtype=torch.float64))
    if isinstance(end, torch.Tensor):
        assert relative_error(stream.state, end) < 2e-5


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"temperature": 0.5, "top_k": 3}, {"top_p": 0.7}, {"top_k": 20}]
)
def test_sampling(options):
    model = Sequential(nn.Embedding(20, 8), S4D(8, 4), nn.Linear(8, 20)).eval()
    logits, uniform = 3 * torch.randn(20), torch.rand(12, dtype=torch.float64)
    made = Engine(model).start().generate(logits, uniform, **options)
    chosen = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    classes, nats, end = by_hand(model, logits, uniform, *chosen.values())
    assert torch.equal(made.classes, classes)
    assert relative_error(made.nats, nats) < 1e-5
    assert relative_error(made.logits, end) < 1e-5
