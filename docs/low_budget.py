"""Fills the table of docs/low_budget.md: what a ViT-L costs, counted and modelled by `engine.plan`.

    PYTHONPATH=. python docs/low_budget.py [ROW ...]

counts a step of each stage of each row, or of the rows whose names begin so, for each share of the batch that fits the card, in
as few micro-batches as do, and writes the table between the two marks; other rows stay as they are. The first time it takes
minutes; counts are kept until the code changes.
"""

import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.data.sources import open_images
from engine.plan import IMAGENET, Asked
from engine.planning import bill, cards, options
from engine.planning.bill import Spread
from engine.training import config

PAGE = Path(__file__).with_suffix(".md")
MARKS = "<!-- table of docs/low_budget.py -->", "<!-- end of the table -->"
MODEL = "vit_large_patch16_224"
ROWS = {
    "MAE, 400 epochs": ("mae", "--epochs", "400"),
    "MAE, 800 epochs": ("mae",),
    "MAE-CT, from published MAE weights": ("maect", "--weights", "FILE"),
    "MAE-CT aug, from published MAE weights": ("maect", "--weights", "FILE", "--preset", "aug"),
    "MIM-Refiner, from published MAE weights": ("mim_refiner", "--weights", "FILE"),
    "DINO, 100 epochs": ("dino",),
    "DINOv2, 100 epochs": ("dinov2",),
}
CARDS, GPUS = ("A100-80", "H100"), (1, 4, 8)


def asked(row: tuple[str, ...], card: str, gpus: int) -> Asked:
    flags = ("--method", *row, "--model", MODEL, "--data", f"synthetic:{IMAGENET}", "--device", "cuda")
    images = open_images(f"synthetic:{IMAGENET}", "train")
    return Asked(flags, config.parse(flags), images, cards.named(card), gpus)


def cell(row: tuple[str, ...], card: str, gpus: int) -> tuple[str, Spread]:
    """GPU hours, in as few micro-batches as fit, and what these are."""
    plain = asked(row, card, gpus)
    smallest = min(settings.batch_size for _, settings in plain.plan.stages) // gpus
    guess = 1
    while smallest // guess > 128:  # what fits of ViT-L anywhere; more is tried below
        guess *= 2
    for micro in itertools.takewhile(lambda n: n <= smallest, (guess * 2**power for power in range(8))):
        run = plain.with_flags("--accumulate", str(micro)) if micro > 1 else plain
        counts = run.counts()
        if options.fitting(counts, run.card):
            return f" in {micro}" * (micro > 1), bill.hours(run.bills(counts))
    raise RuntimeError(f"nothing of {row} fits {card}")


def main(wanted: tuple[str, ...]) -> int:
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    table, _, after = rest.partition(MARKS[1])
    former = {line.split("|")[1].strip(): line for line in table.splitlines() if line.count("|") > 2}
    began = time.monotonic()

    def words(name: str, card: str, gpus: int) -> str:
        micro, hours = cell(ROWS[name], card, gpus)
        said = f"{hours.likely:.3g} h ({hours.low:.3g} to {hours.high:.3g}){micro}"
        print(f"{time.monotonic() - began:6.0f} s  {name}, {gpus} x {card}: {said}", flush=True)
        return said

    places = list(itertools.product(CARDS, GPUS))
    with ThreadPoolExecutor(len(ROWS) * len(places)) as pool:  # most wait for a count that another has asked for
        counting = {
            name: [pool.submit(words, name, *place) for place in places]
            for name in ROWS
            if not wanted or name.startswith(wanted)
        }
        rows = {name: [one.result() for one in cells] for name, cells in counting.items()}
    lines = ["| " + " | ".join(["", *(f"{gpus} x {card}" for card, gpus in places)]) + " |"]
    lines.append("| --- |" + " ---: |" * len(places))
    lines += [f"| {' | '.join([name, *rows[name]])} |" if name in rows else former[name] for name in ROWS]
    PAGE.write_text("\n".join([before.rstrip() + "\n", MARKS[0], *lines, MARKS[1]]) + after)
    return 0


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:])))
