"""The small data sets, and what RelViT (Camporese, Izzo and Ballan, BMVC 2022, arXiv 2206.00481) trains on each.

C = guglielmocamporese/relvit ee7a795 (utils.py, scripts, README). C's keys for SVHN and Flowers-102 are missing where it looks up
image sizes, so those two rows were not run as C stands. On which of Flowers-102's published splits they train was not found.
"""

from typing import Any, NamedTuple

from engine.data.sets import archives


class SmallSet(NamedTuple):
    """What a set is trained with.

    Attributes:
        model: a timm name that gives width, depth and heads; the sizes below take the place of its own.
        image_size, patch_size: in pixels.
        crop: "pad" for a random crop of the image with 4 pixels of padding around it, "resized" for a random resized crop.
        batch_size: images of a step.
    """

    model: str
    image_size: int
    patch_size: int
    crop: str
    batch_size: int

    @property
    def encoder(self) -> dict[str, Any]:
        """Overrides for `engine.model.vit.create`."""
        return {"img_size": [self.image_size, self.image_size], "patch_size": self.patch_size}


SETS = {
    "cifar10": SmallSet("vit_small_patch16_224", 32, 4, "pad", 256),
    "cifar100": SmallSet("vit_small_patch16_224", 32, 4, "pad", 256),
    "svhn": SmallSet("vit_small_patch16_224", 32, 4, "pad", 256),
    "tiny-imagenet": SmallSet("vit_small_patch16_224", 64, 8, "pad", 256),
    "flowers102": SmallSet("vit_small_patch32_224", 224, 32, "resized", 256),
    "imagenet100": SmallSet("vit_small_patch32_224", 224, 32, "resized", 256),
}
"""All from C: ViT-S (384 channels, 6 heads, 12 blocks), patches, crops, and batches of 256 on every set."""


def of(data: str) -> str:
    """The small set that `--data` names as NAME:DIR, or "".

    Raises:
        BadInput: DIR is missing.
    """
    named = archives.named(data)
    return named[0] if named and named[0] in SETS else ""
