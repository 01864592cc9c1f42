"""DINOv2 (Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024).

Shapes: b images of this rank, V large crops, L tokens of a view, C encoder width, P rows of the masked patches of all large crops
and of padding, R masks, K prototypes.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from engine.core import masking
from engine.core.draws import Draws
from engine.core.optim import Group, ramp, root_scaled_lr, with_decay
from engine.methods.base import Rows
from engine.methods.ibot import Ibot, Masked
from engine.methods.ibot import Settings as IbotSettings
from engine.model.heads import head_flops


@dataclass(frozen=True)
class Settings(IbotSettings):
    """DINOv2; the defaults are the released ones (see engine/recipes for sources). `base_lr` is for 1024 images and scales with
    the square root of the batch. Exactly the share `masked_crops` of a batch's large crops is masked, with ratios that share
    `mask_ratio` out evenly. The target's temperature rises step by step.
    """

    base_lr: float = 4e-3
    clip_over: str = "part"
    prototypes: int = 65536
    free_norm: bool = True
    crop_scale: tuple[float, float] = (0.32, 1.0)
    local_crops: int = 8
    local_scale: tuple[float, float] = (0.05, 0.32)
    teacher_momentum: float = 0.992
    smallest_block: int = 4
    frozen_moments: bool = False
    """While prototypes are frozen, let the optimiser's moments know of their gradients, as the released code does."""
    koleo_weight: float = 0.1
    """Of the term that drives the nearest images of a batch apart."""
    layer_decay: float = 0.9
    """Block k of L trains at layer_decay ** (L - k) of the learning rate, the final norm and the heads at all of it."""
    patch_embed_lr: float = 0.2
    """What the patch projection's learning rate is multiplied with besides."""

    def rules(self) -> dict[str, tuple[bool, str]]:
        return super().rules() | {
            "koleo-weight": (self.koleo_weight >= 0, "a number from 0"),
            "layer-decay": (0 < self.layer_decay <= 1, "a number above 0, at most 1"),
            "patch-embed-lr": (self.patch_embed_lr > 0, "a number above 0"),
        }

    @property
    def splits(self) -> bool:
        return super().splits and not self.koleo_weight


def koleo(features_bC: Tensor) -> Tensor:
    """The Kozachenko-Leonenko term that spreads features evenly (Sablayrolles et al., "Spreading vectors for similarity search",
    ICLR 2019): -mean log(distance to the nearest other + 1e-8) of the unit vectors [b, C], in fp32, among this rank's rows.

    Equal rows have no direction to part in and get no gradient; a single row has no other, and its term is 0.
    """
    with torch.autocast(features_bC.device.type, enabled=False):
        unit_bC = F.normalize(features_bC.to(torch.promote_types(features_bC.dtype, torch.float32)), dim=1)
        if len(unit_bC) < 2:
            return unit_bC.sum() * 0
        own = torch.arange(len(unit_bC), device=unit_bC.device)
        _, nearest_b1 = kernels.nearest_neighbours(unit_bC, unit_bC, 1, own, own)
        distance_b = (unit_bC - unit_bC[nearest_b1[:, 0]]).norm(dim=1)
        return -(distance_b + 1e-8).log().mean()


class Dinov2(Ibot):
    """iBOT's two losses with masks that share out their ratios, and a term that spreads the images' features."""

    name = "dinov2"
    Settings = Settings

    def mask_shares(self, draws: Draws) -> np.ndarray:
        crops = self.settings.global_crops
        count = int(draws.batch * crops * self.settings.masked_crops)
        places_R, numbers_R = draws.places("strata", crops).flatten(), draws.on_host("shares", crops).flatten().double()
        return masking.stratified_shares(places_R.numpy(), numbers_R.numpy(), count, *self.settings.mask_ratio)

    @property
    def target_temperature(self) -> float:
        """Of this step."""
        s, moment = self.settings, self.moment
        steps = s.target_temperature_epochs * moment.steps_per_epoch
        return ramp(moment.step, steps, s.target_temperature_start, s.target_temperature)

    def compare(self, rows: Rows, ids: Tensor, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        report = super().compare(rows, ids, drawn)
        spread = torch.stack([koleo(pooled_bC) for pooled_bC in rows["pooled"][: self.settings.global_crops]])
        loss = report["loss"] + self.settings.koleo_weight * spread.sum()
        return report | {"loss": loss, "koleo": spread.detach().mean()}

    def taught_patches(self, taught: list[Tensor], masked: Masked) -> list[Tensor]:
        return masked.rows_of(taught)

    def patch_scores(self, patches: list[Tensor], masked: Masked) -> tuple[Tensor, Tensor]:
        """The teacher's scores [P, K] of the masked patches and of padding; the centre follows the former."""
        scores_PK = self._patch_head(self.teacher)(masked.padded(patches))
        return scores_PK, scores_PK[: masked.count]

    def taught_patch_flops(self, masked: float) -> float:
        return masked * head_flops(self._patch_head(self))

    def peak_lr(self, images_per_step: int) -> float:
        return root_scaled_lr(self.settings.base_lr, images_per_step)

    def groups(self, images_per_step: int) -> Iterator[Group]:
        s, depth, peak_lr = self.settings, self.encoder.depth, self.peak_lr(images_per_step)
        alike: dict[tuple[float, int], list[tuple[str, nn.Parameter]]] = defaultdict(list)
        for name, parameter in self.named_parameters():
            # counted, and clipped, as a part of the encoder
            name = "encoder.mask_token" if name == "mask_token" else name
            rate = s.layer_decay ** (depth - self._layer(name))
            rate *= s.patch_embed_lr if name.startswith("encoder.patch_embed.") else 1.0
            alike[rate, s.freeze_last_layer if name.startswith(self.last_layers) else 0].append((name, parameter))
        for (rate, frozen), named in alike.items():
            yield from with_decay(named, rate * peak_lr, s.weight_decay, frozen_epochs=frozen, watches=s.frozen_moments)

    def _layer(self, name: str) -> int:
        """The depth a parameter counts as: the heads lie where the encoder ends."""
        own = name.startswith("encoder.")
        return self.encoder.layer_of(name.removeprefix("encoder.")) if own else self.encoder.depth
