"""manifest.json of a folder that `engine.shard` packs: what is in it, and whether packing came to its end."""

import json
from pathlib import Path
from typing import Any

from engine.core.durable import write_file
from engine.core.errors import BadInput
from engine.core.json_text import parsed

NAME = "manifest.json"
FORMAT = "tessera shards 1"


def load(folder: Path) -> dict[str, Any] | None:
    """The manifest of a packed folder, or None where it has none of this kind. Raises BadInput where it cannot be read."""
    path = folder / NAME
    try:
        content = parsed(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except ValueError:  # somebody else's, of whatever kind
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    if not all(isinstance(content.get(key), dict) for key in ("shards", "left_out")):
        raise BadInput(f"{path} is damaged: remove {folder}, and pack again")
    return content


def save(folder: Path, content: dict[str, Any]) -> None:
    """Writes it whole."""
    text = json.dumps({"format": FORMAT, **content}, indent=1)
    write_file(folder / NAME, lambda path: path.write_text(text))


def check_whole(folder: Path) -> None:
    """Raises BadInput if packing has not come to its end there, or a shard it made is missing or has another size."""
    content = load(folder)
    if content is None:
        return
    if not content.get("complete"):
        raise BadInput(
            f"{folder} was not packed to its end: give the same command of engine.shard again, and it goes on"
        )
    for name, size in content["shards"].items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            raise BadInput(f"{folder / name} is missing, which {NAME} there lists ({error.strerror})") from error
        if found != size:
            raise BadInput(
                f"{folder / name} has {found} bytes, and {NAME} there says {size}: it was changed or cut off"
            )
