import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from engine.core.errors import BadInput
from engine.data import screen, sources
from tests.data.corpus import HOSTILE, picture, write_hostile, write_photos


def make_classes(root, train=("cat", "dog"), val=("cat", "dog"), each=3):
    for split, names in (("train", train), ("val", val)):
        for name in names:
            write_photos(root / split / name, each)
    return root


def test_classes_are_the_folders_of_train(tmp_path):
    make_classes(tmp_path, train=("b", "a", "c"), val=("c",))
    write_photos(tmp_path / "train/a/deeper", 2)
    train, val = sources.open_images(tmp_path, "train"), sources.open_images(str(tmp_path), "val")
    assert train.classes == val.classes == ("a", "b", "c")
    assert train.labels.tolist() == [0] * 5 + [1] * 3 + [2] * 3
    assert train.labels.dtype == np.int64
    assert val.labels.tolist() == [2] * 3
    assert train.paths[0] == "train/a/deeper/photo000.jpg"
    assert train.paths[-1] == "train/c/photo002.jpg"
    assert train.sizes[2].tolist() == [48, 40]
    assert train.sizes.dtype == np.int32
    assert train.substitute.tolist() == list(range(11))
    assert not train.bad


def test_a_flat_folder_has_no_labels_and_no_val(tmp_path):
    write_photos(tmp_path / "holiday/beach", 3)
    write_photos(tmp_path, 2, "png")
    (tmp_path / "notes.txt").write_text("passed over")
    (tmp_path / ".hidden.jpg").write_text("passed over")
    images = sources.open_images(tmp_path, "train")
    assert len(images) == 5
    assert images.labels is None
    assert images.classes is None
    assert sources.has_split(tmp_path, "train")
    assert not sources.has_split(tmp_path, "val")
    assert sources.has_split(None, "val")
    with pytest.raises(BadInput, match="no val split"):
        sources.open_images(tmp_path, "val")


def test_links_that_lead_back_up_end(tmp_path):
    write_photos(tmp_path / "a", 2)
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a")
    assert sources.open_images(tmp_path, "train").paths == ["a/photo000.jpg", "a/photo001.jpg"]


def test_links_that_double_end(tmp_path):
    """Two links in each of forty folders to the next one: a thousand billion paths to two images."""
    folders = [tmp_path / f"{depth:02d}" for depth in range(40)]
    for folder, following in zip(folders, [*folders[1:], tmp_path / "end"], strict=True):
        folder.mkdir()
        for name in ("x", "y"):
            (folder / name).symlink_to(following)
    write_photos(tmp_path / "end", 2)
    assert len(sources.open_images(tmp_path, "train").paths) == 2


@pytest.mark.parametrize(
    ("spoil", "split", "sentence"),
    [
        (lambda root: (root / "train/empty").mkdir(), "train", "train/empty has no images"),
        (lambda root: (root / "val/empty").mkdir(), "val", "class 'empty' that"),
        (lambda root: write_photos(root / "val/bird", 1), "train", "class 'bird' that"),
        (lambda root: os.rename(root / "train", root / "exercises"), "train", "no train/"),
        (lambda root: os.rename(root / "val", root / "held_out"), "val", "no val split"),
        (
            lambda root: [os.rename(root / "train" / name, root / name) for name in ("cat", "dog")],
            "val",
            "no class folders",
        ),
    ],
)
def test_a_wrong_layout_is_named(tmp_path, spoil, split, sentence):
    spoil(make_classes(tmp_path))
    with pytest.raises(BadInput, match=sentence):
        sources.open_images(tmp_path, split)


@pytest.mark.parametrize(
    ("train", "val"), [("Train", "Val"), ("TRAIN", "VAL"), ("training", "validation"), ("train", "valid")]
)
def test_splits_spelled_otherwise_are_found_and_a_test_split_is_left_alone(train, val, tmp_path):
    expected = sources.open_images(make_classes(tmp_path / "plain"), "train")
    other = make_classes(tmp_path / "other")
    for old, new in (("train", train), ("val", val)):
        (other / old).rename(other / new)
    write_photos(other / "test" / "cat", 2)
    found = sources.open_images(other, "train")
    assert found.classes == expected.classes and found.labels.tolist() == expected.labels.tolist()
    assert list(found.paths) == [path.replace("train/", f"{train}/") for path in expected.paths]
    assert sources.has_split(other, "val")
    assert next(iter(sources.open_images(other, "val").paths)) == f"{val}/cat/photo000.jpg"


def test_a_test_split_alone_is_not_trained_on_unasked(tmp_path):
    write_photos(tmp_path / "Test" / "cat", 2)
    write_photos(tmp_path / "more", 2)
    with pytest.raises(BadInput, match=r"has a folder Test/ but no train/: name the folder to train on"):
        sources.open_images(tmp_path, "train")
    assert len(sources.open_images(tmp_path / "Test", "train")) == 2


def test_a_name_in_two_forms_of_unicode_is_one_class(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    make_classes(tmp_path, train=(composed, "dog"), val=(apart, "dog"))
    val = sources.open_images(tmp_path, "val")
    assert val.classes == (composed, "dog") and sorted(val.labels.tolist()) == [0] * 3 + [1] * 3
    write_photos(tmp_path / "train" / apart, 1)
    with pytest.raises(BadInput, match="in two forms of Unicode"):
        sources.open_images(tmp_path, "train")


def test_what_systems_leave_is_passed_over(tmp_path):
    make_classes(tmp_path)
    for place in ("train/__MACOSX", "train/cat/@eaDir", "train/cat/.thumbnails"):
        write_photos(tmp_path / place, 1)
    (tmp_path / "train/dog/photo000.jpg").rename(tmp_path / "train/dog/photo000.JFIF")
    found = sources.open_images(tmp_path, "train")
    assert found.classes == ("cat", "dog") and len(found) == 6 and not found.bad
    assert "train/dog/photo000.JFIF" in list(found.paths)


def test_wrong_arguments_are_named(tmp_path):
    for source, split, options, sentence in [
        (tmp_path / "missing", "train", {}, "is no folder: give"),
        (tmp_path, "train", {}, "no images in"),
        (None, "test", {}, "choose train or val"),
        (None, "train", {"bad_limit": 2.0}, "between 0 and 1"),
        (None, "train", {"screening": "no"}, "choose auto, header or decode"),
    ]:
        with pytest.raises(BadInput, match=sentence):
            sources.open_images(source, split, **options)


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    make_classes(tmp_path)
    scan = os.scandir

    def refuse(folder):  # chmod does not stop a superuser
        if str(folder).endswith("train/dog"):
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(BadInput, match="train/dog cannot be read: Permission denied"):
        sources.open_images(tmp_path, "train")


def test_every_hostile_file_is_listed_with_its_reason_and_replaced(tmp_path):
    write_photos(tmp_path / "m", 6)
    expected = write_hostile(tmp_path / "n")
    images = sources.open_images(tmp_path, "train", bad_limit=1.0)
    assert [path for path, _ in images.bad] == sorted(f"n/{name}" for name in expected)
    for path, reason in images.bad:
        assert expected[path[2:]] in reason, (path, reason)
    assert images.good.tolist() == [True] * 6 + [False] * len(HOSTILE)
    assert images.substitute[:6].tolist() == list(range(6))
    assert set(images.substitute[6:].tolist()) == {0}  # the next good id, round the end of the list


def test_the_substitute_is_the_next_good_id():
    good = np.array([False, True, False, False, True, False])
    assert sources.substitutes(good).tolist() == [1, 1, 4, 4, 4, 1]


def test_too_many_bad_files_stop_at_the_start(tmp_path):
    write_photos(tmp_path, 96)
    for name in ("x1.jpg", "x2.jpg", "x3.jpg", "x4.jpg"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadInput, match=r"4 of 100 .* limit of 0.03 \(x1.jpg: empty file; .*; \.\.\.\)") as caught:
        sources.open_images(tmp_path, "train", bad_limit=0.03)
    ledger = Path(str(caught.value).split("listed in ")[1].split(")")[0])
    assert ledger.read_text() == "".join(f"x{index}.jpg\tempty file\n" for index in range(1, 5))
    assert len(sources.open_images(tmp_path, "train", bad_limit=0.04).bad) == 4


def test_nothing_but_bad_files_is_refused_at_any_limit(tmp_path):
    (tmp_path / "only.jpg").write_bytes(b"")
    with pytest.raises(BadInput, match="1 of 1 images are bad"):
        sources.open_images(tmp_path, "train", bad_limit=1.0)


def test_files_are_looked_at_once_until_they_change(tmp_path, monkeypatch):
    write_photos(tmp_path, 4)
    first = sources.open_images(tmp_path, "train")
    look, looked_at = screen.inspect_all, []
    monkeypatch.setattr(
        screen, "inspect_all", lambda *wanted, **more: looked_at.append(wanted) or look(*wanted, **more)
    )
    again = sources.open_images(tmp_path, "train")
    assert not looked_at
    assert np.array_equal(first.sizes, again.sizes)
    picture(99, 77).save(tmp_path / "photo001.jpg")
    assert sources.open_images(tmp_path, "train").sizes[1].tolist() == [99, 77]
    assert len(looked_at) == 1


def test_a_look_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    write_photos(tmp_path, 12)
    (tmp_path / "photo002.jpg").write_bytes(b"")
    expected = sources.open_images(tmp_path, "train", bad_limit=0.5)
    inspect, looked_at = screen.inspect, []

    def stops(opened, decode):
        looked_at.append(Path(opened().name).stem)
        if len(looked_at) == 9:
            raise KeyboardInterrupt
        return inspect(opened, decode)

    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    for name, value in {"PART": 2, "KEEP_EVERY": -1.0, "inspect": stops}.items():
        monkeypatch.setattr(screen, name, value)
    monkeypatch.setattr(screen, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))  # in order
    with pytest.raises(KeyboardInterrupt):
        sources.open_images(tmp_path, "train", bad_limit=0.5)
    found = sources.open_images(tmp_path, "train", bad_limit=0.5)
    assert looked_at[-4:] == [f"photo{index:03d}" for index in range(8, 12)]
    assert all(looked_at.count(f"photo{index:03d}") == 1 for index in range(8))
    assert np.array_equal(found.sizes, expected.sizes) and found.bad == expected.bad
    assert not list((tmp_path / "cache").rglob("*.begun.npz"))


def test_a_header_look_leaves_pixel_data_alone(tmp_path):
    write_photos(tmp_path, 3)
    HOSTILE["truncated.jpg"][0](tmp_path / "truncated.jpg")
    assert not sources.open_images(tmp_path, "train", screening="header").bad
    assert len(sources.open_images(tmp_path, "train", screening="decode", bad_limit=1).bad) == 1


def test_the_header_bomb_is_never_decoded(tmp_path, monkeypatch):
    HOSTILE["bomb.png"][0](tmp_path / "bomb.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    assert "megapixels" in screen.inspect(partial(open, tmp_path / "bomb.png", "rb"), decode=True)[1]
