"""`assert_modes_agree` finds every way in which a layer can break the contract, and names it."""

import math
import re

import pytest
import torch
from torch import nn

import ssmkit
from ssmkit.testing import assert_modes_agree, example_input, relative_error


class Average(ssmkit.SequenceLayer):
    """A user's own layer: a leaky average with a learned rate.

    Its state is the average; a thousandth of the last sample, and a mark, which no mode reads; and the number of
    samples, modulo 7.
    """

    def __init__(self):
        super().__init__()
        self.d_input = self.d_output = 3
        self.raw = nn.Parameter(torch.zeros(3))
        self.register_buffer("calls", torch.zeros(()))

    def system(self, rate=1.0):
        return torch.sigmoid(self.raw) ** rate

    def initial_state(self, *batch_shape, device=None, dtype=None):
        zero = torch.zeros(*batch_shape, 3, device=device, dtype=dtype or self.raw.dtype)
        return zero, zero, zero, 0

    def forward(self, u, system=None):
        return Average.scan(self, u, Average.initial_state(self, *u.shape[:-2], dtype=u.dtype), system)[0]

    def step(self, u, state, system=None):
        a = self.system() if system is None else system
        average, _, mark, phase = state
        average = a * average + (1 - a) * u
        return average, (average, 1e-3 * u, torch.zeros_like(mark), (phase + 1) % 7)

    def scan(self, u, state, system=None):
        rows = []
        for sample in u.unbind(-2):
            y, state = Average.step(self, sample, state, system)
            rows.append(y)
        return torch.stack(rows, -2) if rows else u, state


class Broken(Average):
    """Breaks one law by a relative error, and keeps all laws that are checked before it."""

    def __init__(self, law, size):
        super().__init__()
        self.law, self.size, self.seen, self.top = law, size, None, None

    def off(self, law, x, top=None):
        """x, or x with an error if this is the law to break."""
        if law != self.law:
            return x
        return x + self.size * ((float(x.abs().max()) or 1.0) if top is None else top)

    def forward(self, u, system=None):
        y = super().forward(u, system)
        if self.seen is None:
            self.seen, self.top = u, float(y.abs().max())
            self.calls += self.size if self.law == "forward writes at its first call" else 0
        self.calls += self.size if self.law == "forward writes at each call" else 0
        if system is not None:
            y = self.off("forward with a system", y, self.top)
        if not torch.equal(u, self.seen):
            y = self.off("causal", y, self.top)
        return self.off("scan from rest", y, self.top)

    def step(self, u, state, system=None):
        y, (average, last, mark, phase) = super().step(u, state, system)
        y, last = self.off("step", y + state[2], self.top), self.off("state of step", last)
        if system is None:
            y, last = self.off("step without a system", y, self.top), self.off("state of step without a system", last)
        if self.law == "step writes":
            state[0].add_(self.size)
        if self.law == "phase of step":
            phase = 0
        return y, (average, last, mark, phase)

    def scan(self, u, state, system=None):
        y, (average, last, mark, phase) = super().scan(u, state, system)
        if system is None:
            y, last = self.off("scan without a system", y, self.top), self.off("state of scan without a system", last)
        if state[0].any():
            y, last = self.off("two parts", y, self.top), self.off("state of two parts", last)
        elif u.shape[-2] == 0:
            mark = self.off("scan of nothing", mark)
        elif u.shape[-2] < self.seen.shape[-2]:
            mark = self.off("steps after a scan", mark, self.top)
        if self.law == "scan writes":
            state[0].add_(self.size)
        if self.law == "shape of scan":
            y = y[..., :2]
        return y, (average, last, mark) if self.law == "leaves of scan" else (average, last, mark, phase)


BY_HOW_MUCH = r" by (\S+) of the largest output; 1e-10 is allowed"
ROUNDED = {
    "scan from rest": "`scan` from rest differs from `forward`",
    "forward with a system": "`forward` with a system differs from `forward`",
    "scan without a system": "`scan` without a system differs from `scan` with one",
    "state of scan without a system": "the state of `scan` without a system differs from that of `scan` with one",
    "step": "a `step` per sample differs from `forward`",
    "state of step": "the state of a `step` per sample differs from that of `scan`",
    "step without a system": "`step` without a system differs from `step` with one",
    "state of step without a system": "the state of `step` without a system differs from that of `step` with one",
    "scan of nothing": "the state of a `scan` of nothing differs from that of rest",
    "two parts": "`scan` in two parts, cut at 1, differs from `scan` of the whole",
    "state of two parts": "the state of `scan` in two parts, cut at 1, differs from that of `scan` of the whole",
    "steps after a scan": "steps after a `scan` of 1 samples differs from `forward`",
    "causal": "the output before sample 1, with other input from there on, differs from the output of `forward`",
}
EXACT = {
    "forward writes at its first call": "running it changed 'calls' of its `state_dict`",
    "forward writes at each call": "running it changed 'calls' of its `state_dict`",
    "step writes": "`step` wrote to the state that it was given",
    "scan writes": "`scan` wrote to the state that it was given",
    "phase of step": "a `step` per sample ends at phase 0, and `scan` at 2",
    "leaves of scan": "the state of a `step` per sample has 4 leaves, and that of `scan` 3",
    "shape of scan": re.escape("`scan` from rest has shape (2, 37, 2), and `forward` (2, 37, 3)"),
}


def test_a_users_layer_passes():
    assert_modes_agree(Average())
    assert_modes_agree(Average().double(), torch.randn(2, 2, 9, 3, dtype=torch.float64))
    assert_modes_agree(Broken(None, 0.0).double())
    assert_modes_agree(Average(), length=0)
    assert_modes_agree(Average(), length=1)


@pytest.mark.parametrize("size", [1e-6, 1e-9])
@pytest.mark.parametrize("law", ROUNDED)
def test_the_broken_law_is_named(law, size):
    with pytest.raises(AssertionError, match=ROUNDED[law]) as caught:
        assert_modes_agree(Broken(law, size).double())
    found = re.search(BY_HOW_MUCH, str(caught.value))
    assert float(found[1]) == pytest.approx(size, rel=0.06)


@pytest.mark.parametrize("law", ROUNDED)
def test_rounding_errors_are_allowed(law):
    assert_modes_agree(Broken(law, 1e-11).double())


@pytest.mark.parametrize("law", EXACT)
def test_laws_without_tolerance(law):
    with pytest.raises(AssertionError, match=f"Broken: {EXACT[law]}."):
        assert_modes_agree(Broken(law, 1e-14).double())


@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)],
)
def test_the_error_that_is_allowed_in_each_precision(dtype, allowed):
    assert_modes_agree(Broken("step", allowed / 2).to(dtype))
    with pytest.raises(AssertionError, match=f"`forward` by .*; {allowed:.0e} is allowed"):
        assert_modes_agree(Broken("step", 2 * allowed).to(dtype))


def test_where_a_sequence_is_cut():
    """At 0, 1, a third and the end, by default."""

    class Cut(Average):
        def scan(self, u, state, system=None):
            y, state = super().scan(u, state, system)
            return (y + 1 if u.shape[-2] == self.at else y), state

    for at, cut in ((1, 1), (12, 12), (25, 12)):
        layer = Cut()
        layer.at = at
        with pytest.raises(AssertionError, match=f"cut at {cut}, differs"):
            assert_modes_agree(layer)
    layer.at = 5
    assert_modes_agree(layer)
    with pytest.raises(AssertionError, match="cut at 5, differs"):
        assert_modes_agree(layer, splits=[3, 5])
    layer.at = 37
    assert_modes_agree(layer, length=36)


def test_nan_is_not_accepted():
    layer = Average()
    with torch.no_grad():
        layer.raw.fill_(math.nan)
    with pytest.raises(AssertionError, match="by nan of"):
        assert_modes_agree(layer)


def test_tolerance_and_training_mode():
    layer = nn.Sequential(Broken("step", 1e-3), nn.Dropout()).train()
    layer[1].eval()
    assert_modes_agree(layer[0], rtol=0.1)
    assert layer[0].training
    assert not layer[1].training
    with pytest.raises(AssertionError, match="1e-06 is allowed"):
        assert_modes_agree(layer[0], rtol=1e-6)
    assert layer[0].training


def test_relative_error():
    zero, one = torch.zeros(3), torch.tensor([1.0, -4.0, 2.0])
    assert relative_error(one, 2 * one) == 0.5
    assert relative_error(2 * one, one) == 1
    assert relative_error(one, zero) == 4
    assert relative_error(zero, one) == 1
    assert relative_error(zero, zero) == relative_error(one, one) == 0
    assert relative_error(one[:0], one[:0]) == 0
    assert relative_error(one.double() + 1e-12, one) == pytest.approx(2.5e-13, rel=1e-3)
    assert math.isnan(relative_error(one / zero - one / zero, one))
    assert math.isnan(relative_error(one, one * math.nan))
    with pytest.raises(ValueError, match=r"relative_error: `actual` must have shape \(2,\)"):
        relative_error(one, one[:2])


def test_bidirectional_layers_are_refused():
    with pytest.raises(ValueError, match="is bidirectional"):
        assert_modes_agree(ssmkit.S4D(3, 4, bidirectional=True))


def test_example_input():
    assert example_input(ssmkit.Residual(nn.LayerNorm(5)), 2, 7).shape == (2, 7, 5)
    classes = example_input(ssmkit.Sequential(ssmkit.Sequential(nn.Embedding(9, 5))), 2, 7)
    assert classes.shape == (2, 7)
    assert classes.dtype == torch.int64
    assert example_input(ssmkit.S4D(3).double(), 4).dtype == torch.float64
    with pytest.raises(ValueError, match="the input width of Pointwise is not known"):
        example_input(ssmkit.Pointwise(nn.GELU()), 2, 7)
