"""What every protocol reads and returns: frozen features with their labels, extracted once and kept on disk; one result.

Shapes: n images, C feature width, B batch.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_limits
from torch import Tensor

import kernels
from engine.data import cache as user_cache
from engine.data.pipeline import eval_batches
from engine.data.sources import ImageSet
from engine.durable import write_file
from engine.errors import BadInput
from engine.vit import VisionTransformer


@dataclass(frozen=True, eq=False)
class Features:
    """One split as a frozen encoder sees it.

    Args:
        values: fp32 [n, C].
        labels: int64 [n], or None for an unlabelled set.
        name: whose features these are, for messages and titles.
        classes: class names, label i is classes[i]; None names them by number.
        paths: the n image paths, relative to the data set's root; split files refer to them.
        pooling: what one row is (class token, mean of patch tokens, pixels).

    Raises:
        BadInput: the shapes disagree, the set is empty, or a value is NaN or infinite.
    """

    values: Tensor
    labels: Tensor | None
    name: str
    classes: tuple[str, ...] | None = None
    paths: tuple[str, ...] | None = None
    pooling: str = "as given"

    def __post_init__(self):
        if self.values.ndim != 2 or not self.values.numel():
            raise BadInput(f"features of {self.name} must be a non-empty [n, C], not {list(self.values.shape)}.")
        n = len(self.values)
        if (self.labels is not None and len(self.labels) != n) or (self.paths is not None and len(self.paths) != n):
            raise BadInput(f"features of {self.name} have {n} rows but another number of labels or paths.")
        if not torch.isfinite(self.values).all():
            raise BadInput(f"features of {self.name} contain NaN or infinity: these weights cannot be evaluated.")

    def to(self, device: torch.device | str) -> "Features":
        """The same features on `device`, where the protocols will then compute."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, values=self.values.to(device), labels=labels)


@dataclass(frozen=True, eq=False)
class Result:
    """What one protocol found.

    Args:
        protocol: its name, the stem of its file.
        values: figures by name; fractions of one unless listed in `plain`. "X std" is the spread of "X".
        settings: everything that was chosen, JSON-able.
        details: more of it (JSON-able), and numpy arrays for pictures (kept out of results.json). A list of dicts is a
            table that the command prints: its first column and whole numbers as they are, fractions in percent.
        headline: the values a summary shows; empty for all.
        plain: values that are no fractions, shown as they are.
        weights: whose features were judged.
        seconds: time the protocol took, without extraction.
    """

    protocol: str
    values: dict[str, float]
    settings: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    headline: tuple[str, ...] = ()
    plain: frozenset[str] = frozenset()
    weights: str = ""
    seconds: float = 0.0


class Labelled(Protocol):
    """What a protocol can check before any feature exists: an ImageSet or Features."""

    labels: Any
    classes: tuple[str, ...] | None
    paths: Any


def check_labelled(protocol: str, train: Labelled, test: Labelled) -> None:
    """Refuse sets that no supervised figure can be computed on.

    Raises:
        BadInput: labels are missing, fewer than two classes are present, or a class has no training image.
    """
    for which, images in (("training", train), ("test", test)):
        if images.labels is None:
            raise BadInput(
                f"protocol {protocol} needs labels and the {which} set has none; give --data a folder with "
                "train/CLASS and val/CLASS, or leave --data out for the embedded digits."
            )
        if not len(images.labels):
            raise BadInput(f"protocol {protocol}: the {which} set is empty.")
    counts = class_counts(train)
    if (counts > 0).sum() < 2:
        raise BadInput(f"protocol {protocol} needs at least two classes; the training set has one.")
    if train.classes is not None and not counts.all():
        empty = train.classes[int(counts.argmin())]
        raise BadInput(f"protocol {protocol}: class {empty} has no training image; add some or remove the class.")


def as_numpy(labels: Any) -> np.ndarray:
    """Labels of either kind as an int64 numpy array."""
    return labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)


def class_counts(images: Labelled) -> np.ndarray:
    """int64 [K] images per class; K covers every named class and every label."""
    return np.bincount(as_numpy(images.labels), minlength=len(images.classes or ()))


def number_of_classes(train: Labelled, test: Labelled) -> int:
    """Classes in all, whether or not each occurs in both sets."""
    return max(len(class_counts(train)), len(class_counts(test)))


@dataclass(frozen=True, eq=False)
class Encoder:
    """How images become features.

    Args:
        encode: [B, 3, H, W] normalised images -> [B, C].
        size: (H, W) in pixels that `encode` wants.
        pooling: what one feature row is, in words.
        fingerprint: identifies the function for the cache; None is never cached.
    """

    encode: Callable[[Tensor], Tensor]
    size: tuple[int, int]
    pooling: str
    fingerprint: str | None = None


_POOLING = {"token": "class token after the final norm", "avg": "mean of patch tokens after the final norm"}


def encoder_of(model: VisionTransformer) -> Encoder:
    """A VisionTransformer as an encoder; its own `global_pool` decides the feature. Evaluates in eval mode."""

    def encode(images_B3HW: Tensor) -> Tensor:
        training = model.training
        model.eval()
        try:
            return model.pool(model(images_B3HW))
        finally:
            model.train(training)

    digest = hashlib.sha256(repr(model.architecture).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return Encoder(encode, model.img_size, _POOLING[model.global_pool], digest.hexdigest())


def raw_pixels(size: tuple[int, int] = (32, 32)) -> Encoder:
    """The baseline every encoder has to beat: the normalised image of (H, W) pixels itself, 3 H W numbers."""
    return Encoder(lambda images_B3HW: images_B3HW.flatten(1), size, f"{size[0]}x{size[1]} pixels", "raw")


def extract(
    encoder: Encoder,
    images: ImageSet,
    *,
    name: str,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    threads: int | None = None,
    cache: Path | None = None,
) -> Features:
    """Encode every readable image once, in order, resized and centre-cropped.

    An image that cannot be read is left out: its substitute would carry a wrong label.

    Args:
        precision: "fp32", or "bf16" for autocast.
        cache: folder of extracted features, keyed by weights, image listing and settings; None keeps nothing.

    Returns:
        Features on the CPU.

    Raises:
        BadInput: a value is NaN or infinite, or a cached file is damaged.
    """
    device = torch.device(device)
    if cache is None or encoder.fingerprint is None:
        rows, values = _encode_all(encoder, images, batch_size, device, precision, threads)
    else:
        settings = [encoder.fingerprint, encoder.size, encoder.pooling, batch_size, precision, device.type]
        environment = [torch.__version__, kernels.describe(device)]
        key = hashlib.sha256(json.dumps([settings, environment, _listing_digest(images)]).encode()).hexdigest()
        path = Path(cache) / f"{key}.safetensors"
        with user_cache.locked(path):
            if not path.exists():
                _write(path, *_encode_all(encoder, images, batch_size, device, precision, threads))
        rows, values = _read(path)
    return Features(
        values=values,
        labels=None if images.labels is None else torch.from_numpy(images.labels)[rows],
        name=name,
        classes=images.classes,
        paths=tuple(images.paths[row] for row in rows.tolist()),
        pooling=encoder.pooling,
    )


def _encode_all(encoder, images, batch_size, device, precision, threads) -> tuple[Tensor, Tensor]:
    """Ids int64 [n] of the readable images, ascending, and their features fp32 [n, C]."""
    ids, values = [], []
    batches = track(
        eval_batches(images, encoder.size, batch_size, device=device, threads=threads),
        f"encoding {images.split}",
        total=-(-len(images) // batch_size),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for batch in batches:
            ids.append(batch.ids)
            values.append(encoder.encode(batch.images[0]).float().cpu())
    return torch.cat(ids), torch.cat(values)


def _listing_digest(images: ImageSet) -> str:
    digest = hashlib.sha256(f"{images.root}\n".encode())
    for path, good in zip(images.paths, images.good.tolist()):
        stat = (images.root / path).stat() if good else None
        digest.update(f"{path} {stat and (stat.st_size, stat.st_mtime_ns)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _read(path: Path) -> tuple[Tensor, Tensor]:
    try:
        stored = load_file(path)
        return stored["ids"], stored["values"]
    except (SafetensorError, KeyError) as error:
        raise BadInput(f"cached features {path} are damaged ({error}); delete that file.") from error


def _write(path: Path, ids: Tensor, values: Tensor) -> None:
    write_file(path, lambda aside: save_file({"ids": ids, "values": values}, aside))


@contextmanager
def threads_for(flops: float) -> Iterator[None]:
    """Inside, CPU work runs on one thread per 1e9 of `flops`, those of its largest single operation.

    Small operations gain nothing from more, and on a machine that is busy otherwise they spend their time waiting for the
    other threads: a low-shot fit of one second was seen to take half a minute.
    """
    before = torch.get_num_threads()
    threads = max(1, min(before, int(flops / 1e9)))
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)
