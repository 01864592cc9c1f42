"""Calibration takes what is right and clearly faster, tells why it does not take the others, keeps what it found."""

import json
from pathlib import Path

import pytest
import torch

from kernels import calibrate
from kernels.calibration import circumstances, records
from kernels.calibration.calls import Call
from kernels.calibration.circumstances import Circumstances
from kernels.calibration.records import Record
from kernels.choice import AVAILABLE
from tests.kernels.calibration import planted

CPU = torch.device("cpu")
CALL = Call.of(
    "info_nce_forward",
    {
        "queries": torch.empty(64, 32),
        "keys": torch.empty(4096, 32),
        "targets": torch.empty(64, dtype=torch.int64, device="meta"),
        "temperature": 0.2,
    },
)


@pytest.fixture
def misbehaving(monkeypatch):
    monkeypatch.setitem(AVAILABLE, "info_nce", planted.NAMES)


def measured(home: Path, **how) -> tuple[Record, list[str]]:
    said: list[str] = []
    how = {"seconds": 300, "home": home, "say": said.append} | how
    return calibrate.measure([CALL], CPU, **how), said


@pytest.mark.long
@pytest.mark.usefixtures("misbehaving")
def test_each_that_misbehaves_is_caught_by_its_own_reason_and_the_fastest_right_one_is_taken(tmp_path):
    record, said = measured(tmp_path, preload=("tests.kernels.calibration.planted_here",), prove_seconds=25)
    (trial,) = record.trials.values()
    reasons = {name: form["failure"] for name, form in trial["forms"].items() if "failure" in form}
    expected = {
        "wrong": "output 0 is off by",
        "wrong_gradient": "output 1 is off by",
        "unwritten": "output 0 is off by nan",
        "crashes": "killed by signal SIGSEGV",
        "hangs": "took longer than 25 s and was stopped",
        "leaks": "it keeps",
        "trespasses": "it wrote behind one of its outputs",
        "changes_its_input": "it changed one of its inputs",
        "refuses": "takes rows of 7 channels",
        "runs_out_of_memory": "OutOfMemoryError: CUDA out of memory",
        "missing": "it cannot be imported: No module named",
    }
    assert reasons.keys() == expected.keys()
    for name, sentence in expected.items():
        assert sentence in reasons[name], f"{name}: {reasons[name]}"
    stable = {name: form["stable"] for name, form in trial["forms"].items() if "stable" in form}
    assert stable == {"reference": True, "differs": False, "slower": True, "faster": True}
    table, lines = calibrate.table([CALL], [record], compiles=False)
    assert table == {"info_nce_forward": {"float32 C32": "faster"}}
    for part in (
        "info_nce_forward float32 C32: faster, ",
        "the next takes ",
        "slower: ",
        " times as long",
        "crashes: killed by",
    ):
        assert part in lines[0]
        assert part in said[0]


@pytest.mark.long
def test_what_is_known_is_not_measured_again_and_another_machines_record_is_left_alone(tmp_path, monkeypatch):
    record, said = measured(tmp_path)
    assert len(said) == 1
    content = record.path.read_text()
    again, said = measured(tmp_path)
    assert said == []
    assert again.trials == record.trials
    with monkeypatch.context() as changed:
        changed.setattr(records, "sources", lambda op: "other")
        assert calibrate.table([CALL], [again], compiles=False)[1] == [
            "info_nce_forward float32 C32: reference, for want of a record"
        ]
    other = Record.of(records.machine(CPU, 99), tmp_path)
    assert not other.trials
    other.trials["x"] = {}
    other.save()
    assert record.path.read_text() == content
    assert other.path != record.path
    # what it is shipped for: this kind of device, whatever its libraries
    (tmp_path / "shipped").mkdir()
    shipped = json.loads(content)
    shipped["machine"]["torch"] = "another"
    (tmp_path / "shipped" / "one.json").write_text(json.dumps(shipped))
    (tmp_path / "shipped" / "broken.json").write_text("{")
    assert Record.shipped(record.machine, tmp_path / "shipped").trials == record.trials
    assert not Record.shipped(other.machine, tmp_path / "shipped").trials


def test_what_is_known_of_this_machine_needs_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path))
    record = Record.of(records.machine(CPU, torch.get_num_threads()))
    times = {"stable": True, "runs": 7}
    slow, fast = ({"ms": ms, "low": ms, "high": ms} | times for ms in (2.0, 1.0))
    trials = {
        "packed_attention_forward | float32 D32 L9": {"reference": slow, "flash": fast},
        "packed_attention_forward | float32 D32 L17": {"reference": fast, "flash": slow},
        "soft_cross_entropy_forward | float32 float32 K9": {"reference": slow, "plain": fast},
        "gone_forward | float32": {"reference": slow, "flash": fast},
    }
    for key, forms in trials.items():
        record.trials[f"{key} | {records.sources('packed_attention')}"] = {"forms": forms}
    record.trials["packed_attention_forward | float32 D32 L5 | other"] = {"forms": {"reference": slow, "flash": fast}}
    record.save()
    assert calibrate.known(CPU) == {"packed_attention_forward": {"float32 D32 L9": "flash"}}


@pytest.mark.long
def test_what_others_memory_made_fail_is_tried_again_by_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setitem(AVAILABLE, "info_nce", ("reference", "runs_out_of_memory", "refuses"))
    how = {"preload": ("tests.kernels.calibration.planted_here",)}

    def failures(record: Record) -> list[str]:
        return [name for trial in record.trials.values() for name, form in trial["forms"].items() if "failure" in form]

    monkeypatch.setattr(circumstances, "look", lambda *_: Circumstances("", 30 * 2**30, 80 * 2**30))
    for _ in range(2):
        record, said = measured(tmp_path, **how)
        assert said[0] == "calibration: 50 of the card's 80 GiB are taken; the next run tries again what needs more"
        assert sorted(failures(record)) == ["reference", "refuses", "runs_out_of_memory"]
        assert not Record.of(record.machine, tmp_path).trials
    monkeypatch.setattr(circumstances, "look", lambda *_: Circumstances("", 78 * 2**30, 80 * 2**30))
    record, said = measured(tmp_path, **how)
    assert len(said) == 1 and Record.of(record.machine, tmp_path).trials == record.trials
    assert measured(tmp_path, **how)[1] == []


def test_nothing_is_tried_and_nothing_kept_where_a_second_process_cannot_use_the_device(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))
    record, (said,) = measured(tmp_path)
    assert said.startswith("calibration: not now, a second process cannot use cpu (the child process did not start: ")
    assert not record.trials and not record.path.exists()
    assert calibrate.table([CALL], [record], compiles=False)[0] == {}


def test_what_passes_and_what_stays():
    crowded, alone = Circumstances("", 10, 100), Circumstances("", 95, 100)
    for failure in (
        "raised OutOfMemoryError: CUDA out of memory",
        "CUDA error: out of memory: the device's context is lost",
    ):
        assert crowded.passes(failure) and not alone.passes(failure) and not Circumstances().passes(failure)
    for failure in ("the child process did not start: took longer than 60 s", "killed by signal SIGKILL"):
        assert crowded.passes(failure) and alone.passes(failure)
    for failure in (
        "",
        "killed by signal SIGSEGV",
        "raised OutOfResources: out of resource: shared memory",
        "it leaks",
    ):
        assert not crowded.passes(failure) and not alone.passes(failure)


def test_what_does_not_fit_into_the_time_stays_on_the_reference_and_is_told(tmp_path):
    record, said = measured(tmp_path, seconds=0)
    assert said == ["calibration: 1 of 1 calls did not fit into 0 s; they stay on the reference"]
    assert not record.trials
    assert calibrate.table([CALL], [record], compiles=False)[0] == {}


@pytest.mark.parametrize("wrong", [["--minutes", "0"], ["--ops", "attention"], ["--device", "cuda"]])
def test_a_wrong_flag_is_refused_in_a_sentence(wrong, capsys):
    if wrong[-1] == "cuda" and torch.cuda.is_available():
        return
    with pytest.raises(SystemExit) as ended:
        calibrate.main(wrong)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err
