"""The linear probe against one torch.optim.SGD per learning rate, and what its two figures mean."""

import numpy as np
import pytest
import torch
from torch import nn

from engine.core.errors import BadInput
from engine.evals.features import Features
from engine.evals.protocols import linear

LRS = (0.5, 1.0, 2.0, 5.0, 10.0)  # far too large, so that accuracy rises and falls


def blobs(seed: int, n: int = 120, classes: int = 4, width: int = 6, spread: float = 1.0, centres: int = 0) -> Features:
    rng = np.random.default_rng([seed, 1])
    middle = np.random.default_rng(centres).normal(size=(classes, width))
    labels = np.arange(n) % classes
    values = middle[labels] + spread * rng.normal(size=(n, width))
    return Features(torch.tensor(values, dtype=torch.float32), torch.tensor(labels), "blobs")


def test_every_learning_rate_is_what_torch_trains_alone():
    train, lrs, steps = blobs(0), torch.tensor([0.01, 0.3, 2.0]), 25
    probe = linear.Probe(6, 4, lrs, momentum=0.9, seed=3)
    start = probe.weight_LKC[0].clone()
    alone = []
    for lr in lrs.tolist():
        model = nn.Sequential(nn.BatchNorm1d(6, affine=False, eps=1e-5), nn.Linear(6, 4))
        model[1].weight.data.copy_(start)
        model[1].bias.data.zero_()
        alone.append((model, torch.optim.SGD(model.parameters(), lr, momentum=0.9)))
    for step in range(steps):
        rows = torch.arange(step, step + 40) % 120
        share = linear.schedule(step, steps, 0.1)
        with torch.no_grad():
            probe.step(train.values[rows], train.labels[rows], share)
        for (model, optimiser), lr in zip(alone, lrs.tolist()):
            optimiser.param_groups[0]["lr"] = lr * share
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(train.values[rows]), train.labels[rows]).backward()
            optimiser.step()
    probe.norm.eval()
    logits_BLK = probe.logits(probe.norm(train.values))
    for i, (model, _) in enumerate(alone):
        torch.testing.assert_close(logits_BLK[:, i], model.eval()(train.values), rtol=1e-4, atol=1e-4)
        accuracy = (model(train.values).argmax(1) == train.labels).float().mean()
        assert probe.correct(train)[:, i].mean() == pytest.approx(float(accuracy), abs=1e-6)


def test_schedule_warms_up_and_ends_near_zero():
    shares = [linear.schedule(step, 100, 0.1) for step in range(100)]
    assert shares == sorted(shares[:11]) + sorted(shares[11:], reverse=True)
    assert max(shares) == 1 and shares[0] == pytest.approx(1 / 11) and shares[-1] < 1e-3
    assert linear.schedule(0, 7, 0.0) == 1


def test_last_and_best_epoch_are_both_given_and_named():
    result = linear.evaluate(blobs(0, spread=2.0), blobs(1, spread=2.0), linear.Settings(epochs=12, base_lrs=LRS))
    table = result.details["top-1 by learning rate"]
    last, best = result.values["last-epoch top-1 (best lr)"], result.values["best-epoch top-1"]
    assert list(result.values) == ["last-epoch top-1 (best lr)", "best-epoch top-1"]
    assert [row["base lr"] for row in table] == list(LRS)
    assert last == max(row["last-epoch top-1"] for row in table)
    assert best == max(row["best-epoch top-1"] for row in table)
    assert all(row["best-epoch top-1"] >= row["last-epoch top-1"] and 1 <= row["best epoch"] <= 12 for row in table)
    assert best > last > 0.4
    assert result.settings["batch used"] == 30
    chosen = next(row for row in table if row["base lr"] == result.settings["base lr of last-epoch figure"])
    assert chosen["last-epoch top-1"] == last
    (samples,) = result.samples.values()
    assert samples.shape == (120,) and set(samples) == {0, 1} and samples.mean() == last


def test_the_same_seed_gives_the_same_result_and_another_does_not():
    train, test = blobs(0, spread=2.0), blobs(1, spread=2.0)
    runs = [linear.evaluate(train, test, linear.Settings(epochs=3, seed=seed)).details for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_a_class_without_test_images_and_one_without_training_images():
    train, test = blobs(0), blobs(1)
    keep = test.labels != 3
    result = linear.evaluate(train, Features(test.values[keep], test.labels[keep], "t"), linear.Settings(epochs=5))
    assert result.values["last-epoch top-1 (best lr)"] > 0.4
    keep = train.labels != 3
    result = linear.evaluate(Features(train.values[keep], train.labels[keep], "t"), test, linear.Settings(epochs=5))
    assert result.values["best-epoch top-1"] <= 0.75


def test_a_learning_rate_that_diverges_counts_as_wrong_and_all_of_them_are_refused():
    train, test = blobs(0, n=1200), blobs(1)  # batches of 300: the rate 3e38 becomes infinite
    result = linear.evaluate(train, test, linear.Settings(epochs=3, base_lrs=(0.1, 3e38)))
    assert [row["best-epoch top-1"] > 0 for row in result.details["top-1 by learning rate"]] == [True, False]
    with pytest.raises(BadInput, match="lower base_lrs"):
        linear.evaluate(train, test, linear.Settings(epochs=3, base_lrs=(3e38,)))


def test_constant_features_give_chance_not_an_error():
    constant = Features(torch.ones(40, 3), torch.arange(40) % 4, "collapsed")
    assert linear.evaluate(constant, constant, linear.Settings(epochs=2)).values["best-epoch top-1"] == pytest.approx(
        0.25
    )


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch_size": 0}, {"base_lrs": ()}, {"base_lrs": (0.0,)}, {"warmup": 1.0}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        linear.Settings(**wrong)


def test_too_few_images():
    with pytest.raises(BadInput, match="at least 8 training images"):
        linear.evaluate(blobs(0, n=7), blobs(1))
