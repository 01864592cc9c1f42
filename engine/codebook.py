"""`python -m engine.codebook`: fit the codebook that BEiT's codes come from to a folder of images, once for many runs.

Leaves a file for --beit.codebook and, beside it, a picture of the codes.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from torch import Tensor

from engine.core import dist
from engine.core.commands import exit_status
from engine.core.errors import BadInput
from engine.core.flags import read
from engine.data.sources import open_images
from engine.data.views import Augmentation
from engine.methods.parts.tokenizers import Codebook

FOLDER_SIZE, EMBEDDED_SIZE = 224, 32


@dataclass(frozen=True)
class Fit:
    """Fit a codebook of patches by k-means, for --beit.codebook."""

    data: str = ""
    """What to read, as for engine.train; default: the embedded digits."""
    out: str = "codebook.safetensors"
    """The file to write, .safetensors; a picture lies beside it. Neither may be there yet."""
    codes: int = 8192
    """Patches to find."""
    patch_size: int = 16
    """Side of a patch in pixels, as the model has it."""
    image_size: int = 0
    """Side of the crops that patches are cut from, as the model has it; 0 is 224, and 32 for the embedded digits."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a random crop covers, as the recipe has it."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    patches: int = 0
    """Patches to fit to; 0 is 50 for each code, or those of 32 crops of every image, where these are fewer."""
    normalise: bool = True
    """Compare patches normalised one by one, so that codes tell of shapes, not of brightness."""
    bad_limit: float = 0.001
    """Largest share of unreadable images that is accepted."""
    device: str = "auto"
    """auto, cpu or cuda: where images are decoded and cropped."""
    threads: int = 0
    """Loader threads; 0 is what the machine has."""
    seed: int = 0
    """Everything random follows from it."""

    def check(self) -> None:
        """Raise BadInput for a value that cannot be meant."""
        low, high = self.crop_scale
        rules = {
            "codes": (self.codes >= 2, "a whole number from 2"),
            "patch-size": (self.patch_size >= 1, "a whole number from 1"),
            "image-size": (
                self.side >= self.patch_size and self.side % self.patch_size == 0,
                f"a multiple of the patch size {self.patch_size}",
            ),
            "crop-scale": (0 < low <= high <= 1, "two shares with 0 < low <= high <= 1"),
            "flip": (0 <= self.flip <= 1, "a probability from 0 to 1"),
            "patches": (
                self.patches == 0 or self.patches >= self.codes,
                f"0, or at least {self.codes}, one for each code",
            ),
            "bad-limit": (0 <= self.bad_limit <= 1, "a share from 0 to 1"),
            "device": (self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
            "threads": (self.threads >= 0, "a whole number from 0"),
            "seed": (self.seed >= 0, "a whole number from 0"),
            "out": (Path(self.out).suffix == ".safetensors", "a file that ends in .safetensors"),
        }
        for name, (holds, wanted) in rules.items():
            if not holds:
                value = self.side if name == "image-size" else getattr(self, name.replace("-", "_"))
                raise BadInput(f"--{name} is {value}; it must be {wanted}.")
        for path in (Path(self.out), Path(self.out).with_suffix(".png")):
            if path.exists():
                raise BadInput(f"--out {self.out} would replace {path}, which is there already; choose another name.")

    @property
    def side(self) -> int:
        return self.image_size or (EMBEDDED_SIZE if self.data in ("", "digits") else FOLDER_SIZE)


def run(fit: Fit) -> None:
    """Read patches, find the codes, write file and picture."""
    images = open_images(fit.data or None, "train", fit.bad_limit)
    ranks = dist.start(fit.device)
    codebook = Codebook(fit.codes, fit.patch_size, fit.normalise)
    console, started = Console(stderr=True), time.monotonic()

    def watch(parts: Iterator[Tensor], total: int) -> Iterator[Tensor]:
        yield from track(parts, "reading patches", total=total, console=console, disable=not console.is_terminal)

    view = Augmentation((fit.side,) * 2, fit.crop_scale, flip=fit.flip)
    print(f"finding {fit.codes:,} codes of {fit.patch_size}x{fit.patch_size} pixels in {len(images):,} images")
    codebook.fit(images, view, fit.seed, fit.patches, device=ranks.device, threads=fit.threads or None, watch=watch)
    path = Path(fit.out)
    codebook.save(path)
    codebook.draw(path.with_suffix(".png"))
    print(
        f"{path} and {path.with_suffix('.png')}, in {time.monotonic() - started:.0f} s; train with --beit.codebook {path}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""

    def work() -> None:
        given = sys.argv[1:] if arguments is None else arguments
        fit = read(Fit, given, prog="engine.codebook", description=Fit.__doc__)
        fit.check()
        run(fit)

    try:
        return exit_status(work, "nothing was written")
    finally:
        dist.stop()


if __name__ == "__main__":
    sys.exit(main())
