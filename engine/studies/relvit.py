"""RelViT's claim (Camporese, Izzo & Ballan, BMVC 2022): patch relations first, or along with the classes, against classes alone,
where few images have a label. Epochs, batches and learning rates are ours, for the embedded digits with ten labels of each class.

An epoch of pre-training sees all images and one of supervised training the labelled ones only, so classes alone are trained for
as many epochs, and once more for as many updates.
"""

from engine.studies import Arm, Study

LABELS, BATCH, RATE = "10", "20", "1e-2"
PRETEXT, TUNING = 20, 60  # epochs
UPDATES_AS_EPOCHS = 148  # 22 updates an epoch before, 5 after: (20 * 22 + 60 * 5) / 5


def _supervised(name: str, epochs: int, about: str, after: str = "") -> Arm:
    flags = ("--supervised.labels-per-class", LABELS, "--supervised.batch-size", BATCH, "--supervised.base-lr", RATE)
    return Arm(
        name, "supervised", (*flags, "--supervised.epochs", str(epochs)), clusters=False, about=about, after=after
    )


STUDY = Study(
    name="relvit",
    title="Patch relations before, beside and without ten labels a class",
    arms=(
        _supervised("classes", PRETEXT + TUNING, "classes alone, for as many epochs as pre-training and fine-tuning together"),
        _supervised("classes-long", UPDATES_AS_EPOCHS, "classes alone, for as many updates as the two together"),
        Arm(
            "joint",
            "relvit",
            (
                "--relvit.class-weight", "1", "--relvit.labels-per-class", LABELS, "--relvit.batch-size", BATCH,
                "--relvit.epochs", str(PRETEXT + TUNING), "--relvit.patch-zoom", "1", "--relvit.patch-jitter", "0",
                "--relvit.patch-grayscale", "0",
            ),
            clusters=False,
            about="classes and relations in one loss, on the labelled images; no positions, as for relations alone",
        ),
        Arm("relations", "relvit", ("--relvit.epochs", str(PRETEXT)), clusters=False, about="relations alone, on all images"),
        _supervised("fine-tuned", TUNING, "classes, from the relations' encoder", after="relations"),
    ),
    shots=(5,),
    percents=(),
    classifies=True,
    costs=True,
    cadence=("--save-every", "0", "--probe-every", "0"),
)  # fmt: skip
