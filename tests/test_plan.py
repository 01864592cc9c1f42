"""`engine.plan`: what it prints, writes and refuses. Counts are made up here but for one, which is counted."""

import json
import shlex

import pytest

from engine import plan
from engine.planning.cards import CARDS
from tests.planning.counts import GB, made

RUN = ["--method", "maect", "--model", "vit_small_patch16_224"]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list:
    """What was asked to be counted: the flags, the stage and the precision of each."""
    asked = []

    def count(parsed, flags, portion, gpus, precision):
        asked.append((tuple(flags), portion.name, precision))
        micro = parsed.train.accumulate * {"none": 1, "selective": 2, "blocks": 5}[parsed.train.recompute]
        return made(peak=made().peak | {"activations": 100 * GB // micro})

    monkeypatch.setattr(plan, "count", count)
    return asked


def test_the_bill_of_every_stage_is_printed_and_written(counts, tmp_path, capsys):
    out = tmp_path / "bill.json"
    assert plan.main([*RUN, "--gpu", "H200", "--gpus", "8", "--price", "2.5", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for words in ("8 x H200, bf16, compiled", "not calibrated on a card yet", "1,281,167 images", "dollars", "kWh"):
        assert words in said, words
    stages = json.loads(out.read_text())["stages"]
    assert [of["stage"] for of in stages] == ["mae", "nnclr", "maect"]
    for of in stages:
        low, likely, high = of["hours"]
        assert 0 < low < likely < high
        assert of["dollars"] == [pytest.approx(8 * 2.5 * hours) for hours in of["hours"]]
        slow = of["images_per_second"][0]
        assert high == pytest.approx(of["steps"] * of["batch"] / slow / 3600)
    assert stages[0]["steps"] == 800 * (1_281_167 // stages[0]["batch"])
    assert {name for _, name, _ in counts} == {"mae", "nnclr", "maect"}


def test_portions_that_show_the_same_are_counted_once(counts, tmp_path):
    out = tmp_path / "bill.json"
    words = ["--method", "mae", "--model", "vit_small_patch16_224", "--tokens", "flexi", "--epochs", "2"]
    assert plan.main([*words, "--gpu", "H200", "--out", str(out)]) == 0
    names = ["mae, phase 1, patches x 1", "mae, phase 1, patches x 2", "mae, phase 2"]
    stages = json.loads(out.read_text())["stages"]
    assert [of["stage"] for of in stages] == names
    assert sum(of["steps"] for of in stages) == 2 * (1_281_167 // stages[0]["batch"]) and len(counts) == 2


def test_an_old_card_computes_in_fp16(counts, capsys):
    assert plan.main([*RUN, "--gpu", "T4"]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert {precision for _, _, precision in counts} == {"fp16"}


def test_a_command_that_fits_is_found(counts, tmp_path, capsys):
    out = tmp_path / "bill.json"
    assert plan.main([*RUN, "--gpu", "A100-80", "--gpus", "4", "--fit", "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    command = shlex.split(next(line for line in said if "engine.train" in line))
    assert command[:3] == ["torchrun", "--nproc_per_node", "4"]
    assert command[command.index("--recompute") + 1] == "selective" and command[command.index("--data") + 1] == "DIR"
    assert json.loads(out.read_text())["fit"][-4:] == ["--recompute", "selective", "--accumulate", "1"]


def test_where_nothing_fits_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(plan, "count", lambda *_: made(peak=made().peak | {"weights": 100 * GB}))
    assert plan.main([*RUN, "--gpu", "A100-80", "--fit"]) == 1
    assert "nothing was found with which it fits" in capsys.readouterr().out


def test_each_option_is_counted(counts, capsys):
    assert plan.main([*RUN, "--options"]) == 0
    said = capsys.readouterr().out
    for name in ("not compiled", "recompute blocks", "residual stream in bf16", "nnclr: features of two crops stored"):
        assert name in said, name
    assert any("--nnclr.reuse" in flags for flags, *_ in counts)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--gpu", "B300"], f"--gpu B300 is unknown; choose one of {', '.join(CARDS)}."),
        (["--gpus", "0"], "--gpus is 0; it must be 1 or more."),
        (["--gpus", "7"], "which 7 GPUs"),
        (["--images", "5", "--data", "digits"], "--images and --data both say"),
        (["--images", "5"], "more than the 5 images"),
        (["--no-such-flag", "1"], "--no-such-flag"),
        (["--method", "magic"], "magic"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(flags: list[str], sentence: str, counts, capsys):
    assert plan.main([*RUN, *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and sentence in said
    assert not counts


def test_help_fits_a_screen(capsys):
    assert plan.main(["--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) < 25
