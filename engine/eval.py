"""`python -m engine.eval`: judge weights by the papers' protocols, print a table, leave a report."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import kernels
from engine import evals
from engine.core import dist
from engine.core.commands import exit_status
from engine.core.durable import new_folder
from engine.core.errors import BadInput
from engine.core.extras import Extras
from engine.data import cache
from engine.evals import Course, Encoder, Sets, report
from engine.evals.command_line import Eval, command, parse
from engine.evals.encoders import encoders
from engine.training.precision import automatic
from kernels.calibrate import known

SCENES_SIZE = (128, 128)


def run(flags: Eval, settings: dict[str, Any]) -> int:
    """Evaluate as the flags say, print the table, write the folder.

    Under torchrun all ranks extract features, and the first does the rest. What was found before Ctrl-C, or beside a protocol or
    a part of the report that failed, is written.

    Returns:
        The exit status: 0, or 1 where a defect took a protocol's result or a part of the report, which was told.

    Raises:
        BadInput: data, weights, settings or the output folder cannot be used, and nothing is written; or a protocol failed, and
            the others' results are.
        KeyboardInterrupt: noted at it is what became of the results.
    """
    ranks = dist.start(flags.device)
    kernels.freeze(known(ranks.device), ranks.device.type)
    sets = Sets(flags.bad_limit, data=flags.data or None, objects=flags.objects or None, video=flags.video or None)
    evals.check(settings, sets)
    judged = encoders(flags, ranks.device)
    out = _folder(flags, judged) if ranks.first else None
    how = _how(flags, ranks.device)
    # "all" means all that go with the weights
    course, extras = Course(lenient=evals.ALL in flags.protocol, tell=_tell), Extras(_tell)
    if ranks.world > 1:
        evals.extract_together(judged, sets, settings, course, **how)
        dist.stop()
        if not ranks.first:
            return 0
    features: dict = {}
    how |= {"seed": flags.seed, "seeds": flags.seeds}
    try:
        evals.evaluate(judged, sets, tuple(settings), settings=settings, features=features, course=course, **how)
    except KeyboardInterrupt as stopped:
        stopped.add_note(f"{out / 'report.html'} has what was finished" if course.results else "nothing was finished")
        raise
    finally:
        if course.results:
            about = _about(flags, sets, course, how) | {"out": str(out)}
            report.write(out, course.results, about, features, extras, flags.map, _commands(flags, judged, settings))
            report.show(course.results, ", ".join(dict.fromkeys(map(sets.name, sets.opened))), out)
        elif not flags.out:
            out.rmdir()
            with suppress(OSError):  # others are in it
                out.parent.rmdir()
    if course.defects:
        _tell(f"error: {course.failed}")
    elif course.failed:
        raise BadInput(course.failed)
    return 1 if course.defects or extras.left_out else 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _folder(flags: Eval, judged: Mapping[str, Encoder]) -> Path:
    """Where the report goes; made here, where no name was given. Raises BadInput as `report.check_folder`."""
    first = next(iter(judged)).replace(" ", "-").replace("/", "-")
    if not flags.out:
        return new_folder(f"runs/eval-{first}")
    out = Path(flags.out).expanduser()
    report.check_folder(out)
    return out


def _how(flags: Eval, device: torch.device) -> dict[str, Any]:
    """How the weights are run, as `evals.evaluate` takes it."""
    auto = "bf16" if automatic(device) == "bf16" else "fp32"  # heads are trained without scaling
    return {
        "device": device,
        "precision": auto if flags.precision == "auto" else flags.precision,
        "batch_size": flags.batch_size,
        "threads": flags.threads or None,
        "cache": cache.folder() / "features" if flags.cache else None,
        "resize": flags.resize,
        "squeeze": flags.squeeze,
        "aspect": flags.aspect,
        "object_size": (flags.objects_size * 2)[:2] or (None if flags.objects else SCENES_SIZE),
    }


def _about(flags: Eval, sets: Sets, course: Course, how: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, and what became of it, for the report."""
    return (
        asdict(flags)
        | {
            "sets": {kind: sets.name(kind) for kind in sets.opened},
            "device": str(how["device"]),
            "precision": how["precision"],
            "kernels": kernels.describe(how["device"]).splitlines(),
            "without a result": course.missing,
            "unreadable images left out": sets.unreadable,
        }
        | ({"objects left out": sets.objects_left_out} if sets.objects_left_out else {})
    )


def _commands(flags: Eval, judged: Mapping[str, Encoder], settings: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """By weights and protocol, what repeats a result."""
    return {
        (name, protocol): command(flags, source, protocol, chosen)
        for name, source in zip(judged, flags.judged, strict=True)
        for protocol, chosen in settings.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: that of `run`, 2 for input that cannot be used, or 128 + the number of a signal."""
    words = sys.argv[1:] if arguments is None else arguments
    return exit_status(lambda: run(*parse(words)), "nothing was finished")


if __name__ == "__main__":
    sys.exit(main())
