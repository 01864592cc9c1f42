"""Loads published weights into a VisionTransformer, creates the model that a source names, and exports one as a folder that timm
loads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from engine.core.durable import write_folder
from engine.core.errors import BadInput
from engine.model import fitting, layouts, sources, vit
from engine.model.architecture import OVERRIDES
from engine.model.sources import Grid, Source

_EXPORTED = {"config.json", "model.safetensors"}


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
        return ", ".join(parts + [layouts.listing(label, keys) for label, keys in groups.items() if keys])


def load(model: vit.VisionTransformer, source: str | Path, *, strict: bool = True) -> LoadReport:
    """Loads published or exported weights into `model`, in place.

    `source` is a file (.safetensors or written by torch.save), an exported folder, a run folder (its export/), or a
    timm model, NAME or "timm:NAME" with or without a tag, whose pretrained weights timm fetches. Files may be in the
    layouts of timm, MAE, MAE-CT, MIM-Refiner, DINO, DINOv2, iBOT, MSN, MoCo v3 or BEiT: with absolute positions, or, for a model
    with relative ones, with one table of them for all blocks, as BEiT has it until it is fine-tuned.

    Positions of another grid are resampled as the model does it with images of another size (its `interpolation`), relative ones
    as BEiT's code does. Positions of class token and registers go where `model` keeps them: into the token itself, or beside
    zeros for those without. Of a source that was trained without positions (all are zero) the model keeps its own, and a model
    without takes none; a norm after pooling stays the model's own where the source has one before it, as when MAE fine-tunes.
    The report says so.

    With strict=False, missing and unexpected keys are tolerated and reported. Raises BadInput if the source is not
    found, cannot be fetched, holds more than plain weights, or does not fit; `model` is then as it was.
    """
    found = sources.read(source)
    return _load(model, found, layouts.find_backbone(found), strict)


def _load(model: vit.VisionTransformer, found: Source, backbone: layouts.Backbone, strict: bool = True) -> LoadReport:
    from timm.models.vision_transformer import checkpoint_filter_fn  # here, as in `engine.model.vit`

    state, layout, aside = backbone
    fitting.check_heads(found, layout, model)
    state, decoders_and_heads = layouts.split_off_other_parts(layouts.respell(state))
    fitting.check_patch_size(state, model, found.name)
    state, resampled = fitting.fit_relative_positions(state, model, found)
    state = layouts.join_query_and_value_biases(state)
    positions = state.pop("pos_embed", None)  # kept from timm's filter, which does not know the file's grid
    try:
        state, heads = layouts.split_off_other_parts(checkpoint_filter_fn(state, model))
    except RuntimeError as error:
        raise BadInput(f"{found.name} does not fit {model.architecture.name}: {error}") from error
    kept = ""
    if positions is not None:
        fitted, grids = fitting.fit_positions(state | {"pos_embed": positions}, model, found)
        kept = fitting.own_positions(positions, model)
        own = state | {"pos_embed": model.pos_embed.detach()}
        state, resampled = (own, None) if kept else (fitted, grids)
    state, norms = fitting.exchange_norm(state, model)
    missing, unexpected = fitting.compare(state, model, found.name, strict)
    model.load_state_dict(state, strict=False)
    loaded = len(state) - len(unexpected) - bool(kept) - len(norms)
    aside = (*aside, *decoders_and_heads, *heads, *norms)
    return LoadReport(found.name, layout, loaded, aside, missing, unexpected, resampled, kept, bool(norms))


def create(source: str | Path, name: str = "", **overrides: object) -> tuple[vit.VisionTransformer, LoadReport]:
    """Builds the model that `source` names and loads its weights.

    `source` is as for `load`. A bare file does not say which model it holds: it is one called `name`, with what its tensors
    and layout tell besides: LayerScale, registers, relative positions, a norm after pooling, and how its authors interpolate
    positions. `overrides` are as for `vit.create`, and go before all that. Raises BadInput as both do, and for a file without a
    name.
    """
    path = Path(source).expanduser()
    folder = sources.exported_folder(path)
    if folder is None and path.is_file():
        if not name:
            raise BadInput(f"{source} does not say which model it holds: name one of engine.model.names()")
        vit.without_memory(name, **overrides)  # raises what is wrong before a large file is read
        found = sources.read(path)
        backbone = layouts.find_backbone(found)
        state, layout, _ = backbone
        model = vit.create(name, **layouts.traits(found, state, layout) | overrides)
        return model, _load(model, found, backbone)
    if folder is not None:
        name, own = _named(sources.config(folder), folder)
    else:
        name, own = str(source).removeprefix("timm:"), {}
    model = vit.create(name, **own | overrides)
    return model, load(model, source)


def _named(config: dict, folder: Path) -> tuple[str, dict[str, object]]:
    """The model of an export, and with what it is made. Raises BadInput where its config.json doesn't say so."""
    try:
        if "tessera" in config:
            name, own = config["tessera"]["model"], config["tessera"]["overrides"]
        else:
            args = config.get("model_args", {})
            name, own = config["architecture"], {key: args[key] for key in OVERRIDES if key in args}
    except (KeyError, TypeError, IndexError):
        name, own = None, None
    if not isinstance(name, str) or not isinstance(own, dict):
        raise BadInput(f"{folder} names no model in config.json")
    return name, own


def export(
    model: vit.VisionTransformer,
    folder: str | Path,
    extra: Mapping[str, object] | None = None,
    *,
    classifier: nn.Linear | None = None,
    classes: Sequence[str] = (),
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes `folder` so that timm.create_model("local-dir:FOLDER", pretrained=True) loads it.

    It holds model.safetensors and config.json; the features timm then computes are ours. With a `classifier` on the pooled
    features it is a whole classifier to timm, whose scores are ours, too; `classes` are then the names it knows them by.
    config.json asks for ImageNet normalisation and keeps `extra` (JSON) under "extra". `state` is written in place of the tensors
    that the model and the classifier have now; it has the names of `state_of`. The folder is written aside and renamed; an
    earlier export is replaced. Raises BadInput if `folder` holds anything but an export.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or _foreign(folder)):
        raise BadInput(f"{folder} holds something else than an exported model: choose a new or empty folder")
    state = state_of(model, classifier) if state is None else state
    write_folder(folder, lambda aside: _save(model, state, aside, extra, classifier, classes))
    return folder


def state_of(model: vit.VisionTransformer, classifier: nn.Linear | None) -> dict[str, Tensor]:
    """The tensors that an export holds, by name; those of a classifier with "classifier." before it."""
    head = {} if classifier is None else {"classifier.weight": classifier.weight, "classifier.bias": classifier.bias}
    return dict(model.state_dict()) | {name: value.detach() for name, value in head.items()}


def _foreign(folder: Path) -> set[str]:
    """Names in it that no export has; hidden ones don't count, which file managers and mounts leave anywhere."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} - _EXPORTED


def _save(
    model: vit.VisionTransformer,
    state: Mapping[str, Tensor],
    folder: Path,
    extra: Mapping[str, object] | None,
    classifier: nn.Linear | None,
    classes: Sequence[str],
) -> None:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # here, as in `engine.model.vit`
    from timm.models import save_for_hf

    from engine.model import twins

    architecture, twin = model.architecture, twins.twin_of(model.architecture)
    described = {}
    if classifier is not None:
        twin.reset_classifier(classifier.out_features)
        state = {name.replace("classifier.", "head."): value for name, value in state.items()}
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
