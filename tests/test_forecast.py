"""examples/forecast.py: seasons and growth, the network, its file and the program."""

import math
from dataclasses import replace

import pytest
import torch

import example  # noqa: F401  (makes the examples importable)
from sashimi.problems import Problem
from series import forecasting
from series.forecasting import Forecaster, Weekly, seasonal, seasonal_naive
from series.models import Sizes

import forecast as program  # isort: skip

SETTINGS = replace(forecasting.SETTINGS, sizes=Sizes(d_model=8, blocks=1, d_state=4, dropout=0.0), steps=2, batch=2)


def weekly(count, growth=1.5, bend=0.0, noise=0.0):
    """A season on a trend that may bend."""
    years = 1960.2 + torch.arange(count, dtype=torch.float64) / 52.18
    ago = years - years[0]
    random = torch.Generator().manual_seed(0)
    season = 3 * torch.sin(2 * math.pi * years) + torch.cos(4 * math.pi * years)
    noise = noise * torch.randn(count, generator=random, dtype=torch.float64)
    return Weekly(years, 300 + growth * ago + bend * ago**2 + season + noise)


@pytest.mark.parametrize("recent", [1, 3, 5])
def test_a_season_on_a_straight_trend_is_continued(recent):
    weeks = weekly(900)
    season, growth = seasonal(weeks.until(500), weeks.years[500:], recent)
    # Values are interpolated between weeks, and the means are over 52 or 53 of them.
    assert abs(growth - 1.5) < 0.15
    assert (season + (weeks.years[500:] - weeks.years[499]).ceil() * growth - weeks.values[500:]).abs().max() < 1
    assert (seasonal_naive(weeks.until(500), weeks.years[500:]) - weeks.values[500:]).abs().max() < 1.5


def test_the_mean_of_several_years_has_less_noise():
    weeks, clean = weekly(900, noise=0.5), weekly(900)
    error = [
        (
            seasonal(weeks.until(500), weeks.years[500:552], n)[0]
            - seasonal(clean.until(500), weeks.years[500:552], n)[0]
        )
        .square()
        .mean()
        for n in (1, 5)
    ]
    assert error[1] < 0.5 * error[0]


def test_a_new_network_continues_season_and_growth():
    weeks = weekly(800, bend=0.02, noise=0.1)
    model = Forecaster(SETTINGS.sizes, past=400)
    found = model(weeks, [400, 450], 60)
    for row, origin in zip(found, (400, 450), strict=True):
        known = Weekly(weeks.years[origin - 400 : origin], weeks.values[origin - 400 : origin])
        ahead = weeks.years[origin : origin + 60]
        season, growth = seasonal(known, ahead, forecasting.RECENT)
        torch.testing.assert_close(row, season + (ahead - known.years[-1]).ceil() * growth)


def test_values_after_an_origin_are_not_read():
    weeks = weekly(700)
    model = Forecaster(SETTINGS.sizes, past=400)
    torch.nn.init.normal_(model.head.weight)
    hidden = Weekly(weeks.years, weeks.values.clone())
    hidden.values[450:] = math.nan
    assert torch.equal(model(weeks, [450], 200), model(hidden, [450], 200))


def test_a_network_learns_that_growth_grows():
    weeks = weekly(1300, growth=0.8, bend=0.02)
    past = weeks.until(1000)
    settings = replace(SETTINGS, steps=30, lr=3e-3)
    model = forecasting.train_forecaster(past, 300, settings, seed=1)
    again = forecasting.train_forecaster(past, 300, settings, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    def error(model):
        return (model(weeks, [1000], 300) - weeks.values[1000:]).abs().mean()

    assert error(model) < 0.7 * error(Forecaster(settings.sizes))


def test_too_few_weeks_get_a_sentence():
    with pytest.raises(Problem, match="too few"):
        forecasting.train_forecaster(weekly(560), 52, SETTINGS)


def test_a_model_is_saved_with_its_configuration(tmp_path):
    weeks, model = weekly(600), Forecaster(SETTINGS.sizes, past=400)
    torch.nn.init.normal_(model.head.weight)
    forecasting.save(model, tmp_path)
    assert torch.equal(forecasting.load(tmp_path)(weeks, [410], 52), model(weeks, [410], 52))
    file = tmp_path / forecasting.FILE
    whole = file.read_bytes()
    for old, new in ((b'd_model\\": 8', b'd_model\\": 9'), (b"past", b"last"), (b"d_state", b"d_stale")):
        assert old in whole
        file.write_bytes(whole.replace(old, new))
        with pytest.raises(Problem, match="header|another architecture|checksum"):
            forecasting.load(tmp_path)


def test_the_program_prints_a_line_per_forecast(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(program, "load_carbon_dioxide", lambda: weekly(1300))
    monkeypatch.setattr(program, "exponential_smoothing", lambda past, years: torch.zeros_like(years))
    small = ["--steps", "2", "--d-model", "8", "--blocks", "1", "--batch", "2", "--seeds", "2", "--out", str(tmp_path)]
    assert program.main(["--origins", "580", "600", "640", *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mean absolute error over ten years, ppm"
    assert [line.split()[0] for line in lines[2:6]] == ["1971.3", "1971.7", "1972.5", "but"]
    assert float(lines[2].split()[2]) < 1
    for column in (1, 2, 3):
        first, second, mean = (float(lines[i].split()[column + (i == 5)]) for i in (2, 3, 5))
        assert abs(mean * 2 - first - second) < 0.04
    assert forecasting.load(tmp_path).sizes.d_model == 8


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--origins", "5"], ["--origins", "1300"]])
def test_wrong_numbers_get_a_sentence(monkeypatch, capsys, wrong):
    monkeypatch.setattr(program, "load_carbon_dioxide", lambda: weekly(1300))
    assert program.main(wrong) == 1
    assert capsys.readouterr().err.startswith(f"forecast: {wrong[0]} must be")


def test_the_data_of_statsmodels():
    pytest.importorskip("statsmodels")
    weeks = forecasting.load_carbon_dioxide()
    assert len(weeks) == 2284
    assert weeks.values.isfinite().all()
    assert 1958.2 < weeks.years[0] < 1958.3
    assert 2001.9 < weeks.years[-1] < 2002.1
    found = forecasting.exponential_smoothing(weeks.until(1762), weeks.years[1762:1800])
    assert (found - weeks.values[1762:1800]).abs().mean() < 2
