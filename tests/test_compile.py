"""torch.compile takes every layer as one graph, forward and backward."""

import pytest
import torch

from ssmkit import LRU, S4, S4D, S5, S6, Mamba, Mamba2, MultiRate, S4Block, ShortConv, layers
from ssmkit.testing import relative_error

# Short, since torch traces the loops over samples.
LENGTH = 12

LAYERS = {
    "S4": lambda: S4(3, 4),
    "S4, bidirectional": lambda: S4(3, 4, bidirectional=True),
    "S4D": lambda: S4D(3, 4, channels=2),
    "S5": lambda: S5(3, 4),
    "LRU": lambda: LRU(3, 4),
    "ShortConv": lambda: ShortConv(3),
    "S6": lambda: S6(4, 2),
    "SSD": lambda: layers.SSD(4, 2, headdim=2),
    "Mamba": lambda: Mamba(3, 2),
    "Mamba2": lambda: Mamba2(4, 2, headdim=4),
    "S4Block": lambda: S4Block(4, S4(4, 4), glu=True),
    "MultiRate": lambda: MultiRate(2, S4D(4, 4), pool=3),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["S4", "S4D", "MultiRate"])
def test_dynamic_lengths_are_compiled_one_by_one(name):
    torch.compiler.reset()
    layer = LAYERS[name]()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for L in (LENGTH, LENGTH + 2):
        u = torch.randn(2, L, layer.d_input)
        assert relative_error(compiled(u), layer(u)) < 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_exported_step_runs_at_every_phase_if_phases_are_a_tensor():
    layer = LAYERS["MultiRate"]().eval()

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, u, state):
            return self.layer.step(u, state)

    filling, emitting, _, inner = layer.initial_state(2)
    state = (filling, emitting, torch.tensor([0, 0]), inner)
    u = torch.randn(2, LENGTH, layer.d_input)
    program = torch.export.export(Step(), (u[:, 0], state)).module()
    for k, expected in enumerate(layer(u).unbind(1)):
        y, state = program(u[:, k], state)
        assert relative_error(y, expected) < 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["S4", "S4, bidirectional", "S4D", "S5", "MultiRate"])
def test_torch_refuses_to_export_dynamic_lengths(name):
    layer = LAYERS[name]().eval()
    length = torch.export.Dim("length", min=4, max=64)
    with pytest.raises(torch._dynamo.exc.UserError, match="length"):
        torch.export.export(layer, (torch.randn(2, LENGTH, layer.d_input),), dynamic_shapes={"u": {1: length}})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_backward_are_one_graph(name):
    torch.compiler.reset()
    layer = LAYERS[name]()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    u = torch.randn(2, LENGTH, layer.d_input, requires_grad=True)
    results = []
    for run in (layer, compiled):
        y = run(u)
        results.append([y, *torch.autograd.grad(y.square().sum(), [u, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        assert relative_error(b, a) < 1e-5
