"""What clustering methods share: multi-crop views through one backbone pass, prototypes and what keeps them from collapsing,
and for most of them a teacher. No method itself; `engine.methods.names` leaves it out.

Shapes: b images of this rank, V views, L tokens of a view, C encoder width, K prototypes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from engine.core.optim import Group, ramp, scaled_lr, with_decay
from engine.methods.base import Rows
from engine.methods.crops import CropSettings, MultiCrop
from engine.methods.parts.collapse import CHOICES, Collapse, Targets
from engine.methods.settings import StageSettings, depth_on_host
from engine.methods.teaching import Taught, TeacherSettings
from engine.model.heads import DinoHead, WeightNormed, head_flops
from engine.model.tokens import View
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class ClusteringSettings(CropSettings, StageSettings):
    """Crops, prototypes and targets."""

    collapse: str = "centring"
    """What keeps the prototypes from collapsing: centring, me-max, sinkhorn, me-max+sinkhorn or none."""
    centre_momentum: float = 0.9
    """Share of the old centre that an update keeps; for centring."""
    me_max_weight: float = 1.0
    """Of ME-MAX's term in the loss."""
    global_crops: int = 2
    """Large crops of an image, of the model's input size; crop-scale is theirs."""
    prototypes: int = 65536
    student_temperature: float = 0.1
    target_temperature: float = 0.04
    target_temperature_start: float = 0.04
    """In the first epoch; it reaches target-temperature within target-temperature-epochs, in equal parts."""
    target_temperature_epochs: int = 0
    freeze_last_layer: int = 1
    """Epochs in which the prototypes stay as they are."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        temperatures = ("student_temperature", "target_temperature", "target_temperature_start")
        first = {
            "collapse": (self.collapse in CHOICES, f"one of {', '.join(CHOICES)}"),
            "centre-momentum": (0 <= self.centre_momentum < 1, "a number from 0 to below 1"),
            "me-max-weight": (self.me_max_weight >= 0, "a number from 0"),
            "global-crops": (self.global_crops >= 1, "a whole number from 1"),
        }
        own = {
            "local-crops": (
                self.local_crops >= 0 and self.global_crops + self.local_crops >= 2,
                "a whole number from 0, and at least 1 where there is one large crop",
            ),
            "prototypes": (self.prototypes >= 2, "a whole number from 2"),
            "target-temperature-epochs": (self.target_temperature_epochs >= 0, "a whole number from 0"),
            "freeze-last-layer": (self.freeze_last_layer >= 0, "a whole number from 0"),
        } | {name.replace("_", "-"): (getattr(self, name) > 0, "a number above 0") for name in temperatures}
        # in the order in which they are asked: of large crops first, since the rule of small ones takes their number for granted
        return first | self.crop_rules() | own

    def check_encoder(self, stage: str, encoder: VisionTransformer) -> None:
        super().check_encoder(stage, encoder)
        self.check_crops(stage, encoder)

    @property
    def splits(self) -> bool:
        return self.collapse in ("centring", "none")

    def on_host(self, encoder: VisionTransformer) -> str:
        """What `ungraphed` says of stochastic depth and of targets' temperatures that change."""
        rises = self.target_temperature_epochs > 1 and self.target_temperature_start != self.target_temperature
        return depth_on_host(encoder) or ("the targets' temperature rises in the first epochs" if rises else "")


class Clustering(MultiCrop):
    """A student that predicts, from every crop, which prototypes other crops of the image belong to.

    A method adds its heads, and writes `represent`, `compare`, which learns through `predict` or `predict_views`, and `scores`.
    Prototypes beside the images' have a `guard` of their own.

    Attributes:
        last_layers: prefixes of the parameters that freeze_last_layer is about.
    """

    last_layers: ClassVar[tuple[str, ...]] = ("head.last_layer.",)

    def __init__(self, encoder: VisionTransformer, settings: ClusteringSettings):
        super().__init__(encoder, settings)
        self.prototype_count = settings.prototypes
        self.collapse = self.guard(settings.prototypes)

    def guard(self, prototypes: int, **options: object) -> Collapse:
        """What the settings chose against collapse, for one more set of prototypes."""
        settings = self.settings
        strengths = {"centre_momentum": settings.centre_momentum, "me_max_weight": settings.me_max_weight}
        return Collapse(settings.collapse, prototypes, **strengths, **options)

    @property
    def target_temperature(self) -> float:
        """Of this epoch."""
        s = self.settings
        return ramp(self.moment.epoch, s.target_temperature_epochs, s.target_temperature_start, s.target_temperature)

    def targets(self, collapse: Collapse, scores_GK: Tensor, count: int | None = None) -> Targets:
        """What these scores say, at this step's temperature; past the first `count` they are padding."""
        return collapse.targets(scores_GK, self.target_temperature, count)

    def predict(
        self,
        collapse: Collapse,
        scores_GK: Tensor,
        student_RK: Tensor,
        *,
        views: tuple[int, int] | None = None,
        skip_same: bool = True,
        weights_R: Tensor | None = None,
        followed: Tensor | None = None,
        count: int | None = None,
    ) -> tuple[Tensor, Tensor, Targets]:
        """What a student learns of the targets that these scores make, of crops or of patches.

        Args:
            collapse: of these prototypes.
            views, skip_same: as for `engine.methods.parts.collapse.Collapse.across_views`; without views, row meets row.
            weights_R: of the rows that meet, as for `engine.methods.parts.collapse.Collapse.cross_entropy`.
            followed: the scores [n, K] that the centre follows, where not those of the targets.
            count: rows of both that are meant, where others, which have weights of 0, follow as padding.

        Returns:
            The cross-entropy, what is added to the loss against collapse, and the targets.
        """
        temperature, targets = self.settings.student_temperature, self.targets(collapse, scores_GK, count)
        if views is None:
            loss = collapse.cross_entropy(targets, student_RK, temperature, weights_R=weights_R)
        else:
            loss = collapse.across_views(targets, student_RK, temperature, views, skip_same=skip_same)
        collapse.observe(scores_GK[:count] if followed is None else followed)
        return loss, collapse.regulariser(student_RK, temperature, count), targets

    def predict_views(
        self, scores_GK: Tensor, student_RK: Tensor, views: tuple[int, int], *, skip_same: bool = True
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`predict` of the images' prototypes by all views, with what is to be logged in place of the targets."""
        loss, spread, targets = self.predict(self.collapse, scores_GK, student_RK, views=views, skip_same=skip_same)
        return loss, spread, self.health(targets)

    def health(self, targets: Targets) -> dict[str, Tensor]:
        """Of the images' prototypes, where the update will be logged; else nothing, for it forms every target [G, K]."""
        return self.collapse.health(targets) if self.moment.logged else {}

    def scores(self, features: Tensor) -> Tensor:
        """Scores [n, K] of pooled features [n, C] of the evaluated encoder."""
        raise NotImplementedError

    def choose(self, features: Tensor) -> Tensor:
        return self.collapse.choose(self.scores(features))

    def peak_lr(self, images_per_step: int) -> float:
        return scaled_lr(self.settings.base_lr, images_per_step)

    def groups(self, images_per_step: int) -> Iterator[Group]:
        settings, peak_lr = self.settings, self.peak_lr(images_per_step)
        last = {name: p for name, p in self.named_parameters() if name.startswith(self.last_layers)}
        others = [(name, p) for name, p in self.named_parameters() if name not in last]
        yield from with_decay(others, peak_lr, settings.weight_decay)
        yield from with_decay(last.items(), peak_lr, settings.weight_decay, frozen_epochs=settings.freeze_last_layer)

    def regions(self) -> Iterator[tuple[object, str]]:
        yield from super().regions()
        yield from self.collapse.regions()

    def student_flops(self, head: nn.Module) -> float:
        """Operations per image of all crops through encoder and head, with gradients."""
        return 3 * sum(self.encoder_flops(self.shown(v), thinned=True) + head_flops(head) for v in self.views())


@dataclass(frozen=True)
class DistillationSettings(TeacherSettings, ClusteringSettings):
    """A clustering whose targets come from a teacher; the defaults are DINO's (see engine/recipes for sources)."""

    base_lr: float = 5e-4
    end_lr: float = 1e-6
    weight_decay: float = 0.04
    weight_decay_end: float | None = 0.4
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.1
    clip_norm: float = 3.0
    clip_over: str = "tensor"
    crop_scale: tuple[float, float] = (0.4, 1.0)
    head_hidden: int = 2048
    head_layers: int = 3
    """Linear layers of the head before the prototypes."""
    bottleneck: int = 256
    """Width of what the prototypes are compared with."""
    free_norm: bool = False
    """Let the prototypes' norms learn (DINO advises it for ViT-S)."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        own = {
            "head-hidden": (self.head_hidden >= 1, "a whole number from 1"),
            "head-layers": (self.head_layers >= 1, "a whole number from 1"),
            "bottleneck": (self.bottleneck >= 1, "a whole number from 1"),
            "weight-ema": (self.weight_ema == 0, "0, since the teacher is an average already"),
        }
        return super().rules() | self.teacher_rules() | own


class Distillation(Taught, Clustering):
    """A clustering whose teacher sees large crops only, makes the targets, and is what is judged. Scores are of the teacher's
    `head`, unless a method has them otherwise."""

    @property
    def evaluated(self) -> VisionTransformer:
        return self.teacher.encoder

    def dino_head(self, bottleneck: int, prototypes: int) -> DinoHead:
        """A new head of so many prototypes, its other sizes as the settings say."""
        s = self.settings
        return DinoHead(self.encoder.embed_dim, s.head_hidden, s.head_layers, bottleneck, prototypes, s.free_norm)

    def represent_targets(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        """ "taught": what the teacher pools of each large crop [b, C]."""
        return {"taught": self.pool_taught(self.teach([View(view) for view in images[: self.settings.global_crops]]))}

    @torch.no_grad()
    def teach(self, views: Sequence[View]) -> list[Tensor]:
        """The teacher's tokens [b, L, C] of each of these views, in one pass."""
        return self.teacher.encoder.encode(views, patch_size=self.patch_size).unpack()

    def pool_taught(self, taught: list[Tensor]) -> list[Tensor]:
        """[b, C] of each view of the teacher's tokens."""
        return [self.evaluated.pool(tokens_bLC) for tokens_bLC in taught]

    def scores(self, features: Tensor) -> Tensor:
        return self.teacher.head(features)

    def regions_on_gpus(self) -> Iterator[tuple[object, str]]:
        yield from super().regions_on_gpus()
        # where the heads around them are not regions: their numbers of rows may differ from step to step, these shapes don't
        yield from ((layer, "weight") for layer in self.modules() if isinstance(layer, WeightNormed))

    def teacher_flops(self, head: nn.Module) -> float:
        """Operations per image of the large crops through teacher and head."""
        return sum(
            self.encoder_flops(self.patches(v)) + head_flops(head) for v in self.views()[: self.settings.global_crops]
        )
