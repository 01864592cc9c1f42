"""Training an encoder, or the last blocks of it, together with a classifier: what fine-tuning protocols share.

The method is `engine.methods.supervised`, with the recipes of `engine.recipes.supervised`; here it is run without a run folder,
on any part of a set, and judged at its end.

Shapes: n training images, m test images, K classes.
"""

import math
import tempfile
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tyro.conf import Suppress

from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.data.pipeline import TrainLoader, eval_batches
from engine.data.sources import ImageSet
from engine.evals.result import as_chosen
from engine.evals.subject import Subject
from engine.evals.training import progress
from engine.methods import supervised
from engine.methods.base import Labels
from engine.model import vit, weights
from engine.model.vit import VisionTransformer
from engine.recipes.supervised import SMALL, fine_tuned
from engine.training.step import Update

RECIPES = ("auto", "mae", "small")
ALL_BLOCKS = -1.0
FEW = 20_000  # images; up to so many, auto takes the small recipe
MOST_EPOCHS = 1000

Size = tuple[int, int]


@dataclass(frozen=True)
class Settings:
    """What fine-tuning protocols have in common; 0 takes the recipe's number."""

    recipe: str = "auto"
    """mae (released for ViT-B, L, H), small (ours), or auto: small for up to 20,000 training images."""
    blocks: float = ALL_BLOCKS
    """Train the last so many blocks only; 0.5: the MLP of the last one; 0: the classifier and last norm; -1: everything."""
    epochs: int = 0
    """Passes over the whole training set."""
    batch_size: int = 0
    """Images of a step."""
    base_lr: float = 0.0
    """Learning rate for 256 images."""
    layer_decay: float = 0.0
    """The learning rate of each layer as a share of that of the layer above."""
    seed: Suppress[int] = 0

    def __post_init__(self):
        if self.recipe not in RECIPES:
            raise BadInput(f"fine-tuning recipe = {self.recipe!r}; choose one of {', '.join(RECIPES)}.")
        if self.blocks not in (ALL_BLOCKS, 0.5) and not (self.blocks >= 0 and self.blocks == int(self.blocks)):
            raise BadInput(f"fine-tuning blocks = {self.blocks:g} must be -1 (all), 0.5, or a whole number from 0.")
        for name in ("epochs", "batch_size", "base_lr", "layer_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(f"fine-tuning {name} = {getattr(self, name)} must be 0 (the recipe's) or above.")
        if self.layer_decay > 1 or self.batch_size % 2:
            raise BadInput("fine-tuning layer_decay must be at most 1, and batch_size even: images are mixed in pairs.")


@dataclass(frozen=True)
class Chosen:
    """A recipe as it is run.

    Attributes:
        source: whose numbers these are.
        settings: of the supervised method.
        overrides: of the encoder.
    """

    source: str
    settings: supervised.Settings
    overrides: dict[str, object]


def chosen(given: Settings, model: VisionTransformer, images: int, whole: int = 0) -> Chosen:
    """The recipe that the settings name, with the numbers that they give in its place.

    Args:
        images: to train on.
        whole: of the set that they are a part of; they are then trained on for as many updates as it would be, in at most
            1,000 epochs.
    """
    if given.recipe == "small" or (given.recipe == "auto" and max(images, whole) <= FEW):
        found = Chosen("ours, for small sets of small images", replace(SMALL, layer_decay=0.75), {})
    else:
        published = fine_tuned(model.architecture.name)
        found = Chosen(published.source, published.stages[0][1], published.encoder)
    numbers = {name: getattr(given, name) for name in ("epochs", "batch_size", "base_lr", "layer_decay")}
    numbers = {name: value for name, value in numbers.items() if value}
    settings = replace(found.settings, **numbers)
    # mixing pairs neighbours, so a batch is even
    batch = min(settings.batch_size, images) // 2 * 2
    epochs = settings.epochs
    if images < whole:
        updates = settings.epochs * (whole // min(settings.batch_size, whole))
        epochs = max(1, min(MOST_EPOCHS, round(updates / (images // batch))))
    return Chosen(
        found.source + as_chosen(numbers), replace(settings, batch_size=batch, epochs=epochs), found.overrides
    )


def prepared(subject: Subject, overrides: dict[str, object]) -> VisionTransformer:
    """A copy of the subject's model under these overrides, on its device, to train. A norm that the overrides add is new.

    Raises:
        BadInput: the weights do not fit the overrides.
    """
    model = subject.vit
    if not overrides:
        return subject.trainable()
    architecture = model.architecture
    merged = dict(architecture.overrides) | overrides
    if architecture.positions == "relative":
        merged["positions"] = "relative"
    twin = vit.create(architecture.name, generator=torch.Generator().manual_seed(0), **merged)
    with tempfile.TemporaryDirectory() as folder:
        weights.export(model, folder)
        weights.load(twin, folder)
    return twin.to(subject.device).train()


def check_model(subject: Subject, given: Settings) -> None:
    """Raise BadInput for weights without so many blocks, or without patches."""
    if given.blocks > subject.vit.depth:
        raise BadInput(
            f"{subject.name} has {subject.vit.depth} blocks, so the last {given.blocks:g} cannot be trained; give fewer."
        )


def freeze_all_but(model: VisionTransformer, blocks: float) -> None:
    """Leave only the last `blocks` blocks to train; 0.5 is the MLP of the last one (MAE, section 4.3), 0 none, -1 everything.

    Norms after the blocks are always trained. Raises BadInput where there are not so many blocks.
    """
    if blocks == ALL_BLOCKS:
        return
    if blocks > model.depth:
        raise BadInput(f"the model has {model.depth} blocks, so the last {blocks:g} cannot be chosen; give fewer.")
    model.requires_grad_(False)
    model.norm.requires_grad_(True)
    model.fc_norm.requires_grad_(True)
    if blocks == 0.5:
        model.blocks[-1].norm2.requires_grad_(True)
        model.blocks[-1].mlp.requires_grad_(True)
    for block in list(model.blocks)[model.depth - int(blocks) :]:
        block.requires_grad_(True)


def fine_tune(
    subject: Subject,
    images: ImageSet,
    labels: Labels,
    recipe: Chosen,
    given: Settings,
    title: str,
    size: Size | None = None,
) -> tuple[supervised.Supervised, list[float]]:
    """The method after training, with averaged weights where the recipe averages, and the loss of every step.

    Args:
        size: (H, W) of the input; None takes the model's.

    Raises:
        BadInput: the model does not fit, or updates were not finite.
    """
    model = prepared(subject, recipe.overrides | ({"img_size": size} if size else {}))
    freeze_all_but(model, given.blocks)
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(given.seed)  # the classifier's first weights
        method = supervised.Supervised(model, recipe.settings, labels).to(subject.device)
    settings = recipe.settings
    steps = settings.epochs * (len(images) // settings.batch_size)
    update = Update(method, steps, subject.precision)
    loader = TrainLoader(
        images, method.views(), settings.batch_size, seed=given.seed, device=subject.device, threads=subject.threads
    )
    losses = []
    with progress(title, steps) as advance:
        for step in range(steps):
            batch = next(loader)
            rows = slice(None)
            draws = Draws(given.seed, "finetune", step, batch=settings.batch_size, rows=rows, device=subject.device)
            report = update(step, batch.images, batch.ids.to(subject.device), method.draw(draws))
            losses.append(report["loss"].detach())
            advance()
    loader.close()
    if int(update.skipped):
        raise BadInput(f"{title}: {int(update.skipped)} updates were not finite; lower the learning rate.")
    for name, average in update.average.weights.items():
        online = update.average.online[name]
        online.data.copy_(average)
    return method.eval(), torch.stack(losses).float().cpu().tolist()


@torch.no_grad()
def scores(subject: Subject, method: supervised.Supervised, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Ids int64 [m] of the readable images, and their scores fp32 [m, K], on the CPU."""
    ids, found = [], []
    how = {"device": subject.device, "threads": subject.threads}
    for batch in eval_batches(images, method.encoder.img_size, subject.batch_size, **how):
        with torch.autocast(subject.device.type, torch.bfloat16, enabled=subject.precision == "bf16"):
            pooled_BC = method.encoder.pool(method.encoder(batch.images[0]))
        ids.append(batch.ids)
        found.append(method.classifier(pooled_BC).cpu())
    return torch.cat(ids), torch.cat(found)


def feature(method: supervised.Supervised) -> str:
    """What the classifier read, in words."""
    return f"{'class token' if method.encoder.global_pool == 'token' else 'mean of patch tokens'}, fine-tuned"
