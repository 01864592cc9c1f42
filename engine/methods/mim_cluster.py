"""Masked images and clustering in one, after "Investigating Self-Supervised Methods for Label-Efficient Learning" (Nandam et al.,
IJCV 2025, arXiv 2406.17460). Its losses were not found; these are those of MC-SSL by the same group (Atito et al., "MC-SSL0.0:
Towards Multi-Concept Self-Supervised Learning", 2021, arXiv 2111.15340), with what keeps them from collapsing as a choice.

Shapes: b images of this rank, V large crops of H x W pixels, B = V * b of them, N patches of one, M = B * N, P patch size, L
tokens of a view, C encoder width, E width of the bottleneck, G rows of the teacher and R of the student (view by view, b each), K
prototypes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.core.draws import Draws
from engine.core.host_memory import to_device
from engine.data.views import Augmentation
from engine.methods.base import Rows
from engine.methods.clustering import Distillation, DistillationSettings
from engine.methods.parts.collapse import usage
from engine.methods.parts.corruption import CorruptionSettings, corrupt, draw_corruption, masked_mean
from engine.model.heads import PixelDecoder, WeightNormed, head_flops
from engine.model.memory import Teacher
from engine.model.tokens import View
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class Settings(DistillationSettings, CorruptionSettings):
    """The defaults are those of MC-SSL's released recipe (see engine/recipes/mim_cluster.py for sources).

    freeze_last_layer is about the prototypes of images only, as MC-SSL has it. Alien pixels come from a neighbour in the batch:
    ranks and micro-batches compute what one process does where each has an even number of images; of an odd number, the last
    image's come from another one than there.
    """

    prototypes: int = 8192
    crop_scale: tuple[float, float] = (0.25, 1.0)
    local_crops: int = 10
    local_scale: tuple[float, float] = (0.05, 0.25)
    target_temperature: float = 0.07
    target_temperature_epochs: int = 30
    patch_prototypes: int = 8192
    """Prototypes of patches; all of the head below them is shared with images."""
    decoder_layers: int = 2
    """Linear layers of the encoder's width between a patch token and its pixels."""
    class_weight: float = 1.0
    """Of the loss of whole crops; with 0 there are no small crops."""
    patch_weight: float = 1.0
    """Of the loss of the large crops' patches, all of them."""
    pixel_weight: float = 1.0
    """Of the squared error of corrupted pixels."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        weights = {name: getattr(self, name) for name in ("class_weight", "patch_weight", "pixel_weight")}
        wanted = "a number from 0, and above 0 for one of class-weight, patch-weight and pixel-weight"
        any_term = any(weight > 0 for weight in weights.values())
        return (
            super().rules()
            | self.corruption_rules()
            | {
                "patch-prototypes": (self.patch_prototypes >= 2, "a whole number from 2"),
                "decoder-layers": (self.decoder_layers >= 0, "a whole number from 0"),
            }
            | {name.replace("_", "-"): (weight >= 0 and any_term, wanted) for name, weight in weights.items()}
        )

    @property
    def splits(self) -> bool:
        return super().splits or not (self.class_weight or self.patch_weight)

    def check_encoder(self, stage: str, encoder: VisionTransformer) -> None:
        super().check_encoder(stage, encoder)
        self.check_corruption(stage, self.token_phases.sizes(encoder.img_size, encoder.patch_size))

    def ungraphed(self, encoder: VisionTransformer) -> str:
        return self.on_host(encoder) or self.noise_on_host()


class MimCluster(Distillation):
    """The student sees large crops with corrupted pixels, and small crops. Every crop predicts the prototypes that the teacher,
    which sees clean crops, gives the other large ones; every patch of a large crop those that the teacher gives that patch; and
    every patch its pixels, which count where they were corrupted.

    A term whose weight is 0 is not computed, and what only it needs is not trained.
    """

    name = "mim_cluster"
    Settings = Settings
    draws_ahead = shrinks = True

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        s, parts = settings, {"encoder": encoder}
        if s.class_weight or s.patch_weight:
            self.head = parts["head"] = self.dino_head(s.bottleneck, s.prototypes)
        if not s.class_weight:
            self.prototype_count = 0
            if s.patch_weight:
                self.head.last_layer.requires_grad_(False)
        if s.patch_weight:
            self.patch_last_layer = WeightNormed(s.bottleneck, s.patch_prototypes, s.free_norm)
            parts["patch_last_layer"] = self.patch_last_layer
            self.patch_collapse = self.guard(s.patch_prototypes)
        if s.pixel_weight:
            start = encoder.architecture.initialisation
            self.decoder = PixelDecoder(encoder.embed_dim, encoder.patch_size, s.decoder_layers, start)
        self.teacher = Teacher(**parts)

    def views(self) -> tuple[Augmentation, ...]:
        views = super().views()
        return views if self.settings.class_weight else views[: self.settings.global_crops]

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        s = self.settings
        return super().draw(draws) | draw_corruption(s, draws, s.global_crops, self.size)

    def represent(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        s, large = self.settings, images[: self.settings.global_crops]
        drawn = drawn | {"corrupted": to_device(drawn["corrupted"], large[0].device)}
        views = [*corrupt(s, large, drawn), *images[len(large) :]]
        seen = self.encode([View(view) for view in views], drawn)
        rows = self._read(self.encoder, seen)
        if s.pixel_weight:
            prediction_BNp = self.decoder(torch.cat(self._patch_tokens(seen)), self.patch_size)
            corrupted_BHW = drawn["corrupted"].transpose(0, 1).flatten(0, 1)
            # a mean over images, which need not meet for it
            rows["pixel_loss"] = [self.pixel_loss(prediction_BNp, torch.cat(large), corrupted_BHW)[None]]
        return rows

    def represent_targets(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        """Of the clean large crops."""
        s = self.settings
        if not (s.class_weight or s.patch_weight):
            return {}
        read = self._read(self.teacher.encoder, self.teach([View(view) for view in images[: s.global_crops]]))
        return {f"taught_{name}": views for name, views in read.items()}

    def compare(self, rows: Rows, ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        s, loss, report = self.settings, torch.zeros((), device=ids.device), {}
        if s.class_weight or s.patch_weight:
            clustering, report = self.cluster_loss(rows)
            loss = loss + clustering
        if s.pixel_weight:
            pixel_loss = rows["pixel_loss"][0].mean()
            loss, report = loss + s.pixel_weight * pixel_loss, report | {"pixel_loss": pixel_loss.detach()}
        return {"loss": loss} | report

    def cluster_loss(self, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """Both cross-entropies, weighted and added, and what is to be logged."""
        s = self.settings
        student = self._embed(self, rows, "")
        with torch.no_grad():
            taught = self._embed(self.teacher, rows, "taught_")
        loss, report = student[0].new_zeros(()), {}
        if s.class_weight:
            student_RK = self.head.last_layer(student[0])
            with torch.no_grad():
                scores_GK = self.teacher.head.last_layer(taught[0])
            views = (len(rows["taught_pooled"]), len(rows["pooled"]))
            class_loss, spread, health = self.predict_views(scores_GK, student_RK, views)
            loss = loss + s.class_weight * (class_loss + spread)
            report |= {"class_loss": class_loss.detach()} | health
        if s.patch_weight:
            student_MK = self.patch_last_layer(student[-1])
            with torch.no_grad():
                scores_MK = self.teacher.patch_last_layer(taught[-1])
            patch_loss, spread, _ = self.predict(self.patch_collapse, scores_MK, student_MK)
            loss = loss + s.patch_weight * (patch_loss + spread)
            report["patch_loss"] = patch_loss.detach()
            if self.moment.logged:
                report["patch_prototype_usage"] = usage(self.patch_collapse.choose(scores_MK), s.patch_prototypes)
        return loss, report

    def pixel_loss(self, prediction_BNp: Tensor, images: Tensor, corrupted_BHW: Tensor) -> Tensor:
        """Mean squared error of the corrupted pixels: over those of each crop, then over crops.

        Args:
            prediction_BNp: [B, N, P*P*3].
            images: fp32 [B, 3, H, W], the clean crops.
        """
        predicted = self.decoder.images(prediction_BNp.float(), self.grid, self.patch_size)
        return masked_mean((predicted - images).square().mean(1), corrupted_BHW)

    def _patch_tokens(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """[b, N, C] of each large crop, the first of these views [b, L, C]."""
        return [view_bLC[:, self.encoder.num_prefix_tokens :] for view_bLC in tokens[: self.settings.global_crops]]

    def _read(self, encoder: VisionTransformer, tokens: list[Tensor]) -> Rows:
        """Of an encoder's tokens [b, L, C] what the wanted losses compare: pooled crops [b, C] and patches [b, N, C]."""
        s, rows = self.settings, {}
        if s.class_weight:
            rows["pooled"] = [encoder.pool(view_bLC) for view_bLC in tokens]
        if s.patch_weight:
            rows["patches"] = self._patch_tokens(tokens)
        return rows

    def _embed(self, owner: nn.Module, rows: Rows, prefix: str) -> tuple[Tensor, ...]:
        """Unit vectors of pooled crops [R, E] (or [G, E]), then of patches [M, E], those of the two whose loss is wanted; `owner`
        of the head is the student (self) or the teacher, and `prefix` that of the names of its rows."""
        parts = []
        if self.settings.class_weight:
            parts.append(torch.cat(rows[f"{prefix}pooled"]))
        if self.settings.patch_weight:
            parts.append(torch.cat(rows[f"{prefix}patches"]).flatten(0, 1))
        return owner.head.embed(torch.cat(parts)).split([len(part) for part in parts])

    def flops_per_image(self) -> float:
        s, views = self.settings, self.views()
        crops, patches = s.global_crops, s.global_crops * self.grid[0] * self.grid[1]
        total = 3 * sum(self.encoder_flops(self.patches(view), thinned=True) for view in views)
        if s.class_weight or s.patch_weight:
            total += sum(self.encoder_flops(self.patches(view)) for view in views[:crops])
        if s.class_weight:
            total += (3 * len(views) + crops) * head_flops(self.head)
        if s.patch_weight:
            total += 4 * patches * (head_flops(self.head.mlp) + head_flops(self.patch_last_layer))
        if s.pixel_weight:
            total += 3 * patches * self.decoder.flops(self.patch_size)
        return total

    def regions(self) -> Iterator[tuple[object, str]]:
        yield from super().regions()
        if self.settings.class_weight or self.settings.patch_weight:
            yield self.head, "embed"
            yield self.teacher.head, "embed"
        if self.settings.pixel_weight:
            yield self.decoder, "pixels"
            yield self, "pixel_loss"
