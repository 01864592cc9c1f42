"""The command: what is refused, and a study that is stopped and gone on with."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from engine import evals, study
from engine.training import checkpoint
from engine.training.metrics import read_metrics
from tests.studies.small import TINY

ROOT = Path(__file__).parents[1]


def tiny(*arguments: object) -> int:
    return study.main(["tiny", *map(str, arguments)], lambda name: TINY)


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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no study is named; choose one of lowshot, methods, relvit, tokens, tuning."),
        (["highshot"], "study 'highshot' is unknown; choose one of lowshot, methods, relvit, tokens, tuning."),
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
