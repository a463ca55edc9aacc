"""The benchmarks run; their figures are not tested."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cases  # noqa: E402
import layers  # noqa: E402
from measure import Times, peak_memory, time_interleaved  # noqa: E402


def test_contenders_run_interleaved():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = time_interleaved(runs, 3, torch.device("cpu"))
    # A round of warm-up, and then a warm-up run before each timed one.
    assert order == ["a", "b"] + ["a", "a", "b", "b"] * 3
    assert all(len(t.seconds) == 3 for t in times.values())


def test_ratios_are_taken_round_by_round():
    assert Times([2.0, 9.0, 4.0]).ratio(Times([1.0, 3.0, 4.0])) == (1.0, 2.0, 3.0)
    assert Times([2.0, 9.0, 4.0]).median == 4.0


def test_peak_memory_includes_freed_memory():
    def run():
        return float(torch.ones(1 << 25).sum())

    run()
    assert 0.9 * 2**27 < peak_memory(run, torch.device("cpu")) < 1.2 * 2**27


def test_contenders_do_the_same_work():
    """The bare convolution has the shapes of the layer, and scan is compared with forward."""
    device = torch.device("cpu")
    case = cases.Case("scan", "diagonal", True, B=1, L=40, H=4, N=4)
    made = cases.contenders(case, device, None)
    assert set(made) == {"ssmkit", "bare FFT", "forward"}
    for make in made.values():
        make()()


def test_the_command_prints_a_table(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--only", "step, diagonal", "--no-full", "--rounds", "2"]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^step, diagonal, forward .* ssmkit .* m?s .*1\.00", done.stdout, re.MULTILINE)) == 2


def test_errors_are_measured(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "accuracy.py"), "--lengths", "1024", "--states", "16"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every bound holds" in done.stdout


def test_compiled_layers_are_compared(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "compile.py"), "--shape", "1", "8", "2", "--rounds", "1"]
    command += ["--backend", "eager", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^S4D?: compiled in .* differs by 0.0e\+00; eager .* ÷ eager", done.stdout, re.M)) == 2


def test_a_peer_that_cannot_be_loaded_gives_an_error_of_one_sentence(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "accuracy.py"), "--lengths", "64", "--states", "16", "--peer", "."]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 1
    assert done.stderr == ". holds no models/s4/s4.py; give a checkout of state-spaces/s4.\n"

    module = tmp_path / "models/s4/s4.py"
    module.parent.mkdir(parents=True)
    module.write_text("import a_package_that_nobody_has\n")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 1
    assert done.stderr == (
        "the reference needs the package a_package_that_nobody_has, which is not installed; install it, or leave "
        "--peer out.\n"
    )


def test_streams_are_measured_into_another_folder(tmp_path, monkeypatch):
    import streaming

    for part in ("latency", "sizes"):
        monkeypatch.setattr(streaming, part, lambda *_: [])
    monkeypatch.setattr(streaming, "generation", lambda *_: [])
    monkeypatch.setattr(streaming, "throughput", lambda *_: [{"batch": 1, "program": 2.0, "step": 1.0}])
    docs = BENCHMARKS.parent / "docs/_static"
    before = {path: path.stat().st_mtime_ns for path in docs.iterdir()}
    assert streaming.main(streaming.Config(out=tmp_path / "new")) == 0
    suffixes = sorted(path.name.split("streaming-cpu")[1] for path in (tmp_path / "new").iterdir())
    assert suffixes == ["-generation.csv", "-latency.csv", "-sizes.csv", ".json", ".svg", ".txt"]
    assert before == {path: path.stat().st_mtime_ns for path in docs.iterdir()}


def test_layers_are_measured_without_the_packages_of_others(tmp_path):
    """Packages that are not installed are named, and left out."""
    (tmp_path / "s5.py").write_text("raise ModuleNotFoundError('away', name='s5')\n")
    command = [sys.executable, str(BENCHMARKS / "layers.py"), "--scale", "0.005", "--rounds", "1", "--only", "S5"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr
    assert "S5: s5-pytorch is left out, since the package s5 is not installed." in done.stdout
    assert len(re.findall(r"^S5  4, 81, 256  ssmkit.* [\d.]+ s  .* MiB$", done.stdout, re.MULTILINE)) == 2


@pytest.mark.parametrize("case", layers.CASES)
def test_every_case_of_the_layers_runs(case):
    made = layers.CASES[case][0](1, 6, 64)
    assert len(made) > 1
    for name, make in made.items():
        if name.startswith("ssmkit"):
            make()()


def test_sequences_of_different_lengths_are_measured(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "sequences.py"), "--scale", "0.02", "--rounds", "1", "--d-model", "4"]
    done = subprocess.run(
        [*command, "--only", "S4Block", "--out", str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "sequences-cpu.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines] == ["batch", *["padded"] * 10, *["packed"] * 8]
    assert (tmp_path / "sequences-cpu.txt").read_text().count("width 4") == 1
