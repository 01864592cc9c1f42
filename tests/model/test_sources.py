import os
import pickle

import pytest
import timm
import torch

from engine.core.errors import BadInput
from engine.model import weights
from engine.model.twins import twin_of
from tests.model.seeded import features, shaken


class Canary:
    """An object whose unpickling leaves a mark."""

    def __init__(self, mark) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def write_pickle(tree, path) -> None:
    path.write_bytes(pickle.dumps(tree, protocol=2))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".bin", ".pkl", ".safetensors"])
@pytest.mark.parametrize("write", [torch.save, write_pickle])
def test_pickled_objects_are_refused_and_never_run(write, suffix, tmp_path):
    path, mark, model = tmp_path / f"weights{suffix}", tmp_path / "mark", shaken()
    before = features(model)
    write({"model": model.state_dict(), "payload": Canary(mark)}, path)
    with pytest.raises(BadInput, match="no plain weights") as refused:
        weights.load(model, path)
    assert "weights_only" not in str(refused.value) and "trust" not in str(refused.value)
    assert not mark.exists()
    assert torch.equal(features(model), before)


def test_sources_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0")
    (tmp_path / "cut.pth").write_bytes(b"PK\3\4 nothing")
    for source, message in {
        "nowhere.pth": "give a file, an exported folder, a run folder or a timm model",
        "timm:nonsense": "timm has no model 'nonsense'",
        tmp_path / "empty": "neither an exported folder",
        tmp_path / "cut.safetensors": "no plain weights",
        tmp_path / "cut.pth": "no plain weights",
    }.items():
        with pytest.raises(BadInput, match=message):
            weights.load(shaken(), source)


def test_a_timm_name_takes_its_pretrained_weights(monkeypatch):
    other, model, asked = shaken("vit_tiny_patch16_224", seed=1), shaken("vit_tiny_patch16_224"), []
    published = twin_of(other.architecture, "cpu").eval()
    published.load_state_dict(other.architecture.timm_state(other.state_dict()))
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append((name, options)) or published)
    for source in ("vit_tiny_patch16_224.augreg_in21k", "timm:vit_tiny_patch16_224"):
        report = weights.load(model, source)
        assert report.source == f"timm:{source.removeprefix('timm:')}"
    assert asked[0] == ("vit_tiny_patch16_224.augreg_in21k", dict(pretrained=True, num_classes=0))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(images), published.forward_features(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "error", [FileNotFoundError("check your connection"), RuntimeError("No pretrained weights exist")]
)
def test_timm_weights_that_cannot_be_had_are_a_clear_error(error, monkeypatch):
    def refuse(*args, **options):
        raise error

    model = shaken()
    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(BadInput, match=f"weights of vit_tiny_patch16_224 cannot be had, give a file.*{error}"):
        weights.load(model, "timm:vit_tiny_patch16_224")
