"""The command line: what is wrong is refused in one sentence with status 2, before anything is written."""

import importlib
import json
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from engine import train
from engine.core.dist import Ranks
from engine.core.errors import BadInput
from engine.data.sets import archives
from engine.model import vit, weights
from engine.model.positions import sincos_positions
from engine.recipes import small_data
from engine.training import config, parts


def folder_of_images(root: Path, per_class: int = 4) -> Path:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(per_class):
                Image.new("RGB", (40, 36), (index * 9, 50, 99)).save(root / split / name / f"{index}.png")
    return root


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--method", "mea"], ["'mea'", "mae", "maect", "nnclr"]),
        (["--model", "vit_lagre_patch16_224"], ["vit_lagre_patch16_224", "vit_large_patch16_224"]),
        (["--data", "/no/such/folder"], ["/no/such/folder"]),
        (["--weights", "/no/such/file.pth"], ["/no/such/file.pth"]),
        (["--resume", "/no/such/run"], ["/no/such/run"]),
        (["--preset", "huge"], ["huge", "plain", "aug", "digits"]),
        (["--method", "dino", "--preset", "aug"], ["--preset aug", "dino", "auto, plain, digits"]),
        (["--method", "dino", "--collapse", "center"], ["center", "centring", "me-max", "sinkhorn", "none"]),
        (["--method", "mae", "--collapse", "none"], ["--collapse none", "mae"]),
        (["--method", "dinov2", "--dinov2.local-size", "20"], ["--dinov2.local-size is 20", "8"]),
        (["--precision", "fp17"], ["fp17", "fp32", "bf16"]),
        (["--recompute", "all"], ["--recompute is 'all'", "none, selective, blocks"]),
        (["--residual", "fp16"], ["--residual is 'fp16'", "fp32, bf16"]),
        (["--residual", "bf16", "--precision", "fp32"], ["--residual bf16", "--precision bf16", "computes in fp32"]),
        (["--graphs", "both"], ["--graphs is 'both'", "auto, on, off"]),
        (["--device", "cpu", "--graphs", "on"], ["--graphs on cannot be had in stage mae", "graphs are for GPUs"]),
        (["--kernels", "metal"], ["metal", "auto", "reference"]),
        (["--kernels", "cuda"], ["--kernels cuda cannot be had", "CUDA kernels are not built"]),
        (["--device", "tpu"], ["tpu", "cpu", "cuda"]),
        (["--batch-size", "-4"], ["batch-size", "-4"]),
        (["--method", "mae", "--batch-size", "100000"], ["100000", "1437"]),
        (["--batch-size", "100"], ["queue-size", "100"]),
        (["--epochs", "10"], ["mae, nnclr, maect", "3"]),
        (["--epochs", "10", "0", "3"], ["--epochs"]),
        (["--mae.epochs", "-1"], ["mae.epochs", "-1"]),
        (["--mae.base-lr", "-1e-3"], ["mae.base-lr"]),
        (["--mae.mask-ratio", "1.5"], ["mae.mask-ratio", "1.5"]),
        (["--maect.frozen-blocks", "7"], ["maect.frozen-blocks", "6"]),
        (["--maect.top-k", "0"], ["maect.top-k"]),
        (["--accumulate", "5"], ["stage mae has a batch of", "5 micro-batches"]),
        (["--image-size", "33"], ["33", "8"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--log-every", "0"], ["log-every"]),
        (["--bad-limit", "2"], ["bad-limit"]),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    named: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    assert train.main([*arguments, *(["--out", str(tmp_path / "run")] if "--resume" not in arguments else [])]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert all(word in error for word in named), error
    assert list(tmp_path.iterdir()) == []


def test_unknown_flags_and_words_for_numbers_exit_with_2(capsys: pytest.CaptureFixture):
    for arguments in (["--mehtod", "mae"], ["--epochs", "ten"], ["--mae.mask-ratio", "half"]):
        assert train.main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and len(error.splitlines()) == 1
        assert arguments[0] in error or "method" in error


def test_an_empty_class_is_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    root = folder_of_images(tmp_path / "data")
    (root / "train" / "newt").mkdir()
    arguments = ["--data", str(root), "--model", "vit_micro_patch8_32", "--out", str(tmp_path / "run")]
    assert train.main(arguments) == 2
    assert "newt" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_of_another_size_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    weights.export(vit.create("vit_micro_patch8_32", depth=2), tmp_path / "export")
    assert train.main(["--weights", str(tmp_path / "export"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "blocks.2." in error
    assert len(error.strip().splitlines()) == 1
    save_file({"hello": sincos_positions(8, (2, 2))}, tmp_path / "other.safetensors")
    assert train.main(["--weights", str(tmp_path / "other.safetensors"), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_out_must_be_new(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    assert train.main(["--out", str(tmp_path / "run")]) == 2
    assert "run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_resume_reads_the_run_and_keeps_to_it(tmp_path: Path):
    plan = config.parse(["--method", "mae", "--mae.epochs", "7", "--seed", "3"])
    (tmp_path / "config.json").write_text(plan.as_json())
    again = config.parse(["--resume", str(tmp_path), "--log-every", "3"])
    assert (again.stages, again.train.seed, again.train.log_every) == (plan.stages, 3, 3)
    for arguments in (
        ["--seed", "4"],
        ["--mae.epochs", "8"],
        ["--method", "nnclr"],
        ["--model", "vit_tiny_patch16_224"],
    ):
        with pytest.raises(BadInput, match="cannot change"):
            config.parse(["--resume", str(tmp_path), *arguments])
    (tmp_path / "config.json").write_text(json.dumps({"train": {"colour": "blue"}}))
    with pytest.raises(BadInput, match="configuration"):
        config.parse(["--resume", str(tmp_path)])


def test_flags_reach_the_stages():
    plan = config.parse(
        ["--epochs", "1", "2", "3", "--maect.top-k", "4", "--model", "vit_tiny_patch16_224", "--preset", "aug"]
    )
    assert [settings.epochs for _, settings in plan.stages] == [1, 2, 3]
    assert plan.stages[2][1].top_k == 4
    assert plan.stages[2][1].augmentation == "byol"
    assert plan.source.startswith("after ")
    assert [name for name, _ in config.parse(["--weights", "somewhere"]).stages] == ["nnclr", "maect"]


def test_the_command_line_is_what_was_agreed():
    """A flag that is added or renamed is a decision about the public surface: it is made here, too."""
    assert set(config.Train.__dataclass_fields__) == {
        "method", "model", "data", "weights", "preset", "epochs", "batch_size", "image_size", "patch_size", "pool", "collapse",
        "accumulate", "recompute", "residual", "precision", "compile", "graphs", "kernels", "calibrate", "deterministic",
        "device", "threads", "seed", "out", "resume", "changed_data", "dry_run",
        "log_every", "probe_every", "save_every", "keep", "track", "profile", "evaluate", "bad_limit", "abort_after", "rewind",
        "tokens",
    }  # fmt: skip


@pytest.mark.parametrize("name", small_data.SETS)
def test_a_published_set_brings_its_model_and_sizes(name: str):
    known = small_data.SETS[name]
    plan = config.parse(["--method", "mae", "--data", f"{name}:/data"])
    assert (plan.model, plan.encoder["img_size"], plan.encoder["patch_size"]) == (
        known.model, [known.image_size] * 2, known.patch_size,
    )  # fmt: skip
    assert plan.source == f"after MAE's released recipe (M), which has no such model, at the sizes for {name}"
    assert config.parse(["--method", "dino", "--data", f"{name}:/data"]).source.startswith("after DINO's")
    encoder = vit.create(plan.model, **plan.encoder)
    assert encoder.embed_dim == 384
    assert encoder.grid == ((8, 8) if known.crop == "pad" else (7, 7))  # N = 64 or 49, as RelViT gives them
    given = config.parse(["--method", "mae", "--data", f"{name}:/data", "--image-size", "96", "--patch-size", "16"])
    assert (given.encoder["img_size"], given.encoder["patch_size"]) == ([96, 96], 16)
    named = config.parse(["--method", "mae", "--data", f"{name}:/data", "--model", "vit_tiny_patch16_224"])
    assert named.model == "vit_tiny_patch16_224" and "img_size" not in named.encoder
    assert {*small_data.SETS, "imagenet", "parquet"} == set(archives.NAMES)
    assert (
        config.parse(["--method", "mae", "--data", "imagenet:/data"]).source
        == config.parse(["--method", "mae", "--data", "/"]).source
    )


def test_a_published_set_takes_the_preset_of_its_name_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    module = importlib.import_module("engine.recipes.mae")
    own = replace(module.published("x"), source="of its own")
    monkeypatch.setitem(module.PUBLISHED, "svhn", lambda model: own if model == "vit_small_patch16_224" else None)

    def source(*arguments: str) -> str:
        return config.parse(["--method", "mae", *arguments]).source

    assert source("--data", "svhn:/data") == "of its own"
    assert source("--data", "cifar10:/data").startswith("after MAE's")
    assert source("--data", "svhn:/data", "--preset", "plain").startswith("after MAE's")
    assert source("--data", "svhn:/data", "--preset", "digits") == source() == "ours, for the embedded digits"
    assert source("--preset", "svhn") == source("--preset", "svhn", "--data", "/folder") == "of its own"
    plan = config.parse(["--method", "mae", "--preset", "svhn", "--data", "/folder"])
    assert (plan.model, plan.encoder["patch_size"]) == ("vit_small_patch16_224", 4)
    with pytest.raises(
        BadInput, match="--preset svnh is unknown for mae; choose one of auto, plain, aug, efficient, svhn, digits"
    ):
        source("--preset", "svnh")
    monkeypatch.delitem(module.PUBLISHED, "plain")
    with pytest.raises(
        BadInput, match="--preset auto is plain on these data, which is unknown for mae; choose one of auto, aug"
    ):
        source("--data", "/folder")
    assert source("--data", "svhn:/data") == "of its own"


def test_help_fits_a_screen_and_knows_every_flag(capsys):
    with pytest.raises(SystemExit) as left:
        config.parse(["--method", "mae", "--help"])
    assert left.value.code in (0, None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    shown = [line.split()[0] for line in lines if line.startswith("  --")]
    assert sorted(shown) == sorted(f"--{field.name.replace('_', '-')}" for field in fields(config.Train))
    assert all(len(line.split()) > 1 for line in lines if line.startswith("  --"))  # each says something


@pytest.mark.parametrize("asked, general", [("--help-method", False), ("--help-all", True)])
def test_a_methods_own_flags_are_told_when_asked_for(capsys, asked: str, general: bool):
    with pytest.raises(SystemExit) as left:
        config.parse(["--method", "mae", asked])
    assert left.value.code in (0, None)
    said = capsys.readouterr().out
    assert "--mae.mask-ratio" in said and "--maect." not in said
    assert ("--bad-limit" in said) == general


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ([], "auto"),
        (["--compile"], "on"),
        (["--compile", "--seed", "1"], "on"),
        (["--compile", "off"], "off"),
        (["--compile", "auto"], "auto"),
        (["--no-compile"], "off"),
    ],
)
def test_compile_alone_means_on(words: list[str], meant: str):
    assert config.parse(["--method", "mae", *words]).train.compile == meant


def test_an_earlier_runs_compile_is_understood(tmp_path: Path):
    plan = config.parse(["--method", "mae", "--compile"])
    before = json.loads(plan.as_json().replace('"compile": "on"', '"compile": true'))
    earlier = {name: value for name, value in before.items() if name not in ("version", "sha256")}
    (tmp_path / "config.json").write_text(json.dumps(earlier))
    assert config.parse(["--resume", str(tmp_path)]).train.compile == "on"
    assert config.parse(["--resume", str(tmp_path), "--no-compile"]).train.compile == "off"


@pytest.mark.parametrize(
    ("compile_", "device", "compilers", "compiles"),
    [
        ("auto", "cpu", ("g++", "gcc"), False),
        ("on", "cpu", ("g++",), True),
        ("on", "cpu", (), False),
        ("auto", "cuda", ("gcc",), True),
        ("auto", "cuda", ("clang",), True),
        ("auto", "cuda", (), False),
        ("off", "cuda", ("gcc",), False),
    ],
)
def test_runs_compile_on_gpus_where_a_compiler_is(monkeypatch, capsys, compile_, device, compilers, compiles):
    for name in ("CC", "CXX", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(parts.shutil, "which", lambda name: name if name in compilers else None)
    train = config.parse(["--method", "mae", "--compile", compile_]).train
    assert parts._compiles(train, Ranks(0, 1, torch.device(device))) == compiles
    assert ("running uncompiled" in capsys.readouterr().err) == (not compiles and not compilers)
    assert ("TORCHINDUCTOR_CACHE_DIR" in os.environ) == compiles


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_runs_do_not_compile_where_python_s_headers_are_missing(monkeypatch, capsys, tmp_path: Path, device: str):
    train = config.parse(["--method", "mae", "--compile"]).train
    monkeypatch.setattr(parts.shutil, "which", lambda name: name)
    monkeypatch.setattr(parts.sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert not parts._compiles(train, Ranks(0, 1, torch.device(device)))
    assert f"-dev or python3-devel) and found none in {tmp_path}: running uncompiled." in capsys.readouterr().err
    (tmp_path / "Python.h").touch()
    assert parts._compiles(train, Ranks(0, 1, torch.device(device)))


def test_a_home_that_no_shell_expanded_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    plan = config.parse(["--method", "mae", "--out=~/mine", "--data=~/images"])
    assert (plan.train.out, plan.train.data) == (str(tmp_path / "mine"), str(tmp_path / "images"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(plan.as_json())
    assert config.parse(["--resume=~/mine"]).train.resume == str(tmp_path / "mine")
