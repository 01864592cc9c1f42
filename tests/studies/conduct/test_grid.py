"""The grid, its equal conditions, and how long its runs took."""

import json
import math
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

from engine import studies
from engine.core import dist
from engine.studies import Arm, Study
from engine.studies.conduct import grid
from engine.training.build import build
from engine.training.parts import prepare
from tests.studies.small import LOWSHOT


def test_the_grid_is_arms_by_collapse_and_an_arm_without_prototypes_runs_once_per_seed():
    runs = grid.grid(LOWSHOT)
    assert [run.name for run in runs] == [
        "contrastive-s0",
        "clustering-centring-s0", "clustering-me-max-s0", "clustering-sinkhorn-s0",
        "masked-s0",
        "both-centring-s0", "both-me-max-s0", "both-sinkhorn-s0",
    ]  # fmt: skip
    for run in runs:
        ((_, settings),) = run.plan.stages
        weights = {name: value for name, value in vars(settings).items() if name.endswith("_weight")}
        on = {name for name, value in weights.items() if value and name != "me_max_weight"}
        assert (
            on
            == {
                "contrastive": {"contrast_weight"},
                "clustering": {"class_weight", "patch_weight"},
                "masked": {"pixel_weight"},
                "both": {"class_weight", "patch_weight", "pixel_weight"},
            }[run.arm.name]
        )
        assert not run.collapse or settings.collapse == run.collapse
        assert settings.epochs == LOWSHOT.epochs
    assert len(grid.grid(LOWSHOT, seeds=(3, 4))) == 16
    some = grid.grid(LOWSHOT, seeds=(1,), arms=("both", "masked"), collapse=("sinkhorn",), epochs=2, batch_size=32)
    assert [run.name for run in some] == ["masked-s1", "both-sinkhorn-s1"]
    assert {(run.plan.stages[0][1].epochs, run.plan.stages[0][1].batch_size) for run in some} == {(2, 32)}


def test_all_arms_see_the_same_images_crops_and_masks():
    ranks = dist.start("cpu")
    seen = {}
    of_seed = {0: (), 1: ("both",)}
    runs = [
        grid.grid(LOWSHOT, collapse=("centring",), batch_size=8, seeds=(seed,), arms=arms)
        for seed, arms in of_seed.items()
    ]
    for run in chain(*runs):
        parts = prepare(run.plan, ranks)
        state = build(parts, 0, None)
        loader = parts.loader(state)
        steps = [(next(loader), state.method.draw(parts.draws(0, step))) for step in range(2)]
        loader.close()
        seen.setdefault(run.seed, []).append(steps)
    for steps in zip(*seen[0], strict=True):
        (first, drawn), *others = steps
        for batch, also in others:
            assert torch.equal(batch.ids, first.ids)
            assert len(batch.images) == len(first.images) == 2
            assert all(torch.equal(mine, its) for mine, its in zip(batch.images, first.images, strict=True))
            assert also.keys() == drawn.keys() >= {"corrupted", "alien"}
            assert all(torch.equal(also[name], drawn[name]) for name in drawn)
    (other, differently), (first, drawn) = seen[1][0][0], seen[0][0][0]
    assert not torch.equal(other.ids, first.ids) and not torch.equal(differently["corrupted"], drawn["corrupted"])


def test_time_of_training_is_by_the_logged_pace(tmp_path: Path):
    stages = [{"method": "mae", "batch_size": 8}, {"method": "maect", "batch_size": 4}]
    (tmp_path / "config.json").write_text(json.dumps({"stages": stages}))
    records = [
        {"kind": "train", "stage": "mae", "step": 10},  # compiling: no pace yet, so the next one's
        {"kind": "train", "stage": "mae", "step": 20, "images_per_second": 8.0},
        {"kind": "probe", "stage": "mae", "step": 20},
        {"kind": "event", "stage": "mae", "step": 20, "storing_features_seconds": 7.0},
        {"kind": "train", "stage": "maect", "step": 25, "images_per_second": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert grid.trained_seconds(tmp_path) == 10 + 10 + 7 + 5 * 4 / 2


@pytest.mark.parametrize("flag", [("--mmc.crop-scale", "0.3", "1"), ("--mmc.drop", "0.4", "0.4")])
def test_an_arm_that_is_not_equal_is_found(flag: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    arms = (LOWSHOT.arms[0], LOWSHOT.arms[3])
    equal = replace(LOWSHOT, arms=arms, shared=("crop_scale",))
    grid.grid(equal)
    parse = grid.config.parse
    monkeypatch.setattr(grid.config, "parse", lambda words: parse([*words, *(flag if "mmc" in words else ())]))
    name = flag[0].removeprefix("--mmc.").replace("-", "_")
    with pytest.raises(ValueError, match=f"contrastive and both differ in {name}"):
        grid.grid(replace(equal, shared=("crop_scale", "drop")))


def test_a_published_set_gives_every_run_its_model_and_sizes():
    runs = grid.grid(LOWSHOT, data="tiny-imagenet:/data")
    assert len(runs) == 8
    for run in runs:
        encoder = run.plan.encoder
        assert (run.plan.model, encoder["img_size"], encoder["patch_size"]) == ("vit_small_patch16_224", [64, 64], 8)


def test_sizes_are_given_to_every_run():
    for run in grid.grid(studies.get("tokens"), image_size=(32,), patch_size=4, model="vit_tiny_patch16_224"):
        assert (run.plan.encoder["img_size"], run.plan.encoder["patch_size"]) == ([32, 32], 4)
    for run in grid.grid(LOWSHOT, patch_size=4):
        assert run.plan.encoder["patch_size"] == 4


def test_an_arm_may_have_a_share_of_its_recipes_epochs():
    whole, half = grid.grid(studies.get("tokens"), arms=("mae, none", "mae, half"))
    assert half.epochs == -(-whole.epochs // 2)
    alike = replace(half.plan.stages[0][1], epochs=whole.epochs)
    assert alike == whole.plan.stages[0][1]
    arm = Arm("short", "maect", clusters=False)
    of_stages = [
        [settings.epochs for _, settings in run.plan.stages]
        for one in (arm, replace(arm, epochs=0.3))
        for run in grid.grid(Study("some", "Some", (one,)))
    ]
    assert of_stages[1] == [math.ceil(0.3 * epochs) for epochs in of_stages[0]]
    assert len(of_stages[0]) > 1
