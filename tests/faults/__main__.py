"""The whole suite of faults: `python -m tests.faults`, hours; its parts by name, minutes.

It prints what was injected and survived, what work was lost and which sentences weren't true, and leaves the same as JSON. The
exit status is 1 where anything was not as it should be.
"""

import argparse
import random
import shlex
import sys
import tempfile
import time
import warnings
from pathlib import Path

from tests import preloaded
from tests.faults import fuzzing, hostile, injected, kills, points, ranks, soak
from tests.faults.readers import readers
from tests.faults.results import Results
from tests.faults.runs import Server, Subject


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=[*PARTS, *OF_POINTS],
        default=list(PARTS),
        help="which; deaths and errors are points [all]",
    )
    parser.add_argument("--kills", type=int, default=200, help="random kills, over all methods together [200]")
    parser.add_argument("--methods", nargs="+", default=list(kills.METHODS), help="that are killed [%(default)s]")
    parser.add_argument("--points", type=int, default=0, help="fault points, of kills and of errors each [0: all]")
    parser.add_argument("--first", type=int, default=1, help="point to begin with, where others were met before [1]")
    parser.add_argument("--last", type=int, default=None, help="point to end with [the last]")
    parser.add_argument(
        "--of", nargs="+", default=["mae", "maect"], help="methods whose calls are the points [mae maect]"
    )
    parser.add_argument("--minutes", type=float, default=60, help="of the soak [60]")
    parser.add_argument("--examples", type=int, default=2000, help="damaged files for each reader [2000]")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn [0]")
    parser.add_argument("--out", type=Path, default=Path("faults.json"), help="the results [faults.json]")
    parser.add_argument("--scratch", type=Path, help="where runs lie meanwhile [a folder for the time]")
    chosen = parser.parse_args(arguments)
    if not preloaded.can_be_built():
        print("error: g++ on Linux is needed, which builds the library that injects the faults", file=sys.stderr)
        return 2
    results = Results(chosen.out, shlex.join(["python", "-m", "tests.faults", *arguments]))
    with tempfile.TemporaryDirectory(dir=chosen.scratch, prefix="faults-") as folder:
        scratch = Path(folder)
        with Server(scratch, injected.build(scratch)) as server:
            try:
                for name in chosen.parts:
                    {**PARTS, **OF_POINTS}[name](server, scratch, chosen, results)
            except KeyboardInterrupt:
                print("stopped; what follows is of the part done", file=sys.stderr)
    results.show()
    return 0 if results.sound else 1


def _points(server: Server, scratch: Path, chosen: argparse.Namespace, results: Results) -> None:
    _deaths(server, scratch, chosen, results)
    _errors(server, scratch, chosen, results)


def _deaths(server: Server, scratch: Path, chosen: argparse.Namespace, results: Results) -> None:
    for method in chosen.of:
        subject = Subject(server, scratch / "points", method, own_cache=True)
        _meet(subject, points.kills(subject.calls), f"points of {method}, killed", chosen, results)


def _errors(server: Server, scratch: Path, chosen: argparse.Namespace, results: Results) -> None:
    for method in chosen.of:
        subject = Subject(server, scratch / "points", method, own_cache=True)
        _meet(subject, points.errors(subject.calls), f"points of {method}, errors", chosen, results)
        with results.part(f"file systems, {method}") as part:
            points.odd_file_systems(subject, part)


def _meet(subject: Subject, found: list[points.Point], name: str, chosen: argparse.Namespace, results: Results) -> None:
    some = points.spread(found, chosen.points) if chosen.points else found[chosen.first - 1 : chosen.last]
    which = "" if chosen.points or len(some) == len(found) else f", {chosen.first} to {chosen.first + len(some) - 1}"
    with results.part(name) as part:
        part.notes.append(f"{len(some)} of {len(found)} points{which}, of {len(subject.calls)} calls")
        points.meet(subject, some, part, results.progress)


def _kills(server: Server, scratch: Path, chosen: argparse.Namespace, results: Results) -> None:
    for number, method in enumerate(chosen.methods):
        count = chosen.kills // len(chosen.methods) + (number < chosen.kills % len(chosen.methods))
        if count:
            subject = Subject(server, scratch / "kills", method)
            with results.part(f"random kills of {method}") as part:
                kills.kill(subject, count, random.Random(chosen.seed * 1000 + number), part, results.progress)


def _ranks(server: Server, scratch: Path, chosen: argparse.Namespace, results: Results) -> None:
    with results.part("two processes") as part:
        pair = ranks.Pair(server, scratch / "ranks")
        for way in ranks.BOUND:
            for victim in range(1 if way == "stopped" else 0, 2):  # five minutes each
                pair.disturb(way, victim, part)


def _hostile(server: Server, scratch: Path, chosen: argparse.Namespace, results: Results) -> None:
    for give in (hostile.archives, hostile.trees, hostile.weights):
        with results.part(f"hostile {give.__name__}") as part:
            give(server, scratch / "hostile", part)
    subject = Subject(server, scratch / "hostile", "mae", keep=2)
    with results.part("hostile checkpoints") as part:
        hostile.checkpoints(subject, scratch / "hostile", part)


def _fuzzing(server: Server, scratch: Path, chosen: argparse.Namespace, results: Results) -> None:
    began, all_ = time.monotonic(), readers()
    with results.part("fuzzed readers") as part, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files
        for done, reader in enumerate(all_):
            fuzzing.fuzz_into(part, reader, chosen.examples, chosen.seed)
            results.progress(part, done + 1, len(all_), began)


def _soak(server: Server, scratch: Path, chosen: argparse.Namespace, results: Results) -> None:
    with results.part("soak") as part:
        soak.soak(server, scratch / "soak", chosen.minutes, random.Random(chosen.seed), part, results)


PARTS = {
    "points": _points,
    "kills": _kills,
    "hostile": _hostile,
    "fuzzing": _fuzzing,
    "soak": _soak,
    "ranks": _ranks,
}
OF_POINTS = {"deaths": _deaths, "errors": _errors}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
