"""Loaders that give the views of ours, written the usual way: torchvision's transforms behind torch's DataLoader, timm's loader,
SPDL's pipeline of threads.

Crop, flip and sizes are those of ours, with bicubic antialiased resizing. Colours are torchvision's of the same strengths: jitter
in HSV and with clipping between its steps, blur as each library has it. Pixels are handed over as bytes and normalised a batch at
a time by whoever takes them, as timm does it.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from engine.data.views import IMAGENET_MEAN, IMAGENET_STD, Augmentation

AHEAD = 2  # batches that a worker makes ahead
Load = Callable[[str], tuple[Tensor, ...]]  # a file's views, uint8 CHW


class PillowBlur:
    """DINO's blur: Pillow's, with a radius drawn from a range."""

    def __init__(self, sigma: tuple[float, float]):
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def transform(view: Augmentation, tensors: bool) -> v2.Transform:
    """A view by torchvision, of uint8 tensors or of Pillow's images; uint8 CHW comes out."""
    steps: list = [
        v2.RandomResizedCrop(view.size, view.scale, view.ratio, v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(view.flip),
    ]
    if view.jitter:
        colours = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        steps.append(v2.RandomApply([colours], view.jitter))
    if view.grayscale:
        steps.append(v2.RandomGrayscale(view.grayscale))
    if view.blur:
        side = view.size[0] // 10 | 1  # BYOL's kernel: a tenth of the side
        blur = v2.GaussianBlur(side, view.blur_sigma) if tensors else PillowBlur(view.blur_sigma)
        steps.append(v2.RandomApply([blur], view.blur))
    if view.solarize:
        steps.append(v2.RandomSolarize(128, view.solarize))
    return v2.Compose(steps if tensors else [*steps, v2.PILToTensor()])


class TorchvisionViews:
    """Reads a file and makes its views; the image is decoded once."""

    def __init__(self, views: Sequence[Augmentation], tensors: bool):
        self.tensors = tensors
        self.transforms = [transform(view, tensors) for view in views]

    def __call__(self, path: str) -> tuple[Tensor, ...]:
        if self.tensors:
            image = decode_image(path, ImageReadMode.RGB)
        else:
            with Image.open(path) as file:
                image = file.convert("RGB")
        return tuple(transform(image) for transform in self.transforms)


class Files(Dataset):
    """The views of files that are taken again and again.

    Args:
        count: images of an epoch.
    """

    def __init__(self, paths: Sequence[str], load: Load, count: int):
        self.paths, self.load, self.count = paths, load, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.load(self.paths[index % len(self.paths)])


class Labelled(Files):
    """As timm wants them: its own transform of Pillow's image, and a label."""

    transform = None

    def __init__(self, paths: Sequence[str], count: int):
        super().__init__(paths, self._transformed, count)

    def _transformed(self, path: str) -> tuple[object, int]:
        with Image.open(path) as file:
            return self.transform(file.convert("RGB")), 0


class Torchvision:
    """torch's DataLoader with workers that stay, and torchvision's transforms.

    Args:
        paths: files to choose from.
        batches: of an epoch.
        workers: processes.
        tensors: decode to uint8 tensors, else by Pillow.
    """

    def __init__(
        self, paths: Sequence[str], views: Sequence[Augmentation], batch: int, batches: int, workers: int, tensors: bool
    ):
        # spawned: a fork of a process whose DALI has threads may hang
        self._loader = DataLoader(
            Files(paths, TorchvisionViews(views, tensors), batch * batches), batch, shuffle=True, num_workers=workers,
            persistent_workers=True, prefetch_factor=AHEAD, multiprocessing_context="spawn",
        )  # fmt: skip

    def epoch(self) -> Iterator[tuple[Tensor, ...]]:
        for views in self._loader:
            yield normalised(views)


class Timm:
    """timm's loader for training, which makes one view, cropped and flipped; it normalises a batch at a time."""

    def __init__(self, paths: Sequence[str], view: Augmentation, batch: int, batches: int, workers: int):
        from timm.data import create_loader

        self._loader = create_loader(
            Labelled(paths, batch * batches), (3, *view.size), batch, is_training=True, scale=view.scale, ratio=view.ratio,
            hflip=view.flip, color_jitter=0.0, interpolation="bicubic", num_workers=workers, device=torch.device("cpu"),
            persistent_workers=True,
        )  # fmt: skip
        self._loader.loader.multiprocessing_context = "spawn"

    def epoch(self) -> Iterator[tuple[Tensor, ...]]:
        for images, _ in self._loader:
            yield (images,)


class Spdl:
    """SPDL's pipeline of threads, with torchvision's decoder and transforms of tensors: SPDL's own decoders want FFmpeg's
    libraries on the machine."""

    def __init__(self, paths: Sequence[str], views: Sequence[Augmentation], batch: int, batches: int, workers: int):
        self._paths, self._load = paths, TorchvisionViews(views, tensors=True)
        self._batch, self._count, self._workers = batch, batch * batches, workers

    def epoch(self) -> Iterator[tuple[Tensor, ...]]:
        from spdl.pipeline import PipelineBuilder

        chosen = itertools.islice(itertools.cycle(self._paths), self._count)
        builder = PipelineBuilder().add_source(chosen).pipe(self._load, concurrency=self._workers)
        builder = builder.aggregate(self._batch).pipe(stacked).add_sink(AHEAD)
        pipeline = builder.build(num_threads=self._workers)
        with pipeline.auto_stop():
            for views in pipeline:
                yield normalised(views)


def stacked(images: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Views of images -> a batch of each view."""
    return tuple(torch.stack(view) for view in zip(*images, strict=True))


MEAN = 255 * torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
STD = 255 * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)


def normalised(views: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """uint8 -> fp32 by ImageNet's mean and deviation."""
    return tuple(view.float().sub_(MEAN).div_(STD) for view in views)
