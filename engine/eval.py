"""`python -m engine.eval`: judge frozen weights by the papers' protocols, print a table, leave a folder of results."""

import os
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
from engine.data.sources import open_images
from engine.errors import BadInput
from engine.evals import report
from engine.evals.features import Encoder, encoder_of, raw_pixels
from engine.flags import read

RAW = "raw"
WEIGHTS = "a run folder, an exported folder, a file with --model, timm:NAME or raw"
RAW_SIZE = (32, 32)


@dataclass(frozen=True)
class Eval:
    """Judge frozen weights. Flags with a dot belong to the protocol that is named before the dot."""

    weights: str = ""
    """A run folder, an exported folder, a file (with --model), timm:NAME, or raw for the pixels themselves."""
    protocol: Annotated[tuple[str, ...], tyro.conf.arg(help=f"One or more of {', '.join(evals.protocols())}.")] = (
        "knn",
    )
    data: str = ""
    """An image folder: train/CLASS/*.jpg and val/CLASS/*.jpg; or NAME:DIR, a published set as it lies in DIR, with NAME one of
    cifar10, cifar100, svhn, flowers102, tiny-imagenet, imagenet100. Default: the embedded digits."""
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
    """Draws low-shot splits, probe weights, probe order and k-means starts."""

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
        for name, least in {"batch_size": 1, "threads": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise BadInput(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {least} or more.")
        if len(self.image_size) > 2 or any(side < 1 for side in self.image_size):
            raise BadInput("--image-size takes one positive number, or height and width.")
        if not self.weights:
            raise BadInput(f"--weights is missing; give {WEIGHTS}.")
        if not 0 <= self.bad_limit <= 1:
            raise BadInput(f"--bad-limit is {self.bad_limit}; it must be a share from 0 to 1.")
        if self.weights == RAW and (self.model or self.pool):
            raise BadInput("--weights raw is the pixels themselves and takes neither --model nor --pool.")


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


def encoder(flags: Eval, device: torch.device) -> tuple[str, Encoder]:
    """The name and the encoder that --weights, --model, --pool and --image-size describe.

    Raises:
        BadInput: no such weights or model, or they do not fit each other.
    """
    size = (flags.image_size * 2)[:2]
    if flags.weights == RAW:
        return "raw pixels", raw_pixels(size or RAW_SIZE)
    path = Path(flags.weights).expanduser()
    if not path.exists() and not flags.weights.startswith("timm:"):
        raise BadInput(f"--weights {flags.weights} does not exist; give {WEIGHTS}.")
    if path.is_dir() and not any((folder / "model.safetensors").is_file() for folder in (path, path / "export")):
        raise BadInput(f"--weights {flags.weights} holds no exported model; give {WEIGHTS}.")
    if path.is_file() and not flags.model:
        raise BadInput(f"--weights {flags.weights} is a file and needs --model NAME, such as vit_large_patch16_224.")
    if flags.model and not path.is_file():
        raise BadInput(f"--model belongs to a file; {flags.weights} says itself what it holds.")
    overrides = ({"global_pool": flags.pool} if flags.pool else {}) | ({"img_size": size} if size else {})
    if path.is_file():
        model = vit.create(flags.model, **overrides)
        weights.load(model, path)
    else:
        model, _ = weights.create(flags.weights, **overrides)
    return path.stem if path.is_file() else path.resolve().name, encoder_of(model.to(device))


def run(flags: Eval, settings: dict) -> list[evals.Result]:
    """Evaluate as the flags say, print the table, write the folder.

    Raises:
        BadInput: data, weights, settings or the output folder cannot be used; nothing is written then.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise BadInput("engine.eval runs in a single process; start it without torchrun.")
    device = dist.start(flags.device).device
    images = [open_images(flags.data or None, split, flags.bad_limit) for split in ("train", "val")]
    for name, chosen in settings.items():
        evals.protocol(name).check(*images, chosen)
    name, judged = encoder(flags, device)
    out = Path(flags.out or f"runs/eval-{name.replace(' ', '-')}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
    report.check_folder(out)
    precision = {"auto": "bf16" if device.type == "cuda" else "fp32"}.get(flags.precision, flags.precision)
    features: dict = {}
    results = evals.evaluate(
        {name: judged},
        images,
        tuple(settings),
        settings=settings,
        seed=flags.seed,
        device=device,
        precision=precision,
        batch_size=flags.batch_size,
        threads=flags.threads or None,
        cache=cache.folder() / "features" if flags.cache else None,
        features=features,
    )
    about = asdict(flags) | {
        "out": str(out),
        "data": str(images[0].root),
        "device": str(device),
        "precision": precision,
        "kernels": kernels.describe(device).splitlines(),
        "unreadable images left out": [list(bad) for split in images for bad in split.bad],
    }
    report.write(out, results, about, features, flags.map)
    console = Console()
    counts = f"{len(images[0]):,} training and {len(images[1]):,} test images"
    console.print(report.table(results, f"{flags.data or 'digits'}: {counts}"))
    for result in results:
        for sweep in report.sweeps(result):
            console.print(sweep)
    for result in results:
        console.print(f"{result.protocol}: {report.sentence(result)}", style="dim", highlight=False)
    console.print(f"results and pictures: {out}", highlight=False)
    return results


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
