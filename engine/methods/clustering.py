"""What clustering methods share: multi-crop views through one backbone pass, prototypes and what keeps them from collapsing,
and for most of them a teacher. No method itself; `engine.methods.names` leaves it out.

Shapes: b images of this rank, V views, L tokens of a view, C encoder width, K prototypes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from engine.core.errors import BadInput
from engine.core.optim import Group, cosine, ramp, scaled_lr, with_decay
from engine.data.views import Augmentation, multi_crop
from engine.methods.base import Method, StageSettings
from engine.methods.parts.collapse import CHOICES, Collapse, across_views
from engine.model.heads import head_flops
from engine.model.memory import Teacher
from engine.model.tokens import View
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class ClusteringSettings(StageSettings):
    """Crops, prototypes and targets."""

    collapse: str = "centring"
    """What keeps the prototypes from collapsing: centring, me-max, sinkhorn, me-max+sinkhorn or none."""
    centre_momentum: float = 0.9
    """Share of the old centre that an update keeps; for centring."""
    me_max_weight: float = 1.0
    """Of ME-MAX's term in the loss."""
    global_crops: int = 2
    """Large crops of an image, of the model's input size; crop-scale is theirs."""
    local_crops: int = 8
    """Small crops of an image."""
    local_size: int = 96
    """Side of a small crop in pixels."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Share of the image's area that a small crop covers."""
    augmentation: str = "byol"
    """minimal (crop and flip) or byol (with colour, grayscale, blur, and solarisation of every second large crop)."""
    prototypes: int = 65536
    student_temperature: float = 0.1
    target_temperature: float = 0.04
    target_temperature_start: float = 0.04
    """In the first epoch; it reaches target-temperature within target-temperature-epochs, in equal parts."""
    target_temperature_epochs: int = 0
    freeze_last_layer: int = 1
    """Epochs in which the prototypes stay as they are."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        low, high = self.local_scale
        temperatures = ("student_temperature", "target_temperature", "target_temperature_start")
        return {
            "collapse": (self.collapse in CHOICES, f"one of {', '.join(CHOICES)}"),
            "centre-momentum": (0 <= self.centre_momentum < 1, "a number from 0 to below 1"),
            "me-max-weight": (self.me_max_weight >= 0, "a number from 0"),
            "global-crops": (self.global_crops >= 1, "a whole number from 1"),
            "local-crops": (
                self.local_crops >= 0 and self.global_crops + self.local_crops >= 2,
                "a whole number from 0, and at least 1 where there is one large crop",
            ),
            "local-size": (self.local_size >= 1, "a whole number from 1"),
            "local-scale": (0 < low <= high <= 1, "two shares with 0 < low <= high <= 1"),
            "augmentation": (self.augmentation in ("minimal", "byol"), "minimal or byol"),
            "prototypes": (self.prototypes >= 2, "a whole number from 2"),
            "target-temperature-epochs": (self.target_temperature_epochs >= 0, "a whole number from 0"),
            "freeze-last-layer": (self.freeze_last_layer >= 0, "a whole number from 0"),
        } | {name.replace("_", "-"): (getattr(self, name) > 0, "a number above 0") for name in temperatures}

    def check_encoder(self, stage: str, encoder: VisionTransformer) -> None:
        if self.local_crops and self.local_size % encoder.patch_size:
            raise BadInput(
                f"--{stage}.local-size is {self.local_size}; it must be a multiple of the patch size {encoder.patch_size}."
            )

    @property
    def splits(self) -> bool:
        return self.collapse in ("centring", "none")


class Clustering(Method):
    """A student that predicts, from every crop, which prototypes other crops of the image belong to.

    A method adds its heads, sets up `collapse` with `guard`, and writes `forward` and `scores`.

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

    def views(self) -> tuple[Augmentation, ...]:
        settings = self.settings
        views = multi_crop(
            self.encoder.img_size,
            (settings.local_size,) * 2,
            settings.global_crops,
            settings.local_crops,
            settings.crop_scale,
            settings.local_scale,
            settings.augmentation == "byol",
        )
        return tuple(replace(view, flip=settings.flip) for view in views)

    @property
    def target_temperature(self) -> float:
        """Of this epoch."""
        s = self.settings
        return ramp(self.moment.epoch, s.target_temperature_epochs, s.target_temperature_start, s.target_temperature)

    def predict_views(
        self, scores_GK: Tensor, student_RK: Tensor, views: tuple[int, int], *, skip_same: bool = True
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the student's views learn of the targets that these scores make; the centre sees the scores.

        Args:
            views, skip_same: as for `engine.methods.parts.collapse.across_views`.

        Returns:
            The mean cross-entropy, what is added to the loss against collapse, and what is to be logged.
        """
        temperature = self.settings.student_temperature
        targets = self.collapse.targets(scores_GK, self.target_temperature)
        loss = across_views(targets, student_RK, temperature, views, skip_same=skip_same)
        self.collapse.observe(scores_GK)
        return loss, self.collapse.regulariser(student_RK, temperature), self.collapse.health(targets)

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

    def patches(self, view: Augmentation) -> int:
        return (view.size[0] // self.encoder.patch_size) * (view.size[1] // self.encoder.patch_size)

    def student_flops(self, head: nn.Module) -> float:
        """Operations per image of all crops through encoder and head, with gradients."""
        return 3 * sum(self.encoder.flops(self.patches(v), thinned=True) + head_flops(head) for v in self.views())


@dataclass(frozen=True)
class DistillationSettings(ClusteringSettings):
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
    teacher_momentum: float = 0.996
    """Share of itself that the teacher keeps at the first update; it rises along half a cosine."""
    teacher_momentum_end: float = 1.0
    head_hidden: int = 2048
    head_layers: int = 3
    """Linear layers of the head before the prototypes."""
    bottleneck: int = 256
    """Width of what the prototypes are compared with."""
    free_norm: bool = False
    """Let the prototypes' norms learn (DINO advises it for ViT-S)."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        return super().rules() | {
            "teacher-momentum": (0 <= self.teacher_momentum <= 1, "a number from 0 to 1"),
            "teacher-momentum-end": (0 <= self.teacher_momentum_end <= 1, "a number from 0 to 1"),
            "head-hidden": (self.head_hidden >= 1, "a whole number from 1"),
            "head-layers": (self.head_layers >= 1, "a whole number from 1"),
            "bottleneck": (self.bottleneck >= 1, "a whole number from 1"),
            "weight-ema": (self.weight_ema == 0, "0, since the teacher is an average already"),
        }


class Distillation(Clustering):
    """A clustering with a teacher: an exponential average of encoder and heads, which sees large crops only, makes the targets,
    and is what is judged. A method sets `teacher` when its heads are there."""

    teacher: Teacher

    @property
    def evaluated(self) -> VisionTransformer:
        return self.teacher.encoder

    def teacher_momentum(self) -> float:
        """Of this step."""
        s = self.settings
        return cosine(self.moment.step, self.moment.total_steps, s.teacher_momentum, s.teacher_momentum_end)

    @torch.no_grad()
    def teach(self, images: tuple[Tensor, ...]) -> list[Tensor]:
        """The teacher's tokens [b, L, C] of these views, in one pass."""
        return self.teacher.encoder.encode([View(view) for view in images]).unpack()

    def teacher_flops(self, head: nn.Module) -> float:
        """Operations per image of the large crops through teacher and head."""
        return sum(
            self.encoder.flops(self.patches(v)) + head_flops(head) for v in self.views()[: self.settings.global_crops]
        )

    @torch.no_grad()
    def after_step(self, applied: Tensor) -> None:
        super().after_step(applied)
        self.teacher.follow(self, torch.where(applied, 1 - self.teacher_momentum(), 0.0))

    def regions(self) -> Iterator[tuple[object, str]]:
        yield from super().regions()
        for block in self.teacher.encoder.blocks:
            yield block, "forward"
