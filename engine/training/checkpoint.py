"""How a state becomes durable: safetensors and JSON, written aside, hashed, then renamed into place.

A folder `checkpoints/step-N` exists only whole: its manifest names every file with its SHA-256. Reading takes the newest
folder whose files match; a damaged one is named and passed over. What has another name, or is in no manifest, is none of ours: it
is neither read nor removed.
"""

import hashlib
import json
import math
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.core.durable import write_folder
from engine.core.errors import BadInput

PREFIX = "step-"
NAME = re.compile(rf"{PREFIX}\d{{9,}}")
MANIFEST, STATE = "manifest.json", "state.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(folder: Path, global_step: int, tensors: dict[str, dict[str, Tensor]], position: dict, keep: int = 2) -> Path:
    """Write one checkpoint, and of it and those before it remove all but the newest `keep`.

    Args:
        folder: the run's `checkpoints` folder.
        global_step: updates since the run began, over all stages; the checkpoint's name.
        tensors: file stem -> tensor name -> host tensor.
        position: JSON content of `state.json`.

    Returns:
        The checkpoint's folder. Until it is in place under that name, the older ones are left alone.
    """

    def fill(aside: Path) -> None:
        for stem, named in tensors.items():
            save_file(named, aside / f"{stem}.safetensors")
        (aside / STATE).write_text(json.dumps(position, indent=1))
        hashes = {path.name: _sha256(path) for path in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps(hashes, indent=1))

    final = folder / f"{PREFIX}{global_step:09d}"
    write_folder(final, fill)
    # a later one is there where that was damaged, and this run goes on from before it
    for old in [one for one in found(folder) if _number(one) <= global_step][keep:]:
        shutil.rmtree(old)
    # What a crash left half-written; ours alone writes here.
    for left_over in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(left_over)
    return final


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
            # a pipe or a device would be read forever
            if not stat.S_ISREG((checkpoint / name).stat(follow_symlinks=False).st_mode):
                return f"{name} is no file"
            if _sha256(checkpoint / name) != expected:
                return f"{name} does not match its SHA-256"
        except OSError:
            return f"{name} is missing or unreadable"
    return ""


def _hashes(checkpoint: Path) -> dict[str, str]:
    """What the manifest says, by file. ValueError if it is not what `save` writes."""
    hashes = json.loads((checkpoint / MANIFEST).read_text())
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
            except (SafetensorError, ValueError, OSError) as error:
                fault = str(error)
        say(f"checkpoint {checkpoint.name} is damaged ({fault}); falling back to the one before it.")
    count = f"all {len(candidates)} are damaged" if candidates else "there is none"
    before = "" if until == math.inf else f" of at most {until:,} updates"
    raise BadInput(f"no checkpoint{before} to go on from in {folder}: {count}.")
