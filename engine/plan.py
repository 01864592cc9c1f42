"""`python -m engine.plan`: what a run will cost on GPUs that are not here. Flags -> counted steps -> the bill."""

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from engine.core import dist
from engine.core.commands import exit_status
from engine.core.durable import write_file
from engine.core.errors import BadInput
from engine.core.flags import read
from engine.core.short_help import short_help
from engine.data.sources import ImageSet, open_images, usable_cpus
from engine.planning import bill, cards, options, report
from engine.planning.bill import StageBill
from engine.planning.cards import Card
from engine.planning.counting import Count, count
from engine.training import config
from engine.training.dry_run import Planned, dry_run
from engine.training.operations import cheapest
from engine.training.parts import prepare, stages_of
from engine.training.portions import Portion, portions

IMAGENET = 1_281_167
HELP = {"the bill": ("gpu", "gpus", "images", "price", "options", "fit", "dry_run", "rows", "out")}


@dataclass(frozen=True)
class Flags:
    """What `engine.plan` is told besides the flags of `engine.train`."""

    gpu: str = "A100-80"
    """A100-40, A100-80, H100, H200, L40S, 4090, V100 or T4."""
    gpus: int = 1
    """How many of them."""
    images: int = 0
    """Training images; default: those of --data, else ImageNet's 1,281,167."""
    price: float = 0.0
    """Of one GPU for an hour, in dollars."""
    options: bool = False
    """Count also what each option that saves would change; half a minute each."""
    fit: bool = False
    """Find options with which the run fits the cards, and print its command."""
    dry_run: bool = False
    """Where such a card is: measure a few steps of each stage, and put them beside what was planned."""
    rows: int = 5
    """How many of a step's costliest kernels are shown."""
    out: str = ""
    """A JSON file for all of it."""

    def check(self) -> Card:
        """Raise BadInput for a value that cannot be meant; the card."""
        for name, least in {"gpus": 1, "images": 0, "price": 0, "rows": 0}.items():
            if getattr(self, name) < least:
                raise BadInput(f"--{name} is {getattr(self, name)}; it must be {least} or more.")
        return cards.named(self.gpu)


@dataclass(frozen=True)
class Asked:
    """A run as it was asked for: flags of `engine.train` and what they mean, on which cards."""

    flags: tuple[str, ...]
    plan: config.Plan
    images: ImageSet
    card: Card
    gpus: int

    @property
    def precision(self) -> str:
        chosen = self.plan.train.precision
        return chosen if chosen != "auto" else "bf16" if self.card.bf16 else "fp16"

    def with_flags(self, *more: str) -> "Asked":
        flags = (*self.flags, *more)
        return replace(self, flags=flags, plan=config.parse(flags))

    def counts(self) -> list[Count]:
        """Of a step of each portion, as many at once as there are cores; those that show the same are counted once."""

        def of(portion: Portion) -> Count:
            return count(self.plan, self.flags, portion, self.gpus, self.precision)

        every = self.portions()
        shown = [(portion.stage.index, portion.phase, portion.images_per_step) for portion in every]
        distinct = dict(zip(shown, every, strict=True))
        with ThreadPoolExecutor(usable_cpus()) as pool:
            found = dict(zip(distinct, pool.map(of, distinct.values()), strict=True))
        return [found[what] for what in shown]

    def portions(self) -> list[Portion]:
        """Where a stage chooses what it shows, the cheapest that it may."""
        stages = stages_of(self.plan, self.images)
        return portions(self.plan, stages, cheapest(self.plan, stages))

    def bills(self, counts: Sequence[Count]) -> list[StageBill]:
        return [
            bill.of_portion(portion, found, self.card, self.gpus)
            for portion, found in zip(self.portions(), counts, strict=True)
        ]

    def as_if_whole(self, bills: Sequence[StageBill]) -> list[StageBill]:
        """The bills as they are if stages that choose what they show choose all of it; none where no stage chooses."""
        chooses = {name for name, settings in self.plan.stages if settings.phase_choice == "auto"}
        found: dict[str, StageBill] = {}
        for portion, one in zip(self.portions(), bills, strict=True):
            # the last portion of such a stage shows all
            alike = portion.stage.name if portion.stage.name in chooses else portion.name
            found[alike] = replace(one, steps=portion.stage.total_steps) if alike in chooses else one
        return list(found.values()) if chooses else []


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 1 where --fit finds nothing that fits, else that of `exit_status`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments):
        usage = "usage: python -m engine.plan --method NAME [flags of engine.train] [flags]"
        print(short_help(Flags, usage, HELP, "All flags of engine.train are understood; its --help lists them."))
        return 0
    return exit_status(lambda: _planned(*parse(arguments)), "what was counted is kept")


def parse(arguments: Sequence[str]) -> tuple[Flags, Asked]:
    """The command's own flags, and the run. Raises BadInput for what cannot be meant."""
    flags, rest = read(Flags, arguments, return_unknown_args=True, add_help=False)
    card = flags.check()
    data = [] if "--data" in rest else ["--data", f"synthetic:{flags.images or IMAGENET}"]
    of_train = (*rest, *data, "--device", "cuda")
    plan = config.parse(of_train)
    if "--data" in rest and flags.images:
        raise BadInput("--images and --data both say how many images there are; give one of them.")
    images = open_images(plan.train.data or None, "train", plan.train.bad_limit)
    for name, settings in plan.stages:
        if settings.batch_size % (flags.gpus * plan.train.accumulate) or settings.batch_size > len(images):
            raise BadInput(
                f"stage {name} has a batch of {settings.batch_size}, which {flags.gpus} GPUs with {plan.train.accumulate} "
                f"micro-batches each cannot share evenly, or which is more than the {len(images)} images; set --batch-size."
            )
    return flags, Asked(of_train, plan, images, card, flags.gpus)


def _planned(flags: Flags, asked: Asked) -> int:
    print(
        f"counting a step of {len(asked.portions())} stage(s) or phases on a device that computes nothing: half a "
        "minute each, the first time ..."
    )
    counts = asked.counts()
    bills = asked.bills(counts)
    print(report.described(asked.plan, asked.precision, asked.card, asked.gpus, len(asked.images)))
    report.show(bills, asked.card, flags.price, flags.rows)
    if whole := asked.as_if_whole(bills):
        print(report.between(bills, whole, flags.price))
    found = {"flags": list(asked.flags), "stages": report.as_json(bills, asked.card, flags.price)}
    if flags.options:
        changed = _with_each(asked, list(options.options(asked.plan)))
        report.show_options(bills, changed, asked.card)
        found["options"] = {
            name: report.as_json(of, asked.card, flags.price) for name, of in changed.items() if not isinstance(of, str)
        }
    status = 0
    if flags.fit:
        status, found["fit"] = _fit(asked, counts, bills)
    elif not options.fitting(counts, asked.card):
        print("this does not fit the card; --fit looks for options with which it does.")
    if flags.dry_run:
        _measured(asked, bills)
    if flags.out:
        text = json.dumps(found, indent=1) + "\n"
        write_file(Path(flags.out).expanduser(), lambda aside: aside.write_text(text))
    return status


def _measured(asked: Asked, bills: Sequence[StageBill]) -> None:
    """Measured steps beside the planned ones, on the card that is here. Raises BadInput where there is none."""
    if asked.gpus != 1:
        raise BadInput(
            f"--dry-run measures one GPU, and the plan is for {asked.gpus}; give --gpus 1 and its --batch-size."
        )
    planned = [Planned(one.images_per_second.likely, one.count.peak_bytes / 2**30) for one in bills]
    try:
        dry_run(prepare(asked.plan, dist.start("cuda")), planned)
    finally:
        dist.stop()


def _with_each(asked: Asked, changes: Sequence[options.Option]) -> dict[str, list[StageBill] | str]:
    """By option's name the bill under it, or why it can't be had; counted side by side."""

    def bills(option: options.Option) -> list[StageBill] | str:
        try:
            changed = asked.with_flags(*option.flags)
            return changed.bills(changed.counts())
        except BadInput as error:
            return str(error)
        finally:
            print(f"counted: {option.name}")

    print(f"counting {len(changes)} options ...")
    with ThreadPoolExecutor(usable_cpus()) as pool:
        return dict(zip((option.name for option in changes), pool.map(bills, changes), strict=True))


def _fit(asked: Asked, counts: Sequence[Count], bills: Sequence[StageBill]) -> tuple[int, list[str] | None]:
    """The exit status, and the flags with which the run fits, printed as a command."""
    if options.fitting(counts, asked.card):
        print(f"it fits as it is:\n  {report.command(asked.flags, asked.gpus)}")
        return 0, list(asked.flags)
    for saving in options.savings(asked.plan, counts, asked.card, asked.gpus):
        print(f"counting: {' '.join(saving.flags)} ...")
        changed = asked.with_flags(*saving.flags)
        found = changed.counts()
        if options.fitting(found, asked.card):
            slower = bill.hours(changed.bills(found)).likely / bill.hours(bills).likely - 1
            need = options.largest_need(found) / 2**30
            print(
                f"with these it fits ({need:.1f} of {asked.card.memory / 2**30:.1f} GiB, {slower:+.0%} hours):\n"
                f"  {report.command(changed.flags, asked.gpus)}"
            )
            return 0, list(changed.flags)
    print("nothing was found with which it fits: take more cards, a smaller --batch-size, or a smaller model.")
    return 1, None


if __name__ == "__main__":
    sys.exit(main())
