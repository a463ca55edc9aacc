"""The selective scan, S6 and Mamba: values and gradients against loops, initialisation, memory and strong decays."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from family import COMPOSED, SELECTIVE
from ssmkit import S6, Mamba, Residual, Sequential, param_groups
from ssmkit.ops import naive_selective_scan, selective, selective_scan
from ssmkit.testing import relative_error
from test_layers import with_numbers_of_its_own

MAMBAS = {name: make for name, make in COMPOSED.items() if isinstance(make(), Mamba)}


def arguments(batch, L, E, N, B_groups, C_groups, start=True, dtype=torch.float64):
    """Numbers for a scan; without groups the gains are constant."""

    def gains(groups):
        return torch.randn(*((batch, L, groups, N) if groups else (E, N)), dtype=dtype)

    u, dt = torch.randn(batch, L, E, dtype=dtype), torch.rand(batch, L, E, dtype=dtype)
    found = [u, dt, -3 * torch.rand(E, N, dtype=dtype), gains(B_groups), gains(C_groups)]
    return [v.requires_grad_() for v in [*found, *([torch.randn(batch, E, N, dtype=dtype)] if start else [])]]


@given(
    batch=st.integers(1, 5),
    L=st.integers(1, 20),
    groups=st.sampled_from([(1, 1), (2, 2), (3, 1), (1, 6), (0, 2), (2, 0), (0, 0)]),
    N=st.integers(1, 3),
    start=st.booleans(),
    block=st.sampled_from([1, 24, 50, 10**6]),
    samples=st.sampled_from([1, 3]),
)
def test_the_scan_agrees_with_the_loop_in_values_and_gradients(batch, L, groups, N, start, block, samples):
    """For blocks of samples and of rows of any size."""
    given = arguments(batch, L, 6, N, *groups, start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selective, "_BLOCK", block)
        patch.setattr(selective, "_SAMPLES", samples)
        found = selective_scan(*given)
        weights = [torch.randn_like(v) for v in found]
        gradients = torch.autograd.grad(sum((v * w).sum() for v, w in zip(found, weights, strict=True)), given)
    expected = naive_selective_scan(*given)
    loop = torch.autograd.grad(sum((v * w).sum() for v, w in zip(expected, weights, strict=True)), given)
    for a, b in zip((*found, *gradients), (*expected, *loop), strict=True):
        assert relative_error(a, b) < 1e-12


def test_blocks_of_the_default_size_agree():
    given = arguments(3, 500, 40, 16, 1, 1, dtype=torch.float32)
    found, expected = (f(*given) for f in (selective_scan, naive_selective_scan))
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 3e-6


@pytest.mark.parametrize("L", [0, 1])
def test_short_sequences(L):
    given = arguments(2, L, 4, 3, 1, 1)
    y, last = selective_scan(*given)
    assert y.shape == (2, L, 4)
    (y.sum() + last.sum()).backward()
    assert given[-1].grad.isfinite().all()
    assert torch.equal(last, given[-1]) == (L == 0)


@torch.no_grad()
def test_strong_decays_lose_no_digits():
    """Log-decays of -1e4 per sample together with slow ones: outputs and the last state in float32."""
    given = arguments(2, 300, 8, 4, 1, 1, dtype=torch.float32)
    given[1][:, ::7] *= 1e4
    given[2][:4] *= 1e-4
    for a, b in zip(selective_scan(*given), naive_selective_scan(*(v.double() for v in given)), strict=True):
        assert relative_error(a, b) < 3e-6


def test_memory_does_not_grow_with_the_number_of_states(monkeypatch):
    """The backward pass keeps one state for each block, for any width of the batch."""
    kept = []

    def pack(x):
        kept.append(x.untyped_storage().nbytes())
        return x

    for batch, block in ((2, 1 << 12), (64, 1 << 12)):
        kept.clear()
        monkeypatch.setattr(selective, "_BLOCK", block)
        given = arguments(batch, 256, 32, 16, 1, 1, start=False, dtype=torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            selective_scan(*given)
        output = 4 * batch * 256 * 32
        # u, Δ and N / 16 states per output, and small tensors; all states would be 16 times the output.
        assert sum(kept) < 5 * output


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SELECTIVE)
@torch.no_grad()
def test_s6_agrees_with_a_loop_over_its_parameters(name, dtype):
    layer = with_numbers_of_its_own(SELECTIVE[name]().to(dtype))
    u = torch.randn(30, layer.d_model, dtype=dtype)
    for rate in (1.0, 0.4):
        expected, last = (torch.from_numpy(v) for v in oracle.selective(layer, u.double().numpy(), rate))
        system = layer.system(rate)
        bound = 1e-12 if dtype == torch.float64 else 5e-6
        assert relative_error(layer(u, system), expected) < bound
        assert relative_error(layer.scan(u, layer.initial_state(dtype=dtype), system)[1], last) < bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MAMBAS)
@torch.no_grad()
def test_mamba_is_made_of_its_parts(name, dtype):
    layer = with_numbers_of_its_own(MAMBAS[name]().to(dtype))
    u = torch.randn(30, layer.d_input, dtype=dtype)
    for rate in (1.0, 0.4):
        expected = torch.from_numpy(oracle.mamba(layer, u.double().numpy(), rate))
        assert relative_error(layer(u, layer.system(rate)), expected) < (1e-12 if dtype == torch.float64 else 5e-6)


def test_s6_starts_as_in_the_paper():
    torch.manual_seed(0)
    layer = S6(2000, 4, dt_rank=9, dt_min=0.01, dt_max=0.2).double()
    assert relative_error(layer.A_log.detach().exp(), torch.arange(1, 5).expand(2000, 4)) < 1e-6
    assert bool((layer.D.detach() == 1).all())
    dt = torch.nn.functional.softplus(layer.dt_proj.bias.detach())
    assert float(dt.min()) >= 0.01 * (1 - 1e-5)
    assert float(dt.max()) <= 0.2 * (1 + 1e-5)
    # Log-uniform.
    spread = (dt.log() - np.log(0.01)) / np.log(20)
    assert abs(float(spread.mean()) - 0.5) < 0.03
    assert abs(float(spread.var()) - 1 / 12) < 0.01
    weight = layer.dt_proj.weight.detach()
    assert 0.99 / 3 < float(weight.abs().max()) <= 1 / 3
    assert abs(float(weight.var()) * 27 - 1) < 0.05
    assert (
        float(torch.nn.functional.softplus(S6(50, 2, dt_min=1e-6, dt_max=2e-6).dt_proj.bias.detach()).min()) > 0.99e-4
    )
    fixed = S6(500, 16, variable_B=False, variable_C=False)
    assert bool((fixed.B.detach() == 1).all())
    assert abs(float(16 * fixed.C.detach().var()) - 1) < 0.1


def test_sizes_follow_the_width():
    block = Mamba(40, 5, expand=3)
    core = block["mixer"]["x"]["ssm"]
    assert (core.d_model, core.d_state, core.dt_rank) == (120, 5, 3)
    assert core.x_proj.weight.shape == (3 + 2 * 5, 120)
    assert S6(40).dt_rank == 3
    assert block["mixer"]["x"]["conv"].d_conv == 4
    assert [block["out_proj"].module.bias, block["mixer"]["z"]["in_proj"].module.bias] == [None, None]


def test_poles_and_feedthrough_do_not_decay():
    groups = param_groups(Sequential(Residual(torch.nn.RMSNorm(4), Mamba(4))), lr=4e-3, weight_decay=0.1)
    counts = [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups]
    # A_log and D; biases of the convolution and of the steps, and the norm; the linear maps and the taps.
    assert counts == [(1e-3, 0.0, 2), (4e-3, 0.0, 3), (4e-3, 0.1, 6)]


def test_under_autocast_the_recurrence_stays_in_float32():
    layer, u = S6(8, 4), torch.randn(2, 30, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(u), layer.float()(u))
    block = Mamba(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(u)
        _, state = block.scan(u, block.initial_state(2))
    assert y.dtype == torch.bfloat16
    assert state[0][0][3].dtype == torch.float32
    assert relative_error(y.float(), block(u)) < 0.05


def test_bad_input_gives_an_error_of_one_sentence():
    u, dt, A, B, C, x = arguments(2, 5, 6, 3, 2, 1)
    for call, error, message in (
        (
            lambda: selective_scan(u, dt, A, B[..., :2], C),
            ValueError,
            r"selective_scan: .* got \(2, 5, 6\), \(2, 5, 6\)",
        ),
        (lambda: selective_scan(u, dt[:, :4], A, B, C), ValueError, "selective_scan: `u` and `dt` must have shape"),
        (lambda: selective_scan(u, dt, A, B, C, x[:1]), ValueError, "selective_scan: `u` and `dt` must have shape"),
        (lambda: selective_scan(u[0], dt, A, B, C), ValueError, "selective_scan: `u` and `dt` must have shape"),
        (lambda: selective_scan(u, dt, A, B, C.repeat(1, 1, 4, 1)), ValueError, "selective_scan: .* G dividing E"),
        (
            lambda: selective_scan(u.long(), dt, A, B, C),
            TypeError,
            "selective_scan: `u` must be a real .* torch.int64",
        ),
        (
            lambda: selective_scan(u, 1.0, A, B, C),
            TypeError,
            "selective_scan: `dt` must be a real .* got float",
        ),
        (lambda: S6(6, 0), ValueError, "S6: `d_state` must be"),
        (lambda: S6(6, ngroups=4), ValueError, "S6: `ngroups` must divide `d_model`, got 4 and 6"),
        (lambda: S6(6, dt_rank=0), ValueError, "S6: `dt_rank` must be"),
        (lambda: S6(6, dt_min=0.2), ValueError, "S6: `dt_min` must be less than `dt_max`"),
        (lambda: S6(6, dt_init_floor=0.0), ValueError, "S6: `dt_init_floor` must be"),
        (lambda: Mamba(0), ValueError, "Mamba: `d_model` must be"),
        (lambda: Mamba(4, expand=0), ValueError, "Mamba: `expand` must be"),
        (lambda: Mamba(4, d_conv=0), ValueError, "Mamba: `d_conv` must be"),
        (lambda: Mamba(4, dt_rank=-1), ValueError, "Mamba: `dt_rank` must be"),
        (lambda: Mamba(4, dt_max=1e-4), ValueError, "Mamba: `dt_min` must be less than `dt_max`"),
        (lambda: S6(6, dt_max=float("inf")), ValueError, "S6: `dt_max` must be a positive number, got inf"),
        (lambda: Mamba(4, dt_max=float("inf")), ValueError, "Mamba: `dt_max` must be a positive number, got inf"),
        (lambda: selective_scan(u, dt, A[0, 0], B, C), ValueError, "selective_scan: `u` and `dt` must have shape"),
        (lambda: Mamba(4, dt_init_floor=-1.0), ValueError, "Mamba: `dt_init_floor` must be"),
        (lambda: Mamba(4)["mixer"]["x"]["ssm"].system(0.0), ValueError, "S6: `rate` must be"),
    ):
        with pytest.raises(error, match=f"^({message})"):
            call()
