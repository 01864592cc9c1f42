"""Parquet files as Hugging Face has them give the set of the folder with the same images, once; what is wrong is one sentence."""

import io
import itertools
import json
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine import shard
from engine import train as train_command
from engine.core.errors import BadInput
from engine.data import sources
from engine.data.sets import parquet, parquet_files
from tests.data.corpus import picture
from tests.data.loading import assert_same, loader, take

CLASSES = ("cat", "d.o.g é", "owl")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def encoded(seed: int, suffix: str = "jpeg") -> bytes:
    stream = io.BytesIO()
    picture(48 + 5 * (seed % 7), 40 + 3 * (seed % 5), seed).save(stream, suffix)
    return stream.getvalue()


def images(*contents: bytes | None) -> pa.Array:
    return pa.array([{"bytes": each, "path": None if each is None else "same.jpg"} for each in contents], IMAGE)


def declared(**names: list[str]) -> dict[str, str]:
    """Metadata as `datasets` writes it."""
    features = {"image": {"_type": "Image"}, "boxes": [{"x": {"_type": "Value"}}]}
    labels = {column: {"names": given, "_type": "ClassLabel"} for column, given in names.items()}
    return {"huggingface": json.dumps({"info": {"features": features | labels}})}


def write(path: Path, columns: dict[str, object], metadata: dict[str, str] | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, **options)
    return path


def write_set(root: Path, names: tuple[str, ...] | None = CLASSES) -> Path:
    """Eleven training images in two files and two row groups each, four for validation, four of a test split."""
    said = None if names is None else declared(label=list(names))
    rows = [("train-00000-of-00002", 0, 6), ("train-00001-of-00002", 6, 11), ("validation-00000-of-00001", 20, 24)]
    for name, first, last in (*rows, ("test-00000-of-00001", 40, 44)):
        contents = [encoded(seed, ("jpeg", "png", "webp")[seed % 3]) for seed in range(first, last)]
        numbers = [seed % 3 for seed in range(first, last)]
        columns = {"id": pa.array(range(first, last)), "image": images(*contents), "label": pa.array(numbers)}
        write(root / f"{name}.parquet", columns, said, row_group_size=4)
    return root


def opened(source: str | Path) -> dict[str, sources.ImageSet]:
    return {split: sources.open_images(source, split) for split in ("train", "val")}


def test_the_set_is_that_of_the_same_images_in_a_folder(tmp_path, home):
    contents = {
        split: [[encoded(10 * label + each) for each in range(4)] for label in range(3)] for split in ("train", "val")
    }
    for split, classes in contents.items():
        for label, within in enumerate(classes):
            folder = tmp_path / "folder" / split / CLASSES[label]
            folder.mkdir(parents=True)
            for each, content in enumerate(within):
                (folder / f"{each}.jpg").write_bytes(content)
        columns = {"image": images(*itertools.chain(*classes)), "label": pa.array(np.repeat([0, 1, 2], 4))}
        name = {"train": "train", "val": "validation"}[split]
        write(tmp_path / f"parquet/data/{name}-00000-of-00001.parquet", columns, declared(label=list(CLASSES)))
    ours, theirs = opened(f"parquet:{tmp_path / 'parquet'}"), opened(tmp_path / "folder")
    for split in ("train", "val"):
        assert ours[split].classes == theirs[split].classes == CLASSES and not ours[split].bad
        assert np.array_equal(ours[split].labels, theirs[split].labels)
        assert np.array_equal(ours[split].sizes, theirs[split].sizes)
        assert all(np.array_equal(ours[split].read(index), theirs[split].read(index)) for index in range(12))
    assert_same(*(take(loader(each["train"], batch_size=5), 4) for each in (ours, theirs)))
    assert ours["train"].paths[11] == "data/train-00000-of-00001.parquet:11"


@pytest.mark.parametrize("place", ["", "data/"])
@pytest.mark.parametrize("below", [False, True])
def test_ids_follow_files_and_rows_wherever_they_lie(tmp_path, place, below):
    root = write_set(tmp_path / place)
    if below:
        for path in list(root.iterdir()):
            if path.suffix == ".parquet":
                split, _, rest = path.name.partition("-")
                (root / split).mkdir(exist_ok=True)
                path.rename(root / split / rest)
    found = opened(f"parquet:{tmp_path}")
    assert found["train"].labels.tolist() == [seed % 3 for seed in range(11)]
    assert found["val"].labels.tolist() == [seed % 3 for seed in range(20, 24)], "validation, not test"
    for split, first in (("train", 0), ("val", 20)):
        for index, path in enumerate(found[split].paths):
            seed = first + index
            assert found[split].read(index).tobytes() == encoded(seed, ("jpeg", "png", "webp")[seed % 3])
            assert path.endswith(f".parquet:{index - 6 if split == 'train' and index >= 6 else index}")


def test_without_validation_test_is_what_is_judged_on_and_never_trained_on(tmp_path):
    (write_set(tmp_path) / "validation-00000-of-00001.parquet").unlink()
    found = opened(f"parquet:{tmp_path}")
    assert [len(each) for each in found.values()] == [11, 4]
    assert found["val"].paths[0] == "test-00000-of-00001.parquet:0"
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    assert not sources.has_split(f"parquet:{tmp_path}", "val")
    with pytest.raises(BadInput, match=r"no val split: it needs validation-\*.parquet or val-\*.parquet or test-"):
        sources.open_images(f"parquet:{tmp_path}", "val")
    assert len(sources.open_images(f"parquet:{tmp_path}", "train")) == 11
    write_set(tmp_path)
    for path in tmp_path.glob("train-*"):
        path.unlink()
    for split in ("train", "val"):
        with pytest.raises(BadInput, match=r"has no train split: it needs train-\*.parquet"):
            sources.open_images(f"parquet:{tmp_path}", split)


@pytest.mark.parametrize(
    ("kind", "names", "classes"),
    [
        (pa.uint8(), CLASSES, CLASSES),
        (pa.int32(), None, ("0", "1", "2")),
        (pa.string(), None, CLASSES),
        (pa.dictionary(pa.int8(), pa.string()), None, CLASSES),
        (pa.large_string(), None, CLASSES),
    ],
)
def test_classes_are_numbers_with_and_without_names_or_strings(tmp_path, kind, names, classes):
    write_set(tmp_path, names)
    for path in tmp_path.glob("*.parquet"):
        table = pq.read_table(path)
        numbers = table["label"].to_pylist()
        words = pa.types.is_dictionary(kind) or "string" in str(kind)
        values = pa.array([CLASSES[number] for number in numbers] if words else numbers, kind)
        write(path, dict(zip(table.column_names, (*table.columns[:2], values), strict=True)), table.schema.metadata)
    found = opened(f"parquet:{tmp_path}")
    assert found["train"].classes == found["val"].classes == classes
    assert found["train"].labels.tolist() == [seed % 3 for seed in range(11)]
    assert found["val"].labels.tolist() == [2, 0, 1, 2]


@pytest.mark.parametrize(
    ("columns", "classes"),
    [
        ({"jpg": pa.array([encoded(0), encoded(1)])}, None),
        ({"thumb": pa.array([b"x", b"y"]), "photograph": images(encoded(0), encoded(1))}, None),
        ({"mask": images(b"x", b"y"), "IMG": images(encoded(0), encoded(1)), "cls": pa.array([1, 0])}, ("0", "1")),
        ({"image": images(encoded(0), encoded(1)), "species": pa.array([0, 1])}, ("a", "b")),
        (
            {"image": images(encoded(0), encoded(1)), "coarse_label": pa.array([0, 0]), "fine_label": pa.array([0, 1])},
            ("0", "1"),
        ),
        (
            {"image": images(encoded(0), encoded(1)), "labels": pa.array([[0], [1]]), "caption": pa.array(["a", "b"])},
            None,
        ),
        ({"image": images(encoded(0), encoded(1)), "label": pa.array([-1, None])}, None),
        ({"image": images(encoded(0), encoded(1)), "label": pa.array([None, None], pa.string())}, None),
    ],
)
def test_columns_are_found_by_type_and_name(tmp_path, columns, classes):
    metadata = declared(species=["a", "b"]) if "species" in columns else None
    write(tmp_path / "train.parquet", columns, metadata)
    found = sources.open_images(f"parquet:{tmp_path}", "train")
    assert found.classes == classes and (found.labels is None) == (classes is None)
    assert [found.read(index).tobytes() for index in range(2)] == [encoded(0), encoded(1)]


def test_they_are_written_once_and_again_when_a_file_changes(tmp_path, home, monkeypatch, capsys):
    source = f"parquet:{write_set(tmp_path / 'set')}"
    written, write_shards = [], parquet._write
    monkeypatch.setattr(parquet, "_write", lambda *given: written.append(1) or write_shards(*given))
    opened(source)
    said = capsys.readouterr().err
    assert written == [1]
    assert (
        f"{tmp_path / 'set'}: writing 15 images of 'image.bytes', with 3 classes of 'label', as about 0.00 GiB of shards"
        in said
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)  # what is there needs no pyarrow
        opened(source)
    assert written == [1] and not capsys.readouterr().err
    os.utime(tmp_path / "set/train-00001-of-00002.parquet", ns=(1, 1))
    opened(source)
    assert written == [1, 1]
    shards = max(home.glob("parquet-*/train/00000.tar"), key=lambda path: path.stat().st_mtime_ns)
    shards.write_bytes(b"cut off")
    assert opened(source)["train"].labels.tolist() == [seed % 3 for seed in range(11)]
    assert written == [1, 1, 1], "a damaged cache is written again"


def test_shards_are_closed_and_go_on_with_the_next(tmp_path, home, monkeypatch):
    monkeypatch.setattr(parquet, "IMAGES_PER_SHARD", 4)
    found = opened(f"parquet:{write_set(tmp_path)}")
    assert sorted(path.name for path in home.glob("parquet-*/train/*")) == ["00000.tar", "00001.tar", "00002.tar"]
    assert found["train"].labels.tolist() == [seed % 3 for seed in range(11)] and not found["train"].bad


def test_images_that_are_none_keep_their_place_and_are_bad(tmp_path):
    contents = [encoded(seed) for seed in range(40)]
    rows = pa.array([None if seed == 3 else {"bytes": each, "path": ""} for seed, each in enumerate(contents)], IMAGE)
    rows = rows.to_pylist()
    rows[5]["bytes"], rows[8]["bytes"] = None, b"GIF89a"
    write(tmp_path / "train.parquet", {"image": pa.array(rows, IMAGE)})
    found = sources.open_images(f"parquet:{tmp_path}", "train", bad_limit=0.1)
    assert [path for path, _ in found.bad] == [f"train.parquet:{row}" for row in (3, 5, 8)]
    assert found.substitute[[3, 5, 8]].tolist() == [4, 6, 9] and len(found) == 40
    assert found.read(39).tobytes() == contents[39]
    with pytest.raises(BadInput, match=r"3 of 40 images are bad.*train.parquet:3: empty file"):
        sources.open_images(f"parquet:{tmp_path}", "train")


def good(**columns: object) -> dict[str, object]:
    return {"image": images(encoded(0), encoded(1), encoded(2)), "label": pa.array([0, 1, 2])} | columns


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    """Damages a page, and leaves the footer whole."""
    content = bytearray(path.read_bytes())
    content[60:400] = bytes(340)
    path.write_bytes(content)


REFUSED = {
    "cut off": (lambda path: cut(write(path, good())), "train.parquet cannot be read as a parquet file"),
    "damaged page": (lambda path: flip(write(path, good())), "train.parquet cannot be read as a parquet file"),
    "empty": (lambda path: path.write_bytes(b""), "train.parquet cannot be read as a parquet file"),
    "pointer": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "train.parquet is a pointer of Git LFS",
    ),
    "no images": (
        lambda path: write(path, {"text": pa.array(["a"]), "image": pa.array(["a.jpg"])}),
        "train.parquet has no column of images .* but text .string., image .string.",
    ),
    "two structs": (lambda path: write(path, {"a": images(b""), "b": images(b"")}), "has no column of images"),
    "paths only": (lambda path: write(path, good(image=images(None, None, None))), "none of 3 rows of train has bytes"),
    "no rows": (lambda path: write(path, {"image": images()}), "none of 0 rows of train has bytes"),
    "out of range": (
        lambda path: write(path, good(), declared(label=["a", "b"])),
        "train.parquet has the class 2 in row 2, which is none of the 2$",
    ),
    "below": (lambda path: write(path, good(label=pa.array([0, 1, -7]))), "has the class -7 in row 2"),
    "far above": (lambda path: write(path, good(label=pa.array([0, 1, 2**40]))), "'label' up to 1,099,511,627,776"),
    "too large": (
        lambda path: write(path, good(label=pa.array([0, 1, 2**63 + 1], pa.uint64()))),
        "train.parquet cannot be read as a parquet file",
    ),
    "some without": (
        lambda path: write(path, good(label=pa.array([0, None, -1]))),
        "train.parquet has 2 of 3 rows without a class in 'label', row 1 first",
    ),
    "line break": (lambda path: write(path, good(), declared(label=["a", "b\n", "c"])), r"'b\\n' of .*train.parquet has a line"),
    "twice": (lambda path: write(path, good(), declared(label=["a", "b", "a"])), "train.parquet has .* two of one name"),
    "no text": (lambda path: write(path, good(), declared(label=["a", "\ud800", "c"])), "train.parquet has a class whose name"),
    "no names": (lambda path: write(path, good(), declared(label="abc")), "train.parquet has metadata"),
    "no JSON": (lambda path: write(path, good(), {"huggingface": "{"}), "train.parquet has metadata"),
    "nested": (lambda path: write(path, good(), {"huggingface": "[" * 100_000}), "train.parquet has metadata"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_damaged_or_hostile_is_refused_by_name(tmp_path, home, name):
    make, sentence = REFUSED[name]
    (tmp_path / "set").mkdir()
    make(tmp_path / "set/train.parquet")
    with pytest.raises(BadInput, match=sentence) as caught:
        sources.open_images(f"parquet:{tmp_path / 'set'}", "train")
    assert "\n" not in str(caught.value) and str(tmp_path / "set/train.parquet") in str(caught.value)
    assert not list(home.glob("parquet-*/*")) and not list(home.glob(".parquet-*")), "nothing half-written is left"


def test_bytes_changed_anywhere_are_refused_or_read(tmp_path):
    """Half of them in the footer, whose damage pyarrow doesn't always turn into an exception."""
    path = write(tmp_path / "train.parquet", good(), declared(label=["a", "b", "c"]))
    whole, random = path.read_bytes(), np.random.default_rng(0)
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    sentences = []
    for trial in range(200):
        content = np.frombuffer(whole, np.uint8).copy()
        places = random.integers(footer if trial % 2 else 0, len(whole), 4)
        content[places] = random.integers(0, 256, 4)
        path.write_bytes(content)
        try:
            columns = parquet_files.agreed([path])
            parquet_files.stored(path)
            if columns.label:
                parquet_files.codes(path, columns, {})
            assert len(list(parquet_files.images(path, columns.image))) == 3
        except BadInput as error:
            sentences.append(str(error))
    assert 50 < len(sentences) < 200
    assert all(str(path) in sentence and "\n" not in sentence for sentence in sentences)


@pytest.mark.parametrize(
    ("columns", "metadata", "sentence"),
    [
        (
            good(label=pa.array(["0", "1", "2"])),
            declared(),
            "its column of classes being strings is True, and there it is False",
        ),
        ({"image": good()["image"]}, None, "its column of classes is none, and there it is label"),
        (good(), declared(label=["b", "a", "c"]), "its list of classes' names is .*'b', 'a', 'c'.*, and there it is"),
        (
            {"img": good()["image"], "label": good()["label"]},
            None,
            "its column of images is img.bytes, and there it is image.bytes",
        ),
    ],
)
@pytest.mark.parametrize("other", ["train-1.parquet", "validation.parquet"])
def test_files_that_differ_are_refused(tmp_path, columns, metadata, sentence, other):
    write(tmp_path / "train-0.parquet", good(), declared(label=["a", "b", "c"]))
    write(tmp_path / other, columns, metadata)
    with pytest.raises(BadInput, match=sentence) as caught:
        sources.open_images(f"parquet:{tmp_path}", "train")
    assert f"{tmp_path / other} is not like {tmp_path / 'train-0.parquet'}" in str(caught.value)


def test_a_class_of_val_that_train_lacks_is_named(tmp_path):
    write(tmp_path / "train.parquet", good(label=pa.array(["a", "b", "a"])))
    write(tmp_path / "val.parquet", good(label=pa.array(["a", "x", "a"])))
    with pytest.raises(
        BadInput, match=r"val.parquet has the class 'x' in row 1, which is none of the 2 of the training images"
    ):
        sources.open_images(f"parquet:{tmp_path}", "train")


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["train-00000-of-00002"], "has 1 files of train, which are not the 2 that train-00000-of-00002"),
        (["train-00000-of-00001-abc", "train-00000-of-00001-def"], "has 2 files of train, which are not the 1"),
        (["train-00000-of-00001", "train"], "has 2 files of train, which are not the 1"),
        (["train-0", "train/0"], "has files of train twice, train-0.parquet and train/0.parquet"),
    ],
)
def test_files_that_are_missing_or_there_twice_are_named(tmp_path, names, sentence):
    for name in names:
        write(tmp_path / f"{name}.parquet", good())
    with pytest.raises(BadInput, match=sentence):
        sources.open_images(f"parquet:{tmp_path}", "train")


def test_an_image_that_is_huge_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_files, "LARGEST", 10_000)
    write(tmp_path / "train.parquet", good(image=images(encoded(0), bytes(10_001), encoded(1))))
    with pytest.raises(BadInput, match=r"train.parquet has 10,001 bytes in row 1, more than an image of"):
        sources.open_images(f"parquet:{tmp_path}", "train")


def test_few_images_are_in_memory_at_a_time(tmp_path, monkeypatch):
    """Of a row group of 64 MiB in pages of 1 MiB, about the bytes of a batch."""
    noise = np.random.default_rng(0)
    columns = {"image": images(*(noise.bytes(1 << 20) for _ in range(64)))}
    path = write(tmp_path / "train.parquet", columns, use_dictionary=False, write_batch_size=1)
    assert pq.read_metadata(path).num_row_groups == 1
    monkeypatch.setattr(parquet_files, "BATCH", 4 << 20)
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        assert sum(map(len, parquet_files.images(path, "image.bytes"))) == 64 << 20
    finally:
        pa.set_memory_pool(before)
    assert 1 << 20 < pool.max_memory() < 24 << 20


@pytest.mark.parametrize("rows", [2, 4])
def test_rows_that_are_not_as_many_as_declared_are_refused(tmp_path, monkeypatch, rows):
    path = write(tmp_path / "train.parquet", good())
    monkeypatch.setattr(parquet_files, "_stored", lambda file: (rows, 1000))
    with pytest.raises(BadInput, match=rf"train.parquet is damaged: it declares {rows} rows, and 3 were read"):
        list(parquet_files.images(path, "image.bytes"))


def test_a_cache_without_room_is_said_before_anything_is_written(tmp_path, home, monkeypatch):
    source = f"parquet:{write_set(tmp_path)}"
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 0, 50_000))
    monkeypatch.setattr(parquet, "new_shard", lambda path: pytest.fail("written"))
    with pytest.raises(BadInput, match=r"takes 0.00 GiB as shards, and .*cache has 0.00 GiB free: make room"):
        opened(source)


def test_files_that_are_written_meanwhile_are_refused(tmp_path, home, monkeypatch):
    root = write_set(tmp_path)
    fill = parquet._fill
    monkeypatch.setattr(
        parquet, "_fill", lambda *given: (fill(*given), os.utime(next(root.glob("train-*")), ns=(1, 1)))
    )
    with pytest.raises(BadInput, match="were written while they were read"):
        opened(f"parquet:{root}")
    assert not list(home.glob("parquet-*/*"))


@pytest.mark.parametrize("version", [None, "17.0.0"])
def test_without_pyarrow_a_command_ends_with_one_sentence_and_status_2(tmp_path, monkeypatch, capsys, version):
    source = f"parquet:{write_set(tmp_path / 'set')}"
    if version is None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    else:
        monkeypatch.setattr(pa, "__version__", version)
    assert train_command.main(["--method", "mae", "--data", source, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "pip install 'pyarrow>=18'" in error
    assert not (tmp_path / "out").exists()


def test_they_are_packed_like_any_other_source(tmp_path):
    source = f"parquet:{write_set(tmp_path / 'set')}"
    assert shard.main([source, str(tmp_path / "out")]) == 0
    for split, packed in opened(tmp_path / "out").items():
        images = sources.open_images(source, split)
        assert packed.paths == images.paths and packed.classes == images.classes
        assert np.array_equal(packed.labels, images.labels)
