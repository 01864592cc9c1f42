"""Heads on the patches of a plain ViT that give a score per class: linear ones and a small convolutional one.

Shapes: B images, C channels, K classes, h x w places of a map, H x W pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from engine.data.annotated.objects import VOID

DROPOUT = 0.1


def taps(depth: int) -> tuple[int, int, int, int]:
    """The blocks, from 0, whose outputs are looked at: at 1/3, 1/2, 2/3 and the whole of the depth. That is 3, 5, 7, 11 of 12, as
    in BEiT, MAE and iBOT, and 7, 11, 15, 23 of 24; for other depths the rule is ours."""
    return tuple(max(0, part - 1) for part in (depth // 3, depth // 2, 2 * depth // 3, depth))


def scores(channels: int, classes: int) -> nn.Conv2d:
    """A 1x1 convolution to scores, its weight from N(0, .01), its bias 0: mmseg's and DINOv3's last layer."""
    layer = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class LinearHead(nn.Sequential):
    """Dropout of whole channels, batch norm, 1x1 convolution: [B, C, h, w] to [B, K, h, w].

    DINOv3's linear head (Simeoni et al. 2025; released evaluation code) with dropout .1 on the last layer's normed map. Without
    dropout, on the maps of several blocks side by side, after iBOT's (Zhou et al. 2021; released configuration), which puts its
    1x1 convolution on the maps as they are.
    """

    def __init__(self, channels: int, classes: int, dropout: float = DROPOUT):
        super().__init__(nn.Dropout2d(dropout), nn.BatchNorm2d(channels), scores(channels, classes))


class FcnHead(nn.Sequential):
    """Convolution, batch norm, ReLU, dropout of channels, 1x1 convolution: [B, C, h, w] to [B, K, h, w].

    The auxiliary head beside UPerNet in mmseg's and BEiT's configurations, after Long et al. 2015 (arXiv 1411.4038).
    """

    def __init__(self, channels: int, classes: int, hidden: int = 256, dropout: float = DROPOUT):
        super().__init__(Conv2dNormActivation(channels, hidden, 3), nn.Dropout2d(dropout), scores(hidden, classes))


class OnFrozen(nn.Module):
    """A head on the maps of a frozen encoder.

    Args:
        maps: of images [B, 3, H, W], as [B, h, w, C] without gradients.
    """

    def __init__(self, maps: Callable[[Tensor], Tensor], head: nn.Module):
        super().__init__()
        self.maps, self.head = maps, head

    def forward(self, images_B3HW: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor]:
        """Scores [B, K, h, w]; nothing is drawn from `generator`."""
        return (self.head(self.maps(images_B3HW).permute(0, 3, 1, 2)),)


def resize(maps_BChw: Tensor, size: tuple[int, int]) -> Tensor:
    """fp32 [B, C, H, W], bilinear between the centres of places."""
    return F.interpolate(maps_BChw.float(), size, mode="bilinear", align_corners=False)


def pixel_loss(logits_BKhw: Tensor, labels_BHW: Tensor) -> Tensor:
    """Cross-entropy of the logits, resized to the labels, over the pixels that are not 255; 0 where all are."""
    logits_BKHW = resize(logits_BKhw, labels_BHW.shape[1:])
    total = F.cross_entropy(logits_BKHW, labels_BHW, ignore_index=VOID, reduction="sum")
    return total / (labels_BHW != VOID).sum().clamp_min(1)
