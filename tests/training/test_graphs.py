"""Replayed steps: that they equal those that are not, for every method that says so; who says otherwise, and why; flags."""

from dataclasses import replace

import pytest
import torch

from engine import methods, recipes
from engine.core import dist
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.data.sources import open_images
from engine.methods.base import RAGGED, Labels, Method, StageSettings
from engine.model import vit
from engine.training import config, graphs
from engine.training.config import Train
from engine.training.graphs import WARM_UP, Replayed
from engine.training.step import Update
from tests.methods.small import small
from tests.played import Played
from tests.saved import content

BATCH, STEPS = 8, WARM_UP + 4
DEPTH = "stochastic depth is drawn on the host"
RISES = "the targets' temperature rises in the first epochs"
MIXES = "mixup and CutMix go by numbers that the host reads"
QUEUE = "the queue of keys comes into use after some epochs"
NOISE = "the noise in place of pixels is drawn from seeds that the host reads"
CONSTANT = {"target_temperature_start": 0.04, "target_temperature": 0.04, "target_temperature_epochs": 0}
# of every method a form that can be replayed, if it has one, as settings over those of small.py
REPLAYED = {
    "mae": {"crops": 2}, "simmim": {}, "relvit": {"permute": True, "mega_patches": 2, "class_weight": 1.0},
    "supervised": {"mixup": 0.0, "cutmix": 0.0, "erase": 0.5}, "mocov3": {}, "nnclr": {"patch_keep": 0.5},
    "maect": {"weight_ema": 0.9}, "dino": CONSTANT, "msn": CONSTANT, "swav": {"queue_size": 0}, "mim_heads": {},
    "mim_refiner": {}, "mim_cluster": CONSTANT, "mmc": CONSTANT | {"distil": "cls_to_patch"},
}  # fmt: skip
# and what has none
REFUSED = {"beit": RAGGED, "ibot": RAGGED, "dinov2": RAGGED}


def make(name: str, drop_path: float = 0.0, **others: object) -> Method:
    torch.manual_seed(0)
    kind = methods.get(name)
    settings = replace(kind.Settings(**small(kind.Settings, epochs=4)), **others)
    known = (Labels(torch.arange(BATCH) % 3, ("one", "two", "three")),) if settings.labelled else ()
    method = kind(vit.create("vit_micro_patch8_32", depth=2, drop_path=drop_path), settings, *known)
    if name == "beit":
        method.prepare(open_images(None, "train"), torch.device("cpu"))
    return method


def train(method: Method, replays: bool, accumulate: int = 1, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """All that a checkpoint would hold after some updates, and what each of them reported."""
    update, ids = Update(method, 8, accumulate=accumulate), torch.arange(BATCH)
    if replays:
        update.replayed = Replayed(method, update.trained, Played())
    reports = {}
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = tuple(torch.randn(BATCH, 3, *view.size, generator=generator) for view in method.views())
        drawn = method.draw(Draws(0, step, batch=BATCH, rows=slice(None), device=torch.device("cpu")))
        report = update(step, images, ids.roll(step), drawn)
        reports |= {f"{step}/{name}": torch.as_tensor(value).clone() for name, value in report.items()}
    return reports | content(method, update)


def differing(name: str, accumulate: int = 1, **others: object) -> list[str]:
    plain, replayed = (train(make(name, **others), replays, accumulate) for replays in (False, True))
    assert plain.keys() == replayed.keys()
    return [key for key, value in plain.items() if not torch.equal(value, replayed[key])]


def test_every_method_has_a_form_that_is_replayed_or_says_why_not():
    assert REPLAYED.keys() | REFUSED.keys() == set(methods.names())
    for name, settings in REPLAYED.items():
        method = make(name, **settings)
        assert method.settings.ungraphed(method.encoder) == "", name
    for name, why in REFUSED.items():
        method = make(name)
        assert method.settings.ungraphed(method.encoder) == why


@pytest.mark.parametrize("name", REPLAYED)
def test_replayed_updates_are_those_that_are_not_bit_for_bit(name: str):
    assert differing(name, **REPLAYED[name]) == []


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_so_are_those_of_micro_batches(name: str):
    assert differing(name, accumulate=2) == []


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("dino", {"target_temperature_start": 0.02, "target_temperature": 0.07, "target_temperature_epochs": 4}, RISES),
        ("swav", {"queue_size": 16, "queue_from": 2}, QUEUE),
        ("supervised", {"cutmix": 0.0}, MIXES),
        ("mim_cluster", CONSTANT | {"fill": "noise"}, NOISE),
    ],
)
def test_what_python_computes_with_would_be_frozen(name: str, settings: dict, why: str):
    method = make(name, **settings)
    assert method.settings.ungraphed(method.encoder) == why
    assert any(key.startswith(f"{WARM_UP + 2}/") for key in differing(name, **settings))


@pytest.mark.parametrize(
    ("name", "drop_path", "settings", "why"),
    [("simmim", 0.1, {}, DEPTH), ("ibot", 0.0, CONSTANT, RAGGED), ("beit", 0.0, {}, RAGGED)],
)
def test_what_waits_for_a_device_cannot_be_captured(name: str, drop_path: float, settings: dict, why: str):
    method = make(name, drop_path, **settings)
    assert method.settings.ungraphed(method.encoder) == why
    with pytest.raises(
        BadInput, match=r"could not be captured as a CUDA graph \(.* waits for the device\); go on with"
    ):
        train(method, True)


def test_a_step_s_tensors_that_bypass_the_buffers_would_be_stale():
    """That the comparison sees what it is there for."""

    def stale(replays: bool) -> dict[str, torch.Tensor]:
        method = make("mae")
        forward = method.forward
        drawn = method.draw(Draws(0, 0, batch=BATCH, rows=slice(None), device=torch.device("cpu")))
        given = []

        def bypassing(images, ids, _):
            given.append(drawn["noise"].roll(len(given), 0))  # another at every call, as a draw would be
            return forward(images, ids, {"noise": given[-1]})

        method.forward = bypassing
        return train(method, replays)

    plain, replayed = stale(False), stale(True)
    assert not torch.equal(plain[f"{WARM_UP + 1}/loss"], replayed[f"{WARM_UP + 1}/loss"])
    assert torch.equal(plain["0/loss"], replayed["0/loss"])


def test_shapes_may_not_change():
    method = make("mae")
    update = Update(method, 8)
    update.replayed = Replayed(method, update.trained, Played())
    draws = Draws(0, 0, batch=BATCH, rows=slice(None), device=torch.device("cpu"))
    images, ids, drawn = (torch.randn(BATCH, 3, 32, 32),), torch.arange(BATCH), method.draw(draws)
    update(0, images, ids, drawn)
    with pytest.raises(ValueError, match="must keep names, shapes and dtypes"):
        update(1, (images[0][:1],), ids, drawn)


def test_a_method_that_says_nothing_is_not_replayed():
    encoder = vit.create("vit_micro_patch8_32", depth=1)
    assert "nobody has shown" in StageSettings().ungraphed(encoder)


GPU = dist.Ranks(0, 1, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("flags", "ranks", "why"),
    [
        ({}, GPU, ""),
        ({"graphs": "on"}, GPU, ""),
        ({"graphs": "off"}, GPU, "--graphs off"),
        ({}, dist.Ranks(0, 1, torch.device("cpu")), "graphs are for GPUs"),
        ({}, dist.Ranks(0, 2, torch.device("cuda", 0)), "not under several processes yet"),
        ({"profile": 2}, GPU, "--profile watches launches one by one"),
        ({"accumulate": 2}, GPU, "micro-batches whose images are compared are represented twice"),
    ],
)
def test_what_else_keeps_a_step_from_it(flags: dict, ranks: dist.Ranks, why: str):
    method = make("mocov3")
    assert graphs.obstacle(Train(**flags), method.settings, method.encoder, ranks) == why


def test_checks_of_values_keep_a_step_from_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TESSERA_DEBUG", "1")
    method = make("mae")
    assert "TESSERA_DEBUG=1" in graphs.obstacle(Train(), method.settings, method.encoder, GPU)


def test_on_is_refused_in_one_sentence_where_it_cannot_be():
    method = make("mae")
    with pytest.raises(BadInput, match=r"^--graphs on cannot be had in stage mae: graphs are for GPUs; auto takes"):
        graphs.check(Train(graphs="on"), "mae", method.settings, method.encoder, dist.Ranks(0, 1, torch.device("cpu")))
    graphs.check(Train(graphs="on"), "mae", method.settings, method.encoder, GPU)
    graphs.check(Train(), "mae", method.settings, method.encoder, dist.Ranks(0, 1, torch.device("cpu")))


def test_what_a_run_says_of_its_stages():
    assert graphs.described([("mae", "")]) == "steps replayed from a CUDA graph"
    assert graphs.described([("mae", RISES), ("dino", RISES)]) == f"no CUDA graph: {RISES}"
    said = graphs.described([("mae", ""), ("dino", DEPTH)])
    assert said == f"mae: steps replayed from a CUDA graph; dino: no CUDA graph: {DEPTH}"


# what --graphs auto does at the published settings
PUBLISHED = {
    "mae": "", "maect": "", "nnclr": "", "mocov3": "", "swav": "", "msn": "", "mim_refiner": "", "mim_heads": "",
    "simmim": DEPTH, "relvit": DEPTH, "supervised": DEPTH, "dino": DEPTH, "mim_cluster": DEPTH,
    "beit": RAGGED, "ibot": RAGGED, "dinov2": RAGGED, "mmc": RAGGED,
}  # fmt: skip


def test_published_settings_that_are_replayed():
    for name, why in PUBLISHED.items():
        plan = config.parse(["--method", name, "--preset", "plain", "--model", "vit_tiny_patch16_224"])
        encoder = vit.create(plan.model, **plan.encoder)
        found = {stage: graphs.obstacle(Train(), settings, encoder, GPU) for stage, settings in plan.stages}
        assert set(found.values()) == {why}, name
    assert PUBLISHED.keys() >= {name for name in methods.names() if _has_plain(name)}


def _has_plain(name: str) -> bool:
    try:
        recipes.preset_for(name, "plain", embedded=False)
    except BadInput:
        return False
    return True
