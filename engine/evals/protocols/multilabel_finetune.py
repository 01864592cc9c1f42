"""Fine-tuning where an image may show several classes: each is learned by itself, with binary cross-entropy.

The recipe is that of `finetune` without mixing. For plain ViTs none was found published, so it is "after": SS-PRL's scripts train
a ResNet-50 for 100 epochs on VOC and on COCO.

Shapes: m test images, K classes.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from engine.core.errors import BadInput
from engine.data.annotated.objects import ObjectSet
from engine.evals import charts, finetuning
from engine.evals.metrics.average_precision import average_precision, class_mean
from engine.evals.result import Result
from engine.evals.subject import Subject
from engine.methods.base import Labels

READS, WANTS = "objects", "model"


@dataclass(frozen=True)
class Settings(finetuning.Settings):
    """Multi-label fine-tuning settings."""


def check(train: ObjectSet, test: ObjectSet, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    if len(train) < 2:
        raise BadInput("multilabel_finetune needs at least two training images.")
    if not ((train.targets == 1).any(0) & (test.targets == 1).any(0)).any():
        raise BadInput("multilabel_finetune: no category occurs both in the training and in the test set.")


def check_model(subject: Subject, train: ObjectSet, test: ObjectSet, settings: Settings) -> None:
    """Raise BadInput for weights that cannot be trained so, or not at this size."""
    finetuning.check_model(subject, settings)
    if subject.object_size and subject.vit.rel_pos_bias is None:  # relative positions are resampled
        subject.check_input(*subject.object_size)


def evaluate(subject: Subject, train: ObjectSet, test: ObjectSet, settings: Settings = Settings()) -> Result:
    """Mean average precision on `test` after the last epoch, by envelope and by steps.

    Raises:
        BadInput: the sets or the model do not fit, or training diverged.
    """
    check(train, test, settings)
    recipe = finetuning.chosen(settings, subject.vit, len(train))
    labels = Labels(torch.from_numpy(train.targets).to(subject.device), train.categories)
    title = f"fine-tuning {subject.name} on {len(train.categories)} categories"
    method, losses = finetuning.fine_tune(subject, train.images, labels, recipe, settings, title, subject.object_size)
    rows, scores_mK = finetuning.scores(subject, method, test.images)
    ap = average_precision(scores_mK.double().numpy(), test.targets[rows.numpy()])
    found = {"mAP (envelope)": ap["envelope"], "mAP (step)": ap["step"]}
    judged = int((~np.isnan(ap["step"])).sum())
    return Result(
        protocol="multilabel_finetune",
        values={name: class_mean(each_K) for name, each_K in found.items()},
        settings=asdict(settings)
        | {
            "recipe": f"after: {recipe.source}; binary cross-entropy, no mixing",
            "figures": "after the last epoch",
            "samples": "average precisions of classes",
        },
        details={"settings of the training": asdict(recipe.settings)},
        headline=("mAP (envelope)",),
        samples=found,
        pictures={"training loss": charts.losses({"loss": losses})},
        counts={"training images": len(train), "test images": len(rows), "classes judged": judged},
        feature=finetuning.feature(method),
    )
