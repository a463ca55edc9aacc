"""The drift of streams from float64."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import drift


@pytest.mark.numerical(seeds_inside=True)
@pytest.mark.parametrize(("kind", "inits"), [(kind, group) for kind, groups in drift.INITS.items() for group in groups])
def test_states_stay_near_those_of_float64(kind, inits):
    """Over 10,000 samples; three times the largest error over ten seeds, which `benchmarks/drift.py` prints."""
    for _, init, dt, by_step, by_program in drift.errors(kind, inits, drift.Config()):
        assert by_step < 2.5e-5, (init, dt)
        assert by_program < 5e-7, (init, dt)
