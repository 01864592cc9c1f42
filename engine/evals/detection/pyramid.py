"""Maps of five strides from a plain ViT's maps of one: what a Mask R-CNN looks for small and large objects in.

Shapes: B images, C channels, h x w patches. Level 0 to 3 have 4h x 4w, 2h x 2w, h x w and h/2 x w/2 places, "pool" h/4 x w/4:
strides 4, 8, 16, 32, 64 for patches of 16 pixels.
"""

from collections import OrderedDict
from collections.abc import Callable

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

LEVELS = ("0", "1", "2", "3")
NORMS: dict[str, Callable[[int], nn.Module]] = {"bn": nn.BatchNorm2d, "ln": LayerNorm2d}


class FourBlocks(nn.Module):
    """Each level from the output of a block of its own, at equal width, then an FPN (Li et al. 2021, "Benchmarking").

    Level 0: transposed convolution, GroupNorm of 32, GELU, transposed convolution; level 1: one; level 2: the map; level 3: the
    maximum over 2 x 2.
    """

    def __init__(self, width: int, channels: int, norm: str) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            [
                nn.Sequential(_doubled(width, width), nn.GroupNorm(32, width), nn.GELU(), _doubled(width, width)),
                _doubled(width, width),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )
        self.fpn = FeaturePyramidNetwork([width] * 4, channels, LastLevelMaxPool(), NORMS[norm])

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        """Four maps [B, C, h, w], of the first to the last block, to five of `channels`."""
        scaled = (scale(found) for scale, found in zip(self.scales, maps, strict=True))
        return self.fpn(OrderedDict(zip(LEVELS, scaled, strict=True)))


class Simple(nn.Module):
    """All levels from the last map, each by itself, with a LayerNorm over channels (Li et al. 2022, ViTDet)."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        scales = [
            (nn.Sequential(_doubled(width, half), LayerNorm2d(half), nn.GELU(), _doubled(half, quarter)), quarter),
            (_doubled(width, half), half),
            (nn.Identity(), width),
            (nn.MaxPool2d(2, ceil_mode=True), width),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(scale, _conv(found, channels, 1), _conv(channels, channels, 3)) for scale, found in scales
        )

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        """One map [B, C, h, w] to five of `channels`."""
        (last,) = maps
        found = OrderedDict((name, level(last)) for name, level in zip(LEVELS, self.levels, strict=True))
        found["pool"] = F.max_pool2d(found[LEVELS[-1]], 1, 2)
        return found


def _doubled(width: int, channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, channels, 2, 2)


def _conv(width: int, channels: int, side: int) -> nn.Module:
    return Conv2dNormActivation(width, channels, side, norm_layer=LayerNorm2d, activation_layer=None)


def strides(patch_size: int) -> tuple[float, ...]:
    """Pixels between neighbours on each of the five levels."""
    return tuple(patch_size * share for share in (0.25, 0.5, 1.0, 2.0, 4.0))


def create(width: int, channels: int, pyramid: str, norm: str) -> nn.Module:
    """The pyramid of this name, "four-blocks" or "simple", on maps of `width`; `norm` "bn" or "ln", of the first alone."""
    return FourBlocks(width, channels, norm) if pyramid == "four-blocks" else Simple(width, channels)
