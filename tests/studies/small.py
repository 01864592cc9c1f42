"""Studies that the tests carry out: one of equal conditions, one of an arm that starts from another's run, a published one."""

from engine import studies
from engine.studies import Arm, Study

LOWSHOT = studies.get("lowshot")


TINY = Study(
    name="tiny",
    title="Tiny",
    arms=(
        Arm("crops", "dino", ("--dino.prototypes", "48", "--dino.head-hidden", "32", "--dino.bottleneck", "16")),
        Arm("pixels", "mae", ("--mae.decoder-depth", "1"), clusters=False),
    ),
    collapse=("centring", "sinkhorn"),
    fixed={"flip": 0.0},
    shared=("crop_scale",),
    reference="crops",
    epochs=2,
    shots=(1, 2, 200),
    percents=(1.0,),
    cadence=("--save-every", "0", "--log-every", "1", "--probe-every", "0"),
)


CHAIN = Study(
    name="chain",
    title="Chain",
    arms=(
        Arm("pixels", "mae", ("--mae.decoder-depth", "1", "--mae.epochs", "1"), clusters=False),
        Arm("neighbours", "maect", ("--maect.epochs", "1"), clusters=False, after="pixels"),
    ),
    protocols=("knn", "cluster"),
    costs=True,
)
