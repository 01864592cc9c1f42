"""The command that fits a codebook: what it leaves, what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import codebook
from engine.methods.parts.tokenizers import Codebook

FEW = ["--codes", "12", "--patch-size", "8", "--patches", "600", "--threads", "1", "--device", "cpu"]


def folder(path: Path, count: int = 12) -> Path:
    """Images of noise at three scales."""
    draw = np.random.default_rng(0)
    for index in range(count):
        grain = draw.integers(0, 255, (4 * 2 ** (index % 3),) * 2 + (3,), np.uint8)
        path.mkdir(exist_ok=True)
        Image.fromarray(grain).resize((48, 48)).save(path / f"{index}.png")
    return path


def test_it_leaves_a_codebook_that_trains_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture):
    data, out = folder(tmp_path / "images"), tmp_path / "kept" / "codebook.safetensors"
    flags = ["--data", str(data), "--image-size", "32", *FEW]
    assert codebook.main([*flags, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "12 codes of 8x8 pixels in 12 images" in said and f"--beit.codebook {out}" in said
    book = Codebook.read(out, 8)
    assert book.codes == 12 and book.normalise and len(book.centres.unique(dim=0)) == 12
    with Image.open(out.with_suffix(".png")) as picture:
        assert min(picture.size) > 300 and len(picture.convert("L").getcolors()) > 20
    assert sorted(path.name for path in out.parent.iterdir()) == ["codebook.png", "codebook.safetensors"]
    again = tmp_path / "again.safetensors"
    assert codebook.main([*flags, "--out", str(again), "--no-normalise"]) == 0
    assert not Codebook.read(again, 8).normalise
    twice = tmp_path / "twice.safetensors"
    assert codebook.main([*flags, "--out", str(twice)]) == 0
    assert torch.equal(Codebook.read(twice, 8).centres, book.centres)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--codes", "1"], "--codes is 1; it must be a whole number from 2"),
        (["--codes", "20", "--patches", "10"], "--patches is 10; it must be 0, or at least 20"),
        (["--patch-size", "7"], "--image-size is 32; it must be a multiple of the patch size 7"),
        (["--out", "codebook.pt"], "ends in .safetensors"),
        (["--data", "/nowhere/images"], "/nowhere/images"),
        (["--device", "tpu"], "--device is tpu; it must be auto, cpu or cuda"),
        (["--crop-scale", "0.9", "0.1"], "--crop-scale"),
        (["--colour"], "--colour"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert codebook.main(flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_what_is_there_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture):
    for name in ("codebook.safetensors", "codebook.png"):
        place = tmp_path / name.replace(".", "-")
        place.mkdir()
        (place / name).write_text("mine")
        assert codebook.main([*FEW, "--out", str(place / "codebook.safetensors")]) == 2
        assert "is there already" in capsys.readouterr().err
        assert (place / name).read_text() == "mine"
