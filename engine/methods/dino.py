"""DINO (Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021).

Shapes: b images of this rank, G rows of the teacher and R of the student (view by view, b each), L tokens of a view, C encoder
width, K prototypes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.methods.base import Rows
from engine.methods.clustering import Distillation, DistillationSettings
from engine.model.memory import Teacher
from engine.model.tokens import View
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class Settings(DistillationSettings):
    """DINO; the defaults are the released recipe's (see engine/recipes/dino.py for sources)."""

    def ungraphed(self, encoder: VisionTransformer) -> str:
        return self.on_host(encoder)


class Dino(Distillation):
    """Every crop predicts the prototypes that the teacher gives the other large crops."""

    name = "dino"
    Settings = Settings

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        self.head = self.dino_head(settings.bottleneck, settings.prototypes)
        self.teacher = Teacher(encoder=encoder, head=self.head)

    def represent(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        seen = self.encode([View(view) for view in images], drawn)
        return {"pooled": [self.encoder.pool(tokens_bLC) for tokens_bLC in seen]}

    def compare(self, rows: Rows, ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        student_RK = self.head(torch.cat(rows["pooled"]))
        with torch.no_grad():
            scores_GK = self.scores(torch.cat(rows["taught"]))
        views = (len(rows["taught"]), len(rows["pooled"]))
        loss, spread, health = self.predict_views(scores_GK, student_RK, views)
        return {"loss": loss + spread} | health

    def flops_per_image(self) -> float:
        return self.student_flops(self.head) + self.teacher_flops(self.head)

    def regions(self) -> Iterator[tuple[object, str]]:
        yield from super().regions()
        yield self.head, "forward"
        yield self.teacher.head, "forward"
