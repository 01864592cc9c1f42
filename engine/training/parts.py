"""What a run is made of: data, encoder, stages and ranks, checked before anything is written."""

import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kernels
from engine import methods
from engine.core import dist
from engine.core.draws import Draws, seed_of
from engine.core.errors import BadInput
from engine.core.timetable import Timetable, grown
from engine.data import cache
from engine.data.batch import Batch
from engine.data.identity import Identity
from engine.data.pipeline import TrainLoader, each_once
from engine.data.sources import ImageSet, has_split, open_images, usable_cpus
from engine.data.stream import MAX_THREADS
from engine.data.subsets import few_per_class
from engine.data.views import Augmentation
from engine.methods.settings import StageSettings
from engine.model import vit, weights
from engine.training import fewer_tokens, graphs
from engine.training.config import Plan, Train
from engine.training.loop import Stage
from engine.training.operations import CLASSES, costs
from engine.training.precision import AUTOCAST, automatic
from engine.training.state import TrainState
from engine.training.token_choice import candidates
from engine.training.waits import Feed
from kernels.determinism import same_bits_from_torch


@dataclass
class Parts:
    """Everything a run is made of, checked; nothing is written yet."""

    plan: Plan
    ranks: dist.Ranks
    train_images: ImageSet
    val_images: ImageSet | None
    encoder: vit.VisionTransformer
    stages: list[Stage]
    precision: str
    compiles: bool
    identity: Identity
    """Of the training images."""
    loaded: str = ""
    """What --weights brought, in words."""
    tried: dict[str, str] = field(default_factory=dict)
    """By stage, what a trial on this device says against replaying its steps (`engine.training.graph_trials`), "" for it."""
    started: float = field(default_factory=time.monotonic)

    def settings(self, index: int) -> StageSettings:
        return self.plan.stages[index][1]

    def ungraphed(self) -> list[tuple[str, str]]:
        """By stage its name, and why its steps are not replayed from a CUDA graph; "" where they are."""
        train, found = self.plan.train, []
        for name, settings in self.plan.stages:
            why = graphs.obstacle(train, settings, self.encoder, self.ranks, self.precision)
            if not why and train.graphs == "auto":
                why = self.tried.get(name, graphs.UNSEEN)
            found.append((name, why))
        return found

    def seed(self, *purpose: int | str) -> int:
        return seed_of(self.plan.train.seed, *purpose)

    def images(self, index: int) -> ImageSet:
        """What stage `index` trains on: all training images, or a fixed few of each class."""
        return _stage_images(self.train_images, self.settings(index), self.plan.train.seed)

    def loader(self, state: TrainState) -> TrainLoader:
        """This rank's batches of the stage in the method's phase, from the state's step on. A method without views stores what it
        needs first."""
        stage = self.stages[state.stage]
        if not state.method.views():
            self._store(state)

        def place(step: int) -> tuple[int, int]:
            found = stage.timetable.place(step)
            return found.epoch, found.position

        return self._loader(state, self.seed(stage.index, "data"), start_step=state.step, place=place)

    def samples(self, state: TrainState, *purpose: int | str) -> TrainLoader:
        """This rank's rows of batches of the stage in the method's phase, in an order that goes by the purpose, for a look."""
        return self._loader(state, self.seed(state.stage, *purpose))

    def _loader(self, state: TrainState, seed: int, **where: Any) -> TrainLoader:
        return TrainLoader(
            self.images(state.stage), state.method.views(), state.update.images_per_step, seed=seed,
            rank=self.ranks.rank, world=self.ranks.world, device=self.ranks.device,
            threads=self.plan.train.threads or None, ledger=state.bad_files, **where,
        )  # fmt: skip

    def with_threads(self, threads: int) -> "Parts":
        """The same, with so many threads of the loader."""
        return replace(self, plan=replace(self.plan, train=replace(self.plan.train, threads=threads)))

    def feed(self, state: TrainState) -> Feed:
        """What feeds the stage's steps, for advice about it."""
        images, views = self.images(state.stage), state.method.views()
        cores = max(1, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return Feed(
            threads=self.plan.train.threads or min(MAX_THREADS, cores),
            cores=cores,
            short_side=0 if images.synthetic else int(np.median(images.sizes[images.good].min(1))),
            crop=max((min(view.size) for view in views), default=0),
        )

    def _store(self, state: TrainState) -> None:
        images, ranks, dtype = self.images(state.stage), self.ranks, AUTOCAST[self.precision]

        def crops(views: Sequence[Augmentation], turn: int) -> Iterator[Batch]:
            return each_once(
                images, views, max(1, state.update.images_per_step // ranks.world),
                seed=self.seed(state.stage, "stored"), turn=turn, rank=ranks.rank, world=ranks.world, device=ranks.device,
                threads=self.plan.train.threads or None, ledger=state.bad_files,
            )  # fmt: skip

        with torch.no_grad(), torch.autocast(ranks.device.type, dtype=dtype, enabled=dtype is not None):
            state.method.store(crops, len(images))

    def draws(self, index: int, step: int, batch: int = 0) -> Draws:
        """The random choices of a step of stage `index`, this rank's rows of so many images; 0 is the settings' batch."""
        return self.draws_of(index, step, batch=batch)

    def draws_of(self, index: int, *purpose: int | str, batch: int = 0) -> Draws:
        """Likewise, for anything but a step."""
        batch = batch or self.settings(index).batch_size
        rows = self.ranks.rows(batch)
        return Draws(self.plan.train.seed, index, *purpose, batch=batch, rows=rows, device=self.ranks.device)


def prepare(plan: Plan, ranks: dist.Ranks) -> Parts:
    """Check everything and build what all stages share.

    Raises:
        BadInput: data, model, weights, batch or settings do not fit.
    """
    train = plan.train
    _choose_kernels(train, ranks)
    if train.deterministic:
        same_bits_from_torch(ranks.device)
    if ranks.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    precision = automatic(ranks.device) if train.precision == "auto" else train.precision
    if train.residual == "bf16" and precision != "bf16":
        raise BadInput(f"--residual bf16 belongs to --precision bf16, and this run computes in {precision}.")
    train_images, val_images = _open(train, ranks)
    identity = _same_on_all_ranks(Identity.of(train_images), ranks)
    torch.manual_seed(seed_of(train.seed, "encoder"))
    encoder = vit.create(plan.model, **plan.encoder)
    for name, settings in plan.stages:
        settings.check_encoder(name, encoder)
        fewer_tokens.check(name, settings, encoder)
        if settings.phase_choice == "auto" and not candidates(methods.get(name), encoder):
            raise BadInput(f"--{name}.phase-choice auto: {name} can't do with fewer tokens.")
        if settings.labelled and train_images.labels is None:
            raise BadInput(f"stage {name} learns from classes, but {train_images.root} has none: give train/CLASS/*.")
        _check_batch(name, settings, plan, ranks, len(_stage_images(train_images, settings, train.seed)))
    loaded = str(weights.load(encoder, train.weights)) if train.weights and not train.resume else ""
    stages = stages_of(plan, train_images)
    for stage in stages:
        _check_queue(stage, plan.stages[stage.index][1])
    parts = Parts(
        plan,
        ranks,
        train_images,
        val_images,
        encoder.to(ranks.device),
        stages,
        precision,
        _compiles(train, ranks),
        identity,
        loaded,
    )
    graphs.check(train.graphs, parts.ungraphed())
    return parts


def _choose_kernels(train: Train, ranks: dist.Ranks) -> None:
    try:
        if train.kernels != "auto":  # auto leaves the environment variable its say
            kernels.use(train.kernels)
        kernels.check(ranks.device)
    except ValueError as error:
        asked = "the environment's TESSERA_KERNELS" if train.kernels == "auto" else f"--kernels {train.kernels}"
        raise BadInput(f"{asked} cannot be had: {error}.") from error


def _open(train: Train, ranks: dist.Ranks) -> tuple[ImageSet, ImageSet | None]:
    """The training and the held-out images. Rank 0 screens and writes the cache first, so that the others find it."""
    source, found = train.data or None, (None, None)
    for turn in (ranks.first, not ranks.first):
        if turn:
            held_out = open_images(source, "val", train.bad_limit) if has_split(source, "val") else None
            found = open_images(source, "train", train.bad_limit), held_out
        dist.barrier()
    return found


def _same_on_all_ranks(own: Identity, ranks: dist.Ranks) -> Identity:
    first = Identity.from_json(dist.share(own.as_json()))
    found = own.difference(first)
    others = dist.union([(f"rank {ranks.rank} has {found}",)] if found else [])
    if others:
        told = "; ".join(words for (words,) in others)
        raise BadInput(f"ranks see other images than rank 0: {told}. Give all of them one folder, or equal copies.")
    return own


def stages_of(plan: Plan, images: ImageSet) -> list[Stage]:
    stages, first_step = [], 0
    for index, (name, settings) in enumerate(plan.stages):
        timetable = _timetable(plan, index, len(_stage_images(images, settings, plan.train.seed)), images.classes)
        stages.append(Stage(name, index, len(plan.stages), first_step, timetable))
        first_step += timetable.total_steps
    return stages


def _timetable(plan: Plan, index: int, images: int, classes: Sequence[str] | None) -> Timetable:
    settings = plan.stages[index][1]
    phases, batch = settings.token_phases, settings.batch_size
    grows, by_compute = settings.phase_batch == "grow", settings.phase_clock == "compute"
    cost = costs(plan, index, phases.phases, len(classes or ()) or CLASSES) if grows or by_compute else {}
    return Timetable(
        images, batch, settings.epochs, phases,
        batches=grown(batch, cost, images) if grows else None, costs=cost if by_compute else None,
    )  # fmt: skip


def _stage_images(images: ImageSet, settings: StageSettings, seed: int) -> ImageSet:
    return few_per_class(images, settings.shots, seed) if settings.shots else images


def _check_batch(stage: str, settings: StageSettings, plan: Plan, ranks: dist.Ranks, images: int) -> None:
    batch, accumulate = settings.batch_size, plan.train.accumulate
    if batch > images:
        raise BadInput(
            f"stage {stage} has a batch of {batch}, but there are {images} training images; set --batch-size lower."
        )
    if batch % (ranks.world * accumulate):
        raise BadInput(
            f"stage {stage} has a batch of {batch}, which {ranks.world} processes with {accumulate} micro-batches each "
            "cannot share evenly; choose a multiple."
        )


def _check_queue(stage: Stage, settings: StageSettings) -> None:
    """Raise BadInput where a step of a grown batch brings more keys than the stage's queue has room for."""
    room, most = getattr(settings, "queue_size", 0), max(one.images for one in stage.timetable.stretches)
    if 0 < room < most:
        raise BadInput(
            f"--{stage.name}.phase-batch grow makes batches of {most}, more than the queue's {room}; set "
            f"--{stage.name}.queue-size higher."
        )


def _compiles(train: Train, ranks: dist.Ranks) -> bool:
    on_gpu = ranks.device.type == "cuda"
    if train.compile == "off" or (train.compile == "auto" and not on_gpu):
        return False
    if missing := _missing(on_gpu):
        if ranks.first:
            print(f"note: compiling needs {missing}: running uncompiled.", file=sys.stderr)
        return False
    # the next run finds what this one has compiled, also after a restart has emptied /tmp
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.folder() / "compiled"))
    return True


def _missing(on_gpu: bool) -> str:
    """What compiling needs and this machine lacks, in words; "" where nothing is missing."""
    # what is compiled for a GPU is launched by code in C, what is compiled for a CPU is C++
    compiler, other = (os.environ.get("CC", "gcc"), "clang") if on_gpu else (os.environ.get("CXX", "g++"), "clang++")
    if not (shutil.which(compiler) or shutil.which(other)):
        return f"a C{'' if on_gpu else '++'} compiler and found neither {compiler} nor {other}"
    # torch and Triton look there, also where Debian has a scheme of its own
    headers = Path(sysconfig.get_path("include", "posix_prefix"))
    if not (headers / "Python.h").is_file():
        package = f"python3.{sys.version_info.minor}-dev"
        return f"Python's headers (Python.h, of a system's Python in {package} or python3-devel) and found none in {headers}"
    return ""
