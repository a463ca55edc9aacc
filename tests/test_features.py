"""Features of torch over every layer: each is a line of the table in docs/features.rst, and works."""

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import device_mesh, fsdp

import ssmkit
from ssmkit.testing import relative_error
from test_compile import LAYERS, LENGTH

FEATURES = {}
"""The checks, by the names in the table."""


def feature(name):
    def add(check):
        FEATURES[name] = check
        return check

    return add


def sequence(layer, **options):
    return torch.randn(2, LENGTH, layer.d_input, **options)


def gradients(layer, y, u):
    return torch.autograd.grad(y.square().sum(), [u, *layer.parameters()])


def one_process():
    """A process group of one process."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return device_mesh.init_device_mesh("cpu", (1,))


@feature("`copy.deepcopy` and `pickle`")
def copies(layer):
    u = sequence(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(u), layer(u))


@feature("`state_dict`, `torch.load(weights_only=True)` and `load_state_dict(assign=True)`")
def weights(layer):
    u, file, other = sequence(layer), io.BytesIO(), copy.deepcopy(layer)
    torch.save(layer.state_dict(), file)
    file.seek(0)
    for parameter in other.parameters():
        parameter.data.add_(1)
    assert not torch.equal(other(u), layer(u))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(u), layer(u))
    empty = copy.deepcopy(layer).to("meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(u), layer(u))


@feature("All modes on the device meta, under autocast too")
def meta(layer):
    with torch.device("meta"):
        empty = LAYERS[layer.name]()
    assert all(parameter.is_meta for parameter in empty.parameters())
    u = torch.empty(2, LENGTH, layer.d_input, device="meta")
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = [empty(u)]
            if layer.causal:
                y, state = empty.scan(u, empty.initial_state(2))
                outputs += [y, empty.step(u[:, 0], state)[0][:, None].expand_as(y)]
        assert all(y.is_meta and y.shape == layer(sequence(layer)).shape for y in outputs)


@feature("Weights and inputs in float64 and bfloat16")
def dtypes(layer):
    u = sequence(layer)
    exact = copy.deepcopy(layer).double()(u.double())
    assert exact.dtype == torch.float64
    assert relative_error(layer(u), exact) < 1e-5
    rough = copy.deepcopy(layer).bfloat16()(u.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert relative_error(rough.double(), exact) < 0.2


@feature("Autocast to bfloat16 (the layer computes in float32 inside)")
def autocast(layer):
    u = sequence(layer, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(u)
    assert relative_error(y.float(), layer(u)) < 0.1
    assert all(g.isfinite().all() for g in gradients(layer, y.float(), u))


@feature("Backward passes inside autocast, and autocast under `torch.compile`")
def backward_inside_autocast(layer):
    """Outside autocast, a backward pass through the parts in float32 has products in float32, and here in bfloat16."""
    u = sequence(layer, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(u)
    expected = gradients(layer, y.float(), u)
    torch.compiler.reset()
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(u)
            found = gradients(layer, y.float(), u)
        # Together: a single small gradient may be the difference of large numbers.
        a, b = (torch.cat([g.flatten() for g in given]) for given in (found, expected))
        assert (a - b).norm() < 0.05 * b.norm()


@feature("`torch.autograd.gradcheck` and `gradgradcheck`")
def gradcheck(layer):
    layer, u = layer.double(), torch.randn(1, 3, layer.d_input, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer, u)
    assert torch.autograd.gradgradcheck(layer, u)


@feature("`torch.utils.checkpoint`")
def checkpoint(layer):
    u = sequence(layer, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(layer, u, use_reentrant=False)
    for a, b in zip(gradients(layer, y, u), gradients(layer, layer(u), u), strict=True):
        assert torch.equal(a, b)


@feature("`torch.use_deterministic_algorithms`")
def deterministic(layer):
    torch.use_deterministic_algorithms(True)
    try:
        u = sequence(layer, requires_grad=True)
        first, second = (gradients(layer, layer(u), u) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@feature("`torch.inference_mode`")
def inference(layer):
    u = sequence(layer)
    with torch.inference_mode():
        y = layer(u)
    assert relative_error(layer(u), y) < 1e-6


@feature("Averaged weights (`torch.optim.swa_utils`)")
def averaged(layer):
    average = torch.optim.swa_utils.AveragedModel(layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(layer)
    u = sequence(layer)
    assert relative_error(average(u), layer(u)) < 1e-6


@feature("Fused optimisers, clipping, `param_groups`")
def optimiser(layer):
    optimizer = torch.optim.AdamW(ssmkit.param_groups(layer, 1e-2), fused=True)
    u, before = sequence(layer), copy.deepcopy(layer)
    layer(u).square().sum().backward()
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
    assert layer(u).isfinite().all()
    assert all(not torch.equal(a, b) for a, b in zip(layer.parameters(), before.parameters(), strict=True))


@feature("`torch.export` (lengths and batch sizes are fixed)")
def export(layer):
    u = sequence(layer)
    program = torch.export.export(layer.eval(), (u,))
    v = sequence(layer)
    assert relative_error(program.module()(v), layer(v)) < 1e-5


@feature("`DistributedDataParallel`")
def data_parallel(layer):
    one_process()
    u = sequence(layer)
    nn.parallel.DistributedDataParallel(layer)(u).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@feature("FSDP2 (`fully_shard`), for `scan` and `step` with `register_fsdp_forward_method`")
def sharded(layer):
    mesh, u = one_process(), sequence(layer)
    y = layer(u).detach()
    state = layer.initial_state(2) if layer.causal else None
    fsdp.fully_shard(layer, mesh=mesh)
    z = layer(u)
    z.square().sum().backward()
    assert relative_error(z, y) < 1e-6
    if layer.causal:
        fsdp.register_fsdp_forward_method(layer, "scan")
        fsdp.register_fsdp_forward_method(layer, "step")
        z, state = layer.scan(u[:, :-1], state)
        last, _ = layer.step(u[:, -1], state)
        assert relative_error(torch.cat([z, last[:, None]], 1), y) < 1e-4


def test_a_pickle_of_a_whole_model_is_not_read_as_weights():
    file = io.BytesIO()
    torch.save(LAYERS["S4D"](), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(file, weights_only=True)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature, name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    layer.name = name
    FEATURES[feature](layer)


def test_the_page_has_every_feature():
    page = (Path(__file__).parents[1] / "docs/features.rst").read_text()
    lines = re.findall(r"^   \* - (.*(?:\n       .*)*)\n     - `tests/test_features.py`$", page, flags=re.MULTILINE)
    assert [re.sub(r"\s+", " ", line) for line in lines] == list(FEATURES)
