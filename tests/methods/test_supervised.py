"""Supervised training against plain restatements, and against timm and torch where they have the same part."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from scipy.stats import kstest
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import param_groups_layer_decay
from torch import Tensor
from torch.nn import functional as F

from engine import train
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.data.pipeline import eval_batches
from engine.data.sources import open_images
from engine.methods.base import Labels
from engine.methods.parts import mixing
from engine.methods.supervised import Settings, Supervised
from engine.model import vit
from engine.model.heads import Classifier
from engine.recipes import recipe
from engine.training.step import Update

LABELS = Labels(torch.tensor([2, 0, 1, 1, 2, 0, 0, 1]), ("ant", "bee", "cow"))
RUN = (
    "--method", "supervised", "--supervised.labels-per-class", "4", "--batch-size", "40", "--no-evaluate", "--threads", "1",
    "--probe-every", "0", "--save-every", "0",
)  # fmt: skip


def make(model: str = "vit_micro_patch8_32", encoder: dict | None = None, **settings: object) -> Supervised:
    torch.manual_seed(0)
    encoder = vit.create(model, **{"depth": 2, "global_pool": "avg"} | (encoder or {}))
    return Supervised(encoder, Settings(**{"epochs": 1, "batch_size": 4, "head_std": 0.5} | settings), LABELS)


def draws(step: int = 0, batch: int = 4, rows: slice = slice(None)) -> Draws:
    return Draws(0, step, batch=batch, rows=rows, device=torch.device("cpu"))


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def probabilities(method: Supervised, pixels: Tensor) -> Tensor:
    """Mean of the patch tokens, a linear layer, softmax."""
    tokens = method.encoder(pixels)[:, method.encoder.num_prefix_tokens :]
    scores = tokens.sum(1) / tokens.shape[1] @ method.classifier.weight.T + method.classifier.bias
    return scores.exp() / scores.exp().sum(1, keepdim=True)


def smoothed(classes: list[int], smoothing: float) -> Tensor:
    return torch.tensor([[smoothing / 3 + (1 - smoothing) * (k == c) for k in range(3)] for c in classes])


def test_loss_and_gradients_are_cross_entropy_of_the_mixed_images():
    method, ids = make(), torch.tensor([4, 1, 7, 2])
    targets = smoothed(LABELS.of_id[ids].tolist(), 0.1)
    kinds = set()
    for step in range(6):
        drawn = method.draw(draws(step))
        which, share, across, down = drawn["mix"][0].tolist()
        pixels, partner = images(), [1, 0, 3, 2]
        if which < 0.5:
            top, bottom, left, right = mixing.box((32, 32), share, across, down)  # Beta(1, 1) is uniform
            mixed = pixels.clone()
            for row in range(4):
                mixed[row, :, top:bottom, left:right] = pixels[partner[row], :, top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / 32**2
        else:
            share = mixing.beta(0.8, share)
            mixed = share * pixels + (1 - share) * pixels[partner]
        kinds.add(which < 0.5)
        wanted = share * targets + (1 - share) * targets[partner]
        method.zero_grad()
        report = method((images(),), ids, drawn)
        report["loss"].backward()
        ours = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
        method.zero_grad()
        found = probabilities(method, mixed)
        expected = -(wanted * found.log()).sum() / 4
        expected.backward()
        assert report["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
        right = (found.argmax(1) == wanted.argmax(1)).double().mean().item()
        assert report["train_top1"].item() == pytest.approx(100 * right)
        theirs = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4, msg=name)
    assert kinds == {True, False}


def test_smoothing_is_torch_s():
    classifier, features, classes = Classifier(8, 5, smoothing=0.1), torch.randn(7, 8), torch.arange(7) % 5
    scores = classifier(features)
    expected = F.cross_entropy(scores, classes, label_smoothing=0.1)
    torch.testing.assert_close(classifier.loss(scores, classifier.targets(classes)), expected)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_is_timm_s_for_equal_shares_and_boxes(kind: str, monkeypatch: pytest.MonkeyPatch):
    """timm's partners lie mirrored in the batch, ours side by side: of two images both are the same."""
    classifier = Classifier(8, 3, smoothing=0.1)
    for step in range(20):
        share, across, down = np.random.default_rng(step).uniform(size=3)
        theirs = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=3)
        monkeypatch.setattr(theirs, "_params_per_batch", lambda share=share: (share, kind == "cutmix"))
        places = iter((int(down * 32), int(across * 24)))
        monkeypatch.setattr(np.random, "randint", lambda *args, places=places, **kwargs: next(places))
        pixels, classes = torch.randn(2, 3, 32, 24), torch.tensor([0, 2])
        expected = theirs(pixels.clone(), classes)
        targets = classifier.targets(classes)
        ours = (
            mixing.mixup(pixels, targets, share)
            if kind == "mixup"
            else mixing.cutmix(pixels, targets, mixing.box((32, 24), share, across, down))
        )
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_ranks_and_micro_batches_mix_as_one_process_does():
    method, ids = make(erase=0.5), torch.arange(8)
    whole = method.draw(draws(3, batch=8))
    for part in (slice(0, 2), slice(2, 8)):
        drawn = method.draw(draws(3, batch=8, rows=part))
        assert all(torch.equal(drawn[name], whole[name][part]) for name in whole)
    losses = [
        method((images(8)[part],), ids[part], {k: v[part] for k, v in whole.items()})["loss"].item()
        for part in (slice(0, 8), slice(0, 4), slice(4, 8))
    ]
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-5)
    with pytest.raises(BadInput, match="3 images, an odd number"):
        method((images(3),), ids[:3], {k: v[:3] for k, v in whole.items()})
    with pytest.raises(BadInput, match="even where images are mixed"):
        Settings(batch_size=7).check("supervised")
    Settings(batch_size=7, mixup=0.0, cutmix=0.0).check("supervised")


def test_shares_follow_the_beta_distribution_and_kinds_the_switch():
    method = make()
    numbers = np.array([method.draw(draws(step))["mix"][0].tolist() for step in range(1000)])
    assert abs((numbers[:, 0] < 0.5).mean() - 0.5) < 0.06
    shares = [mixing.beta(0.8, uniform) for uniform in numbers[:, 1]]
    assert kstest(shares, "beta", args=(0.8, 0.8)).pvalue > 1e-3
    assert abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.12


def test_only_one_kind_of_mixing_where_only_one_is_wanted():
    pixels, targets = images(2), smoothed([0, 1], 0.0)
    for numbers in ([0.1, 0.3, 0.5, 0.5], [0.9, 0.3, 0.5, 0.5]):
        blended, _ = make(cutmix=0.0).mix(pixels, targets, numbers)
        assert not (blended == pixels).any()
        cut, _ = make(mixup=0.0).mix(pixels, targets, numbers)
        assert 0 < (cut == pixels).float().mean() < 1
    assert set(make(mixup=0.0, cutmix=0.0).draw(draws())) == set()


def test_erased_rectangles_are_those_of_timm():
    """As distributions, over many images."""
    uniforms = torch.rand(20_000, mixing.ERASING, generator=torch.Generator().manual_seed(0))
    boxes = mixing.erased_boxes(uniforms, (48, 64), 0.25)
    tall, wide = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    assert (boxes >= 0).all()
    assert (boxes[:, 1] <= 48).all()
    assert (boxes[:, 3] <= 64).all()
    erased = tall > 0
    assert abs(erased.float().mean() - 0.25) < 0.015
    theirs, sizes = RandomErasing(probability=1.0, mode="const", device="cpu"), []
    for _ in range(3000):
        hole = theirs(torch.ones(1, 48, 64))[0] == 0
        sizes.append((hole.any(1).sum().item(), hole.any(0).sum().item(), hole.any(1).int().argmax().item()))
    for ours, other in zip((tall, wide, boxes[:, 0]), zip(*sizes), strict=True):
        assert kstest(ours[erased].numpy(), np.array(other)).pvalue > 1e-3
    assert not (mixing.erased_boxes(uniforms, (48, 64), 0.0).diff(dim=1)[:, ::2] > 0).any()


def test_erasing_puts_normal_noise_into_the_rectangle_alone():
    boxes = torch.tensor([[0, 0, 0, 0], [3, 20, 5, 32]])
    noise, pixels = draws(batch=2).field(3, 32, 32), torch.full((2, 3, 32, 32), 9.0)
    assert torch.equal(noise[0], noise[1])
    erased = mixing.erase(pixels, boxes, torch.tensor([1.0, -1.0]), noise[0])
    assert torch.equal(erased[0], pixels[0])
    assert torch.equal(erased[1, :, 3:20, 5:32], -noise[1, :, 3:20, 5:32])
    assert (erased[1] == 9).sum() == 3 * (32 * 32 - 17 * 27)
    assert kstest(noise[0].flatten().numpy(), "norm").pvalue > 1e-3


def test_layer_decay_is_timm_s():
    method = make(encoder={"depth": 4, "fc_norm": True}, layer_decay=0.65, base_lr=1e-3, weight_decay=0.05)
    ours = {}
    for group in method.groups(256):
        for name in group.parameters:
            ours[name.replace("classifier", "encoder.head").removeprefix("encoder.")] = (
                group.peak_lr,
                group.weight_decay,
            )
    twin = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=4, num_classes=3,
        global_pool="avg", fc_norm=True,
    )  # fmt: skip
    names = {parameter: name for name, parameter in twin.named_parameters()}
    theirs = {
        names[parameter]: (1e-3 * group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(twin, 0.05, layer_decay=0.65, no_weight_decay_list=twin.no_weight_decay())
        for parameter in group["params"]
    }
    assert ours.keys() == theirs.keys()
    for name, (lr, decay) in ours.items():
        assert (lr, decay) == (pytest.approx(theirs[name][0]), theirs[name][1]), name


def test_all_parameters_decay_where_that_is_wanted():
    assert {group.weight_decay for group in make(decay_all=True).groups(256)} == {0.3}
    assert {group.peak_lr for group in make(base_lr=2e-4).groups(512)} == {4e-4}


def test_the_average_holds_encoder_and_classifier():
    method = make(weight_ema=0.5, warmup=0.0, base_lr=1.0)
    update, before = Update(method, 10), method.classifier.weight.detach().clone()
    for step in range(2):
        update(step, (images(),), torch.arange(4), method.draw(draws(step)))
        after = method.classifier.weight.detach().clone()
        before = before + 0.5 * (after - before)
    assert "classifier.bias" in update.average.weights
    assert "blocks.0.mlp.fc1.weight" in update.average.weights
    torch.testing.assert_close(update.average.weights["classifier.weight"], before)
    with update.average.in_place():
        torch.testing.assert_close(method.classifier.weight.detach(), before)
    assert torch.equal(method.classifier.weight, after)


def test_the_view_is_what_the_settings_say():
    (view,) = make(operations=2, magnitude=5.0, magnitude_std=0.1, pad=4, crop_scale=(0.3, 0.9), flip=0.25).views()
    assert (view.operations, view.operation, view.magnitude, view.magnitude_std) == (2, 0.5, 5.0, 0.1)
    assert (view.size, view.scale, view.pad, view.flip) == ((32, 32), (0.3, 0.9), 4, 0.25)


@pytest.mark.parametrize(
    ("setting", "valid"),
    [
        ({"layer_decay": 0.0}, "a share above 0"),
        ({"label_smoothing": 1.0}, "from 0 to below 1"),
        ({"operations": 4}, "from 0 to 3"),
        ({"magnitude": 11.0}, "from 0 to 10"),
        ({"labels_per_class": -1}, "a whole number from 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(setting: dict, valid: str):
    with pytest.raises(BadInput, match=valid):
        dataclasses.replace(Settings(), **setting).check("supervised")


def test_published_numbers():
    def of(model: str, preset: str) -> tuple[Settings, dict]:
        chosen = recipe("supervised", model, preset, embedded=False)
        return chosen.stages[0][1], chosen.encoder

    for model, epochs, lr, decay, drop_path in (
        ("vit_base_patch16_224", 100, 5e-4, 0.65, 0.1),
        ("vit_large_patch16_224", 50, 1e-3, 0.75, 0.2),
        ("vit_huge_patch14_224", 50, 1e-3, 0.75, 0.3),
    ):
        tuned, encoder = of(model, "finetune")
        assert (tuned.epochs, tuned.base_lr, tuned.layer_decay, encoder["drop_path"]) == (epochs, lr, decay, drop_path)
        assert tuned.warmup * tuned.epochs == pytest.approx(5)
        assert (tuned.batch_size, tuned.weight_decay, tuned.betas, tuned.end_lr) == (1024, 0.05, (0.9, 0.999), 1e-6)
        assert (tuned.label_smoothing, tuned.mixup, tuned.cutmix, tuned.cutmix_share) == (0.1, 0.8, 1.0, 0.5)
        assert (tuned.operations, tuned.magnitude, tuned.magnitude_std, tuned.erase) == (2, 9, 0.5, 0.25)
        assert (tuned.clip_norm, tuned.weight_ema, tuned.head_std) == (0, 0, 2e-5)
        assert (encoder["global_pool"], encoder["fc_norm"]) == ("avg", True)
    for model, epochs in (("vit_base_patch16_224", 300), ("vit_large_patch16_224", 200)):
        scratch, _ = of(model, "plain")
        assert (scratch.epochs, scratch.batch_size, scratch.base_lr) == (epochs, 4096, 1e-4)
        assert scratch.warmup * epochs == pytest.approx(20)
        assert (scratch.weight_decay, scratch.betas, scratch.weight_ema) == (0.3, (0.9, 0.95), 0.9999)
    for name, pad in (("cifar10", 4), ("tiny-imagenet", 4), ("flowers102", 0), ("imagenet100", 0)):
        base, encoder = of("vit_small_patch16_224", name)
        assert (base.base_lr * base.batch_size / 256, base.end_lr, base.schedule) == (5e-4, 1.25e-6, "quarter-cosine")
        assert (base.weight_decay, base.decay_all, base.clip_norm, base.warmup) == (0.1, True, 1.0, 0.1)
        assert (base.batch_size, base.epochs, base.mixup, base.cutmix, base.operations) == (256, 100, 0, 0, 0)
        assert (base.pad, encoder["drop_path"], encoder["global_pool"]) == (pad, 0.1, "token")
        base.check("supervised")


def test_groups_hold_every_trained_parameter_once():
    method = make(encoder={"reg_tokens": 2, "positions": "sincos"}, layer_decay=0.5)
    counts = Counter(name for group in method.groups(256) for name in group.parameters)
    assert counts == {name: 1 for name, parameter in method.named_parameters() if parameter.requires_grad}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very short run on few of the embedded digits, with an average and all that is done to images."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    flags = {"weight-ema": 0.9, "mixup": 0.8, "cutmix": 1.0, "operations": 1, "erase": 0.25, "pad": 2, "head-std": 0.5}
    given = [word for flag, value in flags.items() for word in (f"--supervised.{flag}", str(value))]
    assert train.main([*RUN, "--epochs", "2", "--out", str(folder), *given]) == 0
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2
    return folder


def test_a_run_reports_its_accuracy_and_exports_the_classifier_that_has_it(trained: Path):
    (probe,) = json.loads((trained / "summary.json").read_text())["probes"]
    classifier = timm.create_model(f"local-dir:{trained / 'export'}", pretrained=True).eval()
    right = []
    for batch in eval_batches(open_images(None, "val"), (32, 32), 120, threads=1):
        with torch.no_grad():
            right += (classifier(batch.images[0]).argmax(1) == batch.labels).tolist()
    assert len(right) == 360
    assert 100 * np.mean(right) == pytest.approx(probe["top1"])


def test_fine_tuning_starts_from_a_run_with_a_new_norm_and_few_labels(trained: Path, capsys: pytest.CaptureFixture):
    flags = [
        "--preset",
        "finetune",
        "--weights",
        str(trained),
        "--out",
        str(trained.with_name("tuned")),
        "--epochs",
        "1",
    ]
    assert train.main([*RUN, *flags]) == 0
    assert "the norm after pooling starts anew" in capsys.readouterr().out
    saved = json.loads((trained.with_name("tuned") / "config.json").read_text())
    assert (saved["encoder"]["fc_norm"], saved["stages"][0]["layer_decay"]) == (True, 0.65)
    assert json.loads((trained.with_name("tuned") / "summary.json").read_text())["steps"] == 1
