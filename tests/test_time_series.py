"""examples/time_series.py: data, training, model files and the program."""

import math

import numpy as np
import pytest
import torch

import example  # noqa: F401  (makes the examples importable)
from sashimi.problems import Problem
from series import baselines, data, models, training
from series.data import Classification, Labelled
from series.models import Classifier, Sizes

import time_series as program  # isort: skip

SMALL = training.Settings(Sizes(d_model=16, blocks=1, d_state=8), steps=60, batch=8)


def waves(count, seed):
    """Noisy waves of two frequencies and any length."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    series = []
    for label in labels.tolist():
        n, phase = int(torch.randint(30, 90, (), generator=random)), float(torch.rand((), generator=random))
        t = torch.arange(n)[:, None]
        wave = torch.sin(2 * math.pi * (t / (8, 14)[label] + phase))
        series.append(wave + 0.1 * torch.randn(n, 1, generator=random))
    return Labelled(series, labels)


@pytest.fixture
def two():
    return Classification(waves(40, 0), waves(30, 1), ("fast", "slow"))


def test_folds_split_the_training_data_with_the_same_share_of_each_class(two):
    seen = []
    for number in range(4):
        part = two.fold(number, 4)
        assert len(part.train) == 30
        assert part.test.labels.bincount().tolist() == [5, 5]
        seen += [id(x) for x in part.test.series]
        assert not {id(x) for x in part.train.series} & {id(x) for x in part.test.series}
    assert sorted(seen) == sorted(id(x) for x in two.train.series)


def test_batches_have_every_series_once_per_epoch_and_similar_lengths(two):
    parts = training.batches(two.train, 8, torch.Generator().manual_seed(0))
    for _ in range(2):
        epoch = [next(parts) for _ in range(5)]
        assert sorted(id(x) for part in epoch for x in part.series) == sorted(id(x) for x in two.train.series)
        padding = sum(max(map(len, part.series)) * len(part) - sum(map(len, part.series)) for part in epoch)
        assert padding < 0.15 * sum(map(len, two.train.series))
    for part in epoch:
        for x, label in zip(part.series, part.labels, strict=True):
            assert label == two.train.labels[[x is y for y in two.train.series].index(True)]


def test_variation_keeps_its_limits():
    x, random = torch.arange(1.0, 101)[:, None], torch.Generator().manual_seed(0)
    assert torch.equal(training.vary(x, SMALL, random), x)
    settings = training.Settings(crop=0.7, scale=0.1)
    found = [training.vary(x, settings, random) for _ in range(300)]
    sizes = [len(y) for y in found]
    assert min(sizes) >= 70
    assert max(sizes) <= 100
    assert len(set(sizes)) > 20
    factors = [float(y[1] - y[0]) for y in found]
    assert math.exp(-0.1) - 1e-4 <= min(factors) < 0.95
    assert 1.05 < max(factors) <= math.exp(0.1) + 1e-4
    starts = {round(float(y[0]) / f) for y, f in zip(found, factors, strict=True)}
    assert min(starts) == 1
    assert max(starts) > 20


def test_a_network_learns_and_a_seed_gives_the_same_one(two):
    seen = []
    model = training.train_classifier(two, SMALL, 3, seen.append)
    assert len(seen) == SMALL.steps
    assert not model.training
    assert training.accuracy(model, two.test, 7) > 0.9
    again = training.train_classifier(two, SMALL, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_accuracy_is_the_share_of_right_series(two):
    class Fixed(torch.nn.Module):
        def forward(self, series):
            return torch.tensor([[1.0, 0.0]] * len(series))

    assert training.accuracy(Fixed(), two.test, 7) == 0.5
    assert training.accuracy(Fixed(), two.test.part(torch.tensor([0, 2, 4, 1]))) == 0.75


def test_other_series_of_a_batch_have_no_effect(two):
    model = Classifier(1, two.classes, SMALL.sizes).eval()
    model.measure(two.train.series)
    together = model(two.test.series)
    for row, x in zip(together, two.test.series, strict=True):
        torch.testing.assert_close(row, model([x])[0], rtol=1e-4, atol=1e-5)


def test_inputs_tell_size_and_shape(two):
    model = Classifier(1, two.classes, SMALL.sizes)
    x = torch.tensor([[1.0], [2.0], [6.0]])
    model.measure([x, -x])
    assert model.unit.item() == 2.0
    found, large = model.inputs(x), model.inputs(10 * x)
    assert torch.allclose(found[:, 0], torch.asinh(x[:, 0] / 2))
    assert torch.allclose(found[:, 1], large[:, 1])
    assert abs(found[:, 1].mean()) < 1e-6
    assert abs(found[:, 1].square().mean() - 1) < 1e-5
    assert model.inputs(torch.ones(4, 1)).isfinite().all()


def test_a_model_is_saved_with_its_configuration(two, tmp_path):
    model = Classifier(1, two.classes, SMALL.sizes).eval()
    model.measure(two.train.series)
    models.save(model, tmp_path)
    again = models.load(tmp_path)
    assert again.classes == two.classes
    assert torch.equal(again(two.test.series), model(two.test.series))


def test_damaged_models_are_refused(two, tmp_path):
    models.save(Classifier(1, two.classes, SMALL.sizes), tmp_path)
    file = tmp_path / models.FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Problem, match="checksum"):
        models.load(tmp_path)
    for old, new in ((b'd_model\\": 16', b'd_model\\": 99'), (b"classes", b"klasses"), (b"d_state", b"d_stale")):
        assert old in whole
        file.write_bytes(whole.replace(old, new))
        with pytest.raises(Problem, match="header|another architecture"):
            models.load(tmp_path)
    with pytest.raises(Problem, match="does not exist"):
        models.load(tmp_path / "nowhere")


def test_a_loss_that_is_not_finite_ends_the_training(two):
    with pytest.raises(Problem, match="--lr"):
        training.train_classifier(two, training.Settings(SMALL.sizes, steps=50, lr=1e18))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "--steps"), ({"batch": 0}, "--batch"), ({"crop": 0.0}, "--crop"), ({"crop": 1.1}, "--crop")],
)
def test_wrong_settings_get_a_sentence(options, message):
    with pytest.raises(Problem, match=message):
        training.Settings(**options)


def test_wrong_sizes_get_a_sentence(two):
    with pytest.raises(Problem, match="d_state"):
        Classifier(1, two.classes, Sizes(d_state=7))


def run(monkeypatch, two, *arguments):
    monkeypatch.setattr(program, "load_classification", lambda name: two)
    monkeypatch.setattr(baselines, "minirocket", lambda data: 0.25)
    monkeypatch.setattr(baselines, "nearest_neighbour", lambda data: 0.125)
    return program.main([*arguments, "--steps", "20", "--d-model", "8", "--blocks", "1", "--d-state", "4"])


def test_the_program_prints_accuracies_and_writes_the_first_model(monkeypatch, capsys, two, tmp_path):
    assert run(monkeypatch, two, "files", "--data", "a/b", "--seeds", "2", "--out", str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a/b: 40 series to train on, 30 to test, 2 classes"
    first = training.train_classifier(two, training.Settings(Sizes(8, 1, 4), steps=20), 0)
    assert f"(each: {training.accuracy(first, two.test):.3f}, " in lines[1]
    assert "MiniRocket         0.250" in lines
    assert "1-NN, warping      0.125" in lines
    assert torch.equal(models.load(tmp_path / "b").head.weight, first.head.weight)


def test_folds_do_not_read_the_test_split(monkeypatch, capsys, two, tmp_path):
    two = Classification(two.train, Labelled([], two.test.labels[:0]), two.classes)
    assert run(monkeypatch, two, "plaid", "--seeds", "1", "--folds", "2", "--out", str(tmp_path)) == 0
    assert "MiniRocket" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--folds", "1"], ["--folds", "-1"]])
def test_wrong_numbers_of_runs_get_a_sentence(monkeypatch, capsys, two, wrong):
    assert run(monkeypatch, two, "plaid", *wrong) == 1
    assert capsys.readouterr().err.startswith("time_series: --seeds must be")


def test_a_missing_package_gets_a_sentence():
    with pytest.raises(Problem, match=r"pip install 'ssmkit\[series\]'"):
        data.package("no_such_package_of_this_name")


def test_the_data_of_sktime():
    pytest.importorskip("sktime")
    found = data.load_classification("JapaneseVowels")
    assert (len(found.train), len(found.test), len(found.classes)) == (270, 370, 9)
    assert found.train.series[0].shape[1] == 12
    assert found.train.labels.bincount().tolist() == [30] * 9
    with pytest.raises(Problem, match="nowhere_TRAIN.ts does not"):
        data.load_classification("nowhere")


def test_the_warped_distance_is_the_least_of_all_paths():
    random = np.random.default_rng(0)
    x, y = random.standard_normal((4, 2)), random.standard_normal((5, 2))

    def least(i, j):
        if i < 0 or j < 0:
            return np.inf
        before = min(least(i - 1, j - 1), least(i - 1, j), least(i, j - 1)) if i or j else 0.0
        return ((x[i] - y[j]) ** 2).sum() + before

    assert abs(baselines.warped_distance(x, y) - least(3, 4)) < 1e-12
    assert baselines.warped_distance(x, x) == 0


def test_the_nearest_neighbour_is_good_where_it_is_easy(two):
    assert baselines.nearest_neighbour(two) > 0.8


def test_minirocket_is_good_where_it_is_easy(two):
    pytest.importorskip("sktime")
    assert baselines.minirocket(two) > 0.9
