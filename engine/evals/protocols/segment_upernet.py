"""Semantic segmentation by UPerNet on the encoder, all fine-tuned end to end on crops, judged by sliding windows.

The recipe of BEiT and MAE (He et al. 2022, appendix A.4) for ADE20K, with the learning rates and layer decays that several
sources give for ViT-B. MAE's relative positions, added at transfer only, are left out; batch norm is over one process.
"""

from dataclasses import dataclass

from engine.core import optim
from engine.core.errors import BadInput
from engine.data.annotated.objects import SemanticSet
from engine.evals import segmenting
from engine.evals.result import Result
from engine.evals.segmentation.upernet import SCALES, UPerNet
from engine.evals.subject import Subject

READS, WANTS = "semantic", "model"
AUXILIARY_WEIGHT = 0.4


@dataclass(frozen=True, kw_only=True)
class Recipe(segmenting.Recipe):
    """How UPerNet is trained.

    Args:
        layer_decay: the rate of each layer as a share of that of the one above.
        drop_path: stochastic depth of the last block, falling to 0 at the first.
        width: channels of the head.
        auxiliary: channels of the auxiliary head.
        scales: sizes of the levels, relative to the grid of patches.
    """

    layer_decay: float
    drop_path: float = 0.1
    width: int = 768
    auxiliary: int = 256
    scales: tuple[float, ...] = SCALES


def _published(source: str, lr: float, layer_decay: float, stride: int = 341) -> Recipe:
    return Recipe(
        source=source, steps=160_000, lr=lr, weight_decay=0.05, warmup_start=1e-6, schedule="poly", layer_decay=layer_decay,
        stride=stride,
    )  # fmt: skip


RECIPES = {
    "scenes": Recipe(
        source=segmenting.OURS, steps=1500, batch_size=8, lr=1e-3, weight_decay=0.05, warmup=20, schedule="poly", size=64,
        short=128, stride=32, ratio=(0.75, 1.5), flip=0.0, photometric=False, tries=6, layer_decay=1.0, drop_path=0.0, width=64,
        auxiliary=32, scales=(2.0, 1.0, 0.5, 0.25),
    ),
    "mae": _published("after mmsegmentation's configuration of MAE for ADE20K, ViT-B", 1e-4, 0.65, stride=256),
    "ibot": _published("after iBOT's configuration for ADE20K, ViT-B", 7e-4, 0.65),
    "beit": _published("after BEiT's for ADE20K, ViT-B, pre-trained and fine-tuned on ImageNet-22k", 3e-5, 0.9),
    "fair": _published("after an answer of MAE's authors on ADE20K, ViT-B (long_seq_mae, issue 1)", 8e-5, 0.8),
}  # fmt: skip


@dataclass(frozen=True)
class Settings(segmenting.Settings):
    """UPerNet settings. Where 0 is the recipe's: scenes 1,500 steps of 8 crops; the others 160,000 of 16."""

    recipe: str = "scenes"
    """scenes (ours: crops of 64 pixels, 64 channels), or for ADE20K as published (crops of 512, 768 channels): mae (1e-4, layer
    decay .65), ibot (7e-4, .65), beit (3e-5, .9), fair (8e-5, .8)."""
    layer_decay: float = 0.0
    """Rate of each layer as a share of that of the one above; 0 is the recipe's."""

    def __post_init__(self):
        self.check("segment_upernet", tuple(RECIPES))
        if not 0 <= self.layer_decay <= 1:
            raise BadInput(
                f"segment_upernet layer_decay = {self.layer_decay} must be above 0 and at most 1, or 0 for the recipe's."
            )


def check(train: SemanticSet, test: SemanticSet, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these sets."""
    segmenting.check_sets("segment_upernet", train, test)


def check_model(subject: Subject, train: SemanticSet, test: SemanticSet, settings: Settings) -> None:
    """Raise BadInput for weights that do not take the crops."""
    segmenting.check_model("segment_upernet", subject, settings.size or RECIPES[settings.recipe].size)


def groups(model: UPerNet, recipe: Recipe) -> list[optim.Group]:
    """Parameters by layer: the rate of block i of L, from 0, is lr * decay^(L - i), that of patches, prefix tokens and positions
    lr * decay^(L + 1). Vectors, positions and prefix tokens do not decay."""

    named, top = model.named_parameters(), model.vit.depth + 1
    rates = recipe.lr, recipe.weight_decay, recipe.layer_decay
    return list(optim.by_layer(named, model.height, top, *rates, optim.decays_as_listed))


def evaluate(subject: Subject, train: SemanticSet, test: SemanticSet, settings: Settings = Settings()) -> Result:
    """mIoU over the whole test set, after the last step. The subject's own weights stay as they are.

    Raises:
        BadInput: the sets do not fit, the crops are no multiples of the patch size, or as `segmenting.run`.
    """
    check(train, test, settings)
    recipe, departures = segmenting.chosen(RECIPES[settings.recipe], settings)
    segmenting.check_size("segment_upernet", recipe.size, subject.vit.patch_size)
    classes = len(train.semantic_classes)

    def build() -> UPerNet:
        return UPerNet(subject.trainable(recipe.drop_path), classes, recipe.width, recipe.auxiliary, recipe.scales)

    model = segmenting.seeded(settings.seed, build, subject.device).train()
    return segmenting.run(
        "segment_upernet",
        subject,
        train,
        test,
        model,
        groups(model, recipe),
        recipe,
        settings=settings,
        departures=departures,
        weights=(1.0, AUXILIARY_WEIGHT),
        feature=f"outputs of blocks {', '.join(map(str, model.taps))}, fine-tuned",
    )
