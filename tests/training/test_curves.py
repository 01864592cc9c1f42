import json

import numpy as np
from PIL import Image

from engine.training import curves


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def lines(path, records):
    path.write_text("".join(json.dumps({"kind": "train", "time": 0.0} | record) + "\n" for record in records))
    return path


def test_curves_of_two_stages_with_a_loss_that_was_not_finite(tmp_path):
    records = [
        {"step": s, "stage": "mae" if s < 50 else "nnclr", "loss": None if s == 30 else 1 / s, "lr": 1e-3}
        for s in range(1, 101)
    ]
    records += [{"step": s, "stage": "mae", "kind": "probe", "knn_top1": 50.0, "rank_me": 9.0} for s in (20, 40)]
    metrics = lines(tmp_path / "metrics.jsonl", records)
    with metrics.open("a") as file:
        file.write('{"step": 101, "st')  # still being written
    curves.draw(tmp_path / "curves.png", metrics, title="a run")
    pixels = read(tmp_path / "curves.png")
    assert 700 < pixels.shape[0] < 900
    assert 1100 < pixels.shape[1] < 1400
    for colour in ((0x3B, 0x6F, 0xB6), (0xC8, 0x55, 0x3D), (0xD0, 0, 0)):  # both stages, and the cross
        assert (np.abs(pixels - np.array(colour)).max(axis=2) < 40).any()


def test_curves_show_the_panels_there_are(tmp_path):
    one = lines(tmp_path / "one.jsonl", [{"step": s, "stage": "mae", "loss": 1.0} for s in (1, 2)])
    none = lines(tmp_path / "none.jsonl", [])
    curves.draw(tmp_path / "one.png", one)
    curves.draw(tmp_path / "none.png", none)
    assert read(tmp_path / "one.png").shape[1] < 700
    assert read(tmp_path / "none.png").size
