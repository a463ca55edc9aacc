"""The SaShiMi example: its parts, the notebook's checks, and the program as a user runs it."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from torch.nn import functional as F

from ssmkit import S4, S4D, Residual
from ssmkit.testing import assert_modes_agree

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from sashimi import audio, baselines, generation, model, overfitting, training  # noqa: E402

PIANO = EXAMPLES / "data/piano"


def clip(samples, name="a.wav", rate=16000):
    return audio.Clip(Path(name), torch.as_tensor(samples, dtype=torch.uint8), rate)


def write(path, seconds=0.5, rate=16000, channels=1, subtype="PCM_16", seed=0):
    t = np.arange(int(seconds * rate)) / rate
    rng = np.random.default_rng(seed)
    wave = 0.5 * np.sin(2 * np.pi * 220 * t) + 0.05 * rng.standard_normal(len(t))
    sf.write(path, np.stack([wave] * channels, -1), rate, subtype=subtype)
    return wave


def run(*arguments, cwd):
    command = [sys.executable, str(EXAMPLES / "sashimi_youtubemix.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=250)


SMALL = (
    "--steps",
    2,
    "--excerpt",
    256,
    "--d-model",
    4,
    "--d-state",
    4,
    "--blocks",
    1,
    "--seconds",
    0.05,
    "--prime",
    0.1,
)


# The network


@pytest.mark.parametrize("layer", ["s4", "s4d"])
@pytest.mark.parametrize("glu", [False, True])
def test_the_network_keeps_the_contract(layer, glu):
    net = model.sashimi(4, 1, d_state=4, layer=layer, glu=glu, pool=(4, 2)).double()
    assert_modes_agree(net, torch.randint(256, (2, 45)))


def test_the_network_takes_float_samples_too():
    net = model.sashimi(4, 1, d_state=4, inputs="samples", d_output=7).double()
    assert net(torch.randn(2, 30, 1, dtype=torch.float64)).shape == (2, 30, 7)
    assert_modes_agree(net)


def test_the_network_is_the_papers():
    net = model.sashimi(64, 8)
    parts = list(net.modules())
    assert sum(isinstance(m, S4) for m in parts) == 24
    widths = sorted(m.d_model for m in parts if isinstance(m, S4))
    assert widths == [64] * 8 + [128] * 8 + [256] * 8
    assert sum(isinstance(m, Residual) for m in parts) == 24 * 2 + 3
    assert any(isinstance(m, S4D) for m in model.sashimi(8, 1, layer="s4d").modules())
    assert net(torch.randint(256, (1, 33))).shape == (1, 33, 256)


# Samples


def test_input_and_target_are_shifted_by_one():
    """x holds samples 0 … N-1 and y samples 1 … N."""
    x, y = audio.input_and_target(torch.arange(11, dtype=torch.uint8))
    assert x.tolist() == list(range(10))
    assert y.tolist() == list(range(1, 11))


def test_mu_law():
    x = torch.linspace(-1, 1, 100_001)
    q = audio.mu_law_encode(x)
    assert (q.min(), q.max()) == (0, 255)
    assert audio.mu_law_encode(torch.zeros(1)).item() == generation.SILENCE
    # Every class comes back, and every sample to within half a step of the companded scale.
    classes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(audio.mu_law_encode(audio.mu_law_decode(classes)), classes)

    def compand(v):
        return v.sign() * torch.log1p(255 * v.abs()) / math.log(256)

    assert (compand(audio.mu_law_decode(q)) - compand(x)).abs().max() <= 1 / 255 + 1e-5


def test_excerpts_come_from_everywhere_and_never_cross_clips():
    clips = [clip(range(0, 50)), clip(range(100, 120)), clip(range(200, 203))]
    excerpts = audio.Excerpts(clips, length=10, batch=64, seed=0)
    starts = set()
    for _ in range(40):
        x, y = excerpts.draw()
        assert x.shape == y.shape == (64, 10)
        assert torch.equal(y, x + 1)
        starts |= set(x[:, 0].tolist())
    assert starts == {*range(0, 40), *range(100, 110)}


def test_excerpts_are_the_same_for_a_seed():
    clips = [clip(range(200))]
    first, second = (audio.Excerpts(clips, 10, 4, seed=3).draw()[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_folders_of_audio_are_read(tmp_path, suffix):
    subtype = "VORBIS" if suffix == ".ogg" else "PCM_16"
    wave = write(tmp_path / f"b{suffix}", 0.5, subtype=subtype)
    write(tmp_path / f"a{suffix}", 0.3, subtype=subtype)
    (tmp_path / "notes.txt").write_text("not audio, and not named like it")
    clips = audio.read_folder(tmp_path)
    assert [c.path.name for c in clips] == [f"a{suffix}", f"b{suffix}"]
    assert [len(c.samples) for c in clips] == [4800, 8000]
    if suffix != ".ogg":
        expected = audio.mu_law_encode(torch.from_numpy(wave).float())
        assert (clips[1].samples.int() - expected.int()).abs().max() <= 1


def test_stereo_is_averaged(tmp_path):
    left, right = np.full(100, 0.5), np.full(100, -0.1)
    sf.write(tmp_path / "a.wav", np.stack([left, right], -1), 16000)
    assert audio.read_clip(tmp_path / "a.wav").samples.unique().tolist() == [
        audio.mu_law_encode(torch.tensor([0.2])).item()
    ]


def test_clips_are_split_by_file():
    clips = [clip(range(9), name=f"{i}.wav") for i in range(30)]
    for count, held_out in ((2, 1), (10, 1), (30, 3)):
        train, test = audio.split_clips(clips[:count])
        assert len(test) == held_out
        assert [c.path for c in train + test] == [c.path for c in clips[:count]]


def test_what_is_written_is_what_was_generated(tmp_path):
    classes = torch.arange(256, dtype=torch.uint8)
    audio.write_wav(tmp_path / "a.wav", classes, 8000)
    assert sf.info(tmp_path / "a.wav").subtype == "PCM_16"
    assert audio.read_clip(tmp_path / "a.wav").sample_rate == 8000
    assert torch.equal(audio.read_clip(tmp_path / "a.wav").samples, classes)


# Counting


def test_baselines_are_cross_entropies():
    """A cycle of four classes is certain for pairs, two bits for single classes, eight for nothing."""
    cycle = clip([3, 9, 200, 41] * 5000)
    found = baselines.count_baselines([cycle], [cycle])
    assert found["uniform"] == 8
    assert found["unigram"] == pytest.approx(2, abs=0.05)
    assert found["bigram"] == pytest.approx(0, abs=0.1)
    noise = clip(torch.randint(256, (200_000,)))
    other = clip(torch.randint(256, (50_000,)))
    assert baselines.count_baselines([noise], [other])["bigram"] == pytest.approx(8, abs=0.3)


# Training and generating


def test_evaluation_is_forward_in_chunks():
    net = model.sashimi(4, 1, d_state=4).double()
    samples = torch.randint(256, (300,))
    x, y = audio.input_and_target(samples)
    whole = F.cross_entropy(net(x[None])[0], y).item() / math.log(2)
    assert training.evaluate(net, [clip(samples)], chunk=77) == pytest.approx(whole, rel=1e-9)
    two = training.evaluate(net, [clip(samples), clip(samples[:100])])
    x, y = audio.input_and_target(samples[:100])
    short = F.cross_entropy(net(x[None])[0], y).item() / math.log(2)
    assert two == pytest.approx((whole * 299 + short * 99) / 398, rel=1e-9)


def test_training_is_the_same_for_a_seed():
    def losses():
        torch.manual_seed(0)
        net = model.sashimi(4, 1, d_state=4, dropout=0.1)
        excerpts = audio.Excerpts([clip(torch.arange(500) % 256)], 40, 2, seed=0)
        return training.train(net, excerpts, 5, lr=1e-2, weight_decay=0.01)

    assert losses() == losses()


def test_a_model_overfits_one_clip_and_plays_it_by_step():
    """Until the most likely next sample is right everywhere; then greedy steps reproduce the excerpt.

    That is the proof that both modes are one model: training knows `forward` alone, generation `step` alone.
    """
    excerpt = audio.read_clip(PIANO / "train/out000.flac").samples[100_000:100_401]
    x, y = audio.input_and_target(excerpt)
    torch.manual_seed(0)
    net = model.sashimi(32, 1, d_state=16, layer="s4")
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    for _ in range(1500):
        logits = net(x[None])
        if torch.equal(logits.argmax(-1)[0], y):
            break
        optimizer.zero_grad()
        training.bits(logits, y[None]).backward()
        optimizer.step()
    else:
        pytest.fail("the model did not learn the excerpt")
    logits, state = generation.prime(net, x[None, :1])
    played = generation.generate(net, logits, state, len(y), temperature=0)
    assert torch.equal(played[0], y)


def test_the_overfitting_test_learns_in_small():
    """Its loss is the plain one, and falls."""
    piano = clip(audio.read_clip(PIANO / "train/out000.flac").samples[100_000:100_500])
    small = {"d_model": 4, "d_state": 4, "blocks": 1}
    results = overfitting.overfit(piano, 8, lr=1e-2, **small)
    assert results[-1].bits < results[0].bits - 0.1
    assert all(r.seconds > 0 and r.peak > 0 for r in results)
    torch.manual_seed(0)
    net = model.sashimi(4, 1, d_state=4, glu=False)
    x, y = audio.input_and_target(piano.samples[None])
    whole = training.bits(net(x), y)
    assert overfitting.whole_clip_bits(net, x, y, chunk=77).item() == pytest.approx(whole.item(), rel=1e-5)
    assert results[0].bits == pytest.approx(whole.item(), rel=1e-5)


def test_generation_is_the_same_for_a_seed_and_follows_the_temperature():
    net = model.sashimi(4, 1, d_state=4)
    logits, state = generation.prime(net, torch.randint(256, (3, 20)))
    draw = [generation.generate(net, logits, state, 30, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert draw[0].shape == (3, 30)
    greedy = generation.generate(net, logits, state, 1, temperature=0)
    assert torch.equal(greedy[:, 0], logits.argmax(-1))
    cold = generation.generate(net, logits, state, 1, temperature=1e-4)
    assert torch.equal(cold, greedy)


def test_a_prompt_and_steps_are_one_sequence():
    """The network's word on the sample after a prompt is the same, however the prompt was read."""
    net = model.sashimi(4, 1, d_state=4).double().eval()
    prompt = torch.randint(256, (1, 37))
    logits, _ = generation.prime(net, prompt)
    assert torch.allclose(logits, net(prompt)[:, -1])


# The program


def test_without_arguments_it_takes_the_embedded_clips(tmp_path):
    done = run(*SMALL, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 clips to train on, 1 held out, 16000 Hz" in done.stdout
    found = {name: float(value) for name, value in re.findall(r"^  (\w+) +([\d.]+)", done.stdout, re.MULTILINE)}
    assert found["uniform"] == 8
    assert found["bigram"] < found["unigram"] < 8
    assert found["network"] > 0
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"real.wav", "primed.wav", "unprimed.wav", "loss.png", "spectrograms.png"}
    assert sf.info(tmp_path / "out/unprimed.wav").frames == 800
    assert sf.info(tmp_path / "out/primed.wav").frames == 1600 + 800
    # The primed clip begins with the real one.
    primed, real = (audio.read_clip(tmp_path / f"out/{n}.wav").samples for n in ("primed", "real"))
    assert torch.equal(primed[:1600], real[:1600])


def test_with_a_folder_of_ones_own(tmp_path):
    """Clips of unequal length, stereo, WAV and FLAC, at another sample rate."""
    data = tmp_path / "data"
    data.mkdir()
    write(data / "a.wav", 0.5, 8000)
    write(data / "b.flac", 0.9, 8000)
    write(data / "c.wav", 0.7, 8000, channels=2)
    done = run(*SMALL, "--data", data, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 clips to train on, 1 held out, 8000 Hz" in done.stdout
    assert sf.info(tmp_path / "out/unprimed.wav").samplerate == 8000


def _empty(data):
    data.mkdir()


def _not_audio(data):
    data.mkdir()
    write(data / "a.wav")
    (data / "b.wav").write_text("this is not audio")


def _mixed(data):
    data.mkdir()
    write(data / "a.wav", rate=16000)
    write(data / "b.wav", rate=44100)


def _single(data):
    data.mkdir()
    write(data / "a.wav")


def _short(data):
    data.mkdir()
    write(data / "a.wav", 0.01)
    write(data / "b.wav", 0.01)


def _silent(data):
    data.mkdir()
    sf.write(data / "a.wav", np.zeros(0), 16000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: None, r"data is not a folder"),
        (_empty, r"data holds no audio; put .wav, .flac, .ogg files into it"),
        (_not_audio, r"b.wav cannot be read as audio .*; remove it from the folder"),
        (_mixed, r"mixes sample rates: a.wav has 16000 Hz and b.wav 44100 Hz; resample them to one"),
        (_single, r"holds one clip; at least two are needed, one of them held out"),
        (
            _short,
            r"every clip is shorter than an excerpt of 256 samples .*the longest has 160.*lower the excerpt length",
        ),
        (_silent, r"a.wav holds 0 samples; remove it from the folder"),
    ],
    ids=["missing", "empty", "not audio", "mixed rates", "one clip", "short clips", "no samples"],
)
def test_bad_data_gets_one_sentence(tmp_path, make, message):
    make(tmp_path / "data")
    done = run(*SMALL, "--data", tmp_path / "data", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(f"^sashimi_youtubemix: .*{message}", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
