"""Common to all tests: a seed, and few threads, so that tests may run side by side.

`SSMKIT_TEST_SEED=7 pytest` runs every test with another seed, and `pytest --seeds 10` runs the numerical ones with ten.
"""

import os

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

SEED = int(os.environ.get("SSMKIT_TEST_SEED", "0"))

# Deadlines measure the machine; a hang is caught by the timeout of every test.
settings.register_profile(
    "ssmkit", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("ssmkit")


def pytest_addoption(parser):
    text = "run the tests marked `numerical` with so many seeds, from SSMKIT_TEST_SEED (0 if unset) on"
    parser.addoption("--seeds", type=int, default=1, help=text)


def pytest_generate_tests(metafunc):
    count = metafunc.config.getoption("seeds")
    if count > 1 and metafunc.definition.get_closest_marker("numerical"):
        seeds = range(SEED, SEED + count)
        metafunc.parametrize("_seed", seeds, ids=[f"seed {n}" for n in seeds], indirect=True)


@pytest.fixture(autouse=True)
def _seed(request):
    """Seeds what torch draws, and what hypothesis draws."""
    seed = getattr(request, "param", SEED)
    torch.manual_seed(seed)
    if hasattr(request.function, "hypothesis"):
        hypothesis.seed(seed)(request.function)
