"""No wrong argument gives a foreign exception, or a number that is not finite.

Either a call works, and gives finite numbers of the right shape, or its error is a `ValueError` or a `TypeError` of one
sentence that begins with a public name and names an argument. First each argument is wrong alone, in all ways of
`fuzz.py`; then several at a time, drawn by hypothesis: 200 times, or as often as `SSMKIT_FUZZ` says.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fuzz
import ssmkit

EXAMPLES = int(os.environ.get("SSMKIT_FUZZ", "200"))


def attempt(call, problems, label):
    """Notes a foreign exception or numbers that are not finite; returns the result, or None."""
    try:
        result = call()
        assert fuzz.finite(result), "not finite"
    except Exception as error:
        if not fuzz.refusal(error):
            problems.append(f"{label}: {type(error).__name__}: {error!s:.200}")
        return None
    return result


def values_for(argument):
    """The values to try for an argument of a constructor: what a user's own function raises is the user's own."""
    return [v for v in fuzz.VALUES if not (argument in ("init", "discretization") and isinstance(v, nn.Module))]


@pytest.mark.parametrize("cls", fuzz.CONSTRUCTORS, ids=lambda cls: cls.__name__)
def test_constructors_refuse_wrong_arguments(cls):
    problems = []
    for name in fuzz.arguments(cls):
        for value in values_for(name):
            label = f"{cls.__name__}({name}={value!r:.60})"
            layer = attempt(lambda name=name, value=value: fuzz.construct(cls, {name: value}), problems, label)
            if layer is not None:
                attempt(lambda layer=layer: fuzz.works(layer), problems, label)
    assert not problems, "\n".join(problems)


def calls(model):
    """All methods of a model, with right arguments."""
    u = fuzz.right_input(model, 2, 9)
    state = model.initial_state(2) if model.causal else None
    return {
        "forward": (model.forward, {"u": u, "system": None}),
        "scan": (model.scan, {"u": u, "state": state, "system": None}),
        "step": (model.step, {"u": u[:, 0], "state": state, "system": None}),
        "system": (lambda rate: model(u, model.system(rate)), {"rate": 1.0}),
        "initial_state": (
            lambda size, device, dtype: model.initial_state(size, device=device, dtype=dtype),
            {"size": 2, "device": None, "dtype": None},
        ),
    }


def versions_of(name, value):
    """Named values for an argument, most of which are wrong."""
    changed = fuzz.changed_state(value) if name == "state" and value is not None else fuzz.versions(value)
    return [*((repr(v)[:40], v) for v in fuzz.VALUES), *changed]


@pytest.mark.parametrize("name", fuzz.MODELS)
def test_calls_refuse_wrong_arguments(name):
    model, problems = fuzz.MODELS[name](), []
    for method, (f, right) in calls(model).items():
        assert not model.causal or f(**right) is not None
        for argument, value in right.items():
            for label, other in versions_of(argument, value):
                given = right | {argument: other}
                result = attempt(lambda f=f, given=given: f(**given), problems, f"{method}({argument}={label})")
                if method in ("forward", "scan", "step") and result is not None:
                    y = result if method == "forward" else result[0]
                    assert y.shape[:-1] == right_shape(given["u"]), f"{method}({argument}={label})"
    assert not problems, "\n".join(problems)


def right_shape(u):
    """The batch and time axes of an output."""
    return u.shape[:-1] if u.is_floating_point() else u.shape


def refuses(f, right):
    problems = []
    f(**right)
    for argument, value in right.items():
        for label, other in versions_of(argument, value):
            given = right | {argument: other}
            attempt(lambda given=given: f(**given), problems, f"{f.__name__}({argument}={label})")
    assert not problems, "\n".join(problems)


def test_functions_refuse_wrong_arguments():
    for f, right in fuzz.functions():
        refuses(f, right)


def test_engines_refuse_wrong_arguments():
    for f, right in fuzz.engines():
        refuses(f, right)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_several_wrong_arguments_at_a_time(data):
    problems, label = [], ""
    torch.manual_seed(0)
    kind = data.draw(st.sampled_from(["constructor", "method", "function"]))
    if kind == "constructor":
        cls = data.draw(st.sampled_from(list(fuzz.CONSTRUCTORS)))
        names = data.draw(st.lists(st.sampled_from(fuzz.arguments(cls)), min_size=1, max_size=3, unique=True))
        changes = {name: data.draw(st.sampled_from(values_for(name))) for name in names}
        label = f"{cls.__name__}({changes})"
        layer = attempt(lambda: fuzz.construct(cls, changes), problems, label)
        if layer is not None:
            attempt(lambda: fuzz.works(layer), problems, label)
    else:
        if kind == "method":
            model = fuzz.MODELS[data.draw(st.sampled_from(list(fuzz.MODELS)))]()
            name, (f, right) = data.draw(st.sampled_from(list(calls(model).items())))
        else:
            model, (f, right) = None, data.draw(st.sampled_from([*fuzz.functions(), *fuzz.engines()]))
            name = f.__name__
        arguments = data.draw(st.lists(st.sampled_from(list(right)), min_size=1, max_size=3, unique=True))
        for argument in arguments:
            of_it, value = data.draw(st.sampled_from(versions_of(argument, right[argument])))
            right, label = right | {argument: value}, f"{label}, {argument}={of_it}"
        attempt(lambda: f(**right), problems, f"{type(model).__name__}.{name}{label}")
    assert not problems, "\n".join(problems)


def test_a_refusal_is_told_from_a_foreign_exception():
    def error(call):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            call()
        return caught.value

    assert fuzz.refusal(error(lambda: ssmkit.S4(4, d_state=7)))
    assert not fuzz.refusal(error(lambda: nn.Linear(2, 2)(torch.ones(3))))
    assert not fuzz.refusal(ValueError("S4: something is wrong."))
    assert not fuzz.refusal(ValueError("Nonsense: `u` is wrong."))
