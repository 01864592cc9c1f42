"""How images are written into shards: the members that one has, and the names of the classes beside the shards."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from engine.core.durable import write_file
from engine.core.errors import BadInput
from engine.data.names import ENCODED
from engine.data.shards.webdataset import CLASSES, PATH_KEY

IMAGES_PER_SHARD = 5000  # at most, unless a flag says it


def new_shard(path: Path) -> tarfile.TarFile:
    """An empty one, to be closed. The same members give the same bytes."""
    return tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)


def add_image(tar: tarfile.TarFile, number: int, path: str, label: int | None, suffix: str, content: bytes) -> None:
    """Writes an image as KEY.suffix with KEY.json, which has its path and its label, and KEY.cls where it has a label."""
    said: dict[str, object] = {PATH_KEY: path}
    if label is not None:
        _add(tar, f"{number:09d}.cls", str(label).encode())
        said = {"cls": label, **said}
    _add(tar, f"{number:09d}.json", json.dumps(said).encode())
    _add(tar, f"{number:09d}.{suffix}", content)


def check_classes(classes: Sequence[str], where: Path) -> None:
    """Raises BadInput for names of classes that classes.txt cannot have; `where` they are from."""
    if odd := [name for name in classes if "\n" in name or name.endswith("\r")]:
        raise BadInput(
            f"the class {odd[0]!r} of {where} has a line break in its name, and {CLASSES} has a name a line: rename it"
        )
    try:
        "".join(classes).encode(*ENCODED)
    except UnicodeEncodeError as error:
        raise BadInput(f"{where} has a class whose name is no text that a file can hold") from error
    if not all(classes) or len(set(classes)) < len(classes):
        raise BadInput(f"{where} has a class without a name, or two of one name")


def write_classes(folder: Path, classes: Sequence[str]) -> None:
    """Writes classes.txt, whose line says the label."""
    text = "".join(f"{name}\n" for name in classes).encode(*ENCODED)
    write_file(folder / CLASSES, lambda path: path.write_bytes(text))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
