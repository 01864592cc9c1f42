"""How a bill is shown: tables for a terminal, the same as JSON, and the command that starts the run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.planning import bill
from engine.planning.bill import Spread, StageBill
from engine.planning.cards import Card
from engine.planning.peak import PARTS
from engine.training.config import Plan

GIB = 2**30


def described(plan: Plan, precision: str, card: Card, gpus: int, images: int) -> str:
    """What is planned, and how far it can be trusted."""
    train = plan.train
    how = [precision, "not compiled" if train.compile == "off" else "compiled"]
    how += train.in_words()
    how += [f"kernels {'reference' if train.kernels == 'auto' else train.kernels}"]
    own_aspect = any(settings.aspect == "keep" for _, settings in plan.stages)
    several = any(len(settings.side_draws) > 1 for _, settings in plan.stages)
    return (
        f"{train.method} ({plan.source}) with {plan.model} on {images:,} images; {gpus} x {card.name}, {', '.join(how)}\n"
        f"counted: launches, bytes, operations, memory; modelled: time, {card.origin}, in brackets at worst and at best\n"
        "loading, probes and evaluation come on top"
        + "\nimages of their own aspect are counted as if each filled its patches, and sorting them by shape is not"
        * own_aspect
        + "\nimages of several sides in a step are counted as if each step had those of one" * several
    )


def show(bills: Sequence[StageBill], card: Card, price: float, rows: int) -> None:
    """Print the tables."""
    console = Console()
    console.print(_of_stages(bills, card))
    for one in bills:
        shares = bill.costliest(one.count, card, rows)
        if shares:
            console.out(f"a step of {one.name} takes, by the model:", highlight=False)
        for name, share in shares:
            console.out(f"  {share:5.1%}  {name[:100]}", highlight=False)
    hours, energy = bill.hours(bills), bill.kilowatt_hours(bills, card)
    needed = bill.images_needed(bills)
    said = f"the whole run: {_spread(hours)} hours, {_spread(energy)} kWh of the cards"
    if price:
        said += f", {_spread(hours * (price * bills[0].gpus))} dollars"
    console.out(f"{said}; a loader has to give {needed:,.0f} images/s", highlight=False)


def between(least: Sequence[StageBill], most: Sequence[StageBill], price: float) -> str:
    """What a run takes that chooses how many tokens it sees."""
    words = []
    for bills, where in ((least, "where the cheapest is chosen each time (above)"), (most, "where all tokens are")):
        hours = bill.hours(bills)
        dollars = f", {_spread(hours * (price * bills[0].gpus))} dollars" * bool(price)
        words.append(f"{_spread(hours)} hours{dollars}, {where}")
    return f"auto: between {' and '.join(words)}; what choosing takes comes on top"


def _of_stages(bills: Sequence[StageBill], card: Card) -> Table:
    """A column a stage, so that it is as narrow as a terminal."""
    table = Table()
    for heading in ("a step on each GPU", *(one.name for one in bills)):
        table.add_column(heading, justify="right" if table.columns else "left")
    figures: list[tuple[str, Callable[[StageBill], str]]] = [
        ("images", lambda one: f"{one.batch // one.gpus:,}"),
        ("TFLOP", lambda one: f"{one.count.flops / 1e12:,.1f}"),
        ("GB through its memory", lambda one: f"{one.count.bytes / 1e9:,.1f}"),
        ("launches", lambda one: f"{one.count.launches:,}"),
        ("GiB at its peak", lambda one: f"{one.count.peak_bytes / GIB:.2f}"),
        *((f"   {part}", lambda one, part=part: f"{one.count.peak[part] / GIB:.2f}") for part in PARTS),
        (
            f"GiB needed, of {card.memory / GIB:.1f}",
            lambda one: (
                f"{bill.needed_memory(one.count) / GIB:.1f}{'' if bill.fits(one.count, card) else ': too much'}"
            ),
        ),
        ("images that fit, about", lambda one: f"{bill.images_that_fit(one.count, one.batch // one.gpus, card):,}"),
    ]
    of_run: list[tuple[str, Callable[[StageBill], str]]] = [
        ("images/s of all GPUs", lambda one: _spread(one.images_per_second)),
        ("steps", lambda one: f"{one.steps:,}"),
        ("hours", lambda one: _spread(one.hours)),
    ]
    for block in (figures, of_run):
        for name, figure in block:
            table.add_row(name, *(figure(one) for one in bills))
        table.add_section()
    return table


def show_options(bills: Sequence[StageBill], changed: Mapping[str, Sequence[StageBill] | str], card: Card) -> None:
    """Print what each option changes: a bill, or why it can't be had."""
    table = Table(title="with one thing changed")
    for heading in ("", "hours", "peak GiB", "GB of a step", "TFLOP of a step"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, of in {"as asked for": bills, **changed}.items():
        if isinstance(of, str):
            table.add_row(name, of.partition(":")[0], "", "", "")
            continue
        table.add_row(
            name, _spread(bill.hours(of)), ", ".join(f"{one.count.peak_bytes / GIB:.1f}" for one in of),
            ", ".join(f"{one.count.bytes / 1e9:,.0f}" for one in of), ", ".join(f"{one.count.flops / 1e12:,.0f}" for one in of),
        )  # fmt: skip
    Console().print(table)


def as_json(bills: Sequence[StageBill], card: Card, price: float) -> list[dict[str, Any]]:
    """All of it in numbers: seconds, bytes, hours, dollars; three for what is modelled: low, likely, high."""
    return [
        {
            "stage": one.name,
            "card": card.name,
            "origin": card.origin,
            "gpus": one.gpus,
            "batch": one.batch,
            "steps": one.steps,
            "launches": one.count.launches,
            "bytes": one.count.bytes,
            "flops": one.count.flops,
            "peak": one.count.peak,
            "fits": bill.fits(one.count, card),
            "images_per_second": _three(one.images_per_second),
            "hours": _three(one.hours),
            "dollars": _three(one.hours * (price * one.gpus)) if price else None,
        }
        for one in bills
    ]


def command(flags: Sequence[str], gpus: int) -> str:
    """What starts the run where the cards are; images are those that the user has."""
    words = ("DIR" if word.startswith("synthetic:") else word for word in flags)
    start = "python" if gpus == 1 else f"torchrun --nproc_per_node {gpus}"
    return f"{start} -m engine.train {' '.join(words)}"


def _spread(of: Spread) -> str:
    return f"{_short(of.likely)} ({_short(of.low)} to {_short(of.high)})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _three(of: Spread) -> list[float]:
    return [of.low, of.likely, of.high]
