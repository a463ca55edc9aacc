"""`assert_modes_agree` notices every way in which a layer can break the contract."""

import pytest
import torch
from torch import nn

import ssmkit
from ssmkit.testing import assert_modes_agree, example_input


class Average(ssmkit.SequenceLayer):
    """A user's own layer: a leaky average with a learned rate; `flaw` says how it is broken."""

    def __init__(self, flaw=None):
        super().__init__()
        self.d_input = self.d_output = 3
        self.raw = nn.Parameter(torch.zeros(3))
        self.register_buffer("calls", torch.zeros(()))
        self.flaw = flaw

    def system(self, rate=1.0):
        return torch.sigmoid(self.raw) ** rate

    def initial_state(self, *batch_shape, device=None, dtype=None):
        return torch.zeros(*batch_shape, 3, device=device, dtype=dtype or self.raw.dtype)

    def forward(self, u, system=None):
        if self.flaw == "writes to the module":
            self.calls += 1
        if self.flaw == "not causal":
            u = u + u.mean(-2, keepdim=True)
        y, _ = Average.scan(self, u, self.initial_state(*u.shape[:-2], dtype=u.dtype), system)
        return 1.01 * y if self.flaw == "forward" else y

    def step(self, u, state, system=None):
        a = self.system() if system is None else system
        if self.flaw == "writes to the state":
            state.mul_(a).add_((1 - a) * u)
            return state.clone(), state
        new = a * state + (1 - a) * u
        if self.flaw == "step":
            return new * 1.001, new
        if self.flaw == "step ignores the system" and system is None:
            return 2 * new, new
        return new, new

    def scan(self, u, state, system=None):
        rows = [u[..., :0, :]]
        for sample in u.unbind(-2):
            y, state = Average().to(u).step(sample, state, self.system() if system is None else system)
            rows.append(y[..., None, :])
        if self.flaw == "scan loses the state":
            state = torch.zeros_like(state)
        if self.flaw == "scan" and u.shape[-2]:
            rows[-1] = rows[-1] + 1e-3
        return torch.cat(rows, -2), state


def test_a_users_layer_passes():
    assert_modes_agree(Average())
    assert_modes_agree(Average().double(), torch.randn(2, 2, 9, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("forward", "`scan` from rest differs from `forward`"),
        ("scan", "a `step` per sample differs from `forward`"),
        ("step", "a `step` per sample differs from `forward`"),
        ("step ignores the system", "`step` without a system differs from `step` with one"),
        ("scan loses the state", "the state of a `step` per sample differs from that of `scan`"),
        ("writes to the module", "running it changed 'calls' of its `state_dict`"),
        ("writes to the state", "a mode wrote to the state that it was given|`step` without a system differs"),
        ("not causal", "differs from `forward`|before sample"),
    ],
)
def test_every_flaw_is_noticed(flaw, message):
    with pytest.raises(AssertionError, match=message):
        assert_modes_agree(Average(flaw))


def test_anticausal_layers_are_noticed():
    class Peek(Average):
        """All three modes agree on whole sequences, and read ahead in each."""

        def forward(self, u, system=None):
            return super().forward(u, system) + u.flip(-2)

        def scan(self, u, state, system=None):
            y, state = super().scan(u, state, system)
            return y + u.flip(-2), state

        def step(self, u, state, system=None):
            y, state = super().step(u, state, system)
            return y + u, state

    with pytest.raises(AssertionError):
        assert_modes_agree(Peek())


def test_tolerance_and_training_mode():
    layer = Average("step").train()
    assert_modes_agree(layer, rtol=0.1)
    assert layer.training
    with pytest.raises(AssertionError, match="1e-06 is allowed"):
        assert_modes_agree(layer, rtol=1e-6)


def test_bidirectional_layers_are_not_sequence_models():
    with pytest.raises(ValueError, match="is bidirectional"):
        assert_modes_agree(ssmkit.S4D(3, 4, bidirectional=True))


def test_example_input():
    assert example_input(ssmkit.Residual(nn.LayerNorm(5)), 2, 7).shape == (2, 7, 5)
    classes = example_input(ssmkit.Sequential(ssmkit.Sequential(nn.Embedding(9, 5))), 2, 7)
    assert classes.shape == (2, 7)
    assert classes.dtype == torch.int64
    assert example_input(ssmkit.S4D(3).double(), 4).dtype == torch.float64
    with pytest.raises(ValueError, match="Pointwise does not tell its input width"):
        example_input(ssmkit.Pointwise(nn.GELU()), 2, 7)
