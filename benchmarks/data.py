"""Images/s of the loader alone, for one crop, two views and ten crops of an image, beside other loaders.

    python -m benchmarks.data

    ours                  the engine's loader on a folder
    ours, linear colours  the same, but that colours are jittered in one linear map, which is no author's way
    ours, shards          the same files, packed by engine.shard and read where they lie
    torchvision, tensors  torch's DataLoader; decoded to uint8 tensors, v2 transforms of tensors
    torchvision, Pillow   torch's DataLoader; decoded by Pillow, v2 transforms of its images
    timm                  timm's loader for training; of one cropped and flipped view, the only one it makes
    spdl                  SPDL's pipeline of threads, where it is installed (uv run --group peers ...)

All read the same files and give normalised fp32 batches on the CPU: RandomResizedCrop and flip (MAE), BYOL's two views, DINO's
2 large and 8 small crops. Each has so many threads, or worker processes, and is taken at its best: workers stay, two batches are
made ahead, bytes are handed over and normalised a batch at a time by the process that takes them. That process comes on top of
its workers, as the one that draws the crops does in ours, so images are also counted for each second of a core that all
processes of a loader took together, which is what counts where other work shares the machine.

Candidates are timed in turn, round by round (as in `benchmarks.rounds`), each from the moment on where what it had made ahead is
used up, and rests while others run. What part of ours takes how much of its processor time comes from the same loader without
the rest: files read, crops drawn and batches handed over; decoding besides; and all.
"""

import importlib.util
import itertools
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali
import timm
import torch
import torchvision
from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode
from rich.console import Console
from rich.table import Table

from benchmarks import photographs, rounds
from benchmarks.peers.loaders import AHEAD, Spdl, Timm, Torchvision
from engine.core.errors import BadInput
from engine.data.augment import epoch_order
from engine.data.graph import Graph, branches, decode, view_graph, view_inputs
from engine.data.shards.packing import How, Packing
from engine.data.sources import ImageSet, open_images
from engine.data.stream import QUEUE, Files, Stream
from engine.data.views import Augmentation, byol_views, minimal, multi_crop

OURS, LINEAR, SHARDS, TENSORS, PILLOW, TIMM, SPDL = (
    "ours",
    "ours, linear colours",
    "ours, shards",
    "torchvision, tensors",
    "torchvision, Pillow",
    "timm",
    "spdl",
)
PEERS = (TENSORS, PILLOW, TIMM, SPDL)
RATES = ("images_per_second", "images_per_core_second")
PARTS = ("ours, files only", "ours, decoded only")
Epoch = Callable[[int], Iterator[Any]]  # of a round: at least as many batches as are asked for


@dataclass(frozen=True)
class Options(rounds.Recorded):
    """Time loaders alone."""

    data: str = ""
    """A folder of images; empty: photographs of ImageNet's size and form."""
    images: int = 256
    """How many photographs, where no folder is named."""
    views: tuple[str, ...] = ("mae", "byol", "dino")
    """What is made of each image: mae (one crop), byol (two views), dino (2 large and 8 small crops)."""
    threads: tuple[int, ...] = (1, 2)
    """Threads, or worker processes, of a loader."""
    batch_size: int = 32
    """Images of a batch; of DINO's crops a quarter of it."""
    batches: int = 4
    """Batches of a loader that are timed in a round."""
    image_size: int = 224
    """Side of a large crop in pixels."""
    rounds: int = 3


def measure(options: Options) -> dict[str, Any]:
    """Time every loader; returns the record. A peer that is not installed says why under "left_out"."""
    _check(options)
    torch.set_num_threads(1)  # of the process that takes the batches
    images = open_images(options.data or photographs.write(options.images), "train")
    with tempfile.TemporaryDirectory() as folder:
        Packing({"train": images}, Path(folder), How()).run(None, lambda _: None)
        return _of_images(images, open_images(folder, "train"), options)


def _of_images(images: ImageSet, shards: ImageSet, options: Options) -> dict[str, Any]:
    batch = options.batch_size
    if batch > len(images):
        raise BadInput(f"--batch-size is {batch}, but there are {len(images)} images; choose at most so many.")
    left_out = {}
    if importlib.util.find_spec("spdl") is None:
        left_out[SPDL] = "it is not installed; the dependency group peers has it"
    found = {}
    for name, threads in itertools.product(options.views, options.threads):
        views = _views(name, options.image_size)
        found[f"{name}, {threads}"] = case = _in_turn(images, shards, views, name, threads, options, left_out)
        rates = ", ".join(f"{loader} {_rate(case, loader):,.1f}" for loader in case["median"])
        print(f"{name} with {threads} thread(s), images/s: {rates}", file=sys.stderr)
    paths = [Path(images.root, path) for path in images.paths]
    return {
        "options": asdict(options),
        "device": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__,
        "dali": nvidia.dali.__version__,
        "files": {
            "count": len(images),
            "mean_bytes": statistics.mean(path.stat().st_size for path in paths),
            "median_sides": np.median(images.sizes[images.good], 0).tolist(),
        },
        "left_out": left_out,
        "cases": found,
    }  # fmt: skip


def _check(options: Options) -> None:
    rounds.check(options, "batch_size", "batches", "images", "image_size", "rounds")
    if wrong := [name for name in options.views if name not in ("mae", "byol", "dino")]:
        raise BadInput(f"--views has no {wrong[0]!r}; choose from mae, byol, dino.")
    for name in ("views", "threads"):
        if not getattr(options, name):
            raise BadInput(f"--{name} is empty; name at least one.")
    if min(options.threads) < 1:
        raise BadInput(f"--threads is {min(options.threads)}; it must be a whole number from 1.")


def _views(name: str, side: int) -> tuple[Augmentation, ...]:
    """The views of the published recipes of MAE, BYOL and DINO; small crops are 96 pixels beside large ones of 224."""
    size, small = (side, side), (round(side * 96 / 224),) * 2
    if name == "mae":
        return (minimal(size),)
    if name == "byol":
        return byol_views(size)
    return multi_crop(size, small, 2, 8, (0.4, 1.0), (0.05, 0.4))


def _in_turn(
    images: ImageSet,
    shards: ImageSet,
    views: Sequence[Augmentation],
    name: str,
    threads: int,
    options: Options,
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    """The rounds of all loaders that make these views, their medians, and the shares of ours."""
    batch = max(1, options.batch_size // 4) if name == "dino" else options.batch_size
    ahead = max(QUEUE, AHEAD * threads)  # batches that a loader may have made before it is timed, and after
    warm = ahead + ahead % threads + threads  # workers give their batches in turn, one burst after another
    count = warm + options.batches + ahead
    candidates = _candidates(images, shards, views, batch, count, threads, left_out)
    found: dict[str, list[dict[str, float]]] = {loader: [] for loader in candidates}
    for number in range(-1, options.rounds):  # the first starts workers and isn't kept
        for loader, epoch in candidates.items():
            with closing(epoch(number + 1)) as batches:
                seconds, busy = timed(batches, warm, options.batches)
                for _ in zip(range(ahead), batches):  # until it rests
                    pass
            if number >= 0:
                made = batch * options.batches
                found[loader].append({"images_per_second": made / seconds, "images_per_core_second": made / busy})
    for rates in zip(*(found[loader] for loader in candidates)):
        of_round = dict(zip(candidates, rates))
        for rate in rates:
            rate |= {f"ours_over_this_{key}": of_round[OURS][key] / value for key, value in rate.items()}
    median = {
        loader: {key: statistics.median(one[key] for one in kept) for key in kept[0]} for loader, kept in found.items()
    }
    return {"batch": batch, "rounds": found, "median": median, "shares": _shares(median)}


def timed(batches: Iterator[Any], warm: int, count: int) -> tuple[float, float]:
    """Seconds of `count` batches after the first `warm`, and seconds of processors that they took, in this process and its
    children."""
    for _ in range(warm):
        next(batches)
    start, busy = time.perf_counter(), _processor_seconds()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - start, _processor_seconds() - busy


def _processor_seconds() -> float:
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _shares(median: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of the processor time that ours takes for an image."""
    files, decoded, whole = (1 / median[loader]["images_per_core_second"] for loader in (*PARTS, OURS))
    return {"files and hand-over": files / whole, "decode": (decoded - files) / whole, "augment": 1 - decoded / whole}


def _candidates(
    images: ImageSet,
    shards: ImageSet,
    views: Sequence[Augmentation],
    batch: int,
    count: int,
    threads: int,
    left_out: Mapping[str, str],
) -> dict[str, Epoch]:
    """What is timed, by name; shards hold the same images."""
    graphs = {
        OURS: partial(view_graph, views),
        PARTS[0]: _files_only,
        PARTS[1]: partial(_decoded_only, len(views) == 1),
    }
    found: dict[str, Epoch] = {
        name: partial(_ours, images, views, graph, batch, count, threads) for name, graph in graphs.items()
    }
    if any(view.jitter for view in views):
        linear = [replace(view, colours="linear") for view in views]
        found[LINEAR] = partial(_ours, images, linear, partial(view_graph, linear), batch, count, threads)
    found[SHARDS] = partial(_ours, shards, views, graphs[OURS], batch, count, threads)
    paths = [f"{images.root}/{path}" for path in np.array(images.paths)[images.good]]
    peers = {
        TENSORS: lambda: Torchvision(paths, views, batch, count, threads, tensors=True),
        PILLOW: lambda: Torchvision(paths, views, batch, count, threads, tensors=False),
        TIMM: lambda: Timm(paths, views[0], batch, count, threads),
        SPDL: lambda: Spdl(paths, views, batch, count, threads),
    }
    one_crop = len(views) == 1
    for name, make in peers.items():
        if name not in left_out and (name != TIMM or one_crop):
            found[name] = partial(_epoch, make())
    return found


def _epoch(peer: Torchvision | Timm | Spdl, number: int) -> Iterator[Any]:
    return peer.epoch()


def _ours(
    images: ImageSet, views: Sequence[Augmentation], graph: Graph, batch: int, count: int, threads: int, number: int
) -> Iterator[Any]:
    """Batches as `TrainLoader` makes them, but for the graph, and for an end."""

    def plan(step: int) -> tuple[np.ndarray, Any]:
        places = np.arange(step * batch, (step + 1) * batch)
        epoch = places[0] // len(images)
        ids = images.substitute[epoch_order(len(images), 0, int(epoch))[places % len(images)]]
        return ids, view_inputs(views, images.sizes[ids], slice(0, batch), 0, step)

    stream = Stream(
        Files(images, []), graph=graph, branches=branches(views), plan=plan, batch=batch, device=torch.device("cpu"),
        threads=threads, start=number * count,
    )  # fmt: skip
    try:
        for _ in range(count):
            yield next(stream)
    finally:
        stream.close()


def _files_only(encoded: DataNode, given: Mapping[str, DataNode], decoder: str) -> tuple[DataNode, ...]:
    """A byte of each file, and what is drawn for it."""
    return fn.slice(encoded, start=0, shape=1, axes=[0]), *given.values()


def _decoded_only(
    one_crop: bool, encoded: DataNode, given: Mapping[str, DataNode], decoder: str
) -> tuple[DataNode, ...]:
    """A pixel of each decoded image, and what is drawn for it."""
    if one_crop:
        crop = {"start": given["0.start"], "shape": given["0.shape"], "axis_names": "WH"}
        pixels = fn.decoders.image_slice(
            encoded, **crop, device=decoder, output_type=types.RGB, adjust_orientation=False
        )
    else:
        pixels = decode(encoded, decoder)
    return fn.slice(pixels, start=[0, 0], shape=[1, 1], axes=[0, 1]), *given.values()


def show(record: dict[str, Any]) -> None:
    options, files = record["options"], record["files"]
    width, height = files["median_sides"]
    table = Table(
        title=f"loaders alone: {files['count']:,} files of {width:.0f} x {height:.0f}, {files['mean_bytes'] / 1024:.0f} KiB; "
        f"{record['cores']} cores, medians of {options['rounds']} rounds"
    )
    for heading in ("case", "loader", "images/s", "ratio", "a core s", "ratio"):
        name = heading in ("case", "loader")
        table.add_column(heading, justify="left" if name else "right", no_wrap=True)
    for case, found in record["cases"].items():
        peers = [loader for loader in PEERS if loader in found["median"]]
        best = max(peers, key=lambda peer: found["median"][peer]["images_per_core_second"])
        for loader, one in found["median"].items():
            if loader not in PARTS:
                cells = [cell for key in RATES for cell in (f"{one[key]:,.1f}", f"{one[f'ours_over_this_{key}']:.2f}x")]
                table.add_row(case, f"* {loader}" if loader == best else loader, *cells)
        table.add_section()
    Console().print(table)
    print(
        "case: views, threads. a core s: images for each second of a core. ratio: ours over this. * the best peer by a core s."
    )
    for case, found in record["cases"].items():
        shares = ", ".join(f"{part} {share:.0%}" for part, share in found["shares"].items())
        print(f"ours, {case}: {shares} of its processor time.")
    for peer, why in record["left_out"].items():
        print(f"{peer} is left out: {why}.")


def _rate(found: Mapping[str, Any], loader: str) -> float:
    return found["median"][loader]["images_per_second"]


def main(arguments: Sequence[str] | None = None) -> int:
    return rounds.command(Options, measure, show, arguments, "benchmarks.data")


if __name__ == "__main__":
    sys.exit(main())
