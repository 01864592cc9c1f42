"""Fine-tuning on classes: all blocks (MAE, appendix A.1), the last k (MAE, section 4.3), on all labels or a share of them.

Shares of 1 % and 10 % are drawn class by class, as low-shot evaluation draws them. iBOT's convention for them (1,000 epochs at a
learning rate of 5e-6 on SimCLRv2's lists) is not followed: here a share is trained on for as many updates as the whole, at most
1,000 epochs.

Shapes: m test images, K classes.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_accuracy

from engine.core.errors import BadInput
from engine.data.sources import ImageSet
from engine.data.subsets import subset
from engine.evals import charts, finetuning
from engine.evals.features import Labelled, check_labelled, number_of_classes
from engine.evals.protocols import lowshot
from engine.evals.result import Result
from engine.evals.subject import Subject
from engine.methods.base import Labels

WANTS = "model"


@dataclass(frozen=True)
class Settings(finetuning.Settings):
    """Fine-tuning settings."""

    percents: tuple[float, ...] = (1.0, 10.0, 100.0)
    """Shares of the training set, in percent."""

    def __post_init__(self):
        super().__post_init__()
        if not self.percents or not all(0 < percent <= 100 for percent in self.percents):
            raise BadInput(f"finetune percents = {self.percents} must be one or more shares above 0, at most 100.")


def check(train: Labelled, test: Labelled, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    check_labelled("finetune", train, test)
    if len(train.labels) < 2:
        raise BadInput("finetune needs at least two training images.")


def check_model(subject: Subject, train: Labelled, test: Labelled, settings: Settings) -> None:
    """Raise BadInput for weights that cannot be trained so."""
    finetuning.check_model(subject, settings)


def shares(train: Labelled, settings: Settings) -> dict[str, np.ndarray]:
    """Ids of the images of each share, by its name; the first split that low-shot evaluation draws."""
    drawn = {}
    for percent in settings.percents:
        if percent == 100:
            drawn["100%"] = np.arange(len(train.labels))
        else:
            one = lowshot.Settings(shots=(), percents=(percent,), splits=1, seed=settings.seed)
            drawn |= {name: splits[0] for name, splits in lowshot.subsets(train, one).items()}
    return drawn


def evaluate(subject: Subject, train: ImageSet, test: ImageSet, settings: Settings = Settings()) -> Result:
    """Top-1 on `test` after the last epoch, for each share of the labels.

    Raises:
        BadInput: the sets or the model do not fit, or training diverged.
    """
    check(train, test, settings)
    classes = number_of_classes(train, test)
    names = train.classes or tuple(map(str, range(classes)))
    values, samples, courses, used, counts = {}, {}, {}, {}, {}
    for share, ids in shares(train, settings).items():
        images = subset(train, ids) if len(ids) < len(train.labels) else train
        recipe = finetuning.chosen(settings, subject.vit, len(images), len(train.labels))
        labels = Labels(torch.from_numpy(images.labels).to(subject.device), names)
        title = f"fine-tuning {subject.name} on {share}"
        method, courses[share] = finetuning.fine_tune(subject, images, labels, recipe, settings, title)
        rows, scores_mK = finetuning.scores(subject, method, test)
        truth_m = torch.from_numpy(test.labels)[rows]
        predicted_m = scores_mK.argmax(1)
        figure = f"{share} top-1"
        values[figure] = float(multiclass_accuracy(predicted_m, truth_m, classes, average="micro"))
        samples[figure] = (predicted_m == truth_m).double().numpy()
        used[share] = asdict(recipe.settings)
        counts[f"training images of {share}"] = len(images)
    return Result(
        protocol="finetune",
        values=values,
        settings=asdict(settings)
        | {
            "recipe": recipe.source,
            "shares": "each for as many updates as all labels; ours",
            "figures": "after the last epoch",
        },
        details={"settings of each share": used},
        samples=samples,
        pictures={
            "training loss": charts.losses({f"{share} of the labels": losses for share, losses in courses.items()})
        },
        counts=counts | {"test images": len(rows)},
        feature=finetuning.feature(method),
    )
