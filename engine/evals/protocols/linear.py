"""Linear probe: one linear layer per learning rate on frozen features, all trained in the same pass.

Four recipes. "cached" is MAE-CT's probe on features extracted once, so without its crops and flips. The others are the authors'
released scripts, and encode new crops in every epoch: MAE's (LARS, batches of 16,384), DINO's (class tokens of the last four
blocks, no batch norm) and MAE-CT's (10 learning rates side by side). What these scripts report is the best epoch on the
validation set, MAE-CT's the best over learning rates AND epochs; the last epoch's figure is given beside it, by its name.

Shapes: n training images, m test images, B batch, C feature width, L learning rates, K classes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from timm.optim import Lars
from torch import Tensor, nn
from tyro.conf import Suppress

from engine.core import optim
from engine.core.errors import BadInput
from engine.data.pipeline import TrainLoader
from engine.data.sources import ImageSet
from engine.data.views import Augmentation
from engine.evals.features import (
    BOTH,
    POOLS,
    Features,
    Labelled,
    check_labelled,
    check_pooling,
    encoder_of,
    number_of_classes,
    threads_for,
)
from engine.evals.result import Result, as_chosen
from engine.evals.subject import Subject
from engine.evals.training import progress
from engine.model.vit import VisionTransformer

CACHED = "cached"
_TRUST, _MOMENTUM = 0.001, 0.9
_SMALL, _BASE = 384, 768  # widths of ViT-S and ViT-B


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a probe is trained: without weight decay, from weights of a truncated N(0, .01) and biases of 0.

    Args:
        source: whose numbers these are.
        base_lrs: each for 256 images.
        optimiser: "sgd", or "lars", with a trust ratio of matrices alone.
        norm: eps of the batch norm without affine before the layer; None does without.
        norm_images: that are normalised together; 0 is the whole batch. The running statistics are those of the first.
        schedule: "ahead", "from-start", "through" or "by-epoch", see `share_of_peak`.
        warmup: share of the steps, where `warmup_epochs` does not say how many epochs.
        resize, clip: of crops, see `Augmentation`.
    """

    source: str
    epochs: int
    batch_size: int
    base_lrs: tuple[float, ...]
    optimiser: str = "sgd"
    norm: float | None = 1e-5
    norm_images: int = 0
    schedule: str
    warmup: float = 0.0
    warmup_epochs: float | None = None
    resize: str = "bicubic"
    clip: bool = False

    def warmup_steps(self, per_epoch: int) -> int:
        """Steps of the warm-up, rounded down."""
        if self.warmup_epochs is not None:
            return math.floor(self.warmup_epochs * per_epoch)
        return math.floor(self.warmup * self.epochs * per_epoch)

    @property
    def warmup_share(self) -> float:
        """Of the steps; 1 where the training ends before the warm-up does."""
        return self.warmup if self.warmup_epochs is None else min(1.0, self.warmup_epochs / self.epochs)


_TENS = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1)
RECIPES = {
    CACHED: Recipe(
        source="after MAE-CT's probe: features extracted once, so no crops and flips; the warm-up begins above 0",
        epochs=50, batch_size=1024, base_lrs=_TENS, schedule="ahead", warmup=0.1,
    ),
    "mae": Recipe(
        source="MAE's released script", epochs=90, batch_size=16_384, base_lrs=(0.1,), optimiser="lars", norm=1e-6,
        norm_images=512, schedule="from-start", warmup_epochs=10, clip=True,
    ),
    "dino": Recipe(
        source="DINO's released script, without the short batch at the end of an epoch", epochs=100, batch_size=1024,
        base_lrs=(0.001,), norm=None, schedule="by-epoch", resize="bilinear",
    ),
    "maect": Recipe(
        source="MAE-CT's released script", epochs=50, batch_size=1024, base_lrs=_TENS, schedule="through", warmup=0.1,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Linear probe settings. Where 0 or nothing is the recipe's, that is 50 epochs of batches of 1024 at ten base rates, .01 to
    .1, for cached and maect; 90 of 16384 at .1 for mae; 100 of 1024 at .001 for dino."""

    recipe: str = CACHED
    """cached (MAE-CT's numbers, on features extracted once); or as released, with new crops in each epoch, mae (LARS), dino or
    maect."""
    epochs: int = 0
    """Passes over the training images; 0 is the recipe's."""
    batch_size: int = 0
    """Images per step; 0 is the recipe's. At most a quarter of the training set, so that an epoch has at least four steps."""
    base_lrs: tuple[float, ...] = ()
    """Learning rates trained side by side, each times batch / 256; none are the recipe's."""
    momentum: float = _MOMENTUM
    """Momentum of SGD or LARS."""
    warmup: float = -1.0
    """Share of the steps with linear warm-up; the rest follows a cosine to 0. -1 is the recipe's: .1, but 10 epochs for mae; dino
    has none."""
    pool: str = ""
    """What is read, as in --pool. Default: the class token for mae, and for dino, but there both from width 768 on; for maect
    what --pool says."""
    blocks: int = 0
    """Class tokens of the last so many blocks, side by side. 0 is the recipe's: 1, but 4 for dino below width 768."""
    seed: Suppress[int] = 0

    def __post_init__(self):
        if self.recipe not in RECIPES:
            raise BadInput(f"linear recipe = {self.recipe!r} must be one of {', '.join(RECIPES)}.")
        for name in ("epochs", "batch_size", "blocks"):
            if getattr(self, name) < 0:
                raise BadInput(f"linear {name} = {getattr(self, name)} must be at least 1, or 0 for the recipe's.")
        if not all(0 < lr < math.inf for lr in self.base_lrs):
            raise BadInput(f"linear base_lrs = {self.base_lrs} must be numbers above 0.")
        if not 0 <= self.momentum < 1:
            raise BadInput(f"linear momentum = {self.momentum} must be in [0, 1).")
        if not (self.warmup == -1 or 0 <= self.warmup < 1):
            raise BadInput(f"linear warmup = {self.warmup} must be in [0, 1), or -1 for the recipe's.")
        if self.warmup > 0 and RECIPES[self.recipe].schedule == "by-epoch":
            raise BadInput(
                f"linear warmup = {self.warmup}: the recipe {self.recipe} sets a rate for each epoch and has none."
            )
        if self.pool not in ("", *POOLS):
            raise BadInput(f"linear pool = {self.pool!r} must be one of {', '.join(POOLS)}.")
        if self.recipe == CACHED and (self.pool or self.blocks):
            raise BadInput(
                "linear pool and blocks are for recipes that encode crops; --pool says what is extracted for cached."
            )


def wants(settings: Settings) -> str:
    """Features where they are extracted once, else the model."""
    return "pooled" if settings.recipe == CACHED else "model"


def check(train: Labelled, test: Labelled, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    check_labelled("linear", train, test)
    if len(train.labels) < 8:
        raise BadInput(f"linear needs at least 8 training images for its batch norm; there are {len(train.labels)}.")


def check_model(subject: Subject, train: Labelled, test: Labelled, settings: Settings) -> None:
    """Raise BadInput for weights that have not the class tokens that are to be read."""
    if wants(settings) == "model":
        check_pooling(subject.vit, *reading(settings, subject.vit))


def reading(settings: Settings, model: VisionTransformer) -> tuple[str, int]:
    """The pooling, "" for the model's own, and the number of blocks that the layer reads, as `encoder_of` takes them."""
    pool, blocks = {"mae": ("token", 1), "dino": ("token", 4)}.get(settings.recipe, ("", 1))
    if settings.recipe == "dino" and model.embed_dim >= _BASE:
        pool, blocks = BOTH, 1
    return settings.pool or pool, settings.blocks or blocks


def chosen(settings: Settings) -> tuple[Recipe, str]:
    """The recipe with what the settings give in the place of its own, and the departures from it, in words."""
    names = ("epochs", "batch_size", "base_lrs")
    given = {name: getattr(settings, name) for name in names if getattr(settings, name)}
    if settings.warmup >= 0:
        given |= {"warmup": settings.warmup, "warmup_epochs": None}
    named = [name for name in given if name != "warmup_epochs"]
    named += [name for name in ("pool", "blocks") if getattr(settings, name)]
    named += ["momentum"] if settings.momentum != _MOMENTUM else []
    return replace(RECIPES[settings.recipe], **given), as_chosen(named)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at `step` of `steps`: linear warm-up that begins above 0, then half a cosine to 0."""
    return optim.warmup_cosine(step, steps, warmup * steps, ahead=1)


def share_of_peak(recipe: Recipe, step: int, per_epoch: int) -> float:
    """Share of the peak learning rate at a step, by the recipe's schedule; W is the warm-up's number of steps.

    ahead: as `schedule`;
    from-start: step / W, then half a cosine that would reach 0 one step after the last (MAE);
    through: step / (W - 1), then half a cosine that reaches 0 with the last step (MAE-CT);
    by-epoch: half a cosine of the number of finished epochs (DINO).
    """
    steps, warmup = recipe.epochs * per_epoch, recipe.warmup_steps(per_epoch)
    if recipe.schedule == "by-epoch":
        return optim.cosine(step // per_epoch, recipe.epochs, 1.0, 0.0)
    if recipe.schedule == "ahead":
        return schedule(step, steps, recipe.warmup)
    if recipe.schedule == "through" and step >= warmup:
        return optim.cosine(step - warmup, steps - warmup - 1, 1.0, 0.0)
    return optim.share_of_peak("cosine", step, steps, warmup, warmup=recipe.schedule)


class _Sgd:
    """With momentum, each classifier at its own rate."""

    def __init__(self, parameters: tuple[Tensor, ...], lrs_L: Tensor, momentum: float):
        self.parameters, self.lrs_L, self.momentum = parameters, lrs_L, momentum
        self.velocities = tuple(torch.zeros_like(parameter) for parameter in parameters)

    def step(self, gradients: tuple[Tensor, ...], share: float) -> None:
        for parameter, velocity, gradient in zip(self.parameters, self.velocities, gradients):
            velocity.mul_(self.momentum).add_(gradient)
            parameter.sub_(velocity * (share * self.lrs_L).view(-1, *[1] * (parameter.ndim - 1)))


class _Lars:
    """LARS as MAE has it: each classifier's matrix has a trust ratio of its own, biases have none."""

    def __init__(self, parameters: tuple[Tensor, ...], lrs_L: Tensor, momentum: float):
        groups = [
            {"params": [own], "peak_lr": lr, "always_adapt": own.ndim > 1}
            for parameter in parameters
            for own, lr in zip(parameter.unbind(), lrs_L.tolist(), strict=True)
        ]
        self.optimiser = Lars(groups, momentum=momentum, trust_coeff=_TRUST, eps=0.0)

    def step(self, gradients: tuple[Tensor, ...], share: float) -> None:
        own = [each for gradient in gradients for each in gradient.unbind()]
        for group, gradient in zip(self.optimiser.param_groups, own, strict=True):
            group["lr"], group["params"][0].grad = share * group["peak_lr"], gradient
        self.optimiser.step()


_OPTIMISERS = {"sgd": _Sgd, "lars": _Lars}


class Probe:
    """L linear classifiers on shared normalised features; one matrix product serves all of them."""

    def __init__(
        self, width: int, classes: int, lrs: Tensor, momentum: float, seed: int, recipe: Recipe = RECIPES[CACHED]
    ):
        generator, device = torch.Generator().manual_seed(seed), lrs.device
        # all learning rates start from the same draw, so that they differ in nothing else
        start_KC = nn.init.trunc_normal_(torch.empty(classes, width), std=0.01, generator=generator).to(device)
        self.norm, self.norm_images = nn.Identity(), recipe.norm_images
        if recipe.norm is not None:
            self.norm = nn.BatchNorm1d(width, affine=False, eps=recipe.norm, device=device)
        self.weight_LKC = start_KC.repeat(len(lrs), 1, 1)
        self.bias_LK = torch.zeros(len(lrs), classes, device=device)
        self.optimiser = _OPTIMISERS[recipe.optimiser]((self.weight_LKC, self.bias_LK), lrs, momentum)

    def normed(self, x_BC: Tensor) -> Tensor:
        """[B, C], by the statistics of the batch, or of each of its parts; the first one's go into the running statistics."""
        self.norm.train()
        if not self.norm_images:
            return self.norm(x_BC)
        first, *others = x_BC.chunk(max(1, round(len(x_BC) / self.norm_images)))
        alone = [nn.functional.batch_norm(part, None, None, training=True, eps=self.norm.eps) for part in others]
        return torch.cat([self.norm(first), *alone])

    def logits(self, x_BC: Tensor) -> Tensor:
        """[B, L, K]."""
        flat = nn.functional.linear(x_BC, self.weight_LKC.flatten(0, 1), self.bias_LK.flatten())
        return flat.unflatten(1, self.bias_LK.shape)

    def step(self, x_BC: Tensor, labels_B: Tensor, share: float) -> None:
        """One step on the mean cross-entropy of each classifier, at `share` of its peak learning rate."""
        x_BC = self.normed(x_BC)
        # probabilities of 1e-30 become 0: denormal numbers make a CPU's matrix product a hundred times slower
        p_BLK = nn.functional.threshold(self.logits(x_BC).softmax(-1), 1e-30, 0.0)
        error_BLK = (p_BLK - nn.functional.one_hot(labels_B, self.bias_LK.shape[1])[:, None]) / len(x_BC)
        gradients = (error_BLK.flatten(1).T @ x_BC).view_as(self.weight_LKC), error_BLK.sum(0)
        self.optimiser.step(gradients, share)

    def correct(self, features: Features) -> np.ndarray:
        """bool [m, L]: whether each classifier names an image's class."""
        self.norm.eval()
        predicted_mL = torch.cat([self.logits(self.norm(x_BC)).argmax(-1) for x_BC in features.values.split(8192)])
        return (predicted_mL == features.labels[:, None]).cpu().numpy()


@torch.no_grad()
def evaluate(train: Features, test: Features, settings: Settings = Settings()) -> Result:
    """Accuracy after the last epoch at the best learning rate, and the best over epochs too; all in `details`.

    Raises:
        BadInput: labels are missing, a class has no training image, there are fewer than 8 images, the recipe wants crops, or
            every classifier diverged.
    """
    check(train, test, settings)
    if wants(settings) != "pooled":
        raise BadInput(
            f"linear recipe = {settings.recipe!r} encodes crops, and {train.name} are features; give the weights of a ViT."
        )
    recipe, departures = chosen(settings)
    n, batch = len(train.values), min(recipe.batch_size, len(train.values) // 4)
    per_epoch, classes = n // batch, number_of_classes(train, test)

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in range(recipe.epochs):
            order = np.random.default_rng([settings.seed, epoch]).permutation(n)
            order = torch.from_numpy(order).to(train.values.device)
            for i in range(per_epoch):
                chosen_B = order[i * batch : (i + 1) * batch]
                yield train.values[chosen_B], train.labels[chosen_B]

    with threads_for(2 * batch * len(recipe.base_lrs) * classes * train.values.shape[1]):
        return _trained(rows(), batch, per_epoch, test, classes, recipe, settings, departures)


@torch.no_grad()
def evaluate_model(subject: Subject, train: ImageSet, test: ImageSet, settings: Settings) -> Result:
    """The same of a recipe that encodes new crops of all training images in each epoch. In memory at a time: the crops that the
    subject encodes together, and the features of a step.

    Raises:
        BadInput: labels are missing, a class has no training image, there are fewer than 8 images, the weights have not the class
            tokens that are to be read, or every classifier diverged.
    """
    check(train, test, settings)
    recipe, departures = chosen(settings)
    pool, blocks = reading(settings, subject.vit)
    if settings.recipe == "dino" and subject.vit.embed_dim not in (_SMALL, _BASE):
        departures += "; it has no such model: what is read is as of the nearest below, or ViT-S"
    if pool or blocks > 1:
        subject = replace(subject, encoder=encoder_of(subject.vit, pool, blocks))
    encoder, seen = subject.encoder, subject.features(test)
    batch = min(recipe.batch_size, len(train) // 4)
    parts = math.ceil(batch / subject.batch_size)
    batch = batch // parts * parts
    per_epoch = len(train) // batch
    view = Augmentation(encoder.size, (0.08, 1.0), clip=recipe.clip, resize=recipe.resize)
    loader = TrainLoader(
        train, (view,), batch // parts, seed=settings.seed, device=subject.device, threads=subject.threads
    )
    labels_n = torch.from_numpy(train.labels).to(subject.device)

    def encoded() -> tuple[Tensor, Tensor]:
        found = next(loader)
        with torch.autocast(subject.device.type, torch.bfloat16, enabled=subject.precision == "bf16"):
            values = encoder.encode(found.images[0])
        return values.float(), labels_n[found.ids.to(subject.device)]

    def crops(advance: Callable[[], None]) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(recipe.epochs):
            for _ in range(per_epoch):
                values, labels = zip(*(encoded() for _ in range(parts)))
                yield torch.cat(values), torch.cat(labels)
                advance()
            for _ in range(loader.steps_per_epoch - per_epoch * parts):  # an incomplete batch
                next(loader)

    try:
        with progress(f"linear probe of {subject.name}", recipe.epochs * per_epoch) as advance:
            classes = number_of_classes(train, test)
            found = _trained(crops(advance), batch, per_epoch, seen, classes, recipe, settings, departures)
    finally:
        loader.close()
    counts = {"training images": len(train), "test images": len(seen.values)}
    return replace(found, feature=encoder.pooling, counts=counts)


def _trained(
    batches: Iterator[tuple[Tensor, Tensor]],
    batch: int,
    per_epoch: int,
    test: Features,
    classes: int,
    recipe: Recipe,
    settings: Settings,
    departures: str,
) -> Result:
    """What a probe reaches on `test` that learns from these batches of features and classes."""
    lrs_L = torch.tensor(recipe.base_lrs, device=test.values.device) * (batch / 256)
    probe = Probe(test.values.shape[1], classes, lrs_L, settings.momentum, settings.seed, recipe)
    history = []
    for epoch in range(recipe.epochs):
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            probe.step(*next(batches), share_of_peak(recipe, step, per_epoch))
        correct_mL = probe.correct(test)
        history.append(correct_mL.mean(0))
    top1_EL = np.array(history)
    finite_L = torch.isfinite(probe.weight_LKC).flatten(1).all(1).cpu().numpy()
    top1_EL[:, ~finite_L] = 0.0  # diverged: counts as wrong
    if not finite_L.any():
        raise BadInput(f"linear: no classifier stayed finite; lower base_lrs = {recipe.base_lrs}.")
    last = int(top1_EL[-1].argmax())
    table = [
        {
            "base lr": lr,
            "last-epoch top-1": float(top1_E[-1]),
            "best-epoch top-1": float(top1_E.max()),
            "best epoch": int(top1_E.argmax()) + 1,
        }
        for lr, top1_E in zip(recipe.base_lrs, top1_EL.T)
    ]
    if batch < recipe.batch_size:
        departures += f"; batch cut from {recipe.batch_size} to {batch}"
    return Result(
        protocol="linear",
        values={"last-epoch top-1 (best lr)": float(top1_EL[-1, last]), "best-epoch top-1": float(top1_EL.max())},
        settings={
            "recipe": f"{settings.recipe}: {recipe.source}{departures}",
            **{name: getattr(recipe, name) for name in ("epochs", "batch_size", "base_lrs", "optimiser", "schedule")},
            "momentum": settings.momentum,
            "warmup": round(recipe.warmup_share, 4),
            "seed": settings.seed,
            "batch used": batch,
            "base lr of last-epoch figure": recipe.base_lrs[last],
        },
        details={
            "top-1 by learning rate": table,
            "best-epoch top-1 is": "over learning rates and epochs, on the test set",
        },
        samples={"last-epoch top-1 (best lr)": (correct_mL & finite_L)[:, last].astype(float)},
    )
