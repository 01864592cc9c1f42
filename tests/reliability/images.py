"""A folder of a few images, the flags of the shortest run on it, and waiting for what the run writes beside its steps."""

from pathlib import Path
from time import monotonic, sleep

from PIL import Image

FLAGS = (
    "--method", "mae", "--model", "vit_micro_patch8_32", "--device", "cpu", "--epochs", "2", "--batch-size", "4",
    "--probe-every", "0", "--no-evaluate", "--mae.decoder-dim", "32", "--mae.decoder-depth", "1", "--mae.decoder-heads", "1",
)  # fmt: skip


def folder_of_images(root: Path, classes: tuple[str, ...] = ("cat", "dog"), per_class: int = 4) -> Path:
    for shade, name in enumerate(classes):
        (root / "train" / name).mkdir(parents=True)
        for index in range(per_class):
            Image.new("RGB", (40, 36), (index * 9, 50 * shade, 99)).save(root / "train" / name / f"{index}.png")
    return root


def awaited(path: Path, seconds: float = 60.0) -> None:
    """Waits until there is something of that name."""
    end = monotonic() + seconds
    while not path.exists():
        assert monotonic() < end, f"{path} is not written"
        sleep(0.01)
