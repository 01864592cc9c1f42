"""Large-scale jitter: boxes follow masks, geometry against torchvision's, numbers from the seed alone, and the way back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torchvision import tv_tensors
from torchvision.transforms import v2

from engine.core.errors import BadInput
from engine.data.annotated import jitter
from engine.data.annotated.jitter import Jitter, back, boxes_of, fit, fitted, jittered


def scene(height: int, width: int, n: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """(pixels, labels, masks, boxes) of `n` ellipses; the pixels of object i have the red value 40 + i where it lies on top."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] + 0.5
    masks = np.zeros((n, height, width), bool)
    for mask in masks:
        centre, radii = rng.random(2) * (height, width), (0.06 + 0.2 * rng.random(2)) * min(height, width) + 1
        mask[:] = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1
    pixels = np.zeros((3, height, width), np.uint8)
    for place, mask in enumerate(masks):
        pixels[0][mask] = 40 + place
    masks = masks[masks.any((1, 2))]
    boxes = boxes_of(torch.from_numpy(masks)).numpy()
    return torch.from_numpy(pixels), rng.integers(0, 9, len(masks)), masks, boxes


@settings(max_examples=40)
@given(st.integers(20, 90), st.integers(20, 90), st.integers(0, 5), st.integers(0, 10**6), st.integers(8, 70))
def test_boxes_are_tight_around_the_masks_and_objects_out_of_sight_are_dropped(height, width, n, seed, size):
    pixels, labels, masks, _ = scene(height, width, n, seed)
    example = jittered(pixels, labels, masks, Jitter(size), seed, 3, 5)
    assert example.image.shape == (3, size, size) and example.image.dtype == torch.uint8
    assert example.masks.shape == (len(example.labels), size, size) and example.boxes.shape == (len(example.labels), 4)
    for box, mask in zip(example.boxes, example.masks):
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert box.tolist() == tight and box[2] > box[0] and box[3] > box[1]


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("scale", [0.3, 0.9, 1.7])
def test_image_and_boxes_move_as_torchvisions(shape, scale):
    """The same place and scale, done by torchvision's transforms on its own kinds of tensors."""
    size = 64
    pixels, _, masks, boxes = scene(*shape, 5)
    for row in range(6):
        jitter_ = Jitter(size, (scale, scale), 0.5)
        _, left, top, flip = jitter.uniforms(slice(row, row + 1), 4, 7, jitter.JITTER, 2)[0]
        tall, wide = fitted(shape, size * scale)
        moves = [
            v2.Resize([tall, wide], antialias=True),
            v2.Lambda(
                lambda x, left=left, top=top, tall=tall, wide=wide: v2.functional.crop(
                    x,
                    int(top * (max(0, tall - size) + 1)),
                    int(left * (max(0, wide - size) + 1)),
                    min(size, tall),
                    min(size, wide),
                )
            ),
            v2.RandomHorizontalFlip(float(flip < 0.5)),
            v2.Pad(
                [0, 0, size - min(size, wide), size - min(size, tall)],
                fill={tv_tensors.Image: jitter.GREY, "others": 0},
            ),
            v2.ClampBoundingBoxes(),
        ]
        theirs = v2.Compose(moves)(
            {
                "image": tv_tensors.Image(pixels),
                "boxes": tv_tensors.BoundingBoxes(torch.tensor(boxes), format="XYXY", canvas_size=shape),
            }
        )
        ours = jittered(pixels, np.arange(len(masks)), masks, jitter_, 7, 2, row)
        assert torch.equal(ours.image, theirs["image"])
        for box, label in zip(ours.boxes, ours.labels):
            other = theirs["boxes"][label]
            cut = (other[2:] >= torch.tensor([min(size, wide), min(size, tall)])).any() or (other[:2] <= 0).any()
            if not cut:
                assert (box - other).abs().max() <= 1
            else:  # around what is left, which may be less than the box cut at the edge
                assert (box[:2] >= other[:2] - 1).all() and (box[2:] <= other[2:] + 1).all()


def test_masks_take_the_nearest_pixel_as_torchvisions_exact_one():
    pixels, labels, masks, _ = scene(61, 97, 4)
    ours = jittered(pixels, labels, masks, Jitter(50, (1, 1), 0), 0, 0, 0)
    planes = torch.from_numpy(masks).to(torch.uint8)
    theirs = v2.functional.resize(planes, list(fitted((61, 97), 50)), v2.InterpolationMode.NEAREST_EXACT).bool()
    assert torch.equal(ours.masks[:, : theirs.shape[1]], theirs) and not ours.masks[:, theirs.shape[1] :].any()


def test_numbers_come_from_seed_step_and_row_alone_and_fill_their_ranges():
    pixels, labels, masks, _ = scene(64, 64, 3)
    state = torch.get_rng_state()

    def drawn(*keys: int) -> torch.Tensor:
        return jittered(pixels, labels, masks, Jitter(32), *keys).image

    assert torch.equal(drawn(0, 0, 0), drawn(0, 0, 0)) and torch.equal(torch.get_rng_state(), state)
    assert len({drawn(*keys).numpy().tobytes() for keys in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}) == 4
    white, whole = torch.full((3, 20, 20), 255, dtype=torch.uint8), np.ones((1, 20, 20), bool)
    label = np.zeros(1, int)
    sides = [
        jittered(white, label, whole, Jitter(100, (0.1, 1.0)), 0, row % 9, row).boxes[0, 2].item() / 100
        for row in range(200)
    ]
    assert kstest(sides, "uniform", (0.1, 0.9)).pvalue > 1e-3
    left = whole.copy()
    left[..., 6:] = False
    flips = [jittered(white, label, left, Jitter(20, (1, 1), 0.25), 0, 0, row).boxes[0, 0].item() for row in range(300)]
    assert set(flips) == {0.0, 14.0} and abs(np.mean(flips) / 14 - 0.25) < 0.1


@settings(max_examples=40)
@given(st.integers(16, 120), st.integers(16, 120), st.integers(16, 120), st.integers(0, 10**6))
def test_there_and_back_boxes_and_masks_are_where_they_were(height, width, size, seed):
    pixels, _, masks, boxes = scene(height, width, 3, seed)
    tall, wide = fitted((height, width), size)
    assert fit(pixels, size).shape == (3, tall, wide) and max(tall, wide) == size
    factor = np.array([wide / width, tall / height] * 2)
    there = v2.functional.resize(torch.from_numpy(masks).float(), [tall, wide], antialias=True)
    boxes_d4, masks_dHW = back(torch.tensor(boxes * factor), there, (height, width))
    np.testing.assert_allclose(boxes_d4, boxes, atol=1e-4)
    assert masks_dHW.shape == masks.shape and masks_dHW.dtype == torch.bool
    if size >= max(height, width):
        inner = (masks & masks_dHW.numpy()).sum((1, 2)) / (masks | masks_dHW.numpy()).sum((1, 2))
        assert (inner > 0.8).all()


def test_boxes_that_reach_too_far_are_clipped_and_nothing_found_stays_nothing():
    boxes, masks = back(torch.tensor([[-5.0, 2, 70, 64]]), torch.ones(1, 32, 64), (16, 32))
    assert boxes.tolist() == [[0, 1, 32, 16]] and masks.all()
    boxes, masks = back(torch.zeros(0, 4), torch.zeros(0, 32, 64), (16, 32))
    assert boxes.shape == (0, 4) and masks.shape == (0, 16, 32)
    with_none = jittered(*scene(30, 40, 0)[:3], Jitter(16), 0, 0, 0)
    assert with_none.boxes.shape == (0, 4) and with_none.masks.shape == (0, 16, 16) and with_none.labels.shape == (0,)
    assert fit(torch.zeros(3, 1, 300, dtype=torch.uint8), 20).shape == (3, 1, 20)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"scale": (0.0, 1)}, {"scale": (2.0, 1.0)}, {"flip": 1.5}])
def test_settings_are_checked(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        Jitter(**{"size": 32} | wrong)
