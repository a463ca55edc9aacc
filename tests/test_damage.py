"""Damaged files of the SaShiMi example: each gets one sentence, changes nothing, and costs no memory."""

import dataclasses
import json
import math
import random
import shutil
import tracemalloc

import pytest
import torch

from example import CPU, one_sentence, small_run, snapshot
from sashimi import audio, checked, config, generation, storage, training
from sashimi.problems import Problem

import sashimi_youtubemix as program  # isort: skip

HUGE = 10**9


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, a generation's saved state, and what `report` leaves; never written to."""
    folder = tmp_path_factory.mktemp("damage")
    small_run(folder)
    model = storage.load_model(folder / "run").model
    streams = generation.prime(model, torch.randint(256, (7,)), 2)
    list(generation.generate(generation.StepEngine(model), streams, 3, generation.Sampling()))
    generation.save_streams(folder / "run/x.state", streams, model)
    assert program.main(["report", "--run", str(folder / "run"), "--seconds", "0.05"]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of it that may be damaged; the current folder is the one around it."""
    shutil.copytree(trained / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.fixture
def refused(run, capsys):
    """Asserts that a command is refused in one sentence, and changes nothing."""

    def go(command, message):
        before = snapshot(run.parent)
        status = program.main([str(a) for a in command])
        one_sentence(status, capsys.readouterr().err, message)
        assert snapshot(run.parent) == before

    return go


TRAIN = ["train", "--config", "run/config.json", "--out", "run", "--steps", "8"]
GENERATE = ["generate", "--model", "run", "--seconds", "0.01", "--engine", "step", "--out", "run/primed.wav"]
RESUME = [*GENERATE, "--resume", "run/x.state"]
REPORT = ["report", "--run", "run", "--seconds", "0.05"]
CHECKPOINT, STATE = "checkpoint-00000004.safetensors", "x.state"


# Checksums


def load(path):
    """What loading a file of the run verifies."""
    if path.name == storage.MODEL:
        return storage.load_model(path)
    if path.name == CHECKPOINT:
        return storage.Run(path.parent).load()
    return generation.load_streams(path, storage.load_model(path.parent / storage.MODEL).model)


@pytest.mark.parametrize("name", [storage.MODEL, CHECKPOINT, STATE])
def test_every_flipped_bit_is_found(run, name):
    """In the header and in the payload; a hundred places of each."""
    path, draw = run / name, random.Random(name)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    load(path)
    places = [draw.randrange(header) for _ in range(100)] + [draw.randrange(header, len(data)) for _ in range(100)]
    for place in [*range(8), *places, len(data) - 1]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(Problem, match=name):
            load(path)


def test_what_says_what_a_model_is_cannot_be_damaged_unseen(run):
    """Each byte of the card, its names and numbers included."""
    path = run / storage.MODEL
    data = path.read_bytes()
    for place in range(8, data.index(b'"layers.0')):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 3
        path.write_bytes(damaged)
        with pytest.raises(Problem, match=storage.MODEL):
            storage.load_model(path)


def test_the_checksum_is_that_of_card_names_dtypes_shapes_and_bytes():
    tensors = {"a": torch.arange(4.0), "b": torch.tensor(3, dtype=torch.uint8), "c": torch.zeros(0, 2)}
    found = checked.checksum({"step": 3}, tensors)
    assert checked.checksum({"step": 3}, dict(reversed(tensors.items()))) == found
    changes = (
        {"a": torch.arange(4.0) + 1},
        {"a": torch.arange(4.0)[None]},
        {"a": torch.arange(4.0).view(torch.int32)},
        {"c": torch.zeros(2, 0)},
        {"d": torch.zeros(0)},
    )
    others = [checked.checksum({"step": 3}, {**tensors, **change}) for change in changes]
    others.append(checked.checksum({"step": 4}, tensors))
    assert len({found, *others}) == len(others) + 1


def test_the_model_that_comes_along_has_the_weights_of_its_card():
    file = checked.TensorFile(program.PIANO)
    tensors = file.read()
    # Of the weights alone: a new model needs a new description in examples/models/README.md.
    published = "74eb7ed345775666e1fa147d37f0f94427f0fef8572e1d8d7077c117d878abb0"
    assert checked.checksum({}, tensors) == published
    assert storage.load_model(program.PIANO).settings.ssm_lr == 2e-3


def test_a_model_from_before_there_was_a_checksum_loads(run):
    trained = storage.load_model(run / storage.MODEL)
    weights = trained.model.state_dict()
    card = {"step": 4, "settings": config.to_json(trained.settings)}
    old = run / "old.safetensors"
    storage.write_tensors(old, weights, sashimi=json.dumps(card))
    assert all(torch.equal(x, weights[name]) for name, x in storage.load_model(old).model.state_dict().items())
    # One that has lost its checksum is not such a model.
    storage.write_tensors(old, weights, sashimi=json.dumps({**card, "sha257": "0"}))
    with pytest.raises(Problem, match="has no checksum"):
        storage.load_model(old)


# What is in a file, with a checksum that fits


def rewrite(path, change):
    """Writes a file again, after its tensors and its card have been changed."""
    file = checked.TensorFile(path)
    tensors, card = file.read(), file.card
    change(tensors, card)
    storage.write_checked(path, {name: x.clone() for name, x in tensors.items()}, **card)


def put(name, value):
    """Changes the tensor whose name contains a string: to what a function makes of it, or away."""

    def change(tensors, card):
        (key, *_) = [key for key in tensors if name in key]
        old = tensors.pop(key)
        if value is not None:
            tensors[key] = value(old)

    return change


def poison(number):
    """Puts a number into a tensor."""
    return lambda x: x.index_fill(-1, torch.tensor([0]), number) if x.ndim else x * 0 + number


def say(**values):
    """Changes the card."""
    return lambda tensors, card: card.update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("optimizer", None), r"optimizer\S+ is missing"),
        (put("exp_avg_sq", None), r"optimizer\S+exp_avg_sq is missing"),
        (put("exp_avg", lambda x: x[None]), r"is torch.float32 of shape .*, not torch.float32 of shape"),
        (put("exp_avg", poison(math.nan)), r"holds numbers that are not finite \(optimizer"),
        (put("exp_avg_sq", poison(-1.0)), r"a state of the optimiser that 4 steps do not leave"),
        (put(".step", poison(7.0)), r"a state of the optimiser that 4 steps do not leave"),
        (put("model.layers.0", poison(math.inf)), r"holds numbers that are not finite \(model.layers.0"),
        (put("model.layers.0", lambda x: x.int()), r"is torch.int32 of shape"),
        (put("model.layers.0", lambda x: x.to(torch.int8)), r"is of an unknown dtype of shape"),
        (
            lambda tensors, card: tensors.update(more=torch.ones(2)),
            r"more is torch.float32 of shape \[2\], and has no pl",
        ),
        (say(step=3), r"is not the checkpoint of step 4"),
    ],
)
def test_checkpoints(run, refused, change, message):
    rewrite(run / CHECKPOINT, change)
    refused(TRAIN, f"run.*{message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("weight", poison(math.nan)), r"holds numbers that are not finite \(layers"),
        (put("weight", lambda x: x.int()), r"is torch.int32 of shape \[.*, not torch.float32"),
        (say(step=-1), r"has a damaged header \(step -1\)"),
        (say(step="4"), r"has a damaged header \(step '4'\)"),
        (say(settings={}), r"has a damaged header"),
        (say(settings="[]"), r"is not a settings file"),
    ],
)
@pytest.mark.parametrize("command", [GENERATE, REPORT, ["evaluate", "--model", "run"]], ids=lambda x: x[0])
def test_models(run, refused, change, message, command):
    rewrite(run / storage.MODEL, change)
    refused(command, f"{storage.MODEL}.*{message}")


def settings_with(**values):
    """Changes the settings in the card of a model."""

    def change(tensors, card):
        card["settings"] = json.dumps({**json.loads(card["settings"]), **values})

    return change


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": HUGE}, r"another architecture than its header says"),
        ({"blocks": HUGE}, r"another architecture than its header says"),
        ({"blocks": 2}, r"another architecture than its header says"),
        ({"d_state": HUGE}, r"d_state must be at most 8,192"),
        ({"d_state": 8192}, r"another architecture than its header says"),
        ({"pool": [HUGE, 4]}, r"another architecture than its header says"),
        ({"pool": [2] * 10_000}, r"pool must be fewer than 16 factors"),
        ({"d_model": 10**400}, r"d_model must be at most"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_made(run, values, message, monkeypatch):
    rewrite(run / storage.MODEL, settings_with(**values))
    monkeypatch.setattr(config, "sashimi", None)
    tracemalloc.start()
    with pytest.raises(Problem, match=message):
        storage.load_model(run / storage.MODEL)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization": "x"}, r"quantization cannot be 'x'"),
        ({"quantization": ["linear"]}, r"quantization cannot be \['linear'\]"),
        ({"blocks": -1}, r"blocks must be at least 1, not -1"),
        ({"d_model": True}, r"d_model cannot be True"),
        ({"d_model": 0}, "d_model"),
        ({"d_state": 3}, "d_state"),
        ({"pool": [0, 4]}, r"pool cannot be \[0, 4\]"),
        ({"pool": 4}, r"pool cannot be 4"),
        ({"pad": 1}, r"pad cannot be 1"),
        ({"lr": math.nan}, r"lr must be a finite number, not nan"),
        ({"lr": "high"}, r"lr cannot be 'high'"),
        ({"lr": 10**400}, r"lr cannot be"),
        ({"ema": 1.0}, r"ema must be at least 0 and below 1"),
        ({"bits": 20}, r"samples have 1 to 16 bits"),
        ({"seed": -1}, r"seed must be at least 0"),
        ({"data": 3}, r"data cannot be 3"),
        ({"wings": 2}, r"unknown settings wings"),
    ],
)
def test_settings(run, refused, values, message):
    """In a model file, and in the settings file of a run."""
    rewrite(run / storage.MODEL, settings_with(**values))
    refused(GENERATE, f"{storage.MODEL}.*{message}")
    path = run / storage.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    refused(TRAIN, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (say(phases=[1]), r"is damaged \(phases \[1\]"),
        (say(phases=[1, 4]), r"is damaged \(phases \[1, 4\]"),
        (say(phases=[-1, 0]), r"is damaged \(phases \[-1, 0\]"),
        (say(phases=[1, True]), r"is damaged \(phases \[1, True\]"),
        (say(phases={}), r"is damaged \(phases \{\}"),
        (say(samples=-1), r"-1 samples"),
        (say(tree=[]), r"is not the saved state"),
        (say(model="0"), r"was generated by another model"),
        (put("state.3", None), r"the state of another architecture, or is incomplete \(state.3 is missing"),
        (put("state.3", lambda x: x[..., :1]), r"state.3 is torch.float32 of shape"),
        (put("state.3", lambda x: x.double()), r"state.3 is torch.float64"),
        (put("state.0", lambda x: x[:1]), r"state.0 is torch.float32 of shape \[1, "),
        (put("state.0", poison(math.nan)), r"not finite \(state.0"),
        (put("logits", lambda x: x.sum()), r"another architecture"),
        (put("logits", lambda x: x[:, :9]), r"logits is torch.float32 of shape \[2, 9\]"),
        (lambda t, _: t.update({k: x[:0] for k, x in t.items() if k != "random"}), r"0 streams"),
        (put("random", lambda x: x[:10]), r"random is torch.uint8 of shape \[10\]"),
        (put("random", torch.zeros_like), r"is damaged"),
    ],
)
def test_states_of_streams(run, refused, change, message):
    rewrite(run / STATE, change)
    refused(RESUME, f"{STATE}.*{message}")


# Files without a checksum


NOT_JSON = ["[]", "null", "{", "", "[" * 100_000, b"\xff\xfe\x00\x80", " " * (1 << 20) + "{}"]


def spoil(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("text", NOT_JSON, ids=range(len(NOT_JSON)))
def test_what_is_not_json(run, refused, text):
    for name, command, message in (
        ("evaluation.json", REPORT, r"evaluation.json is damaged \(.*; remove it, and it is made again"),
        ("state.json", TRAIN, r"state.json is damaged \(.*; give another --out"),
        ("config.json", TRAIN, r"config.json (is not a settings file|cannot be read)"),
    ):
        spoil(run / name, text)
        refused(command, message)


@pytest.mark.parametrize(
    "state",
    [
        {"step": 4},
        {"step": True, "checkpoint": "checkpoint-00000001.safetensors"},
        {"step": 4.0, "checkpoint": CHECKPOINT},
        {"step": HUGE, "checkpoint": CHECKPOINT},
        {"step": 4, "checkpoint": f"../{CHECKPOINT}"},
        {"step": 4, "checkpoint": "../outside.safetensors"},
        {"step": 4, "checkpoint": "model.safetensors"},
    ],
)
def test_the_state_of_a_run_names_nothing_but_its_checkpoint(run, refused, state):
    for path in (run.parent / CHECKPOINT, run.parent / "outside.safetensors"):
        shutil.copy(run / CHECKPOINT, path)
    spoil(run / "state.json", json.dumps(state))
    refused(TRAIN, r"state.json is damaged \(step")


def test_a_run_is_not_further_than_its_checkpoint_or_its_steps(run, refused):
    refused([*TRAIN[:-1], "3"], "has 4 steps behind it, more than --steps 3")
    far = f"checkpoint-{HUGE}.safetensors"
    shutil.copy(run / CHECKPOINT, run / far)
    spoil(run / "state.json", json.dumps({"step": HUGE, "checkpoint": far}))
    refused(TRAIN, f"has {HUGE:,} steps behind it, more than --steps 8")
    near = "checkpoint-00000005.safetensors"
    shutil.copy(run / CHECKPOINT, run / near)
    spoil(run / "state.json", json.dumps({"step": 5, "checkpoint": near}))
    spoil(run / "log.jsonl", "".join(f'{{"step": {k}, "bits": 8.0}}\n' for k in range(1, 6)))
    refused(TRAIN, f"{near} is not the checkpoint of step 5")
    (run / near).unlink()
    refused(TRAIN, f"{near} does not exist")


@pytest.mark.parametrize(
    ("damage", "reached"),
    [
        (lambda lines: b"\x00\xff\x80" * 50, 0),
        (lambda lines: b"".join([lines[0], b"\x00\n", *lines[2:]]), 1),
        (lambda lines: b"".join([lines[0], *lines[2:3]]), 3),
        (lambda lines: b"".join([*lines[:2], lines[0], *lines[2:]]), 2),
        (lambda lines: b"".join([lines[0], b'{"step": 2, "bits": NaN}\n', *lines[2:]]), 1),
        (lambda lines: b"".join([lines[0], b'{"step": 2, "norm": 1}\n', *lines[2:]]), 1),
        (lambda lines: b"".join([lines[0], b'{"step": 1.5, "bits": 1}\n', *lines[2:]]), 1),
        (lambda lines: b"[]\n", 0),
        (lambda lines: b" " * (1 << 17) + b"".join(lines), 0),
    ],
)
def test_a_log_that_is_damaged_before_its_checkpoint(run, refused, damage, reached):
    path = run / "log.jsonl"
    path.write_bytes(damage(path.read_bytes().splitlines(keepends=True)))
    message = rf"log.jsonl is damaged after step {reached}, and the run has 4 steps behind it; remove it to go on"
    refused(TRAIN, message)
    refused(REPORT, message)


def test_a_log_may_be_damaged_after_its_checkpoint_or_removed(run, capsys):
    """A power cut does that, and what comes after the checkpoint is done again."""
    path = run / "log.jsonl"
    whole = path.read_bytes()
    for tail in (b'{"step": 5, "bi', b"\x00" * 500, b'{"step": 5, "bits": 7.5}\n\xff'):
        path.write_bytes(whole + tail)
        assert [line["step"] for line in storage.Run(run).history()] == [1, 2, 3, 4, 5][: 5 if b"7.5" in tail else 4]
    assert program.main([*TRAIN[:-1], "5"]) == 0
    assert path.read_bytes().startswith(whole)
    assert [line["step"] for line in storage.Run(run).history()] == [1, 2, 3, 4, 5]
    path.unlink()
    assert program.main([*TRAIN[:-1], "6"]) == 0
    assert [line["step"] for line in storage.Run(run).history()] == [6]


@pytest.mark.parametrize(
    "result",
    ['{"network": NaN}', '{"uniform": 8}', '{"network": "low"}', '{"network": 3.0, "other": 3.0}'],
)
def test_results(run, refused, result):
    spoil(run / "evaluation.json", result)
    refused(REPORT, "evaluation.json is damaged")


def test_clips_of_a_report(run, refused):
    spoil(run / "real.wav", "no sound")
    refused(REPORT, "real.wav cannot be read as audio .*; remove it, and it is made again")


def test_clips_that_an_interrupted_report_left_are_made_again(run):
    whole = (run / "primed.wav").read_bytes()
    with audio.WavWriter(run / "primed.wav", 16000) as file:
        file.write(torch.zeros(100))
    assert program.main(REPORT) == 0
    assert (run / "primed.wav").read_bytes() == whole


# Sizes and numbers


@pytest.mark.parametrize("changes", [{}, {"layer": "s4", "glu": True}, {"pool": ()}, {"pool": (2, 3, 2), "bits": 4}])
def test_the_least_size_of_a_network_is_a_bound_that_is_not_far(changes):
    for d_model, d_state, blocks in ((4, 2, 1), (32, 64, 3), (1, 32, 2)):
        settings = program.Settings(d_model=d_model, d_state=d_state, blocks=blocks, **changes)
        size = sum(x.numel() for x in settings.model().state_dict().values())
        assert settings.least_size < size < 6 * settings.least_size


def test_weights_that_are_no_longer_finite_are_not_saved(tmp_path):
    _, settings = small_run(tmp_path)
    trainer = training.Trainer(settings, audio.open_split(tmp_path / "data", 16000), CPU)
    run = storage.Run(tmp_path / "run")

    def overflow(step):
        trainer.model.layers[0].module.weight.data.fill_(math.inf)
        trainer.step = lambda number, x, y: (8.0, 1.0)

    before = (tmp_path / "run/state.json").read_text()
    assert json.loads(before)["step"] == 4
    trainer.settings = dataclasses.replace(settings, steps=6)
    with pytest.raises(Problem, match=r"model.layers.0.module.weight is no longer finite after step 6; lower --lr"):
        training.train(trainer, run, every=2, begin=overflow)
    assert (tmp_path / "run/state.json").read_text() == before
