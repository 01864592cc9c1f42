"""What a view of an image is, and the sets of views that methods use. Its pixels are normalised by ImageNet's statistics, but for
SwAV's."""

from dataclasses import dataclass, replace

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZES = ("bicubic", "bilinear")
ASPECTS = ("crop", "keep")
COLOURS = ("torchvision", "linear")
SWAV_STD = (0.228, 0.224, 0.225)


@dataclass(frozen=True)
class Augmentation:
    """One view of an image: crop, RandAugment, colours, blur, solarisation, flip; in this order.

    Attributes:
        size: (height, width) of the view in pixels.
        scale: range of the crop's share of the image area.
        ratio: range of the crop's width / height, drawn log-uniformly.
        clip: a crop that is larger than the image is cut to it (BYOL's sampler, which MAE's linear probe has); otherwise another
            one is drawn, up to ten times (torchvision's).
        pad: above 0, instead of a random resized crop: the whole image is brought to `size`, surrounded by so many black pixels,
            and a window of `size` is cut out (the usual crop for images of 32 pixels).
        patch: above 0, the view has the image's own aspect, and `size` is its room: the crop, of the image's shape, is brought to
            the grid of whole patches of this side that comes nearest to that shape, of at most as many as `size` holds
            (`engine.data.shapes`). Without `pad` and `operations`; `ratio` and `clip` are for nothing then.
        sides: with a `patch`: each image's grid has room for the patches of one of these shares of `size`'s sides, in turn.
        resize: how the crop is brought to `size`, bicubic or bilinear, antialiased as Pillow does it.
        std: what the pixels are divided by, per channel.
        flip: probability of a horizontal flip.
        colours: how the jitter and the loss of colour are computed. torchvision: as its ColorJitter changes Pillow's images, in
            an order drawn for each image, in bytes from step to step, contrast about the image's mean grey, hue in HSV; equal
            to a fraction of a level of 256 on average. linear: contrast, brightness, saturation, hue, in this order, in one
            linear map without cutting off between; contrast turns about mid-grey and hue in the YIQ plane. Cheaper, and no
            author's.
        jitter: probability of the colour jitter. Each factor is uniform in 1 -+ its strength, floored at 0.
        brightness, contrast, saturation: strengths of the jitter.
        hue: largest rotation, as a share of the full circle, at most a half.
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
    clip: bool = False
    pad: int = 0
    patch: int = 0
    sides: tuple[float, ...] = (1.0,)
    resize: str = "bicubic"
    std: tuple[float, float, float] = IMAGENET_STD
    flip: float = 0.5
    colours: str = "torchvision"
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

    def __post_init__(self) -> None:
        if self.patch and (self.pad or self.operations):
            raise ValueError(f"a view of the image's own aspect takes neither pad nor operations, got {self}")


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
    augmentation: str = "byol",
) -> tuple[Augmentation, ...]:
    """Large crops, then small ones (SwAV, DINO).

    Args:
        augmentation: "minimal", crop and flip only; "byol", BYOL's two views in turn for the large crops, the small ones blurred
            half of the time, as in DINO (arXiv 2104.14294); "dinov2", the same but that its released code blurs by the
            complements of these probabilities; "swav", colours of twice the strength and blur half of the time for all.
    """
    local = Augmentation(local_size, local_scale, jitter=0.8, grayscale=0.2, blur=0.5)
    pair = byol_views(size, scale)
    if augmentation == "minimal":
        pair, local = (minimal(size, scale),), minimal(local_size, local_scale)
    elif augmentation == "dinov2":
        pair = tuple(replace(view, blur=1 - view.blur) for view in pair)
    elif augmentation == "swav":
        local = replace(local, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, std=SWAV_STD)
        pair = (replace(local, size=size, scale=scale),)
    return tuple(pair[view % len(pair)] for view in range(globals_)) + (local,) * locals_
