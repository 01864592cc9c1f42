"""A linear head on frozen patches, on pictures whose classes are colours."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from engine.core.errors import BadInput
from engine.data.annotated import crops, dense
from engine.evals import segmenting
from engine.evals.metrics.confusion import confusion, mean_iou
from engine.evals.protocols import segment_linear
from engine.evals.protocols.segment_linear import RECIPES, Settings, check, evaluate
from engine.evals.segmentation.heads import LinearHead, OnFrozen

SMALL = {"size": 32, "steps": 45, "batch_size": 4, "lr": 3e-2}


@pytest.fixture(scope="module")
def result(untrained, colours):
    return evaluate(untrained, *colours, Settings(**SMALL, looks=2))


def test_learns_colours(result):
    losses = result.details["loss by step"]
    assert len(losses) == 45 and np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    assert result.values["mIoU"] > 0.6 > 2 * result.details["mIoU of the most frequent class everywhere"]


def test_what_the_result_says(result, colours):
    assert set(result.values) == {
        "mIoU", "best mIoU on the way", "pixel accuracy", "mean class accuracy", "image mIoU", "image pixel accuracy",
    }  # fmt: skip
    looked = result.details["mIoU by step"]
    assert list(looked) == ["15", "30", "45"] and looked["45"] == result.values["mIoU"]
    assert result.values["best mIoU on the way"] == max(looked.values())
    assert result.headline == ("mIoU", "pixel accuracy")
    for name, samples in result.samples.items():
        assert samples.shape == (2,) and result.values[name] == pytest.approx(samples.mean())
    assert set(result.details["IoU by class"]) == set(colours[1].semantic_classes)
    assert result.counts == {
        "training images": 4, "test images": 2, "training crops": 180, "test pixels": 2 * 64 * 64,
    }  # fmt: skip
    assert set(result.pictures) == {"images, truth and prediction", "IoU by class", "loss"}
    assert "ours" in result.settings["recipe"] and "steps, batch size, lr, size as chosen" in result.settings["recipe"]
    assert "blocks 0, 0, 1, 2" in result.feature


def test_the_matrix_is_that_of_windows_put_together(untrained, colours):
    recipe = replace(RECIPES["scenes"], size=32, short=48, stride=16)
    head = segmenting.seeded(0, lambda: LinearHead(128, 5), torch.device("cpu"))
    model = OnFrozen(untrained.maps, head).eval()
    counts = segmenting.judged(model, colours[1], recipe, untrained)
    assert model.training
    model.eval()
    total = np.zeros((5, 5), np.int64)
    for index in range(2):
        pixels = dense.read(colours[1].images, index)
        small = dense.normalised(crops.resized(pixels, 48))
        logits, times = torch.zeros(5, 48, 48), torch.zeros(48, 48)
        for top in (0, 16):
            for left in (0, 16):
                window = (slice(top, top + 32), slice(left, left + 32))
                with torch.no_grad():
                    (found,) = model(small[None, :, *window])
                logits[:, *window] += torch.nn.functional.interpolate(found, (32, 32), mode="bilinear")[0]
                times[*window] += 1
        large = torch.nn.functional.interpolate((logits / times)[None], (64, 64), mode="bilinear")
        total += confusion(colours[1].semantic(index), large[0].argmax(0).numpy(), 5)
    assert np.abs(counts.matrix_KK - total).sum() <= 4  # ties by rounding


def test_is_a_function_of_the_seed_and_leaves_the_encoder_and_torchs_generator_alone(untrained, colours):
    before, state = {k: v.clone() for k, v in untrained.vit.state_dict().items()}, torch.get_rng_state()
    few = Settings(**SMALL | {"steps": 3})
    first, again, other = (evaluate(untrained, *colours, replace(few, seed=seed)) for seed in (0, 0, 1))
    assert first.details["loss by step"] == again.details["loss by step"] != other.details["loss by step"]
    assert first.values == again.values
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in untrained.vit.state_dict().items())


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("dinov3", {"steps": 40_000, "batch_size": 16, "lr": 1e-3, "weight_decay": 1e-3, "warmup": 1500, "blocks": False,
                    "schedule": "cosine", "dropout": 0.1}),
        ("ibot", {"steps": 160_000, "batch_size": 16, "lr": 7e-4, "weight_decay": 0.05, "warmup": 1500, "blocks": True,
                  "schedule": "poly", "warmup_start": 1e-6}),
    ],
)  # fmt: skip
def test_published_numbers(name, wanted):
    shared = {"size": 512, "short": 512, "stride": 341, "ratio": (0.5, 2.0), "flip": 0.5, "photometric": True}
    found = asdict(RECIPES[name])
    assert {key: found[key] for key in wanted | shared} == wanted | shared


@pytest.mark.parametrize("name", ["dinov3", "ibot"])
def test_schedules(name):
    recipe = RECIPES[name]
    assert recipe.share_of_peak(0) == recipe.warmup_start < 1e-5
    assert recipe.share_of_peak(1500) == 1 and recipe.share_of_peak(750) == pytest.approx(0.5, abs=1e-5)
    middle = (1500 + recipe.steps) // 2
    assert recipe.share_of_peak(middle) == pytest.approx(0.5, abs=1e-3) and recipe.share_of_peak(recipe.steps) < 1e-9
    quarter = 1500 + (recipe.steps - 1500) // 4
    assert recipe.share_of_peak(quarter) == pytest.approx(0.75 if name == "ibot" else (1 + 2**-0.5) / 2, abs=1e-3)


def test_settings_take_the_place_of_the_recipes():
    recipe, said = segmenting.chosen(RECIPES["dinov3"], Settings(steps=4000, lr=0.0, size=1024))
    assert (recipe.steps, recipe.warmup, recipe.lr) == (4000, 150, 1e-3)
    assert (recipe.size, recipe.short, recipe.stride) == (1024, 1024, 682) and said == "; steps, size as chosen"
    assert segmenting.chosen(RECIPES["ibot"], Settings(steps=0)) == (RECIPES["ibot"], "")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"recipe": "dino"}, "one of scenes, dinov3, ibot"), ({"steps": -1}, "steps = -1"), ({"batch_size": 1}, "at least 2"),
        ({"lr": -1.0}, "lr = -1.0"), ({"lr": float("nan")}, "lr = nan"), ({"size": -8}, "size = -8"), ({"looks": -1}, "looks"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_sentence(bad, said):
    with pytest.raises(BadInput, match=said) as caught:
        Settings(**bad)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_bad_sets_and_sizes(untrained, colours):
    class Other:
        images, semantic_classes = colours[0].images, ("background", "boat")

        def __len__(self) -> int:
            return 4

    with pytest.raises(BadInput, match="different classes"):
        check(colours[0], Other(), Settings())
    with pytest.raises(BadInput, match="size = 36 must be a multiple of the patch size 8, and at least 16"):
        evaluate(untrained, *colours, Settings(size=36))


def test_all_void_is_refused(untrained, colours):
    class Void:
        images, semantic_classes = colours[1].images, colours[1].semantic_classes

        def __len__(self) -> int:
            return 2

        def semantic(self, index: int) -> np.ndarray:
            return np.full((64, 64), 255, np.uint8)

    with pytest.raises(BadInput, match="no pixel of the test set"):
        evaluate(untrained, colours[0], Void(), Settings(**SMALL | {"steps": 1}))


def test_a_mean_of_the_matrix_is_what_is_reported(result):
    matrix = result.details["pixels by true and predicted class"]
    assert mean_iou(matrix) == result.values["mIoU"] and segment_linear.READS == "semantic"
