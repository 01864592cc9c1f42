import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.training.log import RunLog
from engine.training.metrics import TIME_FIELDS, read_metrics
from tests.training.logged import train

ROOT = Path(__file__).parents[2]


def timeless(path):
    return [{k: v for k, v in r.items() if k not in TIME_FIELDS} for r in read_metrics(path / "metrics.jsonl")]


def test_lines_are_strict_json_with_all_fields(tmp_path):
    with RunLog(tmp_path, quiet=True) as run:
        run.start_stage("mae", 0, 1, 0, 10, 64)
        run.log(3, {"loss": 0.5, "epoch": 2})
        run.log(4, {"loss": math.nan, "grad_norm": -math.inf, "lr": 1e-3})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    first, second = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert {k: first[k] for k in ("step", "stage", "kind", "loss", "epoch")} == {
        "step": 3, "stage": "mae", "kind": "train", "loss": 0.5, "epoch": 2,
    }  # fmt: skip
    assert isinstance(first["time"], float)
    assert second["loss"] is None
    assert second["grad_norm"] is None
    assert second["lr"] == 1e-3
    assert second["not_finite"] == {"loss": "nan", "grad_norm": "-inf"}


@pytest.mark.parametrize(("checkpoint", "reached"), [(7, 7), (7, 9), (10, 13), (12, 17), (0, 4)])
def test_resumed_file_equals_an_uninterrupted_one(tmp_path, checkpoint, reached):
    train(tmp_path / "whole", 1, 20)
    train(tmp_path / "cut", 1, reached)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 18, "stage": "nnc')  # the crash tore this line
    train(tmp_path / "cut", checkpoint + 1, 20, resume_at=checkpoint)
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.aside"))


def test_without_resume_the_file_differs(tmp_path):
    train(tmp_path / "whole", 1, 20)
    train(tmp_path / "cut", 1, 9)
    train(tmp_path / "cut", 8, 20)
    assert timeless(tmp_path / "cut") != timeless(tmp_path / "whole")


def test_a_killed_run_leaves_whole_lines(tmp_path):
    code = """
import sys, pathlib
from engine.training.log import RunLog
run = RunLog(pathlib.Path(sys.argv[1]), quiet=True)
run.start_stage("mae", 0, 1, 0, 10**9, 64)
for step in range(1, 10**9):
    run.log(step, {f"value_{i}": step / 7 for i in range(40)})
    if step == 50: print("going", flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE)
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    assert [json.loads(line)["step"] for line in text.splitlines()] == list(range(1, text.count("\n") + 1))


def test_a_line_with_lost_bytes_or_of_somebody_else_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": %d, "stage": "mae", "kind": "train", "loss": 2.0}' % step for step in (1, 2, 3)]
    path.write_bytes(b"\n".join((lines[0], b"\0\0\0\0", b"[1, 2]", b'{"step": 7}', lines[1], lines[2][:-9])))
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
