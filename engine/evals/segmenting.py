"""Training a segmenter on random crops and judging it by sliding windows: what the protocols with trained heads share.

Shapes: B crops, K classes, H x W pixels of an image as stored, h x w of what is judged, S the side of a crop and of a window.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor, nn
from tyro.conf import Suppress

from engine.core import optim
from engine.core.draws import seed_of
from engine.core.errors import BadInput
from engine.core.plotting import Figure
from engine.data import ahead
from engine.data.annotated import crops, dense
from engine.data.annotated.objects import VOID, ObjectSet, SemanticSet
from engine.evals import charts, label_maps, training
from engine.evals.metrics.confusion import SegmentationCounts, class_iou, mean_iou
from engine.evals.result import Result, as_chosen
from engine.evals.segmentation.heads import pixel_loss, resize
from engine.evals.segmentation.sliding import slide
from engine.evals.subject import Subject
from engine.training.optimizers import AdamW

OURS = (
    "ours, for the embedded scenes: crops with few pixels of the background are preferred, and digits are not mirrored, which "
    "would make others of them"
)
BETAS = (0.9, 0.999)
SCHEDULES = {"cosine": optim.cosine, "poly": optim.linear}
_SHOWN = 4  # images in a picture


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a segmenter is trained and judged, by AdamW.

    Args:
        source: whose numbers these are.
        steps, batch_size: updates, and crops in each.
        lr: at the peak, not scaled by the batch.
        weight_decay: of matrices.
        warmup: steps of linear warm-up.
        warmup_start: share of the peak that it starts from.
        schedule: "cosine", or "poly" of power 1, a straight line; from the end of the warm-up to 0 at the last step.
        size: S.
        short: what the short side of an image is brought to, for training (before the ratio) and for judging.
        stride: of the sliding window.
        ratio, flip, photometric, tries: as `crops.Cropping`.
        dropout: before the last layer.
    """

    source: str
    steps: int
    batch_size: int = 16
    lr: float
    weight_decay: float
    warmup: int = 1500
    warmup_start: float = 0.0
    schedule: str
    size: int = 512
    short: int = 512
    stride: int = 341
    ratio: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    photometric: bool = True
    tries: int = 1
    dropout: float = 0.1

    def share_of_peak(self, step: int) -> float:
        """Of the learning rate at a step."""
        if step < self.warmup:
            return self.warmup_start + (1 - self.warmup_start) * step / self.warmup
        return SCHEDULES[self.schedule](step - self.warmup, self.steps - self.warmup, 1.0, 0.0)


@dataclass(frozen=True)
class Settings:
    """What protocols with trained heads have in common; 0 is the recipe's number."""

    recipe: str = "scenes"
    """scenes (ours), or one as published for ADE20K."""
    steps: int = 0
    """Updates; 0 is the recipe's."""
    batch_size: int = 0
    """Crops in each; 0 is the recipe's."""
    lr: float = 0.0
    """Peak learning rate of the heads, whatever the batch; 0 is the recipe's."""
    size: int = 0
    """Side of crops and windows in pixels, a multiple of the patch size; 0 is the recipe's."""
    looks: int = 0
    """How often mIoU is also computed on the way; the best of all looks is then given beside the last."""
    seed: Suppress[int] = 0

    def check(self, protocol: str, recipes: Sequence[str]) -> None:
        """Raise BadInput for what cannot be meant."""
        if self.recipe not in recipes:
            raise BadInput(f"{protocol} recipe = {self.recipe!r} must be one of {', '.join(recipes)}.")
        if self.steps < 0:
            raise BadInput(f"{protocol} steps = {self.steps} must be at least 1, or 0 for the recipe's.")
        if self.batch_size < 0 or self.batch_size == 1:
            raise BadInput(f"{protocol} batch_size = {self.batch_size} must be at least 2, or 0 for the recipe's.")
        if not 0 <= self.lr <= 1e30:
            raise BadInput(f"{protocol} lr = {self.lr} must be above 0 and at most 1e30, or 0 for the recipe's.")
        for name in ("size", "looks"):
            if getattr(self, name) < 0:
                raise BadInput(f"{protocol} {name} = {getattr(self, name)} must be at least 0.")


def chosen(recipe: Recipe, settings: Settings) -> tuple[Recipe, str]:
    """The recipe with what the settings give (and not 0) in the place of its own, and the departures from it, in words.

    The warm-up keeps its share of the steps; short side and stride keep their proportion to the size.
    """
    own = {field.name for field in fields(recipe)}
    given = {name: value for name, value in asdict(settings).items() if name in own and value}
    departures = as_chosen(given)
    if "steps" in given:
        given["warmup"] = round(recipe.warmup * given["steps"] / recipe.steps)
    if "size" in given:
        given |= {name: round(getattr(recipe, name) * given["size"] / recipe.size) for name in ("short", "stride")}
    return replace(recipe, **given), departures


def check_sets(protocol: str, train: SemanticSet, test: SemanticSet) -> None:
    """Raise BadInput for sets that no segmenter can be trained and judged on."""
    for which, images in (("training", train), ("test", test)):
        if not len(images):
            raise BadInput(f"protocol {protocol}: the {which} set is empty.")
        if isinstance(images, ObjectSet):
            images.check_masks()
    if train.semantic_classes != test.semantic_classes:
        raise BadInput(f"protocol {protocol}: training and test set have different classes.")
    if len(train.semantic_classes) < 2:
        raise BadInput(f"protocol {protocol} needs at least two classes; there is {len(train.semantic_classes)}.")


def check_size(protocol: str, size: int, patch_size: int) -> None:
    """Raise BadInput for crops that are not at least two patches a side."""
    if size % patch_size or size < 2 * patch_size:
        raise BadInput(
            f"{protocol} size = {size} must be a multiple of the patch size {patch_size}, and at least {2 * patch_size}."
        )


def check_model(protocol: str, subject: Subject, size: int) -> None:
    """Raise BadInput for weights that do not take crops of this size."""
    check_size(protocol, size, subject.vit.patch_size)
    subject.check_input(size, size)


def seeded(seed: int, build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """What `build` makes, its weights drawn from the seed alone, on the device."""
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every GPU
        return build().to(device)


@torch.no_grad()
def predicted(model: nn.Module, pixels_3HW: Tensor, recipe: Recipe, subject: Subject) -> Tensor:
    """uint8 [H, W] on the device: the class of every pixel of an image, uint8 [3, H, W]."""
    pixels_3hw = crops.resized(pixels_3HW, recipe.short)

    def logits_of(windows_b3SS: Tensor) -> Tensor:
        with torch.autocast(subject.device.type, torch.bfloat16, enabled=subject.precision == "bf16"):
            return resize(model(windows_b3SS)[0], windows_b3SS.shape[2:])

    images_13hw = dense.normalised(pixels_3hw)[None].to(subject.device)
    logits_1Khw = slide(logits_of, images_13hw, recipe.size, recipe.stride)
    return resize(logits_1Khw, pixels_3HW.shape[1:])[0].argmax(0).to(torch.uint8)


def judged(model: nn.Module, test: SemanticSet, recipe: Recipe, subject: Subject) -> SegmentationCounts:
    """Pixels of a whole set, counted; the model is in training mode again afterwards."""
    counts = SegmentationCounts(len(test.semantic_classes))
    model.eval()

    def read(index: int) -> tuple[Tensor, Tensor]:
        return dense.read(test.images, index), torch.from_numpy(test.semantic(index))

    for pixels_3HW, truth_HW in ahead.loaded(read, range(len(test)), subject.threads):
        counts.add(truth_HW, predicted(model, pixels_3HW, recipe, subject).cpu())
    model.train()
    return counts


def run(
    protocol: str,
    subject: Subject,
    train: SemanticSet,
    test: SemanticSet,
    model: nn.Module,
    groups: Iterator[optim.Group],
    recipe: Recipe,
    *,
    settings: Settings,
    departures: str,
    weights: Sequence[float] = (1.0,),
    said: Mapping[str, str] | None = None,
    feature: str,
) -> Result:
    """Trains a segmenter and judges it after the last step, and on the way where the settings' `looks` ask for that.

    Args:
        model: of images and a generator to the scores of each of its heads, [B, K, ., .]; the first head is judged.
        groups: what of it is trained.
        recipe, departures: as `chosen` gives them.
        weights: of each head's loss.
        said: further settings for the result.

    Raises:
        BadInput: an image or a label map cannot be read, no pixel of the test set is to be counted, or the loss diverged.
    """
    device, seed, miou_at = subject.device, settings.seed, {}
    cropping = crops.Cropping(recipe.size, recipe.short, recipe.ratio, recipe.flip, recipe.photometric, recipe.tries)
    batches = crops.batches(train, cropping, recipe.batch_size, recipe.steps, seed, subject.threads)
    step = 0

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal step
        images, labels = (each.to(device) for each in batch)
        drawing = torch.Generator().manual_seed(seed_of(seed, "stochastic depth", step))
        # dropout knows no other generator than torch's own, which is put back
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else ()):
            torch.manual_seed(seed_of(seed, "dropout", step))
            found = model(images, drawing)
        step += 1
        return sum(weight * pixel_loss(logits, labels) for weight, logits in zip(weights, found, strict=True))

    def look(done: int) -> None:
        if done < recipe.steps:
            miou_at[done] = mean_iou(judged(model, test, recipe, subject).matrix_KK)

    losses = training.train(
        batches,
        loss_of,
        AdamW(groups, BETAS),
        recipe.steps,
        recipe.share_of_peak,
        title=protocol,
        device=device,
        precision=subject.precision,
        every=max(1, recipe.steps // (settings.looks + 1)) if settings.looks else 0,
        meanwhile=look,
    )
    counts = judged(model, test, recipe, subject)
    matrix_KK = counts.matrix_KK
    if not matrix_KK.any():
        raise BadInput(f"protocol {protocol}: no pixel of the test set is to be counted, all are {VOID}.")
    values, samples = counts.figures()
    if miou_at:
        miou_at[recipe.steps] = values["mIoU"]
        values = {"mIoU": values["mIoU"], "best mIoU on the way": max(miou_at.values())} | values
    names, iou_K = test.semantic_classes, class_iou(matrix_KK)
    truth_K = matrix_KK.sum(1)
    return Result(
        protocol=protocol,
        values=values,
        headline=("mIoU", "pixel accuracy"),
        samples=samples,
        settings=asdict(settings)
        | asdict(recipe)
        | {"recipe": f"{settings.recipe}: {recipe.source}{departures}"}
        | dict(said or {}),
        details={
            "IoU by class": {
                name: None if np.isnan(iou) else float(iou) for name, iou in zip(names, iou_K, strict=True)
            },
            "mIoU of the most frequent class everywhere": float(truth_K.max() / truth_K.sum() / (truth_K > 0).sum()),
            "loss by step": tuple(losses),
            "mIoU by step": {str(done): value for done, value in miou_at.items()},
            "pixels by true and predicted class": matrix_KK,
        },
        pictures={
            "images, truth and prediction": _examples(model, test, recipe, subject),
            "IoU by class": label_maps.iou_bars({protocol: iou_K}, truth_K, names),
            "loss": charts.losses({"loss": losses}, miou_at),
        },
        counts={
            "training images": len(train),
            "test images": len(test),
            "training crops": recipe.steps * recipe.batch_size,
            "test pixels": int(matrix_KK.sum()),
        },
        feature=feature,
    )


def _examples(model: nn.Module, test: SemanticSet, recipe: Recipe, subject: Subject) -> Figure:
    """A few test images, evenly spaced in the set, with their classes and the predicted ones."""
    shown = []
    model.eval()
    for index in np.unique(np.linspace(0, len(test) - 1, min(len(test), _SHOWN)).round().astype(int)).tolist():
        pixels_3HW = dense.read(test.images, index)
        found_HW = predicted(model, pixels_3HW, recipe, subject).cpu().numpy()
        image_HW3 = pixels_3HW.permute(1, 2, 0).numpy()
        shown.append({"image": image_HW3, "truth": test.semantic(index), "prediction": found_HW})
    return label_maps.beside(shown, test.semantic_classes)
