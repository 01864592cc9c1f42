"""What a study has found so far: of each run, and of all seeds of an arm together."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.studies import Study

COLLAPSED = ("collapsing", "broken")
WORDS = ("broken", "collapsing", "failed", "not done yet", "watch", "healthy")  # the worst first


@dataclass(frozen=True)
class Judged:
    """A run or yardstick.

    Attributes:
        arm: its pretext task, or the yardstick's name.
        collapse: what kept prototypes from collapsing; "" where there are none, None for a yardstick.
        seed: of the training; None where nothing is random.
        figures: accuracies between 0 and 1 by name, one for each split; empty while there are none.
        verdict: the run's last, or why it has none.
        command: what repeats it.
        seconds: that its steps took.
        operations: of its steps, in matrix products.
    """

    arm: str
    collapse: str | None
    seed: int | None
    figures: Mapping[str, Sequence[float]]
    verdict: str = ""
    command: str = ""
    seconds: float | None = None
    operations: float | None = None


@dataclass(frozen=True)
class Row:
    """What the table shows of an arm under one way to keep it from collapsing: all its seeds together.

    Attributes:
        figures: every split of every seed, by figure's name.
        means: over the splits of each seed.
        verdict: the worst one's first word, and how many have it if not all do.
        minutes: of training, one for each seed.
        operations: of the training of one seed, the same for all; None where it isn't known.
    """

    arm: str
    collapse: str | None
    seeds: tuple[int, ...]
    figures: Mapping[str, tuple[float, ...]]
    means: Mapping[str, tuple[float, ...]]
    verdict: str
    minutes: tuple[float, ...] = ()
    operations: float | None = None

    @property
    def collapsed(self) -> bool:
        return self.verdict.startswith(COLLAPSED)

    @property
    def guard(self) -> str:
        return {None: "", "": "any (no prototypes)"}.get(self.collapse, self.collapse)

    @property
    def costs(self) -> list[str]:
        """Minutes and TFLOP."""
        time = f"{np.mean(self.minutes):.1f}" if self.minutes else ""
        return [time, "" if self.operations is None else f"{self.operations / 1e12:.1f}"]


@dataclass(frozen=True)
class Outcome:
    """A study so far; `about` says on what and how long, in words, `remark` what else is to be known."""

    study: Study
    about: str
    judged: tuple[Judged, ...]
    yardsticks: tuple[Judged, ...]
    remark: str = ""

    @property
    def rows(self) -> list[Row]:
        """In the grid's order, the yardsticks first."""
        groups: dict[tuple[str, str | None], list[Judged]] = {}
        for found in (*self.yardsticks, *self.judged):
            groups.setdefault((found.arm, found.collapse), []).append(found)
        return [_row(arm, collapse, found) for (arm, collapse), found in groups.items()]

    @property
    def names(self) -> list[str]:
        """Of all figures, in order."""
        return list(dict.fromkeys(name for found in (*self.yardsticks, *self.judged) for name in found.figures))

    @property
    def notes(self) -> list[str]:
        """What must be known to read the table."""
        seeds = len({found.seed for found in self.judged})
        spread = (
            "splits and seeds"
            if seeds > 1
            else "splits of the labelled images; one seed does not show that of training"
        )
        notes = [
            "Top-1 in %. n-shot: logistic regression on frozen features of n images per class (MSN's protocol), on disjoint "
            f"splits that are the same for every run. ± is the standard deviation over {spread}.",
        ]
        if self.study.reference:
            notes += [
                "Order of images, epochs, crops and masks are equal in all runs of a seed; learning rates are each method's own."
            ]
        else:
            notes += ["Every run has its own recipe's epochs, crops and learning rates."]
        if "linear" in self.study.protocols:
            notes += ["linear: a linear probe at its last epoch, the best of its learning rates on the test set."]
        if "cluster" in self.study.protocols:
            notes += [
                "cluster ACC: k-means on test features, clusters matched with classes; its ± is over starts as well."
            ]
        if self.study.classifies:
            notes += ["classifier: held-out accuracy of the classifier that the run itself trained."]
        if self.study.costs:
            notes += [
                "minutes: what the training steps took by the pace that the run logged, mean over seeds. TFLOP: what they "
                "computed in matrix products, counted."
            ]
        notes += [self.remark] if self.remark else []
        alone = list(dict.fromkeys(found.arm for found in self.judged if found.collapse == ""))
        if alone and self.study.collapse:
            has = "has" if len(alone) == 1 else "have"
            notes.append(
                f"{' and '.join(alone).capitalize()} {has} no prototypes: what keeps those from collapsing makes no difference, "
                "so there is one run per seed, and it stands for all."
            )
        notes += [
            f"{row.arm}, {row.guard}: {row.verdict}. Its figures say little." for row in self.rows if row.collapsed
        ]
        return notes


def _row(arm: str, collapse: str | None, found: Sequence[Judged]) -> Row:
    names = dict.fromkeys(name for one in found for name in one.figures)
    figures = {name: tuple(value for one in found for value in one.figures.get(name, ())) for name in names}
    means = {name: tuple(float(np.mean(one.figures[name])) for one in found if one.figures.get(name)) for name in names}
    words = Counter(_word(one.verdict) for one in found)
    worst = min(words, key=lambda word: WORDS.index(word) if word in WORDS else -1)
    verdict = worst if len(words) == 1 else f"{worst} ({words[worst]} of {len(found)})"
    seeds = tuple(one.seed for one in found if one.seed is not None)
    minutes = tuple(one.seconds / 60 for one in found if one.seconds is not None)
    operations = next((one.operations for one in found if one.operations is not None), None)
    return Row(arm, collapse, seeds, figures, means, verdict, minutes, operations)


def _word(verdict: str) -> str:
    return verdict.partition(":")[0]


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation in percent; None where there is one value only."""
    return 100 * float(np.mean(values)), 100 * float(np.std(values)) if len(values) > 1 else None
