"""The parts of the SaShiMi example: network, audio, baselines, training, evaluation, generation."""

import math

import numpy as np
import pytest
import soundfile as sf
import torch
from torch.nn import functional as F

from example import CPU, PIANO, clip, write
from sashimi import audio, baselines, config, evaluation, generation, measures, model, overfitting, storage, training
from sashimi.problems import Problem
from ssmkit import S4, S4D, Residual
from ssmkit.testing import assert_modes_agree, relative_error

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


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_network_is_one_graph_forward_and_backward():
    torch.compiler.reset()
    net = model.sashimi(4, 1, d_state=4, pool=(2, 2))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    u = torch.randint(256, (2, 12))
    results = []
    for run in (net, compiled):
        y = run(u)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-5


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


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("kind", ["mu-law", "linear"])
def test_quantisation_is_inverted_to_within_half_a_step(kind, bits):
    quantizer = audio.Quantizer(kind, bits)
    top = 2**bits - 1
    x = torch.linspace(-1, 1, 100_001, dtype=torch.double)
    q = quantizer.encode(x)
    assert (q.min(), q.max()) == (0, top)
    assert quantizer.encode(torch.zeros(1)).item() == quantizer.silence
    classes = torch.arange(2**bits)
    assert torch.equal(quantizer.encode(quantizer.decode(classes)), classes)

    def scale(v):
        return v if kind == "linear" else v.sign() * torch.log1p(top * v.abs()) / math.log1p(top)

    # float32 samples: near silence 16-bit mu-law has steps close to their rounding.
    assert (scale(quantizer.decode(q).double()) - scale(x)).abs().max() <= 1 / top + 1e-6
    assert quantizer.encode(torch.tensor([-7.0, 7.0])).tolist() == [0, top]


def test_eight_bit_mu_law_is_the_usual_one():
    """https://en.wikipedia.org/wiki/M-law_algorithm, 255 steps between 256 classes."""
    x = torch.tensor([-1.0, -0.1, 0.0, 0.01, 0.5, 1.0])
    y = [math.copysign(math.log(1 + 255 * abs(v)) / math.log(256), v) for v in x.tolist()]
    assert audio.Quantizer().encode(x).tolist() == [math.floor((v + 1) / 2 * 255 + 0.5) for v in y]


@pytest.mark.parametrize("bits", [0, 17])
def test_samples_have_1_to_16_bits(bits):
    with pytest.raises(Problem, match="1 to 16 bits"):
        audio.Quantizer(bits=bits)


# Files


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_recordings_are_read_by_excerpt(tmp_path, suffix):
    wave = write(tmp_path / f"a{suffix}", 0.5, subtype="VORBIS" if suffix == ".ogg" else "PCM_16")
    recording = audio.open_recording(tmp_path / f"a{suffix}")
    assert (len(recording), recording.sample_rate) == (8000, 16000)
    whole = recording.read()
    if suffix != ".ogg":
        assert np.abs(whole.numpy() - wave).max() < 1e-4
    for start, stop in ((0, 8000), (1, 2), (123, 4567), (7990, 9000), (8000, 8001)):
        assert torch.allclose(recording.read(start, stop), whole[start:stop], atol=1e-6)
    assert torch.equal(torch.cat(list(recording.chunks(777))), whole) or suffix == ".ogg"


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_recordings_are_resampled(tmp_path, rate):
    """The tone keeps its frequency, and an excerpt does not depend on other reads."""
    t = np.arange(rate) / rate
    sf.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * t), rate, subtype="FLOAT")
    recording = audio.open_recording(tmp_path / "a.wav", 16000)
    assert len(recording) == 16000
    whole = recording.read().numpy()
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(whole - expected)[200:-200].max() < 1e-3
    for start, stop in ((0, 300), (5001, 5002), (7777, 12345), (15_900, 16_000)):
        found = recording.read(start, stop).numpy()
        assert np.abs(found - whole[start:stop]).max() < 1e-3


def test_a_recording_is_not_held_in_memory(tmp_path):
    write(tmp_path / "a.flac", 0.5)
    recording = audio.open_recording(tmp_path / "a.flac")
    assert not any(isinstance(value, torch.Tensor) for value in vars(recording).values())
    write(tmp_path / "a.flac", 0.5, seed=1)
    other = recording.read()
    write(tmp_path / "a.flac", 0.5, seed=2)
    assert not torch.equal(recording.read(), other)


def test_stereo_is_averaged(tmp_path):
    left, right = np.full(100, 0.5), np.full(100, -0.1)
    sf.write(tmp_path / "a.wav", np.stack([left, right], -1), 16000, subtype="FLOAT")
    assert torch.allclose(audio.open_recording(tmp_path / "a.wav").read(), torch.tensor(0.2))


def test_a_wav_file_is_whole_after_every_write(tmp_path):
    samples = torch.linspace(-1, 1, 1000)
    with audio.WavWriter(tmp_path / "a.wav", 8000) as file:
        for part in samples.split(300):
            file.write(part)
            found, rate = sf.read(tmp_path / "a.wav", dtype="float32")
            assert rate == 8000
            assert np.abs(found - samples.numpy()[: len(found)]).max() < 1e-4
    assert len(found) == 1000
    assert sf.info(tmp_path / "a.wav").subtype == "PCM_16"


def test_a_damaged_file_is_named(tmp_path):
    write(tmp_path / "a.flac", 2)
    recording = audio.open_recording(tmp_path / "a.flac")
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(data[: len(data) // 2])
    with pytest.raises(Problem, match=r"a\.flac .*(damaged|cannot be read)"):
        recording.read(20_000, 30_000)


def test_folders_are_split_by_file(tmp_path):
    for count, held_out in ((2, 1), (10, 1), (30, 3)):
        folder = tmp_path / str(count)
        (folder / "deeper").mkdir(parents=True)
        for i in range(count):
            write(folder / ("deeper" if i % 2 else ".") / f"{i:02}.wav", 0.01)
        (folder / "notes.txt").write_text("not audio, and not named like it")
        split = audio.open_split(folder, 16000)
        assert (len(split.training), len(split.held_out)) == (count - held_out, held_out)
        paths = [r.path for r in split.training + split.held_out]
        assert paths == sorted(set(paths))
        assert not split.notice


def test_a_folder_may_bring_its_own_split(tmp_path):
    for name in ("train/a.wav", "train/b.wav", "heldout/c.wav", "heldout/d.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, 0.1, rate=8000 if name == "train/b.wav" else 16000)
    split = audio.open_split(tmp_path, 16000)
    assert [r.path.name for r in split.held_out] == ["c.wav", "d.wav"]
    assert split.notice == "1 of 4 files are resampled from 8,000 Hz to 16,000 Hz"


def excerpts(clips, length, seed=0, pad=False):
    return audio.Excerpts(clips, audio.Quantizer("linear"), length, seed, pad=pad)


def test_excerpts_come_from_everywhere_and_never_cross_files(tmp_path):
    clips = [
        clip(tmp_path / f"{i}.wav", values) for i, values in enumerate((range(50), range(100, 120), range(200, 203)))
    ]
    starts = set()
    for step in range(40):
        x, y = excerpts(clips, 10).draw(step, 64)
        assert x.shape == y.shape == (64, 10)
        assert torch.equal(y, x + 1)
        starts |= set(x[:, 0].tolist())
    assert starts == {*range(0, 40), *range(100, 110)}


def test_a_step_has_the_same_excerpts_in_every_process(tmp_path):
    clips = [clip(tmp_path / "a.wav", range(200))]
    x, y = excerpts(clips, 10, seed=3).draw(7, 6)
    other = excerpts(clips, 10, seed=3)
    other.draw(0, 6)
    halves = [other.draw(7, 6, 0, 3), other.draw(7, 6, 3, 6)]
    assert torch.equal(torch.cat([h[0] for h in halves]), x)
    assert torch.equal(torch.cat([h[1] for h in halves]), y)
    assert not torch.equal(excerpts(clips, 10, seed=4).draw(7, 6)[0], x)
    assert not torch.equal(other.draw(8, 6)[0], x)


def test_short_clips_are_padded_with_silence_that_does_not_count(tmp_path):
    clips = [clip(tmp_path / "a.wav", range(1, 6)), clip(tmp_path / "b.wav", range(1, 30))]
    found = excerpts(clips, 10, pad=True)
    rows = {tuple(x.tolist()): y.tolist() for x, y in zip(*found.draw(0, 200), strict=True)}
    assert rows[(1, 2, 3, 4, 5, 128, 128, 128, 128, 128)] == [2, 3, 4, 5, *[audio.IGNORED] * 6]
    assert all(audio.IGNORED not in y for x, y in rows.items() if x[-1] != 128)
    assert len(excerpts(clips, 10).recordings) == 1
    with pytest.raises(Problem, match=r"every clip is shorter than an excerpt of 50 samples .*longest has 29.*--pad"):
        excerpts(clips, 50)


# Baselines


def test_baselines_are_cross_entropies(tmp_path):
    """A cycle of four classes costs zero bits with pairs, two with single classes, eight with uniform ones."""
    linear = audio.Quantizer("linear")
    cycle = clip(tmp_path / "a.wav", [3, 9, 200, 41] * 5000)
    found = baselines.measure_baselines([cycle], [cycle], linear)
    assert found["uniform"] == 8
    assert found["unigram"] == pytest.approx(2, abs=0.05)
    assert found["bigram"] == pytest.approx(0, abs=0.1)
    noise = clip(tmp_path / "b.wav", torch.randint(256, (200_000,)))
    other = clip(tmp_path / "c.wav", torch.randint(256, (50_000,)))
    assert baselines.measure_baselines([noise], [other], linear)["bigram"] == pytest.approx(8, abs=0.3)
    many = baselines.measure_baselines([noise], [other], audio.Quantizer(bits=14))
    assert set(many) == {"uniform", "unigram", "adaptive"}


def naive_filter_bits(found, samples, classes, quantizer):
    """The definition, sample by sample; and the probabilities of all classes."""
    everything = torch.arange(quantizer.classes)
    edges = [quantizer.decode(everything[1:] - 0.5).double().numpy(), [math.inf]]
    high = np.concatenate(edges)
    low = np.concatenate([[-math.inf], high[:-1]])
    least = float(quantizer.decode(quantizer.silence + torch.arange(-1, 2)).diff().min())
    x = np.concatenate([np.zeros(found.order), samples])
    w, mean, bits = np.zeros(found.order), 0.0, []
    for k, c in enumerate(classes):
        u = x[k : k + found.order]
        predicted, scale = w @ u, found.width * max(mean, least / 8)
        p = 0.5 * np.tanh((high - predicted) / scale / 2) - 0.5 * np.tanh((low - predicted) / scale / 2)
        assert p.sum() == pytest.approx(1)
        bits.append(-math.log2(p[c]) if p[c] > 1e-9 else math.nan)
        error = x[k + found.order] - predicted
        w = w + found.rate * error * u / (found.order * least**2 + u @ u)
        mean = found.memory * mean + (1 - found.memory) * abs(error)
    return np.array(bits)


@pytest.mark.parametrize("kind", ["mu-law", "linear"])
def test_the_adaptive_filter_agrees_with_its_definition(tmp_path, kind, monkeypatch):
    quantizer = audio.Quantizer(kind)
    # From silence to samples that are clipped.
    wave = write(tmp_path / "a.wav", 0.1) * np.linspace(0, 4, 1600)
    wave[:400] = 0
    sf.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    recording = audio.open_recording(tmp_path / "a.wav")
    classes = quantizer.encode(recording.read())
    found = baselines.AdaptiveFilter(0.05, 0.9, 0.8, order=5)
    expected = naive_filter_bits(found, quantizer.decode(classes).double().numpy(), classes.tolist(), quantizer)[1:]
    # The naive formula cannot compute probabilities smaller than rounding errors.
    assert np.isfinite(expected).mean() > 0.9
    assert {0, 255} <= set(classes.tolist())

    def total(samples):
        return found.bits([recording], quantizer, samples) * (samples - 1)

    monkeypatch.setattr(baselines, "_WINDOW", 1)
    edges = [k for k in range(1400, 1600) if classes[k] in (0, 255) and np.isfinite(expected[k - 1])]
    for k in (300, 301, 500, 900, edges[0], edges[-1]):
        assert total(k + 1) - total(k) == pytest.approx(expected[k - 1], rel=1e-6, abs=1e-6)
    # The first sample does not count.
    assert total(2) == pytest.approx(expected[0], rel=1e-6)
    whole = total(900)
    monkeypatch.setattr(baselines, "_WINDOW", 700)
    assert total(900) == pytest.approx(whole, rel=1e-9)


def test_the_adaptive_filter_reads_recordings_of_any_length_in_parallel(tmp_path):
    write(tmp_path / "a.wav", 0.1, seed=1)
    write(tmp_path / "b.wav", 0.04, seed=2)
    long, short = (audio.open_recording(tmp_path / f"{name}.wav") for name in "ab")
    found, quantizer = baselines.AdaptiveFilter(), audio.Quantizer()
    apart = [found.bits([recording], quantizer) for recording in (long, short)]
    assert found.bits([long, short], quantizer) == pytest.approx((apart[0] * 1599 + apart[1] * 639) / 2238, rel=1e-9)
    tone = 0.4 * np.sin(2 * np.pi * 220 * np.arange(16000) / 16000)
    sf.write(tmp_path / "tone.wav", tone, 16000)
    clean = audio.open_recording(tmp_path / "tone.wav")
    # Two coefficients predict a sine: only its quantisation is left, at most two bits.
    assert found.bits([clean], quantizer) < 3.5
    assert baselines.tune_filter([clean], quantizer).bits([clean], quantizer) <= found.bits([clean], quantizer)
    assert found.bits([long], quantizer) > 4


# Tones


def tones(parts, seconds=4.0, rate=8000):
    """Sines over a floor of noise, as in every recording, which hides the sidelobes of the spectra's window."""
    t = np.arange(int(seconds * rate)) / rate
    floor = 5e-3 * np.random.default_rng(0).standard_normal(len(t))
    return sum((level * np.sin(2 * np.pi * f * t + f) for f, level in parts), floor)


def test_measures_count_partials():
    four = [(220, 0.02), (445, 0.01), (661, 0.01), (1500, 0.01)]
    found = measures.measure(tones(four), 8000)
    assert found.partials == pytest.approx(4, abs=0.2)
    assert found.life == pytest.approx(3.9, abs=0.1)
    assert found.share > 0.9
    again = measures.measure(tones(four, rate=16000), 16000)
    assert again.partials == pytest.approx(found.partials, abs=0.2)
    # Peaks that are too low, too high, or more than 40 dB below the rest do not count.
    other = measures.measure(tones([(30, 0.02), (220, 0.02), (445, 0.0001), (2500, 0.02)]), 8000)
    assert other.partials == pytest.approx(1, abs=0.2)


def test_measures_distinguish_tones_from_noise():
    noise = 0.1 * np.random.default_rng(0).standard_normal(32000)
    found = measures.measure(noise, 8000)
    assert found.partials < 0.5
    assert found.life < 0.1
    assert found.share < 0.1
    # As much energy as the noise has between 60 and 1,500 of its 4,000 Hz.
    mixed = measures.measure(noise + tones([(500, 0.1 * math.sqrt(2 * 1440 / 4000))]), 8000)
    assert mixed.share == pytest.approx(0.5, abs=0.05)
    assert mixed.partials == pytest.approx(1, abs=0.3)


def melody(seconds, pitches):
    return np.concatenate([tones([(f, 0.02)], seconds) for f in pitches])


PITCHES = (220, 440, 311, 523, 277, 659, 247, 494)


def test_measures_show_how_long_tones_last():
    for seconds in (0.4, 1.0):
        found = measures.measure(melody(seconds, PITCHES), 8000)
        assert found.life == pytest.approx(seconds, abs=0.15)
        assert found.partials == pytest.approx(1, abs=0.3)
    # Most peaks are those of short notes, though one tone lasts for all of the clip.
    drone = measures.measure(melody(0.4, PITCHES) + tones([(1100, 0.02)], 3.2), 8000)
    assert drone.life < 0.6


def test_a_short_peak_is_no_partial():
    plucked = np.concatenate([np.append(tones([(f, 0.02)], 0.1), tones([], 0.3)) for f in PITCHES])
    assert measures.measure(plucked, 8000).partials < 0.1
    glide = np.sin(2 * np.pi * np.cumsum(np.linspace(300, 700, 8000)) / 8000)
    assert measures.measure(0.02 * glide + tones([], 1.0), 8000).partials < 0.5


def test_a_partial_may_be_missed_once():
    once, twice = ([[100.0], [101.0], *[[]] * missed, [100.5], [100.5]] for missed in (1, 2))
    assert [partial.path for partial in measures._follow(once)] == [[(0, 100.0), (1, 101.0), (3, 100.5), (4, 100.5)]]
    assert sorted(len(partial.path) for partial in measures._follow(twice)) == [2, 2]
    # The partial continues with the closest peak; a peak too far away is another partial.
    assert sorted(len(partial.path) for partial in measures._follow([[100.0], [101.5, 99.5, 300.0]])) == [1, 1, 2]


def test_a_much_weaker_peak_is_no_partial():
    """46 dB below, but 16 dB above the noise."""
    loud = measures.measure(tones([(220, 0.5)]), 8000)
    assert measures.measure(tones([(220, 0.5), (1500, 0.0025)]), 8000).partials < loud.partials + 0.2
    assert measures.measure(tones([(1500, 0.0025)]), 8000).partials > 0.5


def test_measures_show_a_burst():
    quiet = tones([(220, 0.01)])
    burst = quiet.copy()
    fading = np.exp(-np.arange(16000) / 4000) * np.random.default_rng(0).standard_normal(16000)
    burst[16000:] += 0.5 * fading
    assert measures.measure(quiet, 8000).rise < 5
    assert measures.measure(burst, 8000).rise > 25
    assert measures.measure(burst[::-1], 8000).rise < 8


@pytest.mark.parametrize("samples", [np.zeros(1), np.zeros(5000), np.full(5000, 0.5)])
def test_measures_of_silence_are_zero(samples):
    assert measures.measure(samples, 8000) == measures.Measures(0, 0, 0, 0)


# Training and measuring


def test_evaluation_in_windows_gives_the_same_as_forward(tmp_path):
    net = model.sashimi(4, 1, d_state=4).double()
    linear = audio.Quantizer("linear")
    samples = torch.randint(256, (300,))
    recording = clip(tmp_path / "a.wav", samples)
    x, y = audio.input_and_target(samples)
    whole = F.cross_entropy(net(x[None])[0], y).item() / math.log(2)
    # The loss is computed in float32.
    assert evaluation.evaluate(net, [recording], linear) == pytest.approx(whole, rel=1e-6)
    assert evaluation.evaluate(net, [recording], linear, window=77) == pytest.approx(whole, rel=1e-6)
    short = clip(tmp_path / "b.wav", samples[:100])
    part = F.cross_entropy(net(x[None, :99])[0], y[:99]).item() / math.log(2)
    both = evaluation.evaluate(net, [recording, short], linear)
    assert both == pytest.approx((whole * 299 + part * 99) / 398, rel=1e-6)
    assert evaluation.evaluate(net, [recording], linear, 100) == pytest.approx(part, rel=1e-6)
    assert evaluation.evaluate_by_step(net, recording, linear, 99) == pytest.approx(part, rel=1e-6)


def settings(**changes):
    small = {"d_model": 4, "d_state": 4, "blocks": 1, "excerpt": 40, "batch": 2, "steps": 5, "lr": 1e-2}
    return config.Settings(**{**small, **changes})


def trainer(tmp_path, **changes):
    recording = clip(tmp_path / "a.wav", torch.arange(500) % 256)
    return training.Trainer(settings(**changes), audio.Split([recording], [recording]), CPU)


def losses(found, tmp_path, steps=5, name="run"):
    run = storage.Run(tmp_path / name)
    run.open(found.settings)
    training.train(found, run, every=2)
    return [line["bits"] for line in run.history()]


def test_training_is_the_same_for_a_seed_and_falls(tmp_path):
    first, second = (losses(trainer(tmp_path, dropout=0.1), tmp_path, name=n) for n in "ab")
    assert first == second
    assert len(first) == 5
    long = losses(trainer(tmp_path, steps=40), tmp_path, name="c")
    assert np.mean(long[-5:]) < long[0] - 0.5


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"recompute": True}])
def test_memory_is_saved_without_changing_the_result(tmp_path, changes):
    plain = losses(trainer(tmp_path), tmp_path, name="a")
    assert losses(trainer(tmp_path, **changes), tmp_path, name="b") == pytest.approx(plain, rel=1e-5)


def test_bfloat16_trains(tmp_path):
    plain = losses(trainer(tmp_path), tmp_path, name="a")
    assert losses(trainer(tmp_path, bf16=True), tmp_path, name="b") == pytest.approx(plain, rel=0.02)


def test_learning_rate_schedule():
    def rates(schedule):
        wanted = settings(steps=100, warmup=0.1, schedule=schedule)
        return [wanted.rate(k) for k in range(100)]

    cosine, constant, tail = map(rates, ("cosine", "constant", "tail"))
    assert cosine[0] == pytest.approx(0.1)
    assert max(cosine) == cosine[10] == 1
    assert cosine[55] == pytest.approx(0.5)
    assert 0 < cosine[99] < 0.01
    assert constant[:10] == cosine[:10]
    assert set(constant[10:]) == {1}
    assert tail[:76] == constant[:76]
    assert tail[75:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * k / 25) for k in range(25)])


def test_a_run_continues_with_another_schedule_that_agrees_so_far(tmp_path):
    """And gives the same as a run with this schedule from the beginning."""
    whole = losses(trainer(tmp_path, steps=16, schedule="tail"), tmp_path, name="whole")
    assert losses(trainer(tmp_path, steps=16, schedule="constant"), tmp_path, name="constant") != whole
    run = storage.Run(tmp_path / "run")
    found = trainer(tmp_path, steps=16, schedule="constant")
    run.open(found.settings)

    def stop(step, loss):
        if step == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(found, run, every=2, report=stop)
    message = (
        r"run has made 10 steps with the schedule constant, and tail differs from it after step 7; "
        r"give --schedule constant, more --steps, or another --out"
    )
    with pytest.raises(Problem, match=message):
        run.open(settings(steps=8, schedule="tail"))
    with pytest.raises(Problem, match="cosine differs from it after step 2;"):
        run.open(settings(steps=16, schedule="cosine"))
    assert losses(trainer(tmp_path, steps=16, schedule="tail"), tmp_path, name="run") == whole


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"recompute": True}])
def test_a_new_run_starts_from_a_trained_model(tmp_path, options):
    """And a run that continues takes its checkpoint, not that model."""
    first = trainer(tmp_path, steps=4)
    losses(first, tmp_path, name="first")
    start = tmp_path / "first" / storage.MODEL
    expected = {name: x.clone() for name, x in storage.load_model(start).model.state_dict().items()}
    found = trainer(tmp_path, steps=4, init_from=start, lr=1e-12, ssm_lr=1e-12, weight_decay=0.0, **options)
    losses(found, tmp_path, name="second")
    for theirs, ours in zip(expected.values(), found.best.state_dict().values(), strict=True):
        assert torch.allclose(theirs, ours, rtol=0, atol=1e-9)
    saved = storage.load_model(tmp_path / "second")
    assert saved.settings.init_from is None
    start.unlink()
    more = trainer(tmp_path, steps=6, init_from=start, lr=1e-12, ssm_lr=1e-12, weight_decay=0.0, **options)
    assert len(losses(more, tmp_path, name="second")) == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [("d_model", 8), ("d_state", 8), ("blocks", 2), ("layer", "s4"), ("glu", True), ("pool", (2, 2)), ("bits", 7)],
)
def test_a_model_to_start_from_has_the_same_architecture(tmp_path, name, value):
    losses(trainer(tmp_path, steps=2), tmp_path, name="first")
    found = trainer(tmp_path, steps=2, init_from=tmp_path / "first", **{name: value})
    with pytest.raises(Problem, match=rf"first was trained with --{name.replace('_', '-')} .*; give the same"):
        losses(found, tmp_path, name="second")


def test_noise_changes_the_input_and_ends_before_the_run(tmp_path):
    """By at most this many classes, within their range, differently in each step; targets do not change."""
    found = trainer(tmp_path, steps=8, noise=3, noise_until=0.5)
    x = torch.tensor([[0, 1, 100, 255] * 50])
    seen = []
    found.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for step in (0, 0, 3, 4, 7):
        found.step(step, x, x)
    first, again, second, *last = seen
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert all(torch.equal(read, x) for read in last)
    inner = torch.cat([first, second])[:, 2::4] - 100
    assert set(inner.flatten().tolist()) == set(range(-3, 4))
    assert (first - x).abs().max() == 3
    assert (first.min(), first.max()) == (0, 255)
    without = losses(trainer(tmp_path), tmp_path, name="without")
    assert losses(trainer(tmp_path, noise=2, noise_until=0.0), tmp_path, name="ended") == without
    assert losses(trainer(tmp_path, noise=2), tmp_path, name="with") != without


def test_state_space_parameters_have_their_own_learning_rate(tmp_path):
    """With a tiny rate they stay the same, and the others change."""
    found = trainer(tmp_path, ssm_lr=1e-12, weight_decay=0.0)
    before = {name: x.clone() for name, x in found.model.state_dict().items()}
    found.step(4, *found.excerpts.draw(0, 2))
    moved = {name for name, x in found.model.state_dict().items() if (x - before[name]).abs().max() > 1e-6}
    still = {name for name in before if name.split(".")[-1] in S4D.SSM_PARAMETERS}
    assert still
    assert moved == set(before) - still


def test_averaged_weights(tmp_path):
    """After k steps they agree with the recursion of the definition, and the model file has them."""
    found = trainer(tmp_path, ema=0.9)
    x, y = found.excerpts.draw(0, 2)
    expected = None
    for k in range(4):
        found.step(k, x, y)
        now = found.model.layers[-1].module.weight.detach().clone()
        expected = now if expected is None else 0.9 * expected + 0.1 * now
    assert torch.allclose(found.best.layers[-1].module.weight, expected, atol=1e-6)
    assert found.best is not found.model


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_continues_bit_for_bit(tmp_path, ema):
    whole = losses(trainer(tmp_path, steps=7, ema=ema, dropout=0.1), tmp_path, name="whole")
    run = storage.Run(tmp_path / "parts")
    found = trainer(tmp_path, steps=7, ema=ema, dropout=0.1)
    run.open(found.settings)

    def stop(step, loss):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(found, run, every=2, report=stop)
    assert run.state["step"] == 4
    assert [line["step"] for line in run.history()] == [1, 2, 3, 4, 5]
    again = storage.Run(tmp_path / "parts")
    started = []
    training.train(trainer(tmp_path, steps=7, ema=ema, dropout=0.1), again, every=2, begin=started.append)
    assert started == [4]
    assert [line["bits"] for line in again.history()] == whole
    models = [(tmp_path / name / storage.MODEL).read_bytes() for name in ("whole", "parts")]
    assert models[0] == models[1]
    assert len(list((tmp_path / "parts").glob("checkpoint-*"))) == 1


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    found = trainer(tmp_path, steps=9)
    run = storage.Run(tmp_path / "run")
    run.open(found.settings)

    def poison(step, loss):
        if step == 5:
            with torch.no_grad():
                found.model.layers[-1].module.bias[0] = math.nan

    with pytest.raises(Problem, match=r"the loss is nan at step 6; lower --lr"):
        training.train(found, run, every=2, report=poison)
    step, tensors = run.load()
    assert step == 4
    assert all(x.isfinite().all() for x in tensors.values())


def test_a_batch_is_divided_evenly(tmp_path):
    with pytest.raises(Problem, match=r"a batch of 3 cannot be shared by 1 processes in 2 parts"):
        trainer(tmp_path, batch=3, accumulate=2)


# Storage


def test_settings_are_read_as_they_were_written(tmp_path):
    from pathlib import Path

    for name in config.PRESETS:
        wanted = config.preset(name)
        assert config.from_json(config.to_json(wanted), tmp_path) == wanted
    odd = settings(data=Path("x/y"), pool=(2, 3, 4), quantization="linear")
    assert config.from_json(config.to_json(odd), tmp_path) == odd


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a settings file"),
        ('{"width": 3}', "unknown settings width"),
        ('{"lr": "high"}', "lr cannot be 'high'"),
    ],
)
def test_foreign_settings_are_refused(text, message, tmp_path):
    with pytest.raises(Problem, match=message):
        config.from_json(text, tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    import errno

    path = tmp_path / "a.safetensors"
    storage.write_tensors(path, {"x": torch.ones(3)})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(Problem, match=r"a.safetensors cannot be written \(No space left on device\)"):
        storage.write_tensors(path, {"x": torch.zeros(3)})
    assert storage.read_tensors(path)[0]["x"].tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_model_files_hold_all_that_is_needed(tmp_path):
    net = settings().model()
    with torch.no_grad():
        net.layers[0].module.weight.add_(1)
    storage.save_model(tmp_path / "m.safetensors", net.state_dict(), settings(data=tmp_path), 12)
    assert str(tmp_path).encode() not in (tmp_path / "m.safetensors").read_bytes()
    trained = storage.load_model(tmp_path / "m.safetensors")
    assert (trained.step, trained.settings) == (12, settings())
    x = torch.randint(256, (1, 20))
    assert torch.equal(trained.model(x), net.eval()(x))


def test_foreign_model_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(Problem, match="does not exist"):
        storage.load_model(path)
    path.write_text("no tensors")
    with pytest.raises(Problem, match="cannot be read as safetensors"):
        storage.load_model(path)
    storage.write_tensors(path, {"x": torch.ones(2)})
    with pytest.raises(Problem, match="does not say what network it belongs to"):
        storage.load_model(path)
    storage.save_model(path, settings(d_model=8).model().state_dict(), settings(), 0)
    with pytest.raises(Problem, match="another architecture"):
        storage.load_model(path)


# Overfitting


def test_a_model_overfits_one_clip_and_generates_it_by_step():
    """Until the most likely next sample is right everywhere; then greedy steps reproduce the excerpt.

    This shows that both modes are the same model: training uses only `forward`, generation only `step`.
    """
    recording = audio.open_recording(PIANO / "train/take01-minute1.flac")
    x, y = audio.input_and_target(audio.Quantizer().encode(recording.read(100_000, 100_401)))
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
    streams = generation.prime(net, x[:1])
    played = played_by(generation.StepEngine(net), streams, len(y), generation.Sampling(0))
    assert torch.equal(played[0], y)


def test_the_overfitting_test_learns_at_small_size(tmp_path):
    """Its loss is the usual one, and falls."""
    samples = audio.open_recording(PIANO / "train/take01-minute1.flac").read(100_000, 100_500)
    sf.write(tmp_path / "a.wav", samples.numpy(), 16000)
    recording = audio.open_recording(tmp_path / "a.wav")
    results = overfitting.overfit(recording, 8, lr=1e-2, d_model=4, d_state=4, blocks=1)
    assert results[-1].bits < results[0].bits - 0.1
    assert all(r.seconds > 0 and r.peak > 0 for r in results)
    torch.manual_seed(0)
    net = model.sashimi(4, 1, d_state=4, glu=False)
    x, y = audio.input_and_target(audio.Quantizer().encode(recording.read())[None])
    assert results[0].bits == pytest.approx(training.bits(net(x), y).item(), rel=1e-5)


# Generating


def played_by(engine, streams, length, sampling=None, block=800):
    parts = generation.generate(engine, streams, length, sampling or generation.Sampling(), block=block)
    return torch.cat([classes for classes, _ in parts], dim=1)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return model.sashimi(4, 1, d_state=4).eval()


def test_generation_is_the_same_for_a_seed_and_in_blocks_of_any_size(net):
    engine, prompt = generation.StepEngine(net), torch.randint(256, (20,))
    first, second, other = (played_by(engine, generation.prime(net, prompt, 3, seed), 30) for seed in (1, 1, 2))
    assert first.shape == (3, 30)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(played_by(engine, generation.prime(net, prompt, 3, 1), 30, block=7), first)


def test_the_likelihood_of_what_was_generated_is_that_of_forward(net):
    prompt = torch.randint(256, (13,))
    streams = generation.prime(net, prompt, 2, 0)
    sampling = generation.Sampling(0.8, top_k=20)
    classes, bits = zip(*generation.generate(generation.StepEngine(net), streams, 40, sampling, block=9), strict=True)
    whole = torch.cat([prompt.expand(2, -1), *classes], dim=1)
    x, y = audio.input_and_target(whole)
    nll = F.cross_entropy(net(x).mT, y, reduction="none") / math.log(2)
    assert torch.allclose(torch.cat(bits, dim=1), nll[:, len(prompt) - 1 :], atol=1e-4)


def test_drawing():
    """The frequencies are those of the softmax, with top-k, top-p and temperature."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(100_000, 4)
    uniform = (torch.arange(100_000, dtype=torch.double) + 0.5) / 100_000

    def frequencies(**options):
        return (torch.bincount(generation.Sampling(**options).draw(logits, uniform), minlength=4) / 100_000).tolist()

    assert frequencies() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=1e-4)
    assert frequencies(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=1e-4)
    assert frequencies(top_k=9) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=1e-4)
    assert frequencies(top_p=0.79) == pytest.approx([0.625, 0.375, 0, 0], abs=1e-4)
    assert frequencies(top_p=0.81) == pytest.approx([50 / 95, 30 / 95, 15 / 95, 0], abs=1e-4)
    assert frequencies(top_p=1e-6) == [1, 0, 0, 0]
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert frequencies(temperature=0.5) == pytest.approx((squares / squares.sum()).tolist(), abs=1e-4)
    assert frequencies(temperature=0) == [1, 0, 0, 0]
    extremes = generation.Sampling().draw(logits[:2], torch.tensor([0.0, 1 - 1e-16], dtype=torch.double))
    assert extremes.tolist() == [0, 3]


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}])
def test_bad_sampling_is_refused(options):
    with pytest.raises(Problem, match=next(iter(options)).replace("_", "-")):
        generation.Sampling(**options)


def test_a_generation_continues_from_its_saved_state(net, tmp_path):
    engine = generation.StepEngine(net)
    whole = played_by(engine, generation.prime(net, prompt := torch.randint(256, (5,)), 2, 9), 50)
    streams = generation.prime(net, prompt, 2, 9)
    first = played_by(engine, streams, 23)
    generation.save_streams(tmp_path / "s", streams, net)
    again = generation.load_streams(tmp_path / "s", net)
    assert again.samples == 23
    assert torch.equal(torch.cat([first, played_by(engine, again, 27)], dim=1), whole)
    with torch.no_grad():
        net.layers[-1].module.bias.add_(1)
    with pytest.raises(Problem, match="another model"):
        generation.load_streams(tmp_path / "s", net)
    storage.write_tensors(tmp_path / "t", {"x": torch.ones(2)})
    with pytest.raises(Problem, match="not the saved state"):
        generation.load_streams(tmp_path / "t", net)


def test_a_prompt_and_steps_are_one_sequence(net):
    """The logits after a prompt do not depend on how the prompt was read."""
    net = net.double()
    prompt = torch.randint(256, (37,))
    for window in (5, 100):
        streams = generation.prime(net, prompt, 2, window=window)
        assert torch.allclose(streams.logits, net(prompt[None])[:, -1].expand(2, -1))


def test_any_engine_works(net):
    """The generation loop uses only the method `run` of an engine."""

    class Constant:
        def run(self, logits, state, uniform, sampling):
            classes = (uniform * 4).long()
            return generation.Block(classes, torch.full_like(uniform, 2.0), logits, state)

    streams = generation.prime(net, torch.randint(256, (3,)), 2)
    made = played_by(Constant(), streams, 100)
    assert made.shape == (2, 100)
    assert set(made.flatten().tolist()) == {0, 1, 2, 3}
    assert streams.samples == 100
