"""Padded and packed batches: every layer keeps sequences apart, and the functions do what they say."""

import copy
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import ssmkit
from family import BIDIRECTIONAL, CAUSAL, FORWARD_ONLY, GRIDS, SHARED_BIDIRECTIONAL, Grid
from ssmkit import S4, S4D, Mamba, MultiRate, S4Block, Sequential, TiedDropout, sequences
from ssmkit.sequences import (
    collate,
    forward_packed,
    forward_padded,
    pack,
    pad,
    pool,
    reset,
    scan_packed,
    scan_padded,
    segments_from_starts,
    starts_from_boundaries,
    starts_from_segments,
    step_packed,
    unpack,
    unpad,
)
from ssmkit.testing import (
    assert_packing_is_independent,
    assert_padding_has_no_effect,
    assert_reset_is_start,
    relative_error,
)

SIDEWAYS = {
    **{f"bidirectional {n}": make for n, make in {**BIDIRECTIONAL, **SHARED_BIDIRECTIONAL}.items()},
    **{f"around, {n}": make for n, make in FORWARD_ONLY.items()},
}
FEW = {
    "S4Block": lambda: S4Block(8, S4(8)),
    "Mamba": lambda: Mamba(8, bias=True),
    "MultiRate": CAUSAL["MultiRate, nested"],
    "bidirectional": lambda: S4Block(8, S4(8, bidirectional=True)),
}


class Counting(ssmkit.SequenceLayer):
    """A layer that says what it was asked to run."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.causal = layer, layer.causal
        self.d_input, self.d_output = layer.d_input, layer.d_output
        self.forwards, self.scans, self.systems = [], [], 0

    def forward(self, u, system=None):
        self.forwards.append(tuple(u.shape[:-1]))
        return self.layer(u, system)

    def system(self, rate=1.0):
        self.systems += 1
        return self.layer.system(rate)

    def initial_state(self, *batch_shape, device=None, dtype=None):
        return self.layer.initial_state(*batch_shape, device=device, dtype=dtype)

    def step(self, u, state, system=None):
        return self.layer.step(u, state, system)

    def scan(self, u, state, system=None):
        self.scans.append(tuple(u.shape[:-1]))
        return self.layer.scan(u, state, system)


def ragged(*lengths, width=3, dtype=torch.float32):
    return [torch.randn(n, width, dtype=dtype) for n in lengths]


# --- the laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", {**CAUSAL, **SIDEWAYS})
def test_padding_has_no_effect(name):
    assert_padding_has_no_effect({**CAUSAL, **SIDEWAYS}[name]().double())


@pytest.mark.parametrize("name", {**CAUSAL, **SIDEWAYS})
def test_packed_sequences_are_independent(name):
    assert_packing_is_independent({**CAUSAL, **SIDEWAYS}[name]().double())


@pytest.mark.parametrize("name", CAUSAL)
def test_a_stream_that_is_reset_starts_anew(name):
    assert_reset_is_start(CAUSAL[name]().double())


@pytest.mark.parametrize("name", GRIDS)
def test_padding_has_no_effect_on_layers_over_two_axes(name):
    layer = GRIDS[name]().double()
    assert_padding_has_no_effect(layer, torch.randn(4, 3, 9, 3 if layer.d_input == 3 else layer.d_input).double())


@pytest.mark.numerical
@pytest.mark.parametrize("name", FEW)
def test_the_laws_in_float32(name):
    """Longer ones too, over several chunks of a scan and groups of a forward pass."""
    layer = FEW[name]()
    assert_padding_has_no_effect(layer, length=300)
    assert_packing_is_independent(layer, length=400)


@pytest.mark.parametrize("name", FEW)
def test_the_law_of_padding_with_many_lengths(name):
    """A scan then goes by powers of two."""
    layer = FEW[name]().double()
    assert_padding_has_no_effect(
        layer, torch.randn(12, 37, layer.d_input).double(), [0, 1, 36, 3, 5, 8, 37, 13, 21, 30, 34, 2]
    )


# --- padded batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", GRIDS)
def test_images_of_different_sizes(name, side):
    layer = GRIDS[name]().double()
    sizes = torch.tensor([[5, 7], [2, 7], [5, 1], [3, 4], [2, 7]])
    u = torch.full((5, 5, 7, layer.d_input), torch.nan, dtype=torch.float64)
    images, expected = [], torch.zeros(5, 5, 7, layer.d_output, dtype=torch.float64)
    for b, (h, w) in enumerate(sizes.tolist()):
        place = (b, slice(0, h), slice(0, w)) if side == "right" else (b, slice(5 - h, 5), slice(7 - w, 7))
        images.append(torch.randn(h, w, layer.d_input, dtype=torch.float64))
        u[place] = images[-1]
        expected[place] = layer(images[-1])
    y = forward_padded(layer, u.requires_grad_(), sizes, side=side)
    assert relative_error(y, expected) < 1e-12
    assert torch.equal(y == 0, (expected == 0))
    (grad,) = torch.autograd.grad(y.sum(), u)
    assert torch.equal(grad == 0, u.isnan())
    assert grad.isfinite().all()


def test_rows_of_one_shape_run_together_and_no_others():
    layer = Counting(S4D(3, 4, bidirectional=True))
    forward_padded(layer, torch.randn(6, 9, 3), [4, 9, 4, 0, 9, 9])
    assert sorted(layer.forwards) == [(2, 4), (3, 9)]
    layer = Counting(Grid(3))
    forward_padded(layer, torch.randn(4, 5, 9, 3), [[5, 9], [9 - 5, 9], [5, 9], [4, 9]])
    assert sorted(layer.forwards) == [(2, 4, 9), (2, 5, 9)]


@pytest.mark.parametrize(
    "make", [lambda: S4D(3, 4), lambda: S4D(3, 4, bidirectional=True), lambda: MultiRate(3, S4D(6))]
)
def test_batches_with_nothing_in_them(make):
    layer = make()
    for B, L in ((0, 4), (3, 0), (2, 5)):
        u, lengths = torch.randn(B, L, 3), torch.zeros(B, dtype=torch.long)
        assert torch.equal(forward_padded(layer, u, lengths), torch.zeros(B, L, 3))
        if layer.causal:
            y, state = scan_padded(layer, u, layer.initial_state(B), lengths)
            assert torch.equal(y, torch.zeros(B, L, 3))
            assert ssmkit.testing.common.equal(state, layer.initial_state(B))
    assert forward_packed(layer, torch.randn(0, 3), [0]).shape == (0, 3)
    assert forward_packed(layer, torch.randn(2, 0, 3), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0, 3)


def test_a_causal_model_runs_once_over_a_padded_batch():
    layer = Counting(S4D(3, 4))
    forward_padded(layer, torch.randn(6, 9, 3), [4, 9, 4, 0, 9, 9])
    assert layer.forwards == [(6, 9)]


def test_padded_batches_are_traced_as_one_graph():
    """Lengths are not looked into: with a compiler in place of the CPU, that would end the graph."""
    layer = Sequential(nn.Linear(3, 4), nn.GELU(), Mamba(4, 2), nn.LayerNorm(4))
    u, lengths = torch.randn(3, 9, 3), torch.tensor([9, 2, 5])
    for side in ("right", "left"):
        traced = torch.compile(
            lambda u, n, side=side: forward_padded(layer, u, n, side=side), backend="eager", fullgraph=True
        )
        assert relative_error(traced(u, lengths), forward_padded(layer, u, lengths, side=side)) < 1e-6


def test_scans_of_many_lengths_are_few_and_run_every_sample_once():
    layer = Counting(S4D(3, 4))
    lengths = torch.randint(0, 1001, (40,))
    scan_padded(layer, torch.randn(40, 1000, 3), layer.initial_state(40), lengths)
    assert len(layer.scans) <= 10
    assert sum(B * L for B, L in layer.scans) == lengths.sum()
    assert layer.systems == 1


def test_scans_of_few_lengths_are_as_many():
    layer = Counting(S4D(3, 4))
    u, state = torch.randn(5, 1000, 3), layer.initial_state(5)
    scan_padded(layer, u, state, [1000] * 5)
    assert layer.scans == [(5, 1000)]
    layer.scans.clear()
    scan_padded(layer, u, state, [1000, 777, 0, 777, 1000])
    assert layer.scans == [(4, 777), (2, 223)]


def test_states_of_a_padded_prompt_go_on_by_steps_and_scans():
    """Rows at phases of their own, and with a second batch axis."""
    model = MultiRate(2, S4D(4, 4), 3).double()
    u, lengths = torch.randn(4, 2, 17, 2).double(), [17, 0, 5, 12]
    rest = model.initial_state(4, 2, dtype=torch.float64)
    _, state = scan_padded(model, u, rest, lengths, side="left")
    more = torch.randn(4, 2, 6, 2).double()
    y, end = model.scan(more, state)
    stepped, _ = model.step(more[..., 0, :], state)
    for b, n in enumerate(lengths):
        whole = model(torch.cat([u[b, :, 17 - n :], more[b]], -2))
        assert relative_error(y[b], whole[:, n:]) < 1e-12
        assert relative_error(stepped[b], whole[:, n]) < 1e-12
    assert (end[2] == torch.tensor([(n + 6) % 3 for n in lengths])[:, None]).all()


def test_other_padding_than_class_numbers():
    """Such as the -100 that losses pass over."""
    model = Sequential(nn.Embedding(7, 4), S4D(4, 4), nn.Linear(4, 7))
    u = torch.randint(7, (2, 9))
    u[1, 4:] = -100
    y = forward_padded(model, u, [9, 4])
    assert relative_error(y[1, :4], model(u[1, :4])) < 1e-5
    y, _ = scan_padded(model, u, model.initial_state(2), [9, 4])
    assert relative_error(y[1, :4], model(u[1, :4])) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_are_those_of_the_model(dtype):
    model = Sequential(nn.Linear(3, 4), MultiRate(4, S4D(8, 4)), nn.Linear(4, 2)).to(dtype)
    u, state = torch.randn(3, 9, 3).to(dtype), model.initial_state(3, dtype=torch.float64)
    starts = torch.rand(3, 9) < 0.3
    found = [
        forward_padded(model, u, [9, 0, 4]),
        forward_padded(model, u, [9, 0, 4], side="left"),
        scan_padded(model, u, state, [9, 0, 4])[0],
        forward_packed(model, u, starts),
        scan_packed(model, u, state, starts)[0],
        step_packed(model, u[:, 0], state, starts[:, 0])[0],
    ]
    assert {y.dtype for y in found} == {dtype}
    assert {y.shape for y in found} == {(3, 9, 2), (3, 2)}
    ends = [
        scan_padded(model, u, state, [9, 0, 4])[1],
        scan_packed(model, u, state, starts)[1],
        reset(model, state, torch.tensor([True, False, True])),
        reset(model, state, torch.ones(3, dtype=torch.bool)),
    ]
    for end in ends:
        floats = [x for x in ssmkit.testing.common.leaves(end) if torch.is_tensor(x) and x.is_floating_point()]
        assert {x.dtype for x in floats} == {torch.float64}


@pytest.mark.parametrize("make", [lambda: S4Block(3), lambda: S4Block(3, S4(3, bidirectional=True))])
def test_gradients_are_those_of_the_sequences_alone(make):
    """Of parameters and inputs, with a system handed in and without, in a checkpoint too."""
    layer = ssmkit.Checkpoint(make()).double()
    lengths, starts = [9, 4, 6], starts_from_boundaries([0, 9, 13, 19])
    parts = [x.requires_grad_() for x in ragged(*lengths, dtype=torch.float64)]
    weights = [torch.randn(n, 3, dtype=torch.float64) for n in lengths]
    wanted = [*layer.parameters(), *parts]

    def gradients(outputs):
        return torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)), wanted)

    expected = gradients([layer(x) for x in parts])
    runs = {
        "padded": lambda system: unpad(forward_padded(layer, pad(parts)[0], lengths, system=system), lengths),
        "packed": lambda system: unpack(forward_packed(layer, pack(parts)[0], pack(parts)[1], system=system), starts),
    }
    if layer.causal:
        rest = layer.initial_state(3, dtype=torch.float64)
        runs["scan, padded"] = lambda system: unpad(
            scan_padded(layer, pad(parts, side="left")[0], rest, lengths, side="left", system=system)[0],
            lengths,
            side="left",
        )
        alone = layer.initial_state(dtype=torch.float64)
        runs["scan, packed"] = lambda system: unpack(
            scan_packed(layer, pack(parts)[0], alone, starts, system=system)[0], starts
        )
    for run in runs.values():
        for system in (None, layer.system()):
            for found, wished in zip(gradients(run(system)), expected, strict=True):
                assert relative_error(found, wished) < 1e-10


def test_time_stamps_of_a_padded_batch():
    """They are the rates of samples in their places, so only padding on the right leaves them as they are."""
    layer = Sequential(nn.Linear(3, 4), S4D(4, 4), Mamba(4, 2)).double()
    u, rate, lengths = torch.randn(3, 9, 3).double(), 0.5 + torch.rand(3, 9).double(), [9, 2, 5]
    y = forward_padded(layer, u, lengths, system=layer.system(rate))
    for b, n in enumerate(lengths):
        assert relative_error(y[b, :n], layer(u[b, :n], layer.system(rate[b, :n]))) < 1e-12
    rest, starts = layer.initial_state(3), torch.rand(3, 9) < 0.3
    for name, call in (
        ("forward_padded", lambda system: forward_padded(layer, u, lengths, side="left", system=system)),
        ("scan_padded", lambda system: scan_padded(layer, u, rest, lengths, system=system)),
        ("forward_packed", lambda system: forward_packed(layer, u, starts, system=system)),
        ("scan_packed", lambda system: scan_packed(layer, u, rest, starts, system=system)),
    ):
        with pytest.raises(ValueError, match=f"{name}: the rate of `system` must be a number, got a tensor"):
            call(layer.system(rate))
    stepped, _ = step_packed(layer, u[:, 0], rest, starts[:, 0], system=layer.system(rate[:, 0]))
    assert relative_error(stepped, y[:, 0]) < 1e-12


def test_a_system_handed_in_is_used():
    layer = Counting(S4D(3, 4))
    old = layer.system()
    u, rest, starts = torch.randn(2, 9, 3), layer.initial_state(2), torch.rand(2, 9) < 0.5
    runs = [
        lambda system: forward_padded(layer, u, [9, 4], system=system),
        lambda system: scan_padded(layer, u, rest, [9, 4], system=system)[0],
        lambda system: forward_packed(layer, u, starts, system=system),
        lambda system: scan_packed(layer, u, rest, starts, system=system)[0],
        lambda system: step_packed(layer, u[:, 0], rest, starts[:, 0], system=system)[0],
    ]
    before = [run(None) for run in runs]
    with torch.no_grad():
        layer.layer.D.add_(1.0)
    layer.systems = 0
    for run, y in zip(runs, before, strict=True):
        assert torch.equal(run(old), y)
        assert relative_error(run(None), y) > 0.01
    assert layer.systems == 3


# --- packed rows ------------------------------------------------------------------------------------------------------


def test_rows_of_several_sequences_in_chunks():
    """A batch of rows whose sequences begin at different places, some of them beyond a chunk."""
    model = Sequential(nn.Linear(3, 4), MultiRate(4, S4D(8, 4), 3), S4Block(4, S4D(4, 4))).double()
    u = torch.randn(4, 50, 3).double()
    starts = torch.zeros(4, 50, dtype=torch.bool)
    for row, places in enumerate(([0, 10, 11, 30], [], [49], [0, 20, 40])):
        starts[row, places] = True
    y = forward_packed(model, u, starts)
    for row in range(4):
        for k, part in enumerate(unpack(u[row], starts[row] | (torch.arange(50) == 0))):
            begin = [0, *[p for p in starts[row].nonzero().flatten().tolist() if p]][k]
            assert relative_error(y[row, begin : begin + len(part)], model(part)) < 1e-11
    # Of the chunks, some begin with a sequence, and some have none of their own.
    state, parts = model.initial_state(4, dtype=torch.float64), []
    for chunk, flags in zip(u.split([10, 5, 0, 25, 10], 1), starts.split([10, 5, 0, 25, 10], 1), strict=True):
        part, state = scan_packed(model, chunk, state, flags)
        parts.append(part)
    assert relative_error(torch.cat(parts, 1), y) < 1e-11
    more = torch.randn(4, 7, 3).double()
    going_on, _ = model.scan(more, state)
    for row, begin in enumerate((30, 0, 49, 40)):
        assert relative_error(going_on[row], model(torch.cat([u[row, begin:], more[row]]))[50 - begin :]) < 1e-11


def test_places_in_a_chunk_are_as_good_as_flags():
    layer = S4D(3, 4)
    u, state = torch.randn(20, 3), layer.scan(torch.randn(5, 3), layer.initial_state())[1]
    flags = torch.zeros(20, dtype=torch.bool)
    flags[[4, 9]] = True
    for places in ([4, 9], [4, 9, 20], torch.tensor([4, 9, 20], dtype=torch.int32)):
        for a, b in zip(scan_packed(layer, u, state, places), scan_packed(layer, u, state, flags), strict=True):
            assert torch.equal(a, b)
    y, end = scan_packed(layer, u, state, [])
    whole, after = layer.scan(u, state)
    assert torch.equal(y, whole)
    assert torch.equal(end, after)
    y, end = scan_packed(layer, u, state, [20])
    assert torch.equal(end, after)


def test_a_row_with_and_without_a_batch_axis():
    layer, u, boundaries = MultiRate(3, S4D(6, 4)), torch.randn(20, 3), [0, 7, 20]
    y = forward_packed(layer, u, boundaries)
    assert torch.equal(forward_packed(layer, u[None], boundaries)[0], y)
    one, end = scan_packed(layer, u, layer.initial_state(), boundaries)
    batch, ends = scan_packed(layer, u[None], layer.initial_state(1), boundaries)
    assert torch.equal(batch[0], one)
    assert ssmkit.testing.common.equal(ssmkit.states.select(ends, 0), end)
    # Phases of a single row stay integers.
    assert end[2] == ends[2] == 13 % 4
    model = Sequential(nn.Embedding(5, 3), S4D(3, 4))
    classes = torch.randint(5, (20,))
    assert torch.equal(forward_packed(model, classes[None], boundaries)[0], forward_packed(model, classes, boundaries))


def test_groups_of_a_packed_row_cost_the_least():
    """Padded samples, and 2048 for every run: no other groups of neighbours in length cost less."""
    for lengths in ([5000, 4900, 100, 90, 80, 3000], [700] * 3 + [10], [64, 1024, 500, 900, 300, 77, 850]):
        layer = Counting(S4D(1, 2))
        forward_packed(layer, torch.randn(sum(lengths), 1), torch.tensor([0, *lengths]).cumsum(0))
        found = sum(B * L + 2048 for B, L in layer.forwards)
        ordered, best = sorted(lengths, reverse=True), []
        for count in range(len(ordered)):
            for cuts in combinations(range(1, len(ordered)), count):
                edges = [0, *cuts, len(ordered)]
                best.append(sum(2048 + (b - a) * ordered[a] for a, b in zip(edges, edges[1:], strict=False)))
        assert found == min(best)
        assert sum(B for B, _ in layer.forwards) == len(lengths)


def test_many_short_sequences_run_in_a_few_groups():
    layer = Counting(S4D(1, 2))
    lengths = torch.randint(1, 200, (500,))
    forward_packed(layer, torch.randn(int(lengths.sum()), 1), torch.cat([torch.zeros(1), lengths.cumsum(0)]).long())
    assert 1 < len(layer.forwards) < 20
    assert sum(B * L for B, L in layer.forwards) < 1.2 * lengths.sum()


def test_where_sequences_begin_in_all_forms():
    starts = torch.tensor([True, False, False, True, True])
    assert torch.equal(starts_from_boundaries([0, 3, 4, 5]), starts)
    assert torch.equal(starts_from_boundaries(torch.tensor([0, 3, 4, 5], dtype=torch.int32)), starts)
    numbers = torch.tensor([[4, 4, 4, 2, 4], [1, 2, 2, 2, 2]])
    flags = starts_from_segments(numbers)
    assert torch.equal(flags, torch.tensor([[1, 0, 0, 1, 1], [1, 1, 0, 0, 0]]).bool())
    assert torch.equal(starts_from_segments(segments_from_starts(flags)), flags)
    assert torch.equal(segments_from_starts(starts), torch.tensor([0, 0, 0, 1, 2]))
    # A chunk that begins inside a sequence.
    assert torch.equal(starts_from_segments(numbers[:, 2:], before=numbers[:, 1]), flags[:, 2:])
    inside = torch.tensor([False, False, True, False])
    assert torch.equal(segments_from_starts(inside), torch.tensor([0, 0, 1, 1]))
    assert starts_from_segments(numbers[:, :0]).shape == segments_from_starts(flags[:, :0]).shape == (2, 0)
    assert starts_from_boundaries([0]).shape == (0,)


def test_each_sequence_has_a_mask_of_its_own():
    """In training, tied dropout draws for a sequence what it draws for one alone."""
    layer = TiedDropout(64, 0.5).train()
    u = torch.ones(30, 64)
    for y in (forward_packed(layer, u, [0, 10, 30]), scan_packed(layer, u, layer.initial_state(), [0, 10, 30])[0]):
        first, second = y[:10], y[10:]
        assert torch.equal(first, first[:1].expand_as(first))
        assert torch.equal(second, second[:1].expand_as(second))
        assert not torch.equal(first[0], second[0])
    state = layer.initial_state(2)
    rows = torch.tensor([True, False])
    after = reset(layer, state, rows)
    assert torch.equal(after[1], state[1])
    assert not torch.equal(after[0], state[0])


def test_flags_that_are_not_set_leave_the_state_as_it_is():
    model = MultiRate(2, S4D(4, 4))
    _, state = model.step(torch.randn(3, 2), model.initial_state(3))
    assert reset(model, state, torch.zeros(3, dtype=torch.bool)) is state
    assert reset(model, state, torch.ones(3, dtype=torch.bool))[2] == 0
    assert reset(model, state, torch.tensor([True, False, False]))[2].tolist() == [0, 1, 1]
    one = reset(model, model.initial_state(), torch.tensor(True))
    assert one[2] == 0
    assert reset(Sequential(nn.GELU()), ((),), torch.tensor([True])) == ((),)


def test_resets_are_traced_as_one_graph():
    model = Sequential(nn.Linear(3, 4), S4D(4, 4), TiedDropout(4))
    system = model.system()
    u, starts = torch.randn(3, 3), torch.tensor([True, False, True])
    _, state = model.scan(torch.randn(3, 9, 3), model.initial_state(3))
    traced = torch.compile(
        lambda u, state, starts: step_packed(model, u, state, starts, system=system), backend="eager", fullgraph=True
    )
    model.eval()
    assert relative_error(traced(u, state, starts)[0], step_packed(model, u, state, starts, system=system)[0]) < 1e-6


@pytest.mark.parametrize("name", ["S4Block", "MultiRate", "Mamba"])
def test_streams_of_an_engine_start_anew(name):
    model = FEW[name]().eval()
    stream = ssmkit.streaming.Engine(model).start(2, 2)
    u = torch.randn(2, 2, 30, model.d_input)
    rows = torch.tensor([[True, False], [False, True]])
    with torch.no_grad():
        state = model.scan(u[..., :13, :], model.initial_state(2, 2))[1]
        stream.run(u[..., :13, :])
        for begin, end, flags in ((13, 14, rows), (14, 20, torch.zeros_like(rows)), (20, 27, ~rows), (27, 30, None)):
            stream.reset(flags)
            state = reset(model, state, torch.ones_like(rows) if flags is None else flags)
            y, state = model.scan(u[..., begin:end, :], state)
            assert relative_error(stream.run(u[..., begin:end, :]), y) < 1e-4
    found, expected = (ssmkit.testing.common.leaves(s) for s in (stream.state, state))
    for a, b in zip(found, expected, strict=True):
        assert (
            relative_error(torch.as_tensor(a).float().expand(torch.as_tensor(b).shape), torch.as_tensor(b).float())
            < 1e-4
        )


def test_a_stream_whose_past_is_not_a_number_starts_anew():
    model = MultiRate(2, S4D(4, 4), 3)
    engine, u = ssmkit.streaming.Engine(model), torch.randn(3, 20, 2)
    stream, fresh = engine.start(3), engine.start(3)
    stream.run(torch.full((3, 4, 2), torch.nan))
    stream.reset()
    assert torch.equal(stream.run(u), fresh.run(u))


# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_pad_and_unpad(side):
    parts = [*ragged(4, 0, 7), torch.full((2, 3), torch.nan)]
    batch, lengths = pad(parts, side=side)
    assert batch.shape == (4, 7, 3)
    assert lengths.tolist() == [4, 0, 7, 2]
    for part, back in zip(parts, unpad(batch, lengths, side=side), strict=True):
        assert torch.equal(part.nan_to_num(9.0), back.nan_to_num(9.0))
    padding = batch[0, 4:] if side == "right" else batch[0, :3]
    assert not padding.any()
    if side == "right":
        assert torch.equal(batch[:3], pad_sequence(parts[:3], batch_first=True))
    classes, lengths = pad([torch.tensor([3, 1]), torch.tensor([2])], side=side)
    assert classes.tolist() == [[3, 1], [2, 0] if side == "right" else [0, 2]]


def test_pack_and_unpack():
    parts = ragged(4, 1, 7)
    row, boundaries = pack(parts)
    assert torch.equal(row, torch.cat(parts))
    assert boundaries.tolist() == [0, 4, 5, 12]
    for form in (boundaries, boundaries.tolist(), starts_from_boundaries(boundaries)):
        assert all(torch.equal(a, b) for a, b in zip(unpack(row, form), parts, strict=True))


@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling(side):
    """Values and gradients of single rows, whatever the padding holds; zeros for a row without samples."""
    parts = [x.double().requires_grad_() for x in ragged(4, 0, 7, 1)]
    y, lengths = pad(parts, side=side)
    inside, _ = pad([torch.ones(len(x), 1, dtype=torch.bool) for x in parts], side=side)
    y = torch.where(inside, y, torch.nan)
    definitions = {"mean": lambda x: x.mean(0), "last": lambda x: x[-1], "max": lambda x: x.amax(0)}
    weight = torch.randn(4, 3).double()
    for how, of_row in definitions.items():
        found = pool(y, lengths, how, side=side)
        expected = torch.stack([of_row(x) if len(x) else x.new_zeros(3) for x in parts])
        assert relative_error(found, expected) < 1e-14
        grads = torch.autograd.grad((found * weight).sum(), parts, retain_graph=True)
        wished = torch.autograd.grad((expected * weight).sum(), [x for x in parts if len(x)])
        for a, b in zip([g for g in grads if len(g)], wished, strict=True):
            assert relative_error(a, b) < 1e-14
        padding = y.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad((pool(padding, lengths, how, side=side) * weight).sum(), padding)
        assert torch.equal(torch.where(inside, 0, grad), torch.zeros_like(grad))
        assert pool(y.detach().bfloat16(), lengths, how, side=side).dtype == torch.bfloat16
        assert torch.equal(pool(torch.randn(2, 0, 3), [0, 0], how), torch.zeros(2, 3))
        # Other axes behind that of time.
        wide = torch.randn(2, 5, 3, 4)
        assert torch.equal(pool(wide, [5, 2], how), pool(wide.flatten(2), [5, 2], how).unflatten(1, (3, 4)))


def test_batches_for_a_data_loader():
    parts = ragged(5, 2, 7, 4)
    samples = [(x, n, x[:, 0], {"name": str(n)}) for n, x in enumerate(parts)]
    loader = torch.utils.data.DataLoader(samples, batch_size=2, collate_fn=collate)
    for number, (u, lengths, target, per_sample, names) in enumerate(loader):
        mine = parts[2 * number : 2 * number + 2]
        assert torch.equal(u, pad(mine)[0])
        assert lengths.tolist() == [len(x) for x in mine]
        assert target.tolist() == [2 * number, 2 * number + 1]
        assert torch.equal(per_sample, u[..., 0])
        assert names == {"name": [str(2 * number), str(2 * number + 1)]}
    u, boundaries, target, per_sample, _ = collate(samples, packed=True)
    assert torch.equal(u, torch.cat(parts))
    assert boundaries.tolist() == [0, 5, 7, 14, 18]
    assert torch.equal(per_sample, u[:, 0])
    u, lengths = collate(parts, side="left")
    assert torch.equal(u, pad(parts, side="left")[0])
    # Targets of one length that is not that of the sequences.
    _, _, target = collate([(x, torch.zeros(4)) for x in parts])
    assert target.shape == (4, 4)


def test_what_is_made_and_taken_apart_is_left_as_it_was():
    parts = ragged(5, 2)
    before = copy.deepcopy(parts)
    model = S4D(3, 4)
    u, lengths = pad(parts)
    state = model.initial_state(2)
    kept = u.clone(), lengths.clone(), state.clone()
    forward_padded(model, u, lengths, side="left")
    scan_padded(model, u, state, lengths)
    starts = torch.tensor([[True, False, False, True, False]] * 2)
    scan_packed(model, u, state, starts)
    pool(u, lengths)
    assert all(torch.equal(a, b) for a, b in zip((u, lengths, state), kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


# --- bad input --------------------------------------------------------------------------------------------------------

LAYER = S4D(3, 4)
U = torch.randn(2, 9, 3)
REST = LAYER.initial_state(2)
BAD = [
    (lambda: forward_padded(nn.Linear(3, 3), U, [9, 4]), TypeError, "forward_padded: `model` must be a `ssmkit.Seq"),
    (lambda: forward_padded(LAYER, [[1.0]], [1]), TypeError, "forward_padded: `u` must be a tensor, got list."),
    (lambda: forward_padded(LAYER, U[0], [9]), ValueError, r"`u` must have shape \(B, \*, L, d\).*got \(9, 3\)."),
    (lambda: forward_padded(LAYER, U, [9, 10]), ValueError, "at least 0 and at most the 9 samples.*got 10 in row 1."),
    (lambda: scan_padded(LAYER, U, REST, [-1, 9]), ValueError, "scan_padded: `lengths` must be .*got -1 in row 0."),
    (lambda: forward_padded(LAYER, U, [9]), ValueError, r"must have shape \(2,\), one for each row.*shape \(1,\)."),
    (lambda: scan_padded(LAYER, U, REST, [[9], [4]]), None, ""),
    (lambda: scan_padded(LAYER, U, REST, [[9, 1], [4, 1]]), ValueError, r"must have shape \(2, 1\).*shape \(2, 2\)."),
    (lambda: forward_padded(LAYER, U, [9.0, 4.0]), TypeError, "`lengths` must be integers, got torch.float32."),
    (lambda: forward_padded(LAYER, U, "ab"), TypeError, "`lengths` must be integers, got a str."),
    (lambda: forward_padded(LAYER, U, [True, False]), TypeError, "`lengths` must be integers, got torch.bool."),
    (lambda: forward_padded(LAYER, U, [9, 4], side="up"), ValueError, "`side` must be 'left' or 'right', got 'up'."),
    (lambda: scan_padded(S4D(3, bidirectional=True), U, REST, [9, 4]), ValueError, "S4D: `scan` needs a causal layer"),
    (
        lambda: scan_padded(LAYER, U, LAYER.initial_state(3), [9, 4]),
        ValueError,
        r"scan_padded: `state` .*\(2,\) of `u`",
    ),
    (lambda: scan_packed(LAYER, U, REST[0], torch.ones(2, 9).bool()), ValueError, r"scan_packed: `state` .* \(3, 4\)."),
    (lambda: forward_packed(LAYER, U, torch.ones(2, 8).bool()), ValueError, r"shape \(2, 9\).*got shape \(2, 8\)."),
    (lambda: forward_packed(LAYER, U, [0, 9]), ValueError, r"belong to a single row.*for \(2,\) rows; for several"),
    (lambda: forward_packed(LAYER, U[0], [[0, 9]]), ValueError, r"must have shape \(S \+ 1,\).*got shape \(1, 2\)"),
    (lambda: forward_packed(LAYER, U[0], [0, 5, 5, 9]), ValueError, "`boundaries` must increase, got 5 after 5."),
    (lambda: forward_packed(LAYER, U[0], [0, 5, 3, 9]), ValueError, "`boundaries` must increase, got 3 after 5."),
    (lambda: forward_packed(LAYER, U[0], [0, 5, 8]), ValueError, r"from 0 to the number of samples, 9.*got 0 to 8."),
    (lambda: forward_packed(LAYER, U[0], [1, 9]), ValueError, r"from 0 to the number of samples, 9.*got 1 to 9."),
    (lambda: forward_packed(LAYER, U[0], []), ValueError, r"from 0 to the number of samples, 9.*got none."),
    (lambda: forward_packed(LAYER, U[0], [0.0, 9.0]), TypeError, "`boundaries` must be integers, got torch.float32."),
    (lambda: forward_packed(LAYER, U[None], [0, 9]), ValueError, r"\(L, d\) or \(B, L, d\).*got \(1, 2, 9, 3\)."),
    (lambda: forward_packed(LAYER, U[0, 0], [0, 9]), ValueError, r"must have shape \(\*, L, d\).*got \(3,\)."),
    (lambda: scan_packed(LAYER, U[0], REST[0], [4, 10]), ValueError, "at most the number of samples, 9, got 4 to 10."),
    (lambda: scan_packed(LAYER, U[0], REST[0], [-1, 4]), ValueError, "scan_packed: .* at least 0 .*got -1 to 4."),
    (
        lambda: step_packed(LAYER, U[:, 0], REST, torch.ones(3).bool()),
        ValueError,
        r"step_packed: `starts` .*\(2,\).*\(3,\)",
    ),
    (lambda: step_packed(LAYER, U[:, 0], REST, torch.ones(2)), ValueError, "tensor of booleans.*got torch.float32 of"),
    (lambda: step_packed(LAYER, U[:, 0], REST, True), ValueError, r"with shape \(2,\), got bool."),
    (
        lambda: reset(LAYER, REST, torch.ones(3).bool()),
        ValueError,
        r"reset: `state` must have the batch shape \(3,\) of `rows`, got a tensor of shape \(2, 3, 4\).",
    ),
    (lambda: reset(LAYER, REST, torch.zeros(3).bool()), ValueError, r"batch shape \(3,\) of `rows`"),
    (lambda: reset(LAYER, REST, torch.zeros(2, 1).bool()), ValueError, r"batch shape \(2, 1\) of `rows`"),
    (lambda: reset(LAYER, REST, [True, False]), ValueError, "reset: `rows` must be a tensor of booleans.*got list."),
    (lambda: reset(nn.Linear(3, 3), REST, torch.ones(2).bool()), TypeError, "reset: `model` must be a"),
    (lambda: starts_from_boundaries([1, 2]), ValueError, "starts_from_boundaries: `boundaries` must go from 0"),
    (lambda: starts_from_boundaries([]), ValueError, "starts_from_boundaries: `boundaries` must go from 0"),
    (lambda: starts_from_segments(torch.ones(3)), TypeError, "`segments` must be integers, got torch.float32."),
    (lambda: starts_from_segments(torch.tensor(3)), ValueError, r"`segments` must have shape \(\*, L\)"),
    (
        lambda: starts_from_segments(torch.ones(2, 3).long(), torch.ones(3).long()),
        ValueError,
        r"`before` must have shape \(2,\), one number for each row of `segments`, got shape \(3,\).",
    ),
    (
        lambda: segments_from_starts(torch.ones(3)),
        ValueError,
        "segments_from_starts: `starts` must be a tensor of bool",
    ),
    (lambda: segments_from_starts(torch.tensor(True)), ValueError, r"`starts` must have shape \(\*, L\)"),
    (lambda: pad([]), ValueError, "pad: `sequences` must hold at least one sequence."),
    (lambda: pad([U[0], 3]), TypeError, "pad: `sequences` must be a tensor, got int."),
    (lambda: pad([U[0], U[0, :, :2]]), ValueError, r"differ only in length.*\(9, 2\) \(sequence 1\)"),
    (lambda: pad([U[0], U[0].double()]), ValueError, "differ only in length, got torch.float64"),
    (lambda: pad([torch.tensor(1.0)]), ValueError, "differ only in length"),
    (lambda: pad([U[0]], side=""), ValueError, "pad: `side` must be 'left' or 'right', got ''."),
    (lambda: pack([U[0], U[0, :0]]), ValueError, "at least one sample each, got none in sequence 1."),
    (lambda: unpad(U, [9, 10]), ValueError, "unpad: `lengths` must be at least 0"),
    (lambda: unpad(U[0, 0], [3]), ValueError, r"unpad: `batch` must have shape \(B, L, \*\), got"),
    (lambda: unpad([U], [3]), TypeError, r"unpad: `batch` must be a tensor, got list."),
    (lambda: unpack(U[0], [0, 4]), ValueError, "unpack: `boundaries` must go from 0 to the number of samples, 9"),
    (lambda: pool(U, [9, 4], "men"), ValueError, "unknown `how` 'men'; the known ones are last, max, mean. Did you"),
    (lambda: pool(U.long(), [9, 4]), TypeError, "pool: `y` must be a real floating tensor"),
    (lambda: pool(U, [9, 4], side=0), ValueError, "pool: `side` must be 'left' or 'right', got 0."),
    (lambda: pool(U, [9, 4, 1]), ValueError, r"pool: `lengths` must have shape \(2,\)"),
    (lambda: collate([]), ValueError, "collate: `samples` must be a list of at least one sample"),
    (lambda: collate([(1, 2)]), TypeError, "collate: `sequences` must be a tensor, got int."),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_gets_a_sentence(call, kind, message):
    if kind is None:
        call()
        return
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_stream_refuses_flags_of_another_shape():
    stream = ssmkit.streaming.Engine(S4D(3, 4)).start(2)
    with pytest.raises(ValueError, match=r"Stream.reset: `rows` must be a tensor of booleans with shape \(2,\)"):
        stream.reset(torch.ones(3, dtype=torch.bool))


def test_all_of_it_is_exported():
    assert all(callable(getattr(sequences, name)) for name in sequences.__all__)
