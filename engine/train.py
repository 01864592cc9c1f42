"""`python -m engine.train`: flags -> plan -> parts -> run.

A run folder holds config.json, metrics.jsonl, summary.json, tensorboard/, checkpoints/, export/ (the newest encoder, which timm
loads), stages/ (the encoder at the end of each stage), evaluation/ and pictures/.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import kernels
from engine import checkpoint, config, dist, methods, probe, vit, weights
from engine.config import Plan
from engine.data.pipeline import Augmentation, Batch, TrainLoader, each_once
from engine.data.sources import ImageSet, check_bad, has_split, open_images
from engine.data.subsets import few_per_class, subset
from engine.draws import Draws, seed_of
from engine.dry_run import dry_run
from engine.durable import write_file
from engine.errors import BadInput
from engine.log import RunLog, peak_flops, read_metrics
from engine.loop import Cadence, Stage, Stopped, StopRequest, run_stage
from engine.methods.base import Labels, Method, StageSettings
from engine.state import TrainState, position, restore, to_host
from engine.step import AUTOCAST, Update

PROTOCOLS = ("knn", "linear", "lowshot", "cluster")
EVALUATED_HERE = 100_000  # training images up to which a run evaluates itself at the end


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
    loaded: str = ""
    """What --weights brought, in words."""
    started: float = field(default_factory=time.monotonic)

    def settings(self, index: int):
        return self.plan.stages[index][1]

    def seed(self, *purpose: int | str) -> int:
        return seed_of(self.plan.train.seed, *purpose)

    def images(self, index: int) -> ImageSet:
        """What stage `index` trains on: all training images, or a fixed few of each class."""
        return _stage_images(self.train_images, self.settings(index), self.plan.train.seed)

    def loader(self, state: TrainState) -> TrainLoader:
        """This rank's batches of the stage, from the state's step on. A method without views stores what it needs first."""
        stage, views = self.stages[state.stage], state.method.views()
        if not views:
            self._store(state)
        return TrainLoader(
            self.images(state.stage), views, stage.images_per_step, seed=self.seed(stage.index, "data"),
            rank=self.ranks.rank, world=self.ranks.world, device=self.ranks.device,
            threads=self.plan.train.threads or None, start_step=state.step, ledger=state.bad_files,
        )  # fmt: skip

    def _store(self, state: TrainState) -> None:
        images, ranks, dtype = self.images(state.stage), self.ranks, AUTOCAST[self.precision]

        def crops(views: Sequence[Augmentation], turn: int) -> Iterator[Batch]:
            return each_once(
                images, views, max(1, self.stages[state.stage].images_per_step // ranks.world),
                seed=self.seed(state.stage, "stored"), turn=turn, rank=ranks.rank, world=ranks.world, device=ranks.device,
                threads=self.plan.train.threads or None, ledger=state.bad_files,
            )  # fmt: skip

        with torch.no_grad(), torch.autocast(ranks.device.type, dtype=dtype, enabled=dtype is not None):
            state.method.store(crops, len(images))

    def draws(self, index: int, step: int) -> Draws:
        """The random choices of a step of stage `index`, this rank's rows."""
        batch = self.stages[index].images_per_step
        rows = self.ranks.rows(batch)
        return Draws(self.plan.train.seed, index, step, batch=batch, rows=rows, device=self.ranks.device)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0 when the run ended or was saved on request, 2 for input that cannot be used."""
    try:
        plan = config.parse(sys.argv[1:] if arguments is None else arguments)
        ranks = dist.start(plan.train.device)
        try:
            parts = prepare(plan, ranks)
            if plan.train.dry_run:
                dry_run(parts, build)
                return 0
            return run(parts)
        finally:
            dist.stop()
    except BadInput as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2


def prepare(plan: Plan, ranks: dist.Ranks) -> Parts:
    """Check everything and build what all stages share.

    Raises:
        BadInput: data, model, weights, batch or settings do not fit.
    """
    train = plan.train
    try:
        if train.kernels != "auto":  # auto leaves the environment variable its say
            kernels.use(train.kernels)
        kernels.check(ranks.device)
    except ValueError as error:
        asked = "the environment's TESSERA_KERNELS" if train.kernels == "auto" else f"--kernels {train.kernels}"
        raise BadInput(f"{asked} cannot be had: {error}.") from error
    if ranks.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    # Rank 0 screens and writes the cache first, so that the others find it.
    train_images = val_images = None
    for turn in (ranks.first, not ranks.first):
        if turn:
            train_images = open_images(train.data or None, "train", train.bad_limit)
            val_images = (
                open_images(train.data or None, "val", train.bad_limit)
                if has_split(train.data or None, "val")
                else None
            )
        dist.barrier()
    torch.manual_seed(seed_of(train.seed, "encoder"))
    encoder = vit.create(plan.model, **plan.encoder)
    for name, settings in plan.stages:
        settings.check_encoder(name, encoder)
        if settings.labelled and train_images.labels is None:
            raise BadInput(f"stage {name} learns from classes, but {train_images.root} has none: give train/CLASS/*.")
        _check_batch(name, settings, plan, ranks, len(_stage_images(train_images, settings, train.seed)))
    loaded = ""
    if train.weights and not train.resume:
        loaded = str(weights.load(encoder, train.weights))
    stages, first_step = [], 0
    for index, (name, settings) in enumerate(plan.stages):
        per_epoch = len(_stage_images(train_images, settings, train.seed)) // settings.batch_size
        total = settings.epochs * per_epoch
        stages.append(Stage(name, index, len(plan.stages), first_step, total, per_epoch, settings.batch_size))
        first_step += total
    precision = {"auto": "bf16" if ranks.device.type == "cuda" else "fp32"}.get(train.precision, train.precision)
    return Parts(
        plan,
        ranks,
        train_images,
        val_images,
        encoder.to(ranks.device),
        stages,
        precision,
        _compiles(train, ranks),
        loaded,
    )


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
    if accumulate > 1 and not settings.splits:
        raise BadInput(f"stage {stage} compares images within the batch, so it takes only --accumulate 1.")


def _compiles(train: config.Train, ranks: dist.Ranks) -> bool:
    if not train.compile or ranks.device.type == "cuda":
        return train.compile
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) or shutil.which("clang++"):
        return True
    if ranks.first:
        print(
            f"note: --compile needs a C++ compiler on CPUs and found neither {compiler} nor clang++: running uncompiled.",
            file=sys.stderr,
        )
    return False


def build(parts: Parts, index: int, earlier: Method | None, *, anew: bool = True) -> TrainState:
    """A stage at its first step, from the trained parts of the stage before; not `anew`, it waits for a checkpoint's content."""
    name, settings = parts.plan.stages[index]
    images = parts.images(index)
    known = (Labels(torch.from_numpy(images.labels), images.classes),) if settings.labelled else ()
    torch.manual_seed(parts.seed(index, "heads"))
    method = methods.get(name)(parts.encoder, settings, *known)
    if earlier is not None:
        method.inherit(earlier)
    method.to(parts.ranks.device).train()
    if anew:
        method.prepare(images, parts.ranks.device)
    if parts.compiles:
        compile_regions(method)
    update = Update(method, parts.stages[index].total_steps, parts.precision, parts.plan.train.accumulate)
    return TrainState(method, update, index, 0, [])


def compile_regions(method: Method) -> None:
    """Compile a method's regions, each full-graph. Blocks of one shape share one compiled graph."""
    import torch._inductor.config  # takes seconds, which only a compiled run should spend

    # On CPUs inductor proves every vector extension by a program built and run in a new process, 25 s on two cores. What the
    # system lists for the processor is enough.
    torch._inductor.config.cpp.vec_isa_ok = True
    for dynamic, regions in ((False, method.regions()), (True, method.ragged_regions())):
        for owner, name in regions:
            region = getattr(owner, name)
            if not hasattr(region, "get_compiler_config"):
                setattr(owner, name, torch.compile(region, fullgraph=True, dynamic=dynamic))


@contextmanager
def as_evaluated(parts: Parts, state: TrainState) -> Iterator[None]:
    """The encoder as it is judged and exported: averaged weights where there are any, eval mode, uncompiled."""
    dtype = AUTOCAST[parts.precision]
    with (
        state.update.average.in_place(),
        torch.compiler.set_stance("force_eager"),
        torch.autocast(parts.ranks.device.type, dtype=dtype, enabled=dtype is not None),
        torch.no_grad(),
    ):
        state.method.eval()
        try:
            yield
        finally:
            state.method.train()


def run(parts: Parts) -> int:
    """Train all stages, evaluate, leave the run folder. A stop request ends it early with a saved state."""
    train, ranks = parts.plan.train, parts.ranks
    folder = Path(dist.share(str(_folder(parts.plan))))
    log = RunLog(folder if ranks.first else None, rank=ranks.rank, peak_flops=_peak_flops(ranks))
    state, start = None, 0
    if train.resume:
        tensors, where = checkpoint.newest(folder / "checkpoints", log.message)
        state = build(parts, where["stage"], None, anew=False)
        restore(state, tensors, where)
        start = state.stage
        log.resume(parts.stages[start].first_step + state.step)
    elif ranks.first:
        folder.mkdir(parents=True, exist_ok=True)  # an empty one is welcome
        write_file(folder / "config.json", lambda aside: aside.write_text(parts.plan.as_json()))
    _introduce(parts, folder, log)
    with log, StopRequest() as stop:
        try:
            for index in range(start, len(parts.stages)):
                if state is None or state.stage != index:
                    bad_files = state.bad_files if state else []
                    state = build(parts, index, state.method if state else None)
                    state.bad_files = bad_files
                    if ranks.first:
                        state.method.keepsakes(folder)
                _train_stage(parts, state, folder, log, stop)
                _finish_stage(parts, state, folder)
        except Stopped:
            log.message(f"stopped and saved; go on with: python -m engine.train --resume {folder}")
            return 0
        log.close()
        if ranks.first:
            log.close(_summary(parts, state, folder, log.message))
        dist.barrier()
    return 0


def _peak_flops(ranks: dist.Ranks) -> float | None:
    """Of all devices of the run together; None where it is not known."""
    peak = peak_flops(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
    return peak and peak * ranks.world


def _folder(plan: Plan) -> Path:
    if plan.train.resume:
        return Path(plan.train.resume)
    folder = Path(plan.train.out or f"runs/{plan.train.method}-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(
            f"--out {folder} exists and is not an empty folder; choose another, or --resume it if it is a run."
        )
    return folder


def _introduce(parts: Parts, folder: Path, log: RunLog) -> None:
    plan, ranks = parts.plan, parts.ranks
    device = (
        torch.cuda.get_device_name(ranks.device)
        if ranks.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    log.message(f"{plan.train.method} ({plan.source}) with {plan.model} on {len(parts.train_images):,} images")
    log.message(
        f"{ranks.world} x {device}, {parts.precision}, {'compiled' if parts.compiles else 'not compiled'}; run folder {folder}"
    )
    log.message("kernels: " + "; ".join(" ".join(line.split()) for line in kernels.describe(ranks.device).splitlines()))
    if parts.loaded:
        log.message(parts.loaded)
    bad = parts.train_images.bad
    if bad:
        log.message(f"{len(bad)} unreadable images are replaced; they are listed in {folder / 'bad_files.json'}")


def _train_stage(parts: Parts, state: TrainState, folder: Path, log: RunLog, stop: StopRequest) -> None:
    train, ranks, stage = parts.plan.train, parts.ranks, parts.stages[state.stage]
    if state.step == stage.total_steps:
        return
    began = time.monotonic()
    loader = parts.loader(state)
    if not state.method.views():
        seconds = time.monotonic() - began
        log.log(stage.first_step + state.step, {"storing_features_seconds": seconds}, kind="event")

    def save() -> None:
        state.bad_files[:] = dist.union(state.bad_files)
        if ranks.first:
            tensors = to_host(state)
            checkpoint.save(folder / "checkpoints", stage.first_step + state.step, tensors, position(state), train.keep)
            _export(parts, state, folder / "export")
            _list_bad_files(parts, state, folder)
        dist.barrier()
        # each rank held its own finds against the limit; here all of them are
        images = parts.train_images
        check_bad((*images.bad, *state.bad_files), len(images), images.bad_limit, folder / "bad_files.json")

    try:
        run_stage(
            state, stage, loader, partial(parts.draws, stage.index), log,
            Cadence(train.log_every, train.probe_every, train.save_every, train.abort_after), stop,
            probe=_probe(parts, state, folder), save=save, labels=parts.images(stage.index).labels,
        )  # fmt: skip
    finally:
        loader.close()


def _probe(parts: Parts, state: TrainState, folder: Path) -> Callable[[], dict[str, float | str]]:
    ranks = parts.ranks
    online = probe.OnlineProbe(
        parts.train_images, parts.val_images, parts.encoder.img_size, device=ranks.device, batch_size=256,
        rank=ranks.rank, world=ranks.world, gather=dist.all_gather,
        # a classifier's own accuracy is a result, not a sign of health: it is taken over the whole split
        **({} if state.method.classifier is None or parts.val_images is None else {"max_val": len(parts.val_images)}),
    )  # fmt: skip

    def measure() -> dict[str, float | str]:
        with as_evaluated(parts, state):
            method = state.method
            choose = method.choose if method.prototype_count else None
            values = online.measure(method.features, choose, method.prototype_count, method.classifier)
        if not ranks.first:
            return values
        step = parts.stages[state.stage].first_step + state.step
        course = probe.history(read_metrics(folder / "metrics.jsonl")) if (folder / "metrics.jsonl").exists() else []
        return values | {"verdict": probe.verdict([*course, probe.Health.of(step, values)])}

    return measure


def _export(parts: Parts, state: TrainState, folder: Path) -> None:
    with state.update.average.in_place():
        classes = parts.train_images.classes or ()
        weights.export(state.method.evaluated, folder, classifier=state.method.classifier, classes=classes)


def _list_bad_files(parts: Parts, state: TrainState, folder: Path) -> None:
    bad = [*parts.train_images.bad, *state.bad_files]
    if bad:
        write_file(folder / "bad_files.json", lambda aside: aside.write_text(json.dumps(bad, indent=1)))


def _stage_folder(folder: Path, stage: Stage) -> Path:
    return folder / "stages" / f"{stage.index + 1}-{stage.name}"


def _finish_stage(parts: Parts, state: TrainState, folder: Path) -> None:
    """Keep the stage's encoder and draw what it learned."""
    if parts.ranks.first:
        stage = parts.stages[state.stage]
        _export(parts, state, _stage_folder(folder, stage))
        if state.method.trains_encoder:
            _draw_pictures(parts, state, folder / "pictures")
    dist.barrier()


def _draw_pictures(parts: Parts, state: TrainState, folder: Path) -> None:
    """Reconstructions where the method can make them, and the principal components of patch features."""
    from engine import pictures  # brings matplotlib, which takes a second: a run should start without it

    stage, encoder = parts.stages[state.stage], state.method.evaluated
    images = _shown_images(parts)
    draws = Draws(parts.plan.train.seed, "pictures", batch=len(images), rows=slice(None), device=images.device)
    with as_evaluated(parts, state):
        if hasattr(state.method, "reconstruct"):
            masked, prediction = state.method.reconstruct(images, draws)
            normalised = getattr(parts.settings(stage.index), "normalise_pixels", False)
            pictures.reconstructions(
                folder / f"{stage.index + 1}-{stage.name}-reconstructions.png",
                images,
                pictures.hide(images, masked, encoder.patch_size),
                pictures.fill(images, prediction, masked, encoder.patch_size, normalised=normalised),
            )
        tokens = encoder(images)[:, encoder.num_prefix_tokens :]
        pictures.patch_pca(
            folder / f"{stage.index + 1}-{stage.name}-patch-pca.png", images, tokens.float(), encoder.grid
        )


def _shown_images(parts: Parts) -> Tensor:
    """Eight images spread over the val split (train where there is none), as evaluation sees them."""
    shown = parts.val_images or parts.train_images
    ids = torch.linspace(0, len(shown) - 1, min(8, len(shown))).long()
    chosen = subset(shown, ids)
    return next(iter(probe.eval_batches(chosen, parts.encoder.img_size, len(ids), device=parts.ranks.device))).images[0]


def _summary(parts: Parts, state: TrainState, folder: Path, say: Callable[[str], None]) -> dict:
    """What summary.json holds; evaluates the stages on the way."""
    from engine import pictures

    pictures.curves(folder / "pictures" / "curves.png", folder / "metrics.jsonl")
    summary = {
        "method": parts.plan.train.method,
        "model": parts.plan.model,
        "source": parts.plan.source,
        "steps": parts.stages[-1].first_step + parts.stages[-1].total_steps,
        "skipped_updates_of_last_stage": int(state.update.skipped),
        "unreadable_images": len(parts.train_images.bad) + len(state.bad_files),
        "export": str(folder / "export"),
        "probes": [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "probe"],
    }
    if parts.plan.train.evaluate:
        summary["evaluation"] = _evaluate(parts, folder, say)
    return summary | {"seconds_of_this_process": round(time.monotonic() - parts.started, 1)}


def _evaluate(parts: Parts, folder: Path, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Judge raw pixels and the encoder of every stage that trains one; by weights, the figures by name."""
    from engine import evals  # brings scikit-learn, which takes seconds: only a run that ends needs it
    from engine.evals import report

    command = f"python -m engine.eval --weights {folder}" + (
        f" --data {parts.plan.train.data}" if parts.plan.train.data else ""
    )
    if parts.val_images is None or parts.val_images.labels is None:
        say("no labelled val split: nothing to evaluate on.")
        return {}
    if len(parts.train_images) > EVALUATED_HERE:
        say(f"more than {EVALUATED_HERE:,} images: evaluate at leisure with {command}")
        return {}
    encoders: dict[str, object] = {"raw pixels": evals.raw_pixels()}
    sources = {"given weights": parts.plan.train.weights} if parts.plan.train.weights else {}
    for stage in parts.stages:
        if methods.get(stage.name).trains_encoder:
            sources[stage.name] = _stage_folder(folder, stage)
    for name, source in sources.items():
        encoder = vit.create(parts.plan.model, **parts.plan.encoder)
        weights.load(encoder, source)
        encoders[name] = encoder.to(parts.ranks.device)
    how = {"device": parts.ranks.device, "precision": parts.precision, "threads": parts.plan.train.threads or None}
    fitting = []
    for name, settings in evals.settings_for(PROTOCOLS, seed=parts.plan.train.seed).items():
        try:
            evals.protocol(name).check(parts.train_images, parts.val_images, settings)
            fitting.append(name)
        except BadInput as error:
            say(f"evaluation by {name} is left out: {error}")
    if not fitting:
        return {}
    features = evals.encode(encoders, parts.train_images, parts.val_images, **how)
    results = evals.evaluate(features, protocols=fitting, seed=parts.plan.train.seed, device=parts.ranks.device)
    results = [replace(result, data=parts.plan.train.data or "digits") for result in results]
    report.write(
        folder / "evaluation",
        results,
        {"device": str(parts.ranks.device), "precision": parts.precision},
        features,
        commands=_commands(parts, sources, fitting),
    )
    Console().print(report.table(results, f"held-out {parts.val_images.split} split, {len(parts.val_images):,} images"))
    figures: dict[str, dict[str, float]] = {}
    for result in results:
        figures.setdefault(result.weights, {}).update({f"{result.protocol} {k}": v for k, v in result.values.items()})
    return figures


def _commands(parts: Parts, sources: Mapping[str, str | Path], fitting: Sequence[str]) -> dict[tuple[str, str], str]:
    """By weights and protocol, what `engine.eval` repeats the figures of this run with."""
    from engine import eval as judge
    from engine import evals

    train = parts.plan.train
    shared = {name: getattr(train, name) for name in ("data", "seed", "bad_limit", "precision", "device")}
    settings = evals.settings_for(fitting, seed=train.seed)
    found = {}
    for name, source in {"raw pixels": judge.RAW, **sources}.items():
        own = {"image_size": train.image_size, "model": parts.plan.model} if name == "given weights" else {}
        flags = judge.Eval(weights=(str(source),), **shared, **own)
        for protocol, chosen in settings.items():
            found[name, protocol] = judge.command(flags, str(source), protocol, chosen)
    return found


if __name__ == "__main__":
    sys.exit(main())
