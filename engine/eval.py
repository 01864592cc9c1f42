"""`python -m engine.eval`: judge weights by the papers' protocols, print a table, leave a report."""

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

import kernels
from engine import evals
from engine.core import dist
from engine.core.errors import BadInput
from engine.data import cache
from engine.evals import Course, Sets, report
from engine.evals.command_line import RANDOM, RAW, TIMM, WEIGHTS, Eval, command, parse
from engine.evals.features import BOTH, Encoder, encoder_of, raw_pixels
from engine.model import vit, weights

RAW_SIZE = (32, 32)
FEW = 4  # results whose tables fit on a screen
SCENES_SIZE = (128, 128)


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
