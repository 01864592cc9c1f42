"""Masked Siamese Networks (Assran et al., "Masked Siamese Networks for Label-Efficient Learning", ECCV 2022).

Shapes: b images of this rank, L tokens of a view, N patches of a large crop, V of them kept, C encoder width, E width of the
head's output, G rows with targets (b), R rows of the student (anchor by anchor, b each), K prototypes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.core import dist
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.optim import Group, linear, with_decay
from engine.data.views import Augmentation
from engine.methods.base import Rows
from engine.methods.clustering import Distillation, DistillationSettings
from engine.methods.parts.collapse import Collapse
from engine.model.heads import BatchNorm, head_flops
from engine.model.memory import Teacher
from engine.model.tokens import View
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class Settings(DistillationSettings):
    """MSN; the defaults are the released recipe's for ViT-S/16 (see engine/recipes for sources)."""

    base_lr: float = 2.5e-4
    start_lr: float = 2e-4
    horizon: float = 1.25
    clip_over: str = "all"
    crop_scale: tuple[float, float] = (0.3, 1.0)
    collapse: str = "me-max+sinkhorn"
    global_crops: int = 2
    """Large crops of an image: the first makes the target, the others are anchors that lose patches."""
    local_crops: int = 10
    """Small crops of an image: anchors with all their patches."""
    local_scale: tuple[float, float] = (0.05, 0.3)
    augmentation: str = "simclr"
    """minimal (crop and flip) or simclr (with colour of half strength, grayscale and blur, alike for all crops)."""
    patch_drop: float = 0.15
    """Share of the patches that a large anchor loses: the same places in all images of a step."""
    prototypes: int = 1024
    target_temperature: float = 0.025
    """The student's 0.1, sharpened by 0.25: their product, for softmax(s / t) to the power 1 / T is softmax(s / (t T))."""
    target_temperature_start: float = 0.025
    freeze_last_layer: int = 0
    teacher_momentum: float = 0.996
    """Share of itself that the teacher keeps at the first update; it rises along a straight line."""
    free_norm: bool = False
    """Always False: cosines know no norms."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        return super().rules() | {
            "global-crops": (self.global_crops >= 2, "a whole number from 2: a target and at least one anchor"),
            "local-crops": (self.local_crops >= 0, "a whole number from 0"),
            "augmentation": (self.augmentation in ("minimal", "simclr"), "minimal or simclr"),
            "patch-drop": (0 <= self.patch_drop < 1, "a share from 0 to below 1"),
            "free-norm": (not self.free_norm, "False"),
        }

    def check_encoder(self, stage: str, encoder: VisionTransformer) -> None:
        super().check_encoder(stage, encoder)
        patches = encoder.grid[0] * encoder.grid[1]
        if kept(patches, self.patch_drop) < 1:
            raise BadInput(
                f"--{stage}.patch-drop is {self.patch_drop}, which leaves none of {patches} patches; choose a smaller share."
            )

    def ungraphed(self, encoder: VisionTransformer) -> str:
        return self.on_host(encoder)

    @property
    def splits(self) -> bool:
        return False  # the heads' batch norm compares images, whatever keeps the prototypes apart


def kept(patches: int, drop: float) -> int:
    """How many of so many patches are left when a share is dropped: 166 of 196 without 15 %."""
    return int(patches * (1 - drop))


def head(features: int, hidden: int = 2048, layers: int = 3, out: int = 256) -> nn.Sequential:
    """Linear layers with batch norm and GELU between them; weights from a truncated N(0, .02), biases 0."""
    widths = [features, *(hidden,) * (layers - 1), out]
    parts: list[nn.Module] = []
    for index in range(layers):
        parts += [nn.Linear(widths[index], widths[index + 1]), BatchNorm(widths[index + 1]), nn.GELU()]
        nn.init.trunc_normal_(parts[-3].weight, std=0.02)
        nn.init.zeros_(parts[-3].bias)
    return nn.Sequential(*parts[:-2])


class CosinePrototypes(nn.Linear):
    """Trainable prototypes, uniform in +-1 / sqrt(E) at first; [R, E] -> cosines with them, fp32 [R, K] in any precision.

    Their gradient is the sum over ranks, as MSN has it. The engine averages gradients over ranks, so each rank's own is first
    multiplied by the number of ranks. AdamW, which they are trained with, takes the same steps for both but for its epsilon.
    """

    def __init__(self, features: int, prototypes: int):
        super().__init__(features, prototypes, bias=False)  # torch's initial weights are these

    def forward(self, x_RE: Tensor) -> Tensor:
        with torch.autocast(x_RE.device.type, enabled=False):
            prototypes_KE = F.normalize(self.weight, dim=1)
            if prototypes_KE.requires_grad and dist.world_size() > 1:
                prototypes_KE.register_hook(lambda gradient_KE: gradient_KE * dist.world_size())
            return F.linear(F.normalize(x_RE.to(self.weight.dtype), dim=1), prototypes_KE)


class Msn(Distillation):
    """Anchors, of which the large ones lack patches, predict the prototypes that the teacher gives a whole crop."""

    name = "msn"
    Settings = Settings
    shrinks = True
    last_layers = ("prototypes.",)

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        self.head = head(encoder.embed_dim, settings.head_hidden, settings.head_layers, settings.bottleneck)
        self.prototypes = CosinePrototypes(settings.bottleneck, settings.prototypes)
        self.teacher = Teacher(encoder=encoder, head=self.head)

    @property
    def keep(self) -> int:
        """How many patches of a large anchor are seen."""
        return kept(self.patches_of_crop, self.settings.patch_drop)

    def guard(self, prototypes: int, **options: object) -> Collapse:
        return super().guard(prototypes, from_probabilities=True, **options)

    def views(self) -> tuple[Augmentation, ...]:
        """The target, the large anchors, the small ones."""
        settings = self.settings
        colours = {"jitter": 0.8, "saturation": 0.4, "grayscale": 0.2, "blur": 0.5}
        large = Augmentation(
            self.size,
            settings.crop_scale,
            flip=settings.flip,
            resize=settings.resize,
            colours=settings.colours,
            **(colours if settings.augmentation == "simclr" else {}),
        )
        small = replace(large, size=self.local_size, scale=settings.local_scale)
        return (large,) * settings.global_crops + (small,) * self.local_crops

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        drawn = super().draw(draws)
        patches = self.patches_of_crop
        if self.keep < patches:
            # One order for the global batch, so every rank draws it whole; a row per image says so to whoever splits batches.
            order_N = torch.randperm(patches, generator=draws.generator, device=draws.device)
            images = len(range(draws.batch)[draws.rows])
            drawn["visible"] = order_N[: self.keep].expand(images, -1)
        return drawn

    def represent(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        large = self.settings.global_crops - 1
        anchors = [View(view, drawn.get("visible")) for view in images[1 : 1 + large]]
        anchors += [View(view) for view in images[1 + large :]]
        return {"pooled": [self.encoder.pool(tokens_bLC) for tokens_bLC in self.encode(anchors, drawn)]}

    def represent_targets(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        return {"taught": self.pool_taught(self.teach([View(view) for view in images[:1]]))}

    def compare(self, rows: Rows, ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        pooled, large = rows["pooled"], self.settings.global_crops - 1
        # Large and small anchors have batch statistics of their own.
        groups = [torch.cat(group) for group in (pooled[:large], pooled[large:]) if group]
        student_RK = self.prototypes(torch.cat([self.head(group_rC) for group_rC in groups]))
        with torch.no_grad():
            scores_GK = self.scores(*rows["taught"])
        loss, spread, health = self.predict_views(scores_GK, student_RK, (1, len(pooled)), skip_same=False)
        return {"loss": loss + spread} | health

    def scores(self, features: Tensor) -> Tensor:
        return self.prototypes(self.teacher.head(features))

    def teacher_momentum(self) -> float:
        """Of this step."""
        s = self.settings
        return linear(self.moment.step, self.moment.total_steps, s.teacher_momentum, s.teacher_momentum_end)

    def groups(self, images_per_step: int) -> Iterator[Group]:
        """The prototypes neither decay nor take part in clipping."""
        settings, peak_lr = self.settings, self.peak_lr(images_per_step)
        others = [(name, p) for name, p in self.named_parameters() if not name.startswith(self.last_layers)]
        yield from with_decay(others, peak_lr, settings.weight_decay)
        yield Group(
            {f"prototypes.{name}": p for name, p in self.prototypes.named_parameters()},
            peak_lr,
            weight_decay=0.0,
            frozen_epochs=settings.freeze_last_layer,
            clips=False,
        )

    def flops_per_image(self) -> float:
        head = head_flops(self.head) + head_flops(self.prototypes)
        target, *anchors = [self.patches(view) for view in self.views()]
        large = self.settings.global_crops - 1
        seen = [self.keep] * large + anchors[large:]
        student = sum(self.encoder_flops(patches, thinned=True) + head for patches in seen)
        return 3 * student + self.encoder_flops(target) + head
