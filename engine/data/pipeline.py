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
from functools import partial

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, math, pipeline_def, types
from nvidia.dali.data_node import DataNode
from torch import Tensor

from engine.core.errors import BadInput
from engine.data import screen
from engine.data.augment import (
    AUTOCONTRAST,
    BLEND,
    EQUALIZE,
    SHARPNESS,
    TONES,
    WARP,
    Augmentation,
    byol_views,
    epoch_order,
    minimal,
    multi_crop,
    two_views,
    view_parameters,
    view_uniforms,
)
from engine.data.sources import ImageSet, check_bad, substitutes, usable_cpus

__all__ = [
    "Augmentation",
    "Batch",
    "TrainLoader",
    "byol_views",
    "each_once",
    "eval_batches",
    "minimal",
    "multi_crop",
    "two_views",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EVAL_MARGIN = 256 / 224  # the resized short side over the centre crop
SMALL = 64  # pixels; up to this an evaluated image is resized straight to the wanted size
MAX_THREADS = 16
QUEUE = 2  # batches made ahead
FILL = np.array([round(255 * value) for value in IMAGENET_MEAN], np.uint8).reshape(1, 1, 3)
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13

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
        views: what to make of each image; none reads no image, and batches tell ids only.
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
        self.images, self.views, self.batch_size, self.seed = images, tuple(views), batch_size, seed
        self.steps_per_epoch = len(images) // batch_size
        self._rows = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._files = _Files(images, [] if ledger is None else ledger)
        self._stream = None
        self._step = start_step  # of a loader without views
        if not self.views:
            return
        self._stream = _Stream(
            self._files,
            graph=partial(_view_graph, self.views),
            branches=any(view.operations for view in self.views),
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
            return next(self._stream)
        step, (ids, _) = self._step, self._plan(self._step)
        self._step += 1
        return _batch(self.images, step, ids, ())

    def close(self) -> None:
        """Frees the pipeline; batches already given stay valid."""
        if self._stream is not None:
            self._stream.close()

    def _plan(self, step: int) -> tuple[np.ndarray, Inputs]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self.images), self.seed, epoch)
        chosen = self._order[1][place * self.batch_size :][self._rows]
        ids = self._files.substitute[chosen]
        return ids, _view_inputs(self.views, self.images.sizes[ids], self._rows, self.seed, step)


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
        graph=partial(_eval_graph, size),
        branches=False,
        plan=plan,
        batch=batch_size,
        device=torch.device(device),
        threads=threads,
        start=0,
    )


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
    files = _Files(images, [] if ledger is None else ledger)
    share = -(-len(images) // (world * batch_size)) * batch_size

    def plan(step: int) -> tuple[np.ndarray, Inputs]:
        if step * batch_size >= share:
            raise StopIteration
        start = rank * share + step * batch_size
        rows = slice(start, start + batch_size)
        ids = files.substitute[np.arange(rows.start, rows.stop).clip(max=len(images) - 1)]
        return ids, _view_inputs(views, images.sizes[ids], rows, seed, turn)

    return _Stream(
        files,
        graph=partial(_view_graph, tuple(views)),
        branches=any(view.operations for view in views),
        plan=plan,
        batch=batch_size,
        device=torch.device(device),
        threads=threads,
        start=0,
    )


def _view_inputs(views: Sequence[Augmentation], sizes_B2: np.ndarray, rows: slice, seed: int, step: int) -> Inputs:
    """What the graph of these views wants for these rows of a step."""
    inputs = {}
    for index, view in enumerate(views):
        parameters = view_parameters(view, sizes_B2, view_uniforms(rows, seed, step, index))
        inputs |= {f"{index}.{key}": value for key, value in parameters.items()}
    return inputs


def _batch(images: ImageSet, step: int, ids: np.ndarray, views: tuple[Tensor, ...]) -> Batch:
    labels = None if images.labels is None else torch.from_numpy(images.labels[ids])
    return Batch(ids=torch.from_numpy(ids), images=views, labels=labels, step=step)


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
    """Runs a pipeline over numbered steps; builds it anew, at the same step, without a file that it cannot decode.

    `branches`: whether the graph has an `if` about a node, which costs the build a rewriting of its functions.
    """

    def __init__(
        self,
        files: _Files,
        graph: Callable[[DataNode, Mapping[str, DataNode], str], tuple[DataNode, ...]],
        branches: bool,
        plan: Callable[[int], tuple[np.ndarray, Inputs]],
        batch: int,
        device: torch.device,
        threads: int | None,
        start: int,
    ):
        self._files, self._graph, self._branches, self._plan, self._batch = files, graph, branches, plan, batch
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
        step, ids = self._step, self._flying.pop(self._step)
        self._step += 1
        # the dynamic executor gives the buffers away: they are not written again while a tensor refers to them
        views = tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)
        return _batch(self._files.images, step, ids, views)

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

        def define() -> tuple[DataNode, ...]:
            paths, *given = fn.external_source(give, num_outputs=1 + len(names), batch=True)
            return self._graph(_read(paths), dict(zip(names, given)), self._decoder)

        pipeline = pipeline_def(define, enable_conditionals=self._branches)(
            batch_size=self._batch,
            num_threads=self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=QUEUE,
            exec_dynamic=True,
        )
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
        if "shift" in parameters:
            window = {"start": parameters["shift"], "shape": view.size[::-1], "axis_names": "WH"}
            pixels = fn.slice(pixels, **window, out_of_bounds_policy="pad", fill_values=0)
        for number in range(view.operations):
            operation = [parameters[f"{name}{number}"] for name in ("kind", "matrix", "tones", "blend")]
            pixels = _operate(pixels, view.size, *operation, decoder)
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


def _operate(
    pixels: DataNode,
    size: tuple[int, int],
    kind: DataNode,
    matrix: DataNode,
    tones: DataNode,
    blend: DataNode,
    decoder: str,
) -> DataNode:
    """One operation of RandAugment, the one of each image alone. Rounding is Pillow's: blends cut off."""
    device = "cpu" if decoder == "cpu" else "gpu"
    if kind == WARP:
        pixels = _warp(pixels, size, matrix, device)
    elif kind == TONES:
        pixels = _change_tones(pixels, tones if device == "cpu" else tones.gpu())
    elif kind == BLEND:
        numbers = blend if device == "cpu" else blend.gpu()
        grey = fn.color_space_conversion(pixels, image_type=types.RGB, output_type=types.GRAY)
        mean = math.floor(fn.reductions.mean(grey, axes=(0, 1), keep_dims=True) + 0.5)
        pixels = _cut(pixels * numbers[0] + (1 - numbers[0]) * (numbers[1] * grey + numbers[2] * mean))
    elif kind == SHARPNESS:
        numbers = blend if device == "cpu" else blend.gpu()
        smooth = fn.filter(pixels, types.Constant(SMOOTH, device=device))
        within = types.Constant(
            np.pad(np.ones((size[0] - 2, size[1] - 2, 1), np.float32), ((1, 1), (1, 1), (0, 0))), device=device
        )
        pixels = _cut(pixels + (1 - numbers[0]) * within * (fn.cast(smooth, dtype=types.FLOAT) - pixels))
    elif kind == AUTOCONTRAST:
        low = fn.reductions.min(pixels, axes=(0, 1), keep_dims=True)
        high = fn.reductions.max(pixels, axes=(0, 1), keep_dims=True)
        flat = low == high  # such a channel stays as it is
        reach = fn.cast(high, dtype=types.FLOAT) - low + 255 * flat
        pixels = _cut((fn.cast(pixels, dtype=types.FLOAT) - low * (low != high)) * (255 / reach))
    elif kind == EQUALIZE:
        pixels = fn.equalize(pixels)
    return pixels


def _warp(pixels: DataNode, size: tuple[int, int], matrix: DataNode, device: str) -> DataNode:
    """Bilinear; what comes from outside the image is the mean colour, with a sharp edge as in Pillow."""
    warped = fn.warp_affine(pixels, matrix=matrix, interp_type=types.INTERP_LINEAR)
    rows_columns = np.mgrid[: size[0], : size[1]].astype(np.float32)[..., None] + 0.5
    y, x = (types.Constant(places, device=device) for places in rows_columns)
    m = matrix if device == "cpu" else matrix.gpu()
    source_x, source_y = (m[axis, 0] * x + m[axis, 1] * y + m[axis, 2] for axis in (0, 1))
    inside = (source_x >= 0) & (source_x < size[1]) & (source_y >= 0) & (source_y < size[0])
    return warped * inside + types.Constant(FILL, device=device) * (inside ^ True)


def _change_tones(pixels: DataNode, tones: DataNode) -> DataNode:
    pixels = pixels & tones[0]
    pixels = pixels ^ ((pixels >= tones[1]) * tones[2])
    return pixels + (pixels < 128) * tones[3]


def _cut(values: DataNode) -> DataNode:
    """Floats to bytes, cut off to whole numbers from 0 to 255."""
    return fn.cast(math.clamp(math.floor(values), 0, 255), dtype=types.UINT8)


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
