"""Objects followed through a video by frozen patch features alone: DAVIS-2017 propagation.

Caron et al. 2021 (DINO, arXiv 2104.14294, section 4.2.2) and its released evaluation, after Jabri et al. 2020 (arXiv 2006.14613).
The mask of the first frame is given. Every patch of a later frame takes the mean of the masks that its nearest patches have in
the first and the previous frames, by cosine similarity and not far from its own place. Nothing is trained.

Frames become 480 pixels high (their short side), the long side is rounded down to a multiple of 64 pixels, whichever patch size
divides that; a patch size that does not takes multiples of itself, which is ours. Smaller frames, as those of the embedded clips,
keep their short side. Resizing is bilinear without antialiasing, as in the released code. That one divides red by .228 where
encoders are trained with .229; `red_std` chooses. Position embeddings are those that `engine.model.vit` interpolates (bicubic).

J, F and their statistics are `engine.evals.metrics.video`'s. Beside them stand what the first mask scores if nothing moves, and
what the true masks of all frames score after they went through the patch grid and this read-out: masks of whole patches, which
means of several may surpass a little.

Shapes: T frames, H x W pixels of a frame as stored, h x w patches of the input made of it, N = h * w, C width, K objects,
M = K + 1 with the background, F frames to take masks from.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from engine.core.errors import BadInput
from engine.core.plotting import Figure
from engine.data import ahead
from engine.data.annotated import dense
from engine.data.annotated.davis import Video, VideoSet
from engine.data.views import IMAGENET_STD
from engine.evals.features import threads_for
from engine.evals.metrics import video as metric
from engine.evals.result import Result
from engine.evals.subject import Subject

READS = "video"
WANTS = "model"

PUBLISHED = {"size": 480, "previous": 7, "radius": 12, "keep": 5, "temperature": 0.1, "red_std": 0.228}
STEP = 64  # pixels, of the long side
_PIXELS = 2**21  # encoded at a time: five frames of 480x832
_PAIRS = 2**24  # of patches that are compared at a time: 64 MB of similarities
_SHOWN = 3  # videos in the picture


@dataclass(frozen=True)
class Settings:
    """DAVIS propagation settings; the defaults are the published ones but for red's deviation."""

    size: int = 0
    """Short side of the input in pixels, a multiple of the patch size; 0 is the frames' own up to the published 480."""
    previous: int = 7
    """Frames before the present one that masks are taken from, beside the first."""
    radius: int = 12
    """Patches that an object may move along either side; 0 looks everywhere."""
    keep: int = 5
    """Nearest patches whose masks are averaged; those as near as the last of them count, too."""
    temperature: float = 0.1
    """Patches are weighed by exp(cosine / temperature)."""
    red_std: float = IMAGENET_STD[0]
    """What red is divided by. DINO's released evaluation has .228."""

    def __post_init__(self):
        for name, least in {"size": 0, "previous": 0, "radius": 0, "keep": 1}.items():
            if getattr(self, name) < least:
                raise BadInput(f"propagation {name} = {getattr(self, name)} must be {least} or more.")
        for name in ("temperature", "red_std"):
            if not 0 < getattr(self, name) < float("inf"):
                raise BadInput(f"propagation {name} = {getattr(self, name)} must be a positive number.")


@dataclass(frozen=True)
class _Followed:
    """What became of one video.

    Attributes:
        shape: (height, width) of the input.
        shown: by frame, the ids found, uint8 [H, W], for a picture.
        scores: J and F, float64 [2, K, T - 2].
        unmoved, bound: the same of the first mask, and of the true masks on patches.
    """

    video: Video
    shape: tuple[int, int]
    shown: dict[int, np.ndarray]
    scores: np.ndarray
    unmoved: np.ndarray
    bound: np.ndarray


def check(train: None, test: VideoSet, settings: Settings) -> None:
    """Raise BadInput if `evaluate` could not run on these videos."""
    for video in test.videos:
        if len(video) < 3:
            raise BadInput(
                f"propagation needs 3 frames, for neither the first nor the last is judged; {video.name} has {len(video)}."
            )


def check_model(subject: Subject, train: None, test: VideoSet, settings: Settings) -> None:
    """Raise BadInput for weights that do not take the frames."""
    for video in test.videos:
        subject.check_input(*_shape(video, subject.vit.patch_size, settings))


def input_shape(height: int, width: int, patch: int, size: int = 0) -> tuple[int, int]:
    """(height, width) in pixels of the input made of frames of `height` x `width`.

    Raises:
        BadInput: `size` is no multiple of the patch size, or frames are smaller than a patch.
    """
    if size % patch:
        raise BadInput(f"propagation size = {size} is not a multiple of the patch size {patch}; choose one.")
    low, high = sorted((height, width))
    short = size or min(low, PUBLISHED["size"]) // patch * patch
    if not short:
        raise BadInput(f"frames of {width}x{height} pixels are smaller than a patch of {patch}x{patch}; choose a size.")
    step = patch if STEP % patch else STEP
    long = max(short, short * high // low // step * step)
    return (short, long) if height <= width else (long, short)


def propagate(
    target_NC: Tensor, sources_FNC: Tensor, masks_FNM: Tensor, grid: tuple[int, int], settings: Settings
) -> Tensor:
    """fp32 [N, M]: the target's masks, means of those of its nearest patches in F frames.

    In memory at a time: the similarities of a few rows of patches to those in their reach, 64 MB or one row's, three times.

    Args:
        target_NC, sources_FNC: fp32 features of unit length.
        masks_FNM: fp32, in [0, 1].
        grid: (h, w).
    """
    h, w = grid
    count, reach = len(sources_FNC), settings.radius or max(grid)
    rows = max(1, _PAIRS // (count * w * w * min(h, 2 * reach + 1)))
    y, x = (torch.arange(side, device=target_NC.device) for side in grid)
    columns_ww = (x[:, None] - x).abs() <= reach
    found = []
    for top in range(0, h, rows):
        bottom = min(h, top + rows)
        near = slice(max(0, top - reach) * w, min(h, bottom + reach) * w)
        mine, theirs = y[top:bottom], y[near.start // w : near.stop // w]
        rows_rs = (mine[:, None] - theirs).abs() <= reach
        within = (
            (rows_rs[:, None, :, None] & columns_ww[:, None]).flatten(2).flatten(0, 1)
        )  # [targets, sources of a frame]
        cosines = target_NC[top * w : bottom * w] @ sources_FNC[:, near].flatten(0, 1).T
        cosines.unflatten(1, (count, -1)).masked_fill_(~within[:, None], -torch.inf)
        best = cosines.topk(min(settings.keep, cosines.shape[1])).values
        weights = ((cosines - best[:, :1]) / settings.temperature).exp_().masked_fill_(cosines < best[:, -1:], 0)
        found.append(weights @ masks_FNM[:, near].flatten(0, 1) / weights.sum(1, keepdim=True))
    return torch.cat(found)


def to_patches(ids_HW: np.ndarray, objects: int, grid: tuple[int, int]) -> Tensor:
    """fp32 [N, M] of ids: 1 for the object, or background, of the pixel in the middle of a patch."""
    ids = torch.from_numpy(np.where(ids_HW > objects, 0, ids_HW))[None]
    small = tv.resize(ids, list(grid), InterpolationMode.NEAREST_EXACT)
    return functional.one_hot(small.flatten().long(), objects + 1).float()


def read_out(masks_NM: Tensor, grid: tuple[int, int], patch: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W], the object of every pixel: masks enlarged to the input, each stretched to [0, 1], the largest one."""
    large = functional.interpolate(masks_NM.T.unflatten(1, grid)[None], scale_factor=patch, mode="bilinear")[0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    stretched = torch.where(high > low, (large - low) / (high - low), large)
    ids = stretched.argmax(0, keepdim=True).byte().cpu()
    return tv.resize(ids, list(size), InterpolationMode.NEAREST_EXACT)[0].numpy()


@torch.no_grad()
def follow(features: Iterator[Tensor], first_NM: Tensor, grid: tuple[int, int], settings: Settings) -> Iterator[Tensor]:
    """fp32 [N, M] of every frame after the first.

    Args:
        features: fp32 [N, C] of unit length, of every frame.
        first_NM: fp32, the mask of the first frame.
    """
    first_NC = next(features)
    before: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.previous)
    for target_NC in features:
        sources, masks = zip((first_NC, first_NM), *before)
        masks_NM = propagate(target_NC, torch.stack(sources), torch.stack(masks), grid, settings)
        before.append((target_NC, masks_NM))
        yield masks_NM


def evaluate(subject: Subject, train: None, test: VideoSet, settings: Settings = Settings()) -> Result:
    """Follow the objects of every video; J, F and J&F, means over objects. Samples are objects, in order of video and id.

    In memory at a time: the features of 2 `previous` + 6 frames, the similarities that `propagate` names, the ids of a video.

    Raises:
        BadInput: a video has fewer than three frames, the size is no multiple of the patch size, the weights are no ViT or take
            images of one size alone, or give features that are not finite.
    """
    check(train, test, settings)
    patch = subject.vit.patch_size
    for video in test.videos:  # before the first is encoded
        _ = _shape(video, patch, settings)
    console = Console(stderr=True)
    shown = {int(i) for i in np.linspace(0, len(test) - 1, min(_SHOWN, len(test))).round()}
    listed = track(test.videos, "following", console=console, transient=True, disable=not console.is_terminal)
    followed = [_followed(subject, video, settings, number in shown) for number, video in enumerate(listed)]
    statistics = _statistics([one.scores for one in followed])
    samples = {
        "J&F": (statistics["J mean"] + statistics["F mean"]) / 2,
        "J mean": statistics["J mean"],
        "F mean": statistics["F mean"],
    }
    values = {name: float(each.mean()) for name, each in (samples | statistics).items()}
    for name, scores in (
        ("J&F if nothing moved", [one.unmoved for one in followed]),
        ("J&F of the true masks on patches", [one.bound for one in followed]),
    ):
        means = _statistics(scores)
        values[name] = float((means["J mean"] + means["F mean"]).mean() / 2)
    shapes = list(dict.fromkeys(one.shape for one in followed))
    return Result(
        protocol="propagation",
        values=values,
        settings=asdict(settings)
        | {
            "input": ", ".join(f"{width}x{height}" for height, width in shapes),
            "precision": subject.precision,
            "recipe": _recipe(subject, settings, shapes),
            "score": "that of the DAVIS-2017 toolkit, semi-supervised: without the first and the last frame",
        },
        details={
            "by video": [
                {"video": one.video.name, "objects": one.video.objects}
                | dict(zip(("J mean", "F mean"), one.scores.mean((1, 2)).tolist(), strict=True))
                for one in followed
            ]
        },
        headline=("J&F", "J mean", "F mean"),
        lower=frozenset({"J decay", "F decay"}),
        samples=samples,
        pictures={
            "objects followed from the first frame": _draw_videos([one for one in followed if one.shown]),
            "J and F over time": _draw_curves([one.scores for one in followed]),
        },
        counts={
            "videos": len(test),
            "objects": len(samples["J&F"]),
            "frames": len(test.images),
            "frames judged": sum(one.scores.shape[2] for one in followed),
            "unreadable frames left out": len(test.images.bad),
        },
        feature="patch tokens after the final norm, of unit length",
    )


def _shape(video: Video, patch: int, settings: Settings) -> tuple[int, int]:
    width, height = video.images.sizes[0].tolist()
    return input_shape(height, width, patch, settings.size)


def _followed(subject: Subject, video: Video, settings: Settings, show: bool) -> _Followed:
    patch = subject.vit.patch_size
    shape = _shape(video, patch, settings)
    grid = shape[0] // patch, shape[1] // patch
    truth_THW = np.stack([video.masks(index) for index in range(len(video))])
    true_patches = (to_patches(ids, video.objects, grid) for ids in truth_THW)
    size = truth_THW.shape[1:]
    at_a_time = max(1, min(subject.batch_size, len(video), _PIXELS // (shape[0] * shape[1])))
    frames = _features(subject, video, shape, at_a_time, settings)
    patches, width = grid[0] * grid[1], subject.vit.embed_dim
    with threads_for(2 * patches * width * max((settings.previous + 1) * patches, 4 * at_a_time * width)):
        first_NM = to_patches(truth_THW[0], video.objects, grid).to(subject.device)
        found = [read_out(masks, grid, patch, size) for masks in follow(frames, first_NM, grid, settings)]
        bound_THW = np.stack([read_out(masks, grid, patch, size) for masks in true_patches])
    found_THW = np.stack([np.where(truth_THW[0] > video.objects, 0, truth_THW[0]), *found])
    unmoved_THW = np.broadcast_to(found_THW[0], found_THW.shape)
    scores, unmoved, bound = (
        metric.scored(ids_THW, truth_THW, video.objects) for ids_THW in (found_THW, unmoved_THW, bound_THW)
    )
    shown = {index: found_THW[index] for index in (0, len(video) // 2, len(video) - 1)} if show else {}
    return _Followed(video, shape, shown, scores, unmoved, bound)


def _features(
    subject: Subject, video: Video, shape: tuple[int, int], at_a_time: int, settings: Settings
) -> Iterator[Tensor]:
    """fp32 [N, C] of each frame, of unit length, on the device; `at_a_time` are encoded together."""

    def frame(index: int) -> Tensor:
        pixels = tv.resize(dense.read(video.images, index), list(shape), InterpolationMode.BILINEAR, antialias=False)
        normalised = dense.normalised(pixels)
        normalised[0] *= IMAGENET_STD[0] / settings.red_std
        return normalised

    frames = ahead.loaded(frame, range(len(video)), subject.threads)
    while batch := list(islice(frames, at_a_time)):
        found_BNC = functional.normalize(subject.maps(torch.stack(batch)).flatten(1, 2), dim=-1)
        if not torch.isfinite(found_BNC).all():
            raise BadInput(f"features of {subject.name} contain NaN or infinity: these weights cannot be evaluated.")
        yield from found_BNC


def _statistics(scores: list[np.ndarray]) -> dict[str, np.ndarray]:
    """By figure, float64 [objects], of float64 [2, K, T - 2] of each video."""
    found: dict[str, np.ndarray] = {}
    for place, name in enumerate("JF"):
        rows = [metric.over_time(values) for each in scores for values in each[place]]
        for each, column in zip(metric.OverTime._fields, zip(*rows), strict=True):
            found[f"{name} {each}"] = np.array(column)
    return found


def _recipe(subject: Subject, settings: Settings, shapes: list[tuple[int, int]]) -> str:
    """Whose numbers these are, and where ours differ."""
    used: dict[str, Any] = asdict(settings) | {"size": min(min(shape) for shape in shapes)}
    ours = [
        f"{name.replace('_', ' ')} {used[name]}" for name, published in PUBLISHED.items() if used[name] != published
    ]
    if STEP % subject.vit.patch_size:
        ours.append(f"long side a multiple of {subject.vit.patch_size}")
    if subject.precision != "fp32":
        ours.append(f"encoded in {subject.precision}")
    return "after DINO's released evaluation" + (f"; ours: {', '.join(ours)}" if ours else "")


def _draw_videos(followed: list[_Followed]) -> Figure:
    """The first, a middle and the last frame of some videos, with what was found in colour and the truth as a line."""
    colours = matplotlib.colormaps["tab10"]
    columns = len(followed[0].shown)
    height = sum(one.shape[0] / one.shape[1] for one in followed) * 7 / columns
    figure = Figure(figsize=(7, height + 0.3 * len(followed) + 0.3), dpi=100, layout="constrained")
    figure.suptitle("colours: followed from the first frame; white lines: the true masks", fontsize=9)
    for axes_row, one in zip(figure.subplots(len(followed), columns, squeeze=False), followed, strict=True):
        for axes, (index, ids) in zip(axes_row, one.shown.items(), strict=True):
            pixels = dense.read(one.video.images, index).permute(1, 2, 0).numpy() / 255
            truth = one.video.masks(index)
            for k in range(1, one.video.objects + 1):
                grey = pixels[ids == k].mean(1, keepdims=True)
                pixels[ids == k] = 0.35 * grey + 0.65 * np.array(colours((k - 1) % 10)[:3])
            axes.imshow(pixels)
            for k in np.unique(truth[(truth > 0) & (truth <= one.video.objects)]):
                axes.contour(truth == k, [0.5], colors="white", linewidths=0.7)
            axes.set(xticks=[], yticks=[])
            title = "given" if index == 0 else f"frame {index + 1}"
            axes.set_title(f"{one.video.name}, {title}", fontsize=8)
    return figure


def _draw_curves(scores: list[np.ndarray]) -> Figure:
    """Means over the objects whose video lasts so long."""
    longest = max(each.shape[2] for each in scores)
    figure = Figure(figsize=(6, 3.5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate("JF"):
        rows = [np.pad(row, (0, longest - len(row)), constant_values=np.nan) for each in scores for row in each[place]]
        axes.plot(np.arange(2, longest + 2), np.nanmean(rows, 0), marker="." if longest < 30 else "", label=name)
    axes.set(xlabel="frame", ylabel="mean over objects", ylim=(0, 1))
    axes.legend()
    return figure
