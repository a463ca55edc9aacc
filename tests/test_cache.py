"""Compiled code is cached on disk: it is loaded for the same sources, and compiled again for changed ones."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ssmkit
from ssmkit.streaming.kernels import SOURCES, compiling

PACKAGE = Path(ssmkit.__file__).parent

RUN = """
import torch
from torch import nn
from ssmkit import S4, S4D, Residual, Sequential, TiedDropout
from ssmkit.streaming import Engine, kernels
from ssmkit.testing import relative_error

print(kernels.__file__, kernels.SOURCES)
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
    print(relative_error(y, expected), relative_error(state, end), end=" ")
# Every kind of sum in float32.
inner = Sequential(nn.Linear(50, 50), nn.LayerNorm(50), S4(50, 4), nn.RMSNorm(50), nn.Linear(50, 66), nn.GLU())
model = Sequential(TiedDropout(50), nn.Softmax(-1), inner, nn.LogSoftmax(-1)).eval()
print()
print(Engine(model).start().run(torch.randn(100, 50)).numpy().tobytes().hex())
print(Engine(Residual(TiedDropout(3))).start().run(torch.ones(1, 3)).tolist())
print(sum(kernels.run.stats.cache_hits.values()), sum(kernels.run.stats.cache_misses.values()))
"""


def copied(folder):
    """A copy of the library."""
    shutil.copytree(PACKAGE, folder / "ssmkit", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "ssmkit"


def ran(package):
    """The output of a separate process that runs a copy of the library."""
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["NUMBA_CACHE_DIR"] = str(package.parent / "cache")
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True, env=environment)
    sources, errors, bits, double, found = done.stdout.splitlines()
    assert sources.startswith(str(package))
    return {"sources": sources, "errors": errors, "bits": bits, "double": double, "hits and misses": found}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Three processes, the last one after a change of a function that the entries call."""
    package = copied(tmp_path_factory.mktemp("copy"))
    runs = [ran(package), ran(package)]
    file = package / "streaming/kernels/functions.py"
    before = file.read_text()
    assert before.count("x[i] + other[i]") == 1
    file.write_text(before.replace("x[i] + other[i]", "x[i] - other[i]"))
    return [*runs, ran(package)]


# Each of two processes compiles.
@pytest.mark.timeout(900)
def test_a_program_is_compiled_again_if_a_file_that_it_calls_has_changed(processes):
    fresh, cached, changed = processes
    assert [run["hits and misses"] for run in processes] == ["0 1", "1 0", "0 1"]
    assert fresh["sources"] == cached["sources"] != changed["sources"]
    assert [run["double"] for run in processes] == ["[[2.0, 2.0, 2.0]]", "[[2.0, 2.0, 2.0]]", "[[0.0, 0.0, 0.0]]"]


def test_a_cached_program_gives_the_same_bits_as_a_freshly_compiled_one(processes):
    """A cached program uses other copies of functions that are not inlined, which may add in another order."""
    fresh, cached, _ = processes
    assert cached["bits"] == fresh["bits"]
    assert cached["errors"] == fresh["errors"]
    assert max(map(float, fresh["errors"].split())) < 5e-7


def test_every_file_of_the_folder_counts(tmp_path):
    folder = copied(tmp_path) / "streaming/kernels"
    before = compiling.fingerprint(folder)
    assert before == SOURCES
    files = sorted(folder.glob("*.py"))
    assert len(files) > 5
    for file in files:
        text = file.read_text()
        file.write_text(text + "#")
        assert compiling.fingerprint(folder) != before, file.name
        file.write_text(text)
    assert compiling.fingerprint(folder) == before
    for change in (lambda: (folder / "more.py").write_text(""), lambda: files[0].rename(folder / "other.py")):
        change()
        after = compiling.fingerprint(folder)
        assert after != before
        before = after
