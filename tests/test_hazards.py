"""No thread of a team reads, before it has waited, what another thread writes: checked on the programs themselves.

Threads that meet at the wrong moment give wrong numbers, or by luck the right ones. Here nothing runs: every program is
walked with the share of each thread, and what the threads read and write between two barriers is compared.
"""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from family import CAUSAL
from ssmkit import S4, S4D, Residual, S4Block, Sequential
from ssmkit.streaming import Engine, kernels
from ssmkit.streaming.kernels import FIELDS, Op

KNOWN = [name for name in CAUSAL if "own module" not in name]
SAMPLES = 13  # Every frame of the family's multi-rate layers is filled at least once.


def accesses(line, rank, team, phase):
    """What one thread reads and writes in an instruction: two lists of intervals of its stream's memory."""
    op, source, target, n, m = (line[name] for name in ("op", "source", "target", "n", "m"))

    def part(width, start):
        lo, hi = kernels._share.py_func(width, rank, team)
        return (start + lo, start + hi)

    lo, hi = kernels._share.py_func(m if op in (Op.LINEAR, Op.EMBED) else n, rank, team)
    if op == Op.LINEAR:
        writes = [part(m, target)] + ([part(m, target + m)] if line["a"] else [])
        return [(source, source + n)] if hi > lo else [], writes
    if op == Op.EMBED:
        return [], [part(m, target)]
    if op == Op.SSM:
        return [part(n, source)], [part(n, target + j * n) for j in range(line["c"])]
    if op == Op.FRAME:
        return (
            [part(n, source), part(n, line["b"] + phase * n)],
            [part(n, target), part(n, line["a"] + phase * n)],
        )
    if op == Op.NORM:
        return [(source, source + n)] if hi > lo else [], [part(n, target)]
    if op == Op.SOFTMAX:
        return ([(source, source + n)], [(target, target + n)]) if rank == 0 else ([], [])
    reads = [part(n, source)]
    if op == Op.GLU:
        reads.append(part(n, source + n))
    if op == Op.ADD:
        reads.append(part(n, line["a"]))
    return reads, [part(n, target)]


def overlap(some, others):
    return [(a, b) for a in some for b in others if max(a[0], b[0]) < min(a[1], b[1])]


def hazards(engine, table, team):
    """Pairs of intervals that two threads use between the same barriers, one of them to write."""
    lines = [dict(zip(FIELDS, row, strict=True)) for row in table.tolist()]
    found, counters = [], np.zeros(max(1, engine._counters), int)
    reads, writes = ([[] for _ in range(team)] for _ in range(2))

    def barrier():
        for a, b in combinations(range(team), 2):
            found.extend(overlap(reads[a], writes[b]) + overlap(writes[a], reads[b]) + overlap(writes[a], writes[b]))
        for each in (*reads, *writes):
            each.clear()

    source, target = engine._source, engine._target
    for _ in range(SAMPLES):
        barrier()
        for rank in range(team):
            lo, hi = kernels._share.py_func(source.width, rank, team)
            writes[rank].append((source.start + lo, source.start + hi))
        at = 0
        while at < len(lines):
            line = lines[at]
            at += 1
            if line["wait"]:
                barrier()
            phase = counters[line["counter"]]
            for rank in range(team):
                more_reads, more_writes = accesses(line, rank, team, phase)
                reads[rank] += more_reads
                writes[rank] += more_writes
            if line["op"] == Op.FRAME:
                counters[line["counter"]] = (phase + 1) % line["c"]
                if phase + 1 < line["c"]:
                    at = line["d"]
        barrier()
        for rank in range(team):
            lo, hi = kernels._share.py_func(target.width, rank, team)
            reads[rank].append((target.start + lo, target.start + hi))
    barrier()
    return found


@pytest.mark.parametrize("name", KNOWN)
def test_every_thread_waits_for_what_it_reads(name):
    engine = Engine(CAUSAL[name]())
    for team in (2, 3, 4):
        assert not hazards(engine, engine.table, team)


@pytest.mark.parametrize("name", ["wide Sequential", "wide S4Block", "wide Residual", "wide MultiRate"])
def test_the_check_finds_every_wait_that_is_missing(name):
    engine = Engine(CAUSAL[name]())
    column = FIELDS.index("wait")
    waits = np.flatnonzero(engine.table[:, column])
    assert len(waits) > 0
    for at in waits:
        table = engine.table.copy()
        table[at, column] = 0
        assert any(hazards(engine, table, team) for team in (2, 3, 4)), f"instruction {at} need not wait"


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Sequential(nn.Linear(64, 64), S4(64)),
        lambda: Sequential(S4Block(64)),
        lambda: Residual(nn.LayerNorm(61), S4D(61, 8, channels=2), nn.GLU(), nn.Linear(61, 61)),
    ],
)
def test_a_team_gives_the_numbers_of_one_thread(make, threads):
    """Equal to the bit, in blocks of one sample too, where the threads of every call start at different times."""
    model = make().eval()
    u = torch.randn(60, model.d_input)
    expected = Engine(model, threads=1).start().run(u)
    for block in (1, 7, 60):
        stream = Engine(model, threads=threads).start()
        assert torch.equal(torch.cat([stream.run(part) for part in u.split(block)]), expected)
