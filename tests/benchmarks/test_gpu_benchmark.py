"""`python -m benchmarks.gpu`: its record and its tables, on small cases on the CPU; what a crash costs; refusals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import kernels
from benchmarks import gpu, steps, whole_steps
from benchmarks.kernels import bench_packed_attention, bench_sinkhorn, jobs
from benchmarks.kernels.case import BACKWARD, CPU, FORWARD, GPU, Case, prepared
from benchmarks.record import LINES, Record, fold
from kernels.calibration.tolerance import WrongAnswer
from kernels.cost import Cost

ROOT = Path(__file__).parents[2]
PLANTED = """
import os, signal, time, torch
from benchmarks.kernels.case import Case
from kernels.cost import Cost

def double(x):
    return 2 * x

def crash(x):
    os.kill(os.getpid(), signal.SIGSEGV)

def absent(x):
    raise RuntimeError("no such | engine")

def cases(at):
    peers = {"sound": double, "crashes": crash, "absent": absent}
    for name, call in CASES.items():
        yield Case("patches", name, (Cost(8, 8),), lambda: (torch.arange(64.0),), call, double, peers)
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Makes a module of cases, by name and the function that stands for the op, the one that the command times."""

    def plant(cases: str) -> None:
        (tmp_path / "planted_cases.py").write_text(PLANTED + f"\nCASES = {cases}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(gpu, "MODULE", "planted_cases")
        monkeypatch.delitem(sys.modules, "planted_cases", raising=False)

    yield plant
    sys.modules.pop("planted_cases", None)


def run(folder: Path, *arguments: str) -> tuple[int, dict]:
    status = gpu.main(["--cpu", "--no-steps", "--ops", "patches", "--out", str(folder), *arguments])
    return status, json.loads((folder / "record.json").read_text())


@pytest.mark.long
def test_a_record_holds_every_form_of_every_case(tmp_path, capsys):
    status, record = run(tmp_path / "record")
    assert status == 0 and record["ended"] and not record["not_run"] and not record["failed"]
    assert [row["case"] for row in record["kernels"]] == [
        "gather 49 of 196 patches, forward",
        "pixel loss on 147 of 196 patches, forward",
        "pixel loss on 147 of 196 patches, backward",
    ]
    for row in record["kernels"]:
        assert set(row["forms"]) >= {"reference", "formula", "compiled formula"} and "reference" in row["ours"]
        assert all(found["ms"] > 0 for found in row["forms"].values())
        assert row["forms"][row["best_peer"]]["speed_against_best_peer"] == 1
    pixel_loss = next(row for row in record["checks"] if row["case"].startswith("pixel loss"))
    assert [one["of"] for one in pixel_loss["errors"]] == ["output 0", "gradient 0"]
    assert all(0 <= one["error"] <= one["allowed"] for one in pixel_loss["errors"])
    assert record["facts"]["torch"] == torch.__version__ and record["facts"]["float32_matmul_precision"] == "highest"
    table = (tmp_path / "record" / "record.md").read_text()
    assert table.count("| patches |") == len(record["checks"]) + sum(len(row["forms"]) for row in record["kernels"])
    assert Image.open(tmp_path / "record" / "roofline.png").size[0] > 500
    assert str(tmp_path / "record") in capsys.readouterr().out


def test_checks_come_first_those_worth_most_before_and_compiled_peers_last():
    for at in (CPU, GPU):
        names = [job.part for job in gpu.jobs(at, gpu.Options())]
        parts = [part for place, part in enumerate(names) if place == 0 or names[place - 1] != part]
        assert parts == ["facts", "check", "ceilings", "ours", "peers", "step", "profile"] + (
            ["tests", "compiled"] if at is GPU else ["compiled"]
        )
        for part in ("ours", "peers"):
            ops = [job.about["op"] for job in gpu.jobs(at, gpu.Options()) if job.part == part]
            assert list(dict.fromkeys(ops))[:3] == ["soft_cross_entropy", "sinkhorn", "packed_attention"]
    smoke = list(gpu.jobs(CPU, gpu.Options(smoke=True)))
    assert {job.part for job in smoke} == {"facts", "check"}
    assert {job.about["op"] for job in smoke[1:]} == set(gpu.AVAILABLE)


@pytest.mark.long
def test_a_peer_that_crashes_or_is_absent_costs_itself(tmp_path, planted):
    planted('{"a case": double}')
    status, record = run(tmp_path / "r")
    assert status == 0 and record["ended"] and not record["not_run"]
    forms = record["kernels"][0]["forms"]
    assert forms["crashes"] == {"failed": "killed by signal SIGSEGV"}
    assert forms["absent"] == {"failed": "raised RuntimeError: no such | engine"}
    for form in ("reference", "formula", "sound", "compiled formula"):
        assert forms[form]["ms"] > 0
    assert record["checks"][0]["form"] == "reference" and "failed" not in record["checks"][0]
    lines = [json.loads(line) for line in (tmp_path / "r" / LINES).read_text().splitlines()]
    assert "in crash" in next(line["output"] for line in lines if line.get("form") == "crashes")
    table = (tmp_path / "r" / "record.md").read_text()
    assert "does not run: raised RuntimeError: no such / engine" in table


@pytest.mark.long
def test_ours_that_crashes_in_its_check_is_not_timed_and_fails_the_command(tmp_path, planted, monkeypatch):
    planted('{"a case": crash}')
    every_job = gpu.jobs
    monkeypatch.setattr(gpu, "jobs", lambda *of: (job for job in every_job(*of) if job.about.get("ours")))
    status, record = run(tmp_path / "r")
    assert status == 1 and record["ended"]
    assert record["checks"][0]["failed"] == "killed by signal SIGSEGV"
    assert record["kernels"][0]["forms"]["reference"] == {
        "failed": "not timed, its check failed: killed by signal SIGSEGV"
    }


@pytest.mark.long
def test_a_wrong_result_is_told(tmp_path, planted):
    planted("""{"right": double, "off": lambda x: 2 * x + 1e-4 * (x == 7), "no number": lambda x: 2 * x / (x != 7)}""")
    status, record = run(tmp_path / "r", "--smoke")
    assert status == 1 and record["kernels"] == []
    told = {row["case"]: row.get("failed", "") for row in record["checks"] if row["form"] == "reference"}
    assert told.pop("right") == "" and len(told) == 2
    assert all(why.startswith("raised WrongAnswer: output 0 is off by ") for why in told.values())


@pytest.mark.long
def test_a_stopped_command_leaves_lines_that_fold_makes_tables_of(tmp_path, planted):
    planted('{"a case": double, "hangs": lambda x: time.sleep(600)}')
    program = (
        "import sys; from benchmarks import gpu; gpu.MODULE = 'planted_cases'; "
        "sys.exit(gpu.main(['--cpu', '--no-steps', '--ops', 'patches', '--out', sys.argv[1]]))"
    )
    folder = tmp_path / "r"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], env=environment) as command:
        for _ in range(6000):
            if (folder / LINES).exists() and "check patches: a case: reference" in lines_after_the_first(folder):
                break
            time.sleep(0.01)
        command.send_signal(signal.SIGKILL)
    with open(folder / LINES, "a") as file:  # as a machine leaves it that stops meanwhile
        file.write('{"part": "check", "job": "check patches: ha')
    assert gpu.main(["--fold", str(folder)]) == 0
    record = json.loads((folder / "record.json").read_text())
    assert not record["ended"] and record["checks"][0]["case"] == "a case"
    assert "check patches: hangs: reference" in record["not_run"] and "ceilings" in record["not_run"]
    assert "stopped before its end" in (folder / "record.md").read_text()


def lines_after_the_first(folder: Path) -> str:
    return (folder / LINES).read_text().partition("\n")[2]


def test_what_does_not_fit_into_the_time_is_listed(tmp_path):
    arguments = ["--cpu", "--minutes", "0.000001", "--ops", "info_nce", "--out", str(tmp_path / "r")]
    assert gpu.main(arguments) == 0
    record = json.loads((tmp_path / "r" / "record.json").read_text())
    assert record["kernels"] == record["steps"] == record["checks"] == []
    assert "time info_nce: 128 queries, 128 keys, forward: reference" in record["not_run"]
    assert any(name.startswith("maect vit_tiny_patch16_224, compiled") for name in record["not_run"])
    assert any(name.startswith("dino vit_tiny_patch16_224, eager") for name in record["not_run"])


@pytest.mark.long
def test_what_the_end_of_the_time_stops_is_not_run_and_what_hangs_has_failed(tmp_path, planted):
    planted('{"a case": lambda x: time.sleep(600)}')
    about = {"op": "patches", "case": "a case", "form": "reference", "ours": True}
    arguments = {"module": "planted_cases", "name": "a case", "form": "reference", "device": "cpu"}
    hangs, stopped = (gpu.Job("check", name, f"{gpu.JOBS}:check", arguments, seconds, about)
                      for name, seconds in (("hangs", 0.5), ("stopped", 60)))  # fmt: skip
    for job, minutes, failed in ((hangs, 1, {"hangs": "took longer than 0.5 s and was stopped"}), (stopped, 0.02, {})):
        record = Record(tmp_path / job.name, date="today", options={}, available={}, plan=[job.name])
        gpu.work([job], record, 60 * minutes, smoke=True)
        found = fold(record.folder)
        assert found["failed"] == failed and bool(gpu.failures(found)) == bool(failed)
        assert found["not_run"] == [name for name in [job.name] if name not in failed]


def test_an_earlier_record_is_replaced(tmp_path):
    for name in (LINES, "record.json", "record.md", "roofline.png", "notes.md"):
        (tmp_path / name).write_text("from before")
    assert gpu.main(["--cpu", "--minutes", "0.000001", "--no-steps", "--out", str(tmp_path)]) == 0
    assert "from before" not in (tmp_path / LINES).read_text() and not (tmp_path / "roofline.png").exists()
    assert (tmp_path / "notes.md").read_text() == "from before"


def test_a_gpu_s_steps_time_dino_in_its_forms_on_every_implementation():
    planned = [one for one in whole_steps.planned("cuda") if one.name.startswith("dino")]
    forms = {one.implementation: one.options["forms"] for one in planned}
    assert forms.pop("reference") == ["packed", "per-size", "padded"]
    assert forms.keys() >= {"cuda", "triton"} and all(found == ["packed", "per-size"] for found in forms.values())
    for one in planned:
        assert (one.options["model"], one.options["compile"]) == ("vit_large_patch16_224", True)


def test_a_gpu_s_steps_are_replayed_from_graphs_where_they_can_be():
    planned = [one for one in whole_steps.planned("cuda") if one.options.get("graphs")]
    assert [one.options["method"] for one in planned] == list(whole_steps.GRAPHED)
    for one in planned:
        _, encoder, settings = steps.published(one.options["method"], "vit_tiny_patch16_224", one.options["batch_size"])
        assert settings.ungraphed(encoder) == "" and one.options["compile"] and not one.options["peer"]
    assert not any(one.options.get("graphs") for one in whole_steps.planned("cpu"))


@pytest.mark.long
def test_steps_of_dino_are_shown_beside_the_usual_form(tmp_path, monkeypatch):
    dino = next(one for one in whole_steps.planned("cpu") if one.name.startswith("dino"))
    sizes = {"model": "vit_micro_patch8_32", "prototypes": 16, "rounds": 1, "forms": ["packed", "per-size"]}
    arguments = {"implementation": "reference", "benchmark": "multicrop", "options": dino.options | sizes}
    job = gpu.Job("step", dino.name, "benchmarks.whole_steps:measure", arguments, 300)
    monkeypatch.setattr(gpu, "jobs", lambda at, options: iter([job]))
    assert gpu.main(["--cpu", "--out", str(tmp_path / "r")]) == 0
    line = (tmp_path / "r" / "record.md").read_text().splitlines()[-1]
    assert re.search(r"packed [\d.]+ images/s, [\d.]+% of the matrix product, [\d.]+x per-size; per-size", line)


def test_attention_is_checked_on_the_first_and_last_sequences_of_every_length():
    case = next(one for one in bench_packed_attention.cases(CPU) if one.name.startswith("2 x 197"))
    qkv, _, lengths = inputs = case.inputs()
    part, rows = case.part(inputs)
    assert set(part[2]) == set(lengths) and len(part[2]) < len(lengths)
    assert rows[0] == 0 and rows[-1] == len(qkv) - 1 and torch.equal(part[0], qkv[rows])
    whole = case.formula(*inputs)
    torch.testing.assert_close(case.formula(*part), whole[rows])


def test_a_check_finds_a_wrong_gradient(monkeypatch):
    def wrong(x, y):
        return (x * y).sum() + (x - x.detach()).sum() * 1e-3  # the value is right

    case = Case(
        "patches", "a case", (Cost(8, 8),) * 2, lambda: (torch.randn(9), torch.randn(9)), wrong, lambda x, y: (x * y).sum(),
        {}, leaves=(0, 1),
    )  # fmt: skip
    monkeypatch.setattr(jobs, "case", lambda *_: case)
    assert len(jobs.check("", "", "formula", "cpu")["errors"]) == 3
    with pytest.raises(WrongAnswer, match="gradient 0 is off by"):
        jobs.check("", "", "reference", "cpu")


def test_a_function_that_is_compiled_too_often_fails_instead_of_running_uncompiled(monkeypatch):
    compiled = torch.compile(lambda x, n: x * n.value, dynamic=False, backend="eager")

    class Number:
        def __init__(self, value):
            self.value = value

    jobs.fresh()
    try:
        # not by monkeypatch, whose undoing hides the setting from all that is compiled later in this process
        limited = torch._dynamo.config.patch(recompile_limit=2)
        with limited, pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            for i in range(4):
                compiled(torch.ones(2), Number(float(i)))
    finally:
        torch._dynamo.config.fail_on_recompile_limit_hit = False
        torch._dynamo.reset()


def test_a_form_is_timed_forward_without_a_graph_and_backward_on_one_that_is_kept():
    case = Case("patches", "a case", (Cost(8, 8),) * 2, tuple, torch.exp, torch.exp, {}, leaves=(0,))
    x = torch.ones(4)
    assert not prepared(torch.exp, case, FORWARD, (x,))().requires_grad
    call = prepared(torch.exp, case, BACKWARD, (x,))
    assert torch.equal(call()[0], call()[0]) and not x.requires_grad


def test_sinkhorn_on_a_gpu_is_timed_in_all_forms_and_both_precisions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = list(bench_sinkhorn.cases(GPU))
    names = {f"{case.name}, {direction}" for case in found for direction in case.directions}
    assert len(names) == 9
    for case in found:
        assert set(case.forms) >= {"reference", "triton", "cuda", "formula", "compiled formula"}
        assert set(case.ours) >= {"reference", "triton", "cuda"}
    per_element = {
        f"{case.name}, {direction}": cost.bytes / (2048 * 65536)
        for case in found
        for direction, cost in zip(case.directions, case.costs, strict=True)
    }
    # four reads and Q in fp32; three sweeps, then scores and logits; both again, and the gradient
    assert per_element["assignment 2048 x 65536, bfloat16, forward"] == 4 * 2 + 4
    assert per_element["assignment 2048 x 65536, float32, forward"] == 4 * 4 + 4
    assert per_element["cross-entropy 2048 x 65536, bfloat16, forward"] == 3 * 2 + 2 * 2
    assert per_element["cross-entropy 2048 x 65536, bfloat16, backward"] == 3 * 2


@pytest.mark.parametrize(("kind", "other"), [("cuda", "triton"), ("triton", "triton"), ("reference", "reference")])
def test_sinkhorn_s_cross_entropy_is_timed_with_that_of_its_own_kind(monkeypatch, kind, other):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "use", lambda *choice: seen.append(choice))
    case = next(case for case in bench_sinkhorn.cases(GPU) if case.name.startswith("cross-entropy"))
    form = case.ours[kind]
    for _ in range(2):
        assert torch.isfinite(form(*torch.randn(2, 8, 5)))
    assert seen == [(kind, "sinkhorn"), (other, "soft_cross_entropy")]


@pytest.mark.long
def test_neither_the_loader_nor_the_command_line_is_needed_for_the_kernels(tmp_path):
    program = """
import sys
absent = ("tyro", "rich", "nvidia.dali", "timm", "pytest", "matplotlib", "PIL", "torchvision", "sklearn")
sys.modules |= dict.fromkeys(absent)  # whoever imports one of them fails
from benchmarks import gpu
from benchmarks.kernels import jobs
from benchmarks.kernels.case import CPU
assert len(list(gpu.jobs(CPU, gpu.Options()))) > 50
assert jobs.check("benchmarks.kernels.bench_patches", "gather 49 of 196 patches", "reference", "cpu")["errors"]
sys.exit(gpu.main(["--cpu", "--minutes", "0.000001", "--out", sys.argv[1]]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "r")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Not run" in (tmp_path / "r" / "record.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--cpu", "--ops", "softmax"], "--ops has no kernel 'softmax'; choose from adamw, info_nce"),
        (["--cpu", "--minutes", "-1"], "--minutes is -1; it must be above 0"),
        (["--cpu", "--minutes", "soon"], "argument --minutes: invalid float value: 'soon'; --help lists all flags."),
        (["--cpu", "--steeps"], "unrecognized arguments: --steeps; --help lists all flags."),
        (["--fold", "no_such_folder"], "there is no record in 'no_such_folder': it has no file record.jsonl."),
        (["--cpu", "--out", __file__], "which is a file; give a folder."),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, sentence, capsys):
    assert gpu.main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_folding_needs_lines_of_a_record(tmp_path):
    (tmp_path / LINES).write_text('{"part": "check"}\n')
    with pytest.raises(ValueError, match="is no record: its first line is not the start of one"):
        fold(tmp_path)
