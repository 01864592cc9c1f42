"""`python -m engine.export RUN --to KIND TARGET`: give weights to other software: a folder for timm, an ONNX file, the Hugging
Face Hub."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import timm
import tyro
from safetensors import safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from tyro.conf import Positional

from engine.core.durable import write_folder
from engine.core.errors import BadInput
from engine.core.flags import read
from engine.model import hub, onnx, vit, weights
from engine.training import card

TIMM = "timm:"
WEIGHTS = "a run folder, an exported folder, a file with --model, or timm:NAME"
TARGETS = "timm FOLDER, onnx FILE or hub NAME"
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct")


@dataclass(frozen=True)
class Export:
    """Give weights to other software: a folder that timm loads, an ONNX file, or a repository of the Hugging Face Hub."""

    weights: Positional[str] = ""
    """A run folder, an exported folder, a file (with --model) or timm:NAME (published weights)."""
    to: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KIND TARGET")] = ()
    """timm FOLDER, for timm.create_model("local-dir:FOLDER", pretrained=True); onnx FILE, images [B, 3, H, W] to features [B, C]
    and tokens [B, L, C], kept only if onnxruntime finds what torch does; or hub NAME (ORGANISATION/NAME), for
    timm.create_model("hf-hub:NAME", pretrained=True), with a model card unless there is one. A run's classifier is kept; it gives
    scores. Files and folders that are there already are not replaced."""
    model: str = ""
    """A timm ViT name; needed for a file, which does not say what it holds."""
    pool: str = ""
    """What features are: token (CLS) or avg (mean of patches); default: what the weights' export says."""
    image_size: tuple[int, ...] = ()
    """Height and width of the input, or one number for both; positions are resampled to it; default: the model's."""
    private: bool = False
    """Make the Hub's repository a private one."""
    license: str = ""
    """The licence that the model card names, as the Hub spells it (apache-2.0, cc-by-nc-4.0, ...); default: unknown, for you to
    fill in."""

    def check(self) -> None:
        """Raise BadInput for a value that cannot be meant."""
        if not self.weights:
            raise BadInput(f"the weights are missing; give {WEIGHTS}, then --to {TARGETS}.")
        if len(self.to) != 2 or not all(self.to):
            given = f", not {' '.join(self.to)!r}" if self.to else ""
            raise BadInput(f"--to takes two words after the weights, {TARGETS}{given}.")
        if self.to[0] not in KINDS:
            raise BadInput(f"--to {self.to[0]} is unknown; choose {TARGETS}.")
        if self.pool not in ("", "token", "avg"):
            raise BadInput(f"--pool is {self.pool!r}; choose one of token, avg.")
        if len(self.image_size) > 2 or any(side < 1 for side in self.image_size):
            raise BadInput("--image-size takes one positive number, or height and width.")
        if self.to[0] != "hub" and (self.private or self.license):
            raise BadInput(f"--{'private' if self.private else 'license'} belongs to --to hub.")
        path = Path(self.weights).expanduser()
        if not path.exists() and not self.weights.startswith(TIMM):
            raise BadInput(f"{self.weights} does not exist; give {WEIGHTS}.")
        if path.is_dir() and _export_in(path) is None:
            raise BadInput(f"{self.weights} holds no exported model; give {WEIGHTS}.")
        if path.is_file() and not self.model:
            raise BadInput(f"{self.weights} is a file and needs --model NAME, such as vit_large_patch16_224.")
        if self.model and not path.is_file():
            raise BadInput(f"--model belongs to a file; {self.weights} says itself what it holds.")


@dataclass(frozen=True)
class Source:
    """What is exported.

    name: of the weights, without where they lie; model: with them; report: of loading them; preprocessing: what images should
    become, in timm's words; classifier, classes: of a source that has them; extra: what an exported folder keeps of its maker;
    run: the folder of the run that these are the weights of.
    """

    name: str
    model: vit.VisionTransformer
    report: weights.LoadReport
    preprocessing: dict[str, object]
    classifier: nn.Linear | None = None
    classes: tuple[str, ...] = ()
    extra: dict[str, object] | None = None
    run: Path | None = None

    def __str__(self) -> str:
        scores = "" if self.classifier is None else f" with a classifier of {self.classifier.out_features} classes"
        return f"{self.model.architecture.name} of {self.name}{scores}"


def open_source(flags: Export) -> Source:
    """The weights that the flags name, in their model.

    Raises:
        BadInput: they cannot be had, or do not fit --model, --pool or --image-size.
    """
    size = (flags.image_size * 2)[:2]
    overrides = ({"global_pool": flags.pool} if flags.pool else {}) | ({"img_size": size} if size else {})
    path = Path(flags.weights).expanduser()
    imagenet = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    if path.is_file():
        model, report = weights.create(path, flags.model, **overrides)
        return Source(path.name, model, report, imagenet)
    model, report = weights.create(flags.weights, **overrides)
    if not path.is_dir():
        published = timm.get_pretrained_cfg(flags.weights.removeprefix(TIMM)).to_dict()
        return Source(flags.weights, model, report, imagenet | _preprocessing(published))
    folder = _export_in(path)
    config = json.loads((folder / "config.json").read_text())
    source = Source(
        path.resolve().name, model, report, imagenet | _preprocessing(config.get("pretrained_cfg", {})),
        extra=config.get("extra"), run=path if card.is_run(path) else None,
    )  # fmt: skip
    return _with_classifier(source, folder, config, flags.pool)


def _export_in(path: Path) -> Path | None:
    """The exported folder that `path` is or, as a run's, has."""
    return next((folder for folder in (path, path / "export") if (folder / "model.safetensors").is_file()), None)


def _preprocessing(config: dict) -> dict[str, object]:
    return {key: config[key] for key in PREPROCESSING if config.get(key) is not None}


def _with_classifier(source: Source, folder: Path, config: dict, pool: str) -> Source:
    """The source with the classifier that lies beside its encoder, if one does."""
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        if not {"head.weight", "head.bias"} <= set(tensors.keys()):
            return source
        weight_KC, bias_K = tensors.get_tensor("head.weight"), tensors.get_tensor("head.bias")
    trained = config.get("global_pool")
    if pool and pool != trained:
        raise BadInput(f"--pool {pool} does not go with its classifier, trained on {trained}; leave it out.")
    classifier = nn.Linear(weight_KC.shape[1], weight_KC.shape[0])
    classifier.load_state_dict({"weight": weight_KC, "bias": bias_K})
    aside = tuple(key for key in source.report.set_aside if key not in ("head.weight", "head.bias"))
    names = config.get("label_names", ())
    names = tuple(names) if isinstance(names, list) else ()  # timm knows a dictionary as well, with gaps
    return replace(source, classifier=classifier, classes=names, report=replace(source.report, set_aside=aside))


def to_timm(flags: Export) -> list[str]:
    """Write the folder that --to names; what to say of it."""
    folder = Path(flags.to[1]).expanduser()
    _check_place(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"--to timm {folder} is there already; choose a new or empty folder.")
    source = open_source(flags)
    _write_timm(source, folder)
    return [
        f"read {source.report}",
        f"{folder}, {_size(*folder.iterdir())}: {source}",
        f'load it by timm.create_model("local-dir:{folder}", pretrained=True)',
    ]


def to_onnx(flags: Export) -> list[str]:
    """Write the file that --to names, if it computes what torch does; what to say of it."""
    path = Path(flags.to[1]).expanduser()
    _check_place(path)
    onnx.check(path)
    source = open_source(flags)
    mean, std = (" ".join(f"{value:g}" for value in source.preprocessing[key]) for key in ("mean", "std"))
    about = {"model": source.model.architecture.name, "weights": source.name, "mean": mean, "std": std}
    about |= {"classes": json.dumps(source.classes)} if source.classes else {}
    written = onnx.write(source.model, path, classifier=source.classifier, about=about)
    shapes = ", ".join(f"{name} {['B', *output.shape]}".replace("'", "") for name, output in written.outputs.items())
    differences = ", ".join(
        f"{output.difference:.1e} in {name} (largest value {output.largest:.3g})"
        for name, output in written.outputs.items()
    )
    height, width = source.model.img_size
    return [
        f"read {source.report}",
        f"{' and '.join(map(str, written.files))}, {_size(*written.files)}: {source}",
        f"images [B, 3, {height}, {width}], normalised by mean {mean} and std {std}, to {shapes}",
        f"largest differences between onnxruntime and torch: {differences}; up to {onnx.TOLERANCE:g} of the largest is accepted",
        f'load it by onnxruntime.InferenceSession("{path}").run(None, {{"images": images}})',
    ]


def to_hub(flags: Export) -> list[str]:
    """Push to the repository that --to names; what to say of it."""
    name = hub.check(flags.to[1], flags.private)
    source = open_source(flags)
    with TemporaryDirectory() as aside:
        folder = _write_timm(source, Path(aside) / "export")
        size = _size(*folder.iterdir())
        address = hub.push(folder, name, private=flags.private, card=model_card(source, name, flags.license))
    return [
        f"read {source.report}",
        f"{address}, {size}: {source}",
        f'load it by timm.create_model("hf-hub:{name}", pretrained=True)',
        *([] if flags.license else ["its card says that the licence is unknown: choose one on its page"]),
    ]


KINDS: dict[str, Callable[[Export], list[str]]] = {"timm": to_timm, "onnx": to_onnx, "hub": to_hub}


def model_card(source: Source, name: str, license: str = "") -> dict[str, object]:
    """What timm makes the model card of the repository `name` from."""
    architecture = source.model.architecture
    about = card.describe(source.run) if source.run else {"Weights": source.name}
    height, width = architecture.img_size
    details = {
        "Model": f"{architecture.name}, depth {architecture.depth}, width {architecture.embed_dim}",
        "Input": f"{width}x{height} pixels in patches of {architecture.patch_size}",
        "Features": "class token" if architecture.global_pool == "token" else "mean of patch tokens",
        **({} if source.classifier is None else {"Classifier": f"{source.classifier.out_features} classes"}),
        **about,
    }
    how = f"trained with the method {about['Method']}" if source.run else f"with the weights of {source.name}"
    output = "features" if source.classifier is None else "scores"
    return {
        "tags": ["timm"],
        "license": license or "unknown",
        "description": f"A vision transformer, {how}, exported by Tessera.",
        "details": details,
        "usage": (
            "```python\nimport timm\nimport torch\n\n"
            f'model = timm.create_model("hf-hub:{name}", pretrained=True).eval()\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)\n"
            f"with torch.no_grad():\n    {output} = model(transform(image)[None])  # image: PIL, RGB\n```"
        ),
    }


def _write_timm(source: Source, folder: Path) -> Path:
    """The export, asking for the preprocessing that its source asks for."""

    def fill(aside: Path) -> None:
        weights.export(source.model, aside, source.extra, classifier=source.classifier, classes=source.classes)
        config = json.loads((aside / "config.json").read_text())
        config["pretrained_cfg"] |= source.preprocessing
        (aside / "config.json").write_text(json.dumps(config, indent=2))
        (aside / "model.safetensors").chmod(0o644)  # for others than its owner, too

    write_folder(folder, fill)
    return folder


def _check_place(path: Path) -> None:
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise BadInput(f"{path} cannot be written, since {parent} is a file; choose another place.")


def _size(*files: Path) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, or 2 for input that cannot be used."""
    try:
        words = sys.argv[1:] if arguments is None else arguments
        flags = read(Export, words, prog="engine.export", description=Export.__doc__)
        flags.check()
        for line in KINDS[flags.to[0]](flags):
            print(line)
        return 0
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
