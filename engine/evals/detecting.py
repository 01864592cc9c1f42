"""Training a detector on jittered images and judging it by COCO's average precision.

Shapes: S the side of what the detector takes, n objects and d detections of an image, H x W its pixels, K categories.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import matplotlib
import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from engine.core import optim
from engine.core.draws import seed_of
from engine.core.errors import BadInput
from engine.core.plotting import Figure
from engine.data import ahead
from engine.data.annotated import dense
from engine.data.annotated.jitter import Example, Jitter, back, fit, jittered
from engine.data.annotated.objects import ObjectSet
from engine.data.augment import epoch_order
from engine.evals import training
from engine.evals.detection import Form, create, undecayed
from engine.evals.metrics.coco_ap import RECALL, Found, Precision, Truth, coco_ap, encoded
from engine.evals.subject import Subject
from engine.model.vit import VisionTransformer
from engine.training.optimizers import AdamW

BETAS = (0.9, 0.999)
KINDS = ("box", "mask")
SHOWN_SCORE = 0.5  # detections below are not drawn
_SHOWN, _PIXELS_AT_ONCE = 5, 1024**2


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a detector is trained, by AdamW.

    Args:
        source: whose numbers these are.
        form: of the detector.
        epochs, batch_size: passes over the images that have an object, and images of a step.
        lr: at the peak, not scaled by the batch.
        weight_decay: of all but norms, positions and tables of relative biases.
        drop_path: of the last block, falling to 0 at the first.
        layer_decay: the rate of each layer as a share of that of the one above.
        schedule, drops: as `optim.share_of_peak`.
        warmup_epochs, warmup_steps: of linear warm-up; the steps count where they are not 0.
        warmup_start: share of the peak that it starts from.
        scale, flip: of the jitter.
    """

    source: str
    form: Form
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    drop_path: float
    layer_decay: float = 1.0
    schedule: str = "cosine"
    drops: tuple[float, ...] = ()
    warmup_epochs: float = 0.25
    warmup_steps: int = 0
    warmup_start: float = 0.0
    scale: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5

    def share_of_peak(self, step: int, per_epoch: int) -> float:
        """Of the learning rate at a step."""
        warmup = self.warmup_steps or round(self.warmup_epochs * per_epoch)
        return optim.share_of_peak(
            self.schedule, step, self.epochs * per_epoch, warmup, self.warmup_start, drops=self.drops
        )


@dataclass(frozen=True)
class Trained:
    """A trained detector and what it found.

    Attributes:
        losses: by name, the mean of each epoch.
        precision: of boxes and of masks, after the last epoch.
        looks: by epoch, the same on the way.
        truth, found: of each test image.
        steps: updates.
        taps: the blocks whose outputs it sees.
    """

    losses: dict[str, list[float]]
    precision: dict[str, Precision]
    looks: dict[int, dict[str, Precision]]
    truth: list[Truth]
    found: list[Found]
    steps: int
    taps: tuple[int, ...]


def with_objects(images: ObjectSet) -> np.ndarray:
    """int64 [m]: the images that have an object which is not ignored."""
    return np.flatnonzero([(~objects.ignored).any() for objects in images.objects])


def batches(
    images: ObjectSet, ids: np.ndarray, recipe: Recipe, seed: int, threads: int | None
) -> Iterator[list[Example]]:
    """Jittered batches of these images for all epochs, in an order of each epoch's own; what does not fill a batch is left out.

    Objects that are ignored are not learnt. A function of the seed alone, whatever the threads.
    """
    jitter, batch = Jitter(recipe.form.size, recipe.scale, recipe.flip), min(recipe.batch_size, len(ids))
    per_epoch = len(ids) // batch
    order = lru_cache(maxsize=2)(lambda epoch: epoch_order(len(ids), seed, epoch))

    def example(place: int) -> Example:
        step, row = divmod(place, batch)
        epoch, of_epoch = divmod(step, per_epoch)
        index = int(ids[order(epoch)[of_epoch * batch + row]])
        kept = ~images.objects[index].ignored
        labels, masks = images.objects[index].labels[kept], images.masks(index)[kept]
        return jittered(dense.read(images.images, index), labels, masks, jitter, seed, step, row)

    examples = ahead.loaded(example, range(recipe.epochs * per_epoch * batch), threads)
    while members := list(islice(examples, batch)):
        yield members


def targets_of(example: Example, device: torch.device) -> dict[str, Tensor]:
    """As torchvision's detectors take them, in which 0 is the background."""
    return {
        "boxes": example.boxes.to(device),
        "labels": example.labels.to(device) + 1,
        "masks": example.masks.to(device, torch.uint8),
    }


def groups(model: nn.Module, encoder: VisionTransformer, recipe: Recipe) -> list[optim.Group]:
    """Parameters by layer: the rate of block i of L, from 0, is lr * decay^(L - i), that of patches and positions
    lr * decay^(L + 1), that of all else lr."""
    own, top, spared = {id(p): name for name, p in encoder.named_parameters()}, encoder.depth + 1, undecayed(model)
    places = {name: own.get(id(p)) for name, p in model.named_parameters()}

    def height(name: str) -> int:
        return top if places[name] is None else encoder.layer_of(places[name]) + 1

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return name not in spared

    named = model.named_parameters()
    return list(optim.by_layer(named, height, top, recipe.lr, recipe.weight_decay, recipe.layer_decay, decays))


def truth_of(images: ObjectSet, ids: np.ndarray, threads: int | None = None) -> list[Truth]:
    """The objects of these images, with masks."""

    def truth(index: int) -> Truth:
        objects, (width, height) = images.objects[index], images.images.sizes[index].tolist()
        runs = encoded(images.masks(index))
        return Truth((height, width), objects.boxes, objects.labels, objects.areas, objects.ignored, runs)

    return list(ahead.loaded(truth, ids.tolist(), threads))


@torch.no_grad()
def found_by(model: nn.Module, images: ObjectSet, ids: np.ndarray, size: int, subject: Subject) -> list[Found]:
    """What the detector finds in these images, whole, their longer side `size`; it is in training mode again afterwards."""
    model.eval()

    def read(index: int) -> tuple[tuple[int, int], Tensor]:
        pixels = dense.read(images.images, index)
        return tuple(pixels.shape[1:]), fit(pixels, size)

    found, pairs = [], ahead.loaded(read, ids.tolist(), subject.threads)
    while members := list(islice(pairs, max(1, min(16, _PIXELS_AT_ONCE // size**2)))):
        with torch.autocast(subject.device.type, torch.bfloat16, enabled=subject.precision == "bf16"):
            outputs = model([dense.normalised(pixels.to(subject.device)) for _, pixels in members])
        for (shape, _), output in zip(members, outputs, strict=True):
            boxes, masks = back(output["boxes"].float(), output["masks"][:, 0].float(), shape)
            labels, scores = output["labels"].cpu().numpy() - 1, output["scores"].float().cpu().numpy()
            found.append(Found(boxes.cpu().numpy(), labels, scores, encoded(masks.cpu().numpy())))
    model.train()
    return found


def fitted(
    subject: Subject,
    encoder: VisionTransformer,
    recipe: Recipe,
    train: ObjectSet,
    train_ids: np.ndarray,
    test: ObjectSet,
    test_ids: np.ndarray,
    *,
    seed: int,
    looks: int = 0,
    title: str = "detection",
) -> Trained:
    """Trains a detector on some images and judges it on others.

    Args:
        encoder: as `Subject.trainable` gives it.
        train_ids, test_ids: int64, places in the sets; those to train on have objects.
        seed: draws first weights, order, jitter, drop path and the sampling of proposals.
        looks: judge after each so many epochs as well; 0 for the end alone.

    Raises:
        BadInput: an image or a mask cannot be read, or as `detection.create`; `training.Diverged` where the loss did.
    """
    device, size = subject.device, recipe.form.size
    model = create(encoder, len(train.categories), recipe.form, seed_of(seed, "detector"))
    per_epoch = len(train_ids) // min(recipe.batch_size, len(train_ids))
    found: list[Found] = []
    means: list[dict[str, Tensor]] = [{}]  # of each epoch
    truth, by_epoch, seen = truth_of(test, test_ids, subject.threads), {}, 0

    def loss_of(examples: list[Example]) -> Tensor:
        nonlocal seen
        pixels = dense.normalised(torch.stack([example.image for example in examples]).to(device))
        by_name = model(list(pixels), [targets_of(example, device) for example in examples])
        if seen == per_epoch * len(means):
            means.append({})
        for name, loss in by_name.items():
            means[-1][name] = means[-1].get(name, 0) + loss.detach().float() / per_epoch
        seen += 1
        return sum(by_name.values())

    def look(steps: int) -> None:
        found[:] = found_by(model, test, test_ids, size, subject)
        by_epoch[steps // per_epoch] = {kind: coco_ap(truth, found, len(test.categories), kind) for kind in KINDS}

    # torchvision's sampling and the drop path know no other generator than torch's own, which is put back
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else ()):
        torch.manual_seed(seed_of(seed, "detection"))
        optimiser = AdamW(groups(model, model.backbone.vit.encoder, recipe), BETAS)
        steps = recipe.epochs * per_epoch
        training.train(
            batches(train, train_ids, recipe, seed, subject.threads),
            loss_of,
            optimiser,
            steps,
            lambda step: recipe.share_of_peak(step, per_epoch),
            title=title,
            device=device,
            precision=subject.precision,
            every=looks * per_epoch,
            meanwhile=look,
        )
        if recipe.epochs not in by_epoch:
            look(steps)
    losses = {name: [float(of_epoch[name]) for of_epoch in means] for name in means[0]}
    return Trained(losses, by_epoch[recipe.epochs], by_epoch, truth, found, steps, model.backbone.vit.taps)


def figures(precision: dict[str, Precision]) -> dict[str, float]:
    """Named figures of boxes and masks; those of sizes that no object has are left out."""
    names = {
        "AP": "ap", "AP50": "ap50", "AP75": "ap75", "AP small": "small", "AP medium": "medium", "AP large": "large",
    }  # fmt: skip
    values = {f"{kind} {name}": getattr(precision[kind], field) for kind in KINDS for name, field in names.items()}
    return {name: value for name, value in values.items() if not np.isnan(value)}


def detections_picture(test: ObjectSet, ids: np.ndarray, trained: Trained) -> Figure:
    """A few test images, above with their objects (ignored ones dashed), below with what was found of at least SHOWN_SCORE."""
    from pycocotools import mask

    shown = [place for place in range(len(ids)) if len(trained.truth[place].labels)][:_SHOWN]
    figure = Figure(figsize=(1.5 * len(shown) + 0.3, 3.4), layout="constrained")
    axes_2k = figure.subplots(2, len(shown), squeeze=False)
    for column, place in enumerate(shown):
        pixels = dense.read(test.images, int(ids[place])).permute(1, 2, 0).numpy() / 255
        for axes, rows in zip(axes_2k[:, column], (trained.truth[place], trained.found[place])):
            painted = pixels.copy()
            scores = getattr(rows, "scores", np.ones(len(rows.labels)))
            for row in np.flatnonzero(scores >= SHOWN_SCORE):
                colour = matplotlib.colormaps["tab10"](int(rows.labels[row]) % 10)
                inside = mask.decode(rows.runs[row]).astype(bool)
                painted[inside] = 0.5 * painted[inside] + 0.5 * np.array(colour[:3])
                x0, y0, x1, y1 = rows.boxes[row]
                dashes = "--" if getattr(rows, "ignored", np.zeros(row + 1))[row] else "-"
                frame = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, ec=colour, lw=1.2, ls=dashes)
                axes.add_patch(frame)
                name = test.categories[rows.labels[row]]
                axes.text(
                    x0, y0, name, color="white", fontsize=7, va="top", bbox={"fc": colour, "ec": "none", "pad": 0.8}
                )
            axes.imshow(painted, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
    axes_2k[0, 0].set_ylabel("objects")
    axes_2k[1, 0].set_ylabel(f"found, score from {SHOWN_SCORE:g}")
    return figure


def loss_picture(trained: Trained) -> Figure:
    """The mean of each loss by epoch."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, means in trained.losses.items():
        axes.plot(range(1, len(means) + 1), means, label=name.removeprefix("loss_").replace("_", " "))
    axes.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    axes.legend(fontsize=8)
    return figure


def curve_picture(precision: dict[str, Precision]) -> Figure:
    """Precision over recall at an overlap of .5, mean over categories."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for kind in KINDS:
        axes.plot(RECALL, precision[kind].curve, label=f"{kind}: AP50 {100 * precision[kind].ap50:.1f} %")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(fontsize=8)
    return figure


def check_sets(protocol: str, train: ObjectSet, test: ObjectSet) -> None:
    """Raise BadInput for sets that no detector can be trained and judged on."""
    if train.categories != test.categories:
        raise BadInput(f"protocol {protocol}: training and test set have different categories.")
    for which, images in (("training", train), ("test", test)):
        if not len(with_objects(images)):
            raise BadInput(f"protocol {protocol}: no object of the {which} set counts; it needs at least one.")
        images.check_masks()


def counts_of(train: ObjectSet, test: ObjectSet, train_ids: Sequence[int]) -> dict[str, int]:
    """What was used and what was left out."""

    def objects(images: ObjectSet, ignored: bool) -> int:
        return int(sum((of.ignored == ignored).sum() for of in images.objects))

    return {
        "training images": len(train_ids),
        "training images without an object, left out": len(train) - len(with_objects(train)),
        "training objects": objects(train, False),
        "training objects ignored": objects(train, True),
        "categories": len(train.categories),
        "categories without a training object": len(train.unused),
        "test images": len(test),
        "test objects": objects(test, False),
        "test objects ignored": objects(test, True),
        "categories without a test object": len(test.unused),
    }
