"""Semantic segmentation by a linear head on the patches of a frozen encoder, trained on crops, judged by sliding windows.

Two published forms: DINOv3's (Simeoni et al. 2025, arXiv 2508.10104; released evaluation code) on the last layer's normed map,
and iBOT's (Zhou et al. 2021, arXiv 2111.07832; released configurations for ADE20K) on the outputs of four blocks side by side.
"""

from dataclasses import dataclass
from functools import partial

from engine.core import optim
from engine.data.annotated.objects import SemanticSet
from engine.evals import segmenting
from engine.evals.result import Result
from engine.evals.segmentation.heads import LinearHead, OnFrozen, taps
from engine.evals.subject import Subject

READS, WANTS = "semantic", "model"


@dataclass(frozen=True, kw_only=True)
class Recipe(segmenting.Recipe):
    """How a head is trained.

    Args:
        blocks: look at four blocks, without final norm, rather than at the last one's normed output.
    """

    blocks: bool = False


RECIPES = {
    "scenes": Recipe(
        source=segmenting.OURS, steps=400, batch_size=16, lr=1e-2, weight_decay=1e-3, warmup=20, schedule="cosine", size=64,
        short=128, stride=32, ratio=(0.75, 1.5), flip=0.0, photometric=False, tries=6, blocks=True,
    ),
    "dinov3": Recipe(
        source="DINOv3's for ADE20K, batch norm over one process", steps=40_000, lr=1e-3, weight_decay=1e-3, schedule="cosine",
    ),
    "ibot": Recipe(
        source="after iBOT's configuration for ADE20K, ViT-B (its README's command takes a peak of 8e-4); batch norm is ours",
        steps=160_000, lr=7e-4, weight_decay=0.05, warmup_start=1e-6, schedule="poly", dropout=0.0, blocks=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Settings(segmenting.Settings):
    """Settings of linear segmentation. Where 0 is the recipe's: scenes 400 steps of 16 crops at 1e-2, dinov3 40,000 of 16 at
    1e-3, ibot 160,000 of 16 at 7e-4."""

    recipe: str = "scenes"
    """scenes (ours, crops of 64 pixels), dinov3 or ibot (as published for ADE20K, crops of 512)."""

    def __post_init__(self):
        self.check("segment_linear", tuple(RECIPES))


def check(train: SemanticSet, test: SemanticSet, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    segmenting.check_sets("segment_linear", train, test)


def check_model(subject: Subject, train: SemanticSet, test: SemanticSet, settings: Settings) -> None:
    """Raise BadInput for weights that do not take the crops."""
    segmenting.check_model("segment_linear", subject, settings.size or RECIPES[settings.recipe].size)


def evaluate(subject: Subject, train: SemanticSet, test: SemanticSet, settings: Settings = Settings()) -> Result:
    """mIoU over the whole test set, after the last step.

    Raises:
        BadInput: the sets do not fit, the crops are no multiples of the patch size, or as `segmenting.run`.
    """
    check(train, test, settings)
    recipe, departures = segmenting.chosen(RECIPES[settings.recipe], settings)
    vit = subject.vit
    segmenting.check_size("segment_linear", recipe.size, vit.patch_size)
    blocks = taps(vit.depth) if recipe.blocks else ()
    channels, classes = vit.embed_dim * max(1, len(blocks)), len(train.semantic_classes)
    head = segmenting.seeded(settings.seed, lambda: LinearHead(channels, classes, recipe.dropout), subject.device)
    model = OnFrozen(partial(subject.maps, blocks=blocks), head)
    feature = (
        f"patch tokens after blocks {', '.join(map(str, blocks))} side by side" if blocks else "normed patch tokens"
    )
    return segmenting.run(
        "segment_linear",
        subject,
        train,
        test,
        model,
        optim.with_decay(model.named_parameters(), recipe.lr, recipe.weight_decay),
        recipe,
        settings=settings,
        departures=departures,
        said={"head": "dropout, batch norm, 1x1"},
        feature=feature,
    )
