"""Draws the picture at the top of the README from a run of the main job on the embedded digits.

    python docs/first_picture.py runs/maect-DATE-TIME docs/first_picture.png

What MAE fills in is the run's own picture of it; the maps are t-SNE of the pooled features of the 360 held-out digits, of the
encoder as it is before training and at the end of two stages; the curve is that of metrics.jsonl.
"""

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from sklearn.manifold import TSNE

from engine import evals
from engine.core.draws import seed_of
from engine.core.pictures import DPI, FAINT, INK
from engine.data.sources import open_images
from engine.evals.protocols import knn
from engine.model import VisionTransformer, create, load
from engine.training import config
from engine.training.metrics import read_metrics

STAGES = {"MAE": "1-mae", "MAE-CT": "3-maect"}
BLUE = "#3b6fb6"
SHOWN = 0.631  # of the width of the reconstructions: five of the eight digits


def encoders(run: Path) -> dict[str, VisionTransformer]:
    """By name, the encoder before training and at the end of the stages."""
    plan = config.parse(["--method", "maect"])
    torch.manual_seed(seed_of(plan.train.seed, "encoder"))  # as engine.train does
    found = {"untrained": create(plan.model, **plan.encoder)}
    for name, stage in STAGES.items():
        found[name] = create(plan.model, **plan.encoder)
        load(found[name], run / "stages" / stage)
    return found


def draw_map(panel: Axes, values: torch.Tensor, labels: torch.Tensor, title: str) -> None:
    """One map of features, a colour per digit."""
    places = TSNE(2, init="pca", random_state=0).fit_transform(values.numpy())
    panel.scatter(*places.T, c=labels.numpy(), cmap="tab10", s=7, linewidths=0)
    panel.set_title(title, fontsize=10, color=INK)
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_color("#dddddd")


def draw_curve(panel: Axes, records: list[dict], before: float) -> None:
    """k-NN on held-out digits over the steps of all stages."""
    points = [(0, before)] + [(r["step"], r["knn_top1"]) for r in records if "knn_top1" in r]
    panel.plot(*zip(*points), "o-", color=BLUE, markersize=4, linewidth=1.6)
    stages = {record["stage"]: record["step"] for record in records}
    begin = 0
    for name, end in stages.items():
        panel.axvspan(begin, end, color=BLUE, alpha={"mae": 0.03, "nnclr": 0.13, "maect": 0.07}[name], linewidth=0)
        panel.text(
            (begin + end) / 2, 101, {"mae": "MAE", "nnclr": "head", "maect": "MAE-CT"}[name], ha="center", fontsize=9
        )
        begin = end
    panel.axhline(before, color=FAINT, linewidth=0.8, linestyle=":")
    panel.text(begin, before + 0.8, "untrained", ha="right", color=FAINT, fontsize=8)
    panel.set_xlim(0, begin)
    panel.set_ylim(before - 4, 100)
    panel.set_xlabel("step", color=FAINT, fontsize=9)
    panel.set_ylabel("k-NN on held-out digits (%)", color=INK, fontsize=9)
    panel.tick_params(colors=FAINT, labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def main(run: Path, out: Path) -> None:
    features = evals.encode(encoders(run), open_images(None, "train"), open_images(None, "val"))
    top1 = {name: 100 * knn.evaluate(*pair, knn.Settings()).values["top-1"] for name, pair in features.items()}
    figure = Figure(figsize=(11.4, 5.6), dpi=DPI, layout="constrained", facecolor="white")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    left, right = top.subfigures(1, 2, width_ratios=(1.45, 1))
    left.suptitle("MAE fills in hidden patches", x=0.01, ha="left", fontsize=11, color=INK)
    filled = imread(run / "pictures" / "1-mae-reconstructions.png")
    panel = left.subplots()
    panel.imshow(filled[int(0.04 * len(filled)) :, : int(SHOWN * filled.shape[1])])  # its own title is cut off
    panel.set_axis_off()
    right.suptitle("k-NN rises through all stages", x=0.01, ha="left", fontsize=11, color=INK)
    draw_curve(right.subplots(), read_metrics(run / "metrics.jsonl"), top1["untrained"])
    bottom.suptitle("Features part the digits, though no label was used", x=0.01, ha="left", fontsize=11, color=INK)
    for panel, (name, (_, test)) in zip(bottom.subplots(1, 3), features.items()):
        draw_map(panel, test.values, test.labels, f"{name}: k-NN {top1[name]:.0f} %")
    figure.savefig(out, format="png")
    print(", ".join(f"{name} {value:.1f} %" for name, value in top1.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
