"""The run folder: where it is, and what lies in it.

config.json, metrics.jsonl, events.jsonl (what became of the run), summary.json, tensorboard/, checkpoints/, export/ (the newest
encoder, which timm loads), stages/ (the encoder at the end of each stage), evaluation/, pictures/, and bad_files.json if there
were any. With --track, wandb/, trackio/ or mlflow/, and trackers.json (the run's id in each); with --profile, profile/
(operators.txt, trace.json.gz, on GPUs memory.pickle).
"""

import json
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from engine.core.durable import new_folder, write_file
from engine.core.errors import BadInput
from engine.core.json_text import parsed
from engine.methods.base import Method
from engine.model import weights
from engine.training.config import Plan
from engine.training.log import EVENTS
from engine.training.loop import Stage
from engine.training.parts import Parts
from engine.training.state import Content, TrainState

BAD_FILES = "bad_files.json"


def of_run(plan: Plan, first: bool = True) -> Path:
    """The folder that a run has or will have. One that nobody named is made here, by the first rank; others are left to `begin`.

    Raises:
        BadInput: something else is there.
    """
    if plan.train.resume:
        return Path(plan.train.resume)
    if not plan.train.out:
        return new_folder(f"runs/{plan.train.method}") if first else Path("runs")
    folder = Path(plan.train.out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(
            f"--out {folder} exists and is not an empty folder; choose another, or --resume it if it is a run."
        )
    return folder


def begin(folder: Path, plan: Plan) -> None:
    """Make a new run's folder and leave its configuration there."""
    folder.mkdir(parents=True, exist_ok=True)  # an empty one is welcome
    write_file(folder / "config.json", lambda aside: aside.write_text(plan.as_json()))


def of_stage(folder: Path, stage: Stage) -> Path:
    """Where a stage's encoder lies once the stage has ended."""
    return folder / "stages" / f"{stage.index + 1}-{stage.name}"


def export(parts: Parts, method: Method, tensors: Content, folder: Path) -> None:
    """Write the encoder as it is judged, with its classifier if there is one, so that timm loads it.

    Args:
        method: says what its encoder is; its own weights are not read.
        tensors: of the state, or of a copy of it.
    """
    state, classes = judged(method, tensors), parts.train_images.classes or ()
    weights.export(method.evaluated, folder, classifier=method.classifier, classes=classes, state=state)


def judged(method: Method, tensors: Content) -> dict[str, Tensor]:
    """Of a state's tensors those of the encoder that is judged, and of its classifier: averaged where there is an average."""
    place = next(name for name, module in method.named_modules() if module is method.evaluated)
    averaged = tensors["average"] if method.evaluated is method.encoder else {}
    trained = {
        name: tensors["model"][name if name.startswith("classifier.") else f"{place}.{name}"]
        for name in weights.state_of(method.evaluated, method.classifier)
    }
    return trained | averaged


def list_bad_files(parts: Parts, state: TrainState, folder: Path) -> list[str]:
    """Write which images were unreadable and replaced, if any were; the paths of those that were not listed there before."""
    path, bad = folder / BAD_FILES, [*parts.train_images.bad, *state.bad_files]
    before = {entry[0] for entry in json.loads(path.read_text())} if path.is_file() else set()
    if new := [name for name, _ in bad if name not in before]:
        write_file(path, lambda aside: aside.write_text(json.dumps(bad, indent=1)))
    return new


def events(folder: Path) -> list[dict]:
    """What became of the run so far, oldest first, but for lines that are torn by a crash."""
    found = []
    for line in (folder / EVENTS).read_bytes().splitlines() if (folder / EVENTS).is_file() else ():
        with suppress(ValueError):
            found.append(parsed(line))
    return found
