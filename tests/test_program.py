"""examples/sashimi_youtubemix.py as a user runs it: every command, killed runs, several processes, wrong input."""

import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import wave

import numpy as np
import pytest
import soundfile as sf
import torch

from example import EXAMPLES, PIANO, run, write
from sashimi import audio, storage

import ringing_strings  # isort: skip
import sashimi_youtubemix as program  # isort: skip

SMALL = ["--sample-rate", "16000", "--excerpt", "256", "--d-model", "4", "--d-state", "4", "--blocks", "1"]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs the example in this process: exit status, output, errors."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments):
        try:
            status = program.main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
        found = capsys.readouterr()
        return status, found.out, found.err

    return go


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps on four short files."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").mkdir()
    for i, name in enumerate(("a.wav", "b.flac", "c.wav", "d.wav")):
        write(folder / "data" / name, 0.3, seed=i)
    arguments = ["train", *SMALL, "--steps", 4, "--checkpoint-every", 2]
    done = run(*arguments, "--data", folder / "data", "--out", folder / "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "3 clips to train on, 1 held out, 16000 Hz" in done.stdout
    return folder


def names(folder):
    return {p.name for p in folder.iterdir()}


# Help


def test_every_command_has_help(call):
    status, out, _ = call("--help")
    assert status == 0
    for command in ("train", "evaluate", "generate", "overfit", "report"):
        assert command in out
        status, text, _ = call(command, "--help")
        assert status == 0
        assert "--device" in text
    assert "--top-p" in call("generate", "--help")[1]
    # A preset's settings are the defaults that the help shows.
    assert "(default: 128000)" in call("train", "--preset", "paper", "--help")[1]


def test_samples_are_drawn_as_the_documentation_says():
    text = (EXAMPLES.parent / "docs/sashimi.rst").read_text()
    said = re.search(r"temperature of ([\d.]+) from the\slikeliest samples that together have ([\d.]+) of", text)
    assert [float(x) for x in said.groups()] == [program.Generate().temperature, program.Generate().top_p]


# Training


def test_a_run_writes_all_files_for_its_use(trained):
    folder = trained / "run"
    assert names(folder) == {
        "config.json",
        "log.jsonl",
        "model.safetensors",
        "state.json",
        "checkpoint-00000004.safetensors",
    }
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert ["held_out" in line for line in lines] == [False, True, False, True]


def test_the_settings_file_of_a_run_can_be_used_again(trained, call):
    status, _, err = call("train", "--config", trained / "run/config.json", "--out", "again")
    assert status == 0, err
    folders = (program.Path("again"), trained / "run")
    first, second = ([line["bits"] for line in storage.Run(folder).history()] for folder in folders)
    assert first == pytest.approx(second, rel=1e-5)


def test_settings_start_from_a_preset(call, trained):
    changes = [*SMALL, "--steps", "1", "--no-recompute", "--data", trained / "data"]
    assert call("train", "--preset", "notebook", *changes, "--out", "run")[0] == 0
    found = json.loads(program.Path("run/config.json").read_text())
    assert (found["layer"], found["lr"], found["schedule"], found["d_model"]) == ("s4", 1e-3, "constant", 4)
    paper = program.config.preset("paper")
    assert (paper.d_model, paper.blocks, paper.pool, paper.d_state) == (64, 8, (4, 4), 64)
    assert (paper.glu, paper.bits, paper.quantization, paper.excerpt) == (True, 8, "mu-law", 8 * 16000)
    notebook = program.config.preset("notebook")
    assert (notebook.d_model, notebook.d_state, notebook.blocks) == (128, 512, 2)
    for name in ("paper", "notebook", "sc09"):
        found = program.config.preset(name)
        assert (found.sample_rate, found.ssm_lr) == (16_000, 1e-3)


def test_a_finished_run_is_not_trained_again_and_continues_with_more_steps(trained, call, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    before = (tmp_path / "run/log.jsonl").read_text()
    same = ["train", "--config", "run/config.json", "--out", "run"]
    status, out, _ = call(*same)
    assert status == 0
    assert "continuing after step 4 of 4" in out
    assert (tmp_path / "run/log.jsonl").read_text() == before
    assert call(*same, "--steps", "6")[0] == 0
    assert [line["step"] for line in storage.Run(tmp_path / "run").history()] == [1, 2, 3, 4, 5, 6]


def test_files_of_another_rate_are_resampled_with_a_notice(call, tmp_path):
    for i, rate in enumerate((8000, 44100, 16000)):
        write(tmp_path / f"{i}.wav", 0.3, rate, channels=2)
    status, out, err = call("train", *SMALL, "--steps", 1, "--data", tmp_path, "--out", "run")
    assert status == 0
    assert "2 of 3 files are resampled from 8,000, 44,100 Hz to 16,000 Hz" in err
    assert "2 clips to train on, 1 held out, 16000 Hz" in out


def test_short_clips_in_subfolders(call, tmp_path):
    """As in SC09: a folder per word, with clips of a second or less."""
    for i, name in enumerate(("zero/a.wav", "zero/b.wav", "one/a.wav", "nine/c.wav")):
        (tmp_path / "sc09" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "sc09" / name, 0.01 + 0.01 * i)
    arguments = ["train", *SMALL, "--steps", 2, "--data", "sc09"]
    status, _, err = call(*arguments, "--out", "run", "--preset", "sc09", "--batch", 2, "--no-glu")
    assert status == 0, err
    status, _, err = call(*arguments, "--excerpt", 2048, "--out", "other")
    assert status == 1
    assert "lower --excerpt, or pad with silence by --pad" in err


@pytest.mark.parametrize("ema", [0, 0.9])
def test_a_killed_run_continues_as_if_it_had_not_been_killed(tmp_path, trained, ema):
    """kill -9 while it runs: the same losses, bit for bit, as a run that was not killed."""
    arguments = ["train", *SMALL, "--data", trained / "data", "--steps", 60, "--checkpoint-every", 3, "--ema", ema]
    arguments += ["--dropout", 0.1]
    assert run(*arguments, "--out", "whole", cwd=tmp_path).returncode == 0
    command = [sys.executable, str(EXAMPLES / "sashimi_youtubemix.py"), *map(str, arguments), "--out", "killed"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed = storage.Run(tmp_path / "killed")
    deadline = time.monotonic() + 120
    while (killed.state or {"step": 0})["step"] < 6 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 6 <= killed.state["step"] < 60
    (tmp_path / "killed/.checkpoint-00000099.safetensors.part").write_text("half a checkpoint")
    done = run(*arguments, "--out", "killed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "killed") == names(tmp_path / "whole")
    assert "continuing after step" in done.stdout
    losses = [[line["bits"] for line in storage.Run(tmp_path / name).history()] for name in ("whole", "killed")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 60
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "killed/model.safetensors").read_bytes()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_as_one(tmp_path, trained, accumulate):
    arguments = ["train", *SMALL, "--data", trained / "data", "--steps", 6, "--batch", 4, "--device", "cpu"]
    assert run(*arguments, "--out", "one", cwd=tmp_path).returncode == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "sashimi_youtubemix.py"), *map(str, arguments), "--out", "two"]
    done = subprocess.run(
        [*command, "--accumulate", str(accumulate)], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    one, two = ([line["bits"] for line in storage.Run(tmp_path / name).history()] for name in ("one", "two"))
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-5)


# Measuring


def test_evaluation_prints_the_table(trained, call):
    status, out, err = call("evaluate", "--model", trained / "run", "--step-samples", 500)
    assert status == 0, err
    found = {name: float(value) for name, value in re.findall(r"^  (\w+) +([\d.]+)", out, re.MULTILINE)}
    assert found["uniform"] == 8
    assert set(found) == {"uniform", "unigram", "bigram", "adaptive", "network"}
    assert found == pytest.approx(json.loads((trained / "run/evaluation.json").read_text()), abs=6e-4)
    forward, step = map(float, re.search(r"500 samples: ([\d.]+) by forward, ([\d.]+) by step", out).groups())
    assert step == pytest.approx(forward, rel=1e-5)


# Generating


def test_generation_writes_the_files_of_its_options(trained, call, tmp_path):
    common = ["generate", "--model", trained / "run", "--seconds", 0.02, "--batch", 2]
    status, out, err = call(*common, "--prime", trained / "data/a.wav", "--prime-seconds", 0.1, "--out", "x.wav")
    assert status == 0, err
    prompt = audio.open_recording(trained / "data/a.wav").read(0, 1600)
    for i in range(2):
        found, rate = sf.read(tmp_path / f"x-{i}.wav", dtype="float32")
        assert (len(found), rate) == (1600 + 320, 16000)
        quantized = audio.Quantizer().decode(audio.Quantizer().encode(prompt)).numpy()
        assert np.abs(found[:1600] - quantized).max() < 1e-4
        assert re.search(rf"x-{i}.wav: 0.02 s generated, [\d.]+ bits per sample", out)
    assert call(*common, "--seed", 3, "--out", "y.wav")[0] == 0
    assert call(*common, "--seed", 3, "--out", "z.wav")[0] == 0
    assert (tmp_path / "y-0.wav").read_bytes() == (tmp_path / "z-0.wav").read_bytes()
    assert (tmp_path / "y-0.wav").read_bytes() != (tmp_path / "y-1.wav").read_bytes()
    greedy = [*common[:-2], "--greedy", "--top-p", 0.9, "--top-k", 3]
    assert call(*greedy, "--out", "g.wav", "--seed", 1)[0] == 0
    assert call(*greedy, "--out", "h.wav", "--seed", 2)[0] == 0
    assert (tmp_path / "g.wav").read_bytes() == (tmp_path / "h.wav").read_bytes()


def test_a_generation_can_be_continued(trained, call, tmp_path):
    common = ["generate", "--model", trained / "run"]
    assert call(*common, "--seconds", 0.03, "--out", "whole.wav")[0] == 0
    assert call(*common, "--seconds", 0.01, "--out", "first.wav")[0] == 0
    assert call(*common, "--seconds", 0.02, "--out", "then.wav", "--resume", "first.state")[0] == 0
    whole, first, then = (sf.read(tmp_path / f"{n}.wav")[0] for n in ("whole", "first", "then"))
    assert np.array_equal(whole, np.concatenate([first, then]))


def test_control_c_keeps_the_blocks_so_far(trained, tmp_path):
    command = [sys.executable, str(EXAMPLES / "sashimi_youtubemix.py"), "generate", "--model", str(trained / "run")]
    command += ["--seconds", "600", "--out", "long.wav"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (tmp_path / "long.wav").exists() and (tmp_path / "long.wav").stat().st_size > 5000:
            break
        time.sleep(0.05)
    # The file can be played while it is written.
    assert sf.info(tmp_path / "long.wav").frames > 2000
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    seconds = float(re.search(r"long.wav: ([\d.]+) s generated", out).group(1))
    assert sf.info(tmp_path / "long.wav").duration == pytest.approx(seconds, abs=0.01)
    assert seconds > 0.1
    assert (tmp_path / "long.state").exists()


def test_the_model_of_the_example_generates(call, tmp_path):
    status, out, err = call("generate", "--seconds", 0.1)
    assert status == 0, err
    bits = float(re.search(r"generated.wav: 0.10 s generated, ([\d.]+) bits per sample", out).group(1))
    assert 0 < bits < 8
    assert program.PIANO.stat().st_size < 6e6


# Everything


def test_without_arguments_it_runs_from_end_to_end(tmp_path, call, monkeypatch):
    """With a smaller network: the embedded clips, the table, the sounds, the page."""
    monkeypatch.setattr(
        program, "Settings", lambda: program.config.Settings(d_model=4, d_state=4, blocks=1, steps=3, excerpt=512)
    )
    monkeypatch.setattr(program.Train, "__init__", _with(program.Train, settings=program.Settings()))
    monkeypatch.setattr(program.Report, "__init__", _with(program.Report, seconds=0.1))
    monkeypatch.setattr(program.Evaluate, "__init__", _with(program.Evaluate, step_samples=50))
    status, out, err = call()
    assert status == 0, err
    assert "5 clips to train on, 1 held out, 8000 Hz" in out
    assert "results, with players: runs/youtubemix/report.html" in out
    made = names(tmp_path / "runs/youtubemix")
    assert {"real.wav", "primed.wav", "unprimed.wav", "loss.png", "spectrograms.png", "report.html"} <= made
    real, primed = (sf.read(tmp_path / f"runs/youtubemix/{n}.wav")[0] for n in ("real", "primed"))
    assert len(primed) == 2.1 * 8000
    assert np.array_equal(real[:16000], primed[:16000])
    assert (
        len(re.findall(r"^(real|primed|unprimed).wav: [\d.]+ partials, life [\d.]+ s, share [\d.]+$", out, re.M)) == 3
    )
    page = (tmp_path / "runs/youtubemix/report.html").read_text()
    assert page.count("data:audio/wav;base64,") == 3
    # Nothing is downloaded.
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    for text in (
        "a model of one slow piano piece",
        "bigram",
        "adaptive",
        "partials",
        "Listen",
        "The network predicts worse than that filter",
        "Tier 3, block 1, at 500 Hz",
        "d_model",
        "before and after training",
    ):
        assert text in page
    # A second time nothing is trained, and nothing generated.
    written = (tmp_path / "runs/youtubemix/primed.wav").stat().st_mtime_ns
    assert call()[0] == 0
    assert (tmp_path / "runs/youtubemix/primed.wav").stat().st_mtime_ns == written


def _with(cls, **changes):
    original = cls.__init__
    return lambda self, *args, **kwargs: original(self, *args, **{**(changes if not args else {}), **kwargs})


def test_overfit_draws_its_curve(call, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "overfit", _overfit_small)
    write(tmp_path / "a.wav", 0.05)
    write(tmp_path / "b.wav", 0.05)
    status, out, _ = call("overfit", "--data", tmp_path, "--epochs", 2, "--out", "run")
    assert status == 0
    assert len(re.findall(r"epoch \d: [\d.]+ bits, [\d.]+ s, peak [\d.]+ GiB", out)) == 2
    assert (tmp_path / "run/overfit.png").exists()


def _overfit_small(*args, **kwargs):
    from sashimi.overfitting import overfit

    return overfit(*args, **kwargs, d_model=4, d_state=4, blocks=1)


# Bad input


def _not_audio(data):
    write(data / "a.wav")
    (data / "b.wav").write_text("this is not audio")


def _short(data):
    for name in ("a.wav", "b.wav"):
        write(data / name, 0.01)


def _silent(data):
    sf.write(data / "a.wav", np.zeros(0), 16000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: data.rmdir(), r"data is not a folder"),
        (lambda data: None, r"data holds no audio; put .wav, .flac, .ogg files into it"),
        (_not_audio, r"b.wav cannot be read as audio .*; remove it from the folder"),
        (lambda data: write(data / "a.wav"), r"holds one clip; at least two are needed, one of them held out"),
        (_short, r"every clip is shorter than an excerpt of 256 samples .*the longest has 160"),
        (_silent, r"a.wav holds 0 samples; remove it from the folder"),
    ],
    ids=["missing", "empty", "not audio", "one clip", "short clips", "no samples"],
)
def test_bad_data_gives_an_error_of_one_sentence(tmp_path, call, make, message):
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    status, _, err = call("train", *SMALL, "--steps", 2, "--data", "data", "--out", "out")
    _one_sentence(status, err, message)
    assert not (tmp_path / "out").exists()


def _one_sentence(status, err, message):
    assert status == 1
    assert re.search(f"^sashimi_youtubemix: .*{message}", err), err
    assert len(err.strip().splitlines()) == 1, err


def _snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "run", "--lr", 1], r"run holds a run with other settings \(data is"),
        (["train", "--config", "run/config.json", "--out", "run", "--lr", 1], r"\(lr is 0.008 there and 1.0 here\)"),
        (["train", "--config", "none.json"], r"none.json cannot be read"),
        (["train", "--config", "data/a.wav"], r"a.wav (cannot be read|is not a settings file)"),
        (["train", "--preset", "tiny"], r"there is no preset 'tiny'; there are small, paper"),
        (["train", "--bits", 20, "--out", "new"], r"samples have 1 to 16 bits"),
        (["train", "--d-model", 0, "--out", "new"], r"do not make a network that can be trained: .*at least 1"),
        (["train", "--lr", -1, "--out", "new"], r"do not make a network that can be trained: "),
        (["train", "--dropout", 1.5, "--out", "new"], r"do not make a network that can be trained: .*less than 1"),
        (["train", "--sample-rate", 0, "--out", "new"], r"--sample-rate must be at least 1"),
        (["train", "--steps", 0, "--out", "new"], r"--steps must be at least 1"),
        (["train", "--ema", 1, "--out", "new"], r"--ema must be at least 0 and below 1"),
        (["train", "--noise", -1, "--out", "new"], r"--noise must be at least 0, not -1"),
        (["train", "--noise-until", 2, "--out", "new"], r"--noise-until must be at least 0 and at most 1, not 2"),
        (["train", "--device", "abacus", "--out", "new"], r"there is no device 'abacus'"),
        (["train", "--batch", 3, "--accumulate", 2, "--out", "new"], r"cannot be shared"),
        (["train", *SMALL, "--data", "data", "--out", "data/a.wav"], r"a.wav.* (cannot be made|cannot be written)"),
        (["train", *SMALL, "--data", "data", "--out", "/proc/run"], r"/proc/run cannot be made"),
        (["evaluate", "--model", "data"], r"data/model.safetensors does not exist"),
        (["evaluate", "--model", "data/a.wav"], r"a.wav cannot be read as safetensors"),
        (["generate", "--model", "run", "--out", "nowhere/x.wav"], r"nowhere/x.wav cannot be written"),
        (["generate", "--model", "run", "--out", "data"], r"data cannot be written"),
        (["generate", "--model", "run", "--out", "x.txt"], r"x.txt cannot be written"),
        (["overfit", "--data", "data", "--out", "data/a.wav"], r"a.wav cannot be made"),
        (["generate", "--model", "run", "--prime", "data/none.wav"], r"none.wav cannot be read as audio"),
        (["generate", "--model", "run", "--prime", "odd.wav"], r"odd.wav has 8000 Hz and the model 16000 Hz"),
        (["generate", "--model", "run", "--prime", "empty.wav"], r"empty.wav holds 0 samples"),
        (["generate", "--model", "run", "--seconds", 0], r"--seconds must be above 0"),
        (["generate", "--model", "run", "--batch", 0], r"--batch must be at least 1"),
        (["generate", "--model", "run", "--top-p", 2], r"--top-p must be above 0 and at most 1"),
        (["generate", "--model", "run", "--resume", "run/model.safetensors"], r"is not the saved state"),
        (["report", "--run", "nowhere"], r"nowhere is not the folder of a run"),
        (["report", "--run", "data"], r"data/model.safetensors does not exist"),
    ],
)
def test_bad_arguments_give_an_error_of_one_sentence_and_overwrite_nothing(trained, call, tmp_path, arguments, message):
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copytree(trained / "data", tmp_path / "data")
    write(tmp_path / "odd.wav", 0.1, 8000)
    sf.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    before = _snapshot(tmp_path)
    status, _, err = call(*arguments)
    _one_sentence(status, err, message)
    assert _snapshot(tmp_path) == before


@pytest.mark.parametrize("damage", ["checkpoint", "state", "foreign"])
def test_a_damaged_checkpoint_is_named_and_not_changed(trained, call, tmp_path, damage):
    shutil.copytree(trained / "run", tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoint-00000004.safetensors"
    if damage == "checkpoint":
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
        message = r"checkpoint-00000004.safetensors cannot be read as safetensors"
    elif damage == "state":
        (tmp_path / "run/state.json").write_text("{")
        message = r"state.json is damaged"
    else:
        storage.write_tensors(checkpoint, {"model.x": torch.ones(2)})
        message = r"holds the weights of another architecture"
    before = _snapshot(tmp_path)
    status, _, err = call("train", "--config", "run/config.json", "--out", "run", "--steps", 8)
    _one_sentence(status, err, message)
    assert _snapshot(tmp_path) == before


def test_a_loss_that_is_not_a_number_is_reported(trained, call, tmp_path):
    status, _, err = call(
        "train", *SMALL, "--data", trained / "data", "--steps", 50, "--lr", 1e30, "--clip", 1e30, "--out", "run"
    )
    assert status == 1
    assert re.search(r"(the loss is|the gradient's norm is) .* at step \d+; lower --lr", err.splitlines()[-1])
    assert math.isfinite(storage.Run(tmp_path / "run").history()[0]["bits"])


def test_the_embedded_clips_say_where_they_come_from():
    assert "CC BY 3.0" in (PIANO / "LICENSE.md").read_text()


def test_the_embedded_clips_are_one_piece_at_its_own_tempo_each():
    """The tempo of the held-out take is not close to that of a training take."""
    clips = json.loads((PIANO / "metadata.json").read_text())
    files = {clip["file"]: clip["tempo"] for clip in clips}
    assert set(files) == {str(p.relative_to(PIANO)) for p in PIANO.rglob("*.flac")}
    assert sum((PIANO / file).stat().st_size for file in files) <= 3e6
    assert all(sf.info(PIANO / file).samplerate == 8000 for file in files)
    held_out, training = ({t for f, t in files.items() if f.startswith(name)} for name in ("heldout", "train"))
    assert all(abs(one / other - 1) > 0.01 for one in held_out for other in training)


# Streams


def test_a_stream_can_be_piped_and_stops_when_the_reader_is_closed(trained, tmp_path, call):
    """The WAV is written to standard output block by block, the same as to a file; a closed player ends it quietly."""
    command = [sys.executable, str(EXAMPLES / "sashimi_youtubemix.py"), "generate", "--model", str(trained / "run")]
    done = subprocess.run([*command, "--stream", "--seconds", "0.1"], capture_output=True, check=True, cwd=tmp_path)
    assert b"0.10 s generated" in done.stderr
    assert b"times real time" in done.stderr
    with wave.open(io.BytesIO(done.stdout)) as sound:
        assert sound.getparams()[:3] == (1, 2, 16000)
        streamed = sound.readframes(10_000)
    assert not list(tmp_path.iterdir())
    status, *_ = call("generate", "--model", trained / "run", "--seconds", 0.1, "--out", tmp_path / "same.wav")
    assert status == 0
    with wave.open(str(tmp_path / "same.wav")) as sound:
        assert sound.readframes(10_000) == streamed
    with subprocess.Popen([*command, "--stream", "--seconds", "inf"], stdout=-1, stderr=-1, cwd=tmp_path) as endless:
        assert len(endless.stdout.read(40_000)) == 40_000
        endless.stdout.close()
        error = endless.stderr.read().decode()
        assert endless.wait(60) == 0, error
    assert "Traceback" not in error
    assert "generated" in error


def test_all_engines_generate_the_same(trained, tmp_path, call):
    sounds = []
    for engine in ("program", "step", "compile", "auto"):
        out = tmp_path / f"{engine}.wav"
        status, _, err = call(
            "generate", "--model", trained / "run", "--seconds", 0.02, "--engine", engine, "--out", out, "--batch", 2
        )
        assert status == 0, err
        sounds.append([path.read_bytes() for path in sorted(tmp_path.glob(f"{engine}-?.wav"))])
    assert len(sounds[0]) == 2
    assert all(sound == sounds[0] for sound in sounds)


def test_strings_resonate(tmp_path):
    """From a file or a pipe, in blocks of any size, one channel or two: the same as the layer at once."""
    rate, command = 8000, [sys.executable, str(EXAMPLES / "ringing_strings.py")]
    t = torch.arange(rate)[:, None] / rate
    dry = 0.1 * torch.cat([torch.sin(2 * torch.pi * 220 * t), torch.randn(rate, 1)], 1)
    with audio.WavWriter(tmp_path / "dry.wav", rate, 2) as file:
        file.write(dry)
    arguments = [tmp_path / "dry.wav", "--out", tmp_path / "wet.wav", "--block", "100"]
    done = subprocess.run([*command, *arguments], capture_output=True, check=True)
    assert b"1.00 s at 8000 Hz" in done.stderr
    assert b"real-time factor 0." in done.stderr
    piped = subprocess.run([*command, "-"], input=(tmp_path / "dry.wav").read_bytes(), capture_output=True, check=True)
    wet, _ = sf.read(tmp_path / "wet.wav", dtype="float32")
    with wave.open(io.BytesIO(piped.stdout)) as sound:
        assert sound.getnchannels() == 2
        assert sound.readframes(2 * rate) == (wet * 32767).round().astype("<i2").tobytes()
    layer = ringing_strings.strings(rate)
    with torch.no_grad():
        expected = layer(dry.T[..., None])[..., 0].T
    assert float((torch.from_numpy(wet) - expected).abs().max()) < 1e-4
    # A tone at the pitch of a string resonates, and louder than noise of more power.
    tone, noise = (torch.from_numpy(wet) - dry).square().mean(0).tolist()
    assert tone > 3 * noise
    for wrong, words in (([str(tmp_path / "none.wav")], "cannot be read"), (["-"], "is not WAV")):
        failed = subprocess.run([*command, *wrong], input=b"noise", capture_output=True, check=False)
        assert failed.returncode == 1
        assert words in failed.stderr.decode()


def test_without_numba_the_error_says_what_to_install_or_to_give(trained, tmp_path):
    hidden = (
        f"import sys; sys.modules['numba'] = None; sys.path.insert(0, {str(EXAMPLES)!r}); import sashimi_youtubemix"
    )
    play = ["generate", "--model", str(trained / "run"), "--seconds", "0.01", "--out", str(tmp_path / "x.wav")]
    runs = {"auto": 1, "step": 0}
    for engine, status in runs.items():
        code = f"{hidden}; sys.exit(sashimi_youtubemix.main({[*play, '--engine', engine]!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        if status:
            assert "pip install 'ssmkit[streaming]'; or give --engine step." in done.stderr
            assert "Traceback" not in done.stderr
