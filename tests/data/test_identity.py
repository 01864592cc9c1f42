"""Whether two sets are taken for one: by number, classes, names and labels, wherever they lie."""

import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.data.identity import Identity
from engine.data.sources import ImageSet, located, open_images

PATHS, CLASSES = ("cat/a.png", "cat/b.png", "dog/c.png"), ("cat", "dog")


def images(**changes) -> ImageSet:
    count = len(changes.get("paths", PATHS))
    labels = np.array([0, 0, 1, 1][:count])
    one = ImageSet(Path("/one"), "train", PATHS, labels, CLASSES, np.full((count, 2), 32), np.arange(count))
    return replace(one, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"root": Path("/other")}, ""),
        ({"bad": (("cat/a.png", "torn"),)}, ""),
        ({"paths": (*PATHS, "dog/d.png")}, "4 images instead of 3"),
        ({"paths": PATHS[:2]}, "2 images instead of 3"),
        ({"paths": ("cat/a.png", "cat/b.png", "dog/d.png")}, "as many images (3), but not of the same names"),
        ({"labels": np.array([0, 1, 1])}, "not of the same names in the same classes"),
        ({"labels": None}, "not of the same names in the same classes"),
        ({"classes": ("dog", "cat")}, "the same classes in another order"),
        ({"classes": ("cat", "hound")}, "other classes ('hound' new, 'dog' gone)"),
        ({"classes": None}, "other classes ('cat', 'dog' gone)"),
        ({"classes": tuple("abcdef")}, "('a', 'b', 'c' and 3 more new, 'cat', 'dog' gone)"),
    ],
)
def test_what_differs_is_told_in_words(changes: dict, words: str):
    before = Identity.of(images())
    found = Identity.of(images(**changes)).difference(Identity.from_json(before.as_json()))
    assert words in found and bool(words) == bool(found)


def test_accents_are_the_same_however_they_are_spelled():
    composed, decomposed = (unicodedata.normalize(form, "cat/Zoë.png") for form in ("NFC", "NFD"))
    assert composed != decomposed
    one, other = (Identity.of(images(paths=(*PATHS[:2], name))) for name in (composed, decomposed))
    assert one == other


def test_made_images_are_told_apart_by_their_number():
    some, more = (Identity.of(open_images(f"synthetic:{count}", "train")) for count in (8, 9))
    assert more.difference(some) == "9 images instead of 8"
    assert Identity.of(open_images("synthetic:8", "train")) == some


def test_a_source_is_located_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert located("mine") == str(tmp_path / "mine")
    assert located("cifar10:sets/c") == f"cifar10:{tmp_path}/sets/c"
    assert located("~/x") == os.path.expanduser("~/x")
    assert [located(name) for name in ("", "digits", "scenes", "synthetic:7")] == [
        "",
        "digits",
        "scenes",
        "synthetic:7",
    ]
