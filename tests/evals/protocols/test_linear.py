"""The linear probe against one torch.optim.SGD per learning rate, its recipes against restatements of the released scripts, and
what its two figures mean."""

import json
from dataclasses import replace
from math import cos, pi

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from engine import eval as command
from engine import evals
from engine.core.errors import BadInput
from engine.data.pipeline import TrainLoader, eval_batches
from engine.data.sources import open_images
from engine.data.views import Augmentation
from engine.evals.features import Features, encoder_of, raw_pixels
from engine.evals.protocols import linear
from engine.evals.subject import Subject
from engine.model import vit

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


def plain_lars(weight, bias, momenta, lr):
    """MAE's step: a trust ratio for the matrix, none for the bias; no weight decay."""
    for parameter, momentum in zip((weight, bias), momenta):
        slope = parameter.grad
        if parameter.ndim > 1:
            size, steep = parameter.detach().norm(), slope.norm()
            slope = slope * (0.001 * size / steep if size > 0 and steep > 0 else 1.0)
        momentum.mul_(0.9).add_(slope)
        parameter.data -= lr * momentum


@pytest.mark.parametrize("together", [0, 20])
def test_maes_step_is_lars_for_each_rate_and_norms_of_each_gpus_images(together):
    """The running statistics are the first GPU's, whose buffers the others are given."""
    train, lrs, steps = blobs(0, spread=2.0), torch.tensor([2.0, 6.0]), 25
    recipe = replace(linear.RECIPES["mae"], norm_images=together)
    probe = linear.Probe(6, 4, lrs, momentum=0.9, seed=3, recipe=recipe)
    alone = []
    for lr in lrs.tolist():
        norm, weight = nn.BatchNorm1d(6, affine=False, eps=1e-6), probe.weight_LKC[0].clone().requires_grad_()
        bias = torch.zeros(4, requires_grad=True)
        alone.append((norm, weight, bias, (torch.zeros(4, 6), torch.zeros(4)), lr))
    for step in range(steps):
        rows, share = torch.arange(step, step + 40) % 120, linear.share_of_peak(recipe, step, 1)
        with torch.no_grad():
            probe.step(train.values[rows], train.labels[rows], share)
        for norm, weight, bias, momenta, lr in alone:
            parts = train.values[rows].split(together or 40)
            others = [(part - part.mean(0)) / (part.var(0, unbiased=False) + 1e-6).sqrt() for part in parts[1:]]
            scores = torch.cat([norm(parts[0]), *others]) @ weight.T + bias
            weight.grad = bias.grad = None
            nn.functional.cross_entropy(scores, train.labels[rows]).backward()
            plain_lars(weight, bias, momenta, lr * share)
    probe.norm.eval()
    scores_BLK = probe.logits(probe.norm(train.values))
    for i, (norm, weight, bias, *_) in enumerate(alone):
        expected = norm.eval()(train.values) @ weight.T + bias
        assert (weight - linear.Probe(6, 4, lrs, 0.9, 3).weight_LKC[0]).norm() > 0.1 * weight.norm()
        torch.testing.assert_close(scores_BLK[:, i], expected.detach(), rtol=1e-4, atol=1e-4)


def mae_share(step, per_epoch, epochs=90, warmup=10):
    epoch = step / per_epoch
    return epoch / warmup if epoch < warmup else 0.5 * (1 + cos(pi * (epoch - warmup) / (epochs - warmup)))


def maect_share(step, per_epoch, epochs=50):
    warmup, steps = int(0.1 * epochs * per_epoch), epochs * per_epoch
    if step < warmup:
        return step / max(1, warmup - 1)
    return 0.5 * (1 + cos(pi * (step - warmup) / max(1, steps - warmup - 1)))


@pytest.mark.parametrize("per_epoch", [1, 7, 78])
def test_rates_follow_the_released_schedules(per_epoch):
    dino = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, by_epoch = torch.optim.lr_scheduler.CosineAnnealingLR(dino, 100, eta_min=0), []
    for _ in range(100):
        by_epoch += [dino.param_groups[0]["lr"]] * per_epoch
        dino.step()
        scheduler.step()
    expected = {
        "mae": [mae_share(step, per_epoch) for step in range(90 * per_epoch)],
        "maect": [maect_share(step, per_epoch) for step in range(50 * per_epoch)],
        "dino": by_epoch,
    }
    for name, shares in expected.items():
        recipe = linear.RECIPES[name]
        found = [linear.share_of_peak(recipe, step, per_epoch) for step in range(recipe.epochs * per_epoch)]
        np.testing.assert_allclose(found, shares, atol=1e-9, err_msg=name)
    fifty, _ = linear.chosen(linear.Settings("mae", epochs=50))  # MAE's README, for L and H: the warm-up stays as long
    shares = [mae_share(step, per_epoch, 50) for step in range(50 * per_epoch)]
    found = [linear.share_of_peak(fifty, step, per_epoch) for step in range(50 * per_epoch)]
    np.testing.assert_allclose(found, shares, atol=1e-9)


def test_flags_win_over_a_recipe_and_are_told():
    recipe, said = linear.chosen(linear.Settings("mae", base_lrs=(0.3,), warmup=0.0, pool="avg", momentum=0.8))
    assert (recipe.epochs, recipe.batch_size, recipe.base_lrs, recipe.warmup_steps(9)) == (90, 16384, (0.3,), 0)
    assert said == "; base lrs, warmup, pool, momentum as chosen"
    assert linear.chosen(linear.Settings("dino")) == (linear.RECIPES["dino"], "")


@pytest.mark.parametrize(
    "name, settings, expected",
    [
        ("vit_small_patch16_224", linear.Settings("dino"), ("token", 4)),
        ("vit_base_patch16_224", linear.Settings("dino"), ("both", 1)),
        ("vit_base_patch16_224", linear.Settings("dino", pool="token", blocks=2), ("token", 2)),
        ("vit_base_patch16_224", linear.Settings("mae"), ("token", 1)),
        ("vit_base_patch16_224", linear.Settings("mae", pool="avg"), ("avg", 1)),
        ("vit_base_patch16_224", linear.Settings("maect"), ("", 1)),
    ],
)
def test_what_is_read_goes_by_recipe_and_size(name, settings, expected):
    assert linear.reading(settings, vit.create(name, depth=4)) == expected


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """42 noisy images of three classes to train on, 60 to test."""
    root, rng = tmp_path_factory.mktemp("linear"), np.random.default_rng(0)
    for split, count in (("train", 14), ("val", 20)):
        for label in range(3):
            (root / split / str(label)).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 190, (36, 36, 3))
                pixels[..., label] += rng.integers(0, 60)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / str(label) / f"{i:02}.png")
    return tuple(open_images(root, split) for split in ("train", "val"))


def subject(seed: int = 0, **overrides) -> Subject:
    model = vit.create("vit_micro_patch8_32", generator=torch.Generator().manual_seed(seed), depth=5, **overrides)
    return Subject("small", encoder_of(model), threads=1, batch_size=4)


def plain_features(subject, images, recipe, pool):
    """Read by timm's model, with the weights of ours."""
    theirs = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=128, depth=5, num_heads=4, num_classes=0, mlp_ratio=4
    )
    theirs.load_state_dict(subject.vit.state_dict())
    blocks = 4 if recipe == "dino" and pool == "token" else 1
    with torch.no_grad():
        layers = theirs.eval().get_intermediate_layers(images, n=blocks, norm=True, return_prefix_tokens=True)
    classes = [prefix[:, 0] for _, prefix in layers]
    return torch.cat(classes if pool == "token" else [*classes, layers[-1][0].mean(1)], 1)


@pytest.mark.parametrize("recipe, pool", [("mae", "token"), ("dino", "token"), ("dino", "both"), ("maect", "token")])
def test_a_released_script_is_restated_on_the_same_crops(sets, recipe, pool, monkeypatch):
    (train, test), judged, epochs = sets, subject(global_pool="token"), 3
    settings = linear.Settings(recipe, epochs=epochs, pool="both" if pool == "both" else "", blocks=int(pool == "both"))
    if recipe != "maect":
        settings = replace(settings, base_lrs=(30.0,))  # so that much is learned in twelve steps
    probes, kept = [], linear.Probe.correct
    monkeypatch.setattr(linear.Probe, "correct", lambda self, features: (probes.append(self), kept(self, features))[1])
    result = linear.evaluate_model(judged, train, test, settings)
    batch = 9  # a quarter of 42 is 10, encoded 3 at a time
    assert result.settings["batch used"] == batch and result.counts == {"training images": 42, "test images": 60}
    assert "batch cut from" in result.settings["recipe"]
    assert ("no such model" in result.settings["recipe"]) == (recipe == "dino")  # it has ViT-S and ViT-B

    filters = {"mae": ("bicubic", True), "dino": ("bilinear", False), "maect": ("bicubic", False)}
    resize, clip = filters[recipe]
    loader = TrainLoader(train, (Augmentation((32, 32), (0.08, 1), clip=clip, resize=resize),), 3, seed=0, threads=1)
    read = [next(loader) for _ in range(14 * epochs)]
    loader.close()
    values = plain_features(judged, torch.cat([each.images[0] for each in read]), recipe, pool).split(3)
    seen = plain_features(judged, next(iter(eval_batches(test, (32, 32), 60))).images[0], recipe, pool)
    width, labels = seen.shape[1], torch.from_numpy(train.labels)
    start = nn.init.trunc_normal_(torch.empty(3, width), std=0.01, generator=torch.Generator().manual_seed(0))
    lrs = settings.base_lrs or tuple(i / 100 for i in range(1, 11))
    table = []
    for place, base_lr in enumerate(lrs):
        norm = nn.Identity()
        if recipe != "dino":
            norm = nn.BatchNorm1d(width, affine=False, eps=1e-6 if recipe == "mae" else 1e-5)
        weight, bias = start.clone().requires_grad_(), torch.zeros(3, requires_grad=True)
        optimiser, momenta = torch.optim.SGD((weight, bias), 1.0, momentum=0.9), (torch.zeros(3, width), torch.zeros(3))
        top1 = []
        for step in range(4 * epochs):
            epoch, part = divmod(step, 4)
            first = 14 * epoch + 3 * part  # two small batches of an epoch make no whole one
            scores = norm.train()(torch.cat(values[first : first + 3])) @ weight.T + bias
            optimiser.zero_grad()
            truth = labels[torch.cat([each.ids for each in read[first : first + 3]])]
            nn.functional.cross_entropy(scores, truth).backward()
            shares = {"mae": mae_share(step, 4, epochs), "maect": maect_share(step, 4, epochs)}
            lr = base_lr * batch / 256 * shares.get(recipe, 0.5 * (1 + cos(pi * epoch / epochs)))
            if recipe == "mae":
                plain_lars(weight, bias, momenta, lr)
            else:
                optimiser.param_groups[0]["lr"] = lr
                optimiser.step()
            if part == 3:
                right = (norm.eval()(seen) @ weight.T + bias).argmax(1).numpy() == test.labels
                top1.append(float(right.mean()))
        torch.testing.assert_close(probes[-1].weight_LKC[place], weight.detach(), rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(probes[-1].bias_LK[place], bias.detach(), rtol=2e-3, atol=2e-4)
        assert (weight - start).norm() > 1e-3
        table.append((base_lr, top1[-1], max(top1), int(np.argmax(top1)) + 1))
    assert [tuple(row.values()) for row in result.details["top-1 by learning rate"]] == [
        pytest.approx(row) for row in table
    ]
    assert result.values["last-epoch top-1 (best lr)"] == pytest.approx(max(row[1] for row in table))


def test_weights_that_cannot_be_read_so_are_refused_before_anything_is_encoded(sets):
    train, test = sets
    with pytest.raises(BadInput, match="has class tokens of 1 to 5 blocks, not of 6"):
        linear.check_model(subject(), train, test, linear.Settings("dino", blocks=6))
    with pytest.raises(BadInput, match="class tokens of 4 blocks are those of the pooling token or both, not of avg"):
        linear.check_model(subject(), train, test, linear.Settings("dino", pool="avg"))
    with pytest.raises(BadInput, match="no patches to look at"):
        linear.check_model(Subject("raw", raw_pixels()), train, test, linear.Settings("mae"))
    linear.check_model(Subject("raw", raw_pixels()), train, test, linear.Settings())
    with pytest.raises(BadInput, match="recipe = 'mae' encodes crops, and blobs are features"):
        linear.evaluate(blobs(0), blobs(1), linear.Settings("mae"))


def test_the_command_trains_by_a_recipe_and_extracts_features_for_the_others_only(sets, tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    folder = str(sets[0].root)
    weights = ["--weights", "random:vit_micro_patch8_32", "--data", folder, "--protocol", "linear", "--threads", "1"]
    flags = ["--linear.recipe", "mae", "--linear.epochs", "2", "--out", str(tmp_path / "out")]
    assert command.main([*weights, *flags]) == 0
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert result["settings"]["recipe"].startswith(
        "mae: MAE's released script; epochs as chosen; batch cut from 16384 to"
    )
    assert result["feature"] == "class token after the final norm" and result["settings"]["optimiser"] == "lars"
    assert (result["settings"]["epochs"], result["settings"]["base_lrs"]) == (2, [0.1])
    (row,) = result["details"]["top-1 by learning rate"]
    assert row["last-epoch top-1"] == result["values"]["last-epoch top-1 (best lr)"]
    assert len(list((tmp_path / "cache" / "features").glob("*-features"))) == 1  # the test set's
    assert evals.wants("linear", linear.Settings("mae")) == "model" and evals.wants("linear") == "pooled"


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
    "wrong",
    [
        {"epochs": -1},
        {"batch_size": -1},
        {"base_lrs": (0.0,)},
        {"momentum": 1.0},
        {"warmup": 1.0},
        {"warmup": -0.5},
        {"warmup": 0.1, "recipe": "dino"},
        {"recipe": "moco"},
        {"pool": "mean", "recipe": "mae"},
        {"blocks": -1},
        {"blocks": 2},
        {"pool": "token"},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        linear.Settings(**wrong)


def test_too_few_images():
    with pytest.raises(BadInput, match="at least 8 training images"):
        linear.evaluate(blobs(0, n=7), blobs(1))
