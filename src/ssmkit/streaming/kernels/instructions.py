"""What a program consists of: kinds of instructions, and the fields of one instruction."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

__all__ = ["INSTRUCTION", "Activation", "Instruction", "Op"]


class Op(IntEnum):
    """The kinds of instructions.

    The comments name the fields of :class:`Instruction` that each kind uses besides `source` and `target`, and after
    `weights:` what lies there. `EMBED` has no source.
    """

    EMBED = 0  # outputs; weights: a row for each class
    LINEAR = 1  # width, outputs, gated; weights: bias, rows
    NORM = 2  # width, centred, groups; weights: epsilon, gains, biases
    ACTIVATE = 3  # width, function; weights: p, q, r
    GLU = 4  # width (that of the output)
    SOFTMAX = 5  # width, sign, logarithm
    ADD = 6  # width, other
    SSM = 7  # width, state, modes, channels, rank; weights: feedthrough, columns, rows; poles
    FRAME = 8  # width, filling, emitting, pool, counter, skip_to
    MULTIPLY = 9  # width, other
    COPY = 10  # width
    SCALE = 11  # width; weights: gains
    RECUR = 12  # width, state; poles: interleaved
    TAPS = 13  # width, state, modes (taps but one); weights: biases, a row for each tap
    SELECT = 14  # width, state, modes, groups, other (step sizes), input_gains, output_gains, fixed_input_gains,
    #              fixed_output_gains; weights: feedthrough, fixed gains; poles
    HEADS = 15  # width, state, modes, groups, head; weights: biases of the step sizes, feedthrough;
    #             poles: least and greatest step size, rate, poles


class Instruction(NamedTuple):
    """One line of a program; fields that its kind does not use are zero.

    `source`, `target`, `other`, `filling` and `emitting` are places in the memory of a stream, `weights`, `poles` and
    `state` places in the arrays of these names.
    """

    op: int
    """An :class:`Op`."""
    wait: int = 0
    """1 if a thread waits for the others of its team before it begins."""
    source: int = 0
    """Where the input begins."""
    target: int = 0
    """Where the output begins."""
    other: int = 0
    """Where a second input begins."""
    weights: int = 0
    """Where the weights begin."""
    poles: int = 0
    """Where the poles begin."""
    width: int = 0
    """Size of the input; for `GLU` and `FRAME` that of the output, and for `SSM` the number of features."""
    outputs: int = 0
    """Size of the output of a linear map or of an embedding."""
    gated: int = 0
    """1 if a linear map has twice as many rows as outputs, and the second half gates the first."""
    centred: int = 0
    """1 if a norm subtracts the mean."""
    function: int = 0
    """An :class:`Activation`."""
    sign: int = 0
    """1 for the softmax, -1 for the softmin."""
    logarithm: int = 0
    """1 for the logarithm of the softmax."""
    state: int = 0
    """Where the states of a recurrence begin."""
    modes: int = 0
    """Complex states of a feature for `SSM`, and real ones for `TAPS`, `SELECT` and `HEADS`."""
    channels: int = 0
    """Outputs of a feature."""
    rank: int = 0
    """Rank of the low-rank part of a recurrence."""
    groups: int = 0
    """Groups of neighbouring features that are normalised separately, or that share gains."""
    head: int = 0
    """Features of a head."""
    input_gains: int = 0
    """Where the input gains begin, if they depend on the input."""
    output_gains: int = 0
    """Where the output gains begin, if they depend on the input."""
    fixed_input_gains: int = 0
    """1 if the input gains are constant, and lie among the weights."""
    fixed_output_gains: int = 0
    """1 if the output gains are constant, and lie among the weights."""
    filling: int = 0
    """Where the frame that is being filled begins."""
    emitting: int = 0
    """Where the frame that is being emitted begins."""
    pool: int = 0
    """Samples in a frame."""
    counter: int = 0
    """Number of the counter that holds the phase of a frame."""
    skip_to: int = 0
    """Number of the next instruction if the frame is not full."""


INSTRUCTION = np.dtype([(name, np.int64) for name in Instruction._fields])
"""An instruction as an element of a numpy array."""


class Activation(IntEnum):
    """The functions of one number; each has up to three parameters p, q, r in the weights."""

    ELU = 0  # p (max(x, 0) + q (e^{min(x, 0) / r} - 1))
    GELU = 1
    GELU_TANH = 2
    HARD_SHRINK = 3  # zero for |x| <= p
    CLIP = 4  # between p and q
    HARD_SIGMOID = 5
    HARD_SWISH = 6
    LEAKY_RELU = 7  # p x below zero
    SOFTPLUS = 8  # p log(1 + e^{x / p}), x above the threshold q; r: the sign of the result and of x
    MISH = 9
    SILU = 10
    SIGMOID = 11
    SOFT_SHRINK = 12  # towards zero by p
    SOFT_SIGN = 13
    TANH = 14
    TANH_SHRINK = 15
    THRESHOLD = 16  # q where x <= p
