"""The public ops. Each runs one of its implementations (`kernels.choice.IMPLEMENTATIONS`); `use` chooses, `describe` tells."""

import os

from kernels.adamw import adamw
from kernels.choice import check, describe, freeze, frozen, request, understood, use
from kernels.info_nce import info_nce
from kernels.nearest_neighbours import nearest_neighbours
from kernels.packed_attention import packed_attention
from kernels.patches import gather_patches, masked_pixel_loss
from kernels.relation import relation_loss
from kernels.sinkhorn import sinkhorn, sinkhorn_centre, sinkhorn_cross_entropy
from kernels.soft_cross_entropy import soft_cross_entropy

__all__ = [
    "adamw",
    "check",
    "describe",
    "freeze",
    "frozen",
    "gather_patches",
    "info_nce",
    "masked_pixel_loss",
    "nearest_neighbours",
    "packed_attention",
    "relation_loss",
    "sinkhorn",
    "sinkhorn_centre",
    "sinkhorn_cross_entropy",
    "soft_cross_entropy",
    "understood",
    "use",
]

request(os.environ.get("TESSERA_KERNELS", "auto"))
