"""A report as one HTML file that needs nothing beside it: style, script and pictures are inside."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from engine.evals.report.compare import NOTE, Compared
from engine.evals.report.content import INTERVALS, Content
from engine.evals.report.figures import change, text
from engine.evals.report.pictures import Picture

_LONG_WORD = 14  # letters that still fit a column
_TEMPLATE = "page.html.jinja"
_WIDTH, _HEIGHT = 160, 14  # of the little drawing of a difference, in pixels


@dataclass(frozen=True)
class Whisker:
    """Where a difference and its interval lie in a drawing whose middle is 0, in pixels from the left."""

    low: float
    mean: float
    high: float


def render(whole: Content) -> str:
    """The page. Whatever comes from outside is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "source": _source,
        "anchor": _anchor,
        "words": text,
        "minus": _minus,
        "broken": _broken,
        "words_whole": _words_whole,
    }
    environment.globals |= {"change": change, "whiskers": _whiskers, "drawing": (_WIDTH, _HEIGHT)}
    run = {name: value for name, value in whole.run.items() if value not in ("", [], (), None)}
    run.pop("unreadable images left out", None)
    return environment.get_template(_TEMPLATE).render(
        whole=whole,
        run=run | whole.machine,
        several=len(whole.weights) > 1,
        intervals=INTERVALS,
        note=NOTE.format(first=whole.weights[0]),
    )


def _source(picture: Picture) -> str:
    """A picture's content as the address of an img."""
    return f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"


def _anchor(name: str) -> str:
    """The id of a protocol's section."""
    return "protocol-" + re.sub(r"[^\w-]", "-", name)


def _minus(words: str) -> str:
    """Numbers with the sign that is as wide as a plus."""
    return words.replace("-", "\N{MINUS SIGN}")


def _broken(name: str) -> Markup:
    """A name that may be broken where its parts meet."""
    return Markup(re.sub(r"(?<=[_/.\-])(?=\w)", "<wbr>", str(escape(name))))


def _words_whole(name: str) -> Markup:
    """A name that is broken between its words only, unless they are long."""
    word = Markup('<span class="word">{}</span>')
    return Markup(" ").join(word.format(each) if len(each) <= _LONG_WORD else each for each in name.split())


def _whiskers(compared: Sequence[Compared]) -> list[Whisker | None]:
    """A drawing for each difference that has an interval or a spread, all fractions on one scale, plain figures on their own."""
    reach: dict[object, float] = {}
    for each in compared:
        scale = (each.protocol, each.figure) if each.plain else None
        reach[scale] = max(reach.get(scale, 0.0), *map(abs, _ends(each)))
    found = []
    for each in compared:
        most = reach[(each.protocol, each.figure) if each.plain else None]
        low, high = _ends(each)
        places = [_WIDTH / 2 * (1 + 0.94 * value / most) for value in (low, each.mean, high)] if most else None
        found.append(Whisker(*places) if places and low < high else None)
    return found


def _ends(compared: Compared) -> tuple[float, float]:
    if compared.interval is not None:
        return compared.interval
    spread = compared.spread or 0.0
    return compared.mean - spread, compared.mean + spread
