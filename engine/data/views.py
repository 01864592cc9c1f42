"""What a view of an image is, and the sets of views that methods use. Its pixels are normalised by ImageNet's statistics."""

from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Augmentation:
    """One view of an image: crop, RandAugment, colours, blur, solarisation, flip; in this order.

    Attributes:
        size: (height, width) of the view in pixels.
        scale: range of the crop's share of the image area.
        ratio: range of the crop's width / height, drawn log-uniformly.
        pad: above 0, instead of a random resized crop: the whole image is brought to `size`, surrounded by so many black pixels,
            and a window of `size` is cut out (the usual crop for images of 32 pixels).
        flip: probability of a horizontal flip.
        jitter: probability of the colour jitter, which applies contrast, brightness, saturation, hue; in this order, in
            one linear map without clipping between. Each factor is uniform in 1 -+ its strength, floored at 0. Contrast
            turns about mid-grey (not the image's mean) and hue rotates the YIQ plane (not HSV).
        brightness, contrast, saturation: strengths of the jitter.
        hue: largest rotation, as a share of the full circle.
        grayscale: probability of dropping all colour.
        blur: probability of a Gaussian blur.
        blur_sigma: range of its standard deviation in pixels; the kernel reaches ceil(3 sigma).
        solarize: probability of inverting the values from 128 up.
        operations: how many of `engine.data.augment.OPERATIONS` are drawn, with repetition, up to 3 (RandAugment, arXiv
            1909.13719).
        operation: probability of carrying out each.
        magnitude: their strength, 0 to 10; greater is stronger for all of them (timm's "inc1").
        magnitude_std: standard deviation of the normal noise on it, drawn anew for each operation.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    pad: int = 0
    flip: float = 0.5
    jitter: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    operations: int = 0
    operation: float = 0.5
    magnitude: float = 9.0
    magnitude_std: float = 0.5


def minimal(size: tuple[int, int], scale: tuple[float, float] = (0.2, 1.0)) -> Augmentation:
    """Crop and flip only: MAE's set with scale (0.2, 1) (arXiv 2111.06377, A.1), MAE-CT's with (0.08, 1)."""
    return Augmentation(size, scale)


def byol_views(size: tuple[int, int], scale: tuple[float, float] = (0.08, 1.0)) -> tuple[Augmentation, Augmentation]:
    """The two views of BYOL (arXiv 2006.07733, appendix B), as MAE-CT's augmented variant uses them."""
    colours = {"jitter": 0.8, "grayscale": 0.2}
    return (
        Augmentation(size, scale, blur=1.0, **colours),
        Augmentation(size, scale, blur=0.1, solarize=0.2, **colours),
    )


def two_views(
    size: tuple[int, int], scale: tuple[float, float], augmentation: str
) -> tuple[Augmentation, Augmentation]:
    """BYOL's two views ("byol"), or twice crop and flip only ("minimal")."""
    return byol_views(size, scale) if augmentation == "byol" else (minimal(size, scale),) * 2


def multi_crop(
    size: tuple[int, int],
    local_size: tuple[int, int],
    globals_: int,
    locals_: int,
    scale: tuple[float, float],
    local_scale: tuple[float, float],
    colours: bool = True,
) -> tuple[Augmentation, ...]:
    """Large crops, then small ones (SwAV, DINO). With colours the large ones are BYOL's two views in turn, and the small ones
    are blurred half of the time, as in DINO (arXiv 2104.14294); without, all are cropped and flipped only.
    """
    if not colours:
        return (minimal(size, scale),) * globals_ + (minimal(local_size, local_scale),) * locals_
    pair = byol_views(size, scale)
    local = Augmentation(local_size, local_scale, jitter=0.8, grayscale=0.2, blur=0.5)
    return tuple(pair[view % 2] for view in range(globals_)) + (local,) * locals_
