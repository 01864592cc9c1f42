"""A folder of a few images, and the flags of the shortest run on it."""

from pathlib import Path

from PIL import Image

FLAGS = (
    "--method", "mae", "--model", "vit_micro_patch8_32", "--device", "cpu", "--epochs", "2", "--batch-size", "4",
    "--probe-every", "0", "--no-evaluate",
)  # fmt: skip


def folder_of_images(root: Path, classes: tuple[str, ...] = ("cat", "dog"), per_class: int = 4) -> Path:
    for shade, name in enumerate(classes):
        (root / "train" / name).mkdir(parents=True)
        for index in range(per_class):
            Image.new("RGB", (40, 36), (index * 9, 50 * shade, 99)).save(root / "train" / name / f"{index}.png")
    return root
