"""The main command from end to end, as a user runs it: a folder of images in, a run folder out."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from engine.data.pipeline import eval_batches
from engine.data.sources import open_images
from engine.model import weights
from engine.training.metrics import TIME_FIELDS, read_metrics
from tests.ranks import torchrun

ROOT = Path(__file__).parents[1]
FAST = (
    "--model vit_micro_patch8_32 --preset digits --batch-size 8 --nnclr.queue-size 16 --maect.queue-size 16 "
    "--log-every 1 --probe-every 1 --save-every 1 --threads 1"
).split()
EPOCHS = ("--epochs", 2, 1, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photograph-like JPEGs and PNGs of two classes, 24 to train and 8 to test, one of them truncated."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for shift, name in enumerate(("day", "night")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                coarse = rng.integers(0, 156, (6, 8, 3)) + 50 * shift
                picture = Image.fromarray(coarse.astype(np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
                picture.save(folder / f"{index}.{'jpg' if index % 2 else 'png'}")
    return root


def start(*arguments: object, module: str = "engine.train", ranks: int = 1) -> subprocess.Popen:
    words = ("-m", module, *map(str, arguments))
    command = torchrun(ranks, *words) if ranks > 1 else [sys.executable, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def output_of(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == status, output
    return output


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("run") / "whole"
    return folder, output_of(start("--data", data, "--out", folder, *FAST, *EPOCHS))


@pytest.mark.long
def test_a_run_folder_holds_what_is_promised(run: tuple[Path, str]):
    folder, output = run
    assert {"config.json", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints", "export", "pictures"} <= {
        path.name for path in folder.iterdir()
    }
    pictures = {path.name for path in (folder / "pictures").iterdir()}
    assert {"curves.png", "1-mae-reconstructions.png", "1-mae-patch-pca.png", "3-maect-patch-pca.png"} <= pictures
    assert all(Image.open(folder / "pictures" / name).size[0] > 200 for name in pictures)
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 16))
    assert {"loss", "lr", "gradient_norm", "images_per_second", "tokens_per_image", "waiting_for_data"} <= records[
        4
    ].keys()
    probes = [r for r in records if r["kind"] == "probe"]
    assert {"knn_top1", "rank_me", "feature_std", "verdict"} <= probes[-1].keys()
    assert "neighbour_agreement" in next(r for r in records if r["stage"] == "maect")
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["evaluation"]) == ["mae", "maect", "raw pixels"]
    assert [speed["stage"] for speed in summary["speed"]] == ["mae", "nnclr", "maect"]
    assert (folder / "evaluation" / "results.json").is_file()
    assert re.search(r"raw pixels.*\n.*mae.*maect.*\(no model\)", output)
    assert "kernels:" in output
    assert "evaluation by lowshot is left out: " in output  # twelve images a class are too few for three splits of five


@pytest.mark.long
def test_timm_loads_the_export_and_sees_the_same_features(run: tuple[Path, str], data: Path):
    folder, _ = run
    twin = timm.create_model(f"local-dir:{folder / 'export'}", pretrained=True).eval()
    ours, _ = weights.create(folder)
    batch = next(iter(eval_batches(open_images(data, "val"), (32, 32), 8)))
    with torch.no_grad():
        theirs = twin.forward_head(twin.forward_features(batch.images[0]), pre_logits=True)
        torch.testing.assert_close(ours.pool(ours(batch.images[0])), theirs, atol=1e-5, rtol=0)


@pytest.mark.long
def test_a_head_trains_on_stored_features_of_given_weights(run: tuple[Path, str], data: Path, tmp_path: Path):
    flags = ("--method", "nnclr", "--weights", run[0], "--nnclr.reuse", 2, "--epochs", 2, "--no-evaluate")
    output_of(start("--data", data, "--out", tmp_path / "out", *FAST[:8], *FAST[10:], *flags))
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    (event,) = [record for record in records if record["kind"] == "event"]
    assert event["storing_features_seconds"] > 0 and event["step"] == 0
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    before, after = (weights.create(folder)[0].state_dict() for folder in (run[0], tmp_path / "out"))
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "the encoder is frozen"


@pytest.mark.long
def test_a_stopped_run_resumes_to_the_same_end(run: tuple[Path, str], data: Path, tmp_path: Path):
    whole, _ = run
    folder = tmp_path / "stopped"
    process = start("--data", data, "--out", folder, *FAST, *EPOCHS)
    while not (folder / "metrics.jsonl").exists() or len(read_metrics(folder / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = output_of(process)
    assert f"python -m engine.train --resume {folder}" in output
    assert not (folder / "summary.json").exists()
    # The newest checkpoint is damaged: the one before it, or a clear refusal if there is none, must do.
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    if len(checkpoints) > 1:
        victim = checkpoints[-1] / "model.safetensors"
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(content)
    output = output_of(start("--resume", folder))
    assert ("is damaged" in output) == (len(checkpoints) > 1)
    assert (
        load_file(folder / "export" / "model.safetensors").keys()
        == load_file(whole / "export" / "model.safetensors").keys()
    )
    for name, value in load_file(whole / "export" / "model.safetensors").items():
        assert torch.equal(load_file(folder / "export" / "model.safetensors")[name], value), name

    def timeless(path: Path) -> list[dict]:
        return [{k: v for k, v in r.items() if k not in TIME_FIELDS} for r in read_metrics(path / "metrics.jsonl")]

    assert timeless(folder) == timeless(whole)


@pytest.mark.long
def test_trackers_and_a_profile_change_nothing(
    run: tuple[Path, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stand-ins of three trackers' packages, in a run that is stopped and resumed."""
    whole, folder, names = run[0], tmp_path / "tracked", ("wandb", "trackio", "mlflow")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "training" / "clients"))
    monkeypatch.setenv("STAND_IN_CALLS", str(tmp_path / "calls.jsonl"))
    process = start("--data", data, "--out", folder, *FAST, *EPOCHS, "--track", "wandb", "trackio", "--profile", 2)
    while not (folder / "metrics.jsonl").exists() or len(read_metrics(folder / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output_of(process)
    output = output_of(start("--resume", folder, "--track", *names, "--no-evaluate"))
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert [call["exit_code"] for call in calls if call["call"] == "wandb.finish"] == [1, 0]
    assert set(json.loads((folder / "trackers.json").read_text())) == set(names)
    assert all(f"{name}: " in output for name in names)
    records = [(r["step"], r["loss"]) for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
    batches = [
        {m["key"]: (m["step"], m["value"]) for m in c["metrics"]} for c in calls if c["call"] == "mlflow.log_batch"
    ]
    assert [batch["train/loss"] for batch in batches if "train/loss" in batch] == records
    shown = [(c["step"], c["values"]) for c in calls if c["call"] == "trackio.log"]
    assert [(step, values["train/loss"]) for step, values in shown if "train/loss" in values] == records
    assert {"operators.txt", "trace.json.gz"} == {path.name for path in (folder / "profile").iterdir()}
    for name, value in load_file(whole / "export" / "model.safetensors").items():
        assert torch.equal(load_file(folder / "export" / "model.safetensors")[name], value), name


@pytest.mark.long
def test_torchrun_trains_with_two_processes_from_earlier_weights(run: tuple[Path, str], data: Path, tmp_path: Path):
    whole, _ = run
    screened = tmp_path / "images"
    shutil.copytree(data, screened)
    open_images(screened, "train")
    torn = ["train/day/1.jpg", "train/day/2.png", "train/night/5.jpg", "train/night/6.png"]
    for name in torn:  # after the screening, and not to be seen from outside
        before = (screened / name).stat()
        (screened / name).write_bytes(bytes(before.st_size))
        os.utime(screened / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    process = start(
        "--data", screened, "--out", tmp_path / "two", "--weights", whole, *FAST, "--epochs", 2, 1, "--bad-limit", 0.2,
        ranks=2,
    )  # fmt: skip
    output = output_of(process)
    assert "2 x CPU" in output
    assert "stage 2/2 maect" in output
    assert (tmp_path / "two" / "summary.json").is_file()
    listed = json.loads((tmp_path / "two" / "bad_files.json").read_text())
    assert sorted(path for path, _ in listed) == torn, "what either rank found is listed"


@pytest.mark.long
def test_dry_run_says_how_long_and_writes_nothing(data: Path, tmp_path: Path):
    output = output_of(start("--data", data, "--out", tmp_path / "run", "--dry-run", *FAST, *EPOCHS))
    assert re.search(r"the whole run: about [\d.]+ hours", output)
    assert all(f"│ {stage}" in output for stage in ("mae", "nnclr", "maect"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_flat_unlabelled_folder_of_bad_and_good_files(data: Path, tmp_path: Path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for index, path in enumerate(sorted((data / "train").rglob("*.*"))):
        (flat / f"{index}{path.suffix}").write_bytes(path.read_bytes())
    (flat / "torn.jpg").write_bytes((flat / "0.jpg").read_bytes()[:300] if (flat / "0.jpg").exists() else b"torn")
    arguments = [
        "--method",
        "mae",
        "--data",
        flat,
        "--model",
        "vit_micro_patch8_32",
        "--preset",
        "digits",
        "--batch-size",
        8,
    ]
    refused = output_of(start(*arguments, "--epochs", 1, "--out", tmp_path / "refused"), status=2)
    assert "torn.jpg" in refused
    assert not (tmp_path / "refused").exists()
    (tmp_path / "run").mkdir()  # an empty folder is as good as none
    output = output_of(start(*arguments, "--epochs", 1, "--bad-limit", 0.1, "--out", tmp_path / "run"))
    assert "no labelled val split" in output
    assert json.loads((tmp_path / "run" / "bad_files.json").read_text())[0][0] == "torn.jpg"
