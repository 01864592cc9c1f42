"""MMC-style training, after Wu et al., "Masked Momentum Contrastive Learning for Zero-shot Semantic Understanding" (arXiv
2308.11448): masked images are completed, global features contrasted, and their semantics distilled into local ones.

Its equations and numbers were not found. Contrast and pixels follow SiT of the same group (Atito et al., "SiT: Self-supervised
vIsion Transformer", arXiv 2104.03602), distillation iBOT (Zhou et al., ICLR 2022); how they are put together is ours.

Shapes: b images of this rank, B of all ranks, H and W of a crop, N patches of a crop, P patch size, L tokens of a crop, C encoder
width, R rows (both crops, b each), P rows of the masked patches of all crops and of padding, E embedding width, K prototypes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.core import dist
from engine.core.draws import Draws
from engine.core.host_memory import to_device
from engine.methods.base import Rows
from engine.methods.clustering import Distillation, DistillationSettings
from engine.methods.ibot import Masked
from engine.methods.parts.contrast import pick_own
from engine.methods.parts.corruption import CorruptionSettings, corrupt, draw_corruption, masked_mean
from engine.methods.settings import RAGGED
from engine.model.heads import PixelDecoder, contrast_projector, head_flops
from engine.model.initialisation import initialise
from engine.model.memory import Teacher
from engine.model.tokens import View
from engine.model.vit import VisionTransformer

READINGS = ("patch_same", "cls_to_patch")


@dataclass(frozen=True)
class Settings(CorruptionSettings, DistillationSettings):
    """MMC-style; the defaults are SiT's, and iBOT's for distillation (see engine/recipes/mmc.py for sources)."""

    contrast_weight: float = 1.0
    """Of the contrast of pooled features; 0 leaves it out."""
    pixel_weight: float = 1.0
    """Of the error of corrupted pixels; 0 leaves it out."""
    distil_weight: float = 1.0
    """Of what patches learn from the teacher; 0 leaves it out."""
    distil: str = "patch_same"
    """What patches learn: patch_same (masked patches what the teacher says of them, and crops what it says of the other crop, by
    one head for both, as in iBOT) or cls_to_patch (the mean of a crop's patches what it says of the whole crop)."""
    projector_hidden: int = 4096
    embedding: int = 256
    contrast_temperature: float = 0.2
    decoder_layers: int = 3
    """Linear layers of the decoder before pixels."""
    local_crops: int = 0
    """0: there are two large crops and no others."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    weight_decay_end: float | None = 0.1
    prototypes: int = 8192
    target_temperature: float = 0.07
    target_temperature_epochs: int = 30

    def rules(self) -> dict[str, tuple[bool, str]]:
        nothing = self.contrast_weight == self.pixel_weight == self.distil_weight == 0
        own = {
            "contrast-weight": (
                self.contrast_weight >= 0 and not nothing,
                "a number from 0, above 0 where the other two weights are 0",
            ),
            "pixel-weight": (self.pixel_weight >= 0, "a number from 0"),
            "distil-weight": (self.distil_weight >= 0, "a number from 0"),
            "distil": (self.distil in READINGS, f"one of {', '.join(READINGS)}"),
            "projector-hidden": (self.projector_hidden >= 1, "a whole number from 1"),
            "embedding": (self.embedding >= 1, "a whole number from 1"),
            "contrast-temperature": (self.contrast_temperature > 0, "a number above 0"),
            "decoder-layers": (self.decoder_layers >= 1, "a whole number from 1"),
            "global-crops": (self.global_crops == 2, "2, since each crop is compared with the other"),
            "local-crops": (self.local_crops == 0, "0, since MMC sees large crops only"),
        }
        return super().rules() | self.corruption_rules() | own

    def check_encoder(self, stage: str, encoder: VisionTransformer) -> None:
        super().check_encoder(stage, encoder)
        self.check_corruption(stage, self.token_phases.sizes(encoder.img_size, encoder.patch_size))

    def ungraphed(self, encoder: VisionTransformer) -> str:
        ragged = RAGGED if self.distil_weight and self.distil == "patch_same" else ""
        return ragged or self.on_host(encoder) or self.noise_on_host()

    @property
    def splits(self) -> bool:
        return False


class Mmc(Distillation):
    """The student sees two corrupted crops and the teacher the same two clean: pooled features must pick the teacher's of the
    other crop out of the batch's, a decoder must restore the corrupted pixels, and patches learn which prototypes the teacher
    gives patches or crops.

    A patch counts as masked where more than half of its pixels are corrupted. Batch norm runs over both crops together, and the
    centre of patches follows the masked ones. A term of weight 0 has neither heads nor prototypes. Under patch_same heads of
    prototypes are not compiled: how many patches are masked changes from step to step.
    """

    name = "mmc"
    Settings = Settings
    draws_ahead = shrinks = True

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        s, followed, start = settings, {"encoder": encoder}, encoder.architecture.initialisation
        if s.contrast_weight:
            followed["projector"] = self.projector = contrast_projector(
                encoder.embed_dim, s.projector_hidden, s.embedding
            )
            if start == "dino":  # as SiT's
                initialise(self.projector, kind=start)
        if s.pixel_weight:
            self.decoder = PixelDecoder(encoder.embed_dim, encoder.patch_size, s.decoder_layers, start)
        if s.distil_weight:
            followed["head"] = self.head = self.dino_head(s.bottleneck, s.prototypes)
            if s.distil == "patch_same":
                self.patch_collapse = self.guard(s.prototypes)
        else:
            self.prototype_count = 0
            del self.collapse
        self.teacher = Teacher(**followed)

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        s = self.settings
        drawn = super().draw(draws) | draw_corruption(s, draws, s.global_crops, self.size)
        if s.distil_weight and s.distil == "patch_same":
            drawn["masks"] = masked_patches(drawn["corrupted"], self.patch_size)
        return drawn

    def represent(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        s, device, rows = self.settings, images[0].device, {}
        there = drawn | {"corrupted": to_device(drawn["corrupted"], device)}
        seen = self.encode([View(view) for view in corrupt(s, images, there)], drawn)
        patches = [tokens_bLC[:, self.encoder.num_prefix_tokens :] for tokens_bLC in seen]
        if s.contrast_weight or s.distil_weight:
            rows["pooled"] = [self.encoder.pool(tokens_bLC) for tokens_bLC in seen]
        if s.pixel_weight:
            corrupted_RHW = there["corrupted"].transpose(0, 1).flatten(0, 1)
            # a mean over images, which need not meet for it
            rows["pixel_loss"] = [self.pixel_loss(torch.cat(patches), torch.cat(images), corrupted_RHW)[None]]
        if s.distil_weight and s.distil == "cls_to_patch":
            rows["mean_patches"] = [self.encoder.fc_norm(patches_bNC.mean(1)) for patches_bNC in patches]
        elif s.distil_weight:
            rows["masked"] = self.masked(drawn, device).rows_of(seen)
        return rows

    def represent_targets(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        s = self.settings
        if not (s.contrast_weight or s.distil_weight):
            return {}
        taught = self.teach([View(view) for view in images])
        rows = {"taught": self.pool_taught(taught)}
        if s.distil_weight and s.distil == "patch_same":
            rows["taught_masked"] = self.masked(drawn, images[0].device).rows_of(taught)
        return rows

    def masked(self, drawn: dict[str, Tensor], device: torch.device) -> Masked:
        return Masked.of(drawn["masks"], self.encoder.num_prefix_tokens, device, self.masked_share())

    def compare(self, rows: Rows, ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        s, terms, health = self.settings, {}, {}
        if s.contrast_weight:
            terms["contrast"] = self.contrast_both(torch.cat(rows["pooled"]), torch.cat(rows["taught"]))
        if s.pixel_weight:
            terms["pixel"] = rows["pixel_loss"][0].mean()
        if s.distil_weight and s.distil == "cls_to_patch":
            terms["distil"], health = self.cls_to_patch(torch.cat(rows["mean_patches"]), torch.cat(rows["taught"]))
        elif s.distil_weight:
            masked = self.masked(drawn, ids.device)
            student, taught = (
                torch.cat([*rows[a], masked.padded(rows[b])])
                for a, b in (("pooled", "masked"), ("taught", "taught_masked"))
            )
            terms["distil"], health = self.patch_same(student, taught, masked)
        loss = sum(getattr(s, f"{name}_weight") * term for name, term in terms.items())
        return {"loss": loss} | {f"{name}_loss": term.detach() for name, term in terms.items()} | health

    def contrast_both(self, student_RC: Tensor, taught_RC: Tensor) -> Tensor:
        """Each crop of the student against the teacher's other one; the two are added, as in SiT."""
        student_first, student_second = F.normalize(self.projector(student_RC).float(), dim=1).chunk(2)
        with torch.no_grad():
            taught_RE = F.normalize(self.teacher.projector(taught_RC).float(), dim=1)
            taught_first, taught_second = (dist.all_gather(taught_bE) for taught_bE in taught_RE.chunk(2))
        return self.contrast(student_first, taught_second) + self.contrast(student_second, taught_first)

    def contrast(self, student_bE: Tensor, taught_BE: Tensor) -> Tensor:
        """Cross-entropy of picking the own image's unit vector of the teacher out of those of all ranks, times 2 temperatures (as
        MoCo v3 and SiT scale it)."""
        temperature = self.settings.contrast_temperature
        return 2 * temperature * pick_own(student_bE, taught_BE, temperature)

    def pixel_loss(self, patches_RNC: Tensor, clean: Tensor, corrupted_RHW: Tensor) -> Tensor:
        """Mean absolute error of what is decoded from patch tokens against the clean normalised crops [R, 3, H, W], over the
        corrupted pixels of a crop, then over crops (SiT takes all pixels of the batch at once)."""
        pixels = self.decoder(patches_RNC, self.patch_size).float()
        restored = self.decoder.images(pixels, self.grid, self.patch_size)
        return masked_mean((restored - clean).abs().mean(1), corrupted_RHW)

    def patch_same(self, student: Tensor, taught: Tensor, masked: Masked) -> tuple[Tensor, dict[str, Tensor]]:
        """iBOT's two losses, weighted alike, of one head: that of crops carries what they mean to the prototypes of patches.

        Args:
            student: [R + P, C], the pooled features of both crops and then their masked patches with padding.
            taught: the teacher's, likewise.
        """
        s, crops = self.settings, len(student) - len(masked.weights)
        student = self.head(student)
        with torch.no_grad():
            scores = self.scores(taught)
        student_RK, student_PK, scores_RK, scores_PK = student[:crops], student[crops:], scores[:crops], scores[crops:]
        class_loss, spread, health = self.predict_views(scores_RK, student_RK, (s.global_crops,) * 2)
        patch_loss, patch_spread, _ = self.predict(
            self.patch_collapse, scores_PK, student_PK, weights_R=masked.weights, count=masked.count
        )
        report = {"class_loss": class_loss.detach(), "patch_loss": patch_loss.detach()}
        return class_loss + patch_loss + (spread + patch_spread), report | health

    def cls_to_patch(self, mean_RC: Tensor, taught_RC: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the teacher says of a crop, learned by the mean of the student's patches of the same crop."""
        student_RK = self.head(mean_RC)
        with torch.no_grad():
            scores_RK = self.scores(taught_RC)
        loss, spread, targets = self.predict(self.collapse, scores_RK, student_RK)
        return loss + spread, self.health(targets)

    def flops_per_image(self) -> float:
        s, patches = self.settings, self.patches_of_crop
        crop = 3 * self.encoder_flops(patches, thinned=True)
        if s.contrast_weight or s.distil_weight:
            crop += self.encoder_flops(patches)
        if s.contrast_weight:
            crop += 4 * head_flops(self.projector)
        if s.pixel_weight:
            crop += 3 * patches * self.decoder.flops(self.patch_size)
        if s.distil_weight:
            masked = patches * self.masked_share() if s.distil == "patch_same" else 0
            crop += 4 * (1 + masked) * head_flops(self.head)
        return s.global_crops * crop

    def masked_share(self) -> float:
        """Of a crop's patches, on average; what blocks overshoot is not counted."""
        s = self.settings
        return s.alien_probability * s.alien + (1 - s.alien_probability) * sum(s.drop) / 2

    def regions(self) -> Iterator[tuple[object, str]]:
        yield from super().regions()
        if self.settings.contrast_weight:
            yield self, "contrast"
        if self.settings.pixel_weight:
            yield self, "pixel_loss"
        if self.settings.distil_weight and self.settings.distil == "cls_to_patch":
            yield self.head, "forward"
            yield self.teacher.head, "forward"


def masked_patches(corrupted_bVHW: Tensor, patch_size: int) -> Tensor:
    """Bool [b, V, N]: the patches of which more than half of the pixels are corrupted."""
    pixels = corrupted_bVHW.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return (2 * pixels.sum((3, 5)) > patch_size**2).flatten(2)
