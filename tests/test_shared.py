"""S5, LRU and ShortConv: outputs, compared with loops over their parameters, and initialisation."""

import math

import numpy as np
import pytest
import torch

import oracle
from family import SHARED, SHARED_BIDIRECTIONAL, TAPS
from ssmkit import LRU, S5, Sequential, ShortConv, hippo, param_groups, systems
from ssmkit.testing import relative_error
from test_layers import with_numbers_of_its_own

LAYERS = {**SHARED, **{f"bidirectional {name}": make for name, make in SHARED_BIDIRECTIONAL.items()}}
RATES = {"S5": (1.0, 0.3, 2.5), "LRU": (1.0,)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_they_agree_with_the_systems_of_their_parameters(name, dtype):
    layer, L = with_numbers_of_its_own(LAYERS[name]().to(dtype)), 40
    u = torch.randn(L, layer.d_model, dtype=dtype)
    for rate in RATES[type(layer).__name__]:
        expected, last = oracle.shared_forward(layer, u.double().numpy(), rate)
        bound = 1e-12 if dtype == torch.float64 else 5e-6
        system = layer.system(rate)
        assert relative_error(layer(u, system), torch.from_numpy(expected)) < bound
        if layer.causal:
            _, state = layer.scan(u, layer.initial_state(dtype=dtype), system)
            # One of each pair, real and imaginary parts interleaved; the oracle has both of S5's.
            last = last[: layer.d_state // 2]
            last = torch.from_numpy(np.stack([last.real, last.imag], -1).ravel())
            assert relative_error(state, last) < bound


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_change_of_a_parameter_by_a_thousandth_is_noticed(name):
    layer, L = with_numbers_of_its_own(LAYERS[name]().double()), 40
    if isinstance(layer, S5):
        # Slower or clipped poles would hardly have an effect within so few samples.
        layer.A_real.clamp_(max=-0.3)
        layer.log_dt.clamp_(min=math.log(1e-2))
    else:
        layer.nu_log.clamp_(min=math.log(1e-2))
        layer.theta_log.clamp_(min=math.log(1e-2))
    u = torch.randn(L, layer.d_model, dtype=torch.float64)
    y, u = layer(u), u.numpy()
    for label, parameter in layer.named_parameters():
        kept = parameter.clone()
        parameter.add_(1e-3) if "log" in label else parameter.mul_(1.001)
        expected, _ = oracle.shared_forward(layer, u)
        assert relative_error(y, torch.from_numpy(expected)) > 1e-9, label
        parameter.copy_(kept)


@pytest.mark.parametrize("name", TAPS)
@torch.no_grad()
def test_short_conv_is_the_sum_over_its_taps(name):
    layer = with_numbers_of_its_own(TAPS[name]().double())
    for L in (1, 2, 30):
        u = torch.randn(L, layer.d_model, dtype=torch.float64)
        assert relative_error(layer(u), torch.from_numpy(oracle.short_conv(layer, u.numpy()))) < 1e-14


@pytest.mark.parametrize("L", [1, 3, 4, 9])
@torch.no_grad()
def test_the_kernel_of_taps_is_their_response(L):
    layer = with_numbers_of_its_own(ShortConv(3).double())
    impulse = torch.zeros(L, 3, dtype=torch.float64)
    impulse[0] = 1
    kernel = layer.system().kernel(L)
    assert kernel.shape == (1, 3, L)
    assert relative_error(kernel[0].mT + layer.bias, layer(impulse)) < 1e-14


@torch.no_grad()
def test_short_conv_takes_the_weights_of_conv1d():
    conv = torch.nn.Conv1d(5, 5, 4, groups=5, padding=3)
    layer = ShortConv(5)
    layer.load_state_dict(conv.state_dict())
    u = torch.randn(2, 20, 5)
    assert relative_error(layer(u), conv(u.mT)[..., :20].mT) < 1e-6
    _, state = layer.scan(u, layer.initial_state(2))
    assert torch.equal(state, u[:, -3:])


def test_s5_starts_at_the_poles_of_hippo_in_blocks():
    torch.manual_seed(0)
    layer = S5(200, 24, blocks=3, dt_min=0.01, dt_max=0.2)
    A, _ = hippo.legs(8)
    P = hippo.low_rank_correction(A, hippo.legs)
    wanted = np.linalg.eigvals(A + P @ P.T)
    for block in range(3):
        got = torch.complex(layer.A_real, layer.A_imag).detach().numpy()[4 * block : 4 * block + 4]
        both = np.concatenate([got, got.conj()])
        assert all(np.abs(wanted - pole).min() < 1e-5 for pole in both)
        assert all(np.abs(both - pole).min() < 1e-5 for pole in wanted)
    dt = layer.log_dt.exp()
    assert dt.min() >= 0.01
    assert dt.max() <= 0.2
    # Variances 1/N of the real B, and of both parts of C, are kept by the unitary change of basis.
    assert abs(float(24 * layer.B.detach().square().sum(-1).mean()) - 1) < 0.1
    assert abs(float(12 * layer.C.detach().square().sum(-1).mean()) - 1) < 0.1
    assert abs(float(layer.D.detach().std()) - 1) < 0.2


def test_s5_input_matrix_is_real_in_the_basis_of_hippo():
    """Real B and real A: the response of the state in the basis of HiPPO is real, whatever the block."""
    layer = S5(5, 16, blocks=2).double()
    A, b = hippo.legs(8)
    *_, V = hippo.diagonalize(A, b, hippo.low_rank_correction(A, hippo.legs))
    B = torch.view_as_complex(layer.B.detach()).numpy().reshape(2, 4, 5)
    for part in B:
        # Of a real vector both halves of V* B are conjugate: V (V* B) is real.
        back = V @ np.concatenate([part, part.conj()])
        assert np.abs(back.imag).max() < 1e-6
        assert np.abs(back.real).max() < 2 / (0.87 * 4) + 1e-6
        assert np.abs(back.real).max() > 0.3 / 4


@torch.no_grad()
def test_clipped_poles_stay_in_the_left_half_plane():
    layer, open_layer = S5(2, 4), S5(2, 4, clip_eigs=False)
    for each in (layer, open_layer):
        each.A_real.fill_(0.5)
    assert float(layer.system().a.abs().max()) < 1
    assert float(open_layer.system().a.abs().max()) > 1


def test_lru_starts_in_its_ring():
    torch.manual_seed(0)
    layer = LRU(300, 4000, r_min=0.5, r_max=0.9, max_phase=1.0).double()
    a = layer.system().a.detach()
    size, phase = a.abs(), a.angle()
    assert size.min() >= 0.5 - 1e-9
    assert size.max() <= 0.9 + 1e-9
    assert phase.min() >= 0
    assert phase.max() <= 1
    # Uniform by area: the square of the radius and the phase are uniform.
    for values, low, high in ((size.square(), 0.25, 0.81), (phase, 0.0, 1.0)):
        spread = (values - low) / (high - low)
        assert abs(float(spread.mean()) - 0.5) < 0.03
        assert abs(float(spread.var()) - 1 / 12) < 0.01
    # States keep the size of the input: gamma is the square root of 1 - |a|^2.
    assert relative_error(layer.gamma_log.detach().exp(), (1 - size.square()).sqrt()) < 1e-6
    assert abs(float(2 * 300 * layer.B.detach().square().mean()) - 1) < 0.05
    assert abs(float(2000 * layer.C.detach().square().mean()) - 1) < 0.05
    assert abs(float(layer.D.detach().std()) - 1) < 0.2


@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-53])
def test_lru_on_the_whole_disc_starts_with_finite_parameters(drawn, monkeypatch):
    """At the ends of the range the radius would be 1 or 0, and a logarithm infinite."""
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype: torch.full(shape, drawn, dtype=dtype))
    assert all(bool(p.isfinite().all()) for p in LRU(2, 8).parameters())


def test_their_state_parameters_have_their_own_learning_rate():
    groups = param_groups(Sequential(S5(3, 8), LRU(3, 8), ShortConv(3)), lr=4e-3, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (1e-3, 0.0, 8),
        (4e-3, 0.0, 1),
        (4e-3, 0.1, 5),
    ]


@pytest.mark.parametrize("layer", [LRU(3, 8), ShortConv(3)], ids=["LRU", "ShortConv"])
def test_without_a_step_size_there_is_one_rate(layer):
    with pytest.raises(ValueError, match=f"^{type(layer).__name__}: `rate` must be 1, .* got 2.0"):
        layer.system(2.0)


def test_bad_options_give_an_error_of_one_sentence():
    for make, message in (
        (lambda: S5(3, 7), "S5: `d_state` must be a positive even integer"),
        (lambda: S5(3, 8, blocks=3), "S5: `d_state` must be a multiple of 2 `blocks` .* got 8 and 3"),
        (lambda: S5(3, 8, blocks=0), "S5: `blocks` must be"),
        (lambda: S5(0), "S5: `d_model` must be"),
        (lambda: S5(3, dt_min=0.2), "S5: `dt_min` must be less than `dt_max`"),
        (lambda: S5(3, dt_max=float("inf")), "S5: `dt_max` must be a positive number, got inf"),
        (lambda: S5(3, dt_min=0.0), "S5: `dt_min` must be a positive"),
        (lambda: S5(3, discretization="foh"), "S5: unknown `discretization` 'foh'"),
        (lambda: S5(3, dropout=2.0), "S5: `dropout` must"),
        (lambda: LRU(3, 7), "LRU: `d_state` must be a positive even integer"),
        (lambda: LRU(3, r_min=-0.1), "LRU: `r_min` must be finite and at least 0"),
        (lambda: LRU(3, r_min=0.9, r_max=0.9), "LRU: `r_min` must be less than `r_max`"),
        (lambda: LRU(3, r_max=1.1), "LRU: `r_max` must be at most 1"),
        (lambda: LRU(3, r_max=float("nan")), "LRU: `r_min` must be less than `r_max`"),
        (lambda: LRU(3, max_phase=0.0), "LRU: `max_phase` must be a positive"),
        (lambda: ShortConv(0), "ShortConv: `d_model` must be"),
        (lambda: ShortConv(3, 0), "ShortConv: `d_conv` must be"),
        (lambda: systems.Taps(torch.ones(2, 3), torch.ones(2)), r"Taps: `w` and `D` must have shapes .* got \(2, 3\)"),
        (
            lambda: systems.BothWays(S5(3, 4).system(), S5(2, 4).system()),
            r"BothWays: the systems must have the same widths, got \(3, 3\) and \(2, 2\)",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            make()


def test_bidirectional_layers_refuse_causal_modes():
    layer = S5(3, 8, bidirectional=True)
    for call in (
        lambda: layer.scan(torch.randn(2, 9, 3), torch.zeros(2, 8)),
        lambda: layer.step(torch.randn(2, 3), torch.zeros(2, 8)),
        layer.initial_state,
    ):
        with pytest.raises(ValueError, match="^S5: .*not causal|^S5: .*bidirectional"):
            call()
