r"""The contract of sequence layers as a function for tests."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..layers.base import SequenceLayer, System
from ..layers.statespace import StateSpaceLayer
from ..states import State
from .common import RTOL, clone, equal, evaluating, example_input, same, same_state

__all__ = ["assert_modes_agree"]


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
    with evaluating(layer), torch.no_grad():
        _Laws(layer, example_input(layer, 2, length) if u is None else u, rtol).check(splits)


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
        self.rtol = RTOL[self.y.dtype] if rtol is None else rtol
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
        before = clone(state)
        found = self.layer.step(u, state, system)
        self.untouched("step", state, before)
        return found

    def scan(self, u: Tensor, state: State, system: System) -> tuple[Tensor, State]:
        before = clone(state)
        found = self.layer.scan(u, state, system)
        self.untouched("scan", state, before)
        return found

    def untouched(self, mode: str, state: State, before: State) -> None:
        if not equal(state, before):
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
        scale = self.y if scale is None else scale
        same(type(self.layer).__name__, what, other, actual, expected, rtol=self.rtol, scale=scale)

    def same_state(self, what: str, other: str, actual: State, expected: State) -> None:
        same_state(type(self.layer).__name__, what, other, actual, expected, rtol=self.rtol)
