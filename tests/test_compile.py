"""torch.compile takes every layer as one graph, forward and backward."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.func import functional_call, grad, vmap

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


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_from_the_ninth_length_on_layers_run_uncompiled():
    assert torch._dynamo.config.recompile_limit == 8
    layer, u = LAYERS["S4D"](), torch.randn(2, 5, 3)
    for whole in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=whole, backend="eager")
        with torch._dynamo.config.patch(recompile_limit=2):
            for L in (3, 4):
                compiled(u[:, :L])
            if whole:
                with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
                    compiled(u)
            else:
                assert relative_error(compiled(u), layer(u)) < 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name in LAYERS if LAYERS[name]().causal])
def test_steps_are_compiled_in_the_first_frames_alone(name):
    """The second state may have other strides than the first, and MultiRate has a graph for each phase."""
    torch.compiler.reset()
    layer, counter = LAYERS[name]().eval(), CompileCounter()
    step, system = torch.compile(layer.step, fullgraph=True, backend=counter), layer.system()
    state, first = layer.initial_state(2), 6 if name == "MultiRate" else 2
    with torch.no_grad():
        for k in range(2 * first):
            _, state = step(torch.randn(2, layer.d_input), state, system)
            if k == first - 1:
                compiled = counter.frame_count
    assert counter.frame_count == compiled <= first


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_traces_of_torch_jit_are_refused(name):
    """They would be of one length, and of one phase of MultiRate."""
    layer = LAYERS[name]().requires_grad_(False)
    for run in [layer, lambda u: layer.scan(u, layer.initial_state(2))[0]][: 1 + layer.causal]:
        with pytest.raises(TypeError, match=r"^\w+: `u` must not be traced by torch.jit, .*; use torch.export\.$"):
            torch.jit.trace(run, torch.randn(2, LENGTH, layer.d_input))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["S4", "S4, bidirectional", "S4D", "S5", "MultiRate"])
def test_torch_refuses_to_export_dynamic_lengths(name):
    layer = LAYERS[name]().eval()
    length = torch.export.Dim("length", min=4, max=64)
    with pytest.raises(torch._dynamo.exc.UserError, match="length"):
        torch.export.export(layer, (torch.randn(2, LENGTH, layer.d_input),), dynamic_shapes={"u": {1: length}})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_backward_are_one_graph_for_each_length(name):
    torch.compiler.reset()
    layer, counter = LAYERS[name](), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    u = torch.randn(2, LENGTH, layer.d_input, requires_grad=True)
    results = []
    for run in (layer, compiled):
        y = run(u)
        results.append([y, *torch.autograd.grad(y.square().sum(), [u, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        assert relative_error(b, a) < 1e-5
    for L, graphs in ((LENGTH, 1), (2, 2), (LENGTH, 2), (2, 2)):
        compiled(torch.randn(2, L, layer.d_input, requires_grad=True))
        assert counter.frame_count == graphs


# Where torch has no rule for vmap, it goes through the batch row by row, and warns.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_samples_are_one_graph(name):
    torch.compiler.reset()
    layer = LAYERS[name]().eval()
    parameters = {key: parameter.detach() for key, parameter in layer.named_parameters()}

    def loss(parameters, u):
        return functional_call(layer, parameters, (u,)).square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))
    u = torch.randn(2, 4, layer.d_input)
    compiled = torch.compile(gradients, fullgraph=True, backend="eager")(parameters, u)
    for key, expected in gradients(parameters, u).items():
        assert relative_error(compiled[key], expected) < 1e-5
