"""Trials of replayed steps: what they compare and time, which steps are tried and when, and what a run makes of it."""

import json
from pathlib import Path

import pytest
import torch

import kernels
from engine.core import dist
from engine.methods import mae
from engine.training import config, graph_trials, graphs
from engine.training import step as step_module
from engine.training.choosing import FILE, choose
from engine.training.graph_trials import STORED, compare, decide
from engine.training.graphs import UNSEEN
from engine.training.parts import Parts, prepare
from kernels.calibration import circumstances
from kernels.calibration.circumstances import Circumstances
from kernels.calibration.records import Record, machine
from kernels.calibration.tolerance import WrongAnswer
from tests.played import Played

MAE = ("--method", "mae", "--epochs", "1", "--batch-size", "8", "--device", "cpu")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _thawed():
    yield
    kernels.freeze({}, "cpu")


def compared(tmp_path: Path) -> dict:
    (tmp_path / "config.json").write_text(config.parse(MAE).as_json())
    return compare(str(tmp_path), 0, "fp32", False, {}, "cpu", torch.get_num_threads(), False)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "CudaGraph", lambda device: Played())
    monkeypatch.setattr(graph_trials, "ROUND_SECONDS", 0.0)


@pytest.mark.usefixtures("played")
def test_replayed_steps_are_compared_with_steps_as_they_are_and_both_are_timed(tmp_path):
    found = compared(tmp_path)
    assert found["apart"] == [0.0, 0.0]
    assert found["forms"].keys() == {"reference", "replayed"}
    for form in found["forms"].values():
        assert 0 < form["low"] <= form["ms"] <= form["high"] and form["runs"] == 14


@pytest.mark.usefixtures("played")
def test_a_number_that_a_graph_has_frozen_is_found(tmp_path, monkeypatch):
    forward = mae.Mae.forward

    def with_the_step(self, images, ids, drawn):
        report = forward(self, images, ids, drawn)
        return report | {"loss": report["loss"] + 1e-3 * self.moment.step * self.encoder.cls_token.square().sum()}

    monkeypatch.setattr(mae.Mae, "forward", with_the_step)
    with pytest.raises(
        WrongAnswer, match=r"^leaves weights that are .* off, and two runs of steps as they are lie 0 apart$"
    ):
        compared(tmp_path)


def test_a_graph_that_fills_the_card_is_none_to_take():
    graph_trials._check_room(8 * 2**30, 80 * 2**30)
    with pytest.raises(WrongAnswer, match=r"^leaves 7\.0 of 80\.0 GiB for images and probes$"):
        graph_trials._check_room(7 * 2**30, 80 * 2**30)


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a GPU, with a cache of its own."""
    monkeypatch.setattr(graphs, "obstacle", lambda *_: "")
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What trials will find, the next one last."""
    found: list[dict] = []
    monkeypatch.setattr(graph_trials, "_tried", lambda *_: (found.pop(), True))
    return found


def trial(plain: float, replayed: float) -> dict:
    ms = {"reference": plain, "replayed": replayed}
    return {"forms": {name: {"ms": x, "low": 0.99 * x, "high": 1.01 * x, "runs": 14} for name, x in ms.items()}}


def parts(*flags: str) -> Parts:
    return prepare(config.parse([*MAE, *flags]), dist.start("cpu"))


def told(*flags: str) -> tuple[dict[str, str], list[str]]:
    lines: list[str] = []
    return decide(parts(*flags), {}, lines.append), lines


@pytest.mark.usefixtures("able")
def test_a_step_is_tried_once_on_a_machine(trials):
    trials += [trial(3.0, 2.0)]
    found, lines = told()
    assert found == {"mae": ""}
    assert lines == [
        "calibration: a step of stage mae, as it is and replayed from a CUDA graph, at most 300 s",
        "calibration: a step of stage mae takes 3 ms, replayed from a CUDA graph 2",
    ]
    assert told() == (found, lines[1:])  # and nothing is tried
    assert told("--epochs", "2", "--calibrate", "never") == (found, lines[1:])
    trials += [trial(3.0, 2.95)]
    slow = "tried here, it is no faster ({})"
    overlap = "not clearly faster: 2.92 to 2.98 ms against 2.97 to 3.03"
    assert told("--calibrate", "again")[0] == {"mae": slow.format(overlap)}
    trials += [trial(3.0, 4.0)]
    assert told("--batch-size", "16")[0] == {"mae": slow.format("1.33 times as long")}
    assert not trials
    record = Record.of(machine(CPU, torch.get_num_threads()))
    assert len([key for key in record.trials if key.startswith("replayed step | mae | ")]) == 2


@pytest.mark.usefixtures("able")
def test_a_step_that_others_kept_from_the_card_is_tried_by_the_next_run(monkeypatch):
    monkeypatch.setattr(circumstances, "look", lambda *_: Circumstances("a second process cannot use cuda:0 (busy)"))
    why = {"mae": "tried here, it was not compared: a second process cannot use cuda:0 (busy)"}
    for _ in range(2):
        found, lines = told()
        assert found == why and len(lines) == 2
    assert not Record.of(machine(CPU, torch.get_num_threads())).trials


@pytest.mark.usefixtures("able", "trials")
def test_what_is_not_tried():
    assert told("--calibrate", "never") == ({}, [])
    assert parts("--calibrate", "never").ungraphed() == [("mae", UNSEEN)]
    for graphs_flag in ("on", "off"):
        assert told("--graphs", graphs_flag) == ({}, [])
    stored = ("--method", "maect", "--nnclr.reuse", "2", "--batch-size", "8", "--calibrate", "never", "--device", "cpu")
    assert decide(prepare(config.parse(stored), dist.start("cpu")), {}, print) == {"nnclr": STORED}


@pytest.mark.usefixtures("able")
def test_a_child_that_fails_leaves_steps_as_they_are():
    """On a CPU there is no graph to capture."""
    found, lines = told()
    assert found["mae"].startswith("tried here, it raised ")
    assert lines[1].startswith("calibration: a step of stage mae, replayed from a CUDA graph, raised ")
    assert told()[0] == found


@pytest.mark.usefixtures("able")
def test_a_run_keeps_what_it_has_decided(tmp_path, trials):
    trials += [trial(3.0, 2.0)]
    begun, out = parts(), tmp_path / "run"
    out.mkdir()
    choose(begun, out, lambda _: None)
    assert json.loads((out / FILE).read_text())["graphs"] == {"mae": ""}
    assert begun.ungraphed() == [("mae", "")]
    (out / "config.json").write_text(begun.plan.as_json())
    resumed = prepare(config.parse(["--resume", str(out), "--graphs", "auto"]), dist.start("cpu"))
    choose(resumed, out, lambda _: None)
    assert resumed.ungraphed() == [("mae", "")]
