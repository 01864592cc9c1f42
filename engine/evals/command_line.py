"""The flags of `engine.eval`, and the command that repeats one of its figures."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from engine.core.errors import BadInput
from engine.core.flags import read, written
from engine.data.views import ASPECTS, RESIZES
from engine.evals import registry, report
from engine.evals.features import POOLS
from engine.evals.sets import KINDS
from engine.model.positions import INTERPOLATIONS

RAW = "raw"
RANDOM = "random:"
TIMM = "timm:"
WEIGHTS = "a run folder, an exported folder, a file with --model, timm:NAME, random:NAME or raw"


@dataclass(frozen=True)
class Eval:
    """Judge weights. Flags with a dot belong to the protocol that is named before the dot."""

    weights: tuple[str, ...] = ()
    """A run folder, an exported folder, a file (with --model), timm:NAME (published weights), random:NAME (as initialised by
    --seed), or raw for the pixels themselves. Several are put side by side, with the differences to the first."""
    compare: tuple[str, ...] = ()
    """Further weights: --weights A --compare B C is --weights A B C."""
    protocol: Annotated[
        tuple[str, ...], tyro.conf.arg(help=f"One or more of {', '.join((*registry.protocols(), registry.ALL))}.")
    ] = ("knn",)
    data: str = ""
    """For protocols that read classes: an image folder, train/CLASS/*.jpg and val/CLASS/*.jpg; or shards,
    train/*.tar and val/*.tar (docs/methods.md); or NAME:DIR, a published set as it lies in DIR, with NAME one of cifar10,
    cifar100, svhn, flowers102, tiny-imagenet, imagenet100, imagenet, or parquet, files as Hugging Face has them. Default: the
    embedded digits."""
    objects: str = ""
    """For protocols that read objects, masks or classes of pixels: NAME:DIR with NAME one of coco, voc, and for classes of
    pixels ade20k, coco-stuff too (DIR as published); voc-regions is voc with each class of pixels as one object, davis-frames
    the first frames of DAVIS-2017 (train and val) with their objects. Default: the embedded scenes."""
    video: str = ""
    """For protocols that read videos: davis:DIR, DAVIS-2017 at 480p as published (its val list is read). Default: the embedded
    clips."""
    out: str = ""
    """Folder for report.html, results.md, results.json and pictures; an earlier evaluation there is replaced. Default:
    runs/eval-NAME-TIME."""
    model: str = ""
    """A timm ViT name; needed for a file, which does not say what it holds."""
    pool: str = ""
    """token (CLS), avg (mean of patches), both (one beside the other) or before-norm (CLS before the final norm, as in MSN's
    low-shot evaluation); default: what the weights' export says."""
    image_size: tuple[int, ...] = ()
    """Height and width of the input, or one number for both; default: the model's, 32 for raw."""
    objects_size: tuple[int, ...] = ()
    """The same for whole images of sets with objects, where features are pooled or a model is fine-tuned; default: the model's,
    128 for the embedded scenes."""
    resize: str = "bicubic"
    """How images are resized whose features are extracted: bicubic, or bilinear as by MSN and VISSL."""
    squeeze: bool = False
    """Resize them to the input whatever their shape, as VISSL does, rather than cut out its centre."""
    aspect: str = "crop"
    """crop, or keep: whole images of their own shape, each on the grid nearest to it of at most the input's patches; for
    protocols that read pooled features."""
    interpolation: str = ""
    """How positions are interpolated for images of another size: antialiased (timm's way), offset (DINO's, iBOT's, DINOv2's) or
    bicubic (MAE's, MSN's, MIM-Refiner's); default: what the weights' export or the file's layout says, else antialiased."""
    map: str = "pca"
    """The 2-D map of test features: pca or tsne."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "auto"
    """fp32 or bf16 for encoding; auto is bf16 on GPUs and fp32 on CPUs."""
    batch_size: int = 256
    """Images encoded at a time."""
    threads: int = 0
    """Loader threads; 0 is what the machine has."""
    cache: bool = True
    """Keep extracted features in the user's cache, so that another protocol need not extract them again. Patch tokens, which
    attentive wants, take 2 bytes per number: 0.3 MB an image for a ViT-B/16."""
    bad_limit: float = 0.001
    """Largest share of unreadable images that is accepted; they are left out."""
    seed: int = 0
    """Draws splits, first weights and orders of whatever a protocol trains, and k-means starts."""
    seeds: int = 1
    """Runs of each protocol that draws, with seed, seed + 1, ...; figures are their mean and spread."""

    def check(self) -> None:
        """Raise BadInput for a value that cannot be meant."""
        choices = {
            "pool": ("", *POOLS),
            "resize": RESIZES,
            "aspect": ASPECTS,
            "interpolation": ("", *INTERPOLATIONS),
            "map": tuple(report.MAPS),
            "device": ("auto", "cpu", "cuda"),
            "precision": ("auto", "fp32", "bf16"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise BadInput(f"--{name} is {getattr(self, name)!r}; choose one of {', '.join(filter(None, valid))}.")
        for name, least in {"batch_size": 1, "threads": 0, "seed": 0, "seeds": 1}.items():
            if getattr(self, name) < least:
                raise BadInput(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {least} or more.")
        for name in ("image_size", "objects_size"):
            if len(getattr(self, name)) > 2 or any(side < 1 for side in getattr(self, name)):
                raise BadInput(f"--{name.replace('_', '-')} takes one positive number, or height and width.")
        if not self.judged:
            raise BadInput(f"--weights is missing; give {WEIGHTS}.")
        if self.compare and len(self.judged) < 2:
            raise BadInput(f"--compare has nothing to put {self.compare[0]} beside; give --weights, or more.")
        if self.squeeze and self.aspect == "keep":
            raise BadInput(
                "--squeeze gives all images one shape, and --aspect keep leaves them theirs; choose one of them."
            )
        if len(set(self.judged)) < len(self.judged):
            raise BadInput("--weights names the same weights twice.")
        if not 0 <= self.bad_limit <= 1:
            raise BadInput(f"--bad-limit is {self.bad_limit}; it must be a share from 0 to 1.")
        if self.judged == (RAW,) and (self.model or self.pool or self.interpolation):
            raise BadInput("--weights raw is the pixels themselves and takes no --model, --pool or --interpolation.")
        if self.model and all(source == RAW or source.startswith((RANDOM, TIMM)) for source in self.judged):
            raise BadInput(f"--model belongs to a file; {self.judged[0]} says itself what it holds.")

    @property
    def judged(self) -> tuple[str, ...]:
        """All weights, in the order given."""
        return (*self.weights, *self.compare)


def parse(arguments: Sequence[str]) -> tuple[Eval, dict]:
    """Command-line arguments -> (checked flags, settings by named protocol).

    Raises:
        BadInput: a flag does not exist, does not parse or is not valid.
        SystemExit: status 0 after --help.
    """
    protocols = [(name, registry.protocol(name).Settings) for name in registry.protocols()]
    flags = make_dataclass(
        "Flags",
        [(name, settings, field(default_factory=settings)) for name, settings in protocols],
        bases=(Eval,),
        frozen=True,
        kw_only=True,
    )
    parsed = read(flags, arguments, prog="engine.eval", description=Eval.__doc__)
    chosen = Eval(**{name: getattr(parsed, name) for name in Eval.__dataclass_fields__})
    chosen.check()
    given = {name: getattr(parsed, name) for name, _ in protocols}
    return chosen, registry.settings_for(chosen.protocol, given, chosen.seed)


def command(flags: Eval, source: str, protocol: str, settings: Any) -> str:
    """What repeats the result of one source of weights by one protocol: both, and every other flag that matters to it."""
    kinds = {flag: "" for flag in KINDS.values() if flag != KINDS[registry.reads(protocol)]}
    only = replace(
        flags,
        weights=(),
        compare=(),
        protocol=Eval.protocol,
        out="",
        map=Eval.map,
        model=flags.model if Path(source).expanduser().is_file() else "",
        pool="" if source == RAW else flags.pool,
        **kinds,
    )
    words = ["python", "-m", "engine.eval", "--weights", source, "--protocol", protocol]
    return shlex.join([*words, *written(only), *written(settings, f"{protocol.replace('_', '-')}.")])
