import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, resolve_data_config

from engine.core.errors import BadInput
from engine.model import weights
from engine.model.heads import Classifier
from tests.model.seeded import MICRO, features, shaken


def test_patch_projection_saved_as_a_linear_layer_loads(tmp_path):
    published, model = shaken(), shaken(seed=1)
    state = published.state_dict()
    save_file(
        state | {"patch_embed.proj.weight": state["patch_embed.proj.weight"].flatten(1)}, tmp_path / "w.safetensors"
    )
    weights.load(model, tmp_path / "w.safetensors")
    assert torch.equal(features(model), features(published))


def test_half_precision_files_load_as_single(tmp_path):
    model = shaken()
    torch.save({key: value.half() for key, value in shaken(seed=1).state_dict().items()}, tmp_path / "half.pth")
    weights.load(model, tmp_path / "half.pth")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (MICRO, {}),
        (MICRO, dict(global_pool="avg", positions="sincos")),
        (MICRO, dict(global_pool="avg", fc_norm=True)),
        (MICRO, dict(positions="relative", init_values=0.1)),
        (MICRO, dict(positions="relative", global_pool="avg", img_size=(24, 32))),
        ("vit_micro_patch4_32", dict(img_size=(32, 16), reg_tokens=3)),
        (MICRO, dict(reg_tokens=2, no_embed_class=True, init_values=0.1, img_size=(16, 48))),
        ("vit_tiny_patch16_224", dict(global_pool="avg")),
        ("vit_tiny_patch16_224", dict(img_size=(64, 96), drop_path=0.1)),
    ],
)
def test_timm_and_we_load_an_export_with_equal_features(name, overrides, tmp_path):
    model = shaken(name, **overrides)
    folder = weights.export(model, tmp_path / "run" / "export")
    images = torch.randn(2, 3, *model.img_size)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours, report = weights.create(folder)
    assert ours.architecture == model.architecture
    assert report.resampled is None
    with torch.no_grad():
        expected = model(images)
        if model.rel_pos_bias is None:
            assert torch.equal(ours(images), expected)
        else:  # the bias of keys, which BEiT has not, cancels but for rounding
            torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs.forward_features(images), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs(images), model.pool(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "overrides", [{}, dict(global_pool="avg"), dict(global_pool="avg", fc_norm=True, reg_tokens=2)]
)
def test_timm_classifies_with_an_exported_head_as_we_do(overrides, tmp_path):
    model, classifier = shaken(**overrides), Classifier(128, 3, std=0.1)
    folder = weights.export(model, tmp_path / "export", classifier=classifier, classes=("ant", "bee", "cow"))
    images = torch.randn(2, 3, 32, 32)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        expected = classifier(model.pool(model(images)))
        torch.testing.assert_close(theirs(images), expected, atol=1e-5, rtol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_classes"], config["label_names"]) == (3, ["ant", "bee", "cow"])
    again, report = weights.create(folder)
    assert torch.equal(features(again), features(model))
    assert set(report.set_aside) == {"head.weight", "head.bias"}


def test_an_export_describes_itself(tmp_path):
    folder = weights.export(shaken(img_size=(16, 48)), tmp_path / "export", extra={"method": "mae", "epoch": 3})
    config = json.loads((folder / "config.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]
    assert config["extra"] == {"method": "mae", "epoch": 3}
    assert (config["architecture"], config["num_classes"], config["num_features"], config["global_pool"]) == (
        "vit_tiny_patch16_224", 0, 128, "token",
    )  # fmt: skip
    assert config["model_args"]["embed_dim"] == 128
    assert not {"tag", "license", "origin_url"} & set(config["pretrained_cfg"])
    data = resolve_data_config({}, model=timm.create_model(f"local-dir:{folder}"))
    assert (data["input_size"], tuple(data["mean"]), data["interpolation"]) == (
        (3, 16, 48),
        IMAGENET_DEFAULT_MEAN,
        "bicubic",
    )


def test_run_folders_and_timm_like_folders_can_be_created_from(tmp_path):
    model = shaken()
    folder = weights.export(model, tmp_path / "export")
    again, _ = weights.create(str(tmp_path), drop_path=0.3)
    assert torch.equal(features(again), features(model))
    assert again.architecture.drop_path == 0.3
    weights.load(shaken(seed=1), tmp_path)
    tiny = weights.export(shaken("vit_tiny_patch16_224", global_pool="avg"), tmp_path / "tiny")
    config = json.loads((tiny / "config.json").read_text())
    del config["tessera"]
    (tiny / "config.json").write_text(json.dumps(config))
    foreign, _ = weights.create(tiny)
    assert (foreign.depth, foreign.global_pool, foreign.architecture.fc_norm) == (2, "avg", False)
    with pytest.raises(BadInput, match="does not say which model"):
        weights.create(folder / "model.safetensors")
    (folder / "config.json").write_text("{")
    with pytest.raises(BadInput, match="no readable config"):
        weights.create(folder)


def test_an_export_replaces_its_forerunner_whole_or_not_at_all(tmp_path, monkeypatch):
    first, second = shaken(), shaken(seed=1)
    folder = weights.export(first, tmp_path / "export")

    def fail(*args, **options):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("timm.models.save_for_hf", fail)
        with pytest.raises(OSError, match="disk full"):
            weights.export(second, folder)
    assert torch.equal(features(weights.create(folder)[0]), features(first))
    weights.export(second, folder)
    assert torch.equal(features(weights.create(folder)[0]), features(second))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_export_never_replaces_something_else(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").touch()
    for target in (tmp_path / "precious", tmp_path / "precious" / "thesis.tex"):
        with pytest.raises(BadInput, match="something else"):
            weights.export(shaken(), target)
    assert (tmp_path / "precious" / "thesis.tex").exists()
