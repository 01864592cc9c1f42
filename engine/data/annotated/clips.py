"""The embedded videos: scikit-learn's handwritten digits that move over photographs, in the layout of DAVIS-2017.

Eight videos of 16 frames, 192x128 pixels. In each, two to four digits of one colour move, turn and grow or shrink evenly, later
ones in front of earlier ones, over a photograph along which a camera pans. With a colour each, the features of random weights
would follow them. Ids tell the visible part of a digit; of each at least two fifths of its pixels are in sight in every frame,
and three fifths in the first. Digits and photographs are those of the validation images of `engine.data.sets.scenes`. All is
drawn from a fixed seed.

Shapes: H x W, 128 x 192 pixels of a frame.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from engine.data import cache as user_cache
from engine.data.annotated import davis
from engine.data.sets import digits, scenes

NAME = "clips-1"  # the number rises when pixels or ids change: an old cache is not taken for the new set
SEED, WIDTH, HEIGHT = 20176, 192, 128
VIDEOS, FRAMES = 8, 16
FEWEST_OBJECTS, MOST_OBJECTS, LOWEST, HIGHEST, TRIES = 2, 4, 48, 88, 50
SHOWN, SHOWN_FIRST = 0.4, 0.6
MOST_GROWTH, MOST_TURN = 1.3, 25  # from the first frame to the last; degrees
PAN = 32  # pixels of a frame, at most, that the camera goes along either side
LARGE = 128  # side to which the 8x8 pixels of a digit are enlarged before they are moved


def write(cache: Path | None = None) -> Path:
    """Writes the set below `cache` (default: the user's cache) unless it is there whole; returns its folder.

    It has JPEGImages/480p/, Annotations/480p/ (480p is the folder's name; frames are smaller) and ImageSets/2017/val.txt.

    Raises:
        BadInput: the cache folder cannot be written, or a photograph is missing in its package.
    """
    return user_cache.kept((cache or user_cache.folder()) / NAME, _fill)


def _fill(folder: Path) -> None:
    from sklearn.datasets import load_digits  # slow to import, and wanted once

    source = load_digits()
    ink = np.round(source.images * (255 / 16)).astype(np.uint8)[digits.is_val(source.target)]
    photographs = [scenes.photograph(*file) for file in scenes.PHOTOGRAPHS["val"]]
    names = [f"clip{number:02d}" for number in range(VIDEOS)]
    for number, name in enumerate(names):
        # RandomState, whose stream numpy has frozen
        rng = np.random.RandomState([SEED, number])
        frames = _panned(rng, photographs[number % len(photographs)])
        covers = _moved(rng, ink)
        cover = np.max(covers, axis=0)
        colour = scenes.colour_on(rng, frames[0][cover[0] >= 0.5].mean(0))
        frames += cover[..., None] * (colour - frames)
        places = [folder / kind / davis.RESOLUTION / name for kind in ("JPEGImages", "Annotations")]
        for place in places:
            place.mkdir(parents=True)
        for index, (pixels, ids) in enumerate(zip(frames, _ids(covers), strict=True)):
            picture = Image.fromarray(np.round(pixels).astype(np.uint8))
            picture.save(places[0] / f"{index:05d}.jpg", quality=95, subsampling=0)
            mask = Image.fromarray(ids)
            mask.putpalette(scenes.palette())
            mask.save(places[1] / f"{index:05d}.png")
    lists = folder / "ImageSets" / davis.YEAR
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in names))


def _panned(rng: np.random.RandomState, photograph: Image.Image) -> np.ndarray:
    """float32 [FRAMES, H, W, 3], crops along a line."""
    most = min((photograph.width - 1) / (WIDTH + PAN), (photograph.height - 1) / (HEIGHT + PAN))
    scale = 1 + (most - 1) * rng.random_sample()
    size = np.array([WIDTH, HEIGHT]) * scale
    way = (2 * rng.random_sample(2) - 1) * PAN * scale
    start = np.maximum(-way, 0) + rng.random_sample(2) * (np.array(photograph.size) - size - np.abs(way))
    frames = []
    for share in np.linspace(0, 1, FRAMES):
        corner = start + share * way
        box = (*corner, *(corner + size))
        frames.append(np.asarray(photograph.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box), np.float32))
    return np.stack(frames)


def _moved(rng: np.random.RandomState, ink: np.ndarray) -> list[np.ndarray]:
    """float32 [FRAMES, H, W] from 0 to 1 of each object, how much it covers; later ones lie in front."""
    covers: list[np.ndarray] = []
    wanted = rng.randint(FEWEST_OBJECTS, MOST_OBJECTS + 1)
    for _ in range(TRIES):
        tried = [*covers, _way(rng, ink[rng.randint(len(ink))])]
        visible = _ids(tried)
        shares = [
            ((visible == place + 1).sum((1, 2)) / (cover >= 0.5).sum((1, 2))) for place, cover in enumerate(tried)
        ]
        if all(share.min() >= SHOWN and share[0] >= SHOWN_FIRST for share in shares):
            covers = tried
        if len(covers) == wanted:
            break
    return covers


def _way(rng: np.random.RandomState, ink: np.ndarray) -> np.ndarray:
    """float32 [FRAMES, H, W]: one digit from a place to another, at an even speed."""
    large = Image.fromarray(ink).resize((LARGE, LARGE), Image.Resampling.BICUBIC)
    height = LOWEST * (HIGHEST / LOWEST) ** rng.random_sample()
    growth = MOST_GROWTH ** (2 * rng.random_sample() - 1)
    angle, turn = np.radians(MOST_TURN) * (2 * rng.random_sample(2) - 1)
    edge = height * max(1, growth) / 2
    ends = edge + rng.random_sample((2, 2)) * (np.array([WIDTH, HEIGHT]) - 2 * edge)
    frames = []
    for share in np.linspace(0, 1, FRAMES):
        x, y = ends[0] + share * (ends[1] - ends[0])
        zoom = LARGE / (height * growth**share)
        cos, sin = zoom * np.cos(angle + share * turn), zoom * np.sin(angle + share * turn)
        inverse = (cos, sin, LARGE / 2 - cos * x - sin * y, -sin, cos, LARGE / 2 + sin * x - cos * y)
        moved = large.transform((WIDTH, HEIGHT), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
        frames.append(scenes.covered(moved))
    return np.stack(frames)


def _ids(covers: list[np.ndarray]) -> np.ndarray:
    """uint8 [FRAMES, H, W]: the number of the foremost object that covers a pixel by half or more, or 0."""
    ids = np.zeros((FRAMES, HEIGHT, WIDTH), np.uint8)
    for place, cover in enumerate(covers):
        ids[cover >= 0.5] = place + 1
    return ids
