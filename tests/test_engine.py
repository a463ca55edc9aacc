"""The threads of an engine, and its inputs, outputs and states."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import ssmkit
from family import CAUSAL, streamed
from ssmkit import (
    S4,
    S4D,
    S5,
    S6,
    Mamba,
    Mamba2,
    MultiRate,
    Residual,
    S4Block,
    Sequential,
    ShortConv,
    TiedDropout,
    layers,
)
from ssmkit.streaming import Engine, kernels
from ssmkit.streaming.kernels import Op
from ssmkit.testing import example_input, relative_error

# Wider than a cache line, so that every thread of a team has a part; some parts end inside a cache line.
WIDE = {
    "a linear map first": lambda: Sequential(nn.Linear(64, 64), S4(64, 4)),
    "a norm first": lambda: Sequential(nn.LayerNorm(50), S4D(50, 4), nn.RMSNorm(50), nn.GELU(), nn.Linear(50, 33)),
    "a softmax first": lambda: Sequential(TiedDropout(50), nn.Softmax(-1), nn.Tanh(), nn.Linear(50, 40)),
    "softmax between": lambda: Sequential(nn.Linear(40, 50), nn.LogSoftmax(-1), nn.SiLU()),
    "a gate first": lambda: Sequential(TiedDropout(74), nn.GLU(), S4D(37, 4)),
    "an odd gate": lambda: Sequential(nn.Linear(40, 2 * 37), nn.GLU(), nn.Linear(37, 48)),
    "a gate after channels": lambda: Sequential(S4D(37, 4, channels=4), nn.GLU(), nn.GELU()),
    "channels": lambda: Sequential(S4(40, 4, channels=3), nn.GELU(), S4D(120, 4)),
    "rank 2": lambda: S4(50, 8, rank=2),
    "Embedding": lambda: Sequential(nn.Embedding(70, 64), S4D(64, 4), nn.Linear(64, 70)),
    "S4Block": lambda: S4Block(64, S4(64, 4)),
    "S4Block, GLU": lambda: S4Block(50, S4D(50, 4, channels=2), glu=True),
    "Residual": lambda: Residual(nn.GELU(), Residual(nn.Linear(50, 50), nn.GELU()), nn.LayerNorm(50)),
    "S5": lambda: Sequential(nn.Linear(49, 40), S5(40, 34), nn.GELU()),
    "ShortConv": lambda: Sequential(nn.Linear(40, 50), ShortConv(50), nn.Linear(50, 40)),
    "S6": lambda: Sequential(nn.Linear(40, 50), S6(50, 3, ngroups=2), nn.GELU()),
    "S6 with fixed gains": lambda: Sequential(S6(50, 3, variable_B=False), S6(50, 3, variable_C=False), nn.SiLU()),
    "SSD": lambda: Sequential(layers.SSD(51, 4, headdim=17), nn.SiLU()),
    "Mamba": lambda: Sequential(Mamba(33, 3), nn.SiLU()),
    "Mamba2": lambda: Sequential(Mamba2(33, 3, headdim=11, ngroups=2), nn.SiLU()),
    "MultiRate": lambda: Sequential(nn.GELU(), MultiRate(40, S4D(80, 4), pool=3), nn.Linear(40, 3)),
    "MultiRate, nested": lambda: Residual(MultiRate(20, Residual(MultiRate(40, S4Block(80, S4D(80, 4)), 2)), 3)),
    "MultiRate, a frame of one sample": lambda: Sequential(nn.Linear(40, 40), MultiRate(40, S4D(80, 4), pool=1)),
}


def whole(layer, u):
    with torch.no_grad():
        return layer(u)


def leaves(state):
    if isinstance(state, tuple):
        return [leaf for child in state for leaf in leaves(child)]
    return [state]


# --- teams ------------------------------------------------------------------------------------------------------------


def reach(line, phase, rank, team):
    """The ranges (begin, end) that a thread reads and those that it writes in one instruction."""

    def share(n):
        return kernels.share(n, rank, team)

    op, source, target, n, m = Op(line["op"]), line["source"], line["target"], line["width"], line["outputs"]
    lo, hi = share(m if op in (Op.LINEAR, Op.EMBED) else n)
    mine, made = (source + lo, source + hi), (target + lo, target + hi)
    if op == Op.EMBED:
        return [], [made]
    if op == Op.LINEAR:
        return [(source, source + n)], [made, *([(target + m + lo, target + m + hi)] if line["gated"] else [])]
    if op == Op.NORM:
        return [(source, source + n)], [made]
    if op == Op.ACTIVATE:
        return [mine], [made]
    if op == Op.GLU:
        return [mine, (source + n + lo, source + n + hi)], [made]
    if op == Op.SOFTMAX:
        return ([], []) if rank else ([(source, source + n)], [(target, target + n)])
    if op in (Op.ADD, Op.MULTIPLY):
        return [mine, (line["other"] + lo, line["other"] + hi)], [made]
    if op in (Op.COPY, Op.SCALE, Op.RECUR, Op.TAPS):
        return [mine], [made]
    gains = line["groups"] * line["modes"]
    if op == Op.SELECT:
        steps = (line["other"] + lo, line["other"] + hi)
        made_of_input = [name for name in ("input_gains", "output_gains") if not line[f"fixed_{name}"]]
        return [mine, steps, *((line[name], line[name] + gains) for name in made_of_input)], [made]
    if op == Op.HEADS:
        return [(source, source + n + 2 * gains + n // line["head"])], [made]
    if op == Op.SSM:
        return [mine], [(made[0] + j * n, made[1] + j * n) for j in range(line["channels"])]
    assert op == Op.FRAME
    filling, emitting = line["filling"] + phase * n, line["emitting"] + phase * n
    return [mine, (emitting + lo, emitting + hi)], [made, (filling + lo, filling + hi)]


def instructions(engine):
    return [{name: int(line[name]) for name in line.dtype.names} for line in engine.table]


def hazards(engine, table, team, samples=7):
    """Places where a thread reads or writes what another wrote, or writes what another read, without a barrier."""
    phases = dict.fromkeys((line["counter"] for line in table if line["op"] == Op.FRAME), 0)
    writer = np.full(engine._size, -1)
    readers = np.zeros((team, engine._size), bool)
    found = set()

    def act(what, touched):
        for rank, (reads, _) in enumerate(touched):
            for lo, hi in reads:
                if ((writer[lo:hi] >= 0) & (writer[lo:hi] != rank)).any():
                    found.add(what)
                readers[rank, lo:hi] = True
        for rank, (_, writes) in enumerate(touched):
            for lo, hi in writes:
                if ((writer[lo:hi] >= 0) & (writer[lo:hi] != rank)).any() or np.delete(readers, rank, 0)[
                    :, lo:hi
                ].any():
                    found.add(what)
                writer[lo:hi] = rank

    def wait():
        writer[:] = -1
        readers[:] = False

    for _ in range(samples):
        wait()
        inputs = [kernels.share(engine._source.width, rank, team) for rank in range(team)]
        act("input", [([], [(engine._source.start + lo, engine._source.start + hi)]) for lo, hi in inputs])
        at = 0
        while at < len(table):
            line, number, at = table[at], at, at + 1
            if line["wait"]:
                wait()
            phase = phases.get(line["counter"], 0)
            act(number, [reach(line, phase, rank, team) for rank in range(team)])
            if line["op"] == Op.FRAME:
                phases[line["counter"]] = (phase + 1) % line["pool"]
                at = at if phase + 1 == line["pool"] else line["skip_to"]
        wait()
    return found


@pytest.mark.parametrize("team", [2, 3, 5])
@pytest.mark.parametrize("name", [name for name, make in {**CAUSAL, **WIDE}.items() if streamed(make)])
def test_threads_wait_before_they_access_what_another_wrote(name, team):
    """Checked instruction by instruction for each thread, so that the result does not depend on timing."""
    engine = Engine({**CAUSAL, **WIDE}[name]())
    assert not hazards(engine, instructions(engine), team)


@pytest.mark.parametrize("name", WIDE)
def test_every_wait_is_needed(name):
    """Without any one of them there is a hazard, which the check above finds."""
    engine = Engine(WIDE[name]())
    table = instructions(engine)
    for number, line in enumerate(table):
        if line["wait"]:
            without = [*table[:number], {**line, "wait": 0}, *table[number + 1 :]]
            assert hazards(engine, without, 2), (number, Op(line["op"]).name)


@pytest.mark.numerical
@pytest.mark.parametrize("name", WIDE)
def test_a_team_gives_the_same_bits_as_one_thread(name):
    model = WIDE[name]().eval()
    u, start = example_input(model, 300), model.initial_state()
    alone = Engine(model).start(state=start)
    y = alone.run(u)
    assert relative_error(y, whole(model.double(), u if not u.is_floating_point() else u.double())) < 2e-6
    for threads in (2, 3):
        team = Engine(model.float(), threads=threads).start(state=start)
        assert torch.equal(torch.cat([team.run(part) for part in u.split([1, 250, 49])]), y)
        assert all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            for a, b in zip(leaves(team.state), leaves(alone.state), strict=True)
        )


def test_a_team_draws_the_same_samples_as_one_thread():
    model = Sequential(nn.Embedding(70, 64), S4D(64, 4), nn.Linear(64, 70)).eval()
    logits, uniform = torch.randn(70), torch.rand(300)
    alone, *teams = (Engine(model, threads=n).start().generate(logits, uniform, top_p=0.9) for n in (1, 2, 3))
    for team in teams:
        assert all(torch.equal(a, b) for a, b in zip(team, alone, strict=True))


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_streams_are_divided_among_threads(threads):
    """Every stream runs once, for any number of streams and threads."""
    model = Sequential(nn.Linear(3, 4), MultiRate(4, S4D(8, 4)), S4Block(4, S4(4, 4))).eval()
    for streams in (2, 3, 5, 8):
        u = torch.randn(streams, 40, 3)
        engine = Engine(model, threads=threads)
        stream = engine.start(streams)
        y = torch.cat([stream.run(part) for part in u.split([7, 33], 1)], 1)
        assert torch.equal(y, Engine(model, threads=1).start(streams).run(u))


# --- products and gates -----------------------------------------------------------------------------------------------


@pytest.mark.numerical
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 33, 50])
def test_products_of_any_width(width, threads):
    """Rows are read four at a time, those of a gate two and two, and the rest one by one."""
    for model in (
        Sequential(nn.Linear(20, width), nn.Tanh()),
        Sequential(nn.Linear(20, 2 * width), nn.GLU()),
        Sequential(TiedDropout(2 * width), nn.GLU()),
    ):
        u = torch.randn(50, model.eval().d_input)
        y = Engine(model, threads=threads).start().run(u)
        assert relative_error(y, whole(model.double(), u.double())) < 2e-6


@pytest.mark.numerical
@pytest.mark.parametrize("width", [3, 40])
def test_the_input_of_a_gate_is_also_read_by_a_residual(width):
    """So the gate must not overwrite it, and cannot be a part of the product before it."""
    inner = Residual(nn.GLU(), nn.Linear(width, 2 * width))
    model = Sequential(nn.Linear(5, 2 * width), inner, nn.GLU(), nn.Linear(width, width))
    engine = Engine(model)
    u = torch.randn(50, 5)
    assert [Op(line["op"]) for line in instructions(engine)].count(Op.GLU) == 2
    assert relative_error(engine.start().run(u), whole(model.double(), u.double())) < 2e-6


def test_a_gate_is_merged_into_the_product_before_it_if_nothing_else_reads_that():
    for gated in (nn.Sequential(nn.Linear(5, 6), nn.GLU()), Residual(nn.Linear(5, 10), nn.GLU())):
        assert Op.GLU not in [Op(line["op"]) for line in instructions(Engine(Sequential(nn.Linear(4, 5), gated)))]
    for apart in (nn.Sequential(nn.Linear(5, 6), nn.Identity(), nn.Tanh(), nn.GLU()), nn.Sequential(nn.GLU())):
        first = nn.Linear(4, 5) if len(apart) > 1 else TiedDropout(4)
        assert Op.GLU in [Op(line["op"]) for line in instructions(Engine(Sequential(first, apart)))]


# --- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.numerical
@pytest.mark.parametrize("layer", [S4, S4D])
@pytest.mark.parametrize("init", ["legs", "fout"])
def test_blocks_of_fifteen_samples_with_poles_near_one(layer, init):
    """A state that is unpacked and packed every 15 samples is as accurate as one that stays in the engine."""
    model = layer(3, 16, init=init, dt_min=1e-5, dt_max=2e-5)
    engine, u = Engine(model), torch.randn(6000, 3)
    state, out = model.initial_state(), []
    for part in u.split(15):
        y, state = engine.run(part, state)
        out.append(y)
    exact = model.double()
    with torch.no_grad():
        y, end = exact.scan(u.double(), exact.initial_state(dtype=torch.float64))
    assert relative_error(torch.cat(out), y) < 2e-6
    assert relative_error(state, end) < 2e-6


@pytest.mark.parametrize("batch", [(), (1,), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name",
    ["S4", "S4D, channels", "S5", "S6", "ShortConv", "Mamba2", "TiedDropout", "MultiRate", "MultiRate, nested"],
)
def test_states_are_copies(name, batch, dtype):
    """Neither a given state nor a returned one shares memory with the stream."""
    model = CAUSAL[name]().eval()
    u = example_input(model, *batch, 19)
    _, start = model.scan(u[..., :8, :], model.initial_state(*batch))
    given = ssmkit.states.move(ssmkit.states.detach(start), dtype=dtype)
    kept = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves(given)]
    stream = Engine(model).start(*batch, state=given)
    first = stream.state
    held = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves(first)]
    y = stream.run(u)
    end = stream.state
    other = Engine(model).start(*batch, state=given)
    for x in (*leaves(given), *leaves(first)):
        assert not isinstance(x, torch.Tensor) or x.dtype == dtype
    for found, expected in ((given, kept), (first, held)):
        for a, b in zip(leaves(found), expected, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    for x in (*leaves(given), *leaves(first), *leaves(end)):
        if isinstance(x, torch.Tensor):
            x.fill_(math.nan)
    assert torch.equal(other.run(u), y)
    assert stream.run(u).isfinite().all()
    assert all(x.isfinite().all() for x in leaves(stream.state) if isinstance(x, torch.Tensor))


# --- inputs and outputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_outputs_have_the_dtype_of_the_input(dtype):
    """And states keep their dtype; the numbers are those for float32."""
    model = Sequential(nn.Linear(3, 4), S4D(4, 4), MultiRate(4, S4(8, 4)))
    engine, u = Engine(model), torch.randn(2, 30, 3).to(dtype)
    y, end = engine.run(u, model.initial_state(2, dtype=torch.float64))
    expected, single = engine.run(u.float(), model.initial_state(2))
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))
    for a, b in zip(leaves(end), leaves(single), strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == torch.float64
            assert torch.equal(a.float(), b)
    assert expected.dtype == torch.float32
    assert engine.start(2).run(u).dtype == dtype


def test_models_in_float64_become_programs_in_float32():
    model = Sequential(nn.Linear(3, 4), S4D(4, 4), nn.LayerNorm(4)).double()
    u = torch.randn(30, 3, dtype=torch.float64)
    y, state = Engine(model).run(u, model.initial_state())
    assert y.dtype == leaves(state)[0].dtype == torch.float64
    assert relative_error(y, whole(model, u)) < 2e-6


@pytest.fixture(scope="module")
def speaker():
    torch.manual_seed(0)
    return Engine(Sequential(nn.Embedding(20, 8), S4D(8, 4), nn.Linear(8, 20)).eval())


def test_drawn_classes_have_the_shape_of_the_random_numbers(speaker):
    for batch, length in (((), 5), ((), 0), ((3,), 4), ((2, 3), 1), ((2, 3), 0), ((0,), 4)):
        made = speaker.start(*batch).generate(torch.randn(*batch, 20), torch.rand(*batch, length))
        assert made.classes.shape == made.nats.shape == (*batch, length)
        assert made.logits.shape == (*batch, 20)
        assert (made.classes.dtype, made.nats.dtype) == (torch.int64, torch.float64)
    logits = torch.randn(20, dtype=torch.float64)
    assert speaker.start().generate(logits, torch.rand(3)).logits.dtype == torch.float64
    assert torch.equal(speaker.start().generate(logits, torch.rand(0)).logits, logits.float().double())


@pytest.mark.parametrize(
    ("batch", "logits", "uniform"),
    [
        ((), (20,), ()),
        ((), (20,), (1, 5)),
        ((), (1, 20), (5,)),
        ((), (19,), (5,)),
        ((2,), (2, 20), (5,)),
        ((2,), (2, 20), (3, 5)),
        ((2,), (2, 20), (2, 5, 1)),
        ((2,), (2, 20), ()),
        ((2,), (20, 2), (2, 5)),
        ((2, 3), (2, 3, 20), (3, 2, 5)),
        ((2, 3), (6, 20), (6, 5)),
    ],
)
def test_other_shapes_of_logits_and_random_numbers_are_refused(speaker, batch, logits, uniform):
    with pytest.raises(ValueError, match=r"`logits` must have shape .* and `uniform`"):
        speaker.start(*batch).generate(torch.zeros(logits), torch.zeros(uniform))


def test_the_smallest_and_the_largest_random_number(speaker):
    """At 0 the first class that may be drawn, and just below 1 the last one."""
    below = 1 - 2.0**-53
    logits = torch.full((20,), -1.0)
    logits[[5, 9, 13]] = torch.tensor([2.0, 2.0, 1.9])

    def drawn(chance, **options):
        uniform = torch.tensor([chance], dtype=torch.float64)
        return speaker.start().generate(logits, uniform, **options).classes.item()

    assert (drawn(0.0), drawn(below)) == (0, 19)
    for options in ({"top_k": 3}, {"top_p": 0.6}):
        assert (drawn(0.0, **options), drawn(below, **options)) == (5, 13)
    # With a tie for the last place both are kept.
    for options in ({"top_k": 1}, {"top_k": 2}):
        assert (drawn(0.0, **options), drawn(below, **options)) == (5, 9)
    assert (drawn(0.0, temperature=0.0), drawn(below, temperature=0.0)) == (5, 5)
    assert (drawn(0.0, top_p=1e-9), drawn(below, top_p=1e-9)) == (5, 5)
