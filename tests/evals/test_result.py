"""Intervals and differences of samples, results of several seeds, and which figures go together."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from engine.evals import Result
from engine.evals.result import difference, interval, over_seeds


def test_intervals_cover_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    intervals = [interval(samples) for samples in rng.normal(2.0, 3.0, (600, 80))]
    covered = np.mean([low <= 2.0 <= high for low, high in intervals])
    # of 600 draws at 95 %, the deviation is 0.9 %
    assert 0.92 < covered < 0.975


def test_intervals_of_differences_cover_too_and_are_narrower_where_samples_go_together():
    rng = np.random.default_rng(1)
    common, own = rng.normal(0, 3, (400, 80)), rng.normal(0, 1, (2, 400, 80))
    found = [difference(c + a, c + b + 0.5) for c, a, b in zip(common, *own)]
    covered = np.mean([low <= 0.5 <= high for low, high in (each.interval for each in found)])
    assert 0.91 < covered < 0.98
    low, high = found[0].interval
    alone = interval(common[0] + own[0, 0])
    assert high - low < (alone[1] - alone[0]) / 1.5


@pytest.mark.parametrize("kind", ["normal", "right or wrong", "skewed"])
def test_intervals_agree_with_scipy(kind):
    rng = np.random.default_rng(2)
    draws = {
        "normal": rng.normal(size=200),
        "right or wrong": rng.random(200) < 0.8,
        "skewed": rng.exponential(size=200),
    }
    samples = draws[kind].astype(float)
    expected = bootstrap(
        (samples,), np.mean, n_resamples=20000, method="percentile", random_state=3
    ).confidence_interval
    error = samples.std() / np.sqrt(len(samples))
    assert np.abs(np.subtract(interval(samples), expected)).max() < 0.15 * error
    assert interval(samples) == interval(samples)


def test_many_samples_are_drawn_in_parts(monkeypatch):
    samples = np.random.default_rng(4).normal(size=300)
    whole = interval(samples)
    monkeypatch.setattr("engine.evals.result._AT_ONCE", 7000)
    assert interval(samples) == pytest.approx(whole, abs=0.02)


def test_what_is_not_counted_is_left_out():
    samples = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    with_gaps = np.insert(samples, [0, 3, 5], np.nan)
    assert interval(with_gaps) == interval(samples)
    assert interval(np.array([np.nan, 1.0])) is None and interval(np.empty(0)) is None
    assert interval(np.ones(5)) is None
    paired = difference(np.array([0.0, np.nan, 1.0, 0.5]), np.array([1.0, 1.0, np.nan, 1.0]))
    assert paired.mean == 0.75 and paired.count == 2
    with pytest.raises(ValueError, match="2 and 3 samples cannot be paired"):
        difference(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="no sample counts for both"):
        difference(np.array([np.nan, 1.0]), np.array([1.0, np.nan]))


def test_best_epoch_figures_never_come_without_their_last_epoch_partner():
    with pytest.raises(ValueError, match="linear gives 'best-epoch top-1' without the last-epoch figure"):
        Result("linear", {"best-epoch top-1": 0.9, "top-1": 0.8}, {})
    values = {"1% last-epoch mIoU (best lr)": 0.4, "1% best-epoch mIoU": 0.5, "other": 0.1}
    result = Result("semantic", values, {}, headline=("1% best-epoch mIoU",))
    assert result.shown == ("1% last-epoch mIoU (best lr)", "1% best-epoch mIoU")
    assert Result("semantic", values, {}).shown == tuple(values)
    both = over_seeds([result, result], [0, 1])
    assert both.shown == result.shown and "1% best-epoch mIoU std" in both.values


def test_several_seeds_say_what_their_spread_is_over():
    runs = [
        Result("x", {"a": value, "a std": 0.3}, {"seed": seed}, spread="splits") for seed, value in enumerate((1, 3))
    ]
    both = over_seeds(runs, [0, 1])
    assert both.spread == "2 seeds and splits" and both.settings["seeds"] == [0, 1]
    assert both.values == {"a": 2.0, "a std": pytest.approx(np.sqrt(1 + 0.09))}
