"""`python -m engine.shard DATA OUT`: pack images into tar shards, once, for storage that is slow with many small files.

OUT is then read by --data in place of DATA, by all commands, and is the same set: same ids, labels and classes.
`engine.data.shards.packing` says what is in it.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from engine.core.commands import exit_status
from engine.core.errors import BadInput
from engine.core.flags import read
from engine.core.owner import owned
from engine.core.progress import watched
from engine.data.shards.members import IMAGES_PER_SHARD
from engine.data.shards.packing import How, Packing
from engine.data.sources import has_split, open_images


@dataclass(frozen=True)
class Shards:
    """Pack images into tar shards that are read in place of the folder. Given again, it goes on where it was stopped."""

    data: Annotated[Positional[str], tyro.conf.arg(metavar="DATA")] = ""
    """What to pack, as --data of engine.train: a folder, digits, NAME:DIR (parquet:DIR by way of the user's cache), or shards."""
    out: Annotated[Positional[str], tyro.conf.arg(metavar="OUT")] = ""
    """The folder to write: new, empty, or begun by this very command."""
    short: int = 0
    """Resize images whose short side is longer than this many pixels, and store them as JPEGs; 0 keeps every image as it is."""
    quality: int = 95
    """Of the JPEGs of resized images."""
    images_per_shard: int = IMAGES_PER_SHARD
    """Images of a shard."""
    bad_limit: float = 0.001
    """Largest share of unreadable images that is accepted; they are left out, and listed in manifest.json."""
    threads: int = 0
    """Threads that read and resize; 0 is one for each core, up to 16."""

    def check(self) -> None:
        """Raise BadInput for a value that cannot be meant."""
        if not self.data or not self.out:
            raise BadInput("what to pack or where to is missing: python -m engine.shard DATA OUT")
        if self.data.partition(":")[0] == "synthetic":
            raise BadInput("synthetic images are made on the device, and there is nothing to pack: name a folder")
        rules = {
            "short": (self.short >= 0, "a number of pixels, or 0"),
            "quality": (1 <= self.quality <= 100, "a whole number from 1 to 100"),
            "images-per-shard": (self.images_per_shard >= 1, "a whole number from 1"),
            "bad-limit": (0 <= self.bad_limit <= 1, "a share from 0 to 1"),
            "threads": (self.threads >= 0, "a whole number from 0"),
        }
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise BadInput(f"--{name} is {getattr(self, name.replace('-', '_'))}; it must be {wanted}.")


def run(wanted: Shards) -> None:
    """Open, plan, write, and say what there is."""
    splits = {
        split: open_images(wanted.data, split, wanted.bad_limit)
        for split in ("train", "val")
        if has_split(wanted.data, split)
    }
    folder, started = Path(wanted.out).expanduser(), time.monotonic()
    with owned(folder, print):
        packing = Packing(splits, folder, How(wanted.short, wanted.quality, wanted.images_per_shard))
        left = packing.left
        images = sum(len(shard.ids) for shard in left)
        begun = f", of {len(packing.shards):,}" if len(left) < len(packing.shards) else ""
        print(f"packing {images:,} images into {len(left):,} shards{begun} in {folder}", flush=True)
        with watched(images, "packing") as watch:
            packing.run(wanted.threads or None, watch)
    size = sum((folder / shard.name).stat().st_size for shard in packing.shards) / 2**30
    taken = time.monotonic() - started
    print(
        f"{folder} has {len(packing.shards):,} shards of {size:.2f} GiB, in {taken:.0f} s; train with --data {folder}"
    )
    if packing.left_out:
        print(f"{len(packing.left_out):,} unreadable images are left out; manifest.json there lists them")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""

    def work() -> None:
        given = sys.argv[1:] if arguments is None else arguments
        wanted = read(Shards, given, prog="engine.shard", description=Shards.__doc__)
        wanted.check()
        run(wanted)

    return exit_status(work, "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
