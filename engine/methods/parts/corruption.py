"""GMML's corruption of images: blocks of pixels lose their content or get another image's (Atito et al., "SiT: Self-supervised
vIsion Transformer", 2021; "GMML is All you Need", 2022; "MC-SSL0.0: Towards Multi-Concept Self-Supervised Learning", 2021).

Shapes: b images of this rank, V crops of an image that are corrupted, H x W pixels, R = b * V masks.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.core import masking
from engine.core.draws import Draws, seed_of
from engine.core.errors import BadInput
from engine.core.host_memory import to_device

FILLS = ("zeros", "noise")
BLOCKS_AT_ONCE = 32


@dataclass(frozen=True)
class CorruptionSettings:
    """What a method's settings take over to have its images corrupted; the defaults are those of SiT and MC-SSL."""

    drop: tuple[float, float] = (0.5, 0.5)
    """Share of its pixels that a crop loses, drawn between these."""
    fill: str = "zeros"
    """What stands in their place: zeros (the data's mean colour) or noise (of standard normal distribution)."""
    alien: float = 0.3
    """Share of its pixels that a crop takes from another image instead."""
    alien_probability: float = 0.5
    """Probability that a crop takes another image's pixels, and loses none."""
    largest_block: float = 0.3
    """Largest side of a block, as a share of the crop's."""
    block_align: int = 1
    """Corners of blocks lie on a grid of so many pixels, and their sides are multiples of it."""

    def corruption_rules(self) -> dict[str, tuple[bool, str]]:
        """What `rules` of the method's settings adds: flag -> (whether it holds, what is valid)."""
        low, high = self.drop
        return {
            "drop": (0 < low <= high <= 0.9, "two shares with 0 < low <= high <= 0.9"),
            "fill": (self.fill in FILLS, f"one of {', '.join(FILLS)}"),
            "alien": (0 < self.alien <= 0.9, "a share above 0, at most 0.9"),
            "alien-probability": (0 <= self.alien_probability <= 1, "a probability from 0 to 1"),
            "largest-block": (0 < self.largest_block <= 1, "a share above 0, at most 1"),
            "block-align": (self.block_align >= 1, "a whole number from 1"),
        }

    def noise_on_host(self) -> str:
        """What `ungraphed` of the method's settings says of it."""
        return "the noise in place of pixels is drawn from seeds that the host reads" if self.fill == "noise" else ""

    def check_corruption(self, stage: str, sizes: Iterable[tuple[int, int]]) -> None:
        """Raise BadInput where blocks do not fit into crops of these sizes (height, width)."""
        for height, width in sizes:
            if height % self.block_align or width % self.block_align:
                raise BadInput(
                    f"--{stage}.block-align is {self.block_align}; it must divide both sides of crops of {height} x {width} "
                    "pixels."
                )


def draw_corruption(settings: CorruptionSettings, draws: Draws, crops: int, size: tuple[int, int]) -> dict[str, Tensor]:
    """What is corrupted in a step: a function of seed, step and the image's place in the global batch, so that two methods with
    the same seed and settings draw the same.

    Args:
        crops: V, of each image.
        size: (H, W) of a crop.

    Returns:
        "corrupted": bool [b, V, H, W] on the CPU, the pixels that do not stay as they are.
        "alien": bool [b, V] on the CPU, whether they come from another image.
        "noise": int64 [b] on the CPU, seeds of what fills the others; only where that is noise.
    """
    numbers_R2 = draws.on_host("gmml/shares", crops, 2).flatten(0, 1).double().numpy()
    alien_R = numbers_R2[:, 0] < settings.alien_probability
    low, high = settings.drop
    targets_R = np.where(alien_R, settings.alien, low + (high - low) * numbers_R2[:, 1])
    masks_RHW = masking.gmml_blocks(
        lambda round_: draws.on_host(f"gmml/blocks/{round_}", crops, BLOCKS_AT_ONCE, 4).flatten(0, 1).numpy(),
        targets_R,
        size,
        settings.block_align,
        settings.largest_block,
    )
    drawn = {"corrupted": torch.from_numpy(masks_RHW), "alien": torch.from_numpy(alien_R)}
    drawn = {name: x.unflatten(0, (-1, crops)) for name, x in drawn.items()}
    return drawn | ({"noise": draws.seeds()} if settings.fill == "noise" else {})


def corrupt(settings: CorruptionSettings, images: tuple[Tensor, ...], drawn: dict[str, Tensor]) -> list[Tensor]:
    """The crops with their pixels corrupted, on the crops' device; the crops themselves stay as they are.

    Alien pixels of image i come from the same crop and place of image i ^ 1. A batch is in random order, so that is a random
    other image, and pairs stay within a rank and a micro-batch: two ranks, or micro-batches, with an even number of images each
    compute what one does. The last of an odd number takes from the one before it; a single image has no other and keeps its own.

    Args:
        images: V crops fp32 [b, 3, H, W].
        drawn: rows of what `draw_corruption` returned; "corrupted" may lie on the crops' device already.
    """
    device = images[0].device
    corrupted_bVHW = to_device(drawn["corrupted"], device)
    alien_bV = to_device(drawn["alien"], device)
    neighbours_b = _neighbours(len(images[0]), device)
    fills = [None] * len(images)
    if settings.fill == "noise":
        fills = _noise(drawn["noise"], len(images), images[0]).unbind(1)
    results = []
    for crop, (view, fill) in enumerate(zip(images, fills, strict=True)):
        filled = torch.zeros_like(view) if fill is None else fill
        replaced = torch.where(alien_bV[:, crop, None, None, None], view[neighbours_b], filled)
        results.append(torch.where(corrupted_bVHW[:, crop, None], replaced, view))
    return results


def _noise(seeds_b: Tensor, crops: int, like: Tensor) -> Tensor:
    """[b, V, 3, H, W] of standard normal distribution, each image's from its own seed, whatever others are in the batch."""
    noise = [
        torch.randn(
            crops,
            *like.shape[1:],
            generator=torch.Generator(like.device).manual_seed(seed_of(seed, "gmml/noise")),
            device=like.device,
            dtype=like.dtype,
        )
        for seed in seeds_b.tolist()
    ]
    return torch.stack(noise)


def _neighbours(count: int, device: torch.device) -> Tensor:
    """int64 [count]: where each image's alien pixels come from."""
    own = torch.arange(count, device=device)
    return torch.where(own ^ 1 < count, own ^ 1, (own - 1).clamp_min(0))


def masked_mean(loss_bHW: Tensor, corrupted_bHW: Tensor) -> Tensor:
    """Mean over the corrupted pixels of each image, then over images: so ranks and micro-batches of equally many images weigh
    alike, however many pixels each has corrupted, and their mean is what one process computes.

    An image without a corrupted pixel adds 0.
    """
    counts_b = corrupted_bHW.sum((1, 2)).clamp_min(1)
    return ((loss_bHW * corrupted_bHW).sum((1, 2)) / counts_b).mean()
