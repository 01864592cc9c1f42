"""`python -m benchmarks.gpu`: its record and its tables, on small cases on the CPU; refusals."""

import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

import kernels
from benchmarks import gpu, multicrop
from benchmarks.kernels import bench_sinkhorn
from benchmarks.kernels.case import CPU, GPU, Case
from kernels.cost import Cost


@pytest.mark.long
def test_a_record_holds_every_form_of_every_case(tmp_path, capsys):
    folder = tmp_path / "record"
    arguments = ["--cpu", "--no-steps", "--ops", "patches", "--out", str(folder)]
    assert gpu.main(arguments) == 0
    record = json.loads((folder / "record.json").read_text())
    assert [row["case"] for row in record["kernels"]] == [
        "gather 49 of 196 patches",
        "pixel loss on 147 of 196 patches, forward",
        "pixel loss on 147 of 196 patches, backward",
    ]
    for row in record["kernels"]:
        assert set(row["forms"]) == {"reference", "plain", "compiled plain"}
        assert all(found["ms"] > 0 for found in row["forms"].values())
        assert row["forms"][row["best_peer"]]["speed_against_best_peer"] == 1
    table = (folder / "record.md").read_text()
    assert table.count("| patches |") == 9
    assert Image.open(folder / "roofline.png").size[0] > 500
    assert str(folder) in capsys.readouterr().out.replace("\n", "")


def test_a_peer_that_fails_is_told_and_ours_fails_the_command(tmp_path, monkeypatch):
    def broken(x):
        raise RuntimeError("no such engine")

    def case(ours):
        forms = {"fine": lambda x: lambda: x + 1, "broken": broken}
        return Case("patches", "a case", Cost(8, 8), lambda: (torch.zeros(4),), forms, ours)

    for ours, status in ((("fine",), 0), (("broken",), 1)):
        monkeypatch.setattr(gpu, "cases", lambda at, ops, ours=ours: iter([case(ours)]))
        assert gpu.main(["--cpu", "--no-steps", "--out", str(tmp_path / str(status))]) == status
        table = (tmp_path / str(status) / "record.md").read_text()
        assert "does not run: RuntimeError: no such engine" in table


def test_what_does_not_fit_into_the_time_is_listed(tmp_path):
    assert gpu.main(["--cpu", "--minutes", "0.001", "--ops", "info_nce", "--out", str(tmp_path / "r")]) == 0
    record = json.loads((tmp_path / "r" / "record.json").read_text())
    assert record["kernels"] == record["steps"] == []
    assert "info_nce: 128 queries, 128 keys, forward" in record["not_run"]
    assert any(name.startswith("maect vit_tiny_patch16_224, compiled") for name in record["not_run"])
    assert any(name.startswith("dino vit_tiny_patch16_224, eager") for name in record["not_run"])


def test_a_gpu_s_steps_time_dino_in_its_forms_on_every_implementation():
    planned = [one for one in gpu.planned_steps(GPU) if one.name.startswith("dino")]
    forms = {one.implementation: one.measure.args[0].forms for one in planned}
    assert forms == {
        "reference": ("packed", "per-size", "padded"),
        "plain": ("packed", "per-size"),
        "cuda": ("packed", "per-size"),
        "triton": ("packed", "per-size"),
    }
    for one in planned:
        options = one.measure.args[0]
        assert (options.model, options.prototypes, options.compile) == ("vit_large_patch16_224", 65536, True)


@pytest.mark.long
def test_steps_of_dino_are_shown_beside_the_usual_form(tmp_path, monkeypatch):
    dino = [replace(one, seconds=0) for one in gpu.planned_steps(CPU) if one.name.startswith("dino")]
    options = replace(dino[0].measure.args[0], model="vit_micro_patch8_32", prototypes=16, rounds=1)
    planned = [replace(dino[0], measure=partial(multicrop.measure, options))]
    monkeypatch.setattr(gpu, "planned_steps", lambda at: iter(planned))
    monkeypatch.setattr(gpu, "cases", lambda at, ops: iter([]))
    monkeypatch.setattr(gpu, "profile", lambda at: [])
    assert gpu.main(["--cpu", "--out", str(tmp_path / "r")]) == 0
    line = (tmp_path / "r" / "record.md").read_text().splitlines()[-1]
    assert re.search(r"packed [\d.]+ images/s, [\d.]+% of the matrix product, [\d.]+x per-size; per-size", line)


def test_sinkhorn_on_a_gpu_is_timed_in_all_forms_and_both_precisions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = list(bench_sinkhorn.cases(GPU))
    assert len({case.name for case in found}) == len(found) == 9
    assert {tuple(case.forms) for case in found} == {
        ("reference", "plain", "triton", "cuda", "published", "compiled published")
    }
    per_element = {case.name: case.cost.bytes / (2048 * 65536) for case in found}
    # four reads and Q in fp32; three sweeps, then scores and logits; both again, and the gradient
    assert per_element["assignment 2048 x 65536, bfloat16"] == 4 * 2 + 4
    assert per_element["assignment 2048 x 65536, float32"] == 4 * 4 + 4
    assert per_element["cross-entropy 2048 x 65536, bfloat16, forward"] == 3 * 2 + 2 * 2
    assert per_element["cross-entropy 2048 x 65536, bfloat16, backward"] == 3 * 2


def test_sinkhorn_s_cross_entropy_is_timed_with_that_of_its_own_kind(monkeypatch):
    seen = []
    monkeypatch.setattr(bench_sinkhorn, "chosen", lambda op, device: "cuda")
    monkeypatch.setattr(kernels, "use", lambda *choice: seen.append(choice))
    scores = torch.randn(2, 8, 5)
    assert torch.isfinite(bench_sinkhorn.cross_entropy(*scores))
    assert seen == [("triton", "soft_cross_entropy")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--cpu", "--ops", "softmax"], "--ops has no kernel 'softmax'; choose from info_nce"),
        (["--cpu", "--minutes", "-1"], "--minutes is -1; it must be above 0"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, sentence, capsys):
    assert gpu.main(arguments) == 2
    assert sentence in capsys.readouterr().err
