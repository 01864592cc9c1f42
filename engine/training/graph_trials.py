"""Whether steps replayed from a CUDA graph are right and faster on this very device: tried before a run's first step in a child
process that may die, and kept in the user's record of the machine, among the trials of kernels.

Right: after some updates from one start the trained weights lie no further from those of steps as they are than twice what two
runs of those lie apart, which is nothing where torch's kernels give the same bits. Faster: as `kernels.calibration.verdict` says.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels
from engine.training import config
from engine.training.graphs import UNSEEN, WARM_UP
from engine.training.parts import Parts
from engine.training.stepping import TOTAL, fingerprint, made_ready, method_of, stepping
from kernels.calibration import circumstances
from kernels.calibration.jobs import start
from kernels.calibration.records import Key, Record, machine
from kernels.calibration.tolerance import WrongAnswer
from kernels.calibration.verdict import INCUMBENT, judge
from kernels.guarded import Guard

NAME, REPLAYED = "replayed step", "replayed"
SECONDS = 300.0  # after which a stage's trial counts as hanging, compilation included
STEPS = WARM_UP + 4  # that are compared
FIRST = TOTAL // 2  # of them: where rates are far from nothing
ROUNDS, ROUND_SECONDS, MOST = 7, 0.5, 32
ROOM = 0.1  # of a card's memory, to be left for what a trial does not do: images are decoded, encoders probed
STORED = "steps on stored features were not tried; --graphs on takes it"
Say = Callable[[str], None]


def decide(parts: Parts, table: Mapping[str, Mapping[str, str]], say: Say) -> dict[str, str]:
    """By stage of --graphs auto against which nothing else speaks: why its steps are not replayed, "" where they are.

    Args:
        table: of the kernels that the run takes.
        say: is told what goes on.
    """
    train, device = parts.plan.train, parts.ranks.device
    stages = [index for index, (_, why) in enumerate(parts.ungraphed()) if why == UNSEEN]
    if train.graphs != "auto" or not stages:
        return {}
    here = machine(device, torch.get_num_threads(), train.deterministic)
    own, found = Record.of(here), {}
    known = Record.shipped(here).trials | own.trials
    for index in stages:
        name, settings = parts.plan.stages[index]
        if getattr(settings, "reuse", 0):
            found[name] = STORED
            continue
        how = {"precision": parts.precision, "compiles": parts.compiles, "table": table}
        key = Key(NAME, name, fingerprint(parts.plan, index, how))
        trial = known.get(str(key))
        if train.calibrate == "again" or (trial is None and train.calibrate == "auto"):
            say(
                f"calibration: a step of stage {name}, as it is and replayed from a CUDA graph, at most {SECONDS:.0f} s"
            )
            trial, lasts = _tried(parts, index, how)
            own.note(key, trial, lasts=lasts)
            own.save()
        if trial is not None:
            found[name] = _why_not(trial)
            say(f"calibration: {_told(name, trial)}")
    return found


def _tried(parts: Parts, stage: int, how: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """What came of it, and whether that is worth keeping."""
    began, train = time.monotonic(), parts.plan.train
    where = {
        "device": str(parts.ranks.device), "threads": torch.get_num_threads(), "deterministic": train.deterministic,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, Guard() as guard:
        (Path(folder) / "config.json").write_text(parts.plan.as_json())
        around = circumstances.look(guard, parts.ranks.device)
        if around.obstacle:
            return {"failure": f"was not compared: {around.obstacle}"}, False
        outcome = guard.run(f"{__name__}:compare", {"run": folder, "stage": stage} | how | where, SECONDS)
    found = {"failure": outcome.failure.removeprefix("raised WrongAnswer: ")} if outcome.failure else outcome.value
    return found | {"seconds": round(time.monotonic() - began, 1)}, not around.passes(outcome.failure)


def _why_not(trial: Mapping[str, Any]) -> str:
    """Why steps are not replayed after this trial; "" where they are."""
    if "failure" in trial:
        return f"tried here, it {trial['failure']}"
    verdict = judge(trial["forms"])
    return "" if verdict.choice == REPLAYED else f"tried here, it is no faster ({verdict.why[REPLAYED]})"


def _told(name: str, trial: Mapping[str, Any]) -> str:
    if "failure" in trial:
        return f"a step of stage {name}, replayed from a CUDA graph, {trial['failure']}"
    plain, replayed = (trial["forms"][form]["ms"] for form in (INCUMBENT, REPLAYED))
    return f"a step of stage {name} takes {plain:.3g} ms, replayed from a CUDA graph {replayed:.3g}"


def compare(
    run: str,
    stage: int,
    precision: str,
    compiles: bool,
    table: Mapping[str, Mapping[str, str]],
    device: str,
    threads: int,
    deterministic: bool,
) -> dict[str, Any]:
    """In the child: the weights after steps replayed from a graph beside those after steps as they are, and the time of both.

    Args:
        run: a folder with the run's config.json.

    Returns:
        "forms": as `verdict.judge` takes them; "apart": how far the replayed steps' weights lie from the others', and how far
        two runs of these lie apart.

    Raises:
        WrongAnswer: the first is more than twice the second, or a graph leaves too little memory.
    """
    at, plan = start(device, threads, deterministic), config.parse(["--resume", run])
    if plan.train.kernels != "auto":
        kernels.use(plan.train.kernels)
    kernels.freeze(table, at.type)

    def after(graphs: bool) -> tuple[list[Tensor], Callable[[int], None]]:
        """The trained weights after some steps, on the host, and what takes another."""
        torch.manual_seed(0)
        method = made_ready(method_of(plan, stage), compiles, at)
        step, update = stepping(method, stage, plan.train.accumulate, precision=precision, graphs=graphs, noise=True)
        for number in range(FIRST, FIRST + STEPS):
            step(number)
        return [parameter.detach().to("cpu", copy=True) for parameter in update.trained], step

    # one after the other, since a graph's memory is its own
    first, step = after(graphs=False)
    forms = {INCUMBENT: _timed(step, at)}
    del step
    _free(at)
    second, step = after(graphs=False)
    del step
    _free(at)
    found, step = after(graphs=True)
    off, apart = _distance(found, first), _distance(second, first)
    if not off <= 2 * apart:
        raise WrongAnswer(
            f"leaves weights that are {off:.3g} off, and two runs of steps as they are lie {apart:.3g} apart"
        )
    if at.type == "cuda":
        _check_room(*torch.cuda.mem_get_info(at))
    return {"forms": forms | {REPLAYED: _timed(step, at)}, "apart": [off, apart]}


def _check_room(free: int, total: int) -> None:
    """Of bytes on the device."""
    if free < ROOM * total:
        raise WrongAnswer(f"leaves {free / 2**30:.1f} of {total / 2**30:.1f} GiB for images and probes")


def _free(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    """The L2 norm of all differences."""
    return sum(float((a.double() - b.double()).square().sum()) for a, b in zip(one, other, strict=True)) ** 0.5


def _timed(step: Callable[[int], None], device: torch.device) -> dict[str, float]:
    """The host's time of a step that ends with the device's, over rounds as in `kernels.calibration.clock`."""

    def took(steps: int) -> float:
        _wait(device)
        began = time.perf_counter()
        for number in range(FIRST, FIRST + steps):
            step(number)
        _wait(device)
        return (time.perf_counter() - began) / steps

    steps = max(2, min(MOST, int(ROUND_SECONDS / took(2))))
    ms = sorted(1e3 * took(steps) for _ in range(ROUNDS))
    return {"ms": ms[ROUNDS // 2], "low": ms[1], "high": ms[-2], "runs": ROUNDS * steps}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
