"""DINO (Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021).

Shapes: b images of this rank, G rows of the teacher and R of the student (view by view, b each), L tokens of a view, C encoder
width, K prototypes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.data.views import ASPECTS
from engine.methods.base import Rows
from engine.methods.clustering import Distillation, DistillationSettings
from engine.model.memory import Teacher
from engine.model.shapes import Alike, in_order
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class Settings(DistillationSettings):
    """DINO; the defaults are the released recipe's (see engine/recipes/dino.py for sources)."""

    def ungraphed(self, encoder: VisionTransformer) -> str:
        return self.on_host(encoder)

    def rules(self) -> dict[str, tuple[bool, str]]:
        whole = min(self.phase_keeps) == 1 and self.patch_draws == (1.0,)
        holds = self.aspect in ASPECTS and (self.aspect == "crop" or whole)
        return super().rules() | {
            "aspect": (holds, "crop, or keep where all phases show all patches, of no size that is drawn")
        }


class Dino(Distillation):
    """Every crop predicts the prototypes that the teacher gives the other large crops."""

    name = "dino"
    Settings = Settings
    shrinks = drops_patches = keeps_aspect = True

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        self.head = self.dino_head(settings.bottleneck, settings.prototypes)
        self.teacher = Teacher(encoder=encoder, head=self.head)

    def represent(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        alike = self.shapes(images, drawn)
        seen = self.encode([group.view() for view in alike for group in view], drawn)
        return {"pooled": pooled(self.encoder, seen, alike)}

    def represent_targets(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        alike = self.shapes(images[: self.settings.global_crops], drawn)
        taught = self.teach([group.view() for view in alike for group in view])
        return {"taught": pooled(self.teacher.encoder, taught, alike)}

    def compare(self, rows: Rows, ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        student_RK = self.head(torch.cat(rows["pooled"]))
        with torch.no_grad():
            scores_GK = self.scores(torch.cat(rows["taught"]))
        views = (len(rows["taught"]), len(rows["pooled"]))
        loss, spread, health = self.predict_views(scores_GK, student_RK, views)
        return {"loss": loss + spread} | health

    def flops_per_image(self) -> float:
        # with the images' own aspect a bound from above: the nearest grid may have fewer patches
        return self.student_flops(self.head) + self.teacher_flops(self.head)

    def regions(self) -> Iterator[tuple[object, str]]:
        yield from super().regions()
        yield self.head, "forward"
        yield self.teacher.head, "forward"


def pooled(encoder: VisionTransformer, groups: Sequence[Tensor], alike: Sequence[Sequence[Alike]]) -> list[Tensor]:
    """[b, C] of each view, from its tokens [S, L, C] shape by shape."""
    tokens = iter(groups)
    return [in_order([encoder.pool(next(tokens)) for _ in view], view) for view in alike]
