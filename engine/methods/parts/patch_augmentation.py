"""What is done to an image patch by patch before an encoder sees it: patches of uneven size, crops and colours of each patch on
its own, another order (RelViT; Camporese, Izzo & Ballan, BMVC 2022).

Shapes: B images of H x W pixels, P patch size, M patches of an axis after cutting, N patches of an image, K widths of a cell,
U uniform numbers of a patch.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.lasting import lasting
from engine.data.views import IMAGENET_MEAN, IMAGENET_STD
from engine.methods.parts.colour_jitter import grey, jitter

STRENGTH, HUE = 0.4, 0.1
LUMA = (0.299, 0.587, 0.114)
CHROMA = ((0.596, -0.274, -0.322), (0.211, -0.523, 0.312))  # I and Q of YIQ
# columns of a patch's uniform numbers
_TOP, _LEFT, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAY = range(8)
_COLUMNS = 8
_ORDER = 4  # further columns, where the order of colours is drawn
COLOURS = ("pixels", "normalised")

Grid = tuple[int, int]


@dataclass(frozen=True)
class PatchSettings:
    """What a method's settings take over to have patches augmented; the defaults are RelViT's for pre-training."""

    mega_patches: int = 0
    """Cut each axis at random lines of the patch grid into so many parts, and bring every cell to the size of a patch; 0 leaves
    the grid as it is."""
    mega_shared: bool = True
    """Cut both axes at the same lines, as RelViT's code does, which draws others for columns and leaves them unused."""
    patch_zoom: float = 1.15
    """Cut a square of its side divided by this from a random place of each patch, and enlarge it; 1 leaves patches whole."""
    patch_jitter: float = 0.8
    """Probability that a patch's brightness, contrast, saturation (0.4 each) and hue (0.1) change."""
    patch_grayscale: float = 0.2
    """Probability that a patch loses all colour."""
    patch_colours: str = "pixels"
    """What of a patch is coloured: pixels (as the loader's linear colours, cut off at an image's values) or normalised
    (torchvision's jitter of values that are normalised already, cut off at 0 and 1, as in RelViT's code)."""
    permute: bool = False
    """Put patches in random order; labels go along. Changes nothing for an encoder without positions."""

    def patch_rules(self) -> dict[str, tuple[bool, str]]:
        """What `rules` of the method's settings adds: flag -> (whether it holds, what is valid)."""
        return {
            "mega-patches": (self.mega_patches == 0 or self.mega_patches >= 2, "0, or a whole number from 2"),
            "patch-zoom": (self.patch_zoom >= 1, "a number from 1"),
            "patch-jitter": (0 <= self.patch_jitter <= 1, "a probability from 0 to 1"),
            "patch-grayscale": (0 <= self.patch_grayscale <= 1, "a probability from 0 to 1"),
            "patch-colours": (self.patch_colours in COLOURS, f"one of {', '.join(COLOURS)}"),
        }

    def check_patches(self, stage: str, grid: Grid) -> None:
        """Raise BadInput where this grid (rows, columns) cannot be cut into so many parts."""
        if self.mega_patches > min(grid):
            raise BadInput(
                f"--{stage}.mega-patches is {self.mega_patches}; it must be at most {min(grid)} for the model's {grid[0]} x "
                f"{grid[1]} patches."
            )

        if self.mega_patches and self.mega_shared and grid[0] != grid[1]:
            raise BadInput(
                f"--{stage}.mega-shared cuts both axes at the same lines, but the model has {grid[0]} x {grid[1]} patches: add "
                f"--{stage}.no-mega-shared."
            )

    def arranged_grid(self, grid: Grid) -> Grid:
        """The grid (rows, columns) that the encoder sees."""
        return (self.mega_patches,) * 2 if self.mega_patches else grid


def draw_patches(settings: PatchSettings, draws: Draws, grid: Grid) -> dict[str, Tensor]:
    """What is changed in a step; nothing is drawn for what is off.

    Returns:
        "rows", "columns": int64 [b, M + 1], the lines of the grid that bound the cells, from 0 to its end.
        "patches": fp32 [b, N, U] in [0, 1).
        "order": int64 [b, N], the patch that stands at each place.
    """
    drawn, parts = {}, settings.mega_patches
    if parts:
        for name, size in zip(("rows", "columns"), grid, strict=True):
            drawn[name] = _edges(draws.uniform(size - 1), parts, size)
        if settings.mega_shared:
            drawn["columns"] = drawn["rows"]
    arranged = settings.arranged_grid(grid)
    count = arranged[0] * arranged[1]
    if settings.patch_zoom > 1 or settings.patch_jitter or settings.patch_grayscale:
        drawn["patches"] = draws.uniform(count, _COLUMNS + _ORDER * (settings.patch_colours == "normalised"))
    if settings.permute:
        drawn["order"] = draws.uniform(count).argsort(dim=1, stable=True)
    return drawn


def _edges(noise_BL: Tensor, parts: int, size: int) -> Tensor:
    """int64 [B, parts + 1]: the `parts` - 1 inner lines of lowest noise, in order, between 0 and `size`."""
    inner = noise_BL.argsort(dim=1, stable=True)[:, : parts - 1].sort(1).values + 1
    return F.pad(F.pad(inner, (1, 0)), (0, 1), value=size)


def arrange(
    settings: PatchSettings, images: Tensor, drawn: dict[str, Tensor], patch_size: int
) -> tuple[Tensor, Tensor]:
    """The images as the encoder sees them, and where each of their patches comes from.

    In this order: mega-patches, crops and colours of each patch, permutation. With all of them off, the images are given back.

    Args:
        images: fp32 [B, 3, H, W], normalised by ImageNet's mean and standard deviation.
        drawn: rows of what `draw_patches` returned, on the images' device.

    Returns:
        Images fp32 [B, 3, H', W'], and int64 [B, N], the row-major place in the unpermuted grid of the patch that stands at each
        place.
    """
    with torch.autocast(images.device.type, enabled=False):
        if settings.mega_patches:
            images = cut_unevenly(images, drawn["rows"], drawn["columns"], patch_size)
        grid = images.shape[2] // patch_size, images.shape[3] // patch_size
        places_BN = torch.arange(grid[0] * grid[1], device=images.device).expand(len(images), -1)
        if "patches" in drawn or "order" in drawn:
            patches = split(images, patch_size)
            if "patches" in drawn:
                patches = recolour(settings, zoom(settings, patches, drawn["patches"]), drawn["patches"])
            if "order" in drawn:
                places_BN = drawn["order"]
                patches = patches[torch.arange(len(images), device=images.device)[:, None], places_BN]
            images = join(patches, grid)
    return images, places_BN


def split(images: Tensor, patch_size: int) -> Tensor:
    """[B, 3, H, W] -> patches [B, N, 3, P, P], row by row."""
    cells = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def join(patches: Tensor, grid: Grid) -> Tensor:
    """The inverse of `split` for a grid (rows, columns)."""
    return patches.unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def cut_unevenly(images: Tensor, rows: Tensor, columns: Tensor, patch_size: int) -> Tensor:
    """Mega-patches: every cell between neighbouring lines is resized (linear, antialiased) to P x P.

    Cells share their lines, so the whole is one matrix product for each axis.

    Args:
        rows, columns: int64 [B, M + 1], the lines in patches, ascending from 0 to the image's end.

    Returns:
        [B, 3, M * P, M * P].
    """
    height = _resizing(rows, patch_size, images.shape[2])
    width = _resizing(columns, patch_size, images.shape[3])
    return height[:, None] @ images @ width[:, None].mT


def _resizing(lines: Tensor, patch_size: int, pixels: int) -> Tensor:
    """fp32 [B, M * P, pixels]: from an axis to M parts of P pixels, one for each stretch between two lines."""
    within = torch.arange(pixels, device=lines.device) - lines[:, :-1, None] * patch_size
    weights = _weights_of_widths(patch_size, pixels // patch_size, lines.device)[lines.diff() - 1]
    weights = weights.gather(3, within.clamp_min(0)[:, :, None].expand(-1, -1, patch_size, -1))
    return (weights * (within >= 0)[:, :, None]).flatten(1, 2)


@cache  # a captured step reads them where they lie
def _weights_of_widths(patch_size: int, most: int, device: torch.device) -> Tensor:
    """fp32 [K, P, K * P]: what each pixel of a patch takes from those of a cell 1 to K = `most` patches wide, then zeros."""
    with lasting():
        matrices = [_weights(width * patch_size, patch_size) for width in range(1, most + 1)]
        return torch.stack([F.pad(m, (0, most * patch_size - m.shape[1])) for m in matrices]).to(device)


def _weights(source: int, target: int) -> Tensor:
    """fp32 [target, source]: linear antialiased resizing of one axis."""
    whole = torch.eye(source)[None, None]
    return F.interpolate(whole, size=(target, source), mode="bilinear", antialias=True)[0, 0]


def zoom(settings: PatchSettings, patches: Tensor, uniforms_BNU: Tensor) -> Tensor:
    """A square of round(P / patch_zoom) pixels from a random place of every patch [B, N, 3, P, P], enlarged (linear) to P x P."""
    side = patches.shape[-1]
    cut = zoomed_side(side, settings.patch_zoom)
    if cut == side:
        return patches
    table = _weights_of_places(side, cut, patches.device)
    tops, lefts = (table[(uniforms_BNU[..., column] * len(table)).long()] for column in (_TOP, _LEFT))
    return tops[:, :, None] @ patches @ lefts[:, :, None].mT


def zoomed_side(side: int, zoom: float) -> int:
    """Pixels of a patch's side that `zoom` keeps, at least one."""
    return max(1, round(side / zoom))


@cache  # a captured step reads them where they lie
def _weights_of_places(side: int, cut: int, device: torch.device) -> Tensor:
    """fp32 [side - cut + 1, side, side]: enlarges the `cut` pixels from each place on to `side`."""
    with lasting():
        weights = _weights(cut, side)
        places = range(side - cut + 1)
        return torch.stack([F.pad(weights, (place, side - cut - place)) for place in places]).to(device)


def recolour(settings: PatchSettings, patches: Tensor, uniforms_BNU: Tensor) -> Tensor:
    """Colour jitter, then loss of colour, for every normalised patch [B, N, 3, P, P] on its own.

    Of "pixels", as the loader's linear colours (engine/data/views.py): contrast about mid-grey, brightness, saturation, hue as a
    rotation in YIQ, in this order, in one linear map; values are clipped to an image's at the end. Of "normalised" values
    torchvision's (engine/methods/parts/colour_jitter.py), as in RelViT's code.
    """
    if not (settings.patch_jitter or settings.patch_grayscale):
        return patches
    u = uniforms_BNU
    applied = u[..., _JITTER] < settings.patch_jitter
    if settings.patch_colours == "normalised":
        factors = 1 + STRENGTH * (2 * u[..., _BRIGHTNESS : _SATURATION + 1] - 1)
        factors = torch.cat([factors, HUE * (2 * u[..., _HUE, None] - 1)], -1)
        changed = jitter(patches, factors, u[..., _COLUMNS:].argsort(dim=-1, stable=True))
        patches = torch.where(applied[..., None, None, None], changed, patches)
        return torch.where((u[..., _GRAY] < settings.patch_grayscale)[..., None, None, None], grey(patches), patches)
    brightness, contrast, saturation = (
        torch.where(applied, 1 + STRENGTH * (2 * u[..., column] - 1), 1.0)
        for column in (_BRIGHTNESS, _CONTRAST, _SATURATION)
    )
    saturation = torch.where(u[..., _GRAY] < settings.patch_grayscale, 0.0, saturation)
    turn = torch.where(applied, 2 * math.pi * HUE * (2 * u[..., _HUE] - 1), 0.0)
    gray, along, across, mean, std = _colour_maps(patches.device)
    cosine, sine = ((saturation * f(turn))[..., None, None] for f in (torch.cos, torch.sin))
    colours_BN33 = gray + cosine * along + sine * across
    pixels = patches.flatten(3) * std + mean
    brightness, contrast = brightness[..., None, None], contrast[..., None, None]
    changed = brightness * contrast * (colours_BN33 @ pixels) + 0.5 * brightness * (1 - contrast)
    return ((changed.clamp(0, 1) - mean) / std).view_as(patches)


@cache  # a captured step reads them where they lie
def _colour_maps(device: torch.device) -> tuple[Tensor, ...]:
    """fp32 [3, 3] each, of RGB columns: its grey, its chroma, and its chroma turned by a quarter of the circle of I and Q; then
    ImageNet's mean and standard deviation [3, 1]."""
    with lasting():
        to_yiq = torch.tensor([LUMA, *CHROMA], dtype=torch.float64)
        from_yiq = to_yiq.inverse()
        turned = torch.stack([-to_yiq[2], to_yiq[1]])
        maps = from_yiq[:, :1] @ to_yiq[:1], from_yiq[:, 1:] @ to_yiq[1:], from_yiq[:, 1:] @ turned
        normal = (torch.tensor(values)[:, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return tuple(part.float().to(device) for part in (*maps, *normal))
