"""iBOT (Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer", ICLR 2022).

Shapes: b images of this rank, V large crops, N patches of one, L tokens of a view, C encoder width, M masked patches of all
large crops, P rows of these and of padding, G rows of the teacher and R of the student (view by view, b each), K prototypes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.core import masking
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.host_memory import to_device
from engine.methods.base import Rows
from engine.methods.clustering import Distillation, DistillationSettings
from engine.methods.parts.collapse import usage
from engine.methods.settings import RAGGED
from engine.model.heads import DinoHead, head_flops
from engine.model.memory import Teacher
from engine.model.tokens import View
from engine.model.vit import VisionTransformer

MASKINGS = ("blocks", "random")
TRIES_AT_ONCE = 8
SIZES, ALIGNMENT = 10, 16  # rows are padded to a multiple of the expected number's tenth, which is one of 16


@dataclass(frozen=True)
class Settings(DistillationSettings):
    """iBOT; the defaults are the released ViT-S recipe's (see engine/recipes for sources)."""

    prototypes: int = 8192
    crop_scale: tuple[float, float] = (0.25, 1.0)
    local_crops: int = 10
    local_scale: tuple[float, float] = (0.05, 0.25)
    target_temperature: float = 0.07
    target_temperature_epochs: int = 30
    masking: str = "blocks"
    """blocks (of BEiT) or random patches."""
    masked_crops: float = 0.5
    """Share of the large crops that are masked."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Share of its patches that a masked crop hides, drawn between these."""
    smallest_block: int = 0
    """Patches of the smallest block; 0 is the square of a third of the grid's shorter side, rounded down."""
    patch_prototypes: int = 0
    """Prototypes of patches, in a head of their own; 0 lets them share the head and prototypes of images."""
    patch_bottleneck: int = 256
    """Width of what patches' own prototypes are compared with."""
    class_weight: float = 1.0
    """Of the loss of whole crops."""
    patch_weight: float = 1.0
    """Of the loss of masked patches."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        low, high = self.mask_ratio
        return super().rules() | {
            "masking": (self.masking in MASKINGS, f"one of {', '.join(MASKINGS)}"),
            "masked-crops": (0 < self.masked_crops <= 1, "a share above 0, at most 1"),
            "mask-ratio": (0 < low <= high <= 1, "two shares with 0 < low <= high <= 1"),
            "smallest-block": (self.smallest_block >= 0, "a whole number from 0"),
            "patch-prototypes": (
                self.patch_prototypes == 0 or self.patch_prototypes >= 2,
                "a whole number from 2, or 0 to share those of images",
            ),
            "patch-bottleneck": (self.patch_bottleneck >= 1, "a whole number from 1"),
            "class-weight": (self.class_weight >= 0, "a number from 0"),
            "patch-weight": (self.patch_weight >= 0, "a number from 0"),
        }

    def check_encoder(self, stage: str, encoder: VisionTransformer) -> None:
        super().check_encoder(stage, encoder)
        (rows, columns), high = encoder.grid, self.mask_ratio[1]
        if int(high * rows * columns) < 1:
            raise BadInput(
                f"--{stage}.mask-ratio is {self.mask_ratio}; of the model's {rows * columns} patches that hides none."
            )
        if self.masking == "blocks" and min(rows, columns) < 2:
            raise BadInput(
                f"--{stage}.masking is blocks; that needs a grid of at least 2 x 2 patches, and this one has {rows} x {columns}."
            )

    def ungraphed(self, encoder: VisionTransformer) -> str:
        return RAGGED


@dataclass(frozen=True)
class Masked:
    """The hidden patches of the large crops, view by view, and within a view image by image.

    Attributes:
        hidden: bool [b, N] of each view.
        tokens: int64 [m] of each view: the hidden patches among its b * L tokens.
        count: M.
        patches: int64 [P], the same among the V * b * N patches of all views; 0 from M on.
        weights: fp32 [P]: 1 / (hidden patches of its crop * V * b), and 0 from M on. Their sum is the share of crops that are
            masked.
    """

    hidden: list[Tensor]
    tokens: list[Tensor]
    count: int
    patches: Tensor
    weights: Tensor

    @staticmethod
    @lru_cache(maxsize=1)  # the parts of a step ask one after the other, with one tensor
    def of(masks_bVN: Tensor, prefix: int, device: torch.device, share: float) -> "Masked":
        """Made of masks bool [b, V, N] on the CPU, for tokens that begin with `prefix` others; lies on `device`.

        How many patches are hidden differs at every step. So that what is made of them has few sizes, which an allocator finds
        again, rows are padded up to `padded_rows`.

        Args:
            share: of all patches, hidden on average.
        """
        masks_VbN = masks_bVN.transpose(0, 1).contiguous()
        patches_M = masks_VbN.flatten().nonzero()[:, 0]
        images, patches = masks_VbN.shape[1:]
        crops_M = patches_M // patches
        counts_Vb = masks_VbN.sum(2)
        weights_M = 1.0 / (counts_Vb.flatten()[crops_M] * counts_Vb.numel())
        tokens_M = crops_M % images * (prefix + patches) + prefix + patches_M % patches
        missing = padded_rows(len(patches_M), share * masks_VbN.numel()) - len(patches_M)

        tokens = to_device(tokens_M, device).split(counts_Vb.sum(1).tolist())
        patches_P, weights_P = (to_device(F.pad(x_M, (0, missing)), device) for x_M in (patches_M, weights_M))
        return Masked(list(to_device(masks_VbN, device)), list(tokens), len(patches_M), patches_P, weights_P)

    def rows_of(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Their tokens [m, C] of each view, out of those of the large crops [b, L, C]."""
        return [
            tokens_bLC.flatten(0, 1).index_select(0, rows) for tokens_bLC, rows in zip(views, self.tokens, strict=True)
        ]

    def padded(self, views: Sequence[Tensor]) -> Tensor:
        """[P, C] of these rows [m, C] of each view: a row again stands for what is missing, so that padding is as finite as rows
        are. It has no weight, and passes on gradients of 0."""
        missing = len(self.weights) - self.count
        if not missing:
            return torch.cat(list(views))
        row_1C = next(view for view in views if len(view))[:1]
        return torch.cat([*views, row_1C.expand(missing, -1)])


def padded_rows(count: int, expected: float) -> int:
    """So many rows with padding: the next multiple of a tenth of what is expected, itself a multiple of 16. None stay none.

    Counted for a GPU of the published recipes over 60 steps (iBOT: 150): 5 sizes in iBOT for ViT-S/16 and 6 in DINOv2 for
    ViT-B/16, 7 for ViT-L/14, 2 in MMC, where nearly every step had a size of its own; padding is 5 % of the rows.
    """
    unit = ALIGNMENT * max(1, ceil(expected / (SIZES * ALIGNMENT)))
    return unit * ceil(count / unit)


class Ibot(Distillation):
    """Every crop predicts the prototypes that the teacher gives the other large crops, and every masked patch of a large crop
    those that the teacher, which sees all of it, gives that patch.

    Heads are not compiled: how many patches are masked changes from step to step, and with it, padded or not, the shapes in them;
    but for those of the prototypes' weights.
    """

    name = "ibot"
    Settings = Settings
    draws_ahead = True
    shrinks = True
    last_layers = ("head.last_layer.", "patch_head.last_layer.")

    def __init__(self, encoder: VisionTransformer, settings: Settings):
        super().__init__(encoder, settings)
        s = settings
        self.mask_token = nn.Parameter(torch.zeros(1, encoder.embed_dim))
        self.head = self.dino_head(s.bottleneck, s.prototypes)
        parts = {"encoder": encoder, "head": self.head}
        if s.patch_prototypes:
            parts["patch_head"] = self.patch_head = self.dino_head(s.patch_bottleneck, s.patch_prototypes)
        self.teacher = Teacher(**parts)
        self.patch_collapse = self.guard(s.patch_prototypes or s.prototypes)

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        return super().draw(draws) | {"masks": self.masks(draws)}

    def masks(self, draws: Draws) -> Tensor:
        """Which patches of the large crops are hidden, bool [b, V, N] on the CPU."""
        settings, crops, (rows, columns) = self.settings, self.settings.global_crops, self.grid
        counts_R = (self.mask_shares(draws) * rows * columns).astype(int)
        if settings.masking == "random":
            noise_RN = draws.on_host("patches", crops, rows * columns).flatten(0, 1).numpy()
            masks_RN = masking.random_patches(noise_RN, counts_R)
        else:
            smallest = settings.smallest_block or (min(rows, columns) // 3) ** 2 or 1
            masks_RN = masking.block_patches(
                lambda round_: draws.on_host(f"blocks/{round_}", crops, TRIES_AT_ONCE, 4).flatten(0, 1).numpy(),
                counts_R,
                (rows, columns),
                smallest,
            )
        return torch.from_numpy(masks_RN).unflatten(0, (-1, crops))

    def mask_shares(self, draws: Draws) -> np.ndarray:
        """The share of its patches that each crop may hide, float [b * V]."""
        numbers_R2 = draws.on_host("shares", self.settings.global_crops, 2).flatten(0, 1).double().numpy()
        return masking.shares(numbers_R2, *self.settings.mask_ratio, self.settings.masked_crops)

    def represent(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        masked = self.masked(drawn, images[0].device)
        seen = self.see(images, masked, drawn)
        pooled = [self.encoder.pool(tokens_bLC) for tokens_bLC in seen]
        return {"pooled": pooled, "patches": masked.rows_of(seen[: self.settings.global_crops])}

    def represent_targets(self, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Rows:
        taught = self.teach([View(view) for view in images[: self.settings.global_crops]])
        masked = self.masked(drawn, images[0].device)
        return {"taught": self.pool_taught(taught), "taught_patches": self.taught_patches(taught, masked)}

    def masked(self, drawn: dict[str, Tensor], device: torch.device) -> Masked:
        share = self.settings.masked_crops * sum(self.settings.mask_ratio) / 2
        return Masked.of(drawn["masks"], self.encoder.num_prefix_tokens, device, share)

    def see(self, images: tuple[Tensor, ...], masked: Masked, drawn: dict[str, Tensor]) -> list[Tensor]:
        """The student's tokens [b, L, C] of each crop, the large ones with masked patches."""
        crops = self.settings.global_crops
        views = [View(view, hidden=h, blank=self.mask_token[0]) for view, h in zip(images[:crops], masked.hidden)]
        return self.encode([*views, *(View(view) for view in images[crops:])], drawn)

    def compare(self, rows: Rows, ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        s, masked = self.settings, self.masked(drawn, ids.device)
        student_RK, student_PK = self._scores(self, torch.cat(rows["pooled"]), masked.padded(rows["patches"]))
        with torch.no_grad():
            scores_GK = self.scores(torch.cat(rows["taught"]))
            scores_PK, followed = self.patch_scores(rows["taught_patches"], masked)
        views = (s.global_crops, len(rows["pooled"]))
        class_loss, spread, health = self.predict_views(scores_GK, student_RK, views)
        patch_loss, patch_spread, _ = self.predict(
            self.patch_collapse, scores_PK, student_PK, weights_R=masked.weights, followed=followed, count=masked.count
        )
        if self.moment.logged:
            used = class_loss.new_zeros(())  # where chance masked nothing
            if masked.count:
                used = usage(self.patch_collapse.choose(scores_PK)[: masked.count], self.patch_collapse.prototypes)
            health = {"patch_prototype_usage": used} | health
        return {
            "loss": s.class_weight * (class_loss + spread) + s.patch_weight * (patch_loss + patch_spread),
            "class_loss": class_loss.detach(),
            "patch_loss": patch_loss.detach(),
        } | health

    def ragged_regions(self) -> Iterator[tuple[object, str]]:
        yield from super().ragged_regions()
        yield from self.patch_collapse.regions()

    def _patch_head(self, owner: nn.Module) -> DinoHead:
        """What scores patches, of the student (self) or of the teacher."""
        return owner.patch_head if self.settings.patch_prototypes else owner.head

    def _scores(self, owner: nn.Module, pooled_RC: Tensor, patches_PC: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [R, K] and [P, K], in one pass where they share a head."""
        if self.settings.patch_prototypes:
            return owner.head(pooled_RC), owner.patch_head(patches_PC)
        scores = owner.head(torch.cat([pooled_RC, patches_PC]))
        # backward writes one gradient for both, where slices would write one each, padded with zeros, and add them
        return scores.split([len(pooled_RC), len(patches_PC)])

    def taught_patches(self, taught: list[Tensor], masked: Masked) -> list[Tensor]:
        """Of the teacher's tokens of each large crop [b, L, C] what `patch_scores` takes: masked patches [m, C], or all patches
        [b, N, C] where a centre follows them all."""
        if not self.patch_collapse.centres:
            return masked.rows_of(taught)
        return [tokens_bLC[:, self.encoder.num_prefix_tokens :] for tokens_bLC in taught]

    def patch_scores(self, patches: list[Tensor], masked: Masked) -> tuple[Tensor, Tensor]:
        """The teacher's scores [P, K] of the masked patches and of padding, and what the centre follows: the mean [1, K] of all
        patches'."""
        head = self._patch_head(self.teacher)
        if not self.patch_collapse.centres:
            scores_PK = head(masked.padded(patches))
            return scores_PK, scores_PK[: masked.count]
        embedded = head.embed(torch.cat([patches_bNC.flatten(0, 1) for patches_bNC in patches]))
        # The prototypes are linear: the mean of all patches' scores is the score of their mean.
        with torch.autocast(embedded.device.type, enabled=False):
            followed = head.last_layer(embedded.mean(0, keepdim=True))
        return head.last_layer(embedded.index_select(0, masked.patches)), followed

    def flops_per_image(self) -> float:
        s, head = self.settings, self._patch_head(self)
        masked = s.global_crops * self.patches_of_crop * s.masked_crops * sum(s.mask_ratio) / 2
        patches = 3 * masked * head_flops(head) + self.taught_patch_flops(masked)
        return self.student_flops(self.head) + self.teacher_flops(self.head) + patches

    def taught_patch_flops(self, masked: float) -> float:
        """Operations per image of the teacher's head for patches, of which `masked` are masked."""
        head = self._patch_head(self)
        if not self.patch_collapse.centres:
            return masked * head_flops(head)
        patches = self.settings.global_crops * self.patches_of_crop
        return patches * head_flops(head.mlp) + masked * head_flops(head.last_layer)
