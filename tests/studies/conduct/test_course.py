"""Which runs wait, go on, fail or count, how they share the machine, and how long the rest takes."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.core.errors import BadInput
from engine.studies.conduct import grid
from engine.studies.conduct.command_line import Flags
from engine.studies.conduct.course import Course
from engine.studies.conduct.trainings import Training, environment
from engine.training import checkpoint
from tests.studies.small import CHAIN, LOWSHOT, TINY


def test_an_arm_starts_from_the_run_of_its_seed_and_waits_for_it(tmp_path: Path):
    runs = grid.grid(CHAIN, tmp_path, seeds=(0, 1), arms=("neighbours",))
    assert [(run.name, run.after) for run in runs] == [
        ("pixels-s0", ""), ("neighbours-s0", "pixels-s0"), ("pixels-s1", ""), ("neighbours-s1", "pixels-s1"),
    ]  # fmt: skip
    assert runs[1].plan.train.weights == str(tmp_path / "pixels-s0")
    assert [name for name, _ in runs[1].plan.stages] == ["nnclr", "maect"]
    course = Course(Flags(study="chain", out=str(tmp_path)), CHAIN, runs, print)
    assert [run.name for run in course.waiting()] == ["pixels-s0", "pixels-s1"]
    course.standing["pixels-s0"], course.failed["pixels-s1"] = grid.DONE, "status 2: no luck."
    assert [run.name for run in course.waiting()] == ["neighbours-s0"]
    assert course.failed["neighbours-s1"] == "pixels-s1, which it starts from, failed"
    with pytest.raises(BadInput, match="--epochs is not for study chain"):
        grid.grid(CHAIN, epochs=3)


@pytest.fixture
def course(tmp_path: Path) -> Course:
    flags = Flags(study="tiny", out=str(tmp_path / "out"), arms=("pixels",))
    return Course(flags, TINY, grid.grid(TINY, arms=flags.arms), print)


def leave(course: Course, step: int | None = None, **changes: object) -> Path:
    """What a killed run left: its configuration, metrics, and a checkpoint of `step`."""
    (run,) = course.runs
    folder = course.folder(run)
    folder.mkdir(parents=True)
    plan = replace(run.plan, train=replace(run.plan.train, **changes))
    (folder / "config.json").write_text(plan.as_json())
    (folder / "metrics.jsonl").write_text('{"step": 9, "stage": "mae", "kind": "train"}\n{"step": 10, "st')
    if step is not None:
        checkpoint.save(folder / "checkpoints", step, {"model": {"x": torch.zeros(1)}}, {})
    return folder


class Recorded:
    """In place of a process."""

    def __init__(self, words: list[str], **options: object):
        self.words, self.options = words, options


def test_a_killed_run_goes_on_from_its_newest_sound_checkpoint(course: Course, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    (run,) = course.runs
    folder = leave(course, step=7)
    assert grid.logged_step(folder) == 9
    checkpoint.save(folder / "checkpoints", 8, {"model": {"x": torch.zeros(1)}}, {})
    (folder / "checkpoints" / "step-000000008" / "model.safetensors").write_bytes(b"torn")
    course.look()
    assert course.standing == {"pixels-s0": grid.HALF}
    course.start(run, lock=0)
    (training,) = course.active
    assert training.first_step == 7
    assert training.process.words[1:] == [
        "-m", "engine.train", "--no-compile", "--device", "auto", "--resume", str(folder),
    ]  # fmt: skip


def test_a_run_killed_before_its_first_checkpoint_starts_again(course: Course, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    (run,) = course.runs
    folder = leave(course)
    course.look()
    course.start(run, lock=0)
    assert not folder.exists()
    words = course.active[0].process.words
    assert words[-2:] == ["--out", str(folder)] and "--resume" not in words and "--no-evaluate" in words


def test_only_a_run_with_todays_settings_counts(course: Course):
    (run,) = course.runs
    folder = leave(course, threads=5, compile=True, device="cpu", out="elsewhere")
    (folder / "summary.json").write_text("{}")
    assert grid.standing(run, folder) == grid.DONE
    other = replace(run, plan=replace(run.plan, train=replace(run.plan.train, seed=1)))
    with pytest.raises(BadInput, match="other settings: seed is 0 there and 1 now; choose another --out, or move"):
        grid.standing(other, folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BadInput, match="in the way and holds no run that can be read"):
        grid.standing(run, folder)
    (folder / "config.json").unlink()
    with pytest.raises(BadInput, match="in the way"):
        grid.standing(run, folder)


def test_a_run_that_fails_is_told_and_the_others_go_on(course: Course, tmp_path: Path):
    (run,) = course.runs
    course.steps[run.name] = 10
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", "print('error: no luck.\\n'); raise SystemExit(2)"], stdout=file
        )
    process.wait()
    course.active.append(Training(run, 0, process, course.folder(run), log, 0))
    assert course.collect() == [] and course.waiting() == [] and course.active == []
    assert course.failed == {"pixels-s0": "status 2: no luck."}
    images = (range(9), range(5))
    (row,) = course.outcome(images).rows
    assert row.verdict == "failed" and row.figures == {}


def test_a_run_that_cannot_be_judged_is_told_and_the_others_go_on(course: Course, capsys: pytest.CaptureFixture):
    (run,) = course.runs
    folder = leave(course)
    (folder / "summary.json").write_text('{"steps": 10')
    course.judge(run, judge=None)
    (why,) = course.extras.left_out.values()
    assert why.startswith("JSONDecodeError: ")
    assert capsys.readouterr().out == f"judging pixels-s0 left out: {why}\n"
    (row,) = course.outcome((range(9), range(5))).rows
    assert row.verdict == "failed" and row.figures == {}


def test_time_left_is_by_the_pace_of_each_arm():
    flags = Flags(study="lowshot", out="none")
    course = Course(flags, LOWSHOT, grid.grid(LOWSHOT, collapse=("sinkhorn",)), print)
    course.steps = {run.name: 100 for run in course.runs}
    assert course.progress()[2] == "0 of 4 runs done"
    course.standing["masked-s0"] = course.standing["both-sinkhorn-s0"] = grid.DONE
    course.pace = {"masked": (20.0, 100), "both": (60.0, 100)}
    done, total, words = course.progress()
    assert (done, total) == (200, 400)
    assert words == "2 of 4 runs done · about 80 s left"  # two arms of which nothing is known yet: as the average


def test_processes_share_threads_and_gpus(monkeypatch: pytest.MonkeyPatch):
    flags = Flags(study="lowshot", out="none", jobs=3, threads=8)
    assert Course(flags, TINY, [], print).threads == 2
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert environment(1, 2)["OMP_NUM_THREADS"] == "2" and "CUDA_VISIBLE_DEVICES" not in environment(1, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [environment(slot, 1)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert environment(1, 1)["CUDA_VISIBLE_DEVICES"] == "6"
