"""`python -m benchmarks.detection_attention`: every form, its record, refusals."""

import json

import pytest
import torch

from benchmarks import detection_attention, rounds

SMALL = ["--model", "vit_micro_patch8_32", "--pixels", "40", "--window", "2", "--rounds", "1", "--no-compile"]


@pytest.fixture(autouse=True)
def _no_large_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "matrix_product", lambda device, precision: (lambda: None, 1e6))


def test_every_form_is_timed_and_recorded(tmp_path, capsys):
    out = tmp_path / "record.json"
    assert detection_attention.main([*SMALL, "--no-memory", "--out", str(out)]) == 0
    record, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert set(record["median"]) == set(record["first_step_seconds"]) == set(detection_attention.FORMS)
    assert record["median"]["windows"]["ratio"] == 1 and record["left_out"] == {}
    assert "peak_memory" not in record and "backbone on 40 pixels" in shown and "against" in shown


def test_forms_differ_in_blocks_and_tables():
    options = detection_attention.Options(model="vit_micro_patch8_32", pixels=40, window=2)
    counts = {}
    for form, make in detection_attention.FORMS.items():
        model = detection_attention._backbone(options, **make.keywords)
        counts[form] = (len(model.global_blocks), model.window_bias is not None, model.global_bias is not None)
    assert counts == {
        "windows": (0, False, False), "hybrid": (4, False, False), "global": (6, False, False),
        "windows, biases": (0, True, False), "hybrid, biases": (4, True, True), "global, biases": (6, False, True),
    }  # fmt: skip


def test_operations_are_those_of_windows():
    """5 x 5 patches in windows of 2: four of 4 patches, two each of 2, one of 1."""
    found = detection_attention.flops(detection_attention.Options(model="vit_micro_patch8_32", pixels=40, window=2))
    weights = 128 * (3 * 128 + 128 + 2 * 512)
    scores = 4 * 128 * (4 * 4**2 + 4 * 2**2 + 1)
    assert found == 3 * (2 * 25 * 128 * 8 * 8 * 3 + 6 * (2 * 25 * weights + scores))


@pytest.mark.long
def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path):
    out = tmp_path / "record.json"
    assert detection_attention.main([*SMALL, "--forms", "windows", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["peak_memory"]["windows"] > 2**20


def test_what_memory_does_not_hold_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(detection_attention, "_free_memory", lambda: 2**17)
    assert (
        detection_attention.main([*SMALL, "--no-memory", "--forms", "windows", "windows, biases", "global, biases"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "global, biases is left out: its scores need about 0 GiB of memory, and 0 are free." in shown
    assert shown.count("is left out") == 1


def test_a_form_that_fails_is_told_and_windows_fail_the_command(monkeypatch, capsys):
    def broken(*_, **__) -> None:
        raise RuntimeError("out of memory")

    def forms(name: str) -> None:
        monkeypatch.setitem(detection_attention.FORMS, name, broken)

    forms("global")
    arguments = [*SMALL, "--no-memory", "--forms", "windows", "global"]
    assert detection_attention.main(arguments) == 0
    assert "global is left out: RuntimeError: out of memory." in capsys.readouterr().out
    forms("windows")
    with pytest.raises(RuntimeError, match="out of memory"):
        detection_attention.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--forms", "shifted"], "--forms has no 'shifted'; choose from windows; hybrid; global; windows, biases;"),
        (["--window", "0"], "--window is 0; it must be a whole number from 1"),
        (["--pixels", "42"], "size 42 is not a multiple of the patch size 8"),
        (["--model", "vit_smal"], "unknown model 'vit_smal'"),
        (["--rounds", "0"], "--rounds is 0; it must be a whole number from 1"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments: list[str], sentence: str, capsys):
    assert detection_attention.main([*SMALL, *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_compiled_regions_compute_the_same():
    """Compiled to torch's eager backend: full graphs, without inductor's minute."""
    options = detection_attention.Options(model="vit_micro_patch8_32", pixels=40, window=2)
    images = torch.randn(2, 3, 40, 40)
    for relative in (False, True):
        model = detection_attention._backbone(options, 4, relative)
        model.encoder.drop_path_rates = (0.0,) * 5 + (0.5,)
        torch.manual_seed(0)
        before = model(images)
        for owner, name in model.regions():
            setattr(owner, name, torch.compile(getattr(owner, name), fullgraph=True, dynamic=False, backend="eager"))
        torch.manual_seed(0)
        for ours, theirs in zip(model(images), before, strict=True):
            torch.testing.assert_close(ours, theirs)
