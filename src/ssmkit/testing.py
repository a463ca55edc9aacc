r"""Functions by which tests check the contract of sequence layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from .layers.base import SequenceLayer, System
from .layers.statespace import StateSpaceLayer
from .states import State

__all__ = ["assert_modes_agree", "example_input", "relative_error"]

_RTOL = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    r"""The error by which modes are compared, :math:`\max |\hat y - y| / \max |y|`.

    Arguments:
        actual: The values to check.
        expected: The values to compare with, of the same shape.

    Returns:
        The error; 0 if both are empty, the absolute error if `expected` is zero.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> relative_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
        0.25
    """
    _checks.shape("relative_error", "actual", actual, expected.shape, "that of `expected`")
    if expected.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - expected.detach().double()).abs().max()
    scale = expected.detach().double().abs().max()
    return float(difference / scale) if scale > 0 else float(difference)


def example_input(layer: SequenceLayer, *shape: int) -> Tensor:
    """Random input for a layer: class indices if it begins with an embedding, else normal numbers.

    Arguments:
        layer: A sequence layer.
        shape: The axes in front of the feature axis, batch and length.

    Returns:
        The input, in the dtype and on the device of the layer's first parameter.

    Raises:
        ValueError: If the input width of the layer is not known.

    Example:
        >>> example_input(ssmkit.Sequential(torch.nn.Embedding(256, 8), ssmkit.S4D(8)), 2, 5).shape
        torch.Size([2, 5])
    """
    like = next((p for p in layer.parameters() if p.is_floating_point()), torch.zeros(()))
    first: nn.Module = layer
    while not isinstance(first, nn.Embedding) and getattr(first, "d_input", None) is None:
        children = list(first.children())
        if not children:
            raise ValueError(
                f"example_input: the input width of {type(layer).__name__} is not known; set its `d_input`, or pass an "
                "input as `u`."
            )
        first = children[0]
    if isinstance(first, nn.Embedding):
        return torch.randint(first.num_embeddings, shape, device=like.device)
    width: Any = first.d_input
    return torch.randn(*shape, width, device=like.device, dtype=like.dtype)


def assert_modes_agree(
    layer: SequenceLayer,
    u: Tensor | None = None,
    *,
    length: int = 37,
    splits: Iterable[int] | None = None,
    rtol: float | None = None,
) -> None:
    r"""Asserts that a layer keeps the contract: its three modes compute the same.

    In eval mode, with errors measured as :math:`\max |\Delta| / \max |y|`:

    - `forward` = `scan` from rest = a `step` per sample, with and without a given system;
    - `scan` of two parts = `scan` of the whole, and steps continue after a scan, for every split;
    - `scan` of an empty chunk returns the given state;
    - the output at :math:`k` does not depend on the input after :math:`k`;
    - no mode changes the `state_dict` or the given state;
    - a system gives the same output, to the bit, after the parameters of its :class:`ssmkit.StateSpaceLayer` have
      changed.

    Arguments:
        layer: A :class:`ssmkit.SequenceLayer`, of this library or of your own.
        u: An input of shape :math:`(*, L, d_{input})`, or :math:`(*, L)` of class indices; by default a drawn batch
            of 2.
        length: The length :math:`L` of a drawn input.
        splits: Where the sequence is cut in two; by default at 0, 1, about a third, and the end.
        rtol: The largest error allowed; by default 1e-10 in float64, 1e-4 in float32, 1e-2 in float16 and 5e-2 in
            bfloat16.

    Raises:
        AssertionError: If a law is broken; the message says which, and by how much.
        ValueError: If the layer is not causal, or no input can be drawn.

    Example:
        >>> assert_modes_agree(ssmkit.S4(4, d_state=8).double())
        >>> broken = ssmkit.S4(4, d_state=8)
        >>> broken.scan = lambda u, state, system=None: (u, state)
        >>> assert_modes_agree(broken)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        AssertionError: S4: `scan` from rest differs from `forward` by ...
    """
    was_training = [module for module in layer.modules() if module.training]
    layer.eval()
    try:
        with torch.no_grad():
            _Laws(layer, example_input(layer, 2, length) if u is None else u, rtol).check(splits)
    finally:
        for module in was_training:
            module.training = True


class _Laws:
    def __init__(self, layer: SequenceLayer, u: Tensor, rtol: float | None) -> None:
        self.layer, self.u = layer, u
        # Before anything runs, since a layer may write to itself at its first call only.
        self.before = {name: value.clone() for name, value in layer.state_dict().items()}
        # Class indices have no feature axis.
        self.time = u.ndim - (2 if u.is_floating_point() else 1)
        self.L = u.shape[self.time]
        self.batch = u.shape[: self.time]
        self.y = layer(u)
        self.rtol = _RTOL[self.y.dtype] if rtol is None else rtol
        self.system = layer.system()
        like = {"device": u.device, "dtype": self.y.dtype}
        self.rest = layer.initial_state(*self.batch, **like)

    def check(self, splits: Iterable[int] | None) -> None:
        layer, u, y, rest, system = self.layer, self.u, self.y, self.rest, self.system

        whole, end = self.scan(u, rest, system)
        self.same("`scan` from rest", "`forward`", whole, y)
        self.same("`forward` with a system", "`forward`", layer(u, system), y)
        made, made_end = self.scan(u, rest, None)
        self.same("`scan` without a system", "`scan` with one", made, whole)
        self.same_state("`scan` without a system", "`scan` with one", made_end, end)
        stepped, stepped_end = self.steps(u, rest)
        self.same("a `step` per sample", "`forward`", stepped, y)
        self.same_state("a `step` per sample", "`scan`", stepped_end, end)
        if self.L:
            first = u.select(self.time, 0)
            row, after = self.step(first, rest, system)
            made, made_after = self.step(first, rest, None)
            self.same("`step` without a system", "`step` with one", made, row)
            self.same_state("`step` without a system", "`step` with one", made_after, after)
        for split in sorted({0, min(1, self.L), self.L // 3, self.L} if splits is None else splits):
            left, right = u.split([split, self.L - split], dim=self.time)
            y_left, state = self.scan(left, rest, system)
            if split == 0:
                self.same_state("a `scan` of nothing", "rest", state, rest)
            y_right, both_end = self.scan(right, state, system)
            self.same(
                f"`scan` in two parts, cut at {split},",
                "`scan` of the whole",
                torch.cat([y_left, y_right], self.time),
                whole,
            )
            self.same_state(f"`scan` in two parts, cut at {split},", "`scan` of the whole", both_end, end)
            stepped, _ = self.steps(right, state)
            self.same(
                f"steps after a `scan` of {split} samples",
                "`forward`",
                stepped,
                y.narrow(self.time, split, self.L - split),
            )
            self.causal(split)
        after_all = layer.state_dict()
        for name, value in self.before.items():
            if not torch.equal(value, after_all[name]):
                raise AssertionError(f"{type(layer).__name__}: running it changed {name!r} of its `state_dict`.")
        self.owned()

    def owned(self) -> None:
        """Changes the parameters in place, checks that the system does not change, and restores the parameters."""
        layers = [module for module in self.layer.modules() if isinstance(module, StateSpaceLayer)]
        parameters = {p for layer in layers for p in layer.parameters(recurse=False)}
        values = [(p, p.clone()) for p in parameters]
        before = self.outputs(self.system)
        try:
            for parameter, value in values:
                parameter.copy_(value + 0.1)
            # Parts that a system keeps may hide that it shares memory with the layer; a copy makes its parts again.
            for system in (self.system, copy.deepcopy(self.system)):
                if any(not torch.equal(a, b) for a, b in zip(self.outputs(system), before, strict=True)):
                    raise AssertionError(
                        f"{type(self.layer).__name__}: a system changed with the parameters that it was made of; "
                        "it must own copies of them."
                    )
        finally:
            for parameter, value in values:
                parameter.copy_(value)

    def outputs(self, system: Any) -> list[Tensor]:
        found = [self.layer(self.u, system), self.layer.scan(self.u, self.rest, system)[0]]
        if self.L:
            found.append(self.layer.step(self.u.select(self.time, 0), self.rest, system)[0])
        return found

    def steps(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        out = [self.y.narrow(self.time, 0, 0)]
        for sample in u.unbind(self.time):
            y, state = self.step(sample, state, self.system)
            out.append(y.unsqueeze(self.time))
        return torch.cat(out, self.time), state

    def step(self, u: Tensor, state: State, system: System) -> tuple[Tensor, State]:
        before = _clone(state)
        found = self.layer.step(u, state, system)
        self.untouched("step", state, before)
        return found

    def scan(self, u: Tensor, state: State, system: System) -> tuple[Tensor, State]:
        before = _clone(state)
        found = self.layer.scan(u, state, system)
        self.untouched("scan", state, before)
        return found

    def untouched(self, mode: str, state: State, before: State) -> None:
        if not _equal(state, before):
            raise AssertionError(f"{type(self.layer).__name__}: `{mode}` wrote to the state that it was given.")

    def causal(self, split: int) -> None:
        future = self.u.narrow(self.time, split, self.L - split).flip(self.time)
        if future.is_floating_point():
            future = future + 1
        changed = torch.cat([self.u.narrow(self.time, 0, split), future], self.time)
        self.same(
            f"the output before sample {split}, with other input from there on,",
            "the output of `forward`",
            self.layer(changed).narrow(self.time, 0, split),
            self.y.narrow(self.time, 0, split),
            scale=self.y,
        )

    def same(self, what: str, other: str, actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> None:
        name = type(self.layer).__name__
        if actual.shape != expected.shape:
            raise AssertionError(
                f"{name}: {what} has shape {tuple(actual.shape)}, and {other} {tuple(expected.shape)}."
            )
        if not expected.numel():
            return
        scale = self.y if scale is None else scale
        largest = scale.double().abs().max().item() or 1.0
        error = (actual.double() - expected.double()).abs().max().item() / largest
        if not error <= self.rtol:
            raise AssertionError(
                f"{name}: {what} differs from {other} by {error:.1e} of the largest output; {self.rtol:.0e} is allowed."
            )

    def same_state(self, what: str, other: str, actual: State, expected: State) -> None:
        found, wanted = _leaves(actual), _leaves(expected)
        if len(found) != len(wanted):
            raise AssertionError(
                f"{type(self.layer).__name__}: the state of {what} has {len(found)} leaves, and that of {other} "
                f"{len(wanted)}."
            )
        for a, b in zip(found, wanted, strict=True):
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                self.same(f"the state of {what}", f"that of {other}", a, b, scale=b)
            elif a != b:
                raise AssertionError(f"{type(self.layer).__name__}: {what} ends at phase {a}, and {other} at {b}.")


def _leaves(state: State) -> list[Tensor | int]:
    if isinstance(state, tuple):
        return [leaf for child in state for leaf in _leaves(child)]
    return [state]


def _clone(state: State) -> State:
    if isinstance(state, tuple):
        return tuple(_clone(child) for child in state)
    return state.clone() if isinstance(state, Tensor) else state


def _equal(a: State, b: State) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(_leaves(a), _leaves(b), strict=True)
    )
