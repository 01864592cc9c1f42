"""Detection and instance segmentation: a Mask R-CNN on the encoder, all of it fine-tuned, judged by COCO's AP of boxes and masks.

After Li et al. 2021, "Benchmarking Detection Transfer Learning with Vision Transformers" (arXiv 2111.11429): its numbers for
COCO are the preset "benchmark". Those of ViTDet (Li et al. 2022, arXiv 2203.16527), as in detectron2, are "vitdet". Neither was
run on COCO here. What differs from them: torchvision's Mask R-CNN (see `engine.evals.detection`), batch norm over one process,
and boxes to learn that lie around the masks. With `tune`, learning rate, weight decay and drop path are first searched as the
benchmark does.

AP belongs to a set of images, not to one, so there are no samples per image.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tyro.conf import Suppress

from engine.core.draws import seed_of
from engine.core.errors import BadInput
from engine.data.annotated.objects import ObjectSet
from engine.data.augment import epoch_order
from engine.evals import detecting, tuning
from engine.evals.detecting import Recipe
from engine.evals.detection import Form, check_encoder, initialise_as_beit
from engine.evals.result import BEST_EPOCH, LAST_EPOCH, Result, as_chosen
from engine.evals.subject import Subject
from engine.evals.training import Diverged
from engine.evals.tuning import Trial
from engine.model.vit import VisionTransformer

READS, WANTS = "masks", "model"
PRESETS = ("scenes", "benchmark", "vitdet")
# the benchmark's choice of lr and weight decay by initialisation, for batches of 64
RATES = {
    "random": (1.6e-4, 0.2),
    "supervised": (8e-5, 0.1),
    "mocov3": (1.6e-4, 0.1),
    "beit": (8e-5, 0.1),
    "mae": (8e-5, 0.1),
}
LENGTHS = {"random": (100, 200, 400), "pre-trained": (25, 50, 100)}  # epochs; it reports the best
TUNING_START = (1.6e-4, 0.1)
TUNING_EPOCHS = {"random": (100, 50), "pre-trained": (25, 50)}  # of the grid, of the drop paths
# by size of the model: B up to 12 blocks, L up to 24, H above
DROP_PATH = {"B": 0.1, "L": 0.3, "H": 0.3}  # the benchmark has no H
VITDET = {"B": (0.7, 0.1, 100), "L": (0.8, 0.4, 100), "H": (0.9, 0.5, 75)}  # layer decay, drop path, epochs
VITDET_DROPS = (163_889 / 184_375, 177_546 / 184_375)
HELD_OUT = 0.2  # of the training images, to tune on: ours
_SAID_OF_FORM = ("size", "window", "global_blocks", "relative", "pyramid", "head_norm", "channels")


def _assigned(text: str) -> list[tuple[str, str]]:
    """(name, initialisation) of "NAME=mae,OTHER=beit"; the name is empty in "mae"."""
    pairs = [part.strip().rpartition("=") for part in text.split(",") if part.strip()]
    return [(name.strip(), value.strip()) for name, _, value in pairs]


@dataclass(frozen=True)
class Settings:
    """Detection settings. Where 0, or -1 for what may be 0, is the preset's."""

    preset: str = "scenes"
    """scenes (ours: images of 128 pixels, thin heads, little jitter); or for COCO at 1024 pixels: benchmark (four blocks and an
    FPN, batch norm, relative positions, rates by initialisation) or vitdet (simple pyramid, layer norm, layer decay)."""
    initialisation: str = ""
    """What the weights come from, for the benchmark's table: random (1.6e-4, weight decay .2), supervised (8e-5, .1), mocov3
    (1.6e-4, .1), beit or mae (8e-5, .1). Several weights: NAME=mae,OTHER=beit. Default: random for random:NAME, else mae."""
    epochs: int = 0
    """Passes over the training images that have an object. scenes: 7; benchmark: 100 as pre-trained (published: 25, 50, 100),
    400 from scratch (100, 200, 400); vitdet: 100, H 75."""
    batch_size: int = 0
    """Images per step. scenes: 4; the others: 64."""
    lr: float = 0.0
    """Peak learning rate, whatever the batch. scenes: 1e-3; vitdet: 1e-4."""
    weight_decay: float = -1.0
    """Of all but norms, positions and relative biases. scenes: .05; vitdet: .1."""
    drop_path: float = -1.0
    """Stochastic depth of the last block. scenes: 0; benchmark: .1, L .3; vitdet: .1, L .4, H .5."""
    layer_decay: float = 0.0
    """Rate of each layer as a share of that of the one above. vitdet: .7, L .8, H .9; the others: 1."""
    size: int = 0
    """Side of the square that images are made to fit, in pixels, a multiple of the patch size."""
    pyramid: str = ""
    """four-blocks or simple."""
    looks: int = 0
    """Judge after each so many epochs as well; the best of all is then given beside the last."""
    tune: bool = False
    """First search lr, weight decay and drop path: a 3x3 grid of factors of two around lr and weight decay without drop path,
    moved on while the best is at its border; then drop paths 0, .1, .2, .3. On a fifth of the training images held out (the
    benchmark: on COCO's validation set)."""
    tune_epochs: int = 0
    """Epochs of each run of the grid, and twice as many of those of the drop path; 0: half of the epochs, but 25 and 50 for
    benchmark (scratch: 100 and 50)."""
    seed: Suppress[int] = 0

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise BadInput(f"detection preset = {self.preset!r} must be one of {', '.join(PRESETS)}.")
        for _, chosen in _assigned(self.initialisation):
            if chosen not in RATES:
                raise BadInput(f"detection initialisation = {chosen!r} must be one of {', '.join(RATES)}.")
        for name in ("epochs", "batch_size", "size", "looks", "tune_epochs"):
            if getattr(self, name) < 0:
                raise BadInput(f"detection {name} = {getattr(self, name)} must be at least 1, or 0 for the preset's.")
        if not 0 <= self.lr <= 1e30:
            raise BadInput(f"detection lr = {self.lr} must be above 0 and at most 1e30, or 0 for the preset's.")
        if not (self.weight_decay == -1 or 0 <= self.weight_decay <= 1e30):
            raise BadInput(f"detection weight_decay = {self.weight_decay} must be 0 or more, or -1 for the preset's.")
        if not (self.drop_path == -1 or 0 <= self.drop_path < 1):
            raise BadInput(f"detection drop_path = {self.drop_path} must be in [0, 1), or -1 for the preset's.")
        if not 0 <= self.layer_decay <= 1:
            raise BadInput(
                f"detection layer_decay = {self.layer_decay} must be above 0 and at most 1, or 0 for the preset's."
            )
        if self.pyramid:
            Form(pyramid=self.pyramid)


def check(train: ObjectSet, test: ObjectSet, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    detecting.check_sets("detection", train, test)


def check_model(subject: Subject, train: ObjectSet, test: ObjectSet, settings: Settings) -> None:
    """Raise BadInput for weights that no detector can be built on."""
    start = initialisation(subject.name, settings)
    recipe, _ = chosen(settings, start, subject.vit.depth, subject.vit.patch_size)
    check_encoder(subject.vit, recipe.form)


def initialisation(name: str, settings: Settings) -> str:
    """What the weights of this name come from: a key of RATES."""
    chosen = dict(_assigned(settings.initialisation))
    return chosen.get(name) or chosen.get("") or ("random" if name.startswith("random ") else "mae")


def preset(name: str, start: str, depth: int, patch_size: int) -> Recipe:
    """The recipe of a preset for weights from `start`, a key of RATES, of a model with so many blocks."""
    grade = "B" if depth <= 12 else "L" if depth <= 24 else "H"
    if name == "benchmark":
        lr, weight_decay = RATES[start]
        return Recipe(
            source="after arXiv 2111.11429, for COCO",
            form=Form(),
            epochs=LENGTHS.get(start, LENGTHS["pre-trained"])[-1],
            batch_size=64,
            lr=lr,
            weight_decay=weight_decay,
            drop_path=DROP_PATH[grade],
        )
    if name == "vitdet":
        layer_decay, drop_path, epochs = VITDET[grade]
        return Recipe(
            source="after ViTDet as in detectron2, for COCO; relative biases are the benchmark's, not decomposed",
            form=Form(pyramid="simple", head_norm="ln"),
            epochs=epochs,
            batch_size=64,
            lr=1e-4,
            weight_decay=0.1,
            drop_path=drop_path,
            layer_decay=layer_decay,
            schedule="steps",
            drops=VITDET_DROPS,
            warmup_steps=250,
            warmup_start=0.001,
        )
    return Recipe(
        source="ours, for the embedded scenes: digits are not mirrored, which would make others of them",
        form=Form.small(patch_size),
        epochs=7,
        batch_size=4,
        lr=1e-3,
        weight_decay=0.05,
        drop_path=0.0,
        warmup_epochs=0.5,
        scale=(0.6, 1.4),
        flip=0.0,
    )


def chosen(settings: Settings, start: str, depth: int, patch_size: int) -> tuple[Recipe, str]:
    """The preset's recipe with what the settings give in the place of its own, and the departures from it, in words."""
    recipe = preset(settings.preset, start, depth, patch_size)
    form = {name: getattr(settings, name) for name in ("size", "pyramid") if getattr(settings, name)}
    if settings.size and settings.preset == "scenes":  # objects grow with the image, on COCO anchors are for all sizes
        form["anchors"] = tuple(round(side * settings.size / recipe.form.size) for side in recipe.form.anchors)
    given = {
        name: getattr(settings, name)
        for name in ("epochs", "batch_size", "lr", "layer_decay")
        if getattr(settings, name)
    }
    given |= {name: getattr(settings, name) for name in ("weight_decay", "drop_path") if getattr(settings, name) >= 0}
    named = [*given, *(name for name in form if name != "anchors")]
    return replace(recipe, form=replace(recipe.form, **form), **given), as_chosen(named)


def evaluate(subject: Subject, train: ObjectSet, test: ObjectSet, settings: Settings = Settings()) -> Result:
    """AP of boxes and masks on the test set, after the last epoch. The subject's own weights stay as they are.

    Raises:
        BadInput: the sets do not fit, the encoder or the size suits no detector, an image or a mask cannot be read, or the loss
            diverged.
    """
    check(train, test, settings)
    start = initialisation(subject.name, settings)
    recipe, departures = chosen(settings, start, subject.vit.depth, subject.vit.patch_size)
    train_ids, test_ids = detecting.with_objects(train), np.arange(len(test))
    details: dict[str, Any] = {}
    if settings.tune:
        best, details = tuned(subject, train, train_ids, recipe, settings, start)
        recipe = replace(recipe, lr=best.lr, weight_decay=best.weight_decay, drop_path=best.drop_path)
        departures += f"; lr, weight decay and drop path tuned on {HELD_OUT:.0%} of the training images"
    encoder = _encoder(subject, recipe, settings, start)
    trained = detecting.fitted(
        subject, encoder, recipe, train, train_ids, test, test_ids, seed=settings.seed, looks=settings.looks
    )
    values = detecting.figures(trained.precision)
    if settings.looks:
        values |= {f"{LAST_EPOCH} box AP": trained.precision["box"].ap}
        values |= {f"{BEST_EPOCH} box AP": max(look["box"].ap for look in trained.looks.values())}
        details["best-epoch box AP is"] = "over the epochs looked at, on the test set"
        details["figures by epoch"] = [
            {"epoch": epoch} | detecting.figures(look) for epoch, look in sorted(trained.looks.items())
        ]
    said = asdict(recipe)
    form, _ = said.pop("form"), said.pop("source")
    return Result(
        protocol="detection",
        values=values,
        settings={"preset": settings.preset, "recipe": recipe.source + departures}
        | ({"initialisation": start} if settings.preset == "benchmark" else {})
        | said
        | {name.replace("_", " "): form[name] for name in _SAID_OF_FORM}
        | {
            "steps": trained.steps,
            "seed": settings.seed,
            "optimiser": f"AdamW, betas {detecting.BETAS}, no clipping",
            "AP computed by": trained.precision["box"].backend,
        },
        details=details
        | {
            "box AP by category": _by_category(test, trained.precision["box"].by_category),
            "mask AP by category": _by_category(test, trained.precision["mask"].by_category),
            "losses by epoch": trained.losses,
            "form of the detector": form,
        },
        headline=("box AP", "mask AP", "box AP50"),
        pictures={
            "objects and what was found of them": detecting.detections_picture(test, test_ids, trained),
            "losses": detecting.loss_picture(trained),
            "precision and recall at an overlap of 0.5": detecting.curve_picture(trained.precision),
        },
        counts=detecting.counts_of(train, test, train_ids),
        feature=f"outputs of blocks {', '.join(map(str, trained.taps))}, fine-tuned end to end",
    )


def tuned(
    subject: Subject, train: ObjectSet, train_ids: np.ndarray, recipe: Recipe, settings: Settings, start: str
) -> tuple[Trial, dict[str, Any]]:
    """The best of the search by box AP on held-out training images, and the table of all runs.

    Raises:
        BadInput: there are too few images to hold some out, or every run diverged.
    """
    held = round(HELD_OUT * len(train_ids))
    if not held:
        raise BadInput(
            f"detection tune holds out {HELD_OUT:.0%} of {len(train_ids)} training images, which is none; give more images."
        )
    order = train_ids[epoch_order(len(train_ids), seed_of(settings.seed, "held out"), 0)]
    learnt, held_out = np.sort(order[held:]), np.sort(order[:held])
    half = max(1, recipe.epochs // 2)
    epochs = {"grid": half, "drop path": half}
    if settings.tune_epochs:
        epochs = {"grid": settings.tune_epochs, "drop path": 2 * settings.tune_epochs}
    elif settings.preset == "benchmark":
        epochs = dict(zip(epochs, TUNING_EPOCHS.get(start, TUNING_EPOCHS["pre-trained"])))
    lr, weight_decay = recipe.lr, recipe.weight_decay
    if settings.preset == "benchmark":
        lr = settings.lr or TUNING_START[0]
        weight_decay = TUNING_START[1] if settings.weight_decay < 0 else settings.weight_decay
    number = 0

    def run(trial: Trial) -> float | None:
        nonlocal number
        number += 1
        of_trial = replace(
            recipe,
            lr=trial.lr,
            weight_decay=trial.weight_decay,
            drop_path=trial.drop_path,
            epochs=epochs[trial.part],
        )
        encoder, title = _encoder(subject, of_trial, settings, start), f"detection, trial {number}"
        try:
            trained = detecting.fitted(
                subject, encoder, of_trial, train, learnt, train, held_out, seed=settings.seed, title=title
            )
        except Diverged:
            return None
        return trained.precision["box"].ap

    best, trials, settled = tuning.search(run, lr, weight_decay)
    table = [
        {
            "run": place,
            "lr": f"{trial.lr:g}",
            "weight decay": f"{trial.weight_decay:g}",
            "drop path": f"{trial.drop_path:g}",
            "epochs": epochs[trial.part],
            "box AP": "diverged" if trial.figure is None else trial.figure,
        }
        for place, trial in enumerate(trials, 1)
    ]
    about = f"on {held} of {len(train_ids)} training images, held out; the paper tuned on COCO's validation set"
    if not settled:
        about += "; stopped with the best at the border of the grid"
    return best, {"tuning": table, "tuning was": about}


def _encoder(subject: Subject, recipe: Recipe, settings: Settings, start: str) -> VisionTransformer:
    """A copy to train; from scratch under the benchmark's preset it starts as there, whatever random weights were given."""
    encoder = subject.trainable(recipe.drop_path)
    if settings.preset == "benchmark" and start == "random":
        initialise_as_beit(encoder, seed_of(settings.seed, "encoder"))
    return encoder


def _by_category(test: ObjectSet, values: np.ndarray) -> dict[str, float | None]:
    return {
        name: None if np.isnan(value) else float(value) for name, value in zip(test.categories, values, strict=True)
    }
