"""Which implementation a trial speaks for, and why the others lost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

INCUMBENT = "reference"
FASTER = 1.03  # than the incumbent, at least


@dataclass(frozen=True)
class Verdict:
    """What runs.

    Attributes:
        choice: the implementation.
        ms: its time; None where nothing was timed.
        ratio: the next one's time over it; None where nothing else was right.
        why: by implementation, in words, also of the chosen one.
    """

    choice: str
    ms: float | None
    ratio: float | None
    why: dict[str, str]


def judge(forms: Mapping[str, Mapping[str, Any]], *, compiles: bool = True, bit_stable: bool = False) -> Verdict:
    """The fastest right implementation, if it is 3 % faster than the reference and their times don't overlap; else the reference.

    Args:
        forms: by implementation "failure", or "ms", "low", "high" and "stable".
        compiles: whether the run compiles; what the compiler must fuse is left out where it doesn't.
        bit_stable: take nothing that gave other bits the second time; where only such is right, the reference stays.
    """
    why: dict[str, str] = {}
    timed = {}
    for name, form in forms.items():
        if form.get("failure"):
            why[name] = form["failure"]
        elif not compiles and name == "plain":
            why[name] = "it is for runs that compile"
        elif bit_stable and not form["stable"] and name != INCUMBENT:
            why[name] = "other bits at each run"
        else:
            timed[name] = form
    if bit_stable and INCUMBENT in timed and not timed[INCUMBENT]["stable"]:
        why[INCUMBENT] = "other bits at each run"
        if len(timed) > 1:
            del timed[INCUMBENT]
    if not timed:
        return Verdict(INCUMBENT, None, None, why | {INCUMBENT: why.get(INCUMBENT, "nothing was measured")})
    incumbent = timed.get(INCUMBENT)
    eligible = {
        name: form
        for name, form in timed.items()
        if incumbent is None
        or name == INCUMBENT
        or (form["ms"] * FASTER < incumbent["ms"] and form["high"] < incumbent["low"])
    }
    choice = min(eligible, key=lambda name: eligible[name]["ms"])
    best = timed[choice]
    others = [form["ms"] for name, form in timed.items() if name != choice]
    for name, form in timed.items():
        if name == choice:
            why[name] = "fastest" if len(timed) > 1 else "the only one that is right here"
        elif name in eligible or form["ms"] > best["ms"]:
            why[name] = f"{form['ms'] / best['ms']:.2f} times as long"
        else:
            why[name] = (
                f"not clearly faster: {form['low']:.3g} to {form['high']:.3g} ms against {best['low']:.3g} to {best['high']:.3g}"
            )
    return Verdict(choice, best["ms"], min(others) / best["ms"] if others else None, why)
