"""The loader: one DALI pipeline for GPUs (nvJPEG) and for machines without one.

The pipeline holds no state. Every step's file names, crops and colours come from `engine.data.augment`, which computes
them from the step number alone; so a loader started at step s gives what a loader that ran to s would give, and rank r
of N gives rows r*b to (r+1)*b of what a single process gives. Where one view is wanted only its crop is decoded; more
views are cut from one decoded image. On a GPU, ids, crops and colours are equal for any number of ranks, while pixels
may differ in the last bit, because nvJPEG shares a batch out to several decoders.

Every accepted file becomes RGB: grey is repeated, palettes are looked up, CMYK is converted, alpha is dropped, 16 bits
are scaled to 8. EXIF orientation is ignored.

Shape suffixes: B images, 2 is (width, height) or (x, y).
"""

import os
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode
from torch import Tensor

from engine.data import screen
from engine.data.augment import (
    Augmentation,
    byol_views,
    epoch_order,
    minimal,
    multi_crop,
    view_parameters,
    view_uniforms,
)
from engine.data.sources import ImageSet, check_bad, substitutes, usable_cpus
from engine.errors import BadInput

__all__ = ["Augmentation", "Batch", "TrainLoader", "byol_views", "eval_batches", "minimal", "multi_crop"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EVAL_MARGIN = 256 / 224  # the resized short side over the centre crop
SMALL = 64  # pixels; up to this an evaluated image is resized straight to the wanted size
MAX_THREADS = 16
QUEUE = 2  # batches made ahead

Inputs = Mapping[str, np.ndarray]  # by name, one row per image


@dataclass(frozen=True)
class Batch:
    """This rank's part of one step; its memory is its own.

    Attributes:
        ids: int64 [b] on the CPU: the images that were read (a bad file's substitute, not the bad file).
        images: one fp32 [b, 3, H, W] on the device per view, normalised by ImageNet's mean and standard deviation.
        labels: int64 [b] on the CPU, or None where the set has no classes.
        step: the global step, or for evaluation the number of the batch.
    """

    ids: Tensor
    images: tuple[Tensor, ...]
    labels: Tensor | None
    step: int


class TrainLoader:
    """Endless batches of augmented views; next() gives the steps start_step, start_step + 1, ...

    Every epoch is a fresh permutation of all ids without the last incomplete global batch. A file that turns out bad
    only now is replaced by the next good one (as `ImageSet.substitute` does) and noted in the ledger, and the step is
    made again.

    Args:
        images: the set to read.
        views: what to make of each image.
        batch_size: images of a step over all ranks.
        seed: not negative; order and augmentation depend on nothing else but the step.
        rank, world: which part of each batch this process makes.
        device: "cpu" or a CUDA device, for decoding and augmentation, and where the batches lie.
        threads: of the CPU part; default: the usable cores shared by the processes of this machine, at most 16.
        start_step: the first step.
        ledger: receives (path, reason) of every file that this process finds bad while training.

    Raises:
        BadInput: batch larger than the set or not divisible by `world`; while iterating: more bad files, those of
            screening and those that this process found, than the set's bad_limit.
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
        ledger: MutableSequence[tuple[str, str]] | None = None,
    ):
        if not 0 < batch_size <= len(images):
            raise BadInput(f"batch size {batch_size} is impossible: choose 1 to {len(images)}, the number of images")
        if batch_size % world:
            raise BadInput(f"batch size {batch_size} cannot be shared by {world} ranks: choose a multiple of {world}")
        if seed < 0:
            raise BadInput(f"seed {seed} is negative: choose 0 or above")
        if not views:
            raise BadInput("no views are asked for: choose at least one")
        self.images, self.views, self.batch_size, self.seed = images, tuple(views), batch_size, seed
        self.steps_per_epoch = len(images) // batch_size
        self._rows = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._files = _Files(images, [] if ledger is None else ledger)
        self._stream = _Stream(
            self._files,
            graph=lambda encoded, given, decoder: _view_graph(self.views, encoded, given, decoder),
            plan=self._plan,
            batch=batch_size // world,
            device=torch.device(device),
            threads=threads,
            start=start_step,
        )

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        return next(self._stream)

    def close(self) -> None:
        """Frees the pipeline; batches already given stay valid."""
        self._stream.close()

    def _plan(self, step: int) -> tuple[np.ndarray, Inputs]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self.images), self.seed, epoch)
        chosen = self._order[1][place * self.batch_size :][self._rows]
        ids = self._files.substitute[chosen]
        inputs = {}
        for index, view in enumerate(self.views):
            uniforms = view_uniforms(self._rows, self.seed, step, index)
            parameters = view_parameters(view, self.images.sizes[ids], uniforms)
            inputs |= {f"{index}.{key}": value for key, value in parameters.items()}
        return ids, inputs


def eval_batches(
    images: ImageSet,
    size: tuple[int, int],
    batch_size: int,
    *,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    ledger: MutableSequence[tuple[str, str]] | None = None,
) -> Iterator[Batch]:
    """Every good image once, in order of id; bad ones are left out, the last batch may be short.

    The image is resized (bicubic, antialiased) to cover 256/224 of `size` (height, width) and the centre is cut out; up
    to 64 pixels it is resized straight to `size`.

    Raises:
        BadInput: while iterating, if files turn out bad beyond the limit.
    """
    if batch_size < 1:
        raise BadInput(f"batch size {batch_size} is too small: choose 1 or above")
    files = _Files(images, [] if ledger is None else ledger)

    def plan(step: int) -> tuple[np.ndarray, Inputs]:
        # batches already given hold files that stay good, so the steps keep their place when one is found bad later
        ids = np.flatnonzero(files.good)[step * batch_size : (step + 1) * batch_size].copy()
        if not len(ids):
            raise StopIteration
        return ids, _centre_crops(images.sizes[ids], size)

    return _Stream(
        files,
        graph=lambda encoded, given, decoder: _eval_graph(size, encoded, given, decoder),
        plan=plan,
        batch=batch_size,
        device=torch.device(device),
        threads=threads,
        start=0,
    )


class _Files:
    """What is known of the files by now: the verdicts of screening and those of training."""

    def __init__(self, images: ImageSet, ledger: MutableSequence[tuple[str, str]]):
        self.images, self.ledger = images, ledger
        self.good, self.substitute = images.good, images.substitute
        self.bad = (*images.bad, *ledger)
        if ledger:  # a resumed run knows what it had found
            found = {path for path, _ in ledger}
            self.good &= np.array([path not in found for path in images.paths])
            self.substitute = substitutes(self.good)

    def path(self, index: int) -> np.ndarray:
        """uint8 [characters], as DALI takes a file name."""
        return np.frombuffer(os.fsencode(f"{self.images.root}/{self.images.paths[index]}"), np.uint8)

    def condemn(self, index: int, reason: str) -> None:
        entry = (self.images.paths[index], reason)
        self.ledger.append(entry)
        self.bad += (entry,)
        self.good[index] = False
        check_bad(self.bad, len(self.images), self.images.bad_limit, "the run's ledger")
        self.substitute = substitutes(self.good)


class _Stream:
    """Runs a pipeline over numbered steps; builds it anew, at the same step, without a file that it cannot decode."""

    def __init__(
        self,
        files: _Files,
        graph: Callable[[DataNode, Mapping[str, DataNode], str], tuple[DataNode, ...]],
        plan: Callable[[int], tuple[np.ndarray, Inputs]],
        batch: int,
        device: torch.device,
        threads: int | None,
        start: int,
    ):
        self._files, self._graph, self._plan, self._batch = files, graph, plan, batch
        on_gpu = device.type == "cuda"
        self._device_id = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._threads = threads or max(1, min(MAX_THREADS, usable_cpus() // local_processes))
        self._step, self._retried = start, -1
        self._flying: dict[int, np.ndarray] = {}
        self._pipeline: Pipeline | None = None

    def __iter__(self) -> "_Stream":
        return self

    def __next__(self) -> Batch:
        while True:
            self._pipeline = self._pipeline or self._build()
            try:
                outputs = self._pipeline.run()
                break
            except RuntimeError as error:
                self._mend(error)
        step, ids = self._step, torch.from_numpy(self._flying.pop(self._step))
        self._step += 1
        labels = self._files.images.labels
        return Batch(
            ids=ids,
            # the dynamic executor gives the buffer away: it is not written again while a tensor refers to it
            images=tuple(torch.from_dlpack(output.as_tensor()) for output in outputs),
            labels=None if labels is None else torch.from_numpy(labels[ids.numpy()]),
            step=step,
        )

    def close(self) -> None:
        self._pipeline = None
        self._flying.clear()

    def _build(self) -> Pipeline:
        first = self._step
        names = list(self._plan(first)[1])

        def give(iteration: int) -> list:
            ids, inputs = self._plan(first + iteration)
            self._flying[first + iteration] = ids
            return [[self._files.path(index) for index in ids], *(inputs[name] for name in names)]

        pipeline = Pipeline(
            batch_size=self._batch,
            num_threads=self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=QUEUE,
            exec_dynamic=True,
        )
        with pipeline:
            paths, *given = fn.external_source(give, num_outputs=1 + len(names), batch=True)
            inputs = dict(zip(names, given, strict=True))
            pipeline.set_outputs(*self._graph(_read(paths), inputs, self._decoder))
        pipeline.build()
        return pipeline

    @property
    def _decoder(self) -> str:
        return "cpu" if self._device_id is None else "mixed"

    def _mend(self, error: RuntimeError) -> None:
        """Finds the bad files of the first failing step in flight; without one, tries the step once more."""
        flying, self._flying, self._pipeline = self._flying, {}, None
        for step in sorted(flying):
            if found := self._undecodable(flying[step]):
                for index, reason in found.items():
                    self._files.condemn(index, reason)
                return
        if self._retried == self._step:
            raise error
        self._retried = self._step

    def _undecodable(self, ids: np.ndarray) -> dict[int, str]:
        """{id: reason} of the files that fail when decoded alone, as the pipeline decodes them."""
        images, found, pipeline = self._files.images, {}, None
        for index in np.unique(ids).tolist():
            pipeline = pipeline or _one_file_pipeline(self._device_id, self._decoder)
            try:
                (pixels,) = pipeline.run(path=[self._files.path(index)])
                height, width, _ = pixels.shape()[0]
                if (width, height) != tuple(images.sizes[index]):
                    found[index] = f"changed: {width}x{height} pixels now"
            except RuntimeError:
                _, reason = screen.inspect(images.root / images.paths[index], decode=True)
                found[index], pipeline = reason or "unreadable: the decoder refuses it", None
        return found


def _one_file_pipeline(device_id: int | None, decoder: str) -> Pipeline:
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1, exec_dynamic=True)
    with pipeline:
        pipeline.set_outputs(_decode(_read(fn.external_source(name="path")), decoder))
    pipeline.build()
    return pipeline


def _read(paths: DataNode) -> DataNode:
    return fn.io.file.read(paths, dont_use_mmap=True)  # a mapped file that shrinks meanwhile would kill the process


def _decode(encoded: DataNode, decoder: str) -> DataNode:
    return fn.decoders.image(encoded, device=decoder, output_type=types.RGB, adjust_orientation=False)


def _view_graph(
    views: Sequence[Augmentation], encoded: DataNode, given: Mapping[str, DataNode], decoder: str
) -> tuple[DataNode, ...]:
    image = _decode(encoded, decoder) if len(views) > 1 else None
    outputs = []
    for index, view in enumerate(views):
        parameters = {key.split(".")[1]: node for key, node in given.items() if key.startswith(f"{index}.")}
        crop = {key: parameters[key] for key in ("start", "shape")}
        if image is None:
            pixels = fn.decoders.image_slice(
                encoded, **crop, axis_names="WH", device=decoder, output_type=types.RGB, adjust_orientation=False
            )
        else:
            pixels = fn.slice(image, **crop, axis_names="WH")
        pixels = fn.resize(pixels, size=view.size, interp_type=types.INTERP_CUBIC, antialias=True)
        if "hue" in parameters:
            colours = {key: parameters[key] for key in ("brightness", "contrast", "saturation", "hue")}
            pixels = fn.color_twist(pixels, **colours)
        if "sigma" in parameters:
            pixels = fn.gaussian_blur(pixels, sigma=parameters["sigma"], window_size=parameters["window"])
        if "solarize_from" in parameters:
            start = parameters["solarize_from"] if decoder == "cpu" else parameters["solarize_from"].gpu()
            pixels = pixels ^ ((pixels >= start) * types.Constant(255).uint8())  # 255 - value, where it is bright
        outputs.append(_normalise(pixels, mirror=parameters.get("mirror", 0)))
    return tuple(outputs)


def _eval_graph(
    size: tuple[int, int], encoded: DataNode, given: Mapping[str, DataNode], decoder: str
) -> tuple[DataNode, ...]:
    image = fn.resize(_decode(encoded, decoder), size=given["resized"], interp_type=types.INTERP_CUBIC, antialias=True)
    return (_normalise(image, crop=size, crop_pos_x=given["left"], crop_pos_y=given["top"]),)


def _normalise(pixels: DataNode, **crop: DataNode | tuple[int, int] | int) -> DataNode:
    mean, std = ([255 * value for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return fn.crop_mirror_normalize(pixels, mean=mean, std=std, dtype=types.FLOAT, output_layout="CHW", **crop)


def _centre_crops(sizes_B2: np.ndarray, size: tuple[int, int]) -> Inputs:
    """The resized (height, width) float32 [B, 2] of each image, and where its centre crop lies: left, top in [0, 1]."""
    target_2 = np.array(size[::-1])
    if max(size) <= SMALL:
        resized_B2 = np.broadcast_to(target_2, sizes_B2.shape)
    else:
        cover_2 = np.round(target_2 * EVAL_MARGIN)
        scale_B1 = (cover_2 / sizes_B2).max(1, keepdims=True)
        resized_B2 = np.maximum(np.floor(sizes_B2 * scale_B1 + 1e-6), cover_2)
    room_B2 = resized_B2 - target_2
    place_B2 = np.round(room_B2 / 2) / np.maximum(room_B2, 1)
    columns = {"resized": resized_B2[:, ::-1], "left": place_B2[:, 0], "top": place_B2[:, 1]}
    return {name: np.ascontiguousarray(column, np.float32) for name, column in columns.items()}
