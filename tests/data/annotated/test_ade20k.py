"""ADE20K's benchmark: values to labels, names, and what is wrong with a folder, on small sets in its layout."""

import numpy as np
import pytest
from PIL import Image

from engine.core.errors import BadInput
from engine.data.annotated import ade20k
from engine.data.annotated import opening as annotations
from tests.data.published import write_ade20k

WIDTH, HEIGHT = 20, 14


def values(seed: int) -> np.ndarray:
    """Every value from 0 to 150, and some more of them."""
    rng = np.random.default_rng(seed)
    drawn = np.concatenate([np.arange(151), rng.integers(0, 151, WIDTH * HEIGHT - 151)])
    return rng.permutation(drawn).reshape(HEIGHT, WIDTH).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    return write_ade20k(tmp_path / "ADEChallengeData2016", [values(0), values(1)], [values(10)])


def write_names(root, rows):
    lines = ["Idx\tRatio\tTrain\tVal\tName", *("\t".join(map(str, row)) for row in rows)]
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")


def rows():
    named = {1: "wall", 2: "building, edifice", 9: "screen, silver screen", 22: "screen, crt", 64: "blind, screen"}
    # as published, some numbers and names end in a blank
    return [(f"{k} " if k == 22 else k, "0.1", 7, 1, f"{named.get(k, f'thing {k}')} ") for k in range(1, 151)]


def test_classes_count_from_0_and_others_are_void(folder):
    train, test = annotations.open_pair("semantic", f"ade20k:{folder.parent}")
    assert [len(train), len(test)] == [2, 1]
    assert train.images.paths == [f"images/training/ADE_train_{n:08d}.jpg" for n in (1, 2)]
    assert test.images.split == "val" and len(test.semantic_classes) == 150
    assert test.semantic_classes[0] == "class 1" and test.semantic_classes[-1] == "class 150"
    for number in range(2):
        read, stored = train.semantic(number), values(number).astype(int)
        assert read.dtype == np.uint8 and read.shape == (HEIGHT, WIDTH)
        np.testing.assert_array_equal(read, np.where(stored == 0, 255, stored - 1))
    np.testing.assert_array_equal(ade20k.open_masks(folder, "val").semantic(0), test.semantic(0))


def test_names_are_the_first_words_unless_two_classes_share_them(folder):
    write_names(folder, rows())
    names = ade20k.open_masks(folder).semantic_classes
    assert [names[k - 1] for k in (1, 2, 9, 22, 64, 150)] == [
        "wall",
        "building",
        "screen, silver screen",
        "screen, crt",
        "blind",
        "thing 150",
    ]


def test_a_bad_image_is_left_out_with_its_mask(folder):
    (folder / "images/training/ADE_train_00000001.jpg").write_bytes(b"")
    with pytest.raises(BadInput, match="1 of 2 images are bad"):
        ade20k.open_masks(folder, "train")
    read = ade20k.open_masks(folder, "train", bad_limit=0.5)
    assert len(read) == 1 and len(read.images.bad) == 1
    np.testing.assert_array_equal(read.semantic(0), (values(1) - 1).astype(np.uint8))


def spoilt(change):
    def spoil(root):
        path = root / "annotations/validation/ADE_val_00000001.png"
        changed = change(path)
        if isinstance(changed, np.ndarray):
            Image.fromarray(changed).save(path)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda root: (root / "annotations").rename(root / "masks"),
            r"not laid out as ADE20K.* annotations/validation",
        ),
        (lambda root: (root / "images/validation").rename(root / "images/val"), "needs images/validation"),
        (spoilt(lambda path: path.unlink()), r"the mask .*/ADE_val_00000001\.png is missing"),
        (
            spoilt(lambda path: path.rename(path.with_name("ADE_val_00000002.png"))),
            r"mask .*ADE_val_00000002\.png has no image in .*images/validation",
        ),
        (lambda root: next(root.glob("images/validation/*")).unlink(), r"validation has no images"),
        (spoilt(lambda path: values(0).T), r"ADE_val_00000001\.png has 14x20 pixels, but its image has 20x14"),
        (spoilt(lambda path: np.zeros((HEIGHT, WIDTH, 3), np.uint8)), "has pixels of type RGB"),
        (spoilt(lambda path: path.write_bytes(path.read_bytes()[:-40])), "00001.png cannot be read"),
        (spoilt(lambda path: np.full((HEIGHT, WIDTH), 151, np.uint8)), r"00001\.png has the value 151, which stands"),
        (lambda root: write_names(root, rows()[:-1]), r"objectInfo150\.txt does not list the classes 1 to 150"),
        (lambda root: (root / "objectInfo150.txt").write_bytes(b"\xff\xfe"), r"objectInfo150\.txt cannot be read"),
    ],
)
def test_what_is_wrong_is_named(folder, spoil, sentence):
    spoil(folder)
    with pytest.raises(BadInput, match=sentence):
        ade20k.open_masks(folder).semantic(0)


def test_an_unknown_split_is_named(folder):
    with pytest.raises(BadInput, match="split 'test' is unknown: choose train or val"):
        ade20k.open_masks(folder, "test")
