"""What holds for every method there is: a bad update changes nothing, and timm loads what is exported."""

from pathlib import Path

import pytest
import timm
import torch

from engine import methods, recipes
from engine.core.draws import Draws
from engine.data.sources import open_images
from engine.methods.base import Labels, Method
from engine.model import vit, weights
from engine.training.step import Update
from tests.methods.small import small
from tests.saved import content

CLASSES = ("one", "two", "three")


def make(name: str) -> Method:
    """At the sizes of small.py, with the encoder that the digits recipe asks for."""
    torch.manual_seed(0)
    kind, encoder = methods.get(name), recipes.recipe(name, "", "digits", embedded=True).encoder
    settings = kind.Settings(**small(kind.Settings, epochs=4))
    known = (Labels(torch.arange(8) % 3, CLASSES),) if settings.labelled else ()
    method = kind(vit.create("vit_micro_patch8_32", depth=2, **encoder), settings, *known)
    method.prepare(open_images(None, "train"), torch.device("cpu"))
    return method


@pytest.mark.parametrize("name", methods.names())
def test_a_skipped_update_changes_nothing_and_a_sound_one_does(name: str):
    method = make(name)
    update, ids = Update(method, 100), torch.arange(8)

    def step(number: int, poison: bool = False) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        images = tuple(torch.randn(8, 3, *view.size, generator=generator) for view in method.views())
        if poison:
            images[-1][2] = torch.nan
        drawn = method.draw(Draws(0, number, batch=8, rows=slice(None), device=torch.device("cpu")))
        update(number, images, ids, drawn)
        return content(method, update)

    before = step(50)
    after = step(51, poison=True)
    assert update.skipped == 1 and before.keys() == after.keys()
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
    last = step(51)
    moved = {key.rpartition("/")[0] for key, value in after.items() if not torch.equal(value, last[key])}
    trained = {f"optimizer/{key}" for group in method.groups(8) for key in group.parameters}
    assert trained <= moved and update.skipped == 1


@pytest.mark.parametrize("name", methods.names())
def test_timm_loads_the_export_and_sees_the_same_features(name: str, tmp_path: Path):
    method = make(name).eval()
    weights.export(method.evaluated, tmp_path / "export", classifier=method.classifier)
    twin = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    images = torch.randn(4, 3, *method.encoder.img_size)
    with torch.no_grad():
        theirs, ours = twin.forward_head(twin.forward_features(images), pre_logits=True), method.features(images)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        if method.classifier is not None:
            torch.testing.assert_close(method.classifier(ours), twin(images), atol=1e-5, rtol=1e-5)
