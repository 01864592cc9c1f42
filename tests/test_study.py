"""Studies: the grid and its equal conditions, going on after a stop, what is refused, and what a study leaves."""

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from engine import evals, studies, study
from engine.core import dist
from engine.core.errors import BadInput
from engine.studies import Arm, Study, grid, report
from engine.studies.report import Judged, Outcome
from engine.training import checkpoint
from engine.training.build import build
from engine.training.log import read_metrics
from engine.training.parts import prepare

ROOT = Path(__file__).parents[1]
LOWSHOT = studies.get("lowshot")
TINY = Study(
    name="tiny",
    title="Tiny",
    arms=(
        Arm("crops", "dino", ("--dino.prototypes", "48", "--dino.head-hidden", "32", "--dino.bottleneck", "16")),
        Arm("pixels", "mae", ("--mae.decoder-depth", "1"), clusters=False),
    ),
    collapse=("centring", "sinkhorn"),
    fixed={"flip": 0.0},
    shared=("crop_scale",),
    reference="crops",
    epochs=2,
    shots=(1, 2, 200),
    percents=(1.0,),
    cadence=("--save-every", "0", "--log-every", "1", "--probe-every", "0"),
)


CHAIN = Study(
    name="chain",
    title="Chain",
    arms=(
        Arm("pixels", "mae", ("--mae.decoder-depth", "1", "--mae.epochs", "1"), clusters=False),
        Arm("neighbours", "maect", ("--maect.epochs", "1"), clusters=False, after="pixels"),
    ),
    protocols=("knn", "cluster"),
    minutes=True,
)


def tiny(*arguments: object) -> int:
    return study.main(["tiny", *map(str, arguments)], lambda name: TINY)


def test_the_grid_is_arms_by_collapse_and_an_arm_without_prototypes_runs_once_per_seed():
    runs = grid.grid(LOWSHOT)
    assert [run.name for run in runs] == [
        "contrastive-s0",
        "clustering-centring-s0", "clustering-me-max-s0", "clustering-sinkhorn-s0",
        "masked-s0",
        "both-centring-s0", "both-me-max-s0", "both-sinkhorn-s0",
    ]  # fmt: skip
    for run in runs:
        ((_, settings),) = run.plan.stages
        weights = {name: value for name, value in vars(settings).items() if name.endswith("_weight")}
        on = {name for name, value in weights.items() if value and name != "me_max_weight"}
        assert (
            on
            == {
                "contrastive": {"contrast_weight"},
                "clustering": {"class_weight", "patch_weight"},
                "masked": {"pixel_weight"},
                "both": {"class_weight", "patch_weight", "pixel_weight"},
            }[run.arm.name]
        )
        assert not run.collapse or settings.collapse == run.collapse
        assert settings.epochs == LOWSHOT.epochs
    assert len(grid.grid(LOWSHOT, seeds=(3, 4))) == 16
    some = grid.grid(LOWSHOT, seeds=(1,), arms=("both", "masked"), collapse=("sinkhorn",), epochs=2, batch_size=32)
    assert [run.name for run in some] == ["masked-s1", "both-sinkhorn-s1"]
    assert {(run.plan.stages[0][1].epochs, run.plan.stages[0][1].batch_size) for run in some} == {(2, 32)}


def test_all_arms_see_the_same_images_crops_and_masks():
    ranks = dist.start("cpu")
    seen = {}
    of_seed = {0: (), 1: ("both",)}
    runs = [
        grid.grid(LOWSHOT, collapse=("centring",), batch_size=8, seeds=(seed,), arms=arms)
        for seed, arms in of_seed.items()
    ]
    for run in chain(*runs):
        parts = prepare(run.plan, ranks)
        state = build(parts, 0, None)
        loader = parts.loader(state)
        steps = [(next(loader), state.method.draw(parts.draws(0, step))) for step in range(2)]
        loader.close()
        seen.setdefault(run.seed, []).append(steps)
    for steps in zip(*seen[0], strict=True):
        (first, drawn), *others = steps
        for batch, also in others:
            assert torch.equal(batch.ids, first.ids)
            assert len(batch.images) == len(first.images) == 2
            assert all(torch.equal(mine, its) for mine, its in zip(batch.images, first.images, strict=True))
            assert also.keys() == drawn.keys() >= {"corrupted", "alien"}
            assert all(torch.equal(also[name], drawn[name]) for name in drawn)
    (other, differently), (first, drawn) = seen[1][0][0], seen[0][0][0]
    assert not torch.equal(other.ids, first.ids) and not torch.equal(differently["corrupted"], drawn["corrupted"])


def test_an_arm_starts_from_the_run_of_its_seed_and_waits_for_it(tmp_path: Path):
    runs = grid.grid(CHAIN, tmp_path, seeds=(0, 1), arms=("neighbours",))
    assert [(run.name, run.after) for run in runs] == [
        ("pixels-s0", ""), ("neighbours-s0", "pixels-s0"), ("pixels-s1", ""), ("neighbours-s1", "pixels-s1"),
    ]  # fmt: skip
    assert runs[1].plan.train.weights == str(tmp_path / "pixels-s0")
    assert [name for name, _ in runs[1].plan.stages] == ["nnclr", "maect"]
    course = study.Course(study.Flags(study="chain", out=str(tmp_path)), CHAIN, runs, print)
    assert [run.name for run in course.waiting()] == ["pixels-s0", "pixels-s1"]
    course.standing["pixels-s0"], course.failed["pixels-s1"] = grid.DONE, "status 2: no luck."
    assert [run.name for run in course.waiting()] == ["neighbours-s0"]
    assert course.failed["neighbours-s1"] == "pixels-s1, which it starts from, failed"
    with pytest.raises(BadInput, match="--epochs is not for study chain"):
        grid.grid(CHAIN, epochs=3)


def test_time_of_training_is_by_the_logged_pace(tmp_path: Path):
    stages = [{"method": "mae", "batch_size": 8}, {"method": "maect", "batch_size": 4}]
    (tmp_path / "config.json").write_text(json.dumps({"stages": stages}))
    records = [
        {"kind": "train", "stage": "mae", "step": 10},  # compiling: no pace yet, so the next one's
        {"kind": "train", "stage": "mae", "step": 20, "images_per_second": 8.0},
        {"kind": "probe", "stage": "mae", "step": 20},
        {"kind": "event", "stage": "mae", "step": 20, "storing_features_seconds": 7.0},
        {"kind": "train", "stage": "maect", "step": 25, "images_per_second": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert grid.trained_seconds(tmp_path) == 10 + 10 + 7 + 5 * 4 / 2


@pytest.mark.parametrize("flag", [("--mmc.crop-scale", "0.3", "1"), ("--mmc.drop", "0.4", "0.4")])
def test_an_arm_that_is_not_equal_is_found(flag: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    arms = (LOWSHOT.arms[0], LOWSHOT.arms[3])
    equal = replace(LOWSHOT, arms=arms, shared=("crop_scale",))
    grid.grid(equal)
    parse = grid.config.parse
    monkeypatch.setattr(grid.config, "parse", lambda words: parse([*words, *(flag if "mmc" in words else ())]))
    name = flag[0].removeprefix("--mmc.").replace("-", "_")
    with pytest.raises(ValueError, match=f"contrastive and both differ in {name}"):
        grid.grid(replace(equal, shared=("crop_scale", "drop")))


@pytest.mark.long
def test_a_stopped_study_goes_on_and_what_is_done_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["--arms", "pixels", "--batch-size", 256, "--threads", 1, "--out", tmp_path / "out"]
    run = tmp_path / "out" / "runs" / "pixels-s0"
    script = "from tests.test_study import *; sys.exit(tiny(*sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    while not (run / "metrics.jsonl").exists() or not read_metrics(run / "metrics.jsonl"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped; the same command goes on: python -m engine.study" in output
    assert "pixels-s0  new" in output and "pixels-s0: starts" in output
    assert not (run / "summary.json").exists()
    (saved,) = checkpoint.found(run / "checkpoints")
    assert 1 <= int(saved.name.removeprefix("step-")) < 10

    assert tiny(*arguments) == 0
    output = capsys.readouterr().out
    assert f"half-trained, goes on from step {int(saved.name.removeprefix('step-'))}" in output
    assert "lowshot 200-shot" in output  # too many for the digits, and left out
    commands = [
        line for line in (tmp_path / "out" / "logs" / "pixels-s0.log").read_text().splitlines() if line.startswith("$")
    ]
    assert len(commands) == 2 and "--resume" not in commands[0] and commands[1].endswith(f"--resume {run}")
    steps = [record["step"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]
    assert steps == list(range(1, 11))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (found,) = results["runs"]
    assert len(found["figures"]["1-shot"]) == 3 and found["command"].endswith(str(run))
    assert set(found["figures"]) == {"k-NN", "1-shot", "2-shot", "1%"}
    assert [row["arm"] for row in results["table"]] == ["raw pixels", "untrained", "pixels"]
    assert results["table"][0]["figures"]["k-NN"][0] > 0.9
    assert Image.open(tmp_path / "out" / "tiny.png").size[0] > 300

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("nothing is left to train or to judge")

    written = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", forbidden)
        patch.setattr(evals, "evaluate", forbidden)
        assert tiny(*arguments, "--jobs", 2, "--device", "cpu") == 0  # how it runs may differ
    assert "pixels-s0  done" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"] == results["runs"]

    assert tiny(*arguments, "--epochs", 7) == 2
    out, err = capsys.readouterr()
    assert f"{run} holds a run with other settings: epochs is [2] there and [7] now and 1 more" in err
    assert err.count("\n") == 1 and not out
    assert written == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


@pytest.fixture
def course(tmp_path: Path) -> study.Course:
    flags = study.Flags(study="tiny", out=str(tmp_path / "out"), arms=("pixels",))
    return study.Course(flags, TINY, grid.grid(TINY, arms=flags.arms), print)


def leave(course: study.Course, step: int | None = None, **changes: object) -> Path:
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


def test_a_published_set_gives_every_run_its_model_and_sizes():
    runs = grid.grid(LOWSHOT, data="tiny-imagenet:/data")
    assert len(runs) == 8
    for run in runs:
        encoder = run.plan.encoder
        assert (run.plan.model, encoder["img_size"], encoder["patch_size"]) == ("vit_small_patch16_224", [64, 64], 8)


def test_a_killed_run_goes_on_from_its_newest_sound_checkpoint(course: study.Course, monkeypatch: pytest.MonkeyPatch):
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


def test_a_run_killed_before_its_first_checkpoint_starts_again(course: study.Course, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    (run,) = course.runs
    folder = leave(course)
    course.look()
    course.start(run, lock=0)
    assert not folder.exists()
    words = course.active[0].process.words
    assert words[-2:] == ["--out", str(folder)] and "--resume" not in words and "--no-evaluate" in words


def test_only_a_run_with_todays_settings_counts(course: study.Course):
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


def test_a_run_that_fails_is_told_and_the_others_go_on(course: study.Course, tmp_path: Path):
    (run,) = course.runs
    course.steps[run.name] = 10
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", "print('error: no luck.\\n'); raise SystemExit(2)"], stdout=file
        )
    process.wait()
    course.active.append(study.Training(run, 0, process, course.folder(run), log, 0))
    assert course.collect() == [] and course.waiting() == [] and course.active == []
    assert course.failed == {"pixels-s0": "status 2: no luck."}
    images = (range(9), range(5))
    (row,) = course.outcome(images).rows
    assert row.verdict == "failed" and row.figures == {}


def test_time_left_is_by_the_pace_of_each_arm():
    flags = study.Flags(study="lowshot", out="none")
    course = study.Course(flags, LOWSHOT, grid.grid(LOWSHOT, collapse=("sinkhorn",)), print)
    course.steps = {run.name: 100 for run in course.runs}
    assert course.progress()[2] == "0 of 4 runs done"
    course.standing["masked-s0"] = course.standing["both-sinkhorn-s0"] = grid.DONE
    course.pace = {"masked": (20.0, 100), "both": (60.0, 100)}
    done, total, words = course.progress()
    assert (done, total) == (200, 400)
    assert words == "2 of 4 runs done · about 80 s left"  # two arms of which nothing is known yet: as the average


def test_a_killed_study_is_not_begun_beside_the_training_it_left(tmp_path: Path):
    with study.locked(tmp_path / "out") as lock:
        left = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
        with pytest.raises(BadInput, match="at work"), study.locked(tmp_path / "out"):
            pass
    with pytest.raises(BadInput, match="at work"), study.locked(tmp_path / "out"):
        pass
    left.kill()
    left.wait()
    with study.locked(tmp_path / "out"):
        pass


def test_processes_share_threads_and_gpus(monkeypatch: pytest.MonkeyPatch):
    flags = study.Flags(study="lowshot", out="none", jobs=3, threads=8)
    assert study.Course(flags, TINY, [], print).threads == 2
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert study.environment(1, 2)["OMP_NUM_THREADS"] == "2" and "CUDA_VISIBLE_DEVICES" not in study.environment(1, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [study.environment(slot, 1)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert study.environment(1, 1)["CUDA_VISIBLE_DEVICES"] == "6"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no study is named; choose one of lowshot, methods, relvit, tuning."),
        (["highshot"], "study 'highshot' is unknown; choose one of lowshot, methods, relvit, tuning."),
        (["lowshot", "--arms", "masked", "supervised"], "--arms has 'supervised'; choose from contrastive, clustering"),
        (["lowshot", "--collapse", "none"], "--collapse has 'none'; choose from centring, me-max, sinkhorn."),
        (["lowshot", "--seeds", "1", "1"], "--seeds names something twice"),
        (["lowshot", "--seeds", "-1"], "--seeds"),
        (["lowshot", "--jobs", "0"], "--jobs is 0; it must be 1 or more."),
        (["lowshot", "--epochs", "-1"], "--epochs is -1; it must be 0 or more."),
        (["lowshot", "--device", "tpu"], "choose one of auto, cpu, cuda"),
        (["lowshot", "--batch-size", "5000"], "there are 1437 training images"),
        (["lowshot", "--model", "resnet50"], "resnet50"),
        (["lowshot", "--data", "/none"], "/none is no folder"),
        (["lowshot", "--data", "FLAT", "--model", "vit_micro_patch8_32", "--batch-size", "1"], "no val split"),
        (["lowshot", "--out", "FLAT/image.png"], "FLAT/image.png"),
        (["lowshot", "--bogus"], "--bogus"),
    ],
)
def test_bad_input_gets_one_sentence_and_nothing_is_written(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (32, 32)).save(flat / "image.png")
    assert study.main([argument.replace("FLAT", str(flat)) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert sentence.replace("FLAT", str(flat)) in err and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert [path.name for path in tmp_path.iterdir()] == ["flat"]


def outcome(seeds: tuple[int, ...] = (0, 1)) -> Outcome:
    figures = {"k-NN": [0.5], "1-shot": [0.2, 0.3, 0.4], "5-shot": [0.5, 0.6, 0.7], "1%": [0.3, 0.3, 0.3]}
    judged = []
    for run in grid.grid(LOWSHOT, seeds=seeds):
        verdict = "healthy: all well"
        if (run.arm.name, run.collapse, run.seed) == ("both", "centring", 0):
            verdict = "collapsing: all the same"
        missing = run.arm.name == "clustering" and run.collapse == "me-max"
        judged.append(
            Judged(
                run.arm.name, run.collapse, run.seed, {} if missing else figures, "not done yet" if missing else verdict
            )
        )
    return Outcome(LOWSHOT, "on something", tuple(judged), (Judged("raw pixels", None, None, figures),))


def test_table_marks_what_collapsed_and_shows_what_is_missing(tmp_path: Path):
    report.write(tmp_path, outcome())
    text = (tmp_path / "table.md").read_text()
    assert "| both | centring | 50.0 ± 0.0 | 30.0 ± 8.2 | 60.0 ± 8.2 | 30.0 ± 0.0 | **collapsing (1 of 2)** |" in text
    assert "| clustering | me-max |  |  |  |  | not done yet |" in text
    assert text.count("\n| masked | any (no prototypes) |") == 1
    assert "both, centring: collapsing (1 of 2)." in text and "Contrastive and masked have no prototypes" in text
    assert "splits and seeds" in text and "one seed does not show" not in text
    assert "one seed does not show" in report.markdown(outcome((0,)))
    with (tmp_path / "table.csv").open() as file:
        rows = {(row["pretext"], row["collapse"]): row for row in csv.DictReader(file)}
    assert len(rows) == 9
    assert float(rows["both", "sinkhorn"]["1-shot (%)"]) == 30 and rows["both", "sinkhorn"]["seeds"] == "0 1"
    assert rows["clustering", "me-max"]["1-shot (%)"] == ""
    whole = json.loads((tmp_path / "results.json").read_text())
    assert len(whole["runs"]) == 16 and whole["table"][1]["figures"]["1-shot"] == [0.2, 0.3, 0.4] * 2
    console = Console(width=80, record=True)
    console.print(report.table(outcome((0,))))
    shown = console.export_text()
    assert "30.0±8.2" in shown and "collapsing" in shown and "…" not in shown


def test_a_study_of_own_recipes_has_times_and_no_column_of_operators():
    judged = [
        Judged(arm.name, "", seed, {"k-NN": [0.5], "cluster ACC": [0.4]}, "healthy: yes", seconds=60.0 * (1 + seed))
        for arm in CHAIN.arms
        for seed in (0, 1)
    ]
    whole = Outcome(CHAIN, "on something", tuple(judged), (Judged("raw pixels", None, None, {"k-NN": [0.9]}),))
    text = report.markdown(whole)
    assert "| pretext | k-NN | cluster ACC | minutes | verdict |" in text
    assert "| neighbours | 50.0 ± 0.0 | 40.0 ± 0.0 | 1.5 | healthy |" in text
    assert "| raw pixels | 90.0 |  |  |  |" in text
    assert "own recipe's" in text and "no prototypes" not in text and "k-means" in text
    console = Console(width=80, record=True)
    console.print(report.table(whole))
    assert "1.5" in console.export_text()


def test_figure_has_a_panel_for_each_operator_and_names_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures = []
    monkeypatch.setattr(report, "write_file", lambda path, write: figures.append(write.__closure__[0].cell_contents))
    report.draw(tmp_path / "x.png", outcome())
    (figure,) = figures
    named = {panel.get_title(loc="left"): [text.get_text() for text in panel.texts] for panel in figure.axes}
    assert list(named) == ["centring", "me-max", "sinkhorn"]
    assert set(named["sinkhorn"]) == {"raw pixels", "contrastive", "clustering", "masked", "both"}
    assert set(named["me-max"]) == {"raw pixels", "contrastive", "masked", "both"}, "what is missing has no line"
    assert "both (collapsed)" in named["centring"]
    for panel in figure.axes:
        boxes = sorted((text.get_window_extent() for text in panel.texts), key=lambda box: box.y0)
        assert all(lower.y0 + 8 < upper.y0 for lower, upper in pairwise(boxes)), "labels stand apart"
    report.draw(tmp_path / "y.png", replace(outcome(), judged=(), yardsticks=()))


def test_labels_move_as_little_as_needed():
    assert report.apart([], 10) == []
    assert report.apart([0, 50], 10) == [0, 50]
    assert report.apart([20, 20], 10) == [15, 25]
    assert report.apart([0, 1, 2, 80], 10) == pytest.approx([-9, 1, 11, 80])
