"""The command line of `engine.train`, made from dataclasses by tyro, and the JSON that is saved beside a run."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

import kernels
from engine import methods, recipes
from engine.core.errors import BadInput
from engine.core.flags import read
from engine.core.short_help import short_help
from engine.data.sources import located
from engine.methods.parts.collapse import CHOICES
from engine.methods.settings import StageSettings
from engine.model import recomputing, residual
from engine.recipes import small_data, token_schedules
from engine.training import config_file, fewer_tokens, trackers

EMBEDDED_MODEL, FOLDER_MODEL = "vit_micro_patch8_32", "vit_base_patch16_224"
RESUME_MAY_CHANGE = (
    "resume", "out", "data", "changed_data", "compile", "graphs", "device", "threads", "log_every", "probe_every", "save_every",
    "keep", "evaluate", "dry_run", "bad_limit", "abort_after", "rewind", "kernels", "calibrate", "accumulate", "recompute",
    "track", "profile",
)  # fmt: skip

Stages = tuple[tuple[str, StageSettings], ...]

IN_FULL = ("--help-method", "--help-all")
MORE_HELP = f"Methods: {', '.join(methods.names())}. More: --method NAME --help-method, or --help-all."
HELP = {
    "what": (
        "method", "model", "data", "weights", "preset", "epochs", "batch_size", "image_size", "patch_size", "tokens", "pool",
        "collapse",
    ),
    "how": (
        "compile", "graphs", "precision", "residual", "accumulate", "recompute", "kernels", "calibrate", "deterministic",
        "device", "threads", "seed",
    ),
    "run": (
        "out", "resume", "changed_data", "dry_run", "log_every", "probe_every", "save_every", "keep", "evaluate", "track",
        "profile", "bad_limit", "abort_after", "rewind",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Train:
    """Train a vision transformer without labels. Further flags, per stage, belong to the method that is named."""

    method: Annotated[
        str, tyro.conf.arg(help=f"The pretext task: {', '.join(methods.names())}. maect runs mae and nnclr first.")
    ] = "maect"
    model: str = ""
    """A timm ViT name; default vit_micro_patch8_32 on the embedded digits, vit_base_patch16_224 on a folder, and ViT-S with the
    set's image and patch size on a published set."""
    data: str = ""
    """An image folder: train/CLASS/*.jpg and val/CLASS/*.jpg, or a flat unlabelled one; or train/*.tar and val/*.tar, shards in
    WebDataset's layout (docs/methods.md); or NAME:DIR, a published set as it lies in DIR, with NAME one of cifar10, cifar100,
    svhn, flowers102, tiny-imagenet, imagenet100, imagenet, or parquet, files as Hugging Face has them; or synthetic
    (synthetic:N), as many images as ImageNet (N) that are made on the device and show nothing, to time a run. Default: the
    embedded digits."""
    weights: str = ""
    """Start from these (a published file, a run folder, an exported folder); where stages follow MAE, leave that one out."""
    preset: str = "auto"
    """Which settings: a published preset of the method (plain, aug, thrift, efficient or the name of a set, where it has them),
    or digits; auto is digits on the embedded data, the set's own on a published set, where there is one, and plain on others."""
    epochs: tuple[int, ...] = ()
    """Epochs of each stage, in order."""
    batch_size: int = 0
    """Images of a step over all ranks, for every stage; 0 is the recipe's."""
    image_size: tuple[int, ...] = ()
    """Height and width of the input, or one number for both; default: the model's."""
    patch_size: int = 0
    """Side of a patch in pixels; 0 is the model's."""
    tokens: str = "none"
    """Fewer tokens in the first part of every stage that can do with them: progressive or fast (smaller crops), anneal (a
    share of each large crop's patches, and larger ones), flexi (patches of a size drawn for each step), auto (chosen as the
    run goes), or none; docs/low_budget.md has what each is, and the settings behind them."""
    pool: str = ""
    """What evaluation reads: token (CLS) or avg (mean of patches); default: the recipe's."""
    collapse: str = ""
    """What keeps a clustering from collapsing: centring, me-max, sinkhorn, me-max+sinkhorn or none; default: the recipe's."""
    accumulate: int = 1
    """Micro-batches per step and rank. A stage that compares images within the batch goes through all but the last one of them
    twice, and computes the whole batch's gradients all the same."""
    recompute: str = "none"
    """What backward computes again instead of keeping it (activation checkpointing): none, selective (norms and GELU; about
    0.6 of a block's memory), or blocks (all but each block's input, for a third more of their work)."""
    precision: str = "auto"
    """fp32, bf16 or fp16 (with loss scaling); auto is bf16 on GPUs of compute capability 8.0 and above, fp16 on older ones, and
    fp32 on CPUs."""
    residual: str = "fp32"
    """Number format of the residual stream in bf16 training: fp32, as published recipes have it, or bf16, which moves
    about a tenth fewer bytes through a GPU (docs/speed.md)."""
    compile: str = "auto"
    """Compile blocks and losses with torch.compile: on (also --compile alone), off (also --no-compile), or auto: on GPUs."""
    graphs: str = "auto"
    """Replay forward and backward of a step from a CUDA graph, by one launch: on, where the method's step is the same at every
    replay, or off; auto tries it as --calibrate says, and takes it where it is right and faster. What keeps a step from it is
    said."""
    kernels: str = "auto"
    """Which form of the kernels runs: auto, reference, plain, triton, cuda or another of docs/kernels.md, for all ops that have
    it, or by op, as in packed_attention=cuda,sinkhorn=triton."""
    calibrate: str = "auto"
    """Prove and time every kernel, and CUDA graphs, on this very device before the first step, and take the fastest right one:
    auto does so at the first run on a GPU and keeps what it found, again measures anew (kernels on a CPU, too), never takes what
    is known."""
    deterministic: bool = False
    """Take only kernels, torch's own included, that give the same bits at every run; on GPUs some are slower."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int = 0
    """Loader threads; 0 is what the machine has for each rank."""
    seed: int = 0
    """Everything random follows from it."""
    out: str = ""
    """The run folder; default runs/METHOD-DATE-TIME."""
    resume: str = ""
    """Go on with this run folder, from its newest sound checkpoint. With --data the images may have moved."""
    changed_data: bool = False
    """Let --resume go on with other images than it began with: by their number, names or classes."""
    dry_run: bool = False
    """Build everything, measure a few steps of each stage, print speed, memory and hours, write no run folder."""
    log_every: int = 10
    """Steps between logged values."""
    probe_every: int = 10
    """Epochs between k-NN and health measurements; 0 measures only at the end of a stage."""
    save_every: int = 10
    """Epochs between checkpoints; 0 saves only at the end of a stage."""
    keep: int = 2
    """Checkpoints to keep."""
    track: tuple[str, ...] = ()
    """Where to show the numbers besides TensorBoard: wandb, trackio, mlflow, each a package of its own to install. They stay in
    the run folder unless their own environment variables (WANDB_MODE, TRACKIO_SPACE_ID, MLFLOW_TRACKING_URI) say otherwise."""
    profile: int = 0
    """Steps to watch, from the fourth of this process on, for a trace, a table of the costliest operators and, on GPUs, a record
    of memory, in the run folder's profile/; 0 is off."""
    evaluate: bool = True
    """At the end, evaluate every stage, and raw pixels, by k-NN, linear probe, low-shot and clustering."""
    bad_limit: float = 0.001
    """Largest share of unreadable images that a run accepts; they are replaced and listed."""
    abort_after: int = 50
    """Stop when this many updates in a row were skipped because loss or gradients were not finite."""
    rewind: int = 0
    """Where the loss shoots up, or updates are skipped as --abort-after says, go back to the weights of the last good checkpoint
    and on behind the batches since, at most this many times a stage; 0 is never."""

    def in_words(self) -> list[str]:
        """What of a step is done otherwise than plainly."""
        words = [f"{self.accumulate} micro-batches a step"] * (self.accumulate > 1)
        words += [f"residual stream in {self.residual}"] * (self.residual != "fp32")
        return words + [f"activations computed again: {self.recompute}"] * (self.recompute != "none")

    def check(self) -> None:
        """Raise BadInput for a value that cannot be meant."""
        choices = {
            "pool": ("", "token", "avg"),
            "collapse": ("", *CHOICES),
            "tokens": tuple(token_schedules.SCHEDULES),
            "precision": ("auto", "fp32", "bf16", "fp16"),
            "recompute": recomputing.CHOICES,
            "residual": tuple(residual.DTYPES),
            "compile": ("auto", "on", "off"),
            "graphs": ("auto", "on", "off"),
            "calibrate": ("auto", "again", "never"),
            "device": ("auto", "cpu", "cuda"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                listed = ", ".join(filter(None, valid))
                raise BadInput(f"--{name} is {getattr(self, name)!r}; choose one of {listed}.")
        try:
            kernels.understood(self.kernels)
        except ValueError as error:
            raise BadInput(f"--kernels {self.kernels} cannot be had: {error}.") from error
        lowest = {"batch_size": 0, "patch_size": 0, "threads": 0, "probe_every": 0, "save_every": 0, "seed": 0}
        lowest |= {"profile": 0, "rewind": 0, "accumulate": 1, "log_every": 1, "keep": 1, "abort_after": 1}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise BadInput(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {least} or more.")
        trackers.check(self.track)
        if any(epochs < 1 for epochs in self.epochs):
            raise BadInput(f"--epochs is {' '.join(map(str, self.epochs))}; every stage needs at least 1.")
        if len(self.image_size) > 2 or any(side < 1 for side in self.image_size):
            raise BadInput("--image-size takes one positive number, or height and width.")
        if not 0 <= self.bad_limit <= 1:
            raise BadInput(f"--bad-limit is {self.bad_limit}; it must be a share from 0 to 1.")


@dataclass(frozen=True)
class Plan:
    """A run, resolved: the flags, the stages in order, and what the encoder is made with."""

    train: Train
    source: str
    model: str
    encoder: dict[str, Any]
    stages: Stages = field(default=())

    def as_json(self) -> str:
        return config_file.sealed(
            {
                "train": asdict(self.train),
                "source": self.source,
                "model": self.model,
                "encoder": self.encoder,
                "stages": [{"method": name, **asdict(settings)} for name, settings in self.stages],
            }
        )


def parse(arguments: Sequence[str]) -> Plan:
    """Command-line arguments -> a checked plan.

    The method decides which stage flags exist, so the general flags are read first and all of them a second time.

    Raises:
        BadInput: a flag does not exist or a value is not valid.
        SystemExit: status 0 after --help, --help-method or --help-all.
    """
    asked = next((word for word in arguments if word in ("-h", "--help", *IN_FULL)), "")
    if asked in ("-h", "--help"):
        print(short_help(Train, "usage: python -m engine.train --method NAME [flags]", HELP, MORE_HELP))
        raise SystemExit(0)
    wanted = _spelled_out([word for word in arguments if word not in IN_FULL])
    train, _ = read(Train, wanted, return_unknown_args=True, add_help=False)
    before = _saved(Path(train.resume).expanduser()) if train.resume else None
    train = before.train if before else train
    if before:
        train, _ = read(Train, wanted, default=replace(train, resume=""), return_unknown_args=True, add_help=False)
    train.check()
    plan = before or _preset(train)
    names = [name for name, _ in plan.stages]
    of_stages = [(name, type(settings), field(default=settings)) for name, settings in plan.stages]
    description = f"Settings of {train.method}: {plan.source}."
    if asked == "--help-method":
        read(make_dataclass("Stages", of_stages, frozen=True), ["--help"], prog="engine.train", description=description)
    flags = make_dataclass("Train", of_stages, bases=(Train,), frozen=True)
    default = flags(**{f.name: getattr(plan.train, f.name) for f in fields(Train)}, **dict(plan.stages))
    description = f"{Train.__doc__}\n\n{description}"
    wanted += ["--help"] * bool(asked)
    parsed = read(flags, wanted, prog="engine.train", default=default, description=description)
    chosen = Train(**{f.name: getattr(parsed, f.name) for f in fields(Train)})
    chosen = replace(chosen, data=located(chosen.data), **_expanded(chosen))
    stages = tuple((name, getattr(parsed, name)) for name in names)
    for name, settings in stages:
        settings.check(name)
    resolved = replace(plan, train=chosen, stages=stages)
    if before:
        _check_unchanged(before, resolved)
    return resolved


def _expanded(train: Train) -> dict[str, str]:
    """Paths with a `~` that no shell has expanded, as in --out=~/runs/mine."""
    return {name: os.path.expanduser(getattr(train, name)) for name in ("out", "resume", "weights")}


def _spelled_out(arguments: list[str]) -> list[str]:
    """With `--compile on` for --compile alone, and `--compile off` for --no-compile."""
    spelled: list[str] = []
    for word, following in zip(arguments, [*arguments[1:], "--"]):
        if word == "--compile" and following.startswith("-"):
            spelled += [word, "on"]
        elif word == "--no-compile":
            spelled += ["--compile", "off"]
        else:
            spelled.append(word)
    return spelled


def _preset(train: Train) -> Plan:
    embedded, named = train.data in ("", "digits"), small_data.of(train.data)
    known = small_data.SETS.get(train.preset) or small_data.SETS.get(named)
    model = train.model or (known.model if known else EMBEDDED_MODEL if embedded else FOLDER_MODEL)
    preset = recipes.preset_for(train.method, train.preset, embedded, named)
    recipe = recipes.recipe(train.method, model, preset, embedded)
    encoder, source = dict(recipe.encoder), recipe.source
    if known and not train.model:  # a model that is named comes with its own sizes
        encoder |= known.encoder
        if preset not in (*small_data.SETS, "digits"):
            source = f"{'' if source.startswith('after ') else 'after '}{source}, at the sizes for {named}"
    if train.image_size:
        encoder["img_size"] = list(train.image_size * 2)[:2]
    if train.patch_size:
        encoder["patch_size"] = train.patch_size
    if train.pool:
        encoder["global_pool"] = train.pool
    stages = recipe.stages
    if train.weights and len(stages) > 1:
        stages = tuple(stage for stage in stages if stage[0] != "mae")
    if train.epochs:
        if len(train.epochs) != len(stages):
            names = ", ".join(name for name, _ in stages)
            raise BadInput(
                f"--epochs has {len(train.epochs)} numbers; give {len(stages)}, one for each stage ({names})."
            )
        stages = tuple((name, replace(s, epochs=epochs)) for (name, s), epochs in zip(stages, train.epochs))
    if train.batch_size:
        stages = tuple((name, replace(settings, batch_size=train.batch_size)) for name, settings in stages)
    if train.collapse:
        if not any(hasattr(settings, "collapse") for _, settings in stages):
            raise BadInput(f"--collapse {train.collapse} is for methods that cluster, which {train.method} does not.")
        stages = tuple(
            (name, replace(settings, collapse=train.collapse) if hasattr(settings, "collapse") else settings)
            for name, settings in stages
        )
    if train.tokens != "none":
        schedule = token_schedules.SCHEDULES[train.tokens]
        stages = _with_tokens(train, schedule, stages)
        source = f"{'' if source.startswith('after ') else 'after '}{source}, with {schedule.source}"
    return Plan(train, source, model, encoder, stages)


def _with_tokens(train: Train, schedule: token_schedules.Schedule, stages: Stages) -> Stages:
    """The stages, those with the schedule that can take it. Raises BadInput where none can."""
    able = [name for name, settings in stages if fewer_tokens.able(name, settings, schedule.settings)]
    if not able:
        raise BadInput(
            f"--tokens {train.tokens} cannot be had: no stage of {train.method} can do with fewer tokens so."
        )
    return tuple((name, replace(s, **schedule.settings) if name in able else s) for name, s in stages)


def _saved(run: Path) -> Plan:
    """The plan in a run folder's config.json."""
    path = run / "config.json"
    saved = config_file.opened(path)
    try:
        train, stages = _read_as(Train, saved["train"], "the run", path), []
        for entry in saved["stages"]:
            values = {key: value for key, value in entry.items() if key != "method"}
            settings = recipes.methods.get(entry["method"]).Settings
            stages.append((entry["method"], _read_as(settings, values, f"stage {entry['method']}", path)))
        return Plan(train, saved["source"], saved["model"], saved["encoder"], tuple(stages))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{path} is not a configuration this version wrote ({error}); start a new run.") from error


def _read_as(kind: type, values: dict[str, Any], what: str, path: Path) -> Any:
    """A dataclass of all its values."""
    config_file.complete(values, {f.name for f in fields(kind)}, what, path)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _check_unchanged(before: Plan, now: Plan) -> None:
    """A resumed run may change how it runs, not what it computes."""
    for name, value in asdict(now.train).items():
        if name not in RESUME_MAY_CHANGE and value != getattr(before.train, name):
            raise BadInput(
                f"--resume cannot change --{name.replace('_', '-')} from {getattr(before.train, name)!r} to {value!r}; "
                "start a new run for that."
            )
    for (name, old), (_, new) in zip(before.stages, now.stages):
        if old != new:
            raise BadInput(f"--resume cannot change the settings of stage {name}; start a new run for that.")
