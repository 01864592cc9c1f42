"""`python -m benchmarks.throughput`: every method there is, its record, refusals."""

import json

import pytest

from benchmarks import rounds, throughput
from engine import methods

SMALL = [
    "--model",
    "vit_micro_patch8_32",
    "--batch-size",
    "2",
    "--no-compile",
    "--rounds",
    "1",
    "--steps",
    "1",
    "--no-peer",
]


@pytest.mark.long
@pytest.mark.parametrize("method", methods.names())
def test_every_method_is_timed(method: str, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "matrix_product", lambda device, precision: (lambda: None, 1e6))
    out = tmp_path / "record.json"
    assert throughput.main([*SMALL, "--method", method, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert set(record["median"]) == set(record["first_step_seconds"]) == {"ours"}
    ((found,),) = record["rounds"].values()
    assert found["share_of_peak"] == pytest.approx(
        found["images_per_second"] * record["flops_per_image"] / found["peak"]
    )


def test_the_help_names_every_method(capsys):
    with pytest.raises(SystemExit):
        throughput.main(["--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"One of {', '.join(methods.names())}." in said


def test_an_unknown_method_is_refused(capsys):
    assert throughput.main([*SMALL, "--method", "dyno"]) == 2
    assert "method 'dyno' is unknown; choose one of" in capsys.readouterr().err
