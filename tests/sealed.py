"""A run's config.json as if other things had been written there."""

import json
from collections.abc import Callable
from pathlib import Path

from engine.training import config_file


def resealed(run: Path, change: Callable[[dict], object]) -> None:
    """Change what config.json holds, its version too, and seal it again."""
    content = json.loads((run / "config.json").read_text())
    change(content)
    version = content.pop("version")
    del content[config_file.SEAL]
    text = json.loads(config_file.sealed(content))
    if version != config_file.VERSION:
        text["version"] = version
        text[config_file.SEAL] = config_file._hash({k: v for k, v in text.items() if k != config_file.SEAL})
    (run / "config.json").write_text(json.dumps(text))
