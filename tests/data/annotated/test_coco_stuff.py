"""COCO-Stuff: the 171 classes among the 182 ids, the places of its files, and what is wrong with a folder, on small sets."""

import shutil

import numpy as np
import pytest
from PIL import Image

from engine.core.errors import BadInput
from engine.data.annotated import coco_stuff
from engine.data.annotated import opening as annotations
from tests.data.published import write_coco_stuff

SIDE = 16
# as COCO's file of instances numbers its 80 categories; written out, so that the reader's list is compared with another one
THINGS = [*range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70, *range(72, 83), *range(84, 91)]
LAYOUTS = [("images/{}", "annotations/{}"), ("{}", "stuffthingmaps/{}"), ("{}", "{}")]


def values(seed: int) -> np.ndarray:
    """Every value that a map may hold, and some more of them."""
    known = np.array([*(np.array([*THINGS, *range(92, 183)]) - 1), 255])
    rng = np.random.default_rng(seed)
    drawn = np.concatenate([known, rng.choice(known, SIDE * SIDE - len(known))])
    return rng.permutation(drawn).reshape(SIDE, SIDE).astype(np.uint8)


def write(root, **how):
    return write_coco_stuff(root, [values(0), values(1)], [values(10), values(11)], **how)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_become_171_labels_in_order(tmp_path, layout):
    train, test = annotations.open_pair("semantic", f"coco-stuff:{write(tmp_path, layout=layout)}")
    used = [*THINGS, *range(92, 183)]
    assert len(THINGS) == 80 and len(test.semantic_classes) == len(used) == 171
    assert test.semantic_classes == tuple(f"id {number}" for number in used)
    for split, first in ((train, 0), (test, 10)):
        for number in range(2):
            expected = np.vectorize(lambda value: 255 if value == 255 else used.index(value + 1))(
                values(first + number)
            )
            read = split.semantic(number)
            assert read.dtype == np.uint8
            np.testing.assert_array_equal(read, expected)
    assert test.images.paths[0] == f"{layout[0].format('val2017')}/000000000010.jpg"


def test_names_come_from_the_list_that_lies_there(tmp_path):
    write(tmp_path)
    (tmp_path / "labels.txt").write_text("".join(f"{number}: name of {number}\n" for number in range(183)))
    names = coco_stuff.open_masks(tmp_path).semantic_classes
    assert names[0] == "name of 1" and names[10:12] == ("name of 11", "name of 13") and names[170] == "name of 182"


def test_maps_that_a_toolbox_made_are_passed_over(tmp_path):
    maps = write(tmp_path) / "annotations/val2017"
    shutil.copy(maps / "000000000010.png", maps / "000000000010_labelTrainIds.png")
    assert len(coco_stuff.open_masks(tmp_path)) == 2


def first_map(root):
    return root / "annotations/val2017/000000000010.png"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda root: (root / "images").rename(root / "img"), r"no \*\.jpg in images/val2017 or val2017$"),
        (
            lambda root: (root / "annotations").rename(root / "maps"),
            r"no \*\.png in stuffthingmaps/val2017 or annotations/val2017 or val2017$",
        ),
        (lambda root: first_map(root).unlink(), r"the mask .*000000000010\.png is missing"),
        (lambda root: (root / "images/val2017/000000000010.jpg").unlink(), r"mask .*000000000010\.png has no image"),
        (
            lambda root: Image.fromarray(values(0)[:8]).save(first_map(root)),
            r"000000000010\.png has 16x8 pixels, but its image has 16x16",
        ),
        (
            lambda root: Image.fromarray(np.full((SIDE, SIDE), 11, np.uint8)).save(first_map(root)),
            r"000000000010\.png has the value 11, which stands for no class",
        ),
        (
            lambda root: Image.fromarray(np.full((SIDE, SIDE), 182, np.uint8)).save(first_map(root)),
            "has the value 182",
        ),
        (lambda root: (root / "labels.txt").write_text("1: person\n"), r"labels\.txt has no name for the id 2"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, spoil, sentence):
    spoil(write(tmp_path))
    with pytest.raises(BadInput, match=sentence):
        coco_stuff.open_masks(tmp_path).semantic(0)


def test_an_unknown_split_is_named(tmp_path):
    with pytest.raises(BadInput, match="split 'test' is unknown: choose train or val"):
        coco_stuff.open_masks(tmp_path, "test")
