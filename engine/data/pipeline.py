"""The loaders: which images every step shows, and what is made of them.

One DALI pipeline serves GPUs (nvJPEG) and machines without one, and it holds no state. Every step's file names, crops and colours
come from `engine.data.augment`, which computes them from the step number alone; so a loader started at step s gives what a loader
that ran to s would give, and rank r of N gives rows r*b to (r+1)*b of what a single process gives. On a GPU, ids, crops and
colours are equal for any number of ranks, while pixels may differ in the last bit, because nvJPEG shares a batch out to several
decoders.
"""

from collections.abc import Callable, Iterator, MutableSequence, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from engine.core.draws import seed_of
from engine.core.errors import BadInput
from engine.data.augment import epoch_order
from engine.data.batch import Batch
from engine.data.graph import Inputs, branches, centre_graph, centre_inputs, view_graph, view_inputs
from engine.data.made import Made
from engine.data.shapes import shown_sizes, turns
from engine.data.sources import ImageSet
from engine.data.stream import Files, Stream
from engine.data.views import Augmentation


class TrainLoader:
    """Endless batches of augmented views; next() gives the steps start_step, start_step + 1, ...

    Every epoch is a fresh permutation of all ids without the last incomplete global batch. A file that turns out bad
    only now is replaced by the next good one (as `ImageSet.substitute` does) and noted in the ledger, and the step is
    made again.

    Args:
        images: the set to read.
        views: what to make of each image; none reads no image, and batches tell ids only.
        batch_size: images of a step over all ranks.
        seed: not negative; order and augmentation depend on nothing else but the step.
        rank, world: which part of each batch this process makes.
        device: "cpu" or a CUDA device, for decoding and augmentation, and where the batches lie.
        threads: of the CPU part; default: the usable cores shared by the processes of this machine, at most 16.
        start_step: the first step.
        place: of a step its epoch, and the position of its first image in the epoch's order; default: batch after batch from the
            first epoch on.
        ledger: receives (path, reason) of every file that this process finds bad while training.

    Raises:
        BadInput: batch larger than the set or not divisible by `world`; while iterating: no good file is left, or the storage
            stays away.
    """

    def __init__(
        self,
        images: ImageSet,
        views: Sequence[Augmentation],
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
        threads: int | None = None,
        start_step: int = 0,
        place: Callable[[int], tuple[int, int]] | None = None,
        ledger: MutableSequence[tuple[str, str]] | None = None,
    ):
        if not 0 < batch_size <= len(images):
            raise BadInput(f"batch size {batch_size} is impossible: choose 1 to {len(images)}, the number of images")
        if batch_size % world:
            raise BadInput(f"batch size {batch_size} cannot be shared by {world} ranks: choose a multiple of {world}")
        if seed < 0:
            raise BadInput(f"seed {seed} is negative: choose 0 or above")
        self.images, self.views, self.batch_size, self.seed = images, tuple(views), batch_size, seed
        self.steps_per_epoch = len(images) // batch_size
        self._place = place or self._batch_after_batch
        self._rows = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._files = Files(images, [] if ledger is None else ledger, patient=True)
        self._stream: Stream | Made | None = None
        self._step = start_step  # of a loader without views
        if not self.views:
            return
        if images.synthetic:
            sizes = [view.size for view in self.views]
            self._stream = Made(images, sizes, self._ids, torch.device(device), seed, start_step)
            return
        self._stream = Stream(
            self._files,
            graph=partial(view_graph, self.views),
            branches=branches(self.views),
            plan=self._plan,
            batch=batch_size // world,
            device=torch.device(device),
            threads=threads,
            start=start_step,
        )

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._stream is not None:
            return _with_sizes(next(self._stream), self.images, self.views, self._rows, self.seed)
        step, ids = self._step, self._ids(self._step)
        self._step += 1
        return Batch.of(self.images, step, ids, ())

    def close(self) -> None:
        """Frees the pipeline; batches already given stay valid."""
        if self._stream is not None:
            self._stream.close()

    @property
    def over_limit(self) -> bool:
        """Whether more files are bad, by screening and by what this process found, than the set's bad_limit allows."""
        return self._files.too_many

    def _ids(self, step: int) -> np.ndarray:
        epoch, position = self._place(step)
        if self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self.images), self.seed, epoch)
        # steps that are made ahead past those of this batch have places of other batches, and are thrown away
        position = min(position, len(self.images) - self.batch_size)
        chosen = self._order[1][position:][self._rows]
        return self._files.substitute[chosen]

    def _batch_after_batch(self, step: int) -> tuple[int, int]:
        epoch, place = divmod(step, self.steps_per_epoch)
        return epoch, place * self.batch_size

    def _plan(self, step: int) -> tuple[np.ndarray, Inputs]:
        ids = self._ids(step)
        return ids, view_inputs(self.views, self.images.sizes[ids], self._rows, self.seed, step)


def eval_batches(
    images: ImageSet,
    size: tuple[int, int],
    batch_size: int,
    *,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    ledger: MutableSequence[tuple[str, str]] | None = None,
    resize: str = "bicubic",
    squeeze: bool = False,
    patch: int = 0,
) -> Iterator[Batch]:
    """Every good image once, in order of id; bad ones are left out, the last batch may be short.

    The image is resized (antialiased) to cover 256/224 of `size` (height, width) and the centre is cut out; up to 64 pixels, and
    with `squeeze`, it is resized straight to `size`.

    Args:
        resize: the filter, one of `engine.data.views.RESIZES`.
        patch: above 0, the whole image is resized with its own aspect instead, as views are that have a `patch`.

    Raises:
        BadInput: while iterating, if files turn out bad beyond the limit.
    """
    if batch_size < 1:
        raise BadInput(f"batch size {batch_size} is too small: choose 1 or above")
    files = Files(images, [] if ledger is None else ledger)

    def ids_of(step: int) -> np.ndarray:
        # batches already given hold files that stay good, so the steps keep their place when one is found bad later
        ids = np.flatnonzero(files.good)[step * batch_size : (step + 1) * batch_size].copy()
        if not len(ids):
            raise StopIteration
        return ids

    def plan(step: int) -> tuple[np.ndarray, Inputs]:
        ids = ids_of(step)
        return ids, centre_inputs(images.sizes[ids], size, squeeze)

    whole = Augmentation(size, (1.0, 1.0), patch=patch, resize=resize, flip=0.0)

    def plan_whole(step: int) -> tuple[np.ndarray, Inputs]:
        ids = ids_of(step)
        return ids, view_inputs([whole], images.sizes[ids], slice(0, len(ids)), 0, 0)

    if images.synthetic:
        batches = Made(images, [size], ids_of, torch.device(device), 0, 0)
    else:
        batches = Stream(
            files,
            graph=partial(view_graph, [whole]) if patch else partial(centre_graph, size, resize),
            branches=False,
            plan=plan_whole if patch else plan,
            batch=batch_size,
            device=torch.device(device),
            threads=threads,
            start=0,
        )
    return (_with_sizes(batch, images, [whole], slice(0, len(batch.ids)), 0) for batch in batches) if patch else batches


def each_once(
    images: ImageSet,
    views: Sequence[Augmentation],
    batch_size: int,
    *,
    seed: int,
    turn: int,
    rank: int = 0,
    world: int = 1,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    ledger: MutableSequence[tuple[str, str]] | None = None,
) -> Iterator[Batch]:
    """This rank's share of all ids, in order: ids rank * share to (rank + 1) * share, where share is a multiple of `batch_size`.

    Past the last id comes that one again and again, so that all batches are full and all ranks have equally many. Crops depend on
    seed, turn and id alone.

    Args:
        batch_size: images of a batch of this rank.
        turn: other turns give other crops.

    Raises:
        BadInput: while iterating, if files turn out bad beyond the limit.
    """
    files = Files(images, [] if ledger is None else ledger)
    share = -(-len(images) // (world * batch_size)) * batch_size

    def ids_of(step: int) -> np.ndarray:
        if step * batch_size >= share:
            raise StopIteration
        start = rank * share + step * batch_size
        return files.substitute[np.arange(start, start + batch_size).clip(max=len(images) - 1)]

    def plan(step: int) -> tuple[np.ndarray, Inputs]:
        ids, start = ids_of(step), rank * share + step * batch_size
        return ids, view_inputs(views, images.sizes[ids], slice(start, start + batch_size), seed, turn)

    if images.synthetic:
        return Made(images, [view.size for view in views], ids_of, torch.device(device), seed_of(seed, turn), 0)
    return Stream(
        files,
        graph=partial(view_graph, tuple(views)),
        branches=branches(views),
        plan=plan,
        batch=batch_size,
        device=torch.device(device),
        threads=threads,
        start=0,
    )


def _with_sizes(batch: Batch, images: ImageSet, views: Sequence[Augmentation], rows: slice, seed: int) -> Batch:
    """The batch, which says how large its images are where a view has their own aspect: as they were drawn for these rows."""
    if not any(view.patch for view in views):
        return batch
    sizes_B2, shown = images.sizes[batch.ids.numpy()], []
    for index, view in enumerate(views):
        turns_B = turns(view, rows, seed, batch.step, index)
        shown.append(shown_sizes(view, sizes_B2, turns_B) if view.patch else np.broadcast_to(view.size, sizes_B2.shape))
    return replace(batch, sizes=torch.from_numpy(np.stack(shown, 1)))
