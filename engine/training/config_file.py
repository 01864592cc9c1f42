"""config.json, what a run was started with: complete, sealed by a hash, and of a version by which later ones know how to read it.

A missing key is an error: what it was taken for when the run began is nobody's guess. `MIGRATIONS` has for each version what
makes the next one of it; who adds, renames or removes a setting raises `VERSION` and writes down there what it was before.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.core.errors import BadInput

VERSION = 3
SEAL = "sha256"
Content = dict[str, Any]


def _of_none(content: Content) -> Content:
    """Versions that gave themselves no number: flags that came meanwhile, with what was done before there was a choice."""
    train = content["train"]
    if isinstance(train["compile"], bool):
        train["compile"] = "on" if train["compile"] else "off"
    before = {
        "recompute": "none", "residual": "fp32", "graphs": "off", "calibrate": "never", "deterministic": False,
        "changed_data": False, "track": [], "profile": 0,
    }  # fmt: skip
    return content | {"train": before | train}


def _of_one(content: Content) -> Content:
    """All methods started, interpolated positions, resized and warmed up alike, and none had these choices; a spike of the loss
    was left alone."""
    encoder = {"initialisation": "xavier", "interpolation": "antialiased"} | content["encoder"]
    before = {
        "relvit": {"mega_shared": False, "patch_colours": "pixels"},
        "mim_heads": {"local_pairs": "intended"}, "mim_refiner": {"local_pairs": "intended"},
        "dinov2": {"frozen_moments": False}, "swav": {"decay_all": False}, "simmim": {"decay_token": True},
    }  # fmt: skip
    stages = []
    for stage in content["stages"]:
        stage = {"resize": "bicubic", "warmup_form": "from-start"} | before.get(stage["method"], {}) | stage
        late = stage["schedule"] == "quarter-cosine"
        stages.append(stage | ({"schedule": "late-quarter-cosine"} if late else {}))
    return content | {"train": content["train"] | {"rewind": 0}, "encoder": encoder, "stages": stages}


def _of_two(content: Content) -> Content:
    """All steps of a stage saw images alike, cut to the model's shape, MAE decoded all masked patches, MIM-Refiner saw all
    patches, and colours were jittered in one linear map."""
    alike = {"phases": [0.0], "phase_sides": [1.0], "phase_keeps": [1.0], "phase_locals": [1.0]}
    alike |= {"phase_patches": [1.0], "patch_draws": [1.0], "side_draws": [1.0], "phase_depths": [1.0]}
    alike |= {"phase_clock": "images", "phase_batch": "same", "phase_choice": "given", "aspect": "crop"}
    before = {"mae": {"decode_share": 1.0}, "mim_heads": {"patch_keep": 1.0}, "mim_refiner": {"patch_keep": 1.0}}
    coloured = {"augmentation", "jitter"}  # which settings those stages have whose crops may be jittered
    stages = [
        alike | before.get(stage["method"], {}) | ({"colours": "linear"} if coloured & stage.keys() else {}) | stage
        for stage in content["stages"]
    ]
    return content | {"train": {"tokens": "none"} | content["train"], "stages": stages}


MIGRATIONS: tuple[Callable[[Content], Content], ...] = (_of_none, _of_one, _of_two)


def sealed(content: Content) -> str:
    """The file's text."""
    versioned = {"version": VERSION} | content
    return json.dumps(versioned | {SEAL: _hash(versioned)}, indent=1)


def opened(path: Path) -> Content:
    """What was sealed, as of this version.

    Raises:
        BadInput: the file cannot be read, was changed since, or is of a later version.
    """
    try:
        content = json.loads(path.read_text())
        version, seal = content.pop("version", 0), content.pop(SEAL, None)
        whole = seal == _hash({"version": version} | content) or not version
    except OSError as error:
        raise BadInput(
            f"--resume {path.parent} is not a run folder: {path.name} cannot be read; give the folder a run wrote."
        ) from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise BadInput(f"{path} is not a configuration this version wrote ({error}); start a new run.") from error
    if not whole:
        raise BadInput(
            f"{path} was changed since the run wrote it; bring it back, or start a new run with other settings."
        )
    if version not in range(VERSION + 1):
        raise BadInput(
            f"{path} is of version {version!r}, and this program knows up to {VERSION}; resume it by a newer one."
        )
    for migrate in MIGRATIONS[version:]:
        try:
            content = migrate(content)
        except (KeyError, TypeError) as error:
            raise BadInput(f"{path} is not a configuration this version wrote ({error}); start a new run.") from error
    return content


def complete(values: dict[str, Any], wanted: set[str], what: str, path: Path) -> dict[str, Any]:
    """The values, if they are all that are wanted and no others. Raises BadInput that names what is missing or unknown."""
    for fault, names in (("lacks", wanted - values.keys()), ("has an unknown", values.keys() - wanted)):
        if names:
            raise BadInput(f"{path} {fault} {min(names)} of {what}; resume the run by the version that wrote it.")
    return values


def _hash(content: Content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
