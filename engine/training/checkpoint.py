"""How a state becomes durable: safetensors and JSON, written aside, hashed, then renamed into place.

A folder `checkpoints/step-N` exists only whole: its manifest names every file with its SHA-256, and before it gets its name all
files were read back from the disk and found to hold what was to be saved. Reading takes the newest folder whose files match; a
damaged one is named and passed over. What has another name, or is in no manifest, is none of ours: neither read nor removed.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.core.durable import flush, write_folder
from engine.core.errors import BadInput
from engine.core.json_text import parsed

PREFIX = "step-"
NAME = re.compile(rf"{PREFIX}\d{{9,}}")
MANIFEST, STATE = "manifest.json", "state.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(
    folder: Path,
    global_step: int,
    tensors: dict[str, dict[str, Tensor]],
    position: dict,
    keep: int = 2,
    go_on: Callable[[], None] = lambda: None,
) -> Path:
    """Write one checkpoint, read it back, and of it and those before it remove all but the newest `keep`.

    Args:
        folder: the run's `checkpoints` folder.
        global_step: updates since the run began, over all stages; the checkpoint's name.
        tensors: file stem -> tensor name -> host tensor.
        position: JSON content of `state.json`.
        go_on: asked before every file; what it raises leaves all as it was.

    Returns:
        The checkpoint's folder. Until it is in place under that name, the older ones are left alone.

    Raises:
        OSError: it cannot be written, or what is read back is something else; the older ones are left alone.
    """
    text = json.dumps(position, indent=1)

    def fill(aside: Path) -> None:
        for stem, named in tensors.items():
            go_on()
            save_file(named, aside / f"{stem}.safetensors")
        (aside / STATE).write_bytes(text.encode())
        hashes = {}
        for path in sorted(aside.iterdir()):
            go_on()
            _to_disk_alone(path)
            hashes[path.name] = _sha256(path)
        _check(aside, tensors, text)
        (aside / MANIFEST).write_text(json.dumps(hashes, indent=1))

    final = folder / f"{PREFIX}{global_step:09d}"
    write_folder(final, fill)
    # a later one is there where that was damaged, and this run goes on from before it
    for old in [one for one in found(folder) if _number(one) <= global_step][keep:]:
        shutil.rmtree(old)
    return final


def _to_disk_alone(path: Path) -> None:
    """Flush a file and let the system forget its copy in memory, so that it is read from the disk next."""
    flush(path)
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _check(folder: Path, tensors: dict[str, dict[str, Tensor]], text: str) -> None:
    """Raise OSError where files hold anything but this."""
    sound = {f"{stem}.safetensors": _holds(folder / f"{stem}.safetensors", named) for stem, named in tensors.items()}
    sound[STATE] = (folder / STATE).read_bytes() == text.encode()
    for name, holds in sound.items():
        if not holds:
            raise OSError(errno.EIO, "what is read back is not what was written", str(folder / name))


def _holds(path: Path, named: dict[str, Tensor]) -> bool:
    try:
        with safe_open(path, "pt") as file:
            if sorted(file.keys()) != sorted(named):
                return False
            return all(_equal(file.get_tensor(name), tensor) for name, tensor in named.items())
    except SafetensorError:
        return False


def _equal(one: Tensor, other: Tensor) -> bool:
    """To the bit, so that NaN equals itself; numpy compares in this thread alone and lets others run meanwhile."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return np.array_equal(*(tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (one, other)))


def found(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, whether sound or not."""
    ours = (path for path in folder.glob(f"{PREFIX}*") if NAME.fullmatch(path.name) and path.is_dir())
    return sorted(ours, key=_number, reverse=True)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files; empty when they are as they were written."""
    try:
        hashes = _hashes(checkpoint)
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in hashes.items():
        try:
            if not _is_file(checkpoint / name):
                return f"{name} is no file"
            if _sha256(checkpoint / name) != expected:
                return f"{name} does not match its SHA-256"
        except OSError:
            return f"{name} is missing or unreadable"
    return ""


def _is_file(path: Path) -> bool:
    """A pipe or a device, or a link to one, would be read forever."""
    return stat.S_ISREG(path.stat(follow_symlinks=False).st_mode)


def _hashes(checkpoint: Path) -> dict[str, str]:
    """What the manifest says, by file. ValueError if it is not what `save` writes."""
    if not _is_file(checkpoint / MANIFEST):
        raise ValueError(f"{MANIFEST} is no file")
    hashes = parsed((checkpoint / MANIFEST).read_text())
    if not isinstance(hashes, dict) or STATE not in hashes:
        raise ValueError(f"{MANIFEST} names no {STATE}")
    for name, expected in hashes.items():
        if Path(name).name != name or not (name == STATE or name.endswith(".safetensors")):
            raise ValueError(f"{MANIFEST} names {name!r}")
        if not isinstance(expected, str):
            raise ValueError(f"{MANIFEST} has no SHA-256 of {name}")
    return hashes


def newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint whose files are as they were written."""
    return next((checkpoint for checkpoint in found(folder) if not damage(checkpoint)), None)


def load(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """The tensors and the position of one sound checkpoint."""
    names = [name for name in _hashes(checkpoint) if name != STATE]
    tensors = {Path(name).stem: load_file(checkpoint / name) for name in names}
    return tensors, json.loads((checkpoint / STATE).read_text())


def newest(
    folder: Path, say: Callable[[str], None], until: float = math.inf
) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """The newest checkpoint that is sound, of those of at most `until` updates; what was passed over is told to `say`.

    Raises:
        BadInput: there is none.
    """
    candidates = [checkpoint for checkpoint in found(folder) if _number(checkpoint) <= until]
    for checkpoint in candidates:
        fault = damage(checkpoint)
        if not fault:
            try:
                return load(checkpoint)
            except (SafetensorError, ValueError, OSError, RuntimeError) as error:  # torch's reader raises the last
                fault = str(error)
        say(f"checkpoint {checkpoint.name} is damaged ({fault}); falling back to the one before it.")
    count = f"all {len(candidates)} are damaged" if candidates else "there is none"
    before = "" if until == math.inf else f" of at most {until:,} updates"
    raise BadInput(f"no checkpoint{before} to go on from in {folder}: {count}.")
