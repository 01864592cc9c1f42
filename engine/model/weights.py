"""Loads published weights into a VisionTransformer, and exports one as a folder that timm loads.

Nothing here unpickles objects: files are safetensors, or read by torch.load with weights_only.

Shapes: C channels, N patches, E prefix tokens that have a position of their own.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.models import save_for_hf
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from engine.core.durable import write_folder
from engine.core.errors import BadInput
from engine.model import vit

State = dict[str, Tensor]
Grid = tuple[int, int]

# Where published files nest their state dict; the first found is taken, which is the one their authors evaluate.
_CONTAINERS = (
    "teacher", "target_encoder", "state_dict_ema", "model_ema", "model", "state_dict", "student", "encoder", "module",
)  # fmt: skip

# What precedes the backbone's keys in files of whom; the first that leads to a patch projection is taken.
_PREFIXES = {
    "": "timm, MAE, MAE-CT, MIM-Refiner, BEiT; backbones of DINO, iBOT and DINOv2",
    "backbone.": "teachers of DINO and iBOT",
    "module.backbone.": "students of DINO and iBOT",
    "teacher.backbone.": "DINOv2 training",
    "module.base_encoder.": "MoCo v3",
    "module.momentum_encoder.": "MoCo v3, momentum encoder alone",
    "module.": "MSN, I-JEPA and others saved from DistributedDataParallel",
    "encoder.": "encoder and decoder in one file",
    "_orig_mod.": "compiled models",
}

# Other spellings of timm's keys: MIM-Refiner (2), DINOv2 (registers; blocks in chunks), BEiT and DeiT III (LayerScale).
_SPELLINGS = (
    (re.compile(r"^cls_tokens\.tokens$"), "cls_token"),
    (re.compile(r"^pos_embed\.embed$"), "pos_embed"),
    (re.compile(r"^register_tokens$"), "reg_token"),
    (re.compile(r"^blocks\.\d+\.(\d+)\."), r"blocks.\1."),
    (re.compile(r"\.gamma_(\d)$"), r".ls\1.gamma"),
)

# Keys of what was trained along with the backbone.
_OTHER_PARTS = re.compile(
    r"(decoder|head|lm_head|visual\.head)[._]"
    r"|(fc|pred|predictor|projector|prototypes|dino_head|ibot_head|last_layer|attn_pool|head_dist)\."
    r"|(instance_head|local_group_head|group_head|relation_blocks)"
    r"|(mask_token|masked_embed)$"
)

_EXPORTED = {"config.json", "model.safetensors"}
_TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class LoadReport:
    """What `load` did.

    source: the file or model read; layout: where in it the backbone was; loaded: number of tensors taken;
    set_aside: keys of other parts, such as decoders and heads; missing, unexpected: keys, only with strict=False;
    resampled: the grids of positions before and after, None if they agree; positions: why the model's own were left as they
    are, in words, or nothing; new_norm: the model has a norm after pooling, the source one before it.
    """

    source: str
    layout: str
    loaded: int
    set_aside: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    resampled: tuple[Grid, Grid] | None = None
    positions: str = ""
    new_norm: bool = False

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors from {self.source} ({self.layout})"]
        if self.resampled:
            parts.append("positions resampled from {}x{} to {}x{}".format(*self.resampled[0], *self.resampled[1]))
        if self.positions:
            parts.append(self.positions)
        if self.new_norm:
            parts.append("the norm after pooling starts anew")
        groups = {"set aside": self.set_aside, "missing": self.missing, "unexpected": self.unexpected}
        return ", ".join(parts + [_listing(label, keys) for label, keys in groups.items() if keys])


@dataclass(frozen=True)
class _Source:
    """What was read: `tree` is the file's content, `grid` the grid of its positions where that is known."""

    name: str
    tree: Mapping[str, object]
    grid: Grid | None = None


def load(model: vit.VisionTransformer, source: str | Path, *, strict: bool = True) -> LoadReport:
    """Loads published or exported weights into `model`, in place.

    `source` is a file (.safetensors or written by torch.save), an exported folder, a run folder (its export/), or a
    timm model, NAME or "timm:NAME" with or without a tag, whose pretrained weights timm fetches. Files may be in the
    layouts of timm, MAE, MAE-CT, MIM-Refiner, DINO, DINOv2, iBOT, MSN, MoCo v3 or BEiT: with absolute positions, or, for a model
    with relative ones, with one table of them for all blocks, as BEiT has it until it is fine-tuned.

    Positions of another grid are resampled (bicubic, antialiased, as timm does; relative ones as BEiT and timm do). Positions of
    class token and registers go where `model` keeps them: into the token itself, or beside zeros for those without. Of a source
    that was trained without positions (all are zero) the model keeps its own, and a model without takes none; a norm after
    pooling stays the model's own where the source has one before it, as when MAE fine-tunes. The report says so.

    With strict=False, missing and unexpected keys are tolerated and reported. Raises BadInput if the source is not
    found, cannot be fetched, holds more than plain weights, or does not fit; `model` is then as it was.
    """
    found = _read(source)
    state, layout, aside = _find_backbone(found)
    state, decoders_and_heads = _split_off_other_parts(_respell(state))
    _check_patch_size(state, model, found.name)
    state, resampled = _fit_relative_positions(state, model, found)
    state = _join_query_and_value_biases(state)
    positions = state.pop("pos_embed", None)  # kept from timm's filter, which does not know the file's grid
    try:
        state, heads = _split_off_other_parts(checkpoint_filter_fn(state, model))
    except RuntimeError as error:
        raise BadInput(f"{found.name} does not fit {model.architecture.name}: {error}") from error
    kept = ""
    if positions is not None:
        fitted, grids = _fit_positions(state | {"pos_embed": positions}, model, found)
        kept = _own_positions(positions, model)
        own = state | {"pos_embed": model.pos_embed.detach()}
        state, resampled = (own, None) if kept else (fitted, grids)
    state, norms = _exchange_norm(state, model)
    missing, unexpected = _compare(state, model, found.name, strict)
    model.load_state_dict(state, strict=False)
    loaded = len(state) - len(unexpected) - bool(kept) - len(norms)
    aside = (*aside, *decoders_and_heads, *heads, *norms)
    return LoadReport(found.name, layout, loaded, aside, missing, unexpected, resampled, kept, bool(norms))


def create(source: str | Path, **overrides: object) -> tuple[vit.VisionTransformer, LoadReport]:
    """Builds the model that `source` names and loads its weights.

    `source` is an exported folder, a run folder or a timm model, as for `load`; `overrides` as for `vit.create`.
    Raises BadInput as both do, and for a bare file, which does not say what it holds.
    """
    folder = _exported_folder(Path(source).expanduser())
    if folder is not None:
        config = _config(folder)
        if "tessera" in config:
            name, own = config["tessera"]["model"], config["tessera"]["overrides"]
        else:
            args = config.get("model_args", {})
            name, own = config["architecture"], {key: args[key] for key in vit.OVERRIDES if key in args}
    elif Path(source).expanduser().is_file():
        raise BadInput(
            f"{source} does not say which model it holds: name one of engine.model.names()() and load it there"
        )
    else:
        name, own = str(source).removeprefix("timm:"), {}
    model = vit.create(name, **own | overrides)
    return model, load(model, source)


def export(
    model: vit.VisionTransformer,
    folder: str | Path,
    extra: Mapping[str, object] | None = None,
    *,
    classifier: nn.Linear | None = None,
    classes: Sequence[str] = (),
) -> Path:
    """Writes `folder` so that timm.create_model("local-dir:FOLDER", pretrained=True) loads it.

    It holds model.safetensors and config.json; the features timm then computes are ours. With a `classifier` on the pooled
    features it is a whole classifier to timm, whose scores are ours, too; `classes` are then the names it knows them by.
    config.json asks for ImageNet normalisation and keeps `extra` (JSON) under "extra". The folder is written aside and renamed;
    an earlier export is replaced. Raises BadInput if `folder` holds anything but an export.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - _EXPORTED):
        raise BadInput(f"{folder} holds something else than an exported model: choose a new or empty folder")
    write_folder(folder, lambda aside: _save(model, aside, extra, classifier, classes))
    return folder


def _save(
    model: vit.VisionTransformer,
    folder: Path,
    extra: Mapping[str, object] | None,
    classifier: nn.Linear | None,
    classes: Sequence[str],
) -> None:
    architecture, twin = model.architecture, model.architecture.twin()
    state, described = dict(model.state_dict()), {}
    if classifier is not None:
        twin.reset_classifier(classifier.out_features)
        state |= {"head.weight": classifier.weight.detach(), "head.bias": classifier.bias.detach()}
        described = {"label_names": list(classes)} if classes else {}
    state = {key: value.cpu().contiguous() for key, value in architecture.timm_state(state).items()}
    twin.load_state_dict(state, assign=True)
    published = ("tag", "license", "origin_url", "paper_name", "paper_ids", "notes")  # of timm's weights, not of these
    twin.pretrained_cfg = {key: value for key, value in twin.pretrained_cfg.items() if key not in published}
    described |= {"tessera": {"model": architecture.name, "overrides": dict(architecture.overrides)}}
    preprocessing = {
        "input_size": (3, *architecture.img_size),
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
    }
    extra = {} if extra is None else {"extra": dict(extra)}
    save_for_hf(twin, folder, model_config=described | extra, safe_serialization=True, data_config=preprocessing)


def _read(source: str | Path) -> _Source:
    path, text = Path(source).expanduser(), str(source)
    folder = _exported_folder(path)
    if folder is not None:
        return _read_export(folder)
    if path.is_dir():
        raise BadInput(f"{path} is neither an exported folder with model.safetensors nor a run folder that has export/")
    if path.is_file():
        return _Source(str(path), _read_file(path))
    if text.startswith("timm:") or timm.is_model(text.partition(".")[0]):
        return _read_timm(text.removeprefix("timm:"))
    raise BadInput(f"no weights at {text!r}: give a file, an exported folder, a run folder or a timm model (timm:NAME)")


def _exported_folder(path: Path) -> Path | None:
    return next((folder for folder in (path, path / "export") if (folder / "model.safetensors").is_file()), None)


def _read_export(folder: Path) -> _Source:
    tree, size = _read_file(folder / "model.safetensors"), _config(folder).get("pretrained_cfg", {}).get("input_size")
    kernel = tree.get("patch_embed.proj.weight")
    grid = None if size is None or kernel is None else (size[1] // kernel.shape[-1], size[2] // kernel.shape[-1])
    return _Source(str(folder), tree, grid)


def _config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} has no readable config.json beside its weights: {error}") from error


def _read_file(path: Path) -> Mapping[str, object]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Many published files hold the training arguments as a Namespace, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or hostile file provokes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"{path} holds no plain weights (safetensors, or tensors saved by torch): {reason}") from error
    if not isinstance(tree, Mapping):
        raise BadInput(f"{path} holds a {type(tree).__name__}, not a state dict")
    return tree


def _read_timm(name: str) -> _Source:
    if not timm.is_model(name.partition(".")[0]):
        raise BadInput(f"timm has no model {name!r} (engine.model.names()() lists those that fit)")
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, OSError, ValueError) as error:
        raise BadInput(f"timm's weights of {name} cannot be had, give a file that holds them: {error}") from error
    return _Source(f"timm:{name}", model.state_dict(), getattr(getattr(model, "patch_embed", None), "grid_size", None))


def _find_backbone(found: _Source) -> tuple[State, str, tuple[str, ...]]:
    """The backbone's tensors without container and prefix, where they were, and the keys that lie beside them."""
    tree, place = found.tree, []
    while inner := next((key for key in _CONTAINERS if isinstance(tree.get(key), Mapping)), None):
        tree, place = tree[inner], [*place, inner]
    tensors = {key: value for key, value in tree.items() if isinstance(value, Tensor)}
    if not tensors:
        raise BadInput(f"{found.name} holds no state dict: {_listing('keys', [str(key) for key in tree])}")
    prefix = next((prefix for prefix in _PREFIXES if f"{prefix}patch_embed.proj.weight" in tensors), "")
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    beside = tuple(key for key in tensors if not key.startswith(prefix))
    layout = "/".join([*place, prefix + "*"])
    return state, layout, beside


def _respell(state: State) -> State:
    respelt = {}
    for key, value in state.items():
        for pattern, spelling in _SPELLINGS:
            key = pattern.sub(spelling, key)
        respelt[key] = value
    return respelt


def _split_off_other_parts(state: State) -> tuple[State, tuple[str, ...]]:
    others = tuple(key for key in state if _OTHER_PARTS.match(key))
    return {key: value for key, value in state.items() if key not in others}, others


def _fit_relative_positions(
    state: State, model: vit.VisionTransformer, found: _Source
) -> tuple[State, tuple[Grid, Grid] | None]:
    """`state` with the table of relative positions that the model wants, if it wants one, and the grids before and after if they
    differ; BadInput where the file's positions are of another kind."""
    relative = [key for key in state if "relative_position" in key or "rel_pos" in key]
    of_blocks = any(key.startswith("blocks.") for key in relative)
    if of_blocks:
        raise BadInput(
            f"{found.name} has relative position biases for each block, as fine-tuned BEiT has them, and this backbone one table "
            f"for all: {_listing('keys', relative)}"
        )
    if relative and model.rel_pos_bias is None:
        raise BadInput(
            f'{found.name} has relative position biases, this model absolute positions: build it with positions="relative" '
            f"({_listing('keys', relative)})"
        )
    if model.rel_pos_bias is None:
        return state, None
    absolute = state.get("pos_embed")
    if absolute is not None and absolute.any():
        raise BadInput(
            f"{found.name} has absolute positions, this model relative ones: build it with positions learned or sincos"
        )
    state = {
        key: value for key, value in state.items() if key not in ("pos_embed", "rel_pos_bias.relative_position_index")
    }
    key, wanted = f"rel_pos_bias.{_TABLE}", model.rel_pos_bias.relative_position_bias_table
    table = state.get(key)
    if table is None or (table.shape == wanted.shape and found.grid in (None, model.grid)):
        return state, None
    side = isqrt(max(0, len(table) - 3))
    grid = found.grid or ((side + 1) // 2,) * 2
    if table.ndim != 2 or len(table) != (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3:
        raise BadInput(f"{found.name} has a table of relative positions of {_shape(table)}, that of no square grid")
    state[key] = resize_rel_pos_bias_table(table, model.grid, tuple(wanted.shape), grid)
    return state, (grid, model.grid)


def _check_patch_size(state: State, model: vit.VisionTransformer, name: str) -> None:
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4 and kernel.shape[-1] != model.patch_size:
        raise BadInput(f"{name} has patches of {kernel.shape[-1]} pixels, not {model.patch_size}: set patch_size")


def _join_query_and_value_biases(state: State) -> State:
    """BEiT keeps no bias for keys: a zero one is the same."""
    for key in [key for key in state if key.endswith(".attn.q_bias")]:
        query, value = state.pop(key), state.pop(key.replace("q_bias", "v_bias"))
        state[key.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])
    return state


def _own_positions(positions: Tensor, model: vit.VisionTransformer) -> str:
    """Why `model` keeps the positions that it has, in words; nothing where it takes those of the source."""
    kind = model.architecture.positions
    if kind == "none" and positions.any():
        return "the source's positions left out, since the model has none"
    if kind in ("learned", "sincos") and not positions.any():
        return f"the model's own {kind} positions kept, since the source was trained without any"
    return ""


def _fit_positions(
    state: State, model: vit.VisionTransformer, found: _Source
) -> tuple[State, tuple[Grid, Grid] | None]:
    """`state` with positions for the model's grid and prefix tokens, and the grids before and after if they differ."""
    positions, grid = state["pos_embed"], found.grid
    if positions.ndim == 4:
        grid, positions = tuple(positions.shape[1:3]), positions.flatten(1, 2)
    if positions.ndim != 3:
        raise BadInput(f"{found.name} has positions of shape {list(positions.shape)}, not [1, tokens, channels]")
    cls, registers = (state[key].shape[1] if key in state else 0 for key in ("cls_token", "reg_token"))
    prefix, grid = _read_positions(positions.shape[1], (cls + registers, cls, 0), grid, model, found.name)
    prefix_1EC, patches_1NC = positions[:, :prefix], positions[:, prefix:]
    resampled = None if grid == model.grid else (grid, model.grid)
    if resampled:
        patches_1NC = resample_abs_pos_embed(patches_1NC, list(model.grid), list(grid), num_prefix_tokens=0)
    state = dict(state)
    if model.no_embed_class:
        if prefix:
            state["cls_token"] = state["cls_token"] + prefix_1EC[:, :cls]
        if prefix > cls:
            state["reg_token"] = state["reg_token"] + prefix_1EC[:, cls:]
        state["pos_embed"] = patches_1NC
    else:
        without = patches_1NC.new_zeros(1, max(0, model.num_prefix_tokens - prefix), patches_1NC.shape[2])
        state["pos_embed"] = torch.cat([prefix_1EC[:, : model.num_prefix_tokens], without, patches_1NC], dim=1)
    return state, resampled


def _read_positions(
    rows: int, prefixes: tuple[int, ...], grid: Grid | None, model: vit.VisionTransformer, name: str
) -> tuple[int, Grid]:
    """How many of `rows` positions belong to prefix tokens, and which grid the others form."""
    own = 0 if model.no_embed_class else model.num_prefix_tokens
    if grid is None and own in prefixes and rows - own == model.grid[0] * model.grid[1]:
        return own, model.grid
    squares = [(prefix, (isqrt(max(0, rows - prefix)),) * 2) for prefix in prefixes]
    for prefix, (height, width) in [(prefix, grid) for prefix in prefixes if grid] + squares:
        if rows > prefix and height * width == rows - prefix:
            return prefix, (height, width)
    raise BadInput(f"{name} has {rows} positions, no square grid with or without its {prefixes[0]} prefix tokens")


def _exchange_norm(state: State, model: vit.VisionTransformer) -> tuple[State, tuple[str, ...]]:
    """`state` with the model's norm after pooling for the source's before it, and the keys that this takes the place of."""
    own = {key: value.detach() for key, value in model.state_dict().items() if key.startswith("fc_norm.")}
    norms = tuple(key for key in state if key.startswith("norm."))
    if not own or not norms or own.keys() & state.keys():
        return state, ()
    return {key: value for key, value in state.items() if key not in norms} | own, norms


def _compare(state: State, model: vit.VisionTransformer, name: str, strict: bool) -> tuple[tuple[str, ...], ...]:
    """Missing and unexpected keys; BadInput where they or the shapes forbid loading."""
    wanted = model.state_dict()
    missing = tuple(key for key in wanted if key not in state)
    unexpected = tuple(key for key in state if key not in wanted)
    differing = [
        f"{key} is {_shape(state[key])}, not {_shape(wanted[key])}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    if differing or len(missing) == len(wanted) or (strict and (missing or unexpected)):
        groups = {"of another shape": differing, "missing": missing, "unexpected": unexpected}
        faults = "; ".join(_listing(label, keys) for label, keys in groups.items() if keys)
        raise BadInput(f"{name} does not fit {model.architecture.name}, choose the model it was trained as: {faults}")
    return missing, unexpected


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _listing(label: str, keys: Iterable[str], most: int = 3) -> str:
    keys = list(keys)
    return f"{len(keys)} {label} ({', '.join(keys[:most])}{', ...' if len(keys) > most else ''})"
