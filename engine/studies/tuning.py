"""Contrastive tuning made cheaper than MAE-CT's: each option beside the plain recipe, from the same MAE of each seed."""

from engine.studies import Arm, Study


def _tuned(name: str, about: str, *flags: str) -> Arm:
    return Arm(name, "maect", flags, clusters=False, about=about, after="mae")


KEEP = ("--maect.patch-keep", "0.5")
REUSE = ("--nnclr.reuse", "1")

STUDY = Study(
    name="tuning",
    title="Contrastive tuning, plain and cheaper",
    arms=(
        Arm("mae", "mae", clusters=False, about="what all others start from"),
        _tuned("plain", "the recipe as published: stages two and three of MAE-CT"),
        _tuned("reused", "stage two on the stored features of one pair of crops of each image", *REUSE),
        _tuned("dropped", "half of the patches in both stages", "--nnclr.patch-keep", "0.5", *KEEP),
        _tuned("bf16", "the frozen blocks of stage three in bf16", "--maect.frozen-precision", "bf16"),
        _tuned("both", "stored features in stage two, half of the patches in stage three", *REUSE, *KEEP),
    ),
    percents=(),
    protocols=("knn", "cluster"),
    costs=True,
    cadence=("--save-every", "0", "--probe-every", "0"),
)
