"""Schedules of fewer tokens: `--tokens NAME` gives every stage that can take them these settings of `StageSettings`.

F = FastDINOv2 (arXiv 2507.03779, KevinZ0217/fast_dinov2): crops of half the side for three quarters of a run. There the second
part is a run of its own, with a new optimiser, warm-up and schedule, and adds patches of noise to its images; here one run goes
on.
A = arXiv 2410.22364: patches dropped in the trained branch alone and larger ones in both, less of each from quarter to quarter.
Its table of stages was not found, so shares and sizes are ours.
X = FlexiViT (arXiv 2212.08013): the size of patches drawn for each step, alike for all images. There it is one of ten, to the
end, and positions and patches are stored at sizes of their own; here it is one of two, which divide crops of 224 and 96 pixels,
what is stored is the model's own, and so is what the last fifth of the steps sees.
N = NaViT (arXiv 2307.06304): images of their own aspect at resolutions of their own, packed. There the side is drawn from a
truncated normal distribution, patches are dropped besides, and examples fill sequences of one length; here it is one of three,
and the last fifth of the steps sees images at the largest, as they are judged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Schedule:
    """A preset of `--tokens`.

    Attributes:
        source: in words, for the run's own description.
        settings: of every stage.
    """

    source: str
    settings: Mapping[str, tuple[float, ...] | str] = field(default_factory=dict)


SCHEDULES = {
    "none": Schedule(""),
    "progressive": Schedule(
        "crops that grow, a schedule of ours", {"phases": (0.0, 0.5, 0.8), "phase_sides": (0.5, 5 / 7, 1.0)}
    ),
    "fast": Schedule("small crops first, after FastDINOv2 (F)", {"phases": (0.0, 0.75), "phase_sides": (0.5, 1.0)}),
    "anneal": Schedule(
        "patches dropped and larger ones, less and less, after arXiv 2410.22364 (A)",
        {
            "phases": (0.0, 0.25, 0.5, 0.75),
            "phase_keeps": (0.25, 0.5, 0.75, 1.0),
            "phase_patches": (2.0, 1.5, 1.0, 1.0),
        },
    ),
    "flexi": Schedule(
        "patches of a size drawn for each step, after FlexiViT (X)", {"phases": (0.0, 0.8), "patch_draws": (1.0, 2.0)}
    ),
    "naflex": Schedule(
        "images of their own aspect at sides drawn for each, after NaViT (N)",
        {"phases": (0.0, 0.8), "side_draws": (0.5, 5 / 7, 1.0), "aspect": "keep"},
    ),
    "auto": Schedule(
        "fewer tokens as errors of gradients allow, after arXiv 2410.22364 (A)",
        {"phases": (0.0, 0.2, 0.4, 0.6, 0.8), "phase_choice": "auto"},
    ),
}
"""progressive is 112 and 48, then 160 and 64 (of 96 two thirds), then 224 and 96 pixels."""
