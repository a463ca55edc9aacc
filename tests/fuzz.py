"""Wrong values and the calls that take them: what `test_fuzz.py` draws from."""

import functools
import inspect
import re

import numpy as np
import torch
from torch import nn

import ssmkit
import ssmkit.streaming
from ssmkit import layers, sequences, states, systems

NAMES = {
    name
    for name in [*dir(ssmkit), *dir(layers), *dir(sequences), *dir(states), *dir(systems)]
    if not name.startswith("_")
}
NAMES |= {"Engine", "Stream", "log_uniform", "softplus_steps"}


def refusal(error):
    """Whether an exception is a sentence of ssmkit: it begins with a public name, and names an argument."""
    found = re.match(r"(\w+)(\.\w+)?: .*`.+`.*[.?]$", str(error), re.DOTALL)
    return type(error) in (ValueError, TypeError) and found is not None and found[1] in NAMES and "\n" not in str(error)


class _Thing:
    """A value of a foreign type."""

    def __init__(self, *args, **kwargs):
        pass


def _nothing(*args, **kwargs):
    return None


def _nan(*args, **kwargs):
    return np.full((4, 4), np.nan), np.ones(4)


def _long(*args, **kwargs):
    return np.ones((4, 5)), np.ones(4)


VALUES = [
    None,
    -1,
    0,
    1,
    2,
    3,
    7,
    0.5,
    1.5,
    -0.5,
    float("nan"),
    float("inf"),
    -float("inf"),
    1e300,
    1e-300,
    1e-8,
    10.0,
    10**30,
    10**400,
    True,
    False,
    "x",
    "legs",
    "zoh",
    "float32",
    "cuda",
    "meta",
    b"x",
    (),
    [],
    (1, 2),
    (0.5, 0.1),
    (-1.0, 2.0),
    (float("nan"), 1.0),
    [5],
    {},
    {"a.b": nn.Identity()},
    _Thing(),
    _Thing,
    _nothing,
    _nan,
    _long,
    1j,
    np.float64(0.5),
    np.int64(4),
    np.ones(2),
    torch.float32,
    torch.float16,
    torch.int64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.device("meta"),
    torch.zeros(2),
    torch.zeros(()),
    torch.tensor([1, 0]),
    nn.Linear(2, 3),
    nn.Conv1d(2, 2, 1),
]
"""Values that are right for some arguments and wrong for most."""


def _s4d(**given):
    return ssmkit.S4D(4, 4, **given)


SIZES = {"d_model": 4, "d_state": 4}
CONSTRUCTORS = {
    ssmkit.S4: SIZES,
    ssmkit.S4D: SIZES,
    ssmkit.S5: SIZES,
    ssmkit.LRU: SIZES,
    ssmkit.S6: SIZES,
    ssmkit.ShortConv: {"d_model": 4},
    ssmkit.Mamba: SIZES,
    ssmkit.Mamba2: {"d_model": 4, "d_state": 4, "headdim": 4},
    layers.SSD: {"d_model": 4, "d_state": 4, "headdim": 2},
    ssmkit.TiedDropout: {"d_model": 4},
    ssmkit.S4Block: {"d_model": 4, "layer": _s4d},
    ssmkit.MultiRate: {"d_model": 2, "layer": _s4d},
    ssmkit.DownPool: {"d_model": 4},
    ssmkit.UpPool: {"d_model": 4},
    ssmkit.LearnedStart: {"layer": _s4d},
    ssmkit.Pointwise: {"module": _s4d},
    ssmkit.Sequential: {"layers": _s4d},
    ssmkit.Residual: {"layers": _s4d},
    ssmkit.Checkpoint: {"layers": _s4d},
    ssmkit.Product: {"branches": _s4d},
    ssmkit.Concatenate: {"branches": _s4d},
}


def construct(cls, changes):
    """Calls a constructor with right values, some of which are changed."""
    given = {name: _s4d() if value is _s4d else value for name, value in CONSTRUCTORS[cls].items()} | changes
    if cls is ssmkit.Pointwise and "module" not in changes:
        given["module"] = nn.Linear(4, 4)
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind == parameter.VAR_POSITIONAL:
            return cls(given.pop(parameter.name), **given)
    return cls(**given)


def arguments(f):
    return list(inspect.signature(f).parameters)


_READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def finite(value):
    """Whether all numbers of an output or a state are finite."""
    if isinstance(value, tuple):
        return all(map(finite, value))
    readable = isinstance(value, torch.Tensor) and value.dtype in _READABLE and value.layout is torch.strided
    return not readable or value.is_meta or bool(value.isfinite().all())


def works(layer):
    """Runs a layer that was made without an error, in all modes."""
    u = torch.randn(2, 9, layer.d_input or 4).to(next(layer.parameters(), torch.zeros(())))
    if u.is_meta:
        return
    with torch.no_grad():
        y = layer(u)
        assert finite(y), "forward"
        if not getattr(layer, "causal", False):
            return
        assert y.shape == (2, 9, layer.d_output or 4)
        system = layer.system()
        y, state = layer.scan(u[:, :5], layer.initial_state(2), system)
        assert finite((y, state)), "scan"
        assert y.shape == (2, 5, layer.d_output or 4)
        y, state = layer.step(u[:, 5], state, system)
        assert finite((y, state)), "step"
        assert y.shape == (2, layer.d_output or 4)


MODELS = {
    "S4": lambda: ssmkit.S4(4, 4),
    "S4D": lambda: ssmkit.S4D(4, 4, channels=2),
    "S4D, bidirectional": lambda: ssmkit.S4D(4, 4, bidirectional=True),
    "S5": lambda: ssmkit.S5(4, 4),
    "LRU": lambda: ssmkit.LRU(4, 4),
    "S6": lambda: ssmkit.S6(4, 2),
    "ShortConv": lambda: ssmkit.ShortConv(4),
    "SSD": lambda: layers.SSD(4, 2, headdim=2),
    "Mamba": lambda: ssmkit.Mamba(4, 2),
    "Mamba2": lambda: ssmkit.Mamba2(4, 2, headdim=4),
    "TiedDropout": lambda: ssmkit.TiedDropout(4),
    "Pointwise": lambda: ssmkit.Pointwise(nn.Linear(4, 3)),
    "S4Block": lambda: ssmkit.S4Block(4, ssmkit.S4D(4, 4), glu=True),
    "MultiRate": lambda: ssmkit.MultiRate(4, ssmkit.S4D(8, 4), 3),
    "LearnedStart": lambda: ssmkit.LearnedStart(ssmkit.S5(4, 4)),
    "Embedding": lambda: ssmkit.Sequential(nn.Embedding(5, 4), ssmkit.S4D(4, 4), nn.Linear(4, 5)),
    "Product": lambda: ssmkit.Product(ssmkit.S4D(4, 4), nn.Linear(4, 4)),
    "Concatenate": lambda: ssmkit.Concatenate(ssmkit.S4D(4, 4), nn.GELU()),
    "Checkpoint": lambda: ssmkit.Checkpoint(nn.LayerNorm(4), ssmkit.LRU(4, 4)),
}


def right_input(model, *batch):
    first = next(iter(model), None) if isinstance(model, ssmkit.Sequential) else None
    if isinstance(first, ssmkit.Pointwise) and isinstance(first.module, nn.Embedding):
        return torch.randint(5, batch)
    return torch.randn(*batch, model.d_input)


def changed(x):
    """A right tensor, and what may be wrong with one."""
    yield "double", x.double()
    yield "half", x.bfloat16()
    yield "float8", x.to(torch.float8_e4m3fn)
    yield "integers", x.long()
    yield "booleans", x > 0
    yield "complex", x.to(torch.complex64)
    yield "meta", x.to("meta")
    yield "sparse", x.to_sparse()
    yield "strided", x.repeat_interleave(2, -1)[..., ::2] if x.ndim else x
    yield "transposed", x.mT.contiguous().mT if x.ndim > 1 else x
    yield "expanded", x[:1].expand_as(x) if x.ndim else x
    yield "narrow", x[..., :-1] if x.ndim else x
    yield "wide", torch.cat([x, x], -1) if x.ndim else x
    yield "one axis more", x[None]
    yield "one axis less", x[0] if x.ndim else x
    yield "no rows", x[:0] if x.ndim else x
    yield "another batch", torch.cat([x, x]) if x.ndim else x
    yield "numpy", x.detach().numpy()
    yield "list", x.tolist()
    yield "gradient", x.float().detach().clone().requires_grad_()


def changed_state(state):
    """Versions of a right state with one part that may be wrong."""
    if isinstance(state, tuple):
        for n, part in enumerate(state):
            for name, new in changed_state(part):
                yield f"{n}: {name}", (*state[:n], new, *state[n + 1 :])
        yield "list", list(state)
        yield "shorter", state[:-1]
        yield "longer", (*state, state)
    elif isinstance(state, torch.Tensor):
        yield from changed(state)
    else:
        values = [-1, 1, 2, 3, 100, 1.0, True, 10**30, torch.tensor(1), torch.tensor([0, 2]), torch.tensor([-1, 99])]
        yield from ((repr(value), value) for value in values)


def functions():
    """Functions with right arguments."""
    torch.manual_seed(0)
    s4d, pooled = ssmkit.S4D(4, 4), ssmkit.MultiRate(4, ssmkit.S4D(8, 4), 3)
    u = torch.randn(2, 9, 4)
    state, other = pooled.scan(u, pooled.initial_state(2))[1], pooled.initial_state(2)
    rows, lengths = torch.tensor([True, False]), torch.tensor([9, 5])
    starts = torch.arange(9)[None].expand(2, 9) % 4 == 0
    plain = s4d.scan(u, s4d.initial_state(2))[1]
    yield states.select, {"state": state, "index": [1, 0]}
    yield states.repeat, {"state": state, "times": 2}
    yield states.concatenate, {"states": [state, other]}
    yield states.where, {"condition": rows, "state": state, "other": other}
    yield states.detach, {"state": state}
    yield states.move, {"state": state, "device": "cpu", "dtype": torch.float64}
    yield states.to_dict, {"state": state, "prefix": "state"}
    yield states.from_dict, {"tensors": states.to_dict(state), "like": other, "prefix": "state"}
    yield sequences.forward_padded, {"model": pooled, "u": u, "lengths": lengths, "side": "left", "system": None}
    yield (
        sequences.scan_padded,
        {"model": pooled, "u": u, "state": state, "lengths": lengths, "side": "right", "system": None},
    )
    yield sequences.forward_packed, {"model": s4d, "u": u, "boundaries": starts, "system": None}
    yield sequences.scan_packed, {"model": s4d, "u": u, "state": plain, "boundaries": starts, "system": None}
    yield sequences.step_packed, {"model": s4d, "u": u[:, 0], "state": plain, "starts": rows, "system": None}
    yield sequences.reset, {"model": pooled, "state": state, "rows": rows}
    yield sequences.starts_from_boundaries, {"boundaries": [0, 3, 9]}
    yield sequences.starts_from_segments, {"segments": torch.tensor([1, 1, 2]), "before": torch.tensor(1)}
    yield sequences.segments_from_starts, {"starts": starts}
    yield sequences.pad, {"sequences": [u[0], u[1, :5]], "side": "left"}
    yield sequences.unpad, {"batch": u, "lengths": [9, 5], "side": "left"}
    yield sequences.pack, {"sequences": [u[0], u[1, :5]]}
    yield sequences.unpack, {"row": u[0], "boundaries": [0, 3, 9]}
    yield sequences.pool, {"y": u, "lengths": lengths, "how": "mean", "side": "right"}
    yield sequences.collate, {"samples": [(u[0], 1), (u[1, :5], 0)], "packed": False, "side": "right"}
    yield ssmkit.param_groups, {"model": s4d, "lr": 1e-3, "weight_decay": 0.1, "ssm_lr": 1e-3}


@functools.cache
def engines():
    """Calls of compiled programs, with right arguments, which make new streams each."""
    torch.manual_seed(0)
    model = ssmkit.Sequential(nn.Linear(4, 4), ssmkit.MultiRate(4, ssmkit.S4D(8, 4), 3), ssmkit.S5(4, 4))
    classes = ssmkit.Sequential(nn.Embedding(5, 4), ssmkit.S4D(4, 4), nn.Linear(4, 5))
    Engine = ssmkit.streaming.Engine
    engine, sampler = Engine(model), Engine(classes)
    u, state = torch.randn(2, 9, 4), model.initial_state(2)

    def make(model, system, threads):
        Engine(model, system, threads=threads)

    def start(size, state):
        return engine.start(size, state=state).state

    def run(u):
        return engine.start(2).run(u)

    def run_classes(u, state):
        return sampler.run(u, state)

    def reset(rows):
        engine.start(2).reset(rows)

    def generate(**given):
        return tuple(sampler.start(2).generate(**given))

    return [
        (make, {"model": model, "system": None, "threads": 1}),
        (start, {"size": 2, "state": state}),
        (engine.run, {"u": u, "state": state}),
        (run, {"u": u}),
        (run_classes, {"u": torch.randint(5, (2, 9)), "state": classes.initial_state(2)}),
        (reset, {"rows": torch.tensor([True, False])}),
        (
            generate,
            {"logits": torch.randn(2, 5), "uniform": torch.rand(2, 7), "temperature": 1.0, "top_k": 0, "top_p": 1.0},
        ),
    ]


def versions(value):
    """Versions of a right argument, one of whose parts may be wrong."""
    if isinstance(value, torch.Tensor):
        yield from changed(value)
        if value.dtype == torch.int64:
            yield from ((f"plus {n}", value + n) for n in (-1, 1, 100))
    elif isinstance(value, (tuple, list)) and any(isinstance(x, torch.Tensor) for x in value):
        for n, part in enumerate(value):
            for name, new in [*versions(part), *((repr(v)[:20], v) for v in (None, 1.5, "x", -1))]:
                yield f"{n}: {name}", type(value)([*value[:n], new, *value[n + 1 :]])
        yield "longer", type(value)([*value, value[0]])
    elif isinstance(value, list):
        for n, part in enumerate(value):
            for new in (-1, 1.5, None, "x", True, 10**30, (part, part), (), [part]):
                yield f"{n}: {new!r}", [*value[:n], new, *value[n + 1 :]]
    elif isinstance(value, dict):
        for name, part in value.items():
            yield f"{name} missing", {k: v for k, v in value.items() if k != name}
            for what, new in [*versions(part), ("None", None), ("1.5", 1.5)]:
                yield f"{name}: {what}", value | {name: new}
