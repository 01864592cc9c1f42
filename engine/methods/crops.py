"""What methods share that see large and small crops of an image (multi-crop, after SwAV: Caron et al. 2020). No method itself;
`engine.methods.names` leaves it out.
"""

from dataclasses import dataclass, replace

from engine.core.errors import BadInput
from engine.data.views import Augmentation, multi_crop
from engine.methods.base import Comparing
from engine.model.vit import VisionTransformer


@dataclass(frozen=True)
class CropSettings:
    """What a method's settings take over to see small crops beside large ones; they say besides, in a field or for all runs,
    how many `global_crops` there are."""

    local_crops: int = 8
    """Small crops of an image."""
    local_size: int = 96
    """Side of a small crop in pixels."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Share of the image's area that a small crop covers."""
    augmentation: str = "byol"
    """minimal (crop and flip) or byol (with colour, grayscale, blur, and solarisation of every second large crop)."""

    def crop_rules(self) -> dict[str, tuple[bool, str]]:
        """What `rules` of the method's settings adds: flag -> (whether it holds, what is valid)."""
        low, high = self.local_scale
        return {
            "local-crops": (self.local_crops >= 0, "a whole number from 0"),
            "local-size": (self.local_size >= 1, "a whole number from 1"),
            "local-scale": (0 < low <= high <= 1, "two shares with 0 < low <= high <= 1"),
            "augmentation": (self.augmentation in ("minimal", "byol"), "minimal or byol"),
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
            self.encoder.img_size,
            (settings.local_size,) * 2,
            settings.global_crops,
            settings.local_crops,
            settings.crop_scale,
            settings.local_scale,
            settings.augmentation == "byol",
        )
        return tuple(replace(view, flip=settings.flip) for view in views)

    def patches(self, view: Augmentation) -> int:
        """How many patches a crop has."""
        return (view.size[0] // self.encoder.patch_size) * (view.size[1] // self.encoder.patch_size)
