"""The laws of batches, repeated runs and long sequences: layers keep them, and each notices what breaks it."""

import re

import pytest
import torch
from torch import nn

import ssmkit
from family import BIDIRECTIONAL, CAUSAL, FORWARD_ONLY, GRIDS, SHARED_BIDIRECTIONAL
from ssmkit import S4, S4D, sequences
from ssmkit.testing import (
    Foreign,
    assert_deterministic,
    assert_long_sequences_agree,
    assert_modes_agree,
    assert_packing_is_independent,
    assert_padding_has_no_effect,
    assert_reset_is_start,
)

SIDEWAYS = {
    **{f"bidirectional {n}": make for n, make in {**BIDIRECTIONAL, **SHARED_BIDIRECTIONAL}.items()},
    **{f"around, {n}": make for n, make in FORWARD_ONLY.items()},
}
LONG = {
    "S4": lambda: S4(2, 16),
    "S4D": lambda: S4D(2),
    "S4D, slow": lambda: S4D(2, 16, dt_min=1e-5, dt_max=2e-5),
    "S5": lambda: ssmkit.S5(2, 8),
    "LRU": lambda: ssmkit.LRU(2, 8),
    "ShortConv": lambda: ssmkit.ShortConv(2),
    "Mamba": lambda: ssmkit.Mamba(2, 3),
    "Mamba2": lambda: ssmkit.Mamba2(2, 3, headdim=2),
    "S4Block and MultiRate": lambda: ssmkit.Sequential(
        ssmkit.S4Block(2, S4D(2, 8)), ssmkit.MultiRate(2, ssmkit.S4Block(4, S4(4, 8)))
    ),
}


@pytest.mark.parametrize("name", {**CAUSAL, **SIDEWAYS})
def test_the_same_bits_from_run_to_run(name):
    assert_deterministic({**CAUSAL, **SIDEWAYS}[name]())


@pytest.mark.parametrize("name", GRIDS)
def test_the_same_bits_over_two_axes(name):
    layer = GRIDS[name]()
    assert_deterministic(layer, torch.randn(2, 3, 9, layer.d_input))


@pytest.mark.numerical
@pytest.mark.parametrize("name", LONG)
def test_long_sequences_in_pieces(name):
    """131,072 samples, in float32."""
    assert_long_sequences_agree(LONG[name]())


# --- modules of others ------------------------------------------------------------------------------------------------


def gru(width=5, drop=0.0):
    """torch's own layer, which runs one sample at a time if it is asked to."""
    module = nn.GRU(3, width, 2, batch_first=True, dropout=drop)

    def step(u, state):
        y, last = module(u[:, None], state.transpose(0, 1).contiguous())
        return y[:, 0], last.transpose(0, 1)

    def start(*batch):
        return torch.zeros(*batch, 2, width)

    return Foreign(module, lambda u: module(u)[0], step, start, d_input=3)


def test_a_layer_of_torch_keeps_all_laws():
    layer = gru().double()
    u = torch.randn(4, 37, 3, dtype=torch.float64)
    assert_modes_agree(layer, u)
    assert_padding_has_no_effect(layer, u)
    assert_packing_is_independent(layer, u.flatten(0, 1), [0, 5, 6, 100, 148])
    assert_reset_is_start(layer, u)
    assert_deterministic(layer, u)
    assert_deterministic(gru(drop=0.5))
    assert_long_sequences_agree(layer, length=300)
    assert {"module.weight_ih_l0", "module.weight_hh_l1"} < set(layer.state_dict())


def test_a_layer_of_torch_that_looks_ahead():
    """Without a step it is not taken for causal, and a whole sequence is all that it is given."""
    module = nn.LSTM(3, 4, bidirectional=True, batch_first=True).double()
    layer = Foreign(module, lambda u: module(u)[0], d_input=3)
    assert layer.causal is False
    assert_padding_has_no_effect(layer)
    assert_packing_is_independent(layer)
    assert_deterministic(layer)
    for refused in ("initial_state", "step", "scan"):
        with pytest.raises(ValueError, match=f"Foreign: `{refused}` needs causal layers, and Foreign is not causal"):
            getattr(layer, refused)(*((2,) if refused == "initial_state" else (torch.randn(2, 3), ())))


def test_modules_of_others_in_containers():
    layer = ssmkit.Residual(nn.Linear(3, 3), gru(3), nn.GELU()).double()
    assert_modes_agree(layer)
    assert_padding_has_no_effect(layer)
    module = nn.Conv1d(3, 3, 3, padding=1).double()
    mixing = ssmkit.Sequential(Foreign(module, lambda u: module(u.mT).mT, d_input=3), nn.GELU())
    assert mixing.causal is False
    assert_padding_has_no_effect(mixing)


def test_the_state_of_a_foreign_module():
    layer = gru()
    assert layer.system() == ()
    assert layer.initial_state(3, dtype=torch.float64).dtype == torch.float64
    assert layer.initial_state(3, dtype=torch.bfloat16).dtype == torch.float32
    assert layer.initial_state(3, device="meta").device.type == "meta"
    y, state = layer.scan(torch.randn(2, 0, 3), layer.initial_state(2))
    assert y.shape == (2, 0, 5)
    assert torch.equal(state, layer.initial_state(2))
    numbers = nn.Embedding(5, 3)
    classes = Foreign(numbers, None, lambda u, state: (numbers(u), state), lambda *batch: torch.zeros(*batch, 1))
    u = torch.randint(5, (2, 9))
    assert torch.equal(classes.scan(u, classes.initial_state(2))[0], classes(u))
    assert classes.scan(u[:, :0], classes.initial_state(2))[0].shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: Foreign(torch.relu), TypeError, "Foreign: `module` must be a torch module, got builtin"),
        (lambda: Foreign(nn.GELU(), step=torch.relu), ValueError, "`step` and `start` must be given together"),
        (lambda: Foreign(nn.GELU(), start=torch.relu), ValueError, "`step` and `start` must be given together"),
        (lambda: Foreign(nn.GELU(), d_input=0), ValueError, "Foreign: `d_input` must be at least 1, got 0."),
        (lambda: gru().system(2.0), ValueError, "Foreign: `rate` must be 1, since the module has no known time unit"),
    ],
)
def test_bad_foreign_modules(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# --- what breaks a law ------------------------------------------------------------------------------------------------


class Sum(ssmkit.SequenceLayer):
    """A running sum of each feature, with a weight, which breaks a law if it is told to."""

    d_input = d_output = 2

    def __init__(self, law=None):
        super().__init__()
        self.law, self.calls = law, 0
        self.weight = nn.Parameter(torch.ones(2))

    def system(self, rate=1.0):
        return ()

    def initial_state(self, *batch_shape, device=None, dtype=None):
        self.calls += 1
        start = 0.001 * self.calls if self.law == "starts differ" else 0.0
        return torch.full((*batch_shape, 2), start, device=device, dtype=dtype)

    def forward(self, u, system=None):
        if self.law == "hears the future":
            u = u + u.mean(-2, keepdim=True)
        if self.law == "hears its neighbours":
            u = u + 1e-3 * u.flip(0).nan_to_num()
        if self.law == "divides by zero":
            return ((self.weight * u) / (self.weight * u).square().sum(-1, keepdim=True).sqrt()).cumsum(-2)
        if self.law == "counts calls":
            self.calls += 1
            u = u + 1e-9 * self.calls
        return self.weight * u.cumsum(-2)

    def step(self, u, state, system=None):
        y, state = self.scan(u[..., None, :], state)
        return y[..., 0, :], state

    def scan(self, u, state, system=None):
        if self.law == "hears its neighbours":
            u = u + 1e-3 * u.flip(0).nan_to_num()
        sums = state[..., None, :] + u.cumsum(-2)
        state = torch.cat([state[..., None, :], sums], -2)[..., -1, :]
        if self.law == "states mix":
            state = state + 1e-3 * state.roll(1, 0).nan_to_num()
        if self.law == "pieces" and u.shape[-2] < 100:
            state = state + 1e-3
        if self.law == "state of pieces" and u.shape[-2] == 200 - 128:
            state = state + 1.0
        if self.law == "scan is off":
            sums = sums * 1.001
        return self.weight * sums, state


def broken(law):
    return Sum(law).double()


def test_a_sum_keeps_all_laws():
    layer = Sum().double()
    assert_modes_agree(layer)
    assert_padding_has_no_effect(layer)
    assert_packing_is_independent(layer)
    assert_reset_is_start(layer)
    assert_deterministic(layer)
    assert_long_sequences_agree(layer, length=200)


PADDING = {
    "hears the future": "row 0 of `forward_padded` with padding on the right differs",
    "hears its neighbours": "row 0 of `forward_padded` with padding on the right differs from the row alone by",
    "divides by zero": "`forward_padded` with padding on the right, holding NaN, gives gradients that are not finite",
    "states mix": "of `scan_padded` with padding on the right differs",
}
PACKING = {
    "hears its neighbours": "sequence . of `forward_packed` differs from the sequence alone",
    "starts differ": "sequence . of `scan_packed` differs from the sequence alone",
    "scan is off": "sequence 0 of `scan_packed` differs from the sequence alone by .*e-04",
}
RESETS = {
    "states mix": "a reset, with another past, differs from before",
    "starts differ": "`scan` after a reset, with another past, differs from before",
}
RUNS = {
    "counts calls": "`forward` differs from run to run in eval mode",
    "starts differ": "`scan` differs from run to run in eval mode",
}
LENGTHS = {
    "pieces": "200 samples in pieces differs from `scan` of the whole",
    "state of pieces": "the state of 200 samples in pieces differs from that of `scan` of the whole",
    "scan is off": "200 samples in pieces differs from `forward` by 1.0e-03",
}


@pytest.mark.parametrize("law", [None, *PADDING])
def test_what_breaks_the_law_of_padding(law):
    if law is not None:
        with pytest.raises(AssertionError, match=f"Sum: .*{PADDING[law]}"):
            assert_padding_has_no_effect(broken(law))


@pytest.mark.parametrize("law", PACKING)
def test_what_breaks_the_law_of_packing(law):
    with pytest.raises(AssertionError, match=f"Sum: {PACKING[law]}"):
        assert_packing_is_independent(broken(law))


@pytest.mark.parametrize("law", RESETS)
def test_what_breaks_the_law_of_resets(law):
    with pytest.raises(AssertionError, match=f"Sum: .*{RESETS[law]}"):
        assert_reset_is_start(broken(law))


@pytest.mark.parametrize("law", RUNS)
def test_what_differs_from_run_to_run(law):
    with pytest.raises(AssertionError, match=f"Sum: {RUNS[law]}"):
        assert_deterministic(broken(law))


def test_what_differs_from_run_to_run_in_training():
    """What is drawn without the seed: dropout goes by it."""
    drawn = torch.Generator().manual_seed(0)

    class Unseeded(Sum):
        def forward(self, u, system=None):
            noise = torch.rand(1, generator=drawn).item() if self.training else 0.0
            return super().forward(u + noise)

    assert_deterministic(ssmkit.Sequential(S4D(2, 4), nn.Dropout(0.5)))
    layer = Unseeded().double().train()
    with pytest.raises(AssertionError, match="`forward` differs from run to run in training with one seed"):
        assert_deterministic(layer)
    assert layer.training
    before = torch.random.get_rng_state()
    assert_deterministic(nn.Sequential(S4D(2, dropout=0.5))[0])
    with pytest.raises(AssertionError):
        assert_deterministic(Unseeded().eval())
    assert not torch.equal(before, torch.zeros_like(before))


@pytest.mark.parametrize("law", LENGTHS)
def test_what_drifts(law):
    with pytest.raises(AssertionError, match=f"Sum: {LENGTHS[law]}"):
        assert_long_sequences_agree(broken(law), length=200)


def plain(name, run):
    """Puts a function of a user's in the place of one of ours, as if ours were wrong."""
    return lambda monkeypatch: monkeypatch.setattr(sequences, name, run)


def no_cut(layer, u, *rest, side="right", system=None):
    return layer(u)


def no_zero(layer, u, lengths, side="right", system=None):
    kept = sequences.pad([torch.ones(n, 1, dtype=torch.bool) for n in [*lengths, u.shape[1]]], side=side)[0][:-1]
    u = torch.where(kept, u, 0)
    return layer(u) + torch.where(kept, 0, 1e-30)


class Through(torch.autograd.Function):
    """Nothing, with a gradient."""

    @staticmethod
    def forward(ctx, u):
        return torch.zeros_like(u)

    @staticmethod
    def backward(ctx, grad):
        return grad


def a_gradient(layer, u, lengths, side="right", system=None):
    return PADDED(layer, u, lengths, side=side) + Through.apply(u.flip(1))


def one_run(layer, u, boundaries, system=None):
    return layer(u)


def a_leak(layer, u, boundaries, system=None):
    return PACKED(layer, u, boundaries, system=system) + Through.apply(u.flip(1))


PADDED, PACKED = sequences.forward_padded, sequences.forward_packed
OURS = {
    "padding is heard": (
        plain("forward_padded", no_cut),
        lambda: assert_padding_has_no_effect(S4D(2, 4).double()),
        "`forward_padded` with padding on the right, holding other values, differs from before by nan",
    ),
    "padding is not zero": (
        plain("forward_padded", no_zero),
        lambda: assert_padding_has_no_effect(Sum().double()),
        "`forward_padded` with padding on the right is not zero where the padding is",
    ),
    "padding has a gradient": (
        plain("forward_padded", a_gradient),
        lambda: assert_padding_has_no_effect(Sum().double()),
        "`forward_padded` with padding on the right gives the padding a gradient",
    ),
    "sequences are heard": (
        plain("forward_packed", one_run),
        lambda: assert_packing_is_independent(S4D(2, 4).double()),
        "sequence 0 of `forward_packed`, among others, differs from before by nan",
    ),
    "sequences have a gradient": (
        plain("forward_packed", a_leak),
        lambda: assert_packing_is_independent(S4D(2, 4).double()),
        "sequence 0 of `forward_packed` has a gradient with respect to another sequence",
    ),
}


@pytest.mark.parametrize("case", OURS)
def test_what_the_functions_could_do_wrong(case, monkeypatch):
    replace, check, message = OURS[case]
    replace(monkeypatch)
    with pytest.raises(AssertionError, match=re.escape(message)):
        check()


def test_states_that_are_not_those_of_the_lengths(monkeypatch):
    """States at the end of the rows, and states that have heard the padding."""
    right = sequences.scan_padded

    def late(layer, u, state, lengths, side="right"):
        y, _ = right(layer, u, state, lengths, side=side)
        return y, layer.scan(torch.where(y == 0, 0, u), state)[1]

    def heard(layer, u, state, lengths, side="right"):
        y, end = right(layer, u, state, lengths, side=side)
        return y, end + 1e-12 * u.nan_to_num(1.0).sum()

    for wrong, message in ((late, "the state of row 0 of"), (heard, "after NaN differs")):
        monkeypatch.setattr(sequences, "scan_padded", wrong)
        with pytest.raises(AssertionError, match=message):
            assert_padding_has_no_effect(S4D(2, 4).double())


def test_resets_that_do_nothing(monkeypatch):
    monkeypatch.setattr(sequences, "reset", lambda layer, state, rows: state)
    with pytest.raises(AssertionError, match="`scan` after a reset, with another past, differs from before by nan"):
        assert_reset_is_start(S4D(2, 4).double())
    monkeypatch.setattr(
        sequences, "reset", lambda layer, state, rows: layer.initial_state(len(rows), dtype=state.dtype)
    )
    with pytest.raises(AssertionError, match="`scan` of a stream beside it differs from going on"):
        assert_reset_is_start(S4D(2, 4).double())
    monkeypatch.setattr(sequences, "reset", lambda *of: 1e-3 + RESET(*of))
    with pytest.raises(AssertionError, match="`scan` of a stream that was reset differs from the start"):
        assert_reset_is_start(S4D(2, 4).double())


RESET = sequences.reset


def test_the_error_that_is_allowed_can_be_set():
    layer = broken("scan is off")
    assert_packing_is_independent(layer, rtol=0.01)
    assert_long_sequences_agree(layer, length=200, rtol=0.01)
    assert_padding_has_no_effect(broken("states mix"), rtol=0.1)
    for law in (assert_packing_is_independent, assert_long_sequences_agree):
        with pytest.raises(AssertionError, match="1e-04 is allowed"):
            law(layer, rtol=1e-4)


def test_layers_are_left_in_the_mode_they_were_in():
    layer = nn.Sequential(S4D(2, 4), nn.Dropout()).train()
    layer[1].eval()
    model = ssmkit.Sequential(layer[0], ssmkit.Pointwise(layer[1]))
    for law in (
        assert_padding_has_no_effect,
        assert_packing_is_independent,
        assert_reset_is_start,
        assert_deterministic,
        lambda model: assert_long_sequences_agree(model, length=20),
    ):
        law(model)
        assert layer[0].training
        assert not layer[1].training


def test_inputs_of_ones_own():
    """Rows, lengths and boundaries that are given are those that are run."""
    seen = []

    class Watch(Sum):
        def forward(self, u, system=None):
            seen.append(tuple(u.shape[:-1]))
            return super().forward(u)

    layer = Watch().double()
    assert_padding_has_no_effect(layer, torch.randn(2, 8, 2).double(), [3, 8])
    assert {(2, 8), (1, 3), (1, 8)} == set(seen)
    seen.clear()
    assert_packing_is_independent(layer, torch.randn(8, 2).double(), [0, 3, 8])
    assert {(2, 5), (1, 3), (1, 5)} == set(seen)
    seen.clear()
    assert_long_sequences_agree(layer, torch.randn(3, 8, 2).double(), cuts=[2, 2, 7])
    assert seen == [(3, 8)]
