"""`python -m engine.eval`: judge weights by the papers' protocols, print a table, leave a report."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

import kernels
from engine import dist, evals, vit, weights
from engine.data import cache
from engine.errors import BadInput
from engine.evals import Sets, report
from engine.evals.features import Encoder, encoder_of, raw_pixels
from engine.flags import read

RAW = "raw"
RANDOM = "random:"
WEIGHTS = "a run folder, an exported folder, a file with --model, timm:NAME, random:NAME or raw"
RAW_SIZE = (32, 32)


@dataclass(frozen=True)
class Eval:
    """Judge weights. Flags with a dot belong to the protocol that is named before the dot."""

    weights: tuple[str, ...] = ()
    """A run folder, an exported folder, a file (with --model), timm:NAME (published weights), random:NAME (as initialised by
    --seed), or raw for the pixels themselves. Several are put side by side, with the differences to the first."""
    compare: tuple[str, ...] = ()
    """Further weights: --weights A --compare B C is --weights A B C."""
    protocol: Annotated[
        tuple[str, ...], tyro.conf.arg(help=f"One or more of {', '.join((*evals.protocols(), evals.ALL))}.")
    ] = ("knn",)
    data: str = ""
    """For protocols that read classes: an image folder, train/CLASS/*.jpg and val/CLASS/*.jpg; or NAME:DIR, a published set as it
    lies in DIR, with NAME one of
    cifar10, cifar100, svhn, flowers102, tiny-imagenet, imagenet100. Default: the embedded digits."""
    objects: str = ""
    """For protocols that read objects, masks or classes of pixels: NAME:DIR with NAME one of coco, voc, and for classes of
    pixels ade20k, coco-stuff too (DIR as published). Default: the embedded scenes."""
    video: str = ""
    """For protocols that read videos: davis:DIR, DAVIS-2017 at 480p as published (its val list is read). Default: the embedded
    clips."""
    out: str = ""
    """Folder for results.json, results.md and pictures; an earlier evaluation there is replaced. Default: runs/eval-NAME-TIME."""
    model: str = ""
    """A timm ViT name; needed for a file, which does not say what it holds."""
    pool: str = ""
    """token (CLS) or avg (mean of patches); default: what the weights' export says."""
    image_size: tuple[int, ...] = ()
    """Height and width of the input, or one number for both; default: the model's, 32 for raw."""
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
            "pool": ("", "token", "avg"),
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
        if len(self.image_size) > 2 or any(side < 1 for side in self.image_size):
            raise BadInput("--image-size takes one positive number, or height and width.")
        if not self.judged:
            raise BadInput(f"--weights is missing; give {WEIGHTS}.")
        if len(set(self.judged)) < len(self.judged):
            raise BadInput("--weights names the same weights twice.")
        if not 0 <= self.bad_limit <= 1:
            raise BadInput(f"--bad-limit is {self.bad_limit}; it must be a share from 0 to 1.")
        if self.judged == (RAW,) and (self.model or self.pool):
            raise BadInput("--weights raw is the pixels themselves and takes neither --model nor --pool.")

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
    protocols = [(name, evals.protocol(name).Settings) for name in evals.protocols()]
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
    return chosen, evals.settings_for(chosen.protocol, given, chosen.seed)


def encoder(source: str, flags: Eval, device: torch.device) -> tuple[str, Encoder]:
    """The name and the encoder that a source of weights, --model, --pool and --image-size describe.

    Raises:
        BadInput: no such weights or model, or they do not fit each other.
    """
    size = (flags.image_size * 2)[:2]
    overrides = ({"global_pool": flags.pool} if flags.pool else {}) | ({"img_size": size} if size else {})
    if source == RAW:
        return "raw pixels", raw_pixels(size or RAW_SIZE)
    if source.startswith(RANDOM):
        name = source.removeprefix(RANDOM)
        model = vit.create(name, generator=torch.Generator().manual_seed(flags.seed), **overrides)
        return f"random {name}", encoder_of(model.to(device))
    path = Path(source).expanduser()
    if not path.exists() and not source.startswith("timm:"):
        raise BadInput(f"--weights {source} does not exist; give {WEIGHTS}.")
    if path.is_dir() and not any((folder / "model.safetensors").is_file() for folder in (path, path / "export")):
        raise BadInput(f"--weights {source} holds no exported model; give {WEIGHTS}.")
    if path.is_file() and not flags.model:
        raise BadInput(f"--weights {source} is a file and needs --model NAME, such as vit_large_patch16_224.")
    if flags.model and not any(Path(judged).expanduser().is_file() for judged in flags.judged):
        raise BadInput(f"--model belongs to a file; {source} says itself what it holds.")
    if path.is_file():
        model = vit.create(flags.model, **overrides)
        weights.load(model, path)
    else:
        model, _ = weights.create(source, **overrides)
    return path.stem if path.is_file() else path.resolve().name, encoder_of(model.to(device))


def encoders(flags: Eval, device: torch.device) -> dict[str, Encoder]:
    """All weights by name; those of one name are told apart by what stands before it."""
    found = [(source, *encoder(source, flags, device)) for source in flags.judged]
    names = [name for _, name, _ in found]
    return {name if names.count(name) == 1 else source: encoder for source, name, encoder in found}


def run(flags: Eval, settings: dict) -> list[evals.Result]:
    """Evaluate as the flags say, print the table, write the folder.

    Under torchrun all ranks extract features, and the first does the rest; the others return nothing.

    Raises:
        BadInput: data, weights, settings or the output folder cannot be used; nothing is written then.
    """
    ranks = dist.start(flags.device)
    device = ranks.device
    sets = Sets(flags.bad_limit, data=flags.data or None, objects=flags.objects or None, video=flags.video or None)
    for name, chosen in settings.items():
        evals.protocol(name).check(*sets.pair(evals.reads(name)), chosen)
    judged = encoders(flags, device)
    first = next(iter(judged)).replace(" ", "-").replace("/", "-")
    out = Path(flags.out or f"runs/eval-{first}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
    report.check_folder(out)
    precision = {"auto": "bf16" if device.type == "cuda" else "fp32"}.get(flags.precision, flags.precision)
    how = {
        "device": device,
        "precision": precision,
        "batch_size": flags.batch_size,
        "threads": flags.threads or None,
        "cache": cache.folder() / "features" if flags.cache else None,
    }
    if ranks.world > 1:
        evals.extract_together(judged, sets, settings, **how)
        dist.stop()
        if not ranks.first:
            return []
    features: dict = {}
    results = evals.evaluate(
        judged, sets, tuple(settings), settings=settings, seed=flags.seed, seeds=flags.seeds, features=features, **how
    )
    about = asdict(flags) | {
        "out": str(out),
        "sets": {kind: sets.name(kind) for kind in sets.opened},
        "device": str(device),
        "precision": precision,
        "kernels": kernels.describe(device).splitlines(),
        "unreadable images left out": _left_out(sets),
    }
    report.write(out, results, about, features, flags.map)
    console = Console()
    console.print(report.table(results, ", ".join(dict.fromkeys(sets.name(kind) for kind in sets.opened))))
    for result in results:
        for sweep in report.sweeps(result):
            console.print(sweep)
    for result in results:
        console.print(f"{result.protocol}: {report.sentence(result)}", style="dim", highlight=False)
    console.print(f"results and pictures: {out}", highlight=False)
    return results


def _left_out(sets: Sets) -> list[tuple[str, str]]:
    """(path, reason) of every image that could not be read."""
    images = [getattr(split, "images", split) for pair in sets.opened.values() for split in pair if split is not None]
    return sorted({tuple(bad) for split in images for bad in split.bad})


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, or 2 for input that cannot be used."""
    try:
        run(*parse(sys.argv[1:] if arguments is None else arguments))
        return 0
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
