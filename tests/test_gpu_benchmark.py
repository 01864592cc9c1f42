"""`python -m benchmarks.gpu`: its record and its tables, on small cases on the CPU; refusals."""

import json

import pytest
import torch
from PIL import Image

from benchmarks import gpu
from benchmarks.kernels.case import Case
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
