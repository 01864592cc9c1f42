"""TensorBoard itself, and the trackers of `--track` by stand-ins of their packages (tests/training/clients)."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import train as command
from engine.core.errors import BadInput
from engine.training import trackers
from engine.training.log import RunLog
from engine.training.metrics import read_metrics, values_of
from tests.training.logged import console, train

ROOT = Path(__file__).parents[2]
CLIENTS = Path(__file__).with_name("clients")
ALL = ("wandb", "trackio", "mlflow")
CONFIG = {"train": {"method": "mae", "epochs": [2, 1]}, "stages": [{"method": "mae", "batch_size": 64}], "encoder": {}}
# what the trackers read of the environment, and what is set there for them
VARIABLES = (
    "WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME", "WANDB_FINISH_TIMEOUT", "TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL",
    "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "STAND_IN_FAILS",
)  # fmt: skip

Calls = Callable[[str], list[dict]]


def forget_clients() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in (*ALL, "stand_in", "sqlalchemy")]:
        del sys.modules[name]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The stand-ins in place of the packages; what was asked of them, by the call's name."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("STAND_IN_CALLS", str(tmp_path / "calls.jsonl"))
    monkeypatch.syspath_prepend(CLIENTS)
    forget_clients()

    def noted(call: str) -> list[dict]:
        lines = (tmp_path / "calls.jsonl").read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if entry["call"] == call]

    yield noted
    forget_clients()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder that is begun."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "run"


def recorded(folder: Path) -> list[tuple[int, dict]]:
    """What metrics.jsonl holds, as trackers name it."""
    return [
        (record["step"], {f"{record['kind']}/{name}": value for name, value in values_of(record).items()})
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def shown(calls: Calls, name: str) -> list[tuple[int, dict]]:
    """The same of what a tracker was given."""
    if name != "mlflow":
        return [(entry["step"], entry["values"]) for entry in calls(f"{name}.log")]
    given = []
    for entry in calls("mlflow.log_batch"):
        if entry["metrics"]:
            (step,) = {metric["step"] for metric in entry["metrics"]}
            words = {tag["key"]: tag["value"] for tag in entry["tags"]}
            given.append((step, {metric["key"]: metric["value"] for metric in entry["metrics"]} | words))
    return given


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    train(tmp_path, 1, 9)
    train(tmp_path, 7, 20, resume_at=6)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(2, 21, 2))
    assert losses[-1].value == pytest.approx(1 / 20)
    assert [event.step for event in events.Scalars("probe/rank_me")] == [5, 10, 15, 20]


def test_each_tracker_gets_what_the_record_gets(folder: Path, calls: Calls, capsys: pytest.CaptureFixture):
    train(folder, 1, 20, track=ALL)
    for name in ALL:
        assert shown(calls, name) == recorded(folder), name
    assert {"train/loss", "train/lr", "probe/rank_me", "probe/verdict"} <= set().union(
        *(v for _, v in recorded(folder))
    )
    assert capsys.readouterr().out == "", "what the clients say doesn't get into the display"


def test_each_tracker_gets_the_configuration(folder: Path, calls: Calls):
    train(folder, 1, 3, track=ALL)
    assert calls("wandb.init")[0]["config"] == calls("trackio.init")[0]["config"] == CONFIG
    params = {param["key"]: param["value"] for param in calls("mlflow.log_batch")[0]["params"]}
    assert params == {
        "train.method": "mae", "train.epochs": "[2, 1]", "stages.0.method": "mae", "stages.0.batch_size": "64", "encoder": "{}",
    }  # fmt: skip


def test_they_stay_in_the_run_folder(folder: Path, calls: Calls):
    train(folder, 1, 3, track=ALL)
    assert calls("wandb.init")[0]["mode"] == "offline" and calls("wandb.init")[0]["dir"] == str(folder)
    assert calls("trackio.init")[0]["folder"] == str(folder / "trackio")
    assert calls("mlflow.create_run")[0]["uri"] == f"sqlite:///{folder}/mlflow/mlflow.db"
    assert calls("mlflow.create_experiment")[0]["place"].startswith(f"file://{folder}/mlflow")


def test_the_environment_says_otherwise(folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("TRACKIO_DIR", "/shared/trackio")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@tracking.test")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    out = console()
    train(folder, 1, 3, track=ALL, quiet=False, console=out)
    assert "mlflow: run m0, where MLFLOW_TRACKING_URI says\n" in out.file.getvalue(), "no password is shown"
    assert (calls("wandb.init")[0]["mode"], calls("wandb.init")[0]["project"]) == ("online", "mine")
    assert calls("trackio.init")[0]["folder"] == "/shared/trackio"
    assert calls("mlflow.create_run")[0]["uri"] == "http://me:secret@tracking.test"
    assert calls("mlflow.create_experiment") == [{"call": "mlflow.create_experiment", "name": "mine", "place": None}]
    assert not (folder / "mlflow").exists()


def test_a_whole_run_and_a_stopped_one_end_as_such(folder: Path, calls: Calls):
    train(folder, 1, 9, track=ALL)
    train(folder, 10, 20, resume_at=9, track=ALL)
    assert [entry["exit_code"] for entry in calls("wandb.finish")] == [1, 0]
    assert [entry["status"] for entry in calls("mlflow.set_terminated")] == ["KILLED", "FINISHED"]
    assert len(calls("trackio.finish")) == 2


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_resumed_run_goes_on_in_the_same_runs(mode: str, folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", mode)
    train(folder, 1, 9, track=ALL)
    train(folder, 10, 20, resume_at=9, track=ALL)
    first, second = calls("wandb.init")
    assert second["id"] == first["id"]
    assert [entry["id"] for entry in calls("trackio.init")] == [calls("trackio.init")[0]["id"]] * 2
    assert {entry["resume"] for entry in calls("trackio.init")} == {"allow"}
    assert len(calls("mlflow.create_run")) == 1
    assert [(entry["id"], entry["status"]) for entry in calls("mlflow.update_run")] == [("m0", "RUNNING")]
    for name in ("trackio", "mlflow"):
        assert shown(calls, name) == recorded(folder), name
    if mode == "online":
        assert second["resume"] == "allow"
        assert shown(calls, "wandb") == recorded(folder)
    else:  # what is uploaded last replaces the rest, so it is whole
        assert second["resume"] is None
        assert shown(calls, "wandb") == [entry for entry in recorded(folder) if entry[0] <= 9] + recorded(folder)


def test_a_tracker_named_later_is_given_what_came_before(folder: Path, calls: Calls):
    with RunLog(folder, quiet=True) as run:
        run.start_stage("mae", 0, 1, 0, 10, 64)
        run.log(1, {"loss": math.inf, "grad_norm": -math.inf})
        run.log(1, {"storing_features_seconds": 2.5}, kind="event")
    train(folder, 2, 10, resume_at=1, track=ALL)
    for name in ALL:
        assert shown(calls, name) == recorded(folder), name
        assert shown(calls, name)[0] == (1, {"train/loss": math.inf, "train/grad_norm": -math.inf})
    written, logged = read_metrics(folder / "metrics.jsonl")[0]["time"], calls("mlflow.log_batch")[1]["metrics"][0]
    assert logged["timestamp"] == round(1000 * written)


@pytest.mark.parametrize(
    "fails", ["wandb.init", "wandb.log", "wandb.finish", "trackio.init", "mlflow.create_run", "mlflow.log_batch"]
)
def test_a_tracker_that_fails_is_left_out_and_told_once(
    fails: str, folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STAND_IN_FAILS", fails)
    out, failing = console(), fails.split(".")[0]
    train(folder, 1, 20, track=ALL, quiet=False, console=out)
    said = [line for line in out.file.getvalue().splitlines() if "failed" in line]
    reason = f"OSError: {fails}: no answer from http://tracking.test"
    assert said == [f"--track {failing} failed and is left out from here on ({reason})"], "no password is shown"
    assert len(recorded(folder)) == 14
    for name in ALL:
        whole = name != failing or fails == "wandb.finish"
        assert (shown(calls, name) == recorded(folder)) == whole, name


def test_other_ranks_and_dry_runs_know_no_tracker(folder: Path, calls: Calls):
    train(folder, 1, 20, track=ALL, rank=1)
    train(None, 1, 20, track=ALL)
    assert not set(ALL) & set(sys.modules)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_what_is_installed_may_be_named(calls: Calls, monkeypatch: pytest.MonkeyPatch):
    trackers.check(ALL)
    assert not set(ALL) & set(sys.modules), "a check imports nothing"
    found = trackers.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "sqlalchemy" else found(name))
    with pytest.raises(BadInput, match="--track mlflow needs the Python package sqlalchemy"):
        trackers.check(ALL)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.test")  # then its small package does
    trackers.check(ALL)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["comet"], ["--track is 'comet'", "wandb, trackio, mlflow"]),
        (["wandb"], ["--track wandb needs the Python package wandb", "pip install wandb", "leave wandb out"]),
        (["trackio", "mlflow"], ["--track trackio", "pip install trackio"]),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_written(
    names: list[str],
    said: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert command.main(["--method", "mae", "--out", "run", "--track", *names]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert all(word in error for word in said), error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_trackers_name_is_not_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "left_by_a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(trackers.KNOWN, "left_by_a_tracker", trackers.Wandb)
    with pytest.raises(BadInput, match="is not installed"):
        trackers.check(["left_by_a_tracker"])


FAILING = """
import shutil, sys, time
from pathlib import Path
from engine.training.trackers import TensorBoard

folder = Path(sys.argv[1])
board = TensorBoard(folder, None)
board.log(1, "train", {"loss": 1.0}, time.time())
shutil.rmtree(folder)
for step in range(2, 50):
    try:
        board.log(step, "train", {"loss": 1.0}, time.time())
    except OSError as error:
        sys.exit(f"told: {type(error).__name__}")
"""


def test_a_disk_that_fails_is_told_by_the_caller_and_not_by_tensorboard_s_thread_as_well(tmp_path: Path):
    command = [sys.executable, "-c", FAILING, str(tmp_path / "board")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.stderr == "told: FileNotFoundError\n"
