"""Fewer tokens in the first phases of a run: each schedule beside none, for methods of every kind that can take it, and beside
none for half of the epochs, which costs about what the cheaper schedules do."""

from engine.recipes.token_schedules import SCHEDULES
from engine.studies import Arm, Study

ABLE = dict.fromkeys(("mae", "maect", "dino"), tuple(SCHEDULES)) | {
    "dinov2": ("none", "progressive", "fast", "flexi", "auto")
}

STUDY = Study(
    name="tokens",
    title="Fewer tokens at first",
    arms=tuple(
        Arm(
            f"{method}, {name}", method, ("--tokens", name), clusters=False,
            about=SCHEDULES[name].source or "all tokens in all steps",
        )
        for method, able in ABLE.items()
        for name in able
    ) + tuple(
        Arm(
            f"{method}, half", method, ("--tokens", "none"), clusters=False,
            about="all tokens in all steps, half of the epochs", epochs=0.5,
        )
        for method in ABLE
    ),
    percents=(),
    protocols=("knn", "linear"),
    costs=True,
    cadence=("--save-every", "0", "--probe-every", "0"),
)  # fmt: skip
