"""What protocols read: frozen features with their labels, extracted once and kept on disk.

Shapes: n images, C feature width, B batch, L patch tokens of an image.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from engine.core.errors import BadInput
from engine.model.tokens import Packed, View
from engine.model.vit import VisionTransformer

_ROWS = 65_536  # looked at together: features may be mapped from a file larger than memory


@dataclass(frozen=True, eq=False)
class Tokens:
    """Every patch token of one split, left on the disk: what a probe that attends to tokens reads batch by batch.

    fp16, for there are many: those of ImageNet's training set from a ViT-B/16 take 386 GB so. After a norm, numbers lie far
    inside its range, and its 11 significant bits are more than the 8 of an encoder under bf16.

    Args:
        values: fp16 [n, L, C], memory-mapped or in memory.
        what: which tokens these are, in words.

    Raises:
        BadInput: the shape or type is another.
    """

    values: np.ndarray
    what: str = "patch tokens as given"

    def __post_init__(self):
        if self.values.ndim != 3 or not self.values.size or self.values.dtype != np.float16:
            raise BadInput(f"tokens must be a non-empty fp16 [n, L, C], not {self.values.dtype} {self.values.shape}.")

    def rows(self, rows_B: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
        """fp32 [B, L, C]: the tokens of these images, on `device`; nothing else is read."""
        return torch.from_numpy(self.values[rows_B]).to(device).float()


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
        tokens: the n images' patch tokens, where a protocol wants them.
        targets: int8 [n, K] where an image may show several classes: 1 present, 0 absent, -1 not to be counted; or None.

    Raises:
        BadInput: the shapes disagree, the set is empty, or a value is NaN or infinite.
    """

    values: Tensor
    labels: Tensor | None
    name: str
    classes: tuple[str, ...] | None = None
    paths: tuple[str, ...] | None = None
    pooling: str = "as given"
    tokens: Tokens | None = None
    targets: Tensor | None = None

    def __post_init__(self):
        if self.values.ndim != 2 or not self.values.numel():
            raise BadInput(f"features of {self.name} must be a non-empty [n, C], not {list(self.values.shape)}.")
        n = len(self.values)
        if any(each is not None and len(each) != n for each in (self.labels, self.paths, self.targets)):
            raise BadInput(f"features of {self.name} have {n} rows but another number of labels, targets or paths.")
        if self.tokens is not None and len(self.tokens.values) != n:
            raise BadInput(f"features of {self.name} have {n} rows but tokens of {len(self.tokens.values)} images.")
        if not all(torch.isfinite(some).all() for some in self.values.split(_ROWS)):
            raise BadInput(f"features of {self.name} contain NaN or infinity: these weights cannot be evaluated.")

    def to(self, device: torch.device | str) -> "Features":
        """The same features on `device`, where the protocols will then compute. Tokens stay where they are."""
        labels, targets = (None if each is None else each.to(device) for each in (self.labels, self.targets))
        return replace(self, values=self.values.to(device), labels=labels, targets=targets)


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
        tokens: [B, 3, H, W] normalised images -> [B, L, C], the patch tokens; None where there are none.
        model: that encodes; None where it is no ViT.
    """

    encode: Callable[[Tensor], Tensor]
    size: tuple[int, int]
    pooling: str
    fingerprint: str | None = None
    tokens: Callable[[Tensor], Tensor] | None = None
    model: VisionTransformer | None = None


TOKENS = "patch tokens after the final norm, without class token and registers"
BOTH, BEFORE_NORM = "both", "before-norm"
POOLS = ("token", "avg", BOTH, BEFORE_NORM)
_POOLING = {
    "token": "class token after the final norm",
    "avg": "mean of patch tokens after the final norm",
    BOTH: "class token and mean of patch tokens after the final norm, side by side",
    BEFORE_NORM: "class token before the final norm",
}


def check_pooling(model: VisionTransformer, pool: str = "", blocks: int = 1) -> None:
    """Raise BadInput for a pooling and a number of blocks that `encoder_of` cannot read of the model."""
    name, own = model.architecture.name, pool or model.global_pool
    if own != "avg" and model.cls_token is None:
        raise BadInput(f"{name} has no class token: choose the pooling avg, not {own}.")
    if blocks > 1 and own not in ("token", BOTH):
        raise BadInput(f"class tokens of {blocks} blocks are those of the pooling token or {BOTH}, not of {own}.")
    if not 1 <= blocks <= model.depth:
        raise BadInput(f"{name} has class tokens of 1 to {model.depth} blocks, not of {blocks}; choose another number.")


def encoder_of(model: VisionTransformer, pool: str = "", blocks: int = 1) -> Encoder:
    """A VisionTransformer as an encoder. Evaluates in eval mode.

    Where the final norm follows the pooling (fc_norm), it is applied to what is pooled, and to each patch token.

    Args:
        pool: "" for the feature that the model's own `global_pool` decides; or "token", the class token, "avg", the mean of patch
            tokens, "both", one beside the other, 2 C; or "before-norm", the class token as MSN's low-shot evaluation reads it.
        blocks: class tokens of the last so many blocks, each after the final norm, stand side by side (DINO's linear probe); the
            mean of "both" is of the last block alone.

    Raises:
        BadInput: class tokens of a model without one, or of more blocks than it has; several blocks with another pooling.
    """
    check_pooling(model, pool, blocks)
    own = pool or model.global_pool

    def normed(images_B3HW: Tensor) -> list[Tensor]:
        """All tokens of the last blocks, [B, L, C] each, after the final norm."""
        if blocks == 1:
            return [model(images_B3HW)]
        packed, start, found = model.embed([View(images_B3HW)]), 0, []
        for stop in range(model.depth - blocks + 1, model.depth + 1):
            packed, start = model.run_blocks(packed, start, stop), stop
            found += Packed(model.norm(packed.tokens_TC), packed.layout).unpack()
        return found

    def read(images_B3HW: Tensor) -> Tensor:
        if own == BEFORE_NORM:
            return model.run_blocks(model.embed([View(images_B3HW)])).unpack()[0][:, 0]
        layers = normed(images_B3HW)
        parts = [] if own == "avg" else [model.fc_norm(tokens_BLC[:, 0]) for tokens_BLC in layers]
        if own != "token":
            parts.append(model.fc_norm(layers[-1][:, model.num_prefix_tokens :].mean(1)))
        return torch.cat(parts, 1)

    def frozen(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def evaluated(images_B3HW: Tensor) -> Tensor:
            training = model.training
            model.eval()
            try:
                return encode(images_B3HW)
            finally:
                model.train(training)

        return evaluated

    digest = hashlib.sha256(repr(model.architecture).encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return Encoder(
        frozen(read),
        model.img_size,
        _POOLING[own] + (f"; class tokens of the last {blocks} blocks" if blocks > 1 else ""),
        digest.hexdigest(),
        frozen(lambda images_B3HW: model.fc_norm(model(images_B3HW)[:, model.num_prefix_tokens :])),
        model,
    )


def raw_pixels(size: tuple[int, int] = (32, 32)) -> Encoder:
    """The baseline every encoder has to beat: the normalised image of (H, W) pixels itself, 3 H W numbers."""
    return Encoder(lambda images_B3HW: images_B3HW.flatten(1), size, f"{size[0]}x{size[1]} pixels", "raw")


def check_tokens(encoder: Encoder, name: str) -> None:
    """Refuse an encoder without patch tokens.

    Raises:
        BadInput: see above.
    """
    if encoder.tokens is None:
        raise BadInput(f"{name} ({encoder.pooling}) have no patch tokens to attend to; give the weights of a ViT.")


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
