"""Every method that trains an encoder, each by its own recipe: one table of what they learn and how long it takes."""

from engine import methods
from engine.studies import Arm, Study

STUDY = Study(
    name="methods",
    title="Every method by its own recipe",
    arms=tuple(Arm(name, name, clusters=False) for name in methods.names() if methods.get(name).trains_encoder),
    percents=(),
    protocols=("knn", "linear", "cluster"),
    costs=True,
    cadence=("--save-every", "5"),
)
