import numpy as np
import pytest
from PIL import Image

from engine.core.errors import BadInput
from engine.data.annotated import coco, voc
from engine.data.sets import scenes


@pytest.fixture(scope="module")
def home(private_cache):
    return scenes.write()


@pytest.fixture(scope="module", params=["train", "val"])
def both(request, home):
    return coco.open_objects(home / "coco", request.param), voc.open_objects(home / "voc", request.param)


def test_both_layouts_say_the_same(both):
    by_coco, by_voc = both
    assert len(by_coco) == len(by_voc) == scenes.COUNTS[by_coco.images.split]
    assert by_coco.categories == by_voc.categories == scenes.CATEGORIES
    for index in range(len(by_coco)):
        one, other = by_coco.objects[index], by_voc.objects[index]
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.labels, other.labels)
        masks = by_coco.masks(index)
        np.testing.assert_array_equal(masks, by_voc.masks(index))
        np.testing.assert_array_equal(masks.sum((1, 2)), one.areas)
        for mask, box in zip(masks, one.boxes, strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert masks.sum(0).max() == 1  # no pixel belongs to two
        painted, drawn = by_coco.semantic(index), by_voc.semantic(index)
        np.testing.assert_array_equal(painted, np.where(drawn == 255, 0, drawn))
        assert set(np.unique(painted)) == {0, *(one.labels + 1)}
        one_image, other_image = (objects.images.root / objects.images.paths[index] for objects in both)
        assert one_image.read_bytes() == other_image.read_bytes()


def test_difficult_ones_are_set_aside_in_vocs_layout_only(both):
    by_coco, by_voc = both
    assert not any(objects.ignored.any() for objects in by_coco.objects)
    assert any(objects.ignored.any() for objects in by_voc.objects)
    for row, objects in enumerate(by_voc.objects):
        wanted = np.zeros(10)
        wanted[objects.labels] = -1
        wanted[objects.labels[~objects.ignored]] = 1
        assert by_voc.targets[row].tolist() == wanted.tolist()
    np.testing.assert_array_equal(by_coco.targets, np.abs(by_voc.targets))


def test_scenes_are_many_and_varied(both):
    objects = both[0].objects
    counts = [len(members) for members in objects]
    assert min(counts) == 1 and max(counts) == 5
    labels = np.concatenate([members.labels for members in objects])
    assert np.bincount(labels, minlength=10).min() >= 15
    boxes = np.concatenate([members.boxes for members in objects])
    heights = boxes[:, 3] - boxes[:, 1]
    assert heights.min() < 16 and heights.max() > 64
    ringed = [(both[1].semantic(index) == 255).mean() for index in range(20)]
    assert min(ringed) > 0 and max(ringed) < 0.15


def test_digits_stand_out_from_what_they_are_drawn_on(both):
    by_coco = both[0]
    contrasts = []
    for index in range(50):
        with Image.open(by_coco.images.root / by_coco.images.paths[index]) as image:
            pixels = np.asarray(image, float)
        covered = both[1].semantic(index) > 0
        for mask, box in zip(by_coco.masks(index), by_coco.objects[index].boxes.astype(int), strict=True):
            window = np.s_[box[1] : box[3], box[0] : box[2]]
            around = pixels[window][~covered[window]]
            if len(around):
                contrasts.append(np.linalg.norm(pixels[mask].mean(0) - around.mean(0)))
    assert np.median(contrasts) > 120
    assert min(contrasts) > 30


def test_training_and_validation_share_no_photograph():
    assert not set(scenes.PHOTOGRAPHS["train"]) & set(scenes.PHOTOGRAPHS["val"])


def test_a_second_writing_has_the_same_bytes(home, tmp_path):
    again = scenes.write(tmp_path)
    assert again == tmp_path / scenes.NAME
    files = sorted(path.relative_to(home) for path in home.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert len(files) == 5 * 500 + 2 + 3 * 12 + 1
    for file in files:
        if file.name != "manifest.json":  # whose order is that of the file system
            assert (home / file).read_bytes() == (again / file).read_bytes(), file


def test_a_photograph_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(scenes.PHOTOGRAPHS, "val", (("skimage.data", "unknown.png"),))
    with pytest.raises(BadInput, match=r"unknown\.png is missing in the installed package skimage\.data"):
        scenes.write(tmp_path)
    assert not (tmp_path / scenes.NAME).exists()
