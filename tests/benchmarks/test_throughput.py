"""`python -m benchmarks.throughput`: every method there is, its record, refusals."""

import importlib.util
import json

import pytest
import torch

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


def test_the_peer_is_timed_in_the_same_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "matrix_product", lambda device, precision: (lambda: None, 1e6))
    built = []

    def peer(options: throughput.Options, device: torch.device, precision: str) -> rounds.Step:
        built.append(options.method)
        return lambda: torch.ones(2).sum()

    monkeypatch.setitem(throughput.PEERS, "mae", ("theirs", peer))
    out = tmp_path / "record.json"
    arguments = [word for word in SMALL if word != "--no-peer"]
    assert throughput.main([*arguments, "--method", "mae", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert built == ["mae"]
    assert record["median"].keys() == record["first_step_seconds"].keys() == {"ours", "theirs"}
    assert record["median"]["theirs"]["ratio"] == 1 > record["median"]["ours"]["ratio"] > 0
    assert record["left_out"] == {}


@pytest.mark.parametrize("method", ["mocov3", "simmim"])
def test_a_peer_that_is_not_installed_is_named(method: str, capsys, monkeypatch):
    monkeypatch.setattr(rounds, "matrix_product", lambda device, precision: (lambda: None, 1e6))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = [word for word in SMALL if word != "--no-peer"]
    assert throughput.main([*arguments, "--method", method]) == 0
    assert "lightly is left out: it is not installed; the dependency group peers has it." in capsys.readouterr().out


def test_peers_are_of_methods_that_exist():
    assert set(throughput.PEERS) <= set(methods.names())


def test_the_help_names_every_method(capsys):
    with pytest.raises(SystemExit):
        throughput.main(["--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"One of {', '.join(methods.names())}." in said


def test_an_unknown_method_is_refused(capsys):
    assert throughput.main([*SMALL, "--method", "dyno"]) == 2
    assert "method 'dyno' is unknown; choose one of" in capsys.readouterr().err


def test_a_graph_that_cannot_be_had_is_refused(capsys):
    assert throughput.main([*SMALL, "--graphs", "--device", "cpu"]) == 2
    assert "--graphs cannot be had for mae: graphs are for GPUs." in capsys.readouterr().err
