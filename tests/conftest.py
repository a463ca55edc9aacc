"""Common to all tests: a seed, and few threads, so that tests may run in parallel.

`SSMKIT_TEST_SEED=7 pytest` runs every test with another seed, `pytest --seeds 10` runs the numerical ones with ten, and
`SSMKIT_TEST_THREADS=2 pytest` lets torch use two threads.
"""

import os

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, settings

SEED = int(os.environ.get("SSMKIT_TEST_SEED", "0"))
THREADS = int(os.environ.get("SSMKIT_TEST_THREADS", "1"))
torch.set_num_threads(THREADS)


def pytest_configure(config):
    """A few examples of each law, since there are many layers, and one of each seed if there are several seeds."""
    # No deadline, since it would depend on the machine; the timeout of every test catches a hang.
    settings.register_profile(
        "ssmkit",
        deadline=None,
        database=None,
        max_examples=6 if config.getoption("seeds") == 1 else 1,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.load_profile("ssmkit")


def pytest_addoption(parser):
    text = "run the tests marked `numerical` with this many seeds, beginning with SSMKIT_TEST_SEED (0 if unset)"
    parser.addoption("--seeds", type=int, default=1, help=text)


def pytest_generate_tests(metafunc):
    count = metafunc.config.getoption("seeds")
    marker = metafunc.definition.get_closest_marker("numerical")
    if count > 1 and marker and not marker.kwargs.get("seeds_inside"):
        seeds = range(SEED, SEED + count)
        metafunc.parametrize("_seed", seeds, ids=[f"seed {n}" for n in seeds], indirect=True)


@pytest.fixture(autouse=True)
def _seed(request):
    """Seeds torch and hypothesis."""
    seed = getattr(request, "param", SEED)
    torch.manual_seed(seed)
    if hasattr(request.function, "hypothesis"):
        hypothesis.seed(seed)(request.function)
