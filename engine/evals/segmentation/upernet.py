"""UPerNet on a plain ViT: four of its blocks become the levels of a pyramid, which UPerNet's head reads.

Xiao et al., Unified Perceptual Parsing for Scene Understanding, ECCV 2018 (arXiv 1807.10221), whose pyramid pooling is that of
Zhao et al., CVPR 2017 (arXiv 1612.01105). The levels are made as in BEiT (Bao et al. 2022, released code), which MAE (He et al.
2022, appendix A.4) and iBOT follow. All upsampling is bilinear.

Shapes: B images, C channels of the ViT, D channels of the head, K classes, h x w patches, levels at their own sizes.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from engine.evals.segmentation.heads import DROPOUT, FcnHead, resize, scores, taps
from engine.model.tokens import View
from engine.model.vit import VisionTransformer

BINS = (1, 2, 3, 6)
SCALES = (4.0, 2.0, 1.0, 0.5)


def rescaled(channels: int, scale: float) -> nn.Module:
    """[B, C, h, w] to a level `scale` times as large: 4 by deconvolution, batch norm, GELU, deconvolution; 2 by deconvolution;
    1 unchanged; below by max pooling."""
    double = partial(nn.ConvTranspose2d, channels, channels, 2, 2)
    if scale == 4:
        return nn.Sequential(double(), nn.BatchNorm2d(channels), nn.GELU(), double())
    if scale == 2:
        return double()
    return nn.Identity() if scale == 1 else nn.MaxPool2d(round(1 / scale))


class PyramidPooling(nn.Module):
    """The map beside its means over 1, 2, 3 and 6 bins a side, each through a 1x1 convolution; a 3x3 one over all: [B, C, h, w]
    to [B, D, h, w]."""

    def __init__(self, channels: int, out: int, bins: Sequence[int] = BINS):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), Conv2dNormActivation(channels, out, 1)) for side in bins
        )
        self.fuse = Conv2dNormActivation(channels + len(bins) * out, out, 3)

    def forward(self, x_BChw: Tensor) -> Tensor:
        pooled = [resize(part(x_BChw), x_BChw.shape[2:]) for part in self.parts]
        return self.fuse(torch.cat([x_BChw, *pooled], 1))


class UPerHead(nn.Module):
    """Pyramid pooling on the smallest level, a feature pyramid down to the largest (Lin et al. 2017), all levels fused there.

    Args:
        channels: C of every level.
        width: D.
    """

    def __init__(self, channels: int, classes: int, width: int, levels: int = len(SCALES), dropout: float = DROPOUT):
        super().__init__()
        self.pool = PyramidPooling(channels, width)
        self.lateral = nn.ModuleList(Conv2dNormActivation(channels, width, 1) for _ in range(levels - 1))
        self.smooth = nn.ModuleList(Conv2dNormActivation(width, width, 3) for _ in range(levels - 1))
        self.fuse = Conv2dNormActivation(levels * width, width, 3)
        self.scores = nn.Sequential(nn.Dropout2d(dropout), scores(width, classes))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels [B, C, ., .], the largest first, to scores [B, K, ., .] of its size."""
        above, found = self.pool(levels[-1]), []
        found.append(above)
        for level, lateral, smooth in reversed(list(zip(levels[:-1], self.lateral, self.smooth, strict=True))):
            above = lateral(level) + resize(above, level.shape[2:])
            found.append(smooth(above))
        size = levels[0].shape[2:]
        return self.scores(self.fuse(torch.cat([resize(each, size) for each in reversed(found)], 1)))


class UPerNet(nn.Module):
    """A ViT, the pyramid of its blocks' outputs (without final norm), UPerNet's head, and the auxiliary one on the third level.

    Args:
        vit: trained with it, its final norm excepted, which is not used.
        width: D.
        auxiliary: channels of the auxiliary head.
        scales: sizes of the levels, relative to the grid of patches.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        classes: int,
        width: int = 768,
        auxiliary: int = 256,
        scales: Sequence[float] = SCALES,
    ):
        super().__init__()
        self.vit, self.taps = vit, taps(vit.depth)
        for unused in (vit.norm, vit.fc_norm):
            unused.requires_grad_(False)
        self.levels = nn.ModuleList(rescaled(vit.embed_dim, scale) for scale in scales)
        self.head = UPerHead(vit.embed_dim, classes, width, len(scales))
        self.auxiliary = FcnHead(vit.embed_dim, classes, auxiliary)

    def forward(self, images_B3HW: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Scores [B, K, ., .] of the head and, in training, of the auxiliary one; `generator` draws stochastic depth.

        Raises BadInput for images that are no multiples of the patch size, or with relative positions not of the model's size.
        """
        grid = tuple(side // self.vit.patch_size for side in images_B3HW.shape[2:])
        packed, levels, start = self.vit.embed([View(images_B3HW)]), [], 0
        for block, level in zip(self.taps, self.levels, strict=True):
            packed, start = self.vit.run_blocks(packed, start, block + 1, generator), block + 1
            patches_BNC = packed.unpack()[0][:, self.vit.num_prefix_tokens :]
            levels.append(level(patches_BNC.mT.unflatten(2, grid)))
        found = (self.head(levels),)
        return (*found, self.auxiliary(levels[2])) if self.training else found

    def height(self, name: str) -> int:
        """How far up the parameter of this name lies: 0 for patches, prefix tokens and positions, i + 1 for block i, depth + 1
        for the heads and relative positions."""
        if not name.startswith("vit.") or name.startswith("vit.rel_pos_bias."):
            return self.vit.depth + 1
        return self.vit.layer_of(name.removeprefix("vit.")) + 1
