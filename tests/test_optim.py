"""Parameter groups."""

import pytest
import torch
from torch import nn

from ssmkit import S4, S4D, MultiRate, Residual, S4Block, Sequential, TiedDropout, param_groups


def network():
    return Sequential(
        nn.Embedding(9, 4),
        S4Block(4, S4(4, 8)),
        Residual(MultiRate(4, S4Block(8, S4D(8, 4)))),
        TiedDropout(4),
        nn.RMSNorm(4),
        nn.Linear(4, 9),
    )


def sorted_by_name(model, **options):
    names = {id(p): n for n, p in model.named_parameters()}
    return [
        (g["lr"], g["weight_decay"], sorted(names[id(p)] for p in g["params"])) for g in param_groups(model, **options)
    ]


def test_every_parameter_is_in_one_group():
    model = network()
    groups = sorted_by_name(model, lr=4e-3, weight_decay=0.1)
    assert [g[:2] for g in groups] == [(1e-3, 0.0), (4e-3, 0.0), (4e-3, 0.1)]
    every = [name for group in groups for name in group[2]]
    assert sorted(every) == sorted(n for n, _ in model.named_parameters())
    ssm, plain, decayed = (group[2] for group in groups)
    assert {n.rsplit(".", 1)[1] for n in ssm} == {"log_dt", "log_A_real", "A_imag", "B", "P"}
    norms = {n for n, m in model.named_modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))}
    assert all(n.endswith("bias") or n.rsplit(".", 1)[0] in norms for n in plain)
    assert {n.rsplit(".", 1)[1] for n in decayed} == {"C", "D", "weight"}


NORMS = [
    nn.LayerNorm(4),
    nn.RMSNorm(4),
    nn.GroupNorm(2, 4),
    nn.BatchNorm1d(4),
    nn.BatchNorm2d(4),
    nn.SyncBatchNorm(4),
    nn.InstanceNorm1d(4, affine=True),
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda m: type(m).__name__)
def test_norms_do_not_decay(norm):
    """All kinds of norms, weights and biases, anywhere in a model."""
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Sequential(norm))
    plain, decayed = sorted_by_name(model, lr=1e-2, weight_decay=0.1)
    norms = sorted(f"1.0.{name}" for name, _ in norm.named_parameters())
    assert norms
    assert plain == (1e-2, 0.0, ["0.bias", *norms])
    assert decayed == (1e-2, 0.1, ["0.weight"])


def test_there_is_no_decay_by_default():
    assert {decay for _, decay, _ in sorted_by_name(network(), lr=1e-2)} == {0.0}


def test_biases_are_found_by_their_name():
    layer = nn.LSTM(2, 2)
    plain, decayed = sorted_by_name(layer, lr=1e-2, weight_decay=0.1)
    assert plain[2] == ["bias_hh_l0", "bias_ih_l0"]
    assert decayed[2] == ["weight_hh_l0", "weight_ih_l0"]


def test_the_smaller_of_both_rates_is_used():
    assert sorted_by_name(S4D(4), lr=5e-4)[0][0] == 5e-4
    assert sorted_by_name(S4D(4), lr=1e-2)[0][0] == 1e-3
    assert sorted_by_name(S4D(4), lr=1e-2, ssm_lr=1e-4)[0][0] == 1e-4


def test_shared_and_frozen_parameters():
    model = network()
    model.layers[-1].module.weight = model.layers[0].module.weight
    model.layers[-1].module.bias.requires_grad_(False)
    groups = param_groups(model, 1e-2)
    every = [p for g in groups for p in g["params"]]
    assert len(every) == len({id(p) for p in every}) == len(list(model.parameters())) - 1


def test_empty_groups_are_left_out():
    assert len(param_groups(nn.Linear(2, 2, bias=False), 1e-2)) == 1


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_any_optimiser_accepts_them(optimizer):
    model = network()
    opt = optimizer(param_groups(model, 1e-3, 0.01))
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randint(9, (2, 50))).square().sum().backward()
    opt.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["log_dt", "B", "C"])
def test_what_parametrises_a_parameter_is_in_its_group(name):
    """One parameter as two, as with a weight norm, and as one with the parameters of a module, at any depth."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.ModuleDict({"bias": nn.PReLU()})

        def forward(self, x):
            return x * self.inside["bias"].weight

    def groups(model):
        found = sorted_by_name(model, lr=1e-2, weight_decay=0.1)
        return {name.rsplit("parametrizations.")[-1]: tuple(group) for *group, names in found for name in names}

    expected = groups(S4D(3, 4))
    group = expected.pop(name)
    layer = S4D(3, 4)
    nn.utils.parametrizations.weight_norm(layer, name)
    assert groups(layer) == {**expected, f"{name}.original0": group, f"{name}.original1": group}
    layer = S4D(3, 4)
    nn.utils.parametrize.register_parametrization(layer, name, Scaled())
    assert groups(layer) == {**expected, f"{name}.original": group, f"{name}.0.inside.bias.weight": group}


def test_layers_of_the_user_are_included():
    class Own(nn.Module):
        SSM_PARAMETERS = ("poles",)

        def __init__(self):
            super().__init__()
            self.poles, self.gain = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    assert [g[2] for g in sorted_by_name(Own(), lr=1e-2, weight_decay=0.1)] == [["poles"], ["gain"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "`lr` must be a positive number"),
        ({"lr": 1e-3, "ssm_lr": -1.0}, "`ssm_lr` must be a positive number"),
        ({"lr": 1e-3, "weight_decay": -0.1}, "`weight_decay` must be finite and at least 0.0, got -0.1"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=f"param_groups: {message}"):
        param_groups(nn.Linear(2, 2), **options)
