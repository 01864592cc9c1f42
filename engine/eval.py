"""`python -m engine.eval`: judge weights by the papers' protocols, print a table, leave a report."""

import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

import kernels
from engine import dist, evals, vit, weights
from engine.data import cache
from engine.errors import BadInput
from engine.evals import Course, Sets, report
from engine.evals.features import BOTH, Encoder, encoder_of, raw_pixels
from engine.flags import read, written

RAW = "raw"
RANDOM = "random:"
TIMM = "timm:"
WEIGHTS = "a run folder, an exported folder, a file with --model, timm:NAME, random:NAME or raw"
RAW_SIZE = (32, 32)
FEW = 4  # results whose tables fit on a screen
SCENES_SIZE = (128, 128)


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
    """token (CLS), avg (mean of patches) or both (one beside the other); default: what the weights' export says."""
    image_size: tuple[int, ...] = ()
    """Height and width of the input, or one number for both; default: the model's, 32 for raw."""
    objects_size: tuple[int, ...] = ()
    """The same for whole images of sets with objects, where features are pooled or a model is fine-tuned; default: the model's,
    128 for the embedded scenes."""
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
            "pool": ("", "token", "avg", BOTH),
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
        if len(set(self.judged)) < len(self.judged):
            raise BadInput("--weights names the same weights twice.")
        if not 0 <= self.bad_limit <= 1:
            raise BadInput(f"--bad-limit is {self.bad_limit}; it must be a share from 0 to 1.")
        if self.judged == (RAW,) and (self.model or self.pool):
            raise BadInput("--weights raw is the pixels themselves and takes neither --model nor --pool.")
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
    both = BOTH if flags.pool == BOTH else ""
    overrides = ({"global_pool": flags.pool} if flags.pool and not both else {}) | ({"img_size": size} if size else {})
    if source == RAW:
        return "raw pixels", raw_pixels(size or RAW_SIZE)
    if source.startswith(RANDOM):
        name = source.removeprefix(RANDOM)
        model = vit.create(name, generator=torch.Generator().manual_seed(flags.seed), **overrides)
        return f"random {name}", encoder_of(model.to(device), both)
    path = Path(source).expanduser()
    if not path.exists() and not source.startswith(TIMM):
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
    return path.stem if path.is_file() else path.resolve().name, encoder_of(model.to(device), both)


def encoders(flags: Eval, device: torch.device) -> dict[str, Encoder]:
    """All weights by name; those of one name are told apart by what stands before it."""
    found = [(source, *encoder(source, flags, device)) for source in flags.judged]
    names = [name for _, name, _ in found]
    return {name if names.count(name) == 1 else source: encoder for source, name, encoder in found}


def command(flags: Eval, source: str, protocol: str, settings: Any) -> str:
    """What repeats the result of one source of weights by one protocol: both, and every other flag that matters to it."""
    kinds = {flag: "" for flag in evals.KINDS.values() if flag != evals.KINDS[evals.reads(protocol)]}
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


def run(flags: Eval, settings: dict) -> list[evals.Result]:
    """Evaluate as the flags say, print the table, write the folder.

    Under torchrun all ranks extract features, and the first does the rest; the others return nothing. What was found before a
    protocol failed, or before Ctrl-C, is written.

    Raises:
        BadInput: data, weights, settings or the output folder cannot be used, and nothing is written; or a protocol failed, and
            the others' results are.
        KeyboardInterrupt: with what became of the results.
    """
    ranks = dist.start(flags.device)
    device = ranks.device
    sets = Sets(flags.bad_limit, data=flags.data or None, objects=flags.objects or None, video=flags.video or None)
    evals.check(settings, sets)
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
        "object_size": (flags.objects_size * 2)[:2] or (None if flags.objects else SCENES_SIZE),
    }
    # "all" means all that go with the weights
    course = Course(lenient=evals.ALL in flags.protocol, tell=_tell)
    if ranks.world > 1:
        evals.extract_together(judged, sets, settings, course, **how)
        dist.stop()
        if not ranks.first:
            return []
    features: dict = {}
    try:
        evals.evaluate(
            judged,
            sets,
            tuple(settings),
            settings=settings,
            seed=flags.seed,
            seeds=flags.seeds,
            features=features,
            course=course,
            **how,
        )
    except KeyboardInterrupt:
        kept = f"{out / 'report.html'} has what was finished" if course.results else "nothing was finished"
        raise KeyboardInterrupt(kept) from None
    finally:
        if course.results:
            about = asdict(flags) | {
                "out": str(out),
                "sets": {kind: sets.name(kind) for kind in sets.opened},
                "device": str(device),
                "precision": precision,
                "kernels": kernels.describe(device).splitlines(),
                "without a result": course.missing,
                "unreadable images left out": _left_out(sets),
            }
            commands = {
                (name, protocol): command(flags, source, protocol, chosen)
                for name, source in zip(judged, flags.judged, strict=True)
                for protocol, chosen in settings.items()
            }
            report.write(out, course.results, about, features, flags.map, commands)
            _show(course.results, sets, out)
    if failed := list(course.failures.items()):
        (weights, protocol), why = failed[0]
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise BadInput(f"{protocol} of {weights} failed{others}: {why}" if course.results else why)
    return course.results


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(results: list[evals.Result], sets: Sets, out: Path) -> None:
    console = Console()
    console.print(report.table(results, ", ".join(dict.fromkeys(sets.name(kind) for kind in sets.opened))))
    # more would bury the figures; the report has them all
    for result in results if len(results) <= FEW else ():
        for sweep in report.sweeps(result):
            console.print(sweep)
    if differences := report.compared(results):
        console.print(report.differences(differences, results[0].weights))
    for line in dict.fromkeys(f"{result.protocol}: {report.sentence(result)}" for result in results):
        console.print(line, style="dim", highlight=False, markup=False)
    console.print(f"report: {out / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def _left_out(sets: Sets) -> list[tuple[str, str]]:
    """(path, reason) of every image that could not be read."""
    images = [getattr(split, "images", split) for pair in sets.opened.values() for split in pair if split is not None]
    return sorted({tuple(bad) for split in images for bad in split.bad})


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 2 for input that cannot be used, or 130 after Ctrl-C."""
    try:
        run(*parse(sys.argv[1:] if arguments is None else arguments))
        return 0
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"stopped; {stopped or 'nothing was finished'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice: what is done is kept as by Ctrl-C
    sys.exit(main())
