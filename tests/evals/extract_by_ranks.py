"""Started by torchrun: extracts a folder's features through a shared cache; each rank saves them, and how many it encoded."""

import sys
from pathlib import Path

import torch

from engine.core import dist
from engine.data.sources import open_images
from engine.evals import extraction
from engine.evals.features import Encoder

if __name__ == "__main__":
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    ranks, encoded = dist.start("cpu"), 0
    extraction.SHARD = 1

    def encode(images_B3HW):
        global encoded
        encoded += len(images_B3HW)
        return images_B3HW.flatten(1)

    encoder = Encoder(encode, (32, 32), "pixels", "shared")
    found = extraction.extract(
        encoder, open_images(folder, "train"), name="x", batch_size=3, cache=out / "features", together=True
    )
    torch.save((found.values.clone(), encoded), out / f"{ranks.rank}.pt")
    dist.stop()
