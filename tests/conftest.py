"""Common to all tests: a fixed seed, and few threads, so that tests may run side by side."""

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# Deadlines measure the machine; a hang is caught by the timeout of every test.
settings.register_profile(
    "ssmkit", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("ssmkit")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
