"""The runs of a study, as command lines of `engine.train`, and what there is of each."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core.errors import BadInput
from engine.studies import Arm, Study
from engine.training import checkpoint, config
from engine.training.metrics import read_metrics

TAIL = 1 << 16  # bytes at the end of metrics.jsonl: many lines
NEW, HALF, DONE = "new", "half-trained", "done"


@dataclass(frozen=True)
class Run:
    """One training of the grid.

    Attributes:
        collapse: what it is kept from collapsing with; "" where the arm has no prototypes.
        arguments: what `engine.train` is given, but for where and how it runs.
        plan: what these resolve to.
        after: name of the run that it starts from; "" where it starts from nothing.
    """

    arm: Arm
    collapse: str
    seed: int
    arguments: tuple[str, ...]
    plan: config.Plan
    after: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.arm.name, self.collapse, f"s{self.seed}")))

    @property
    def epochs(self) -> int:
        """Of all stages."""
        return sum(settings.epochs for _, settings in self.plan.stages)


def grid(
    study: Study,
    folder: Path = Path(),
    *,
    data: str = "",
    model: str = "",
    image_size: tuple[int, ...] = (),
    patch_size: int = 0,
    epochs: int = 0,
    batch_size: int = 0,
    seeds: Sequence[int] = (0,),
    arms: Sequence[str] = (),
    collapse: Sequence[str] = (),
) -> list[Run]:
    """All runs, seed by seed. An arm without prototypes runs once per seed, whatever keeps the others' from collapsing.

    Args:
        folder: where the runs' folders are.
        data, model, image_size, patch_size, epochs, batch_size: as the command line has them; "", () and 0 are the study's or
            the recipe's.
        arms, collapse: only these (of arms, and those they start from); none are all.

    Raises:
        BadInput: `engine.train` would refuse a run's flags, or epochs are asked for where each arm has its own.
        ValueError: arms differ in what the study promises to be equal.
    """
    embedded = data in ("", "digits")
    if epochs and not study.reference:
        raise BadInput(f"--epochs is not for study {study.name}, where every arm has its own recipe's.")

    def general(model: str, epochs: int, batch_size: int, encoder: dict[str, Any]) -> list[str]:
        values = {"data": "" if embedded else data, "preset": "digits" if embedded else "", "model": model}
        values |= {"epochs": epochs, "batch-size": batch_size, "pool": encoder.get("global_pool")}
        values |= {"image-size": image_size or tuple(encoder.get("img_size", ()))}
        values |= {"patch-size": patch_size or encoder.get("patch_size")}
        given = [word for name, value in values.items() if value for word in _words(name, value)]
        return [*given, *study.cadence, "--no-evaluate"]

    asked, equal = general(model, 0, batch_size, {}), {}
    if study.reference:
        reference = study.arm(study.reference)
        asked = general(model, epochs or (study.epochs if embedded else 0), batch_size, {})
        plan = config.parse([*asked, "--method", reference.method, *reference.flags])
        ((_, settings),) = plan.stages
        asked = general(plan.model, settings.epochs, settings.batch_size, plan.encoder)
        equal = {name: getattr(settings, name) for name in study.shared} | dict(study.fixed)
    wanted = {arm.name for arm in _with_what_they_follow(study, arms or [arm.name for arm in study.arms])}
    runs: list[Run] = []
    for seed in seeds:
        for arm in study.arms:
            if arm.name not in wanted:
                continue
            shared = [word for name, value in equal.items() for word in _words(f"{arm.method}.{name}", value)]
            after = next((run.name for run in runs if (run.arm.name, run.seed) == (arm.after, seed)), "")
            start = ("--weights", str(folder / after)) if after else ()
            for guard in (collapse or study.collapse or ("",)) if arm.clusters else ("",):
                switch = ("--collapse", guard) if guard else ()
                words = ("--method", arm.method, *arm.flags, *start, *switch, *asked, *shared, "--seed", str(seed))
                plan = config.parse(words)
                if arm.epochs != 1:
                    words += _share_of_epochs(plan, arm.epochs)
                    plan = config.parse(words)
                runs.append(Run(arm, guard, seed, words, plan, after))
    if study.reference:
        _check_equal(runs, ("epochs", "batch_size", *equal))
    return runs


def _with_what_they_follow(study: Study, names: Sequence[str]) -> list[Arm]:
    """The arms of these names, and those that they start from."""
    arms = [study.arm(name) for name in names]
    earlier = [arm.after for arm in arms if arm.after]
    return arms + (_with_what_they_follow(study, earlier) if earlier else [])


def _share_of_epochs(plan: config.Plan, share: float) -> tuple[str, ...]:
    """Flags for this share of each stage's epochs, rounded up."""
    return tuple(
        word
        for stage, settings in plan.stages
        for word in _words(f"{stage}.epochs", math.ceil(share * settings.epochs))
    )


def _words(name: str, value: Any) -> list[str]:
    """A setting as words of the command line."""
    stage, dot, setting = name.rpartition(".")
    setting = setting.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{stage}{dot}{'' if value else 'no-'}{setting}"]
    return [f"--{stage}{dot}{setting}", *map(str, value if isinstance(value, tuple) else (value,))]


def encoders_differ(runs: Sequence[Run]) -> str:
    """A sentence on what the arms' encoders are made with differently, as their recipes want it; empty where all are alike."""
    encoders = {run.arm.name: run.plan.encoder for run in runs}
    names = dict.fromkeys(name for encoder in encoders.values() for name in encoder)
    differing = [
        f"{name} is " + ", ".join(f"{encoder.get(name, 'the default')} in {arm}" for arm, encoder in encoders.items())
        for name in names
        if len({str(encoder.get(name)) for encoder in encoders.values()}) > 1
    ]
    return f"The encoders are not all alike: {'; '.join(differing)}." if differing else ""


def length(runs: Sequence[Run]) -> str:
    """Epochs and batch of these runs, in words."""
    epochs = _range(run.epochs for run in runs)
    batch = _range(settings.batch_size for run in runs for _, settings in run.plan.stages)
    return f"{epochs} epoch{'s' * (epochs != '1')} in batches of {batch}"


def _range(numbers: Iterable[int]) -> str:
    numbers = sorted(set(numbers))
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _check_equal(runs: list[Run], names: Sequence[str]) -> None:
    """An arm's own flags may not undo what makes order, crops and masks equal."""
    for run in runs:
        ((_, first),), ((_, settings),) = runs[0].plan.stages, run.plan.stages
        for name in names:
            if getattr(first, name) != getattr(settings, name):
                raise ValueError(f"{runs[0].arm.name} and {run.arm.name} differ in {name}, which is to be equal")
        if run.plan.model != runs[0].plan.model:
            raise ValueError(f"{runs[0].arm.name} and {run.arm.name} differ in the model")


def standing(run: Run, folder: Path) -> str:
    """What there is of a run: NEW (nothing that could be used), HALF (a sound checkpoint) or DONE (a summary).

    Raises:
        BadInput: the folder holds something else, or a run with other settings.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return NEW
    advice = "choose another --out, or move that folder away"
    try:
        saved = json.loads((folder / "config.json").read_text())
        differing = _differences(saved, json.loads(run.plan.as_json()))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadInput(f"{folder} is in the way and holds no run that can be read; {advice}.") from error
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise BadInput(f"{folder} holds a run with other settings: {differing[0]}{more}; {advice}.")
    if (folder / "summary.json").is_file():
        return DONE
    return NEW if saved_step(folder) is None else HALF


def saved_step(folder: Path) -> int | None:
    """The step of a run's newest sound checkpoint."""
    sound = checkpoint.newest_sound(folder / "checkpoints")
    return sound and int(sound.name.removeprefix(checkpoint.PREFIX))


def _differences(there: dict, now: dict) -> list[str]:
    """What two config.json compute differently, in words; how a run is carried out does not count, nor its recipe's name."""

    def computed(saved: dict) -> dict[str, Any]:
        flat = {"model": saved["model"], "methods": [stage["method"] for stage in saved["stages"]]}
        flat |= {f"encoder {name}": value for name, value in saved["encoder"].items()}
        flat |= {name: value for name, value in saved["train"].items() if name not in config.RESUME_MAY_CHANGE}
        for stage in saved["stages"]:
            flat |= {f"{stage['method']}.{name}": value for name, value in stage.items()}
        return {name.replace("_", "-"): value for name, value in flat.items()}

    old, new = computed(there), computed(now)
    return [
        f"{name} is {json.dumps(old.get(name))} there and {json.dumps(new.get(name))} now"
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    ]


def trained_seconds(folder: Path) -> float:
    """What a run's steps took, by the pace it logged, and storing features; probes, checkpoints and the start are not counted."""
    stages, before = json.loads((folder / "config.json").read_text())["stages"], 0
    batch = {stage["method"]: stage["batch_size"] for stage in stages}
    everything = read_metrics(folder / "metrics.jsonl")
    seconds = sum(record.get("storing_features_seconds", 0.0) for record in everything)
    records = [record for record in everything if record["kind"] == "train"]
    for record in records:
        pace = record.get("images_per_second") or next(
            (
                later["images_per_second"]
                for later in records
                if later["stage"] == record["stage"] and "images_per_second" in later
            ),
            None,
        )
        if pace:
            seconds += (record["step"] - before) * batch[record["stage"]] / pace
        before = record["step"]
    return seconds


def logged_step(folder: Path) -> int:
    """The last step in a run's metrics.jsonl, 0 where there is none yet."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):  # torn, or still being written
            continue
    return 0
