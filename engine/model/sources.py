"""Where weights come from: a file, an exported folder, a run folder or timm.

Nothing here unpickles objects: files are safetensors, or read by torch.load with weights_only.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from engine.core.errors import BadInput
from engine.core.json_text import parsed

Grid = tuple[int, int]
# Plain data that many published files hold: training arguments, and numbers of numpy's beside them.
_PLAIN = [
    argparse.Namespace,
    np.dtype,
    *((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(type(np.dtype(kind)) for kind in (np.bool_, np.int32, np.int64, np.float32, np.float64)),
]


@dataclass(frozen=True)
class Source:
    """What was read: `tree` is the file's content, `grid` the grid of its positions where that is known."""

    name: str
    tree: Mapping[str, object]
    grid: Grid | None = None


def read(source: str | Path) -> Source:
    """What lies at `source`, see `engine.model.weights.load`; BadInput where nothing does, or more than plain weights."""
    path, text = Path(source).expanduser(), str(source)
    folder = exported_folder(path)
    if folder is not None:
        return _read_export(folder)
    if path.is_dir():
        raise BadInput(f"{path} is neither an exported folder with model.safetensors nor a run folder that has export/")
    if path.is_file():
        return Source(str(path), _read_file(path))
    import timm  # here, as in `engine.model.vit`

    if text.startswith("timm:") or timm.is_model(text.partition(".")[0]):
        return _read_timm(text.removeprefix("timm:"))
    raise BadInput(f"no weights at {text!r}: give a file, an exported folder, a run folder or a timm model (timm:NAME)")


def exported_folder(path: Path) -> Path | None:
    """`path` if it is an exported folder, its export/ if it is a run folder, else None."""
    return next((folder for folder in (path, path / "export") if (folder / "model.safetensors").is_file()), None)


def _read_export(folder: Path) -> Source:
    tree, size = _read_file(folder / "model.safetensors"), config(folder)["pretrained_cfg"].get("input_size")
    kernel = tree.get("patch_embed.proj.weight")
    if size is None or kernel is None:
        return Source(str(folder), tree)
    if not (
        isinstance(size, list) and len(size) == 3 and all(isinstance(n, int) for n in size) and kernel.shape[-1:] > (0,)
    ):
        raise BadInput(f"{folder} has the input_size {str(size)[:60]} in config.json and patches {list(kernel.shape)}")
    return Source(str(folder), tree, (size[1] // kernel.shape[-1], size[2] // kernel.shape[-1]))


def config(folder: Path) -> dict:
    """The config.json of an exported folder, an object that has one as "pretrained_cfg"; BadInput where it cannot be read."""
    try:
        found = parsed((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} has no readable config.json beside its weights: {error}") from error
    of_timm = found.setdefault("pretrained_cfg", {}) if isinstance(found, dict) else None
    if not isinstance(of_timm, dict):
        raise BadInput(f"{folder} has something else than timm's description of a model in config.json")
    return found


def _read_file(path: Path) -> Mapping[str, object]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_PLAIN):
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or hostile file provokes
        raise BadInput(
            f"{path} holds no plain weights (safetensors, or tensors saved by torch): {_reason(error)}"
        ) from error
    if not isinstance(tree, Mapping):
        raise BadInput(f"{path} holds a {type(tree).__name__}, not a state dict")
    return tree


def _reason(error: Exception) -> str:
    """In a line. Of what torch refuses to unpickle it advises how to do so all the same, which nobody should."""
    said = str(error).strip()
    if held := re.search(r"(?:GLOBAL|Unsupported (?:global|class|type)\W*) ([\w.]+)", said):
        return f"it would run code of Python's, {held[1]}; save the state dict alone"
    if "weights_only" in said or "Weights only" in said:
        return "it would run code of Python's; save the state dict alone"
    return said.splitlines()[0] if said else type(error).__name__


def _read_timm(name: str) -> Source:
    import timm  # here, as in `engine.model.vit`

    if not timm.is_model(name.partition(".")[0]):
        raise BadInput(f"timm has no model {name!r} (engine.model.names() lists those that fit)")
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, OSError, ValueError) as error:
        raise BadInput(f"timm's weights of {name} cannot be had, give a file that holds them: {error}") from error
    return Source(f"timm:{name}", model.state_dict(), getattr(getattr(model, "patch_embed", None), "grid_size", None))
