"""DINO (Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021).

Shapes: b images of this rank, G rows of the teacher and R of the student (view by view, b each), L tokens of a view, C encoder
width, K prototypes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.methods.clustering import Distillation, DistillationSettings
from engine.model.memory import Teacher
from engine.model.tokens import View
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class Settings(DistillationSettings):
    """DINO; the defaults are the released recipe's (see engine/recipes/dino.py for sources)."""


class Dino(Distillation):
    """Every crop predicts the prototypes that the teacher gives the other large crops."""

    name = "dino"
    Settings = Settings

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        self.head = self.dino_head(settings.bottleneck, settings.prototypes)
        self.teacher = Teacher(encoder=encoder, head=self.head)

    def forward(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        settings = self.settings
        pooled = [self.encoder.pool(tokens_bLC) for tokens_bLC in self.encode([View(view) for view in images], drawn)]
        student_RK = self.head(torch.cat(pooled))
        with torch.no_grad():
            taught = self.teach(images[: settings.global_crops])
            scores_GK = self.scores(torch.cat([self.evaluated.pool(tokens_bLC) for tokens_bLC in taught]))
        loss, spread, health = self.predict_views(scores_GK, student_RK, (settings.global_crops, len(images)))
        return {"loss": loss + spread} | health

    def flops_per_image(self) -> float:
        return self.student_flops(self.head) + self.teacher_flops(self.head)

    def regions(self) -> Iterator[tuple[object, str]]:
        yield from super().regions()
        yield self.head, "forward"
        yield self.teacher.head, "forward"
