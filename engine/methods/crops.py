"""What methods share that see large and small crops of an image (multi-crop, after SwAV: Caron et al. 2020). No method itself;
`engine.methods.names` leaves it out.
"""

from dataclasses import dataclass, replace

from engine.core.errors import BadInput
from engine.data.views import Augmentation, multi_crop
from engine.methods.comparing import Comparing
from engine.methods.settings import ColourSettings
from engine.model.vit import VisionTransformer

AUGMENTATIONS = ("minimal", "byol", "dinov2", "swav")


@dataclass(frozen=True)
class CropSettings(ColourSettings):
    """What a method's settings take over to see small crops beside large ones; they say besides, in a field or for all runs,
    how many `global_crops` there are."""

    local_crops: int = 8
    """Small crops of an image."""
    local_size: int = 96
    """Side of a small crop in pixels."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Share of the image's area that a small crop covers."""
    augmentation: str = "byol"
    """minimal (crop and flip), byol (with colour, grayscale, blur, and solarisation of every second large crop), dinov2 (blurred
    by the complements of byol's probabilities, as its code was released) or swav (twice the colour, blur half of the time)."""

    def crop_rules(self) -> dict[str, tuple[bool, str]]:
        """What `rules` of the method's settings adds: flag -> (whether it holds, what is valid)."""
        low, high = self.local_scale
        return self.colour_rules() | {
            "local-crops": (self.local_crops >= 0, "a whole number from 0"),
            "local-size": (self.local_size >= 1, "a whole number from 1"),
            "local-scale": (0 < low <= high <= 1, "two shares with 0 < low <= high <= 1"),
            "augmentation": (self.augmentation in AUGMENTATIONS, f"one of {', '.join(AUGMENTATIONS)}"),
        }

    def check_crops(self, stage: str, encoder: VisionTransformer) -> None:
        """Raise BadInput where small crops do not consist of whole patches."""
        if self.local_crops and self.local_size % encoder.patch_size:
            raise BadInput(
                f"--{stage}.local-size is {self.local_size}; it must be a multiple of the patch size {encoder.patch_size}."
            )


class MultiCrop(Comparing):
    """A method that sees the large crops of an image, then the small ones."""

    def views(self) -> tuple[Augmentation, ...]:
        settings = self.settings
        views = multi_crop(
            self.size,
            self.local_size,
            settings.global_crops,
            self.local_crops,
            settings.crop_scale,
            settings.local_scale,
            settings.augmentation,
        )
        shared = {
            "flip": settings.flip,
            "resize": settings.resize,
            "colours": settings.colours,
            "patch": self.own_aspect,
            "sides": self.phase.sides,
        }
        return tuple(replace(view, **shared) for view in views)

    @property
    def local_crops(self) -> int:
        """Small crops of an image, in this phase."""
        return self.phase.small_crops(self.settings.local_crops)

    @property
    def local_size(self) -> tuple[int, int]:
        """Height and width of a small crop in pixels, in this phase."""
        return self.phase.size((self.settings.local_size,) * 2, self.encoder.patch_size)

    def patches(self, view: Augmentation) -> int:
        """How many patches a crop has."""
        return (view.size[0] // self.patch_size) * (view.size[1] // self.patch_size)

    def shown(self, view: Augmentation) -> int:
        """How many of them the trained encoder is shown, in this phase."""
        patches = self.patches(view)
        return self.kept(patches) if self.drops_patches and view.size == self.size else patches
