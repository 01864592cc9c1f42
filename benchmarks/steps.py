"""Training steps on images that lie ready, for timing."""

from dataclasses import replace
from typing import Any

import torch

from benchmarks.rounds import Step
from engine import methods, recipes
from engine.core.draws import Draws
from engine.methods.base import Labels, Method
from engine.methods.settings import StageSettings
from engine.model import vit
from engine.training.build import compile_regions
from engine.training.step import Update

CLASSES = 1000  # of ImageNet


def published(
    method: str, model: str, batch_size: int, encoder: dict[str, object] | None = None, **changes: Any
) -> tuple[type[Method], vit.VisionTransformer, StageSettings]:
    """The last stage of a method's published recipe, at another batch size: the method, a new encoder, the settings.

    Args:
        encoder: overrides for `engine.model.vit.create` that differ from the recipe's.
        changes: settings that differ from the recipe's.

    Raises:
        BadInput: method or model unknown, or a value does not fit.
    """
    recipe = recipes.recipe(method, model, "plain", embedded=False)
    name, settings = recipe.stages[-1]
    if hasattr(settings, "queue_size"):
        changes["queue_size"] = max(1, settings.queue_size // batch_size) * batch_size
    settings = replace(settings, batch_size=batch_size, **changes)
    settings.check(name)
    torch.manual_seed(0)
    backbone = vit.create(model, **(recipe.encoder | (encoder or {})))
    settings.check_encoder(name, backbone)
    return methods.get(name), backbone, settings


def built(kind: type[Method], encoder: vit.VisionTransformer, settings: StageSettings) -> Method:
    """The method; one that learns from classes is told a thousand, which the batch's images have in turn."""
    if not settings.labelled:
        return kind(encoder, settings)
    names = tuple(map(str, range(CLASSES)))
    return kind(encoder, settings, Labels(torch.arange(settings.batch_size) % CLASSES, names))


def training_step(method: Method, device: torch.device, precision: str, compiles: bool, graphs: bool = False) -> Step:
    """The engine's update of a method, on random images of the sizes of its views; the same ones at every call."""
    batch = method.settings.batch_size
    method.to(device).train()
    if compiles:
        compile_regions(method)
    update = Update(method, 1000, precision, graphs=graphs)
    images = tuple(torch.randn(batch, 3, *view.size, device=device) for view in method.views())
    ids = torch.arange(batch, device=device)
    drawn = method.draw(Draws(0, batch=batch, rows=slice(None), device=device))
    return lambda: update(100, images, ids, drawn)
