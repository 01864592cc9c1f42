"""A batch represented in micro-batches and compared as a whole: gradients, report, queues, centres and statistics are those of
one pass, of every method that compares images within the batch."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import methods, recipes
from engine.core.draws import Draws
from engine.methods.comparing import Comparing
from engine.model import vit
from engine.training import gradient_cache
from engine.training.gradient_cache import micro_batches
from engine.training.step import Update
from tests.methods.small import small

IMAGES = 8
# what makes a method compare where it does not by itself, and what makes it compare something else
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "dino": [{"collapse": "sinkhorn"}, {"collapse": "me-max"}],
    "dinov2": [{}, {"collapse": "sinkhorn", "patch_prototypes": 32}],
    "ibot": [{"collapse": "sinkhorn"}],
    "mim_cluster": [{"collapse": "sinkhorn"}],
    "mmc": [{}, {"distil": "cls_to_patch"}],
    "swav": [{"queue_size": 16, "queue_from": 0}],
}
CASES = [
    pytest.param(name, settings, id="-".join([name, *map(str, settings.values())]))
    for name in methods.names()
    if issubclass(methods.get(name), Comparing)
    for settings in SETTINGS.get(name, [{}])
]


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads and losses compute in fp32 at least, whatever they are given; here that is float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def make(name: str, settings: dict[str, Any], drop_path: float = 0.0) -> Comparing:
    """In float64, with weights that one step has moved nowhere yet."""
    torch.manual_seed(0)
    kind, encoder = methods.get(name), dict(recipes.recipe(name, "", "digits", embedded=True).encoder)
    encoder = vit.create("vit_micro_patch8_32", **(encoder | {"depth": 2, "drop_path": drop_path}))
    method = kind(encoder, kind.Settings(**(small(kind.Settings, epochs=1) | settings))).double().train()
    for parameter in method.parameters():  # prototypes and last layers that start at zero would pass no gradient on
        parameter.data += 0.02 * torch.randn_like(parameter)
    return method


def batch(method: Comparing, seed: int = 1) -> tuple[tuple[Tensor, ...], Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = tuple(
        torch.randn(IMAGES, 3, *view.size, generator=generator, dtype=torch.float64) for view in method.views()
    )
    drawn = method.draw(Draws(seed, batch=IMAGES, rows=slice(None), device=torch.device("cpu")))
    return images, torch.arange(IMAGES), drawn


def test_what_does_not_split_is_cut_where_its_comparison_begins():
    """So that there is no stage left for which --accumulate would have nothing to do."""
    for name in methods.names():
        kind = methods.get(name)
        assert kind.Settings(**small(kind.Settings)).splits or issubclass(kind, Comparing), name


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_update_is_that_of_the_whole_batch(name: str, settings: dict[str, Any]):
    found = []
    for accumulate in (1, 4):
        method, gradients = make(name, settings), {}
        assert not method.settings.splits
        update = Update(method, 3, accumulate=accumulate)
        trained = {key: p for group in method.groups(IMAGES) for key, p in group.parameters.items()}
        update.optimizer.register_step_pre_hook(
            lambda *_, trained=trained, gradients=gradients: gradients.update(
                {key: p.grad.clone() for key, p in trained.items() if p.grad is not None}
            )
        )
        report = update(2, *batch(method))
        buffers = {key: value.clone() for key, value in method.named_buffers()}
        found.append((gradients, report, buffers, method.neighbours))
    (gradients, report, buffers, neighbours), (parts, parts_report, parts_buffers, parts_neighbours) = found
    assert gradients.keys() == parts.keys() and any(value.norm() > 0 for value in gradients.values())
    largest = max(value.abs().max() for value in gradients.values())
    for key, value in gradients.items():
        if name == "swav" and key == "encoder.norm.bias":
            continue  # the projector's batch norm takes it away again: only the rounding of what cancels is left
        assert (parts[key] - value).abs().max() <= 1e-6 * max(value.abs().max(), 1e-3 * largest), key
    for key, value in report.items():
        torch.testing.assert_close(torch.as_tensor(parts_report[key]), torch.as_tensor(value), msg=key)
    for key, value in buffers.items():
        torch.testing.assert_close(parts_buffers[key], value, msg=key)
    assert neighbours is None or torch.equal(parts_neighbours, neighbours)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_both_passes_draw_alike(name: str, settings: dict[str, Any]):
    """Under stochastic depth the gradients are those of one graph over all micro-batches, each with its own draws."""
    gradients = []
    for cached in (False, True):
        method = make(name, settings, drop_path=0.5)
        images, ids, drawn = batch(method)
        parts = micro_batches(images, ids, drawn, 2)
        if cached:
            gradient_cache.backward(method, parts, ids, drawn, nullcontext, lambda loss: loss)
        else:
            targets = [method.represent_targets(*part) for part in parts]
            rows = [method.represent(*part) | known for part, known in zip(parts, targets)]
            joined = {
                key: [torch.cat(views) for views in zip(*(part[key] for part in rows), strict=True)] for key in rows[0]
            }
            method.compare(joined, ids, drawn)["loss"].backward()
        gradients.append({key: p.grad for key, p in method.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, atol=1e-8, rtol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["maect", "nnclr"])
def test_no_pass_is_made_for_nothing(name: str):
    """The last micro-batch is represented once, of a frozen encoder all are; the batch is compared once."""
    method, calls = make(name, {}), []
    for part in ("represent", "represent_targets", "compare"):
        called = getattr(method, part)
        setattr(method, part, lambda *args, part=part, called=called: calls.append(part) or called(*args))
    Update(method, 3, accumulate=4)(2, *batch(method))
    again = 3 if method.trains_encoder else 0
    assert [calls.count(part) for part in ("represent", "represent_targets", "compare")] == [4 + again, 4, 1]


def test_nothing_of_a_micro_batch_stays_but_its_rows():
    """Rows are often views of all tokens of an image."""
    method, kept = make("maect", {}), []
    method.encoder.global_pool = "token"
    compare = method.compare
    method.compare = lambda rows, *args: kept.extend(rows["pooled"]) or compare(rows, *args)
    images, ids, drawn = batch(method)
    gradient_cache.backward(method, micro_batches(images, ids, drawn, 2), ids, drawn, nullcontext, lambda loss: loss)
    row = method.encoder.embed_dim * kept[0].element_size()
    assert [x.untyped_storage().nbytes() for x in kept] == [IMAGES * row] * len(kept)
