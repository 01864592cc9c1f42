"""Images of their own aspect: which grid each has against a search in plain loops, pixels against Pillow's, and the loaders'
promises."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data import sources
from engine.data.augment import view_parameters, view_uniforms
from engine.data.pipeline import eval_batches
from engine.data.shapes import nearest_grids, shown_sizes
from engine.data.views import Augmentation, minimal
from tests.data.corpus import picture
from tests.data.loading import assert_same, loader, pixels, take

SIZES = ((140, 20), (20, 90), (64, 64), (75, 50), (50, 75), (97, 96), (33, 22), (120, 41), (1, 60))
VIEW = replace(minimal((64, 48), (0.2, 1.0)), patch=8)  # room for 48 patches


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> sources.ImageSet:
    root = tmp_path_factory.mktemp("shapes")
    for index, (width, height) in enumerate(SIZES):
        (root / "train" / "a").mkdir(parents=True, exist_ok=True)
        picture(width, height, seed=index).save(root / "train" / "a" / f"{index}.png")
    return sources.open_images(root, "train")


def searched(width: int, height: int, patches: int) -> tuple[int, int]:
    """Every grid is looked at: the nearest in logarithms to what would fill the patches."""
    best, least = (0, 0), math.inf
    for rows in range(1, patches + 1):
        for columns in range(1, patches + 1):
            wanted = math.sqrt(patches * height / width), math.sqrt(patches * width / height)
            far = math.log(rows / wanted[0]) ** 2 + math.log(columns / wanted[1]) ** 2
            if rows * columns <= patches and far < least - 1e-9:
                best, least = (rows, columns), far
    return best


@pytest.mark.parametrize("patches", [1, 5, 48, 100])
def test_grids_are_those_that_a_search_finds(patches: int):
    sizes = np.array([*SIZES, (500, 375), (375, 500), (16, 9), (1000, 1001)])
    found = nearest_grids(sizes, patches)
    assert found.tolist() == [list(searched(*size, patches)) for size in sizes.tolist()]
    assert nearest_grids(sizes[:, ::-1], patches).prod(1).tolist() == found.prod(1).tolist()


def test_photographs_fill_nearly_all_patches():
    ratios = np.exp(np.linspace(-math.log(3), math.log(3), 1001))
    grids = nearest_grids(np.stack([1000 * ratios, np.full_like(ratios, 1000)], 1), 196)
    assert grids[500].tolist() == [14, 14]
    assert 0.96 < grids.prod(1).mean() / 196 < 0.98
    distortion = np.log(grids[:, 1] / grids[:, 0] / ratios)
    assert abs(distortion).max() < math.log(1.12) and abs(distortion).mean() < math.log(1.05)
    assert len(np.unique(grids, axis=0)) == 19


def shown(batch, row: int) -> np.ndarray:
    """The image of a row, as bytes would have it; and that nothing follows it in its room."""
    height, width = batch.sizes[row, 0].tolist()
    values = batch.images[0][row].flatten()
    assert not values[3 * height * width :].any()
    return pixels(values[: 3 * height * width].view(3, height, width))


def test_views_are_crops_of_the_image_s_shape_on_its_grid(shapes: sources.ImageSet):
    count = len(SIZES)
    for step, batch in enumerate(take(loader(shapes, [VIEW], batch_size=count), 3)):
        ids = batch.ids.numpy()
        assert batch.sizes.dtype == torch.int64 and batch.images[0].shape == (count, 3, 64, 48)
        assert (batch.sizes[:, 0] // 8).tolist() == [list(searched(*SIZES[id], 48)) for id in ids]
        drawn = view_parameters(VIEW, shapes.sizes[ids], view_uniforms(slice(0, count), 0, step, 0))
        for row, id in enumerate(ids.tolist()):
            (left, top), (width, height) = drawn["start"][row].tolist(), drawn["shape"][row].tolist()
            assert abs(width - height * SIZES[id][0] / SIZES[id][1]) <= 0.5 * (1 + SIZES[id][0] / SIZES[id][1])
            with Image.open(shapes.root / shapes.paths[id]) as image:
                crop = image.convert("RGB").crop((left, top, left + width, top + height))
            expected = np.asarray(crop.resize(batch.sizes[row, 0].tolist()[::-1], Image.Resampling.BICUBIC), float)
            expected = expected[:, ::-1] if drawn["mirror"][row] else expected
            assert np.abs(shown(batch, row) - expected).max() <= 3.01


def test_crops_cover_the_share_of_the_image_that_is_drawn():
    sizes = np.tile([[400, 300]], (4000, 1))
    drawn = view_parameters(VIEW, sizes, view_uniforms(slice(0, 4000), 0, 0, 0))
    shares = drawn["shape"].prod(1) / (400 * 300)
    assert 0.19 < shares.min() < 0.21 and 0.99 < shares.max() <= 1
    assert shares.mean() == pytest.approx(0.6, abs=0.02)
    assert (drawn["start"] >= 0).all() and (drawn["start"] + drawn["shape"] <= (400, 300)).all()


def test_evaluation_shows_whole_images(shapes: sources.ImageSet):
    batches = list(eval_batches(shapes, (64, 48), 5, threads=1, patch=8))
    assert [len(batch.ids) for batch in batches] == [5, 4]
    for batch in batches:
        for row, id in enumerate(batch.ids.tolist()):
            rows, columns = searched(*SIZES[id], 48)
            with Image.open(shapes.root / shapes.paths[id]) as image:
                expected = image.convert("RGB").resize((8 * columns, 8 * rows), Image.Resampling.BICUBIC)
            assert np.abs(shown(batch, row) - np.asarray(expected, float)).max() <= 3.01


def test_colours_are_changed_as_they_are_of_crops(tmp_path):
    """An image whose grid is the model's own: with the same draws, its view is what it is without an aspect of its own."""
    picture(60, 80, seed=1).save(tmp_path / "one.png")
    images = sources.open_images(tmp_path, "train")
    own = Augmentation((64, 48), (1.0, 1.0), patch=8, jitter=1.0, hue=0.2, grayscale=0.3, blur=0.5, solarize=0.5)
    cut = replace(own, patch=0, ratio=(0.75, 0.75))
    for one, other in zip(*(take(loader(images, [view], batch_size=1), 6) for view in (own, cut)), strict=True):
        assert one.sizes.tolist() == [[[64, 48]]] and other.sizes is None
        assert torch.equal(one.images[0], other.images[0])


def test_a_resumed_loader_and_ranks_see_what_one_process_sees(shapes: sources.ImageSet):
    whole = take(loader(shapes, [VIEW, VIEW], batch_size=4), 5)
    assert_same(whole[3:], take(loader(shapes, [VIEW, VIEW], batch_size=4, start_step=3), 2))
    parts = [take(loader(shapes, [VIEW, VIEW], batch_size=4, rank=rank, world=2), 5) for rank in range(2)]
    for step, ranks in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(step.sizes, torch.cat([part.sizes for part in ranks]))
        assert torch.equal(step.images[1], torch.cat([part.images[1] for part in ranks]))
        assert step.sizes.tolist() == [[size] * 2 for size in shown_sizes(VIEW, shapes.sizes[step.ids]).tolist()]


def test_images_are_of_several_sides_equally_many_on_all_ranks(shapes: sources.ImageSet):
    """Room for 48 or 12 patches, one after the other in a batch, so that half of each rank's images have each; of the two views
    of an image now these and then those, and over the steps each image both."""
    several = replace(VIEW, sides=(1.0, 0.5))
    seen, pairs = {id: set() for id in range(len(SIZES))}, set()
    whole = take(loader(shapes, [several, several], batch_size=8), 24)
    for batch in whole:
        for id, sizes in zip(batch.ids.tolist(), (batch.sizes // 8).tolist(), strict=True):
            grids = [searched(*SIZES[id], patches) for patches in (48, 12)]
            rooms = tuple(grids.index(tuple(size)) for size in sizes)
            seen[id].add(rooms[0])
            pairs.add(rooms)
    assert all(rooms == {0, 1} for rooms in seen.values()) and len(pairs) == 4
    assert_same(whole[20:], take(loader(shapes, [several, several], batch_size=8, start_step=20), 4))
    for rank in range(2):
        part = take(loader(shapes, [several], batch_size=8, rank=rank, world=2), 3)
        for one, other in zip(whole, part, strict=False):
            assert torch.equal(one.sizes[4 * rank : 4 * rank + 4, :1], other.sizes)
            assert sum((size // 8).prod() > 12 for size in other.sizes[:, 0]) == 2


def test_made_images_have_sizes_too():
    images = sources.open_images("synthetic:8", "train")
    batch = next(loader(images, [VIEW], batch_size=4))
    assert batch.images[0].shape == (4, 3, 64, 48) and batch.sizes.tolist() == [[[48, 56]]] * 4


def test_what_cannot_be_had_is_refused():
    with pytest.raises(ValueError, match="neither pad nor operations"):
        replace(VIEW, operations=1)
