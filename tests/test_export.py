"""The command that gives weights to other software: what it leaves, what it refuses, what it tells the Hub."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from engine import export, train
from engine.core.errors import BadInput
from engine.model import hub, onnx, vit, weights
from engine.model.twins import twin_of

MICRO = "vit_micro_patch8_32"
CLASSES = ("ant", "bee", "cow")


def shaken(name: str = MICRO, **overrides: object) -> vit.VisionTransformer:
    """A model whose every parameter is off its start."""
    draw = torch.Generator().manual_seed(0)
    model = vit.create(name, generator=draw, **{"depth": 1} | overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return model.eval()


def images(model: vit.VisionTransformer, count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, *model.img_size, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def expected(model: vit.VisionTransformer, classifier: nn.Linear | None = None) -> list[torch.Tensor]:
    """Features, tokens and scores of `images`, by our own model."""
    tokens = model(images(model))
    features = model.pool(tokens)
    return [features, tokens] if classifier is None else [features, tokens, classifier(features)]


@pytest.fixture
def classifier() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(128, len(CLASSES))


@pytest.fixture
def run(tmp_path: Path, classifier: nn.Linear) -> tuple[Path, vit.VisionTransformer]:
    """What `engine.train --method supervised` leaves of a finished run, as far as it is read here, and its encoder."""
    folder, model = tmp_path / "source" / "tuned", shaken(global_pool="avg")
    weights.export(model, folder / "export", {"kept": 1}, classifier=classifier, classes=CLASSES)
    config = {
        "train": {"method": "maect", "data": "/home/someone/secret/flowers", "seed": 3},
        "source": "He et al. 2022, table 9",
        "model": MICRO,
        "stages": [{"method": "mae", "epochs": 20}, {"method": "maect", "epochs": 5}],
    }
    evaluation = {
        "raw pixels": {"knn top-1": 0.25},
        "mae": {"knn top-1": 0.5},
        "maect": {"knn top-1": 0.8125, "linear last-epoch top-1 (best lr)": 0.75, "lowshot 1-shot": 0.5},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps({"steps": 12345, "evaluation": evaluation}))
    return folder, model


def told(*words: object) -> int:
    return export.main([str(word) for word in words])


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


# timm


def test_a_folder_for_timm_has_the_runs_features_and_classifier(run, classifier, tmp_path, capsys):
    source, model = run
    assert told(source, "--to", "timm", tmp_path / "new" / "given") == 0
    folder = tmp_path / "new" / "given"
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    features, tokens, scores = expected(model, classifier)
    with torch.no_grad():
        torch.testing.assert_close(theirs.forward_features(images(model)), tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs(images(model)), scores, atol=1e-5, rtol=1e-5)
    again, _ = weights.create(folder)
    assert again.architecture == model.architecture
    assert torch.equal(expected(again)[0], features) and torch.equal(expected(again)[1], tokens)
    assert everything(folder) == [folder / "config.json", folder / "model.safetensors"]
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (source / "export" / name).read_bytes()
        assert (folder / name).stat().st_mode & 0o777 == 0o644
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and not re.search("set aside", lines[0])
    assert f"{folder}, 0.9 MB: {MICRO} of tuned with a classifier of 3 classes" in lines[1]
    assert lines[2] == f'load it by timm.create_model("local-dir:{folder}", pretrained=True)'


def test_a_file_becomes_a_folder_for_timm_of_another_size(tmp_path, capsys):
    model = shaken(depth=6)
    save_file(dict(model.state_dict()), tmp_path / "published.safetensors")
    flags = ("--model", MICRO, "--pool", "avg", "--image-size", "48", "32")
    assert told(tmp_path / "published.safetensors", "--to", "timm", tmp_path / "out", *flags) == 0
    assert "positions resampled from 4x4 to 6x4" in capsys.readouterr().out
    wanted = vit.create(MICRO, global_pool="avg", img_size=(48, 32)).eval()
    weights.load(wanted, tmp_path / "published.safetensors")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(images(wanted)), expected(wanted)[0], atol=1e-5, rtol=1e-5)


def test_an_export_asks_for_the_preprocessing_that_its_source_asks_for(tmp_path, monkeypatch):
    name = "vit_tiny_patch16_224.augreg_in21k"
    published = timm.get_pretrained_cfg(name)
    model, create = shaken("vit_tiny_patch16_224"), timm.create_model
    twin = twin_of(model.architecture, "cpu")
    twin.load_state_dict(model.architecture.timm_state(model.state_dict()))
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **options: twin if options.get("pretrained") else create(*args, **options)
    )
    made = (model, weights.LoadReport(f"timm:{name}", "*", 1))
    monkeypatch.setattr(export.weights, "create", lambda source, **overrides: made)
    assert told(f"timm:{name}", "--to", "timm", tmp_path / "first") == 0
    monkeypatch.undo()
    assert told(tmp_path / "first", "--to", "timm", tmp_path / "second") == 0
    for folder in ("first", "second"):
        config = json.loads((tmp_path / folder / "config.json").read_text())["pretrained_cfg"]
        assert config["mean"] == list(published.mean) == [0.5, 0.5, 0.5]
        assert (config["std"], config["crop_pct"]) == ([0.5, 0.5, 0.5], published.crop_pct)


# ONNX


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX file of `shaken()`."""
    path = tmp_path_factory.mktemp("onnx") / "kept.onnx"
    onnx.write(shaken(), path)
    return path


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        pytest.param(dict(positions="sincos", global_pool="avg", reg_tokens=2), marks=pytest.mark.long),
        dict(positions="relative", global_pool="avg", init_values=0.1, img_size=(24, 32)),
        pytest.param(
            dict(positions="none", global_pool="avg", fc_norm=True, no_embed_class=True, reg_tokens=1),
            marks=pytest.mark.long,
        ),
    ],
    ids=["learned, class token", "sincos, registers", "relative", "norm after pooling"],
)
def test_onnxruntime_computes_what_torch_does(overrides, tmp_path):
    import onnxruntime

    model = shaken(**overrides)
    written = onnx.write(model, tmp_path / "encoder.onnx", about={"model": MICRO})
    assert everything(tmp_path) == [tmp_path / "encoder.onnx"] == list(written.files)
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images(model).numpy()})
    for theirs, ours, name in zip(found, expected(model), ("features", "tokens"), strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, atol=1e-5, rtol=1e-5)
        assert written.outputs[name].shape == ours.shape[1:]
        assert 0 < written.outputs[name].difference <= 1e-5 * written.outputs[name].largest
    sizes = {port.name: port.shape for port in (*session.get_inputs(), *session.get_outputs())}
    length = model.num_prefix_tokens + model.grid[0] * model.grid[1]
    assert sizes == {
        "images": ["batch", 3, *model.img_size], "features": ["batch", 128], "tokens": ["batch", length, 128]
    }  # fmt: skip
    assert session.get_modelmeta().custom_metadata_map["model"] == MICRO


def test_the_command_leaves_an_onnx_file_with_scores(run, classifier, tmp_path, capsys):
    import onnxruntime

    source, model = run
    assert told(source, "--to", "onnx", tmp_path / "out" / "e.onnx") == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 5 and not said.err
    assert "images [B, 3, 32, 32], normalised by mean 0.485 0.456 0.406" in lines[2]
    assert "to features [B, 128], tokens [B, 17, 128], scores [B, 3]" in lines[2]
    assert re.search(r"torch: \d\.\de-0\d in features .* in scores .*; up to 0.0001 of the largest", lines[3])
    assert f'InferenceSession("{tmp_path / "out" / "e.onnx"}")' in lines[4]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "e.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run(["scores"], {"images": images(model).numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), expected(model, classifier)[2], atol=1e-5, rtol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list(CLASSES) and about["std"] == "0.229 0.224 0.225"
    assert told(source, "--to", "onnx", tmp_path / "out" / "e.onnx") == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.long
def test_weights_too_large_for_one_file_lie_in_a_second(tmp_path, monkeypatch):
    import onnxruntime
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1000)
    model = shaken()
    written = onnx.write(model, tmp_path / "large.onnx")
    assert everything(tmp_path) == [tmp_path / "large.onnx", tmp_path / "large.onnx.data"] == sorted(written.files)
    session = onnxruntime.InferenceSession(tmp_path / "large.onnx", providers=["CPUExecutionProvider"])
    (features,) = session.run(["features"], {"images": images(model).numpy()})
    torch.testing.assert_close(torch.from_numpy(features), expected(model)[0], atol=1e-5, rtol=1e-5)
    (tmp_path / "large.onnx").unlink()
    with pytest.raises(BadInput, match=r"large.onnx.data is there already"):
        onnx.check(tmp_path / "large.onnx")


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.01), (1e38, 0.0)])  # the second overflows
def test_a_file_that_disagrees_is_not_left(scale, shift, kept, tmp_path, monkeypatch, capsys):
    model = shaken()
    model.norm.weight.data *= scale
    model.norm.bias.data += shift
    folder = weights.export(model, tmp_path / "export")
    monkeypatch.setattr(onnx, "_export", lambda traced, size, path, about: shutil.copy(kept, path))
    before = everything(tmp_path)
    assert told(folder, "--to", "onnx", tmp_path / "encoder.onnx") == 2
    said = capsys.readouterr().err
    assert re.match(
        r"error: the ONNX file was not kept: its features differ from torch's by (1\.0e-02|nan|inf|[\d.]+e\+38), more",
        said,
    )
    assert everything(tmp_path) == before


def test_another_shape_is_not_left_either(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "_export", lambda traced, size, path, about: shutil.copy(kept, path))
    with pytest.raises(BadInput, match=r"not kept: .* \(1, 17, 128\)\], torch's \[\(1, 128\), \(1, 18, 128\)\]"):
        onnx.write(shaken(reg_tokens=1), tmp_path / "encoder.onnx")
    assert not everything(tmp_path)


@pytest.mark.parametrize("absent", [("onnxruntime",), onnx.NEEDED])
def test_what_is_not_installed_is_named_before_any_work(absent, run, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else found(name, *rest))
    monkeypatch.setattr(export.weights, "create", lambda *args, **options: pytest.fail("it began to work"))
    before = everything(tmp_path)
    assert told(run[0], "--to", "onnx", tmp_path / "encoder.onnx") == 2
    said = capsys.readouterr().err
    assert f"needs {', '.join(absent)}, not installed here" in said and said.count("\n") == 1
    assert "uv run --group export" in said and f"pip install {' '.join(absent)}" in said
    assert everything(tmp_path) == before


# Hub


class Hub:
    """What huggingface_hub's client is to timm and to us, with a folder for each repository."""

    def __init__(self, root: Path) -> None:
        self.root, self.private, self.broken = root, {}, ""

    def __call__(self, **options: object) -> "Hub":
        assert options.get("token") is None
        return self

    def _path(self, name: str) -> Path:
        return self.root / name

    def _fail(self, call: str) -> None:
        if call == self.broken:
            raise ConnectionError(f"{call}: no route to host\n(and a long tail)")

    def whoami(self) -> dict:
        self._fail("whoami")
        return {"name": "me"}

    def repo_info(self, name: str) -> SimpleNamespace:
        if name not in self.private:
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        files = [SimpleNamespace(rfilename=path.name) for path in self._path(name).iterdir()]
        return SimpleNamespace(private=self.private[name], siblings=files)

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> SimpleNamespace:
        self._fail("create_repo")
        self._path(name).mkdir(parents=True, exist_ok=exist_ok)
        self.private.setdefault(name, private)
        return SimpleNamespace(repo_id=name)

    def file_exists(self, *, repo_id: str, filename: str, revision: str | None) -> bool:
        return (self._path(repo_id) / filename).exists()

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: object) -> None:
        self._fail("upload_folder")
        shutil.copytree(folder_path, self._path(repo_id), dirs_exist_ok=True)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", stand_in)
    monkeypatch.setattr(timm.models._hub, "HfApi", stand_in)
    monkeypatch.setattr(hub, "get_token", lambda: "a token")
    return stand_in


def test_a_run_is_pushed_with_its_classifier_and_a_card(run, classifier, stand_in, capsys):
    source, model = run
    assert told(source, "--to", "hub", "tuned-vit", "--private", "--license", "cc-by-4.0") == 0
    assert stand_in.private == {"me/tuned-vit": True}
    folder = stand_in.root / "me" / "tuned-vit"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    pushed, kept = (json.loads((place / "config.json").read_text()) for place in (folder, source / "export"))
    assert pushed == kept
    tensors, others = (load_file(place / "model.safetensors") for place in (folder, source / "export"))
    assert all(torch.equal(value, others[name]) for name, value in tensors.items()) and tensors.keys() == others.keys()
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        wanted = expected(model, classifier)[2]
        torch.testing.assert_close(theirs(images(model)), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(expected(weights.create(folder)[0])[0], expected(model)[0])
    card = (folder / "README.md").read_text()
    for line in (
        "license: cc-by-4.0", "pipeline_tag: image-classification", "- **Method:** maect (stages mae, maect)",
        f"- **Model:** {MICRO}, depth 1, width 128", "- **Recipe:** He et al. 2022, table 9", "- **Data:** flowers",
        "- **Epochs:** 20, 5", "- **Seed:** 3", "- **Steps:** 12,345", "- **knn top-1, held-out val split:** 81.2 %",
        "- **linear last-epoch top-1 (best lr), held-out val split:** 75.0 %", "- **Classifier:** 3 classes",
    ):  # fmt: skip
        assert line in card
    assert not re.search(r"secret|lowshot|25\.0 %|50\.0 %|transformers", card)
    assert 'timm.create_model("hf-hub:me/tuned-vit", pretrained=True)' in card
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("https://huggingface.co/me/tuned-vit, 0.9 MB: ") and len(lines) == 3
    assert lines[2] == 'load it by timm.create_model("hf-hub:me/tuned-vit", pretrained=True)'


def test_a_second_push_keeps_the_card_that_is_there(run, stand_in, tmp_path, capsys):
    exported = weights.export(shaken(), tmp_path / "plain")
    assert told(exported, "--to", "hub", "lab/vit") == 0
    folder = stand_in.root / "lab" / "vit"
    card = (folder / "README.md").read_text()
    assert "license: unknown" in card and "pipeline_tag: image-feature-extraction" in card
    assert "- **Weights:** plain" in card and "Steps" not in card
    assert "licence is unknown" in capsys.readouterr().out
    (folder / "README.md").write_text("mine")
    (run[0] / "summary.json").unlink()
    assert export.model_card(export.open_source(export.Export(str(run[0]))), "x")["details"]["Steps"].startswith("not")
    assert told(run[0], "--to", "hub", "lab/vit") == 0
    assert (folder / "README.md").read_text() == "mine"
    assert json.loads((folder / "config.json").read_text())["label_names"] == list(CLASSES)


@pytest.mark.parametrize("broken", ["whoami", "create_repo", "upload_folder"])
def test_a_hub_out_of_reach_is_one_sentence(broken, run, stand_in, capsys):
    stand_in.broken = broken
    assert told(run[0], "--to", "hub", "lab/vit") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.endswith(f"{broken}: no route to host\n") and said.count("\n") == 1
    assert "pushed" in said and not any(path.is_file() for path in everything(stand_in.root))


def test_repositories_of_others_and_public_ones_are_left_alone(run, stand_in, capsys):
    stand_in.private["lab/words"] = False
    (stand_in.root / "lab" / "words").mkdir(parents=True)
    (stand_in.root / "lab" / "words" / "tokenizer.json").write_text("{}")
    before = everything(stand_in.root)
    for flags, message in (((), "holds tokenizer.json, which is of no export"), (("--private",), "already and public")):
        assert told(run[0], "--to", "hub", "lab/words", *flags) == 2
        assert message in capsys.readouterr().err
    assert everything(stand_in.root) == before


def test_a_run_that_cannot_be_described_is_not_pushed(run, stand_in, capsys):
    for content, message in (("{", "cannot be read, so the run cannot be described"), ("{}", "is not that of a run")):
        (run[0] / "config.json").write_text(content)
        assert told(run[0], "--to", "hub", "lab/vit") == 2
        assert message in capsys.readouterr().err
    assert not stand_in.private


def test_who_is_not_logged_in_is_told_so_before_any_work(run, stand_in, monkeypatch, capsys):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    monkeypatch.setattr(export.weights, "create", lambda *args, **options: pytest.fail("it began to work"))
    assert told(run[0], "--to", "hub", "lab/vit") == 2
    assert "hf auth login" in capsys.readouterr().err
    assert told(run[0], "--to", "hub", "a/b/c") == 2
    assert "'a/b/c' is no name of a repository" in capsys.readouterr().err


# refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the weights are missing; give a run folder"),
        (["RUN"], "--to takes two words after the weights, timm FOLDER, onnx FILE or hub NAME."),
        (["RUN", "--to", "onnx"], "onnx FILE or hub NAME, not 'onnx'"),
        (["RUN", "--to", "onnx", ""], "--to takes two words"),
        (["RUN", "--to", "onnx", "a.onnx", "b.onnx"], "not 'onnx a.onnx b.onnx'"),
        (["RUN", "--to", "tflite", "a"], "--to tflite is unknown; choose timm FOLDER, onnx FILE or hub NAME"),
        (["RUN", "--to", "onnx", "encoder.pt"], "choose one that ends in .onnx"),
        (["RUN", "--to", "onnx", "file/encoder.onnx"], "since file is a file"),
        (["RUN", "--to", "timm", "file/folder"], "since file is a file"),
        (["RUN", "--to", "timm", "file"], "--to timm file is there already"),
        (["RUN", "--to", "timm", "full"], "--to timm full is there already; choose a new or empty folder"),
        (["RUN", "--to", "timm", "RUN/export"], "is there already"),
        (["nowhere", "--to", "timm", "new"], "nowhere does not exist; give a run folder"),
        (["raw", "--to", "timm", "new"], "raw does not exist"),
        ([f"random:{MICRO}", "--to", "timm", "new"], f"random:{MICRO} does not exist"),
        (["full", "--to", "timm", "new"], "full holds no exported model"),
        (["file", "--to", "timm", "new"], "file is a file and needs --model NAME"),
        (["file", "--to", "timm", "new", "--model", MICRO], "file holds no plain weights"),
        (["timm:resnet50", "--to", "timm", "new"], "resnet50 has an architecture of its own"),
        (["RUN", "--to", "timm", "new", "--model", MICRO], "--model belongs to a file"),
        (["RUN", "--to", "timm", "new", "--private"], "--private belongs to --to hub"),
        (["RUN", "--to", "timm", "new", "--license", "mit"], "--license belongs to --to hub"),
        (["RUN", "--to", "timm", "new", "--pool", "max"], "--pool is 'max'; choose one of token, avg"),
        (["RUN", "--to", "timm", "new", "--pool", "token"], "--pool token does not go with its classifier"),
        (["RUN", "--to", "timm", "new", "--image-size", "0"], "--image-size takes one positive number"),
        (["RUN", "--to", "timm", "new", "--image-size", "33"], "not a multiple of the patch size"),
        (["RUN", "--to", "timm", "new", "--colour"], "--colour"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, message, run, tmp_path, monkeypatch, capsys):
    place = tmp_path / "place"
    (place / "full").mkdir(parents=True)
    (place / "full" / "thesis.tex").write_text("mine")
    (place / "file").write_text("mine")
    monkeypatch.chdir(place)
    before = everything(tmp_path)
    assert told(*(word.replace("RUN", str(run[0])) for word in words)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1 and not said.out
    assert everything(tmp_path) == before


@pytest.mark.long
def test_a_trained_run_goes_to_timm_and_onto_a_card(tmp_path, stand_in, capsys):
    draw = np.random.default_rng(0)
    for place in ("train/day", "train/night", "val/day", "val/night"):
        (tmp_path / "data" / place).mkdir(parents=True)
        for index in range(8):
            pixels = draw.integers(0, 150, (32, 32, 3)) + 100 * ("day" in place)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / place / f"{index}.png")
    folder = tmp_path / "run"
    flags = f"--method supervised --model {MICRO} --preset digits --batch-size 8 --epochs 1 --threads 1 --device cpu"
    assert train.main([*flags.split(), "--data", str(tmp_path / "data"), "--out", str(folder)]) == 0
    assert told(folder, "--to", "timm", tmp_path / "given") == 0
    assert told(folder, "--to", "hub", "vit") == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "given" / name).read_bytes() == (folder / "export" / name).read_bytes()
    model = timm.create_model(f"local-dir:{tmp_path / 'given'}", pretrained=True).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 2)
    card = (stand_in.root / "me" / "vit" / "README.md").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    figure = summary["evaluation"]["supervised"]["linear best-epoch top-1"]
    for line in (
        "**Method:** supervised\n", f"**Recipe:** {summary['source']}\n", "**Data:** data\n", "**Epochs:** 1\n",
        "**Seed:** 0\n", "**Steps:** 2\n", "**Classifier:** 2 classes\n", "trained with the method supervised, exported",
        f"**linear best-epoch top-1, held-out val split:** {100 * figure:.1f} %\n",
    ):  # fmt: skip
        assert line in card
