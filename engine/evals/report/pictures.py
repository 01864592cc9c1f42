"""Pictures of a report: PNG files in its folder, and what a page needs to show them."""

import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.core.extras import Extras
from engine.core.plotting import Figure
from engine.evals.charts import MAPS, feature_map
from engine.evals.features import Features
from engine.evals.result import Result

FOLDER = "pictures"
_DPI = 100
_LONGEST = 60  # bytes of a part of a file's name; file systems allow 255 for the whole


@dataclass(frozen=True)
class Picture:
    """A picture of one result, or of features, then without protocol.

    Args:
        file: relative to the report.
        png: the file's content.
        size: width and height in pixels.
    """

    weights: str
    protocol: str
    title: str
    file: str
    png: bytes
    size: tuple[int, int]

    @property
    def alt(self) -> str:
        """What it shows, for those who cannot see it."""
        return f"{self.title}: {self.weights}" + (f", protocol {self.protocol}" if self.protocol else "")


def draw(
    results: Sequence[Result],
    features: Mapping[str, tuple[Features, Features]],
    extras: Extras,
    map_kind: str = "pca",
) -> list[Picture]:
    """The pictures of all results, and a map of the test features of each weights that has any. No two have one file name; each
    is one of the `extras`."""
    taken: set[str] = set()
    found = []
    for result in results:
        for title, figure in result.pictures.items():
            with extras.of(f"picture '{title}' of {result.weights} by {result.protocol}"):
                found.append(_picture(figure, result.weights, result.protocol, title, taken))
    for weights, (_, test) in features.items():
        with extras.of(f"picture '{MAPS[map_kind]}' of {weights}"):
            found.append(_picture(feature_map(test, map_kind), weights, "", MAPS[map_kind], taken))
    return found


def save(pictures: Sequence[Picture], folder: Path) -> None:
    """Write the files below `folder`."""
    if pictures:
        (folder / FOLDER).mkdir()
    for picture in pictures:
        (folder / picture.file).write_bytes(picture.png)


def _picture(figure: Figure, weights: str, protocol: str, title: str, taken: set[str]) -> Picture:
    stem = plain = "-".join(_part(name) for name in (weights, protocol, title) if name)
    copies = 1
    while stem.lower() in taken:
        copies += 1
        stem = f"{plain}-{copies}"
    taken.add(stem.lower())
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    png = content.getvalue()
    # a PNG's first chunk begins at byte 8: length, type, width, height
    return Picture(weights, protocol, title, f"{FOLDER}/{stem}.png", png, struct.unpack(">II", png[16:24]))


def _part(name: str) -> str:
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
    return plain.encode()[-_LONGEST:].decode(errors="ignore")
