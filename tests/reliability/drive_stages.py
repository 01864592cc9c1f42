"""Runs a few steps of every stage of the main job in a process of its own, for the tests beside it.

    python drive_stages.py OUT --first A --last B [--load FOLDER] [--compile] [--controls] [--poison] [FLAG OF THE MAIN JOB ...]

Saves, per stage, the state at step B and a record of what each step saw and lost. With --load the state of step A is read
first. With --controls the same steps run again and again, each time with one saved part left out. Compiled, a stage that
compiles anything after its first two steps fails.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch

from engine import checkpoint, config, dist, probe, train
from engine.state import TrainState, position, restore, to_host

IMAGES, POISONED_STEP = 104, 5  # 13 steps an epoch: step 10 is inside one, step 20 in the next
SMALL = (
    "--batch-size 8 --mae.weight-ema 0.9 --maect.weight-ema 0.9 --nnclr.queue-size 64 --maect.queue-size 64 "
    "--maect.top-k 3 --nnclr.projector-hidden 32 --maect.projector-hidden 32 --nnclr.predictor-hidden 32 "
    "--maect.predictor-hidden 32 --nnclr.embedding 16 --maect.embedding 16 --mae.decoder-depth 1"
).split()


def parts_of(flags: list[str]) -> train.Parts:
    plan = config.parse([*SMALL, "--threads", "1", *flags])
    parts = train.prepare(plan, dist.start("cpu"))
    spaced = torch.linspace(0, len(parts.train_images) - 1, IMAGES).long()
    parts.train_images = probe.subset(parts.train_images, spaced)
    return parts


def fresh(parts: train.Parts, index: int) -> TrainState:
    """The stage at its first step, its encoder untouched by the stages before."""
    torch.manual_seed(0)
    parts.encoder.initialise()
    earlier = train.build(parts, index - 1, None).method if index == 2 else None
    return train.build(parts, index, earlier)


def steps(parts: train.Parts, state: TrainState, last: int, poison: bool) -> list[dict]:
    ranks, record, loader = parts.ranks, [], parts.loader(state)
    first = state.step
    for step in range(first, last):
        # Whatever a stage compiles, it compiles in its first two steps.
        torch._dynamo.config.error_on_recompile = parts.compiles and step >= first + 2
        batch = next(loader)
        images = batch.images
        if poison and step == POISONED_STEP:
            images = tuple(view.fill_(float("nan")) for view in images)
        report = state.update(step, images, batch.ids, state.method.draw(parts.draws(state.stage, step)))
        loss = dist.all_reduce(report["loss"].detach()) / ranks.world
        record.append({"step": step, "ids": dist.all_gather(batch.ids).tolist(), "loss": loss.item().hex()})
        state.step += 1
    torch._dynamo.config.error_on_recompile = False
    loader.close()
    return record


def controls(tensors: dict[str, dict[str, torch.Tensor]], stage: str) -> dict[str, Callable[[dict], None]]:
    """What can be left out, by name: every file, and inside the model and the optimiser every kind of tensor."""

    def without(file: str, keep: Callable[[str], bool]) -> Callable[[dict], None]:
        def leave_out(content: dict[str, dict]) -> None:
            content[file] = {name: value for name, value in content[file].items() if keep(name)}

        return leave_out

    found = {file: without(file, lambda name: False) for file in tensors if tensors[file]}
    for child in {name.split(".")[0] for name in tensors["model"]} | {"queue.keys", "queue.ids", "queue.pointer"}:
        if any(name.startswith(child) for name in tensors["model"]) and not (
            stage == "nnclr" and child == "projector_average"
        ):
            found[f"model/{child}"] = without("model", lambda name, child=child: not name.startswith(child))
    for kind in ("step", "exp_avg", "exp_avg_sq"):
        found[f"optimizer/{kind}"] = without("optimizer", lambda name, kind=kind: name.rpartition("/")[2] != kind)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, required=True)
    parser.add_argument("--load", type=Path)
    for flag in ("compile", "controls", "poison"):
        parser.add_argument(f"--{flag}", action="store_true")
    chosen, flags = parser.parse_known_args()
    torch.set_num_threads(1)
    parts = parts_of([*flags, *(["--compile"] if chosen.compile else [])])
    for stage in parts.stages:
        if chosen.load is None:
            state = fresh(parts, stage.index)
        else:
            state = train.build(parts, stage.index, None)
            tensors, where = checkpoint.newest(chosen.load / stage.name, print)
            restore(state, tensors, where)
            assert state.step == chosen.first
        record = steps(parts, state, chosen.last, chosen.poison)
        end = to_host(state)
        if parts.ranks.first:
            checkpoint.save(chosen.out / stage.name, state.step, end, position(state))
        verdicts = {}
        for name, leave_out in (controls(tensors, stage.name) if chosen.controls else {}).items():
            maimed = copy.deepcopy(tensors)
            leave_out(maimed)
            verdicts[name] = differs(parts, stage.index, maimed, where, chosen.last, end)
        if chosen.controls:
            verdicts["position"] = differs(parts, stage.index, tensors, where | {"step": 0}, chosen.last, end)
        if parts.ranks.first:
            (chosen.out / f"{stage.name}.json").write_text(json.dumps({"steps": record, "controls": verdicts}))
    dist.stop()


def differs(parts: train.Parts, index: int, tensors: dict, where: dict, last: int, end: dict) -> bool:
    """Whether a run from this content ends elsewhere; refusing it counts, too."""
    torch.manual_seed(1)
    parts.encoder.initialise()
    state = train.build(parts, index, None)
    try:
        restore(state, tensors, where)
        steps(parts, state, last, False)
    except (RuntimeError, KeyError):
        return True
    got = to_host(state)
    return any(not torch.equal(value, got[file][name]) for file in end for name, value in end[file].items())


if __name__ == "__main__":
    main()
