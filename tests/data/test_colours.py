"""The loader's colour jitter against torchvision's of Pillow's images, on the photographs that scikit-learn brings along."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare
from sklearn.datasets import load_sample_images
from torchvision.transforms import functional

from engine.data import sources
from engine.data.augment import AFTER_HUE, BEFORE_HUE, STEPS, drawn_jitter, jitter_parameters, view_uniforms
from engine.data.views import Augmentation
from tests.data.loading import loader, pixels

SIDE = 192
ORDERS = np.array(list(itertools.permutations(range(4))))
BYOL = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
SWAV = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
BEIT = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.0}
CHANGES = tuple(getattr(functional, f"adjust_{name}") for name in STEPS)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[sources.ImageSet, list[Image.Image]]:
    """48 squares out of the two photographs, of SIDE pixels."""
    folder, rng, squares = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0), []
    for index in range(2 * len(ORDERS)):
        image = load_sample_images().images[index % 2]
        top, left = (rng.integers(side - SIDE + 1) for side in image.shape[:2])
        squares.append(Image.fromarray(image[top : top + SIDE, left : left + SIDE]))
        squares[-1].save(folder / f"{index:03d}.png")
    return sources.open_images(folder, "train"), squares


def whole(**colours: float | str) -> Augmentation:
    return Augmentation((SIDE, SIDE), (1, 1), (1, 1), flip=0, **colours)


def every_order(view: Augmentation, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """Lets the loader draw all orders, twice each; returns them and the factors that it draws."""
    order, (_, factors, applied) = np.repeat(ORDERS, 2, 0), drawn_jitter(view, view_uniforms(slice(0, 48), 0, 0, 0))
    monkeypatch.setattr("engine.data.augment.drawn_jitter", lambda view, uniforms: (order, factors, applied))
    return order, factors


def of_torchvision(image: Image.Image, view: Augmentation, order: np.ndarray, factors: np.ndarray) -> np.ndarray:
    for step in order:
        if getattr(view, STEPS[step]):
            image = CHANGES[step](image, float(factors[step]))
    return np.asarray(image, float)


@pytest.mark.parametrize("strengths", [BYOL, SWAV, BEIT], ids=["byol", "swav", "beit"])
def test_jitter_is_torchvision_s_in_every_order(strengths: dict, photographs, monkeypatch: pytest.MonkeyPatch):
    images, squares = photographs
    view = whole(jitter=1.0, **strengths)
    order, factors = every_order(view, monkeypatch)
    batches = [next(loader(images, [replace(view, colours=c)], batch_size=48)) for c in ("torchvision", "linear")]
    expected = [
        of_torchvision(squares[id], view, order[row], factors[row]) for row, id in enumerate(batches[0].ids.tolist())
    ]
    error, other = (np.abs(np.stack([pixels(image) for image in batch.images[0]]) - expected) for batch in batches)
    assert error.mean() < 0.3 and error.mean((1, 2, 3)).max() < 1.5
    assert np.quantile(error, 0.99) < 2.01 and error.max() < 20
    assert other.mean() > 3


@pytest.mark.parametrize(("step", "mean", "most"), [(0, 0.001, 1), (1, 0.4, 1), (2, 0.3, 1), (3, 0.2, 6)])
def test_each_step_alone_is_torchvision_s(step: int, mean: float, most: float, photographs):
    """Contrast turns about a mean that is not rounded; one of 256 steps of hue may make 6 levels."""
    images, squares = photographs
    view = whole(jitter=1.0, **{name: SWAV[name] * (index == step) for index, name in enumerate(STEPS)})
    batch = next(loader(images, [view], batch_size=48))
    _, factors, _ = drawn_jitter(view, view_uniforms(slice(0, 48), 0, 0, 0))
    for row, id in enumerate(batch.ids.tolist()):
        expected = of_torchvision(squares[id], view, np.array([step]), factors[row])
        error = np.abs(pixels(batch.images[0][row]) - expected)
        assert error.mean() < mean and error.max() < most + 0.01
        assert (
            np.abs(expected - np.asarray(squares[id], float)).mean() > 0.5
            or abs(factors[row, step] - (step < 3)) < 0.05
        )


def test_the_hue_of_all_colours_turns_as_pillow_turns_it(tmp_path: Path):
    """Every fifth level of red, green and blue, pure and grey ones among them, by 24 angles."""
    levels = np.stack(np.meshgrid(*[np.arange(0, 256, 5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    square = np.zeros((375**2, 3), np.uint8)
    square[: len(levels)] = levels
    image = Image.fromarray(square.reshape(375, 375, 3))
    for index in range(24):
        image.save(tmp_path / f"{index:02d}.png")
    view = replace(whole(jitter=1.0, brightness=0, contrast=0, saturation=0, hue=0.5), size=(375, 375))
    batch = next(loader(sources.open_images(tmp_path, "train"), [view], batch_size=24))
    _, factors, _ = drawn_jitter(view, view_uniforms(slice(0, 24), 0, 0, 0))
    for row, shown in enumerate(batch.images[0]):
        error = np.abs(pixels(shown) - np.asarray(functional.adjust_hue(image, float(factors[row, 3])), float))
        assert error.mean() < 0.3 and error.max() < 7.01 and (error > 1.01).mean() < 0.02
        assert np.abs(pixels(shown)[-1, -10:]).max() < 0.01  # black stays black


def test_images_without_jitter_stay_and_those_without_colour_are_grey(photographs):
    images, squares = photographs
    view = whole(jitter=0.5, grayscale=0.3, **BYOL)
    batch = next(loader(images, [view], batch_size=48))
    uniforms = view_uniforms(slice(0, 48), 0, 0, 0)
    order, factors, applied = drawn_jitter(view, uniforms)
    seen = set()
    for row, id in enumerate(batch.ids.tolist()):
        shown = pixels(batch.images[0][row])
        grey = np.ptp(shown, axis=-1).max() < 0.01
        seen.add((bool(applied[row]), grey))
        if not applied[row]:
            expected = squares[id].convert("L").convert("RGB") if grey else squares[id]
            assert np.abs(shown - np.asarray(expected, float)).max() < (1.01 if grey else 0.01)
        elif grey:
            jittered = Image.fromarray(of_torchvision(squares[id], view, order[row], factors[row]).astype(np.uint8))
            assert np.abs(shown - np.asarray(jittered.convert("L").convert("RGB"), float)).mean() < 1
    assert seen == {(True, True), (True, False), (False, True), (False, False)}


def test_the_graph_s_line_of_steps_is_every_order():
    view, factors = Augmentation((8, 8), (1, 1), **BYOL), np.tile([1.1, 1.2, 1.3, 0.05], (24, 1))
    drawn = jitter_parameters(view, ORDERS, factors, np.ones(24, bool))
    names = {1.0: "", float(np.float32(1.1)): "brightness", float(np.float32(1.2)): "contrast"}
    assert (drawn["hue_steps"] == 12).all() and (drawn["saturation"] == np.float32(1.3)).all()
    for row, order in enumerate(ORDERS):
        tones = [[names[factor] for factor in place] for place in drawn["factors"][row].tolist()]
        early, late = (["saturation"] * int(drawn["saturates"][row] == when) for when in (BEFORE_HUE, AFTER_HUE))
        taken = [*tones[0], *early, *tones[1], "hue", *tones[2], *late, *tones[3]]
        assert [name for name in taken if name] == [STEPS[step] for step in order]
        # the branches are only entered by images that saturate there
        assert early or not any(tones[0])
        assert late or not any(tones[3])


def test_a_step_of_no_strength_is_not_taken():
    view = Augmentation((8, 8), (1, 1), jitter=1.0, brightness=0, contrast=0, saturation=0, hue=0)
    drawn = jitter_parameters(view, *drawn_jitter(view, view_uniforms(slice(0, 100), 0, 0, 0)))
    assert set(drawn) == {"factors", "saturates", "saturation"}
    assert (drawn["factors"] == 1).all() and (drawn["saturates"] == 0).all()


def test_orders_are_drawn_evenly_and_hue_in_pillow_s_steps():
    view, count = Augmentation((8, 8), (1, 1), jitter=0.8, **BYOL), 20_000
    order, factors, applied = drawn_jitter(view, view_uniforms(slice(0, count), 0, 0, 0))
    found, counts = np.unique(order, axis=0, return_counts=True)
    assert np.array_equal(found, ORDERS) and chisquare(counts).pvalue > 1e-3
    assert all(abs(np.corrcoef(order[:, 0], factors[:, step])[0, 1]) < 0.03 for step in range(4))
    hue = jitter_parameters(view, order, factors, applied)["hue_steps"]
    assert (hue[~applied] == 256).all()
    # of 25.5 steps either way, cut off towards 0: that one comes from both sides
    steps, counts = np.unique((hue[applied] + 128) % 256 - 128, return_counts=True)
    assert steps.tolist() == list(range(-25, 26))
    assert 1.7 < counts[25] / np.median(counts) < 2.3
