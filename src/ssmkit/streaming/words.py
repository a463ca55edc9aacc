"""The operations of a system's step, as instructions of a program."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

from ..systems import System, Words
from ..systems.per_feature import StepCoefficients
from .kernels import Activation, Op
from .packing import Recurrent, Slot
from .program import Program

__all__ = ["ProgramWords", "activation", "linear"]


def linear(program: Program, weight: Tensor, bias: Tensor | None, source: Slot, target: Slot | None = None) -> Slot:
    """Writes a linear map."""
    m, n = weight.shape
    target = program.slot(m) if target is None else target
    weights = program.hold(weight.new_zeros(m) if bias is None else bias, weight)
    return program.emit(Op.LINEAR, source, target, whole=True, weights=weights, width=n, outputs=m)


def activation(program: Program, function: Activation, parameters: tuple[float, ...], source: Slot) -> Slot:
    """Writes an elementwise function."""
    weights = program.hold(torch.tensor([*parameters, 0.0, 0.0, 0.0]))
    target = program.slot(source.width)
    return program.emit(Op.ACTIVATE, source, target, weights=weights, width=source.width, function=function)


class ProgramWords(Words):
    """Writes the step of a system to a program.

    Arguments:
        program: The program to write to.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._start = program.states
        self._orders: list[np.ndarray] = []

    def packing(self, system: System) -> Recurrent:
        """The layout of the system's state in the memory; to be called after its step has been written.

        Raises:
            ValueError: If the operations keep another number of states than the system has.
        """
        order = np.concatenate([np.zeros(0, np.int64), *self._orders])
        size = prod(system.state_shape)
        if order.size != size:
            raise ValueError(
                f"Engine: what `write` of {type(system).__name__} keeps must be a state of {size} numbers, as "
                f"`state_shape` says, got {order.size}."
            )
        same = bool((order == np.arange(size)).all())
        return Recurrent(Slot(self._start, size), tuple(system.state_shape), slice(None) if same else order)

    def _keep(self, order: np.ndarray) -> int:
        """Reserves states; `order` has the index of each in its part of the state tensor."""
        kept = sum(part.size for part in self._orders)
        self._orders.append(order.reshape(-1) + kept)
        return self._program.state(order.size).start

    def linear(self, weight: Tensor, v: Slot, bias: Tensor | None = None) -> Slot:
        return linear(self._program, weight, bias, v)

    def scale(self, gain: Tensor, v: Slot) -> Slot:
        target, weights = self._program.slot(v.width), self._program.hold(gain)
        return self._program.emit(Op.SCALE, v, target, weights=weights, width=v.width)

    def add(self, v: Slot, w: Slot) -> Slot:
        return self._program.emit(Op.ADD, v, self._program.slot(v.width), others={"other": w}, width=v.width)

    def multiply(self, v: Slot, w: Slot) -> Slot:
        return self._program.emit(Op.MULTIPLY, v, self._program.slot(v.width), others={"other": w}, width=v.width)

    def softplus(self, v: Slot) -> Slot:
        return activation(self._program, Activation.SOFTPLUS, (1.0, 20.0, 1.0), v)

    def recur(self, a: Tensor, v: Slot) -> Slot:
        size = 2 * len(a)
        poles = self._program.hold_float64(torch.view_as_real(a.to(torch.complex128)))
        state = self._keep(np.arange(size))
        return self._program.emit(Op.RECUR, v, self._program.slot(size), width=size, state=state, poles=poles)

    def per_feature(self, coefficients: StepCoefficients, v: Slot) -> Slot:
        C, H, N = coefficients.shape
        program, rank = self._program, len(coefficients.columns) - 1

        def sorted_parts(x: Tensor) -> Tensor:
            return torch.cat([x[..., 0::2], x[..., 1::2]], -1).transpose(0, 1).flatten(1)

        # All features in one array: one array per feature would be padded to whole cache lines each.
        features = torch.cat([sorted_parts(coefficients.columns), sorted_parts(coefficients.rows)], -1)
        weights = program.hold(coefficients.direct, features)
        poles = program.hold_float64(torch.cat([coefficients.a.real, coefficients.a.imag], -1))
        # Interleaved in the state of the system, real parts before imaginary parts in the memory.
        state = self._keep(np.arange(H * N).reshape(H, N // 2, 2).swapaxes(1, 2))
        return program.emit(
            Op.SSM,
            v,
            program.slot(C * H),
            scattered=C > 1,
            weights=weights,
            width=H,
            state=state,
            modes=N // 2,
            channels=C,
            rank=rank,
            poles=poles,
        )

    def taps(self, w: Tensor, bias: Tensor, v: Slot) -> Slot:
        K, H = w.shape
        program = self._program
        weights, state = program.hold(bias, *w), self._keep(np.arange((K - 1) * H))
        return program.emit(Op.TAPS, v, program.slot(H), weights=weights, width=H, state=state, modes=K - 1)

    def select(self, A: Tensor, dt: Slot, B: Slot | Tensor, C: Slot | Tensor, D: Tensor, v: Slot, groups: int) -> Slot:
        (E, N), program = A.shape, self._program
        gains = {"input_gains": B, "output_gains": C}
        others = {name: slot for name, slot in gains.items() if not isinstance(slot, Tensor)}
        weights = program.hold(D, *(fixed for fixed in gains.values() if isinstance(fixed, Tensor)))
        return program.emit(
            Op.SELECT,
            v,
            program.slot(E),
            others={"other": dt, **others},
            whole=bool(others),
            weights=weights,
            width=E,
            state=self._keep(np.arange(E * N)),
            modes=N,
            groups=groups,
            poles=program.hold_float64(A),
            fixed_input_gains=isinstance(B, Tensor),
            fixed_output_gains=isinstance(C, Tensor),
        )

    def heads(
        self,
        A: Tensor,
        dt_bias: Tensor,
        D: Tensor,
        v: Slot,
        *,
        d_state: int,
        groups: int,
        dt_limit: tuple[float, float],
        rate: float,
    ) -> Slot:
        program, (H, P) = self._program, D.shape
        return program.emit(
            Op.HEADS,
            v,
            program.slot(H * P),
            whole=True,
            weights=program.hold(dt_bias, D),
            width=H * P,
            state=self._keep(np.arange(H * P * d_state)),
            modes=d_state,
            groups=groups,
            head=P,
            poles=program.hold_float64(torch.tensor([*dt_limit, rate], dtype=torch.float64), A),
        )
