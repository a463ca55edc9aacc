"""The compiled engine: the same numbers and the same states as `step`, for everything in its table."""

import copy
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import ssmkit
from family import CAUSAL, streamed
from ssmkit import (
    S4,
    S4D,
    S6,
    Mamba2,
    MultiRate,
    Pointwise,
    Residual,
    S4Block,
    SequenceLayer,
    Sequential,
    StateSpaceLayer,
    TiedDropout,
    layers,
)
from ssmkit.streaming import Engine
from ssmkit.streaming.kernels import functions, products, recurrences
from ssmkit.streaming.lowering import MODULES
from ssmkit.systems import System
from ssmkit.testing import example_input, relative_error

KNOWN = [name for name, make in CAUSAL.items() if streamed(make)]

# A module of every kind in the table, with options that are not the defaults.
POINTWISE = [
    nn.AlphaDropout(0.3),
    nn.CELU(0.7),
    nn.Dropout(0.3),
    nn.ELU(0.6),
    nn.Embedding(11, 6),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.GLU(),
    layers.GroupedRMSNorm(6, 3, eps=0.1),
    nn.Hardshrink(0.4),
    nn.Hardsigmoid(),
    nn.Hardswish(),
    nn.Hardtanh(-0.3, 0.8),
    nn.Identity(),
    nn.LayerNorm(6),
    nn.LayerNorm(6, eps=0.1, bias=False),
    nn.LayerNorm(6, elementwise_affine=False),
    nn.LeakyReLU(0.2),
    nn.Linear(6, 5),
    nn.Linear(6, 1, bias=False),
    nn.LogSigmoid(),
    nn.LogSoftmax(-1),
    nn.Mish(),
    nn.PReLU(init=0.3),
    nn.RMSNorm(6),
    nn.RMSNorm(6, eps=0.1, elementwise_affine=False),
    nn.ReLU(),
    nn.ReLU6(),
    nn.SELU(),
    nn.Sequential(nn.Tanh(), nn.Linear(6, 4), nn.GLU()),
    nn.SiLU(),
    nn.Sigmoid(),
    nn.Softmax(-1),
    nn.Softmin(-1),
    nn.Softplus(2.0, 3.0),
    nn.Softshrink(0.2),
    nn.Softsign(),
    nn.Tanh(),
    nn.Tanhshrink(),
    nn.Threshold(0.1, -2.0),
]


def made(name):
    """A layer of the family in eval mode, with all weights changed from their initial values."""
    layer = CAUSAL[name]().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return layer


def stepped(layer, u, state):
    system, out = layer.system(), []
    with torch.no_grad():
        for sample in u.unbind(-2 if u.is_floating_point() else -1):
            y, state = layer.step(sample, state, system)
            out.append(y)
    return torch.stack(out, -2), state


def tree_error(a, b):
    """The largest relative error over the tensors of two states."""
    if isinstance(b, tuple):
        assert type(a) is tuple
        assert len(a) == len(b)
        return max((tree_error(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    if isinstance(b, int):
        assert a == b
        return 0.0
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return relative_error(a, b) if b.any() else float(a.abs().sum())


def exactly(layer, u, state):
    """Outputs and last state of a stream in float64, with the same weights, in the dtypes of the layer."""
    double = copy.deepcopy(layer).double()
    with torch.no_grad():
        y, end = double.scan(u.double() if u.is_floating_point() else u, ssmkit.states.move(state, dtype=torch.float64))
    return y, ssmkit.states.move(end, dtype=torch.float32)


@pytest.mark.numerical
@pytest.mark.parametrize("name", KNOWN)
def test_accuracy_over_ten_thousand_samples(name):
    """Three times the largest error over ten seeds; it does not depend on the compiler's order of summation."""
    layer = made(name)
    u, state = example_input(layer, 10_000), layer.initial_state()
    expected, end = exactly(layer, u, state)
    y, reached = Engine(layer).run(u, state)
    assert relative_error(y, expected) < 4e-6
    assert tree_error(reached, end) < 4e-6


@pytest.mark.parametrize("name", KNOWN)
def test_the_same_as_step(name):
    layer = made(name)
    u, state = example_input(layer, 1_000), layer.initial_state()
    expected, end = stepped(layer, u, state)
    y, reached = Engine(layer).run(u, state)
    assert relative_error(y, expected) < 1e-5
    assert tree_error(reached, end) < 1e-5


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", KNOWN)
def test_a_stream_moves_between_scan_and_engine_at_any_sample(name, threads):
    """A prompt by scan, a part by the engine, the rest by scan; any batch shape, any cuts, any number of threads."""
    layer = made(name)
    engine = Engine(layer, threads=threads)
    with torch.no_grad():
        for batch, cuts in (((), [5, 3, 20]), ((1,), [0, 17, 11]), ((2, 3), [1, 1, 26]), ((5,), [28, 0, 0])):
            u = example_input(layer, *batch, 28)
            first, middle, last = u.split(cuts, dim=len(batch))
            start = layer.initial_state(*batch)
            y0, state = layer.scan(first, start)
            y1, state = engine.run(middle, state)
            y2, state = layer.scan(last, state)
            expected, end = layer.scan(u, start)
            assert relative_error(torch.cat([y0, y1, y2], len(batch)), expected) < 1e-5
            assert tree_error(state, end) < 1e-5


@pytest.mark.parametrize("name", KNOWN)
def test_no_samples_and_no_streams(name):
    """Without samples the state does not change; a batch without streams is no error."""
    layer = made(name)
    engine, u = Engine(layer), example_input(layer, 2, 5)
    stream = engine.start(2)
    stream.run(u)
    before = stream.state
    y = stream.run(u[:, :0])
    assert y.shape == (2, 0, engine.d_output)
    assert tree_error(stream.state, before) == 0
    assert engine.start(0).run(u[:0]).shape == (0, 5, engine.d_output)


@pytest.mark.parametrize(
    "name", ["S4", "S4D, tied channels", "Embedding", "S4Block, GLU, dropout", "MultiRate, nested"]
)
def test_output_bits_do_not_depend_on_batch_threads_or_cuts(name):
    layer = made(name)
    u = example_input(layer, 5, 40)
    engine = Engine(layer)
    together = engine.start(5)
    y = together.run(u)
    assert torch.equal(y, engine.start(5).run(u))
    assert torch.equal(y, Engine(layer, threads=3).start(5).run(u))
    for i in range(5):
        alone, team = engine.start(), Engine(layer, threads=2).start()
        parts = torch.cat([alone.run(part) for part in u[i].split([1, 15, 1, 23])])
        assert torch.equal(parts, y[i])
        assert torch.equal(team.run(u[i]), y[i])
    assert tree_error(together.state, engine.run(u, layer.initial_state(5))[1]) == 0


@pytest.mark.parametrize("module", POINTWISE, ids=lambda m: str(m).replace("\n", ""))
def test_every_module_of_the_table(module):
    module.eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if isinstance(module, nn.Embedding):
        u = torch.randint(11, (4, 50))
        model = Sequential(module)
    else:
        # Small, ordinary and so large that an exponential overflows.
        u = torch.cat([torch.randn(4, 50, 6) * scale for scale in (1e-4, 1.0, 5.0, 100.0)], 1)
        # A layer of known width that passes its input on.
        model = Sequential(TiedDropout(6), module)
    y = Engine(model).start(4).run(u)
    with torch.no_grad():
        expected = module(u)
    for part, scaled in zip(y.split(50, 1), expected.split(50, 1), strict=True):
        assert bool(((part - scaled).abs() <= 1e-6 * scaled.abs().max() + 1e-10).all())


def test_every_entry_of_the_table_is_tested():
    """Every entry of the table is in a test above."""
    tested = {type(part) for module in POINTWISE for part in module.modules()}
    assert set(MODULES) == tested


@pytest.mark.parametrize("module", [m for m in POINTWISE if not isinstance(m, nn.Embedding)], ids=str)
def test_nan_is_passed_on(module):
    """Errors upstream are not hidden."""
    u = torch.tensor([[float("nan"), 1.0, 0.0, -1.0, 0.5, 2.0], [1.0, 0.3, 2.0, 1.0, 0.0, float("nan")]])
    with torch.no_grad():
        expected = module.eval()(u)
    assert expected.isnan().any()
    assert torch.equal(Engine(Sequential(TiedDropout(6), module)).start().run(u).isnan(), expected.isnan())


@pytest.mark.parametrize("init", ["fout", "lin"])
def test_poles_near_one_are_as_accurate_as_in_float64(init):
    """Over so many steps that a systematic error would show: about at most twice the error of `step`."""
    layer = S4D(2, 16, init=init, dt_min=1e-4, dt_max=1e-3)
    u = torch.randn(30_000, 2)
    y, (by_step, _) = Engine(layer).start().run(u), stepped(layer, u, layer.initial_state())
    with torch.no_grad():
        exact = layer.double()(u.double())
    assert relative_error(y, exact) < 3 * relative_error(by_step, exact)


def test_the_exponential_of_float64():
    """Over the whole range, at its ends, and with NaN; near zero, where poles are close to 1, to a rounding or two."""
    x = np.concatenate([np.linspace(-699, 699, 20_001), [0.0, -700.0, 700.0]])
    small = np.linspace(-2, 2, 20_001)
    error, small_error = (np.abs([functions.exp_float64(v) for v in xs] / np.exp(xs) - 1).max() for xs in (x, small))
    assert error < 2e-13
    assert small_error < 2e-15
    assert functions.exp_float64(-1e6) == functions.exp_float64(-700.0) > 0
    assert np.isnan(functions.exp_float64(float("nan")))


def test_silence_after_sound_takes_no_longer():
    """States that decay become zero long before they are denormal numbers."""
    layer = S4D(2, 8, init="real", dt_min=0.01, dt_max=0.1)
    stream = Engine(layer).start(state=layer.initial_state(dtype=torch.float64))
    stream.run(torch.randn(100, 2))
    stream.run(torch.zeros(30_000, 2))
    assert torch.equal(stream.state, torch.zeros(2, 8, dtype=torch.float64))


@pytest.mark.parametrize("make", [lambda: S4(3, 8), lambda: S4D(3, 8)])
def test_float64_states_are_not_rounded(make):
    layer = make()
    state = torch.randn(2, 3, 8, dtype=torch.float64)
    assert torch.equal(Engine(layer).start(2, state=state).state, state)


def test_streams_run_in_parallel_with_python_and_each_other():
    """The compiled loop releases Python's lock, and streams in threads give the same as alone."""
    layer = Sequential(Residual(MultiRate(4, S4Block(8, S4D(8, 16)), 2)), S4Block(4, S4(4, 16)))
    engine = Engine(layer)
    inputs = [torch.randn(60_000, 4) for _ in range(3)]
    expected = [engine.start().run(u) for u in inputs]
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: engine.start().run(inputs[i])})) for i in range(3)]
    for thread in threads:
        thread.start()
    beats = 0
    while any(thread.is_alive() for thread in threads):
        threads[0].join(0.005)
        beats += 1
    assert beats > 5
    assert all(torch.equal(found[i], expected[i]) for i in range(3))


def test_hot_loops_are_vectorised():
    """A loop that LLVM cannot vectorise gives the same numbers, several times slower."""
    w, x, y = (np.ones(640, np.float32) for _ in range(3))
    one, states = np.float32(1), np.ones(640)
    loops = {
        functions._gelu: (x, y, one, one, one),
        functions._silu: (x, y, one, one, one),
        functions.gate: (x, y),
        functions.add: (w, x, y),
        functions._norm: (one, w, w, x[:128], y, 1, 0, 128),
        products._four: (w, w, w, w, x),
        recurrences._rank_one: (states, w, states, 64, 1.0),
        recurrences._diagonal: (states, w, states, 64, 1.0),
        recurrences._step_modes: (states, w, states, 64, 1.0),
        recurrences._rotate: (states, w, states, x),
        recurrences._select_modes: (states, states, w, x, 0.1, 1.0),
        recurrences._decay: (states, w, x, 0.9, 0.1),
        functions.scale: (w, x, y),
    }
    for loop, arguments in loops.items():
        loop(*arguments)
        code = "".join(loop.inspect_llvm().values())
        assert re.search(r"f(mul|add)\b[a-z ]* <\d+ x (float|double)>", code), loop.py_func


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker():
    torch.manual_seed(0)
    inner = MultiRate(8, S4Block(16, S4D(16, 8)), 3)
    return Sequential(nn.Embedding(20, 8), Residual(inner), S4Block(8, S4(8, 8)), nn.Linear(8, 20, bias=False)).eval()


def by_hand(model, logits, uniform, temperature, top_k, top_p):
    """Sampling by its definition, for one stream, with the network's own step."""
    state, system, drawn, nats = model.initial_state(), model.system(), [], []
    for r in uniform.tolist():
        nats.append(logits)
        p = torch.softmax(logits.double() / temperature, -1) if temperature else F.one_hot(logits.argmax(), 20).double()
        if top_k:
            p = p * (p >= p.sort(descending=True).values[min(top_k, 20) - 1])
        p = p / p.sum()
        ordered, order = p.sort(descending=True, stable=True)
        p[order[(ordered.cumsum(0) - ordered) >= top_p]] = 0
        p = p / p.sum()
        drawn.append(int((p.cumsum(0) <= r).sum().clamp(max=19)))
        with torch.no_grad():
            logits, state = model.step(torch.tensor(drawn[-1]), state, system)
    nats = F.cross_entropy(torch.stack(nats).double(), torch.tensor(drawn), reduction="none")
    return torch.tensor(drawn), nats, logits


@settings(max_examples=25)
@given(
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 4, 19, 20, 50]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_samples_are_drawn_by_their_definition(speaker, temperature, top_k, top_p, seed):
    torch.manual_seed(seed)
    logits, uniform = 3 * torch.randn(20), torch.rand(40, dtype=torch.double)
    made = Engine(speaker).start().generate(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p)
    classes, nats, end = by_hand(speaker, logits, uniform, temperature, top_k, top_p)
    assert torch.equal(made.classes, classes)
    assert relative_error(made.nats, nats) < 1e-5
    assert relative_error(made.logits, end) < 1e-5


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_random_numbers_give_the_same_samples(speaker, threads):
    """In one call or in blocks, alone or in a batch; and the state is the one after the samples."""
    logits, uniform = torch.randn(3, 20), torch.rand(3, 50)
    engine = Engine(speaker, threads=threads)
    stream = engine.start(3)
    whole = stream.generate(logits, uniform, top_p=0.8)
    assert torch.equal(whole.classes, engine.start(3).generate(logits, uniform, top_p=0.8).classes)
    parts, following, blocks = engine.start(3), logits, []
    for part in uniform.split(13, dim=1):
        block = parts.generate(following, part, top_p=0.8)
        following = block.logits
        blocks.append(block.classes)
    assert torch.equal(torch.cat(blocks, 1), whole.classes)
    alone = engine.start().generate(logits[1], uniform[1], top_p=0.8)
    assert torch.equal(alone.classes, whole.classes[1])
    assert torch.equal(alone.nats, whole.nats[1])
    y, state = engine.run(whole.classes, speaker.initial_state(3))
    assert torch.equal(y[:, -1], whole.logits)
    assert tree_error(stream.state, state) == 0


def test_frequencies_are_those_of_the_distribution():
    model = Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    with torch.no_grad():
        model.layers[1].module.weight.zero_()
        model.layers[1].module.bias.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]).log())
    chance = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    made = Engine(model).start().generate(model.layers[1].module.bias, chance)
    share = made.classes.bincount(minlength=4) / 40_000
    assert torch.allclose(share, torch.tensor([0.4, 0.3, 0.2, 0.1]), atol=0.01)
    entropy = -sum(p * torch.tensor(p).log() for p in (0.4, 0.3, 0.2, 0.1))
    assert torch.isclose(made.nats.mean().float(), entropy, atol=0.02)


# --- what is refused --------------------------------------------------------------------------------------------------


class Own(nn.Module):
    def forward(self, u):
        return u


class OwnLinear(nn.Linear):
    def forward(self, u):
        return 2 * super().forward(u)


class Delay(SequenceLayer):
    d_input = d_output = 3

    def system(self, rate=1.0):
        return ()

    def initial_state(self, *batch_shape, device=None, dtype=None):
        return torch.zeros(*batch_shape, 3)

    def forward(self, u, system=None):
        return self.scan(u, self.initial_state(*u.shape[:-2]))[0]

    def step(self, u, state, system=None):
        return state, u

    def scan(self, u, state, system=None):
        both = torch.cat([state[..., None, :], u], dim=-2)
        return both[..., :-1, :], both[..., -1, :]


class Silent(System):
    """A user's own system, which remembers the last input."""

    d_input = d_output = 3
    dtype, state_shape = torch.float32, (3,)
    coefficients = (torch.zeros(()),)

    def scan(self, u, x):
        both = torch.cat([x[:, None], u], 1)
        return both[:, :-1], both[:, -1]

    def step(self, u, x):
        return x, u


class Mute(Silent):
    """Its `write` keeps no state."""

    def write(self, words, u):
        return u


class Unwritten(StateSpaceLayer):
    def discretize(self, rate):
        return Silent()


class Forgetful(StateSpaceLayer):
    def discretize(self, rate):
        return Mute()


class OwnStep(Unwritten):
    def step(self, u, state, system=None):
        return state, u


class TwoMemories(System):
    """A user's own system with two operations that keep a state, and all other operations."""

    def __init__(self):
        self.a = torch.polar(torch.tensor([0.9, 0.5]), torch.tensor([0.3, 1.0])).to(torch.complex128)
        self.W, self.w = torch.randn(4, 3), torch.randn(3, 4)

    d_input, d_output, dtype, state_shape = 3, 4, torch.float32, (12,)

    @property
    def coefficients(self):
        return [self.a, self.W, self.w]

    def scan(self, u, x):
        out = []
        for v in u.unbind(1):
            y, x = self.step(v, x)
            out.append(y)
        return torch.stack(out, 1), x

    def step(self, u, x):
        v = u @ self.W.mT
        both = torch.cat([x[..., 4:].unflatten(-1, (2, 4)), v[..., None, :]], -2)
        z = torch.view_as_complex(x[..., :4].unflatten(-1, (2, 2)).double().contiguous())
        new = torch.view_as_real(self.a * z + torch.view_as_complex(v.double().unflatten(-1, (2, 2)).contiguous()))
        new = new.flatten(-2).to(x.dtype)
        y = F.softplus(new) * (self.w * both).sum(-2) + 2 * v
        return y, torch.cat([new, both[..., 1:, :].flatten(-2)], -1)

    def write(self, words, u):
        v = words.linear(self.W, u)
        x = words.softplus(words.recur(self.a, v))
        y = words.taps(self.w, torch.zeros(4), v)
        return words.add(words.multiply(x, y), words.scale(torch.full((4,), 2.0), v))


class TwoMemoriesLayer(StateSpaceLayer):
    def __init__(self):
        super().__init__(3, 4, (12,))
        self.held = TwoMemories()

    def discretize(self, rate):
        return self.held


@pytest.mark.parametrize("threads", [1, 2])
def test_a_system_of_the_user_runs_by_its_write(threads):
    layer = TwoMemoriesLayer()
    u, state = torch.randn(2, 50, 3), torch.randn(2, 12)
    y, end = Engine(layer, threads=threads).run(u, state)
    expected, reached = layer.scan(u, state)
    assert relative_error(y, expected) < 2e-6
    assert relative_error(end, reached) < 2e-6
    assert torch.equal(Engine(layer).start(2, state=state).state, state)


@pytest.mark.parametrize("make", [lambda: S6(4, 3), lambda: Mamba2(4, 3, headdim=4)])
def test_a_rate_reaches_the_step_sizes_of_a_program(make):
    layer = make()
    system = layer.system(2.0)
    u = torch.randn(30, 4)
    with torch.no_grad():
        expected = layer(u, system)
        assert relative_error(layer(u), expected) > 1e-3
    assert relative_error(Engine(layer, system).start().run(u), expected) < 2e-6


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)
    return Sequential(layer)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sequential(nn.Linear(3, 3), Pointwise(Own())), "Own cannot be lowered"),
        (lambda: Sequential(OwnLinear(3, 3)), "OwnLinear cannot be lowered"),
        (lambda: Sequential(S4D(3), Delay()), "Delay cannot be lowered.*its `forward` is its own.*`step`"),
        (lambda: Sequential(OwnStep(3, 3, (3,))), "OwnStep cannot be lowered.*its `step` is its own"),
        (lambda: Sequential(Unwritten(3, 3, (3,))), "the system of Unwritten, a Silent, has no `write`"),
        (lambda: Sequential(Forgetful(3, 3, (3,))), "`write` of Mute keeps must be a state of 3 numbers.* got 0"),
        (lambda: S4(3, bidirectional=True), "Engine: `run` needs causal layers, and S4 is not causal"),
        (lambda: hooked(nn.Linear(3, 3)), "Linear has forward hooks"),
        (lambda: hooked(S4D(3)), "S4D has forward hooks"),
        (lambda: Sequential(nn.GELU()), "input width"),
        (lambda: Sequential(nn.Linear(3, 3), nn.Embedding(3, 3)), "must be the first"),
        (lambda: Sequential(nn.Embedding(3, 3, max_norm=1.0)), "max_norm"),
    ],
)
def test_models_that_cannot_be_lowered_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        Engine(make())


def test_wrong_arguments_raise_errors(speaker):
    engine, layer = Engine(speaker), S4D(3, 4)
    with pytest.raises(TypeError, match="SequenceLayer"):
        Engine(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="`system` must be"):
        Engine(layer, S4D(3, 8).system())
    with pytest.raises(ValueError, match="`system` must be a tuple of 4"):
        Engine(speaker, ((),))
    with pytest.raises(ValueError, match="threads"):
        Engine(layer, threads=0)
    with pytest.raises(TypeError, match="classes"):
        engine.start().run(torch.randn(5))
    with pytest.raises(ValueError, match="less than 20"):
        engine.start().run(torch.tensor([3, 20]))
    with pytest.raises(ValueError, match="at least 0"):
        engine.start().run(torch.tensor([-1]))
    with pytest.raises(ValueError, match="last axis"):
        Engine(layer).start().run(torch.randn(5, 4))
    with pytest.raises(TypeError, match="floating"):
        Engine(layer).start().run(torch.ones(5, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="batch shape"):
        Engine(layer).start(2).run(torch.randn(3, 5, 3))
    with pytest.raises(ValueError, match="state"):
        Engine(layer).run(torch.randn(5, 3), torch.zeros(3, 6))
    with pytest.raises(ValueError, match="tuple of 4"):
        engine.run(torch.tensor([1]), ())
    with pytest.raises(ValueError, match="Embedding of at least as many classes"):
        Engine(layer).start().generate(torch.zeros(3), torch.rand(5))
    with pytest.raises(ValueError, match="`logits` must have shape"):
        engine.start(2).generate(torch.zeros(20), torch.rand(2, 5))
    for option in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match=next(iter(option))):
            engine.start().generate(torch.zeros(20), torch.rand(5), **option)


@pytest.mark.parametrize("use", ["import ssmkit.streaming", "from ssmkit.streaming import Engine", "ssmkit.streaming"])
def test_without_numba_the_error_says_what_to_install(use):
    program = f"import sys; sys.modules['numba'] = None; import ssmkit; print('quiet'); {use}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "quiet\n"
    sentence = "ssmkit.streaming needs numba, which is an optional part of ssmkit: pip install 'ssmkit[streaming]'"
    assert done.stderr.splitlines()[-1] == f"ImportError: {sentence}"


def test_streaming_is_imported_when_it_is_first_used():
    program = (
        "import sys, ssmkit\n"
        "print('streaming' in dir(ssmkit), 'S4' in dir(ssmkit), 'numba' in sys.modules)\n"
        "print(ssmkit.streaming.Engine.__name__, 'numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True True False\nEngine True\n"
    with pytest.raises(AttributeError, match="module 'ssmkit' has no attribute 'nothing'"):
        _ = ssmkit.nothing


def test_it_works_without_a_cache_folder():
    program = (
        "import numba.core.caching as c, numpy as np\n"
        "(getattr(c, 'CacheImpl', None) or c._CacheImpl)._locator_classes = []\n"
        "from ssmkit.streaming import kernels\n"
        "memory, states, counters = np.zeros((1, 16), np.float32), np.zeros((1, 16)), np.zeros(1, np.int64)\n"
        "one, table = np.zeros((1, 0, 0), np.float32), np.zeros(0, kernels.INSTRUCTION)\n"
        "values = (table, memory[0], states[0], memory, states, counters)\n"
        "kernels.run(*values, 0, 0, counters[:, None], one, one, 0, 1, counters)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_library_alone_does_not_load_numba():
    program = "import sys, ssmkit; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_another_rate_is_another_system():
    layer = S4(3, 8)
    u = torch.randn(40, 3)
    y = Engine(layer, layer.system(2.0)).start().run(u)
    with torch.no_grad():
        assert relative_error(y, layer(u, layer.system(2.0))) < 1e-5
    assert isinstance(ssmkit.streaming.Engine, type)
