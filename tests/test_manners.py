"""How the SaShiMi example behaves: Ctrl-C, a folder in use, progress, odd options, names and audio files."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from example import CPU, EXAMPLES, one_sentence, small_run, snapshot, write
from sashimi import audio, baselines, commands, console, evaluation, generation, problems, storage, training
from sashimi.problems import Problem
from ssmkit import S4Block

import sashimi_youtubemix as program  # isort: skip

SMALL = ["--sample-rate", "16000", "--excerpt", "256", "--d-model", "4", "--d-state", "4", "--blocks", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps; never written to."""
    folder = tmp_path_factory.mktemp("manners")
    small_run(folder)
    return folder


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The program in this process: exit status, output, errors."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments):
        try:
            status = program.main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
        found = capsys.readouterr()
        return status, found.out, found.err

    return go


# Ctrl-C


def test_control_c_saves_a_training_before_its_first_checkpoint(trained, tmp_path, call):
    """And the same command goes on."""
    arguments = ["train", *SMALL, "--data", trained / "data", "--steps", "60", "--checkpoint-every", "1000"]
    command = [sys.executable, str(EXAMPLES / "sashimi_youtubemix.py"), *map(str, arguments), "--out", "stopped"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "stopped/log.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in out + err
    (step,) = re.findall(r"^saved at step (\d+) of 60; the same command goes on from there$", out, re.M)
    assert storage.Run(tmp_path / "stopped").state["step"] == int(step) < 60
    assert storage.load_model(tmp_path / "stopped").step == int(step)
    status, out, err = call(*arguments, "--out", "stopped")
    assert status == 0, err
    assert f"continuing after step {step} of 60" in out
    lines = storage.Run(tmp_path / "stopped").history()
    assert [line["step"] for line in lines] == list(range(1, 61))


def test_training_that_is_asked_to_stop_goes_on_as_if_nothing_had_been(tmp_path):
    """Bit for bit: the checkpoint is that of the step."""
    whole, settings = small_run(tmp_path, steps=9)
    split = audio.open_split(tmp_path / "data", 16000)
    run = storage.Run(tmp_path / "asked")
    run.open(settings)
    steps = []

    def go(**options):
        return training.train(training.Trainer(settings, split, CPU), run, every=100, **options)

    assert go(report=lambda step, loss: steps.append(step), stop=lambda: len(steps) == 3) == 4
    assert steps == [1, 2, 3, 4]
    assert (run.state["step"], storage.load_model(run.folder).step) == (4, 4)
    assert go(stop=lambda: True) == 5
    assert go() == 9
    assert [line["bits"] for line in run.history()] == [line["bits"] for line in storage.Run(whole).history()]
    assert (whole / storage.MODEL).read_bytes() == (run.folder / storage.MODEL).read_bytes()
    # One that is asked in its last step is done, and measured.
    assert "held_out" in run.history()[-1]
    assert go(stop=lambda: True) == 9


def test_control_c_is_collected_once_and_by_patience_more_often():
    with console.interrupts() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with console.interrupts(patient=True) as asked:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert len(asked) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_control_c_at_any_other_time_ends_without_a_traceback(capsys):
    def stop():
        raise KeyboardInterrupt

    assert problems.exit_status("x", stop) == 130
    assert capsys.readouterr().err == "x: stopped.\n"


def test_control_c_during_the_imports_ends_without_a_traceback(tmp_path):
    (tmp_path / "tyro.py").write_text("import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(60)\n")
    command = [sys.executable, str(EXAMPLES / "sashimi_youtubemix.py"), "evaluate"]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_any_process_may_ask_to_stop(monkeypatch):
    alone, world = (training.World(0, size, torch.device("cpu")) for size in (1, 2))
    assert [alone.any(flag) for flag in (True, False)] == [True, False]
    monkeypatch.setattr(training.dist, "all_reduce", lambda x: x.add_(1))
    assert world.any(False) is True
    monkeypatch.setattr(training.dist, "all_reduce", lambda x: x)
    assert world.any(False) is False


# A folder in use


def test_a_folder_in_use_is_refused_to_a_second_run(trained, tmp_path, call):
    shutil.copytree(trained / "run", tmp_path / "run")
    before = snapshot(tmp_path)
    again = ["train", "--config", "run/config.json", "--out", "run", "--steps", "5"]
    with storage.Run(tmp_path / "run").in_use():
        status, _, err = call(*again)
        one_sentence(status, err, r"run is in use by another run; wait until it ends, or give another --out")
        assert snapshot(tmp_path) == before
        # What only reads may read.
        assert call("generate", "--model", "run", "--seconds", "0.01", "--engine", "step")[0] == 0
    assert call(*again)[0] == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json",
        "log.jsonl",
        "model.safetensors",
        "state.json",
        "checkpoint-00000005.safetensors",
    }


# Progress


class Stages:
    """Records stages, and what they report."""

    def __init__(self):
        self.total, self.done = {}, {}

    def __call__(self, what, total):
        self.total[what], self.done[what] = total, []
        return self.done[what].append

    def complete(self):
        assert {what: sum(done) for what, done in self.done.items()} == self.total
        return self.done


def test_measuring_reports_all_of_its_work(tmp_path, monkeypatch):
    for i, seconds in enumerate((0.3, 0.2, 0.1)):
        write(tmp_path / f"{i}.wav", seconds, seed=i)
    clips = [audio.open_recording(tmp_path / f"{i}.wav") for i in range(3)]
    monkeypatch.setattr(baselines, "_WINDOW", 1000)
    monkeypatch.setattr(baselines, "_TUNED_ON", 2500)
    stages = Stages()
    measured = baselines.measure_baselines(clips[:2], clips[2:], audio.Quantizer(), stages)
    assert set(measured) == set(baselines.BASELINES)
    found = stages.complete()
    assert list(found) == ["counting", "tuning the filter", "adaptive filter"]
    assert found["adaptive filter"] == [1000, 600]


@pytest.mark.parametrize("window", [1 << 20, 700])
def test_a_network_reports_what_it_has_read(trained, tmp_path, window):
    model = storage.load_model(trained / "run").model
    write(tmp_path / "a.wav", 0.1)
    recording, done = audio.open_recording(tmp_path / "a.wav"), []
    evaluation.evaluate(model, [recording] * 2, audio.Quantizer(), window=window, report=done.append)
    assert sum(done) == 2 * 1599
    if window > 1600:
        # After each of its blocks, too, and the hooks for that are gone.
        assert len(done) == 2 * (1 + sum(isinstance(part, S4Block) for part in model.modules())) > 6
    assert not any(part._forward_hooks for part in model.modules())
    done.clear()
    evaluation.evaluate_by_step(model, recording, audio.Quantizer(), 30, report=done.append)
    assert done == [1] * 30


def test_evaluation_and_report_show_their_progress(trained, tmp_path, call):
    shutil.copytree(trained / "run", tmp_path / "run")
    status, _, err = call("report", "--run", "run", "--seconds", "0.05")
    assert status == 0, err
    for stage in ("counting", "tuning the filter", "adaptive filter", "network", "network, step by step", "drawing"):
        assert re.search(rf"(^|\r|\n){stage}: +0%.*\r{stage}: 100%", err), stage


def test_a_line_says_that_the_program_is_compiled(trained, call, monkeypatch, capsys):
    """If it takes long, and only then."""
    made = generation.make_engine
    monkeypatch.setattr(program, "announced", lambda text: console.announced(text, 0.05))
    play = ["generate", "--model", trained / "run", "--seconds", "0.01", "--engine", "step"]
    line = "compiled once per machine"
    for seconds, count in ((0.5, 1), (0.0, 0)):

        def slow(*arguments, seconds=seconds):
            time.sleep(seconds)
            return made(*arguments)

        monkeypatch.setattr(program, "make_engine", slow)
        _, out, err = call(*play)
        assert err.count(line) == count
        assert line not in out


def test_what_torch_compiles_is_compiled_before_the_first_sample(trained, monkeypatch):
    """By a frame of the slowest tier, of which the streams notice nothing."""
    found = storage.load_model(trained / "run")
    streams = generation.prime(found.model, torch.randint(256, (5,)), 2)
    before = (streams.logits, streams.state, streams.random.get_state())
    columns = []

    class Engine(generation.StepEngine):
        def run(self, logits, state, uniform, sampling):
            columns.append(uniform.shape)
            return super().run(logits, state, uniform, sampling)

    monkeypatch.setattr(program, "make_engine", lambda model, name, threads: Engine(model))
    assert isinstance(program.prepare(commands.Generate(), found, streams, generation.Sampling()), Engine)
    assert columns == []
    program.prepare(commands.Generate(engine="compile"), found, streams, generation.Sampling())
    assert columns == [(2, 16)]
    assert streams.logits is before[0]
    assert streams.state is before[1]
    assert torch.equal(streams.random.get_state(), before[2])


def test_a_training_ends_with_what_to_do_next(trained, tmp_path, call, monkeypatch):
    status, out, _ = call("train", *SMALL, "--data", trained / "data", "--steps", "1", "--out", "a run")
    assert status == 0
    assert "a run/model.safetensors is the model after 1 steps; what to do next:" in out
    lines = re.findall(r"^  (python .*)  # \w+ it$", out, re.M)
    assert [line.split()[2] for line in lines] == ["evaluate", "generate", "report"]
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", f"set -- {line}; shift 2; printf '%s\\n' \"$@\""], capture_output=True, text=True, check=True
        )
        command = program.parse(done.stdout.splitlines())
        assert str(getattr(command, "run", None) or command.model) == "a run"
        assert (tmp_path / line.split()[1]).resolve() == EXAMPLES / "sashimi_youtubemix.py"


def test_a_run_from_a_model_continues_from_any_folder(trained, tmp_path, call, monkeypatch):
    arguments = ["train", *SMALL, "--data", trained / "data", "--out", tmp_path / "second"]
    for steps, here in enumerate((tmp_path, tmp_path.parent), start=1):
        monkeypatch.chdir(here)
        start = os.path.relpath(trained / "run", here)
        assert call(*arguments, "--steps", steps, "--init-from", start)[0] == 0


# Options


def test_evaluation_and_generation_take_the_model_that_comes_along():
    assert program.parse(["evaluate"]).model == program.parse(["generate"]).model == commands.PIANO
    assert commands.PIANO.is_file()


def test_the_help_says_what_a_temperature_does(call):
    """Below 1 the likeliest class is drawn more often, so that the draw is less bold."""
    _, out, _ = call("generate", "--help")
    assert "below 1 the draw is less bold" in " ".join(re.sub(r"[│\s]+", " ", out).split()).lower()
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(1000, 3)
    uniform = (torch.arange(1000, dtype=torch.double) + 0.5) / 1000
    cold, warm, hot = (
        (generation.Sampling(temperature).draw(logits, uniform) == 0).sum() for temperature in (0.5, 1.0, 2.0)
    )
    assert cold > warm > hot


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prime", "missing.wav"], r"missing.wav cannot be read as audio, since it does not exist"),
        (["generate", "--prime", "."], r"\. cannot be read as audio \(Is a directory\); give another file to --prime"),
        (["generate", "--resume", "missing.state"], r"missing.state does not exist"),
        (["generate", "--threads", "100000"], r"--threads must be at most \d+, the cores of this machine, not 100000"),
        (["generate", "--seed", "-1"], r"--seed must be at least 0 and at most 9223372036854775807, not -1"),
        (["generate", "--seed", str(2**64)], r"--seed must be at least 0"),
        (["generate", "--seconds", "nan"], r"--seconds must be above 0, not nan"),
        (["generate", "--prime", "a.wav", "--prime-seconds", "nan"], r"--prime-seconds must be above 0 and finite"),
        (["generate", "--prime", "a.wav", "--prime-seconds", "inf"], r"--prime-seconds must be above 0 and finite"),
        (["generate", "--temperature", "nan"], r"--temperature must be at least 0 and finite, not nan"),
        (["generate", "--temperature", "inf"], r"--temperature must be at least 0 and finite, not inf"),
        (["generate", "--top-p", "nan"], r"--top-p must be above 0"),
        (["evaluate", "--step-samples", "-1"], r"--step-samples must be at least 0, not -1"),
        (["report", "--seconds", "inf"], r"--seconds must be above 0 and finite, not inf"),
        (["report", "--seconds", "nan"], r"--seconds must be above 0 and finite, not nan"),
        (["overfit", "--epochs", "0"], r"--epochs must be at least 1, not 0"),
        (["overfit", "--seed", "-1"], r"--seed must be at least 0"),
        (["train", "--checkpoint-every", "0"], r"--checkpoint-every must be at least 1, not 0"),
        (["train", "--seed", "-1"], r"--seed must be at least 0"),
        (["train", "--blocks", "-1"], r"--blocks must be at least 1, not -1"),
        (["train", "--blocks", "1000000000"], r"do not make a network that can be trained: its weights need at least"),
        (["train", "--d-model", "1000000000"], r"and this machine has \d+ GiB"),
        (["train", "--d-state", "1000000000"], r"--d-state must be at most 8,192"),
        (["train", "--batch", str(10**20)], r"--batch must be at most 2,147,483,647"),
        (["train", "--noise", "256"], r"noise of 256 is more than there are classes"),
        *[
            (["train", f"--{name}", value], rf"--{name} must be a finite number, not {value}")
            for name in ("lr", "ssm-lr", "weight-decay", "dropout", "warmup", "clip", "noise-until", "ema")
            for value in ("nan", "inf")
        ],
    ],
)
def test_options_out_of_range_get_one_sentence(call, tmp_path, arguments, message):
    write(tmp_path / "a.wav", 0.1)
    status, _, err = call(*arguments)
    one_sentence(status, err, message)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


# Names


def test_names_that_are_not_utf_8(tmp_path, call, trained):
    odd = os.fsdecode(b"\xff\xfe")
    (tmp_path / odd).mkdir()
    for i, name in enumerate("abc"):
        write(tmp_path / "x.wav", 0.1, seed=i)
        (tmp_path / "x.wav").rename(tmp_path / odd / f"{name}{odd}.wav")
    run = f"run{odd}"
    status, out, err = call("train", *SMALL, "--data", odd, "--steps", 1, "--out", run)
    assert status == 0, err
    assert r"run\udcff\udcfe/model.safetensors is the model" in out
    assert call("train", "--config", f"{run}/config.json", "--steps", 2, "--out", run)[0] == 0
    play = ["generate", "--model", run, "--seconds", 0.01, "--engine", "step"]
    first = [*play, "--prime", f"{odd}/a{odd}.wav", "--out", f"{odd}.wav"]
    status, out, err = call(*first)
    assert status == 0, err
    assert r"\udcff\udcfe.wav: 0.01 s generated" in out
    assert call(*play, "--resume", f"{odd}.state", "--out", "then.wav")[0] == 0
    status, out, err = call("evaluate", "--model", run, "--step-samples", 0)
    assert status == 0, err
    assert (tmp_path / run / "evaluation.json").is_file()
    status, _, err = call("evaluate", "--model", f"none{odd}")
    one_sentence(status, err, r"none\\udcff\\udcfe does not exist")


# Audio


def test_samples_that_are_no_numbers(tmp_path):
    for value in (math.nan, math.inf):
        samples = np.zeros((100, 2), dtype=np.float32)
        samples[60, 1] = value
        sf.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
        recording = audio.open_recording(tmp_path / "a.wav")
        assert len(recording.read(0, 60)) == 60
        with pytest.raises(Problem, match=r"a.wav holds a value that is not finite at sample 60; replace or remove it"):
            recording.read(7)


def test_a_header_that_announces_too_much_costs_no_memory(tmp_path):
    """The 36 bits of a FLAC file's length, set: 69 billion samples."""
    write(tmp_path / "a.flac", 0.3)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4
    (tmp_path / "a.flac").write_bytes(data)
    recording = audio.open_recording(tmp_path / "a.flac")
    assert recording.frames == 2**36 - 1
    tracemalloc.start()
    with pytest.raises(Problem, match=r"a.flac (ends at sample 4,800 of|cannot be read as audio)"):
        recording.read()
    assert tracemalloc.get_traced_memory()[1] < 5e7
    tracemalloc.stop()


def test_a_folder_that_cannot_be_read():
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data"
        (folder / "deeper").mkdir(parents=True)
        for file in ("a.wav", "b.wav", "deeper/c.wav"):
            write(folder / file)
        folder.parent.chmod(0o755)
        for locked in (folder / "deeper", folder):
            locked.chmod(0)
            if user == 0:  # who may read everything
                os.seteuid(65534)
            try:
                with pytest.raises(
                    Problem, match=f"{locked} cannot be read .Permission denied.; change its permissions"
                ):
                    audio.open_split(folder, 16000)
            finally:
                os.seteuid(user)
                locked.chmod(0o755)


# Nets


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "x/y"), r"x/y cannot be used \(Permission denied\)"),
        (MemoryError(), "the memory is full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "the memory is full"),
        (Problem("two\nlines"), "two lines"),
    ],
)
def test_what_nobody_foresaw_gets_one_sentence(error, message, capsys):
    def fail():
        raise error

    one_sentence(problems.exit_status("sashimi_youtubemix", fail), capsys.readouterr().err, message)


def test_errors_of_the_program_itself_are_not_hidden():
    with pytest.raises(RuntimeError, match="size"):
        problems.exit_status("x", lambda: torch.ones(2) @ torch.ones(3))
