"""The scan with one decay per head, and Mamba-2: values and gradients against loops, limits, strong decays."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from family import COMPOSED, HEADS
from ssmkit import Mamba2, param_groups
from ssmkit.layers import SSD, GroupedRMSNorm
from ssmkit.ops import naive_ssd_scan, ssd, ssd_scan
from ssmkit.testing import relative_error
from test_layers import with_numbers_of_its_own

BLOCKS = {name: make for name, make in COMPOSED.items() if isinstance(make(), Mamba2)}


def arguments(batch, L, H, P, G, N, start=True, dtype=torch.float64):
    """Numbers for a scan."""
    found = [torch.randn(batch, L, H, P, dtype=dtype), -torch.rand(batch, L, H, dtype=dtype)]
    found += [torch.randn(batch, L, G, N, dtype=dtype) for _ in "BC"]
    return [v.requires_grad_() for v in [*found, *([torch.randn(batch, H, P, N, dtype=dtype)] if start else [])]]


@given(
    batch=st.integers(1, 3),
    L=st.integers(1, 20),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]),
    P=st.integers(1, 3),
    N=st.integers(1, 3),
    start=st.booleans(),
    chunk=st.sampled_from([1, 3, 8, 64]),
)
def test_the_scan_agrees_with_the_loop_in_values_and_gradients(batch, L, heads, P, N, start, chunk):
    given = arguments(batch, L, heads[0], P, heads[1], N, start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssd, "_CHUNK", chunk)
        found = ssd_scan(*given)
    expected = naive_ssd_scan(*given)
    weights = [torch.randn_like(v) for v in found]
    gradients, loop = (
        torch.autograd.grad(sum((v * w).sum() for v, w in zip(each, weights, strict=True)), given)
        for each in (found, expected)
    )
    for a, b in zip((*found, *gradients), (*expected, *loop), strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("L", [0, 1, 63, 64, 65, 200])
def test_lengths_around_a_chunk(L):
    given = arguments(2, L, 4, 3, 2, 5)
    (y, last), (expected, end) = ssd_scan(*given), naive_ssd_scan(*given)
    assert y.shape == (2, L, 4, 3)
    assert relative_error(last, end) < 1e-13
    assert L == 0 or relative_error(y, expected) < 1e-13


@torch.no_grad()
def test_strong_decays_lose_no_digits():
    """Log-decays of -1e4 per sample together with slow ones: outputs and the last state in float32."""
    given = arguments(2, 300, 4, 8, 1, 16, dtype=torch.float32)
    given[1] *= 1e4
    given[1][:, ::3] *= 1e-6
    # The last samples hardly decay: the last state is a difference of large sums.
    given[1][:, -20:] *= 1e-6
    for a, b in zip(ssd_scan(*given), naive_ssd_scan(*(v.double() for v in given)), strict=True):
        assert relative_error(a, b) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_ssd_agrees_with_a_loop_over_its_parameters(name, dtype):
    layer = with_numbers_of_its_own(HEADS[name]().to(dtype))
    u = torch.randn(30, layer.d_input, dtype=dtype)
    for rate in (1.0, 0.4):
        expected, last = (torch.from_numpy(v) for v in oracle.ssd(layer, u.double().numpy(), rate))
        system = layer.system(rate)
        bound = 1e-12 if dtype == torch.float64 else 5e-6
        assert relative_error(layer(u, system), expected) < bound
        assert relative_error(layer.scan(u, layer.initial_state(dtype=dtype), system)[1], last) < bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_mamba2_is_made_of_its_parts(name, dtype):
    layer = with_numbers_of_its_own(BLOCKS[name]().to(dtype))
    u = torch.randn(30, layer.d_input, dtype=dtype)
    for rate in (1.0, 0.4):
        expected = torch.from_numpy(oracle.mamba2(layer, u.double().numpy(), rate))
        assert relative_error(layer(u, layer.system(rate)), expected) < (1e-12 if dtype == torch.float64 else 1e-5)


@torch.no_grad()
def test_limits_of_the_step_size_apply_in_every_mode():
    """Other implementations leave them out of the step, whose output then has an error of a tenth."""
    free, limited = SSD(4, 3, headdim=2), SSD(4, 3, headdim=2, dt_limit=(0.2, 0.6))
    limited.load_state_dict(free.state_dict())
    u = 3 * torch.randn(1, 30, free.d_input)
    assert relative_error(limited(u), free(u)) > 0.05
    state, rows = limited.initial_state(1), []
    for k in range(30):
        y, state = limited.step(u[:, k], state)
        rows.append(y)
    assert relative_error(torch.stack(rows, 1), limited(u)) < 1e-5


def test_ssd_starts_as_in_the_paper():
    torch.manual_seed(0)
    layer = SSD(4000, 2, headdim=1, A_init_range=(2.0, 9.0), dt_min=0.01, dt_max=0.2)
    A = layer.A_log.detach().exp()
    assert float(A.min()) >= 2 * (1 - 1e-6)
    assert float(A.max()) <= 9 * (1 + 1e-6)
    assert abs(float(A.mean()) - 5.5) < 0.15
    assert abs(float(A.var()) - 49 / 12) < 0.3
    dt = torch.nn.functional.softplus(layer.dt_bias.detach().double())
    assert float(dt.min()) >= 0.01 * (1 - 1e-5)
    assert float(dt.max()) <= 0.2 * (1 + 1e-5)
    spread = (dt.log() - math.log(0.01)) / math.log(20)
    assert abs(float(spread.mean()) - 0.5) < 0.03
    assert abs(float(spread.var()) - 1 / 12) < 0.01
    assert bool((layer.D.detach() == 1).all())
    assert float(
        torch.nn.functional.softplus(SSD(50, 2, headdim=1, dt_min=1e-6, dt_max=2e-6).dt_bias).detach().min()
    ) > (0.99e-4)
    assert SSD(12, 2, headdim=3).D.shape == (4,)
    assert SSD(12, 2, headdim=3, D_has_hdim=True).D.shape == (12,)


def test_sizes_follow_the_width():
    block = Mamba2(48, expand=4, headdim=32, ngroups=2)
    core = block["mixer"]["ssm"]["ssd"]
    assert (core.d_model, core.d_state, core.nheads, core.headdim) == (192, 128, 6, 32)
    assert block["mixer"]["ssm"]["input"]["xBC"]["conv"].weight.shape == (192 + 2 * 2 * 128, 1, 4)
    assert block["out_proj"].module.bias is None
    assert [name for name, _ in Mamba2(8, 2, headdim=4).layers.named_children()] == ["mixer", "norm", "out_proj"]
    assert [name for name, _ in Mamba2(8, 2, headdim=4, rmsnorm=False).layers.named_children()] == ["mixer", "out_proj"]


def test_the_norm_is_where_the_option_says():
    for ngroups in (1, 2):
        after, before = (Mamba2(8, 2, headdim=4, ngroups=ngroups, norm_before_gate=early) for early in (False, True))
        assert [name for name, _ in after.layers.named_children()] == ["mixer", "norm", "out_proj"]
        assert [name for name, _ in after["mixer"]["ssm"].layers.named_children()] == ["input", "ssd"]
        assert [name for name, _ in before.layers.named_children()] == ["mixer", "out_proj"]
        assert [name for name, _ in before["mixer"]["ssm"].layers.named_children()] == ["input", "ssd", "norm"]


def test_a_grouped_norm_is_a_norm_of_each_group():
    norm = GroupedRMSNorm(6, 2, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    u = torch.randn(4, 6, dtype=torch.double)
    y = norm(u)
    for part in (slice(0, 3), slice(3, 6)):
        size = (u[:, part].square().mean(-1, keepdim=True) + 1e-3).sqrt()
        assert relative_error(y[:, part], norm.weight[part] * u[:, part] / size) < 1e-14


def test_poles_steps_and_feedthrough_do_not_decay():
    groups = param_groups(Mamba2(8, 2, headdim=4), lr=4e-3, weight_decay=0.1)
    counts = [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups]
    # A_log, dt_bias and D; the bias of the convolution and the norm; four linear maps and the taps.
    assert counts == [(1e-3, 0.0, 3), (4e-3, 0.0, 2), (4e-3, 0.1, 5)]


def test_under_autocast_the_recurrence_stays_in_float32():
    block, u = Mamba2(8, 4, headdim=4), torch.randn(2, 30, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(u)
        _, state = block.scan(u, block.initial_state(2))
    assert y.dtype == torch.bfloat16
    assert state[0][0][1].dtype == torch.float32
    assert relative_error(y.float(), block(u)) < 0.1


def test_bad_input_gives_an_error_of_one_sentence():
    x, a, B, C, h = arguments(2, 5, 4, 3, 2, 5)
    for call, error, message in (
        (lambda: ssd_scan(x, a[..., :3], B, C), ValueError, r"ssd_scan: .* got \(2, 5, 4, 3\), \(2, 5, 3\)"),
        (lambda: ssd_scan(x, a, B, C[..., :4]), ValueError, "ssd_scan: `x` must have shape"),
        (lambda: ssd_scan(x, a, B, C, h[:1]), ValueError, "ssd_scan: `x` must have shape"),
        (lambda: ssd_scan(x[0], a, B, C), ValueError, "ssd_scan: `x` must have shape"),
        (lambda: ssd_scan(x[:, :, :3], a[..., :3], B, C), ValueError, "ssd_scan: .* G dividing H"),
        (
            lambda: ssd_scan(x.long(), a, B, C),
            TypeError,
            "ssd_scan: `x` must be a real floating tensor, got torch.int64",
        ),
        (lambda: ssd_scan(x, 1.0, B, C), TypeError, "ssd_scan: `a` must be a real floating tensor, got float"),
        (lambda: SSD(6, headdim=4), ValueError, "SSD: `headdim` must divide `d_model`, got 4 and 6"),
        (
            lambda: SSD(8, headdim=4, ngroups=3),
            ValueError,
            "SSD: `ngroups` must divide the number of heads, got 3 and 2",
        ),
        (lambda: SSD(8, 0, headdim=4), ValueError, "SSD: `d_state` must be"),
        (lambda: SSD(8, headdim=4, dt_min=1.0), ValueError, "SSD: `dt_min` must be less than `dt_max`"),
        (lambda: SSD(8, headdim=4, dt_init_floor=0.0), ValueError, "SSD: `dt_init_floor` must be"),
        (
            lambda: SSD(8, headdim=4, A_init_range=(0.0, 1.0)),
            ValueError,
            r"SSD: `A_init_range\[0\]` must be",
        ),
        (lambda: Mamba2(8), ValueError, r"Mamba2: `headdim` must divide `expand \* d_model`, got 64 and 16"),
        (lambda: Mamba2(8, headdim=4, dt_limit=(1.0, 0.5)), ValueError, "Mamba2: `dt_limit` must be two numbers"),
        (lambda: Mamba2(8, headdim=4, dt_limit=0.5), ValueError, "Mamba2: `dt_limit` must be two numbers .* got 0.5"),
        (lambda: Mamba2(8, headdim=4, A_init_range=(-1, 2)), ValueError, "Mamba2: `A_init_range` must be two numbers"),
        (lambda: Mamba2(8, headdim=4, dt_limit=(0, math.nan)), ValueError, "Mamba2: `dt_limit` must be two numbers"),
        (
            lambda: Mamba2(8, headdim=4, A_init_range=(0, 1)),
            ValueError,
            r"Mamba2: `A_init_range\[0\]` must be a positive",
        ),
        (lambda: Mamba2(8, headdim=4, dt_max=math.inf), ValueError, "Mamba2: `dt_max` must be a positive number"),
        (lambda: Mamba2(8, headdim=4, dt_min=1.0), ValueError, "Mamba2: `dt_min` must be less than `dt_max`"),
        (lambda: Mamba2(8, headdim=4, dt_init_floor=0), ValueError, "Mamba2: `dt_init_floor` must be"),
        (lambda: SSD(8, headdim=4, dt_max=math.inf), ValueError, "SSD: `dt_max` must be a positive number"),
        (lambda: Mamba2(0), ValueError, "Mamba2: `d_model` must be"),
        (lambda: Mamba2(8, headdim=4, d_conv=0), ValueError, "Mamba2: `d_conv` must be"),
        (lambda: Mamba2(8, headdim=4, ngroups=0), ValueError, "Mamba2: `ngroups` must be"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            call()
