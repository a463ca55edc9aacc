"""How far streams drift from float64, whatever compiled the program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import drift

FRESH_OR_CACHED = """
import torch
from ssmkit import S4, S4D
from ssmkit.streaming import Engine, kernels
from ssmkit.testing import relative_error

torch.set_num_threads(1)
for seed, make in enumerate([
    lambda: S4(2, 16, init="fout", dt_min=1e-5, dt_max=2e-5),
    lambda: S4(2, 16, dt_min=1e-5, dt_max=2e-5, rank=2),
    lambda: S4D(2, 16, dt_min=1e-5, dt_max=2e-5),
    lambda: S4D(2, 16, init="lin", channels=2),
]):
    torch.manual_seed(seed)
    layer, u = make(), torch.randn(10_000, 2)
    y, state = Engine(layer).run(u, layer.initial_state())
    with torch.no_grad():
        expected, end = layer.double().scan(u.double(), layer.initial_state())
    print(relative_error(y, expected), relative_error(state, end))
print(sum(kernels.run.stats.cache_hits.values()), sum(kernels.run.stats.cache_misses.values()))
"""


@pytest.mark.numerical(seeds_inside=True)
@pytest.mark.parametrize(("kind", "inits"), [(kind, group) for kind, groups in drift.INITS.items() for group in groups])
def test_states_stay_near_those_of_float64(kind, inits):
    """Over 10,000 samples; three times the largest error over ten seeds, which `benchmarks/drift.py` prints."""
    for _, init, dt, by_step, by_program in drift.errors(kind, inits, drift.Config()):
        assert by_step < 2.5e-5, (init, dt)
        assert by_program < 5e-7, (init, dt)


def test_a_program_from_the_cache_is_as_good_as_one_freshly_compiled(tmp_path):
    """In processes of their own: numba links a cached program anew, and may sum in another order."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for hits, misses in ((0, 1), (1, 0)):
        done = subprocess.run(
            [sys.executable, "-c", FRESH_OR_CACHED], capture_output=True, text=True, check=True, env=environment
        )
        *errors, found = [[float(x) for x in line.split()] for line in done.stdout.splitlines()]
        assert found == [hits, misses]
        assert max(max(pair) for pair in errors) < 5e-7
