import io
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.training import log
from engine.training.log import RunLog, peak_flops, read_metrics

ROOT = Path(__file__).parents[2]


class Clock:
    """Time that passes only when told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(log, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, _environ={"TERM": "xterm"})


def shown(run: RunLog) -> str:
    return run._console.file.getvalue()


def train(folder, first, last, resume_at=None, stop=lambda step: None):
    """Two stages of 10 steps; logs every second step and probes every fifth, as a loop would."""
    with RunLog(folder, quiet=True) as run:
        if resume_at is not None:
            run.resume(resume_at)
        for step in range(first, last + 1):
            if step == first or step == 11:
                stage = (step - 1) // 10
                run.start_stage(("mae", "nnclr")[stage], stage, 2, 10 * stage, 10, 64)
            run.tick(step)
            if step % 2 == 0:
                run.log(step, {"loss": 1 / step, "lr": 1e-3 * step})
            if step % 5 == 0:
                run.log(step, {"rank_me": float(step), "verdict": "healthy: yes"}, kind="probe")


def timeless(path):
    return [{k: v for k, v in r.items() if k not in log.TIME_FIELDS} for r in read_metrics(path / "metrics.jsonl")]


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


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    train(tmp_path, 1, 9)
    train(tmp_path, 7, 20, resume_at=6)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(2, 21, 2))
    assert losses[-1].value == pytest.approx(1 / 20)
    assert [event.step for event in events.Scalars("probe/rank_me")] == [5, 10, 15, 20]


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


def test_a_line_with_lost_bytes_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n\0\0\0\0\n[1, 2]\n{"step": 2, "loss": 1.0}\n{"step": 3')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("options", [{"folder": None}, {"rank": 1}])
def test_dry_runs_and_other_ranks_write_nothing(tmp_path, options):
    out = console()
    with RunLog(**{"folder": tmp_path / "run", "console": out} | options) as run:
        run.resume(3)
        run.start_stage("mae", 0, 1, 0, 10, 64)
        run.tick(4)
        run.log(4, {"loss": 1.0})
        run.log(4, {"rank_me": 1.0}, kind="probe")
        run.close({"loss": 1.0})
    assert not list(tmp_path.iterdir())
    assert bool(out.file.getvalue()) == (options.get("rank", 0) == 0)


def test_summary_is_strict_and_whole(tmp_path):
    run = RunLog(tmp_path / "run", quiet=True)
    run.close({"knn_top1": 91.0, "stages": [{"loss": math.nan}], "seconds": math.inf, "done": True, "out": tmp_path})
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["knn_top1"] == 91.0
    assert summary["done"] is True
    assert summary["out"] == str(tmp_path)
    assert summary["not_finite"] == {"stages.0.loss": "nan", "seconds": "inf"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["summary.json"]


def test_rates_leave_out_the_first_update_and_time_aside(tmp_path, clock):
    with RunLog(tmp_path, quiet=True, flops_per_image=1e9, peak_flops=1e12) as run:
        run.start_stage("mae", 0, 1, 0, 100, 50)
        clock.now += 60  # compiling
        run.log(1, {"loss": 1.0})
        for step in range(2, 12):
            clock.now += 0.5
            run.tick(step)
            if step == 6:
                with run.aside():
                    clock.now += 1000
        run.log(11, {"loss": 1.0})
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert "images_per_second" not in first
    assert second["images_per_second"] == pytest.approx(50 / 0.5)
    assert second["mfu"] == pytest.approx(100 * 1e9 / 1e12)


def test_no_mfu_without_a_known_peak(tmp_path):
    train(tmp_path, 1, 10)
    assert not any("mfu" in record for record in read_metrics(tmp_path / "metrics.jsonl"))


def test_plain_lines_come_seldom_and_say_what_matters(clock):
    with RunLog(None, console=console(), flops_per_image=2e9, peak_flops=1e12) as run:
        run.start_stage("nnclr", 1, 3, 1000, 1000, 64)
        for step in range(1001, 2001):
            clock.now += 1
            run.tick(step)
            if step % 4 == 0:
                run.log(step, {"loss": 0.51234567, "lr": 1.5e-4})
        run.message("a message")
    lines = shown(run).splitlines()
    assert lines[0] == "stage 2/3 nnclr: step 1,001 to 2,000, 64 images a step"
    assert lines[1].startswith("stage 2/3 nnclr: 4 of 1,000 steps, 17 min left")
    for word in ("loss 0.5123", "lr 1.50e-04", "64 images/s", "MFU 12.8%"):
        assert word in lines[1]
    # 1,000 s: every 10 s for five minutes, then once a minute; two lines more at either end.
    assert 30 + 11 <= len(lines) <= 30 + 11 + 5
    assert lines[-1].startswith("stage 2/3 nnclr: 1,000 of 1,000 steps  ·") or lines[-1] == "a message"
    assert all(len(line) < 120 for line in lines)


def test_slow_steps_show_progress_between_logs(clock):
    with RunLog(None, console=console()) as run:
        run.start_stage("mae", 0, 1, 0, 100, 64)
        for step in range(1, 5):
            clock.now += 30
            run.tick(step)
    assert "mae: 2 of 100 steps, 49 min left" in shown(run)


def test_a_terminal_gets_a_bar_and_messages_above_it():
    with RunLog(None, console=console(terminal=True)) as run:
        run.start_stage("mae", 0, 2, 0, 10, 64)
        for step in range(1, 11):
            run.tick(step)
            run.log(step, {"loss": 0.25, "lr": 1e-3})
        run._live.refresh()
        run.log(10, {"knn_top1": 91.23456, "verdict": "healthy: all is well"}, kind="probe")
        run.start_stage("nnclr", 1, 2, 10, 10, 64)
    text = shown(run)
    assert "━" in text
    assert "10 of 10 steps" in text
    assert "loss 0.25" in text
    assert "probe at step 10: knn_top1 91.23; healthy: all is well" in text
    assert "stage 1/2 mae: 10 of 10 steps in 0 s" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2  # the cursor is hidden, and comes back


def test_the_terminal_is_given_back_when_training_fails():
    run = RunLog(None, console=console(terminal=True))

    def train_and_fail():
        with run:
            run.start_stage("mae", 0, 1, 0, 10, 64)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train_and_fail()
    assert shown(run).rstrip().count("\x1b[?25h") == 1


def test_quiet_shows_nothing(tmp_path, capsys):
    train(tmp_path, 1, 10)
    assert capsys.readouterr().out == ""


def test_a_resumed_stage_goes_on_where_it_was():
    with RunLog(None, console=console()) as run:
        run.resume(7)
        run.start_stage("mae", 0, 1, 0, 10, 64)
        run.log(8, {"loss": 1.0})
    assert "step 8 to 10, 64 images a step (resumed)" in shown(run)
    assert "8 of 10 steps" in shown(run)


def test_unknown_kinds_and_names_of_the_line_are_refused(tmp_path):
    run = RunLog(tmp_path, quiet=True)
    with pytest.raises(ValueError, match="train, probe, event"):
        run.log(1, {"loss": 1.0}, kind="validation")
    with pytest.raises(ValueError, match="step, time cannot be logged"):
        run.log(1, {"step": 1.0, "time": 2.0})


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10", None),
        ("cpu", None),
    ],
)
def test_peak_flops(name, peak):
    assert peak_flops(name) == peak
