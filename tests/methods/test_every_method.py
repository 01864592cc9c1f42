"""What holds for every method there is: a bad update changes nothing, nor does leaving out what is only logged, and timm loads
what is exported."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import methods, recipes
from engine.core.draws import Draws
from engine.data.sources import open_images
from engine.methods.base import Labels, Method
from engine.model import vit, weights
from engine.training.step import Update
from tests.methods.small import small
from tests.saved import content

CLASSES = ("one", "two", "three")
TARGETS, NEIGHBOURS = {"prototype_usage", "target_entropy"}, {"neighbour_similarity", "queue_filled"}
ONLY_LOGGED = {  # by method, what its report has of logged updates alone
    "beit": {"code_usage"},
    **{name: NEIGHBOURS for name in ("nnclr", "maect", "mim_heads", "mim_refiner")},
    **{name: TARGETS for name in ("dino", "swav", "msn", "mmc")},
    **{name: TARGETS | {"patch_prototype_usage"} for name in ("ibot", "dinov2", "mim_cluster")},
}


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
def test_what_is_drawn_ahead_asks_for_no_device(name: str, monkeypatch: pytest.MonkeyPatch):
    """Another thread must launch nothing, and what is drawn on the device need not be drawn ahead."""
    method, asked = make(name), []
    generator = Draws.generator.func
    monkeypatch.setattr(Draws, "generator", property(lambda draws: asked.append(draws) or generator(draws)))
    method.draw(Draws(0, 1, batch=8, rows=slice(None), device=torch.device("cpu")))
    assert not (method.draws_ahead and asked)
    assert method.draws_ahead == (name in ("ibot", "dinov2", "mmc", "mim_cluster", "beit"))


class Operations(TorchDispatchMode):
    """Counts what torch is asked to compute while it is the mode."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def updates(name: str, logged: Sequence[bool]) -> tuple[list[dict], list[int], dict[str, torch.Tensor]]:
    """What each of these updates reports, how many operations it takes, and the state at their end."""
    method = make(name)
    update, reports, counts = Update(method, 100), [], []
    for number, whether in enumerate(logged):
        generator = torch.Generator().manual_seed(number)
        images = tuple(torch.randn(8, 3, *view.size, generator=generator) for view in method.views())
        drawn = method.draw(Draws(0, number, batch=8, rows=slice(None), device=torch.device("cpu")))
        with Operations() as operations:
            reports.append(update(50 + number, images, torch.arange(8), drawn, whether))
        counts.append(operations.count)
    return reports, counts, content(method, update)


@pytest.mark.parametrize("name", methods.names())
def test_an_update_that_is_not_logged_computes_less_and_changes_the_same(name: str):
    updates(name, (True,))  # fills what is made once a process
    always, all_counts, all_content = updates(name, (True, True, True))
    seldom, few_counts, few_content = updates(name, (False, True, False))
    assert [key for key, value in all_content.items() if not torch.equal(value, few_content[key])] == []
    for number, (whole, rest) in enumerate(zip(always, seldom, strict=True)):
        left_out = set() if number == 1 else ONLY_LOGGED.get(name, set())
        left_out = left_out | ({"centre_norm"} if left_out and "centre_norm" in whole else set())
        assert whole.keys() - rest.keys() == left_out
        assert (few_counts[number] < all_counts[number]) == bool(left_out)
        for key, value in rest.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(whole[key])), key


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
