"""The command: exit statuses, sentences, and known figures of raw pixels on the embedded digits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import eval as command
from engine import evals
from engine.core.errors import BadInput
from engine.data.sources import open_images
from engine.model import vit, weights

ROOT = Path(__file__).parents[2]


def test_protocols_are_the_files():
    files = (ROOT / "engine" / "evals" / "protocols").glob("*.py")
    assert set(evals.protocols()) == {file.stem for file in files} - {"__init__"} >= {"knn", "linear"}
    with pytest.raises(BadInput, match=r"unknown protocol 'features'; choose from attentive, .*, all"):
        evals.protocol("features")


def test_raw_pixels_on_the_digits_land_near_the_known_figures(tmp_path, capsys):
    arguments = [
        "--weights",
        "raw",
        "--protocol",
        "knn",
        "linear",
        "lowshot",
        "cluster",
        "--out",
        str(tmp_path / "out"),
    ]
    assert command.main([*arguments, "--linear.epochs", "20", "--cluster.n-init", "3"]) == 0
    whole = json.loads((tmp_path / "out" / "results.json").read_text())
    values = {result["protocol"]: result["values"] for result in whole["results"]}
    assert 0.94 < values["knn"]["top-1"] < 0.99
    assert 0.90 < values["linear"]["last-epoch top-1 (best lr)"] <= values["linear"]["best-epoch top-1"] < 0.99
    assert 0.50 < values["lowshot"]["1-shot"] < 0.75 and 0.75 < values["lowshot"]["5-shot"] < 0.92
    assert 0.60 < values["cluster"]["ACC"] < 0.85
    assert whole["run"]["seed"] == 0 and whole["run"]["device"] == "cpu"
    assert whole["features"]["raw pixels"]["training images"] == 1437
    assert whole["features"]["raw pixels"]["test images"] == 360
    shown = capsys.readouterr().out
    assert "lowshot: top-1 by lambda" in shown and "linear: top-1 by learning rate" in shown
    assert "raw pixels" in shown and "best-epoch top-1" in shown and "k 20, temperature 0.07" in shown


def test_exports_run_folders_and_files_give_the_same_figure(tmp_path):
    model = vit.create("vit_micro_patch8_32", generator=torch.Generator().manual_seed(0), global_pool="avg")
    weights.export(model, tmp_path / "run" / "export")
    figures = []
    for i, source in enumerate(
        (
            [tmp_path / "run"],
            [tmp_path / "run" / "export"],
            [tmp_path / "run" / "export" / "model.safetensors", "--model", "vit_micro_patch8_32", "--pool", "avg"],
        )
    ):
        out = tmp_path / str(i)
        assert command.main(["--weights", *map(str, source), "--out", str(out)]) == 0
        whole = json.loads((out / "results.json").read_text())
        (about,) = whole["features"].values()
        assert about["feature"].startswith("mean of patch tokens") and about["width"] == 128
        figures.append(whole["results"][0]["values"])
    assert figures[0] == figures[1] == figures[2]
    assert figures[0]["top-1"] > 0.3
    read = {
        "both": ("class token and mean of patch tokens", 256),
        "before-norm": ("class token before the final norm", 128),
    }
    for pool, (said, width) in read.items():
        assert command.main(["--weights", str(tmp_path / "run"), "--pool", pool, "--out", str(tmp_path / pool)]) == 0
        (about,) = json.loads((tmp_path / pool / "results.json").read_text())["features"].values()
        assert about["feature"].startswith(said) and about["width"] == width


def test_several_weights_in_one_call():
    model = vit.create("vit_micro_patch8_32", generator=torch.Generator().manual_seed(0))
    digits = [open_images(None, split) for split in ("train", "val")]
    results = evals.evaluate({"raw": evals.raw_pixels(), "random ViT": model}, digits, ("knn",))
    assert [result.weights for result in results] == ["raw", "random ViT"]
    assert results[0].values["top-1"] > results[1].values["top-1"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "--weights is missing; give a run folder"),
        (["--weights", "/none"], "--weights /none does not exist; give a run folder"),
        (["--weights", "TMP"], "holds no exported model"),
        (["--weights", "TMP/file.pth"], "needs --model NAME"),
        (["--weights", "TMP/file.pth", "--model", "resnet50"], "resnet50"),
        (["--weights", "TMP", "--model", "vit_micro_patch8_32"], "holds no exported model"),
        (["--weights", "raw", "--model", "vit_micro_patch8_32"], "no --model, --pool or --interpolation"),
        (["--weights", "TMP", "--interpolation", "nearest"], "choose one of antialiased, offset, bicubic"),
        (
            ["--weights", "raw", "--protocol", "knn", "tsne"],
            "unknown protocol 'tsne'; choose from attentive, cluster, ",
        ),
        (["--weights", "raw", "--protocol"], "no protocol is named; choose from attentive, cluster, "),
        (["--weights", "raw", "--data", "/none"], "/none is no folder"),
        (["--weights", "raw", "--data", "TMP/flat"], "val"),
        (["--weights", "raw", "--device", "tpu"], "choose one of auto, cpu, cuda"),
        (["--weights", "raw", "--precision", "fp8"], "choose one of auto, fp32, bf16"),
        (["--weights", "raw", "--resize", "nearest"], "choose one of bicubic, bilinear"),
        (["--weights", "raw", "--map", "umap"], "choose one of pca, tsne"),
        (["--weights", "raw", "--batch-size", "0"], "--batch-size is 0; it must be 1 or more"),
        (["--weights", "raw", "--batch-size", "many"], "--batch-size: invalid literal"),
        (["--weights", "raw", "--seed", "-1"], "--seed is -1"),
        (["--weights", "raw", "--image-size", "1", "2", "3"], "--image-size takes one positive number"),
        (["--weights", "raw", "--bad-limit", "2"], "share from 0 to 1"),
        (["--weights", "raw", "--bogus", "1"], "--bogus"),
        (["--weights", "random:vit_micro_patch8_32", "--pool", "mean"], "choose one of token, avg, both, before-norm"),
        (
            ["--weights", "raw", "--protocol", "linear", "--linear.recipe", "moco"],
            "must be one of cached, mae, dino, maect",
        ),
        (
            ["--weights", "raw", "--protocol", "linear", "--linear.recipe", "mae", "--out", "TMP/out"],
            "have no patches to look at",
        ),
        (
            ["--weights", "raw", "--protocol", "linear", "--linear.pool", "avg"],
            "--pool says what is extracted for cached",
        ),
        (["--weights", "raw", "--knn.k", "0"], "knn k = 0 must be at least 1"),
        (["--weights", "raw", "--knn.k", "1438"], "more than the 1437 training images"),
        (["--weights", "raw", "--protocol", "lowshot", "--lowshot.shots", "100"], "disjoint splits need 300"),
        (["--weights", "raw", "--protocol", "lowshot", "--lowshot.files", "/none.txt"], "/none.txt cannot be read"),
        (["--weights", "raw", "--out", "TMP"], "is not an earlier evaluation"),
    ],
)
def test_bad_flags_get_one_sentence_and_nothing_is_written(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.pth").write_bytes(b"")
    (tmp_path / "flat").mkdir()
    digits = open_images(None, "val")
    (tmp_path / "flat" / "image.png").write_bytes((digits.root / digits.paths[0]).read_bytes())
    arguments = [argument.replace("TMP", str(tmp_path)) for argument in arguments]
    assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert sentence in err and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.pth", "flat"]


def test_evaluations_that_start_together_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, _ = command.parse(["--weights", "raw", "--protocol", "knn"])
    folders = [command._folder(flags, {"raw pixels": None}) for _ in range(4)]
    assert len(set(folders)) == 4 and all(folder.is_dir() for folder in folders)
    assert all(folder.name.startswith("eval-raw-pixels-") for folder in folders)


def test_the_command_itself_exits_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "engine.eval", "--weights", "raw", "--protocol", "nope"], capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.strip() == f"error: unknown protocol 'nope'; choose from {', '.join(evals.protocols())}, all."


def test_help_exits_with_0(capsys):
    with pytest.raises(SystemExit) as left:
        command.main(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert left.value.code == 0 and "--knn.temperature" in shown
    assert f"One or more of {', '.join(evals.protocols())}, all." in shown
