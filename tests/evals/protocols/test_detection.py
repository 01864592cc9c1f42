"""Detection: what is learnt and judged, the published numbers, and the whole protocol on a small set of coloured squares."""

import dataclasses
import json
import math
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from engine import evals
from engine.core.errors import BadInput
from engine.data.annotated import coco
from engine.data.annotated.jitter import fit
from engine.evals import detecting
from engine.evals.detecting import Recipe
from engine.evals.detection import Form
from engine.evals.features import encoder_of, raw_pixels
from engine.evals.metrics.coco_ap import coco_ap
from engine.evals.protocols import detection
from engine.evals.subject import Subject
from engine.evals.training import Diverged
from engine.model import vit

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}
TINY = Form(
    size=64,
    window=4,
    channels=16,
    anchors=(12, 18, 24, 36, 48),
    rpn_convs=1,
    rpn_samples=64,
    candidates=(100, 50),
    proposals=50,
    roi_samples=32,
    box_convs=1,
    box_hidden=64,
    mask_convs=1,
    detections=10,
)
RECIPE = Recipe(
    source="for tests",
    form=TINY,
    epochs=1,
    batch_size=4,
    lr=2e-3,
    weight_decay=0.05,
    drop_path=0.0,
    scale=(0.8, 1.2),
    flip=0.0,
)


def write(folder, split: str, images: int, seed: int, categories=("red", "green")) -> None:
    """Images of 80x64 pixels with one or two squares in the colours of their names; the last has none, the first a crowd."""
    rng = np.random.default_rng(seed)
    whole = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 7 + i, "name": name} for i, name in enumerate(COLOURS)],
    }
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for number in range(1, images + 1):
        pixels = rng.integers(100, 130, (64, 80, 3)).astype(np.uint8)
        for half in range(int(rng.integers(1, 3)) if number < images else 0):
            name, side = categories[int(rng.integers(len(categories)))], int(rng.integers(16, 32))
            x, y = 40 * half + int(rng.integers(0, 40 - side)), int(rng.integers(0, 64 - side))
            pixels[y : y + side, x : x + side] = COLOURS[name]
            corners = [x, y, x + side, y, x + side, y + side, x, y + side]
            whole["annotations"].append(
                {
                    "id": len(whole["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 7 + list(COLOURS).index(name),
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                    "segmentation": [corners],
                }
            )
        if number == 1:
            runs = {"size": [64, 80], "counts": [0, 64 * 4, 64 * 76]}
            crowd = {"id": 1000, "iscrowd": 1, "bbox": [0, 0, 4, 64], "area": 256, "segmentation": runs}
            whole["annotations"].append(crowd | {"image_id": 1, "category_id": 7})
        whole["images"].append({"id": number, "file_name": f"{number}.png", "width": 80, "height": 64})
        Image.fromarray(pixels).save(folder / split / f"{number}.png")
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(whole))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    write(folder, "train", 17, 0)
    write(folder, "val", 6, 1)
    return folder


@pytest.fixture(scope="module")
def sets(folder):
    return tuple(coco.open_objects(folder, split, screening="header") for split in ("train", "val"))


@pytest.fixture(scope="module")
def subject():
    model = vit.create("vit_micro_patch8_32", depth=4, generator=torch.Generator().manual_seed(0))
    return Subject("squares", encoder_of(model), threads=2)


def run(subject: Subject, sets, seed: int = 0, **changes) -> detecting.Trained:
    recipe = dataclasses.replace(RECIPE, **changes)
    ids, encoder = detecting.with_objects(sets[0]), subject.trainable(recipe.drop_path)
    before = torch.get_rng_state()
    trained = detecting.fitted(subject, encoder, recipe, sets[0], ids, sets[1], np.arange(len(sets[1])), seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    return trained


class Oracle(nn.Module):
    """Finds the objects of a set's images, in their order, as they lie in what it is given; `shift` in its pixels."""

    def __init__(self, images, shift: float = 0.0):
        super().__init__()
        self.images, self.shift, self.next = images, shift, 0

    def forward(self, given):
        outputs = []
        for pixels in given:
            objects, (height, width) = (
                self.images.objects[self.next],
                self.images.images.sizes[self.next][::-1].tolist(),
            )
            share = torch.tensor([pixels.shape[2] / width, pixels.shape[1] / height] * 2)
            masks = torch.from_numpy(self.images.masks(self.next)).float().view(-1, 1, height, width)
            if len(masks):
                masks = nn.functional.interpolate(masks, pixels.shape[1:], mode="bilinear")
            masks = masks if len(masks) else torch.zeros(0, 1, *pixels.shape[1:])
            outputs.append(
                {
                    "boxes": torch.from_numpy(objects.boxes) * share + self.shift,
                    "labels": torch.from_numpy(objects.labels) + 1,
                    "scores": torch.ones(len(objects)),
                    "masks": masks.roll(int(self.shift), -1),
                }
            )
            self.next += 1
        return outputs


@pytest.mark.parametrize("size", [64, 80, 144])
def test_a_perfect_detector_has_ap_1_at_any_size(sets, subject, size):
    ids = np.arange(len(sets[1]))
    truth = detecting.truth_of(sets[1], ids)
    found = detecting.found_by(Oracle(sets[1]), sets[1], ids, size, subject)
    for kind in detecting.KINDS:
        judged = coco_ap(truth, found, 3, kind)
        assert judged.ap == pytest.approx(1) and math.isnan(judged.large) and math.isnan(judged.by_category[2])
    beside = detecting.found_by(Oracle(sets[1], 0.25 * size / 4), sets[1], ids, size, subject)
    assert coco_ap(truth, beside, 3, "box").ap < 0.7 and coco_ap(truth, beside, 3, "mask").ap < 0.7


def test_what_is_learnt_is_what_counts_and_comes_from_the_seed_alone(sets):
    ids = detecting.with_objects(sets[0])
    assert len(ids) == 16 and not len(sets[0].objects[16])
    recipe = dataclasses.replace(RECIPE, epochs=2)
    drawn = ((0, 1), (0, 4), (1, 1))
    runs = [[*chain(*detecting.batches(sets[0], ids, recipe, seed, threads))] for seed, threads in drawn]
    assert [len(batch) for batch in detecting.batches(sets[0], ids, recipe, 0, 2)] == [4] * 8
    for one, other in zip(*runs[:2], strict=True):
        assert torch.equal(one.image, other.image) and torch.equal(one.boxes, other.boxes)
    assert not torch.equal(runs[0][0].image, runs[2][0].image)
    learnt = torch.cat([example.labels for example in runs[0]])
    assert set(learnt.tolist()) <= {0, 1}
    # the crowd at the left edge of the first image is no object to learn
    (first,) = next(detecting.batches(sets[0], ids[:1], dataclasses.replace(recipe, batch_size=1, scale=(1, 1)), 0, 1))
    counted = ~sets[0].objects[0].ignored
    assert counted.sum() == len(sets[0].objects[0]) - 1 == len(first.labels)
    np.testing.assert_allclose(first.boxes, sets[0].objects[0].boxes[counted] * 0.8, atol=1)


def test_a_short_training_learns_and_is_a_function_of_the_seed(sets, subject):
    before = {name: parameter.clone() for name, parameter in subject.vit.named_parameters()}
    first, again, other = (run(subject, sets, seed, epochs=3, drop_path=0.2) for seed in (0, 0, 1))
    total = np.sum(list(first.losses.values()), 0)
    assert first.steps == 12 and total[2] < total[1] < total[0] and total[2] < 0.8 * total[0]
    assert first.losses == again.losses != other.losses
    assert detecting.figures(first.precision) == detecting.figures(again.precision)
    assert all(torch.equal(before[name], parameter) for name, parameter in subject.vit.named_parameters())


def test_the_parts_of_vitdet_learn_too(subject, sets):
    form = dataclasses.replace(TINY, pyramid="simple", head_norm="ln")
    vitdet = {"schedule": "steps", "drops": (0.9,), "warmup_steps": 2, "warmup_start": 0.001, "layer_decay": 0.7}
    trained = run(subject, sets, form=form, epochs=2, **vitdet)
    first, last = np.sum(list(trained.losses.values()), 0)
    assert last < first and trained.taps == (3,)


def test_an_encoder_with_relative_positions_is_taken_and_learns(sets):
    kind = dict(positions="relative", init_values=0.1, depth=4)
    model = vit.create("vit_micro_patch8_32", generator=torch.Generator().manual_seed(0), **kind)
    beit = Subject("beit", encoder_of(model), threads=2)
    for preset in detection.PRESETS:
        detection.check_model(beit, *sets, detection.Settings(preset=preset))
    first, last = np.sum(list(run(beit, sets, epochs=2).losses.values()), 0)
    assert last < first


def test_groups_spare_norms_and_positions_and_fall_by_layer(subject):
    recipe = dataclasses.replace(RECIPE, layer_decay=0.5, lr=1.0)
    model = detecting.create(subject.trainable(), 2, TINY)
    found = {}
    for group in detecting.groups(model, model.backbone.vit.encoder, recipe):
        for name in group.parameters:
            found[name.removeprefix("backbone.vit.")] = group.peak_lr, group.weight_decay
    assert len(found) == sum(parameter.requires_grad for parameter in model.parameters())
    assert found["encoder.patch_embed.proj.weight"] == (0.5**5, 0.05) and found["encoder.pos_embed"] == (0.5**5, 0.0)
    assert found["encoder.blocks.0.attn.qkv.weight"] == (0.5**4, 0.05)
    assert found["encoder.blocks.3.attn.qkv.weight"] == (0.5, 0.05)
    assert found["encoder.blocks.3.mlp.fc1.bias"] == (0.5, 0.05) and found["encoder.blocks.3.norm1.weight"] == (
        0.5,
        0.0,
    )
    assert found["global_bias.relative_position_bias_table"] == (1.0, 0.0)
    assert found["roi_heads.box_predictor.cls_score.weight"] == (1.0, 0.05)


def test_the_published_numbers():
    """Of the benchmark and of ViTDet, beside the table of what each initialisation was trained with."""
    chosen = {
        "random": (1.6e-4, 0.2),
        "supervised": (8e-5, 0.1),
        "mocov3": (1.6e-4, 0.1),
        "beit": (8e-5, 0.1),
        "mae": (8e-5, 0.1),
    }
    assert chosen == detection.RATES
    for start, (lr, weight_decay) in chosen.items():
        for depth, drop_path in ((12, 0.1), (24, 0.3)):
            recipe = detection.preset("benchmark", start, depth, 16)
            assert (recipe.lr, recipe.weight_decay, recipe.drop_path) == (lr, weight_decay, drop_path)
            assert (recipe.epochs, recipe.batch_size) == (400 if start == "random" else 100, 64)
            assert (recipe.scale, recipe.flip, recipe.layer_decay) == ((0.1, 2.0), 0.5, 1.0)
            assert recipe.form == Form() and (recipe.form.size, recipe.form.window) == (1024, 14)
            assert (recipe.form.pyramid, recipe.form.head_norm, recipe.form.relative) == ("four-blocks", "bn", True)
            shares = [recipe.share_of_peak(step, 1000) for step in (0, 125, 250)]
            assert shares == pytest.approx([0, 0.5, 1])  # a quarter of an epoch
            half = (recipe.epochs * 1000 + 250) // 2
            assert recipe.share_of_peak(half, 1000) == pytest.approx(0.5)
    assert detection.LENGTHS == {"random": (100, 200, 400), "pre-trained": (25, 50, 100)}
    assert detection.TUNING_START == (1.6e-4, 0.1)
    assert detection.TUNING_EPOCHS == {"random": (100, 50), "pre-trained": (25, 50)}
    assert detecting.BETAS == (0.9, 0.999)
    for depth, layer_decay, drop_path, epochs in ((12, 0.7, 0.1, 100), (24, 0.8, 0.4, 100), (32, 0.9, 0.5, 75)):
        recipe = detection.preset("vitdet", "mae", depth, 16)
        assert (recipe.lr, recipe.weight_decay, recipe.batch_size) == (1e-4, 0.1, 64)
        assert (recipe.layer_decay, recipe.drop_path, recipe.epochs) == (layer_decay, drop_path, epochs)
        assert (recipe.form.pyramid, recipe.form.head_norm, recipe.form.window) == ("simple", "ln", 14)
    recipe = detection.preset("vitdet", "mae", 12, 16)
    shares = {step: recipe.share_of_peak(step, 1844) for step in (0, 250, 163_000, 165_000, 177_000, 178_000)}
    assert list(shares.values()) == pytest.approx([0.001, 1, 1, 0.1, 0.1, 0.01])


def test_weights_are_told_what_they_come_from():
    def start(name: str, said: str = "") -> str:
        return detection.initialisation(name, detection.Settings(initialisation=said))

    assert start("random vit_base_patch16_224") == "random" and start("run") == "mae"
    assert start("run", "beit") == start("random vit", "beit") == "beit"
    assert [start(name, "a=beit, b=mocov3") for name in ("a", "b", "c", "random x")] == [
        "beit",
        "mocov3",
        "mae",
        "random",
    ]


def test_departures_from_a_preset_are_said():
    recipe, said = detection.chosen(detection.Settings(preset="benchmark"), "mae", 12, 16)
    assert said == "" and recipe == detection.preset("benchmark", "mae", 12, 16)
    given = detection.Settings(preset="benchmark", lr=1e-3, weight_decay=0.0, size=512, pyramid="simple")
    recipe, said = detection.chosen(given, "mae", 12, 16)
    assert said == "; lr, weight decay, size, pyramid as chosen"
    assert (recipe.lr, recipe.weight_decay, recipe.form.size, recipe.form.pyramid) == (1e-3, 0.0, 512, "simple")
    assert recipe.form.anchors == Form().anchors
    double, _ = detection.chosen(detection.Settings(size=256), "mae", 12, 8)
    assert double.form.anchors == tuple(2 * side for side in Form.small(8).anchors)


@pytest.fixture
def tiny(monkeypatch):
    """The preset at the size of these tests."""
    monkeypatch.setattr(detection, "preset", lambda *given: RECIPE)


def test_the_protocol_from_sets_to_result(sets, subject, tiny):
    settings = {"detection": detection.Settings(epochs=2, looks=1)}
    given = evals.Sets(objects=sets)
    (result,) = evals.evaluate({"squares": subject.vit}, given, ("detection",), settings=settings, threads=2)
    json.dumps([result.values, result.settings, result.details, result.counts], allow_nan=False)
    assert {"box AP", "box AP50", "box AP75", "mask AP", "mask AP50", "last-epoch box AP", "best-epoch box AP"} <= set(
        result.values
    )
    assert "box AP large" not in result.values and all(0 <= value <= 1 for value in result.values.values())
    assert result.values["box AP"] == result.values["last-epoch box AP"] <= result.values["best-epoch box AP"]
    assert [row["epoch"] for row in result.details["figures by epoch"]] == [1, 2]
    assert result.headline == ("box AP", "mask AP", "box AP50") and not result.samples
    assert (
        result.settings["recipe"] == "for tests; epochs as chosen"
        and result.settings["size"] == result.details["form of the detector"]["size"] == 64
    )
    assert result.settings["AP computed by"] in ("pycocotools", "faster-coco-eval") and result.settings["steps"] == 8
    assert result.counts["training images"] == 16 and result.counts["training images without an object, left out"] == 1
    assert result.counts["training objects ignored"] == result.counts["test objects ignored"] == 1
    assert result.counts["categories"] == 3 and result.counts["categories without a training object"] == 1
    assert result.details["box AP by category"]["blue"] is None and result.details["box AP by category"]["red"] >= 0
    assert len(result.pictures) == 3 and all(figure.axes for figure in result.pictures.values())
    assert "blocks 0, 1, 2, 3" in result.feature


def test_tuning_is_told_as_a_table_and_its_choice_is_trained(sets, subject, tiny, monkeypatch):
    tried = []

    def fitted(subject, encoder, recipe, train, train_ids, test, test_ids, *, seed, looks=0, title=""):
        tried.append((recipe, train_ids, test_ids, test is train, encoder.architecture.drop_path))
        if recipe.lr > 5e-3:
            raise Diverged("did not stay finite")
        if "trial" not in title:
            return whole
        figure = 1 - abs(math.log2(recipe.lr / 4e-3)) / 10 - abs(recipe.drop_path - 0.2)
        return dataclasses.replace(whole, precision={"box": dataclasses.replace(whole.precision["box"], ap=figure)})

    whole = run(subject, sets)
    monkeypatch.setattr(detecting, "fitted", fitted)
    settings = detection.Settings(tune=True, tune_epochs=3)
    result = detection.evaluate(subject, *sets, settings)
    assert (result.settings["lr"], result.settings["weight_decay"], result.settings["drop_path"]) == (4e-3, 0.05, 0.2)
    assert result.settings["recipe"].endswith("lr, weight decay and drop path tuned on 20% of the training images")
    table = result.details["tuning"]
    assert [row["run"] for row in table] == list(range(1, 12 + 4 + 1))
    assert [row["epochs"] for row in table] == [3] * 12 + [6] * 4
    assert {row["box AP"] for row in table if row["lr"] == "0.008"} == {"diverged"}
    assert "paper tuned on COCO's validation set" in result.details["tuning was"]
    for _, learnt, held_out, of_train, _ in tried[:-1]:
        assert of_train and sorted([*learnt, *held_out]) == list(range(16)) and len(held_out) == 3
    recipe, learnt, _, of_train, drop_path = tried[-1]
    assert recipe.epochs == 1 and len(learnt) == 16 and not of_train and drop_path == 0.2
    json.dumps(result.details, allow_nan=False)


def test_training_from_scratch_as_published_starts_as_beit(subject):
    started = [
        detection._encoder(subject, RECIPE, detection.Settings(preset=preset, seed=seed), start)
        .blocks[3]
        .mlp.fc2.weight
        for preset, start, seed in (
            ("benchmark", "random", 0),
            ("benchmark", "random", 1),
            ("benchmark", "mae", 0),
            ("scenes", "random", 0),
        )
    ]
    own = subject.vit.blocks[3].mlp.fc2.weight
    assert torch.equal(started[2], own) and torch.equal(started[3], own)
    assert not torch.equal(started[0], started[1])
    assert started[0].std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)


def test_sets_that_cannot_be_judged_are_refused(folder, sets, tmp_path, subject):
    train, test = sets
    settings = detection.Settings()
    for broken, part in ((None, "annotations"), ("segmentation", "masks")):
        place = tmp_path / part
        write(place, "train", 3, 0)
        file = place / "annotations" / "instances_train.json"
        whole = json.loads(file.read_text())
        if broken is None:
            whole["annotations"] = [entry for entry in whole["annotations"] if entry["iscrowd"]]
        else:
            for entry in whole["annotations"]:
                del entry["segmentation"]
        file.write_text(json.dumps(whole))
    empty, bare = (coco.open_objects(tmp_path / part, "train", screening="header") for part in ("annotations", "masks"))
    with pytest.raises(BadInput, match="no object of the training set counts"):
        detection.check(empty, test, settings)
    with pytest.raises(BadInput, match="no object of the test set counts"):
        detection.check(train, empty, settings)
    with pytest.raises(BadInput, match=r"annotation \d+ of .*instances_train.json has no segmentation"):
        detection.check(bare, test, settings)
    with pytest.raises(BadInput, match="different categories"):
        detection.check(dataclasses.replace(train, categories=("a", "b", "c")), test, settings)
    with pytest.raises(BadInput, match="give the weights of a ViT"):
        evals.evaluate({"raw": raw_pixels()}, evals.Sets(objects=sets), ("detection",))
    with pytest.raises(BadInput, match="size 100 is not a multiple of the patch size 8"):
        detection.evaluate(subject, *sets, detection.Settings(size=100))
    one = dataclasses.replace(RECIPE, batch_size=64)
    with pytest.raises(BadInput, match="20% of 2 training images, which is none"):
        detection.tuned(subject, train, np.arange(2), one, detection.Settings(tune=True), "mae")


@pytest.mark.parametrize(
    "wrong",
    [
        {"preset": "coco"}, {"initialisation": "dino"}, {"initialisation": "a=mae,b=dino"}, {"epochs": -1}, {"batch_size": -1},
        {"lr": -1.0}, {"weight_decay": -0.5}, {"drop_path": 1.0}, {"layer_decay": 1.5}, {"size": -1}, {"pyramid": "fpn"},
        {"looks": -1},
    ],
)  # fmt: skip
def test_settings_are_checked(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        detection.Settings(**wrong)


def test_what_is_judged_keeps_the_shape_of_the_image(sets):
    pixels = torch.zeros(3, 64, 80, dtype=torch.uint8)
    assert fit(pixels, 40).shape == (3, 32, 40)
