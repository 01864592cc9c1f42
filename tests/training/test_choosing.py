"""Which kernels a run takes: what is asked for, what it froze, what a record of this machine shows; never measured twice."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

import kernels
from engine.core import dist
from engine.core.errors import BadInput
from engine.training import choosing, config
from engine.training.calls import calls_of
from engine.training.choosing import FILE, choose
from engine.training.parts import Parts, prepare
from kernels.calibrate import key_of
from kernels.calibration.records import Record, machine
from tests.ranks import torchrun

MAE = ("--method", "mae", "--epochs", "1", "--device", "cpu")
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _thawed():
    yield
    kernels.freeze({}, "cpu")
    kernels.use("auto")


@pytest.fixture
def never_measured(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("it was measured")

    monkeypatch.setattr(choosing, "measure", refuse)


@pytest.fixture
def in_cache(monkeypatch, tmp_path) -> Record:
    """The user's record of this machine, in which flash is twice as fast as the reference for all attention."""
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    record = Record.of(machine(CPU, torch.get_num_threads()))
    shared = {"stable": True, "runs": 7}
    forms = {
        "reference": {"ms": 2.0, "low": 1.9, "high": 2.1} | shared, "flash": {"ms": 1.0, "low": 0.9, "high": 1.1} | shared,
    }  # fmt: skip
    for call in calls_of(config.parse(MAE), CPU, 1, "fp32"):
        if call.op == "packed_attention":
            record.trials[str(key_of(call))] = {"forms": forms}
    record.save()
    return record


def parts(*flags: str) -> Parts:
    return prepare(config.parse([*MAE, *flags]), dist.start("cpu"))


@pytest.mark.usefixtures("never_measured")
def test_a_cpu_without_a_record_runs_the_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    choose(parts(), tmp_path, print)
    assert json.loads((tmp_path / FILE).read_text())["table"] == {}
    assert kernels.frozen() == {}


@pytest.mark.usefixtures("never_measured")
def test_the_users_record_is_taken_frozen_into_the_run_and_kept_when_it_goes_on(tmp_path, in_cache):
    said: list[str] = []
    out = tmp_path / "run"
    out.mkdir()
    choose(parts(), out, said.append)
    table = json.loads((out / FILE).read_text())["table"]
    assert table.keys() == {"packed_attention_forward", "packed_attention_backward"}
    assert {name for by_class in table.values() for name in by_class.values()} == {"flash"}
    assert kernels.frozen() == table
    assert "flash" in kernels.describe()
    (out / "config.json").write_text(config.parse(MAE).as_json())
    kernels.freeze({}, "cpu")
    in_cache.path.unlink()
    choose(prepare(config.parse(["--resume", str(out)]), dist.start("cpu")), out, said.append)
    assert kernels.frozen() == table
    assert said == []


@pytest.mark.usefixtures("never_measured", "in_cache")
def test_what_is_asked_for_by_name_comes_first(tmp_path):
    choose(parts("--kernels", "reference"), tmp_path, print)
    assert kernels.frozen() == {}
    choose(parts("--kernels", "patches=reference"), tmp_path, print)
    assert kernels.frozen() != {}


def resumed(tmp_path: Path, found: str) -> list[str]:
    (tmp_path / "config.json").write_text(config.parse(MAE).as_json())
    (tmp_path / FILE).write_text(found)
    said: list[str] = []
    choose(prepare(config.parse(["--resume", str(tmp_path)]), dist.start("cpu")), tmp_path, said.append)
    return said


@pytest.mark.usefixtures("never_measured")
def test_a_resumed_run_says_what_can_not_run_any_more(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels.choice, "_needs_gpu", {("info_nce", "triton")})
    table = {"packed_attention_forward": {"float32 D32 L9": "flash"}, "info_nce_forward": {"float32 C64": "triton"}}
    said = resumed(tmp_path, json.dumps({"table": table, "machine": {"device": "another"}}))
    assert kernels.frozen() == {"packed_attention_forward": {"float32 D32 L9": "flash"}}
    assert "chosen on another when the run began, kept on" in said[0]
    assert "info_nce_forward float32 C64 was triton (info_nce needs tensors on a GPU" in said[1]
    assert "bits may differ" in said[1]


def test_a_broken_table_ends_a_resumed_run_in_a_sentence(tmp_path):
    with pytest.raises(BadInput, match="is not a table of kernels that this version wrote"):
        resumed(tmp_path, "{")


def test_deterministic_takes_what_is_bit_stable(tmp_path, in_cache):
    here = Record.of(machine(CPU, torch.get_num_threads(), deterministic=True))
    here.trials = {key: {"forms": dict(trial["forms"])} for key, trial in in_cache.trials.items()}
    for trial in here.trials.values():
        trial["forms"]["flash"] = trial["forms"]["flash"] | {"stable": False}
    here.save()
    choose(parts("--deterministic"), tmp_path, print)
    assert kernels.frozen() == {}


TWO_RANKS = """
from engine.core import dist
from engine.core.errors import BadInput
from tests.core.ranks_apart import say
ranks = dist.start("cpu")
made = []
table = dist.from_first(lambda: made.append(1) or {"table": ranks.rank})
say(f"{ranks.rank} {table} {len(made)}")
try:
    dist.from_first(lambda: 1 / 0)
except (BadInput, ZeroDivisionError) as error:
    say(f"{ranks.rank} ended by {error}")
dist.stop()
"""


@pytest.mark.long
def test_of_two_ranks_one_makes_the_table_and_its_failure_ends_both():
    command = torchrun(2, "-c", TWO_RANKS)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "0 ended by division by zero",
        "0 {'table': 0} 1",
        "1 ended by rank 0 failed: ZeroDivisionError: division by zero",
        "1 {'table': 0} 0",
    ]
