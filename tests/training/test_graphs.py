"""Replayed steps: that they equal those that are not, for every method that says so; who says otherwise, and why; flags."""

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import _lru_cache_wrapper

import pytest
import torch
from torch.utils._pytree import tree_leaves

from engine import methods, recipes
from engine.core import dist
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.phases import WHOLE, Phase
from engine.data.sources import open_images
from engine.methods.base import Labels, Method
from engine.methods.settings import RAGGED, StageSettings
from engine.model import vit
from engine.training import config, graphs
from engine.training import step as step_module
from engine.training.build import compile_regions
from engine.training.config import Train
from engine.training.graphs import WARM_UP, Replayed
from engine.training.step import Update
from tests.methods.small import CONSTANT, REPLAYED, small
from tests.played import Played
from tests.saved import content

BATCH, STEPS = 8, WARM_UP + 4
DEPTH = "stochastic depth is drawn on the host"
RISES = "the targets' temperature rises in the first epochs"
MIXES = "mixup and CutMix go by numbers that the host reads"
QUEUE = "the queue of keys comes into use after some epochs"
NOISE = "the noise in place of pixels is drawn from seeds that the host reads"
# what has no form that can be replayed
REFUSED = {"beit": RAGGED, "ibot": RAGGED, "dinov2": RAGGED}


def make(name: str, encoder: dict[str, object] | None = None, **others: object) -> Method:
    torch.manual_seed(0)
    kind = methods.get(name)
    settings = replace(kind.Settings(**small(kind.Settings, epochs=4)), **others)
    known = (Labels(torch.arange(BATCH) % 3, ("one", "two", "three")),) if settings.labelled else ()
    method = kind(vit.create("vit_micro_patch8_32", depth=2, **(encoder or {})), settings, *known)
    if name == "beit":
        method.prepare(open_images(None, "train"), torch.device("cpu"))
    return method


def updating(method: Method, replays: bool, accumulate: int = 1) -> Update:
    update = Update(method, 8, accumulate=accumulate)
    if replays:
        update.replayed = Replayed(method, update.trained, Played())
    return update


def probe(method: Method, update: Update) -> None:
    """As between two steps: averaged weights are put in the place of the others, and back."""
    with update.average.in_place(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        method.eval().features(torch.zeros(2, 3, 32, 32, device=update.skipped.device))
    method.train()


def train(method: Method, update: Update, between: Callable[[Method, Update], None] = probe) -> dict[str, torch.Tensor]:
    """All that a checkpoint would hold after some updates, and what each of them reported; there is one replay before what
    comes between two of them, and others behind."""
    reports, device = {}, update.skipped.device
    ids = torch.arange(BATCH, device=device)
    for step in range(STEPS):
        if step == WARM_UP + 2:
            between(method, update)
        generator = torch.Generator().manual_seed(step)
        images = tuple(torch.randn(BATCH, 3, *view.size, generator=generator).to(device) for view in method.views())
        drawn = method.draw(Draws(0, step, batch=BATCH, rows=slice(None), device=device))
        report = update(step, images, ids.roll(step), drawn)
        reports |= {f"{step}/{name}": torch.as_tensor(value).clone() for name, value in report.items()}
    return reports | content(method, update)


def differing(name: str, accumulate: int = 1, **others: object) -> list[str]:
    ends = []
    for replays in (False, True):
        method = make(name, **others)
        ends.append(train(method, updating(method, replays, accumulate)))
    plain, replayed = ends
    assert plain.keys() == replayed.keys()
    return [key for key, value in plain.items() if not torch.equal(value, replayed[key])]


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Played]:
    """The graphs that updates begin to record, in order, in place of CUDA's."""
    found: list[Played] = []
    monkeypatch.setattr(step_module, "CudaGraph", lambda device: found.append(Played()) or found[-1])
    return found


def test_a_phase_of_other_sizes_is_captured_anew(recorders: list[Played]):
    ends = []
    for replays in (False, True):
        method = make("mae", **REPLAYED["mae"])
        update = updating(method, replays)
        whole = train(method, update)
        update.begin_phase(method.phase, update.images_per_step)  # the same: nothing is captured anew
        assert not recorders
        update.begin_phase(Phase(side=0.5), update.images_per_step)
        ends.append({f"whole/{name}": value for name, value in whole.items()} | train(method, update))
    assert len(recorders) == 1 and update.replayed.recorder is recorders[0]
    assert update.replayed.buffers["view 0"].shape[-2:] == (16, 16)
    assert [name for name, value in ends[0].items() if not torch.equal(value, ends[1][name])] == []


def test_each_form_of_a_phase_has_a_graph_of_its_own(recorders: list[Played]):
    ends = []
    for replays in (False, True):
        method = make("mae", **REPLAYED["mae"])
        update = updating(method, replays)
        update.begin_phase(Phase(draws=(1.0, 2.0)), update.images_per_step)
        reports = {}
        for step in range(2 * (WARM_UP + 2)):
            update.show(update.phase.forms[step % 2])
            generator = torch.Generator().manual_seed(step)
            images = tuple(torch.randn(BATCH, 3, *view.size, generator=generator) for view in method.views())
            drawn = method.draw(Draws(0, step, batch=BATCH, rows=slice(None), device=torch.device("cpu")))
            report = update(step, images, torch.arange(BATCH), drawn)
            reports |= {f"{step}/{name}": torch.as_tensor(value).clone() for name, value in report.items()}
        ends.append(reports | content(method, update))
    assert len(recorders) == 1  # beside the first one
    assert [name for name, value in ends[0].items() if not torch.equal(value, ends[1][name])] == []
    update.begin_phase(WHOLE, update.images_per_step)
    assert not update._others


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


@pytest.mark.parametrize("name", REPLAYED)
def test_what_a_graph_reads_stays_where_it_is(name: str):
    """Whatever it did not make itself is kept by who keeps it for good, so that a device would read no memory of others."""
    method = make(name, **REPLAYED[name])
    update = updating(method, True)
    train(method, update)
    caches = [
        x for module, held in list(sys.modules.items()) if module.startswith("engine.") for x in vars(held).values()
    ]
    for_good = [x for x in caches if isinstance(x, _lru_cache_wrapper) and x.cache_parameters()["maxsize"] is None]
    kept = [*method.parameters(), *method.buffers(), *update.replayed.buffers.values()]
    kept += [x for cache in for_good for x in tree_leaves(gc.get_referents(cache)) if isinstance(x, torch.Tensor)]
    places = {x.untyped_storage().data_ptr() for x in kept}
    assert [x.shape for x in update.replayed.recorder.outside if x.untyped_storage().data_ptr() not in places] == []


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
    ("name", "encoder", "settings", "why"),
    [("simmim", {"drop_path": 0.1}, {}, DEPTH), ("ibot", {}, CONSTANT, RAGGED), ("beit", {}, {}, RAGGED)],
)
def test_what_waits_for_a_device_cannot_be_captured(name: str, encoder: dict, settings: dict, why: str):
    method = make(name, encoder, **settings)
    assert method.settings.ungraphed(method.encoder) == why
    with pytest.raises(
        BadInput, match=r"could not be captured as a CUDA graph \(.* waits for the device\); go on with"
    ):
        train(method, updating(method, True))


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
        return train(method, updating(method, replays))

    plain, replayed = stale(False), stale(True)
    assert not torch.equal(plain[f"{WARM_UP + 1}/loss"], replayed[f"{WARM_UP + 1}/loss"])
    assert torch.equal(plain["0/loss"], replayed["0/loss"])


def test_weights_that_move_elsewhere_would_be_stale():
    """That the comparison sees this, too: nobody may give a parameter other memory for good."""

    def move(method: Method, update: Update) -> None:
        for parameter in method.parameters():
            parameter.data = parameter.data.clone()

    method = make("mae")
    plain = train(method, updating(method, False), move)
    method = make("mae")
    replayed = train(method, updating(method, True), move)
    assert torch.equal(plain[f"{WARM_UP + 1}/loss"], replayed[f"{WARM_UP + 1}/loss"])
    assert not torch.equal(plain[f"{WARM_UP + 3}/loss"], replayed[f"{WARM_UP + 3}/loss"])


def test_shapes_may_not_change():
    method = make("mae")
    update = updating(method, True)
    draws = Draws(0, 0, batch=BATCH, rows=slice(None), device=torch.device("cpu"))
    images, ids, drawn = (torch.randn(BATCH, 3, 32, 32),), torch.arange(BATCH), method.draw(draws)
    update(0, images, ids, drawn)
    with pytest.raises(ValueError, match="must keep names, shapes and dtypes"):
        update(1, (images[0][:1],), ids, drawn)


def test_a_method_that_says_nothing_is_not_replayed():
    encoder = vit.create("vit_micro_patch8_32", depth=1)
    assert "nobody has shown" in StageSettings().ungraphed(encoder)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "compiles"), [*((name, False) for name in REPLAYED), ("mae", True), ("mocov3", True)])
def test_on_a_gpu_replayed_updates_are_those_that_are_not_bit_for_bit(name: str, compiles: bool):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # sums by atomics differ from run to run, replayed or not
    try:
        ends = []
        for replays in (False, True):
            method = make(name, {"positions": "sincos"}, **REPLAYED[name]).to("cuda")  # none to interpolate, by atomics
            if compiles:
                compile_regions(method)
            ends.append(train(method, Update(method, 8, "bf16", graphs=replays)))
    finally:
        torch.use_deterministic_algorithms(before)
    plain, replayed = ends
    assert plain.keys() == replayed.keys()
    assert [key for key, value in plain.items() if not torch.equal(value.cpu(), replayed[key].cpu())] == []


GPU = dist.Ranks(0, 1, torch.device("cuda", 0))
LENGTHS = "attention in fp32, or before sm_80, may read lengths on the host"


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def obstacle(method: Method, ranks: dist.Ranks = GPU, precision: str = "bf16", **flags: object) -> str:
    return graphs.obstacle(Train(**({"graphs": "on"} | flags)), method.settings, method.encoder, ranks, precision)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({}, ""),
        ({"precision": "fp16"}, ""),
        ({"graphs": "auto"}, ""),
        ({"graphs": "off"}, "--graphs off"),
        ({"ranks": dist.Ranks(0, 1, torch.device("cpu"))}, "graphs are for GPUs"),
        ({"ranks": dist.Ranks(0, 2, torch.device("cuda", 0))}, "not under several processes yet"),
        ({"precision": "fp32"}, LENGTHS),
        ({"profile": 2}, "--profile watches launches one by one"),
        ({"accumulate": 2}, "micro-batches whose images are compared are represented twice"),
    ],
)
@pytest.mark.usefixtures("h200")
def test_what_else_keeps_a_step_from_it(flags: dict, why: str):
    assert obstacle(make("mocov3"), **flags) == why


def test_an_older_gpu_keeps_a_step_from_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert obstacle(make("mae"), precision="fp16") == LENGTHS


@pytest.mark.usefixtures("h200")
def test_checks_of_values_keep_a_step_from_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TESSERA_DEBUG", "1")
    assert obstacle(make("mae")) == "TESSERA_DEBUG=1 looks at what tensors hold"


def test_on_is_refused_in_one_sentence_where_it_cannot_be():
    with pytest.raises(BadInput, match=r"^--graphs on cannot be had in stage dino: stochastic .* host; leave it out"):
        graphs.check("on", [("mae", ""), ("dino", DEPTH)])
    graphs.check("on", [("mae", "")])
    graphs.check("auto", [("dino", DEPTH)])


def test_what_a_run_says_of_its_stages():
    assert graphs.described([("mae", "")]) == "steps replayed from a CUDA graph"
    assert graphs.described([("mae", RISES), ("dino", RISES)]) == f"no CUDA graph: {RISES}"
    said = graphs.described([("mae", ""), ("dino", DEPTH)])
    assert said == f"mae: steps replayed from a CUDA graph; dino: no CUDA graph: {DEPTH}"


# what --graphs on does at the published settings
PUBLISHED = {
    "mae": "", "maect": "", "nnclr": "", "mocov3": "", "swav": "", "msn": "", "mim_refiner": "", "mim_heads": "",
    "simmim": DEPTH, "relvit": DEPTH, "supervised": DEPTH, "dino": DEPTH, "mim_cluster": DEPTH,
    "beit": RAGGED, "ibot": RAGGED, "dinov2": RAGGED, "mmc": RAGGED,
}  # fmt: skip


@pytest.mark.usefixtures("h200")
def test_published_settings_that_are_replayed():
    for name, why in PUBLISHED.items():
        plan = config.parse(["--method", name, "--preset", "plain", "--model", "vit_tiny_patch16_224"])
        encoder = vit.create(plan.model, **plan.encoder)
        found = {
            stage: graphs.obstacle(Train(graphs="on"), settings, encoder, GPU, "bf16")
            for stage, settings in plan.stages
        }
        assert set(found.values()) == {why}, name
    assert PUBLISHED.keys() >= {name for name in methods.names() if _has_plain(name)}


def _has_plain(name: str) -> bool:
    try:
        recipes.preset_for(name, "plain", embedded=False)
    except BadInput:
        return False
    return True
