"""One parquet file of images at a time: which columns it has, and what is in them.

The column of images is a struct with binary "bytes", or binary: the first of `IMAGES` that is there, else the only such struct.
The column of classes is whole numbers or strings: the first of `LABELS`, else the only one that the schema declares to be of
classes; where there is none, the set has no classes. The names of numbers stand in the schema's metadata, as Hugging Face's
`datasets` writes them (key "huggingface", info.features).

Files are read by pyarrow, which is imported when there is one to be read. Row groups are gone through in batches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.core.errors import BadInput
from engine.core.json_text import parsed
from engine.data.shards.index import NONE
from engine.data.shards.members import check_classes
from engine.data.shards.webdataset import MOST_CLASSES

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
LABELS = ("label", "labels", "cls", "class", "fine_label", "target", "category")
KEY = b"huggingface"
POINTER = b"version https://git-lfs"
BATCH = 16 << 20  # bytes of images that are in memory at a time, about
LARGEST = 1 << 28  # bytes of an image; screening takes none of so many pixels
LABEL_BATCH = 1 << 16  # labels that are in memory as Python objects at a time
OLDEST = 18  # of pyarrow's versions
INSTALL = f"pip install 'pyarrow>={OLDEST}'"
TOLD = {
    "image": "column of images", "label": "column of classes", "words": "column of classes being strings",
    "names": "list of classes' names",
}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Where images and classes are in a file; equal for all files of a set.

    Attributes:
        image: of the bytes, as a path of names.
        label: of the class, or "".
        words: whether classes are strings.
        names: of classes that are numbers, or ().
    """

    image: str
    label: str
    words: bool
    names: tuple[str, ...]


def check_installed() -> None:
    """Raises BadInput where pyarrow is missing or too old."""
    try:
        import pyarrow
    except ImportError as error:
        raise BadInput(f"parquet files need the Python package pyarrow, which is not installed: {INSTALL}") from error
    if int(pyarrow.__version__.partition(".")[0]) < OLDEST:
        raise BadInput(
            f"parquet files need pyarrow from {OLDEST} on, and {pyarrow.__version__} is installed: {INSTALL}"
        )


def agreed(files: Sequence[Path]) -> Columns:
    """The columns of all files. Raises BadInput where they differ, one cannot be read, or has no images."""
    first = _columns(files[0])
    for path in files[1:]:
        columns = _columns(path)
        if different := next((each for each in vars(first) if getattr(first, each) != getattr(columns, each)), None):
            one, other = (str(getattr(each, different))[:80] or "none" for each in (columns, first))
            raise BadInput(f"{path} is not like {files[0]}: its {TOLD[different]} is {one}, and there it is {other}")
    return first


def stored(path: Path) -> tuple[int, int]:
    """Rows, and bytes of all columns before compression, as the file declares them. Raises BadInput where it cannot be read."""
    with _opened(path) as file:
        return _stored(file)


def _stored(file: Any) -> tuple[int, int]:
    # of row groups: pyarrow ends the process where what is said of a column in one is damaged
    about = file.metadata
    return about.num_rows, sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))


def images(path: Path, column: str) -> Iterator[bytes]:
    """The bytes of each row's image, empty where there are none. Raises BadInput where the file is damaged or one is huge."""
    from pyarrow.types import is_struct

    with _opened(path) as file:
        rows, size = _stored(file)
        batch = int(np.clip(BATCH * rows // max(size, 1), 1, 1024))
        done = 0
        for part in file.iter_batches(batch, columns=[column], use_threads=False):
            found = part.column(0)
            for content in found.flatten()[0] if is_struct(found.type) else found:
                data = content.as_py() or b""
                if len(data) > LARGEST:
                    raise BadInput(
                        f"{path} has {len(data):,} bytes in row {done}, more than an image of {LARGEST >> 20} MiB"
                    )
                done += 1
                _check_rows(path, done, rows, done <= rows)
                yield data
        _check_rows(path, done, rows, done == rows)


def codes(path: Path, columns: Columns, vocabulary: dict[str, int]) -> np.ndarray:
    """int64 [rows]: the numbers, or the places of the strings in the vocabulary, which grows; NONE where there is none.

    Raises BadInput where the file is damaged, or has more classes than there can be.
    """
    parts = [np.empty(0, np.int64)]
    with _opened(path) as file:
        for batch in file.iter_batches(LABEL_BATCH, columns=[columns.label], use_threads=False):
            found = batch.column(0)
            if columns.words:
                numbers = (
                    NONE if word is None else vocabulary.setdefault(word, len(vocabulary)) for word in found.to_pylist()
                )
                parts.append(np.fromiter(numbers, np.int64, len(found)))
            else:
                parts.append(found.cast("int64").fill_null(NONE).to_numpy())
            most = len(vocabulary) if columns.words else int(parts[-1].max(initial=0))
            if most >= MOST_CLASSES:
                raise BadInput(f"{path} has {columns.label!r} up to {most:,}, more than there are classes of images")
        rows, done = file.metadata.num_rows, sum(map(len, parts))
        _check_rows(path, done, rows, done == rows)
    return np.concatenate(parts)


def _check_rows(path: Path, done: int, rows: int, holds: bool) -> None:
    if not holds:
        raise BadInput(f"{path} is damaged: it declares {rows:,} rows, and {done:,} were read")


def _columns(path: Path) -> Columns:
    from pyarrow import types

    with _opened(path) as file:
        schema = file.schema_arrow

    def holds_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    def holds_text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_string(kind) or types.is_large_string(kind)

    if len(set(schema.names)) < len(schema.names):
        raise BadInput(f"{path} has two columns of one name: {', '.join(schema.names)}")
    structs = [
        field.name
        for field in schema
        if types.is_struct(field.type)
        and (place := field.type.get_field_index("bytes")) >= 0
        and holds_bytes(field.type.field(place).type)
    ]
    fitting = [*structs, *(field.name for field in schema if holds_bytes(field.type))]
    image = _first(fitting, IMAGES) or (structs[0] if len(structs) == 1 else "")
    if not image:
        listed = ", ".join(f"{field.name} ({field.type})" for field in schema)[:400]
        raise BadInput(
            f"{path} has no column of images (binary, or a struct with binary 'bytes', called {', '.join(IMAGES[:-1])} or "
            f"{IMAGES[-1]}), but {listed}"
        )
    said = _said(path, schema)
    named = {field.name: said.get(field.name) for field in schema if types.is_integer(field.type)}
    declared = [name for name, names in named.items() if names is not None]
    words = [field.name for field in schema if holds_text(field.type)]
    label = _first([*named, *words], LABELS) or (declared[0] if len(declared) == 1 else "")
    names = named.get(label) or ()
    check_classes(names, path)
    return Columns(f"{image}.bytes" if image in structs else image, label, label in words, names)


def _first(columns: Sequence[str], wanted: Sequence[str]) -> str:
    """The column whose name comes first among those wanted, in whichever case; or ""."""
    return next((column for name in wanted for column in columns if column.lower() == name), "")


def _said(path: Path, schema: Any) -> dict[str, tuple[str, ...]]:
    """The names of classes by column, as the schema's metadata has them."""
    try:
        content = parsed((schema.metadata or {}).get(KEY, b"{}"))
        found = {
            column: said["names"]
            for column, said in content.get("info", {}).get("features", {}).items()
            if isinstance(said, dict) and said.get("_type") == "ClassLabel"
        }
        if not all(
            isinstance(names, list) and all(isinstance(name, str) for name in names) for names in found.values()
        ):
            raise ValueError
    except (ValueError, AttributeError, KeyError) as error:
        raise BadInput(
            f"{path} has metadata of the key {KEY.decode()!r} that does not name the classes as it should"
        ) from error
    return {column: tuple(names) for column, names in found.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open `pyarrow.parquet.ParquetFile`, which has no more in memory than it is asked for.

    Raises:
        BadInput: there is none, or what is done with it finds it damaged.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with path.open("rb") as raw:
            if raw.read(len(POINTER)) == POINTER:
                raise BadInput(f"{path} is a pointer of Git LFS, and not the file: fetch it by git lfs pull")
            raw.seek(0)
            with ParquetFile(raw, buffer_size=1 << 20, page_checksum_verification=True) as file:
                yield file
    except BadInput:
        raise
    except (ArrowException, OSError, ValueError) as error:  # damaged pages raise any of them
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise BadInput(f"{path} cannot be read as a parquet file, and may be cut off or damaged: {said}") from error
