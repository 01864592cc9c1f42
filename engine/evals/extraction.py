"""Encoding a whole set once: features and tokens stream into memory-mapped files, go on where they were stopped, and are shared
out over ranks.

A store is a folder with one array [n, ...], whose row i belongs to the i-th readable image, and a note of every shard (a run of
images) that is written. So in memory at a time are one batch and what the system keeps of the files: for ImageNet's 1,281,167
training images at width 1024, 5.2 GB of file and, per process, 1 MB of features.

Shapes: n images, C feature width, B batch, L patch tokens of an image.
"""

import hashlib
import json
import math
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import kernels
from engine.core import dist
from engine.core.durable import flush, write_file
from engine.core.errors import BadInput
from engine.data import cache as user_cache
from engine.data.pipeline import eval_batches
from engine.data.sources import ImageSet
from engine.data.subsets import subset
from engine.evals.features import TOKENS, Encoder, Features, Tokens, check_tokens
from engine.model.shapes import by_shape, in_order

SHARD = 8  # batches: after so many, what is written survives a crash
COMPLETE = "complete.json"
DTYPES = {"features": np.float32, "tokens": np.float16}


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
    tokens: bool = False,
    together: bool = False,
    resize: str = "bicubic",
    squeeze: bool = False,
    aspect: str = "crop",
) -> Features:
    """Encode every readable image once, in order, resized and centre-cropped, squeezed, or, where its aspect is to "keep", whole,
    as `eval_batches` does it. Whole images are encoded shape by shape.

    An image that cannot be read is left out: its substitute would carry a wrong label.

    Args:
        precision: "fp32", or "bf16" for autocast.
        cache: folder of stores, keyed by weights, image listing and settings; a stopped extraction goes on there. None keeps
            nothing: features are in memory then, and tokens in a temporary folder that goes with the Tokens.
        tokens: patch tokens as well, in a second pass over the images.
        together: all ranks call this, each encodes its share of the shards, and all return the same.

    Returns:
        Features on the CPU, memory-mapped where there is a cache.

    Raises:
        BadInput: a value is NaN or infinite, stored features are damaged, `tokens` of an encoder that has none, the disk cannot
            hold them, or `together` without a cache.
    """
    if tokens:
        check_tokens(encoder, name)
    patch = encoder.model.patch_size if aspect == "keep" else 0
    device = torch.device(device)
    keeps = cache is not None and encoder.fingerprint is not None
    if together and not keeps:
        raise BadInput("several ranks share out an extraction through the cache; leave --no-cache out.")
    place = Path(cache) if keeps else Path(tempfile.gettempdir())
    key = _key(encoder, images, batch_size, precision, device, resize, squeeze, patch) if keeps else None
    how = (encoder.size, batch_size, device, precision, threads, resize, squeeze, patch)
    ids, values = _stored("features", place, key, images, name, encoder.encode, how, together)
    found_tokens = None
    if tokens:
        token_ids, stored = _stored("tokens", place, key, images, name, encoder.tokens, how, together)
        found_tokens = Tokens(stored, TOKENS)
        if stored.base is not None and key is None:
            weakref.finalize(found_tokens, shutil.rmtree, Path(stored.filename).parent, ignore_errors=True)
        if not np.array_equal(token_ids, ids):
            remedy = f"delete {place / key}*" if keeps else "mend or remove them"
            raise BadInput(f"{name}: other images could be read for tokens than for features; {remedy} and run again.")
    return Features(
        values=torch.from_numpy(values),
        labels=None if images.labels is None else torch.from_numpy(images.labels)[ids],
        name=name,
        classes=images.classes,
        paths=tuple(images.paths[row] for row in ids.tolist()),
        pooling=encoder.pooling,
        tokens=found_tokens,
    )


def _key(
    encoder: Encoder,
    images: ImageSet,
    batch_size: int,
    precision: str,
    device: torch.device,
    resize: str,
    squeeze: bool,
    patch: int,
) -> str:
    settings = [encoder.fingerprint, encoder.size, encoder.pooling, batch_size, precision, device.type]
    if (resize, squeeze) != ("bicubic", False):  # features of earlier versions are found as before
        settings += [resize, squeeze]
    if patch:
        settings += ["own aspect"]
    environment = [torch.__version__, kernels.describe(device)]
    digest = hashlib.sha256(f"{images.root}\n".encode())
    for index, (path, good) in enumerate(zip(images.paths, images.good.tolist())):
        digest.update(f"{path} {images.stamp(index) if good else None}\n".encode("utf-8", "surrogateescape"))
    return hashlib.sha256(json.dumps([settings, environment, digest.hexdigest()]).encode()).hexdigest()


def _stored(
    what: str,
    place: Path,
    key: str | None,
    images: ImageSet,
    name: str,
    encode: Callable[[Tensor], Tensor],
    how: tuple,
    together: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the encoded images, int64 [n], ascending, and their rows, mapped from a store; features without one in memory."""
    if key is not None:
        store = _Store(what, place / f"{key}-{what}", images, name)
        crew = _Crew(dist.rank(), dist.world_size()) if together else _Crew(0, 1)
        with _held(store.home, crew):
            if not store.complete:
                _fill(store, encode, how, crew)
        return store.read()
    home = Path(tempfile.mkdtemp(prefix=f"{what}-"))
    try:
        store = _Store(what, home, images, name)
        _fill(store, encode, how, _Crew(0, 1))
        ids, values = store.read()
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise
    if what == "features":
        values = np.array(values)
        shutil.rmtree(home, ignore_errors=True)
    return ids, values


@dataclass(frozen=True)
class _Crew:
    """Who fills a store: all ranks, of which this is one, or this process alone."""

    rank: int
    world: int

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def _held(home: Path, crew: _Crew) -> Iterator[None]:
    """The first holds the lock for all: another command that wants the same features waits."""
    with user_cache.locked(home) if crew.rank == 0 else nullcontext():
        crew.barrier()
        yield
        crew.barrier()


@dataclass
class _Store:
    """One array on the disk, written shard by shard by any number of ranks and runs."""

    what: str
    home: Path
    images: ImageSet
    name: str
    good: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.good = np.flatnonzero(self.images.good)

    @property
    def file(self) -> Path:
        return self.home / f"{self.what}.npy"

    @property
    def complete(self) -> bool:
        return (self.home / COMPLETE).exists()

    def note(self, shard: int) -> Path:
        return self.home / f"{shard:07d}.json"

    def allocate(self, row_shape: tuple[int, ...]) -> None:
        """The file at its full size, its holes without blocks yet; one of this shape stays with what was written."""
        dtype, shape = np.dtype(DTYPES[self.what]), (len(self.good), *row_shape)
        try:
            if self.file.exists() and np.load(self.file, mmap_mode="r").shape == shape:
                return
        except ValueError:
            pass
        self.home.mkdir(parents=True, exist_ok=True)
        _check_space(self.home.parent, self.what, dtype.itemsize * math.prod(shape), self.images)
        for note in self.home.glob("*.json"):
            note.unlink()
        np.lib.format.open_memmap(self.file, "w+", dtype, shape).flush()

    def pending(self, size: int) -> list[int]:
        """Shards of `size` rows that no run has finished."""
        written = {note.stem for note in self.home.glob("*.json")} if self.file.exists() else set()
        return [shard for shard in range(-(-len(self.good) // size)) if f"{shard:07d}" not in written]

    def finish(self, size: int) -> None:
        shards = range(-(-len(self.good) // size))
        left_out = [row for shard in shards for row in json.loads(self.note(shard).read_text())]
        about = {"left out": left_out, "bytes": self.file.stat().st_size}
        write_file(self.home / COMPLETE, lambda aside: aside.write_text(json.dumps(about)))
        for shard in shards:
            self.note(shard).unlink()

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and rows. Raises BadInput for a damaged store, or one without rows."""
        try:
            about = json.loads((self.home / COMPLETE).read_text())
            if self.file.stat().st_size != about["bytes"]:
                raise ValueError("the file was cut or replaced")
            # copy-on-write: torch wants memory that it might write to
            values, left_out = np.load(self.file, mmap_mode="c"), about["left out"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"the stored {self.what} in {self.home} are damaged ({error}); delete that folder."
            ) from error
        if left_out:
            keep = np.setdiff1d(np.arange(len(values)), left_out)
            return self.good[keep], values[keep]
        return self.good, values


def _fill(store: _Store, encode: Callable[[Tensor], Tensor], how: tuple, crew: _Crew) -> None:
    """This rank's share of what is not yet written; every rank calls this together."""
    size = SHARD * how[1]
    pending = dist.share(store.pending(size)) if crew.world > 1 else store.pending(size)
    mine = pending[crew.rank :: crew.world]
    rows = [np.arange(shard * size, min((shard + 1) * size, len(store.good))) for shard in mine]
    chosen = np.concatenate(rows) if rows else np.empty(0, np.int64)
    batches = _encoded(encode, store, chosen, crew.rank > 0, *how) if len(chosen) else iter(())
    first = next(batches, None)
    if crew.rank == 0 and pending:
        if first is None:
            raise BadInput(f"{store.name}: not one image of {store.images.split} could be read.")
        store.allocate(tuple(first[1].shape[1:]))
    crew.barrier()
    if first is not None:
        _write(store, mine, rows, first, batches)
    crew.barrier()
    if crew.rank == 0:
        store.finish(size)
    crew.barrier()


def _write(store: _Store, shards: list[int], rows: list[np.ndarray], first: tuple, batches: Iterator[tuple]) -> None:
    values = np.load(store.file, mmap_mode="r+")
    place, seen = 0, []

    def close(until: int | None) -> None:
        """Note the shards that end before this row: their rows are on the disk first."""
        nonlocal place, seen
        while place < len(shards) and (until is None or rows[place][-1] < until):
            values.flush()
            flush(store.file)
            written = np.intersect1d(rows[place], np.concatenate(seen) if seen else [])
            left_out = np.setdiff1d(rows[place], written).tolist()
            text = json.dumps(left_out)
            write_file(store.note(shards[place]), lambda aside, text=text: aside.write_text(text))
            place, seen = place + 1, [found for found in seen if found[-1] > rows[place][-1]]

    while first is not None:
        rows_B, encoded = first
        with np.errstate(over="ignore"):  # said below
            stored = encoded.numpy().astype(values.dtype)
        if not np.isfinite(stored).all():
            limit = " or more than fp16 holds" if store.what == "tokens" else " or infinity"
            raise BadInput(f"{store.what} of {store.name} contain NaN{limit}: these weights cannot be evaluated.")
        close(int(rows_B[0]))
        values[rows_B] = stored
        seen.append(rows_B)
        first = next(batches, None)
    close(None)


def _encoded(
    encode,
    store: _Store,
    rows: np.ndarray,
    quiet: bool,
    size,
    batch_size,
    device,
    precision,
    threads,
    resize,
    squeeze,
    patch,
) -> Iterator:
    """Batch by batch: rows of the store, ascending, and what `encode` makes of their images, fp32 on the CPU."""
    ids = store.good[rows]
    chosen = store.images if len(ids) == len(store.images) else subset(store.images, ids)
    batches = track(
        eval_batches(
            chosen, size, batch_size, device=device, threads=threads, resize=resize, squeeze=squeeze, patch=patch
        ),
        f"encoding {store.images.split}",
        total=-(-len(rows) // batch_size),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
    )
    for batch in batches:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            alike = by_shape(batch.images[0], None if batch.sizes is None else batch.sizes[:, 0])
            values = in_order([encode(group.images) for group in alike], alike).float().cpu()
        yield rows[batch.ids.numpy()], values


def _check_space(place: Path, what: str, needed: int, images: ImageSet) -> None:
    free = shutil.disk_usage(place).free
    if needed > free:
        raise BadInput(
            f"the {what} of {len(images):,} {images.split} images need {needed / 1e9:.1f} GB and {place} has "
            f"{free / 1e9:.1f} GB left: set TESSERA_CACHE (or TMPDIR without a cache) to a folder with more."
        )
