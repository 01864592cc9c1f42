"""Contrast, clustering, masked pixels, and the last two together, judged by few labels: the comparison of Nandam et al.,
"Investigating Self-Supervised Methods for Label-Efficient Learning" (arXiv 2406.17460), after its abstract.

Its recipes and numbers were not found: arms, sizes and settings are ours, and so is what they are called.
"""

from dataclasses import fields

from engine.methods.parts.corruption import CorruptionSettings
from engine.studies import Arm, Study

ARMS = (
    Arm(
        "contrastive",
        "mmc",
        ("--mmc.contrast-weight", "1", "--mmc.pixel-weight", "0", "--mmc.distil-weight", "0"),
        clusters=False,
        about="the student's feature of a corrupted crop picks the teacher's of the other crop out of the batch's",
    ),
    Arm(
        "clustering",
        "mim_cluster",
        ("--mim_cluster.class-weight", "1", "--mim_cluster.patch-weight", "1", "--mim_cluster.pixel-weight", "0"),
        about="corrupted crops and their patches predict the prototypes that the teacher gives them clean",
    ),
    Arm(
        "masked",
        "mim_cluster",
        ("--mim_cluster.class-weight", "0", "--mim_cluster.patch-weight", "0", "--mim_cluster.pixel-weight", "1"),
        clusters=False,
        about="a decoder restores the pixels of corrupted crops",
    ),
    Arm(
        "both",
        "mim_cluster",
        ("--mim_cluster.class-weight", "1", "--mim_cluster.patch-weight", "1", "--mim_cluster.pixel-weight", "1"),
        about="clustering and masked pixels in one loss",
    ),
)

STUDY = Study(
    name="lowshot",
    title="Low-shot accuracy by pretext task and collapse avoidance",
    arms=ARMS,
    collapse=("centring", "me-max", "sinkhorn"),
    fixed={"global_crops": 2, "local_crops": 0},  # the contrast takes no small crops
    shared=("crop_scale", "flip", "augmentation", *(field.name for field in fields(CorruptionSettings))),
    reference="both",
    epochs=15,  # all eight runs in a quarter of an hour on two cores
    cadence=("--save-every", "5"),
)
