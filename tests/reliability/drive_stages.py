"""Runs a few steps of every method in a process of its own, for the tests beside it.

    python drive_stages.py OUT --last B [--methods NAME ...] [--first A --load FOLDER] [--controls] [--poison] [--compile]
        [--drop-path RATE] [--accumulate COUNT] [--log-every COUNT] [--set FIELD=NUMBER ...]

Of a method with several stages the last one runs, on what the untrained earlier ones hand over. Saves, per method, the state at
step B and a record of what each step saw and lost. With --load the state of step A is read first. With --controls the same steps
run again and again, each time with one saved part as a new run has it. Compiled, a method that compiles anything after its first
two steps fails.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from engine import methods
from engine.core import dist
from engine.core.errors import BadInput
from engine.data.subsets import subset
from engine.methods.settings import StageSettings
from engine.training import checkpoint, config
from engine.training.build import build
from engine.training.drawing import drawing
from engine.training.parts import Parts, prepare, stages_of
from engine.training.state import TrainState, position, restore
from tests.methods.small import small
from tests.saved import copied

IMAGES, BATCH, EPOCHS, POISONED_STEP = 40, 8, 4, 2  # 5 steps an epoch: step 4 is inside one, step 8 in the next
# so that whatever a schedule or a freeze depends on changes within twenty steps
SOON = {
    "epochs": EPOCHS,
    "target_temperature_start": 0.03,
    "target_temperature_epochs": 3,
    "queue_from": 1,
    "queue_size": 128,
}


def reduced(stage: str, settings: StageSettings, given: dict[str, float]) -> StageSettings:
    """Small sizes, an average of weights where the method takes one, and what was given."""
    settings = replace(settings, **small(type(settings), **SOON, **given))
    try:
        averaged = replace(settings, weight_ema=0.9)
        averaged.check(stage)
        return averaged
    except BadInput:
        return settings


def parts_of(method: str, ranks: dist.Ranks, chosen: argparse.Namespace) -> Parts:
    given = {name: json.loads(value) for name, value in (pair.split("=") for pair in chosen.set)}
    flags = ["--threads", "1", "--accumulate", str(chosen.accumulate), *(["--compile"] if chosen.compile else [])]
    plan = config.parse(["--method", method, *flags])
    stages = tuple((name, reduced(name, settings, given)) for name, settings in plan.stages)
    encoder = plan.encoder | {"depth": 2, "drop_path": chosen.drop_path}
    parts = prepare(replace(plan, stages=stages, encoder=encoder), ranks)
    spaced = torch.linspace(0, len(parts.train_images) - 1, IMAGES).long()
    parts.train_images = subset(parts.train_images, spaced)
    parts.stages = stages_of(parts.plan, parts.train_images)
    return parts


def fresh(parts: Parts, seed: int, anew: bool = True) -> TrainState:
    """The method's own stage at its first step, after its untrained earlier stages; not `anew`, as a checkpoint's content is put
    into it."""
    torch.manual_seed(seed)
    parts.encoder.initialise()
    state = None
    for stage in parts.stages:
        state = build(parts, stage.index, state.method if state else None, anew=anew)
    return state


def steps(parts: Parts, state: TrainState, last: int, poison: bool, log_every: int) -> list[dict]:
    ranks, record, loader = parts.ranks, [], parts.loader(state)
    first = state.step
    with drawing(state.method, partial(parts.draws, state.stage), first, last) as drawn:
        for step in range(first, last):
            # Whatever a stage compiles, it compiles in its first two steps.
            torch._dynamo.config.error_on_recompile = parts.compiles and step >= first + 2
            batch = next(loader)
            images = batch.images
            if poison and step == POISONED_STEP:
                images = tuple(view.fill_(float("nan")) for view in images)
            report = state.update(step, images, batch.ids, drawn(step), (step + 1) % log_every == 0)
            loss = dist.all_reduce(report["loss"].detach()) / ranks.world
            record.append({"step": step, "ids": dist.all_gather(batch.ids).tolist(), "loss": loss.item().hex()})
            state.step += 1
    torch._dynamo.config.error_on_recompile = False
    loader.close()
    return record


def controls(tensors: dict[str, dict[str, torch.Tensor]]) -> dict[str, Callable[[dict, dict], None]]:
    """What can be replaced by a new run's, by name: every file, and inside the model and the optimiser every kind of tensor."""

    def renewed(file: str, which: Callable[[str], bool]) -> Callable[[dict, dict], None]:
        def renew(content: dict[str, dict], new: dict[str, dict]) -> None:
            kept = {name: value for name, value in content[file].items() if not which(name)}
            content[file] = kept | {name: value for name, value in new[file].items() if which(name)}

        return renew

    found = {file: renewed(file, lambda name: True) for file in tensors if tensors[file]}
    children = {name.split(".")[0] for name in tensors["model"]}
    for child in children | {name for name in tensors["model"] if name.startswith("queue")}:
        found[f"model/{child}"] = renewed("model", lambda name, child=child: f"{name}.".startswith(f"{child}."))
    for kind in {name.rpartition("/")[2] for name in tensors["optimizer"]}:
        found[f"optimizer/{kind}"] = renewed("optimizer", lambda name, kind=kind: name.rpartition("/")[2] == kind)
    return found


def differs(parts: Parts, tensors: dict, where: dict, last: int, end: dict) -> bool:
    """Whether a run from this content ends elsewhere; refusing it counts, too."""
    state = fresh(parts, 1, anew=False)
    try:
        restore(state, tensors, where)
        steps(parts, state, last, False, 1)
    except (RuntimeError, KeyError):
        return True
    got = copied(state)
    return any(not torch.equal(value, got[file][name]) for file in end for name, value in end[file].items())


def drive(method: str, ranks: dist.Ranks, chosen: argparse.Namespace) -> None:
    parts = parts_of(method, ranks, chosen)
    if chosen.load is None:
        state = fresh(parts, 0)
    else:
        tensors, where = checkpoint.newest(chosen.load / method, print)
        state = build(parts, where["stage"], None, anew=False)
        restore(state, tensors, where)
        assert state.step == chosen.first
    assert state.method.name == method
    record = steps(parts, state, chosen.last, chosen.poison, chosen.log_every)
    end = copied(state)
    if ranks.first:
        checkpoint.save(chosen.out / method, state.step, end, position(state))
    verdicts = {}
    if chosen.controls:
        new = copied(fresh(parts, 1, anew=False))
        for name, renew in controls(tensors).items():
            maimed = copy.deepcopy(tensors)
            renew(maimed, new)
            verdicts[name] = differs(parts, maimed, where, chosen.last, end)
        verdicts["position"] = differs(parts, tensors, where | {"step": 0}, chosen.last, end)
        verdicts["nothing"] = differs(parts, tensors, where, chosen.last, end)
    if ranks.first:
        (chosen.out / f"{method}.json").write_text(json.dumps({"steps": record, "controls": verdicts}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", nargs="+", default=methods.names())
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, required=True)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--drop-path", type=float, default=0.0)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=1)
    parser.add_argument("--set", nargs="+", default=[])
    for flag in ("compile", "controls", "poison"):
        parser.add_argument(f"--{flag}", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    ranks = dist.start("cpu")
    for method in chosen.methods:
        drive(method, ranks, chosen)
    dist.stop()


if __name__ == "__main__":
    main()
