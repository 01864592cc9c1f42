"""Which steps a profile watches, what it leaves, and what it doesn't disturb."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

from engine import train as command
from engine.training import profiling
from engine.training.log import RunLog
from engine.training.profiling import Profile
from tests.training.logged import console

CPU = torch.device("cpu")


class Training:
    """A loop over stages whose every step multiplies matrices under a name of its own, with a probe after every step."""

    def __init__(self, folder: Path, steps: int, device: torch.device = CPU):
        self.out = console()
        self.log = RunLog(folder, console=self.out)
        self.device, self.folder = device, folder / "profile"
        self.profile = Profile(steps, folder, device, self.log)
        self.done = 0

    def stage(self, steps: int, each: Callable[[int], None] = lambda step: None) -> None:
        with self.profile.stage("mae", self.done, steps) as watch:
            for _ in range(steps):
                with watch():
                    self.done += 1
                    with record_function(f"update {self.done}"):
                        torch.rand(64, 64, device=self.device) @ torch.rand(64, 64, device=self.device)
                with record_function(f"probe {self.done}"):
                    each(self.done)

    @property
    def said(self) -> list[str]:
        return self.out.file.getvalue().splitlines()

    def traced(self) -> list[str]:
        """The names of updates and probes in the trace, in the order of time."""
        with gzip.open(self.folder / "trace.json.gz") as file:
            events = json.load(file)["traceEvents"]
        named = [e for e in events if e.get("cat") == "user_annotation" and e["name"].split()[0] in ("update", "probe")]
        return [event["name"] for event in sorted(named, key=lambda event: event["ts"])]


def test_the_steps_after_the_first_three_are_watched(tmp_path: Path):
    training = Training(tmp_path, 2)
    training.stage(10)
    assert training.traced() == ["update 4", "probe 4", "update 5"]
    assert {path.name for path in training.folder.iterdir()} == {"operators.txt", "trace.json.gz"}
    table = (training.folder / "operators.txt").read_text()
    assert table.startswith("steps 4 to 5 of the run, stage mae, on cpu: ")
    assert "aten::mm" in table and "Self CPU Mem" in table
    assert training.said == [f"profile of steps 4 to 5: operators.txt, trace.json.gz in {training.folder}"]


def test_one_step_can_be_watched(tmp_path: Path):
    training = Training(tmp_path, 1)
    training.stage(4)
    assert training.traced() == ["update 4"]
    assert training.said[0].startswith("profile of step 4: ")


def test_a_stage_that_ends_ends_the_profile(tmp_path: Path):
    training = Training(tmp_path, 100)
    training.stage(6)
    training.stage(6)
    assert training.traced() == ["update 4", "probe 4", "update 5", "probe 5", "update 6"]
    assert len(training.said) == 1, "there is one profile"


def test_a_stage_that_is_too_short_is_passed_over(tmp_path: Path):
    training = Training(tmp_path, 2)
    training.stage(3)
    training.stage(5)
    assert training.traced() == ["update 7", "probe 7", "update 8"]
    assert training.said[0] == "stage mae is not profiled: fewer than 4 of its steps are left"


@pytest.mark.parametrize(("stops", "traced"), [(2, None), (3, None), (5, ["update 4", "probe 4", "update 5"])])
def test_what_a_stopped_run_has_seen_is_kept(tmp_path: Path, stops: int, traced: list[str] | None):
    training = Training(tmp_path, 10)

    def stop(step: int) -> None:
        if step == stops:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        training.stage(20, stop)
    if traced is None:
        assert training.said == [] and not training.folder.exists()
    else:
        assert training.traced() == [*traced, "probe 5"]


def test_without_it_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(profiling, "profile")
    training = Training(tmp_path, 0)
    training.stage(10)
    assert training.said == []
    assert list(tmp_path.iterdir()) == []


def test_a_newer_profile_replaces_the_older(tmp_path: Path):
    for steps in (1, 3):
        training = Training(tmp_path, steps)
        training.stage(10)
    assert len(training.traced()) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"profile"}


def test_a_full_disk_costs_the_profile_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError("no space left on the device")

    monkeypatch.setattr(profiling, "write_folder", full)
    training = Training(tmp_path, 2)
    training.stage(10)
    assert training.done == 10
    assert training.said == ["the profile is left out: no space left on the device"]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_a_gpu_memory_is_recorded_for_those_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By stand-ins of torch's calls; the next test is the real thing."""
    calls, training = [], Training(tmp_path, 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(
        torch.cuda.memory,
        "_record_memory_history",
        lambda enabled="all", **_: calls.append((f"record {enabled}", training.done)),
    )
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda name: Path(name).write_bytes(b"snapshot"))
    training.profile._device = torch.device("cuda", 0)
    training.stage(10)
    assert calls == ["wait", ("record all", 3), "wait", ("record None", 5)]
    assert {path.name for path in training.folder.iterdir()} == {"operators.txt", "trace.json.gz", "memory.pickle"}


@pytest.mark.gpu
def test_on_a_gpu_kernels_and_memory_are_seen(tmp_path: Path):
    training = Training(tmp_path, 2, torch.device("cuda", 0))
    training.stage(10)
    with gzip.open(training.folder / "trace.json.gz") as file:
        assert any(event.get("cat") == "kernel" for event in json.load(file)["traceEvents"])
    assert "Self CUDA" in (training.folder / "operators.txt").read_text()
    assert (training.folder / "memory.pickle").stat().st_size > 1000


def test_less_than_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert command.main(["--method", "mae", "--out", str(tmp_path / "run"), "--profile", "-1"]) == 2
    assert capsys.readouterr().err.strip() == "error: --profile is -1; it must be 0 or more."
    assert list(tmp_path.iterdir()) == []
