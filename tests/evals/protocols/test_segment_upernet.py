"""UPerNet, fine-tuned end to end, on pictures whose classes are colours."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from engine.core.errors import BadInput
from engine.evals.protocols.segment_upernet import AUXILIARY_WEIGHT, RECIPES, Settings, evaluate, groups
from engine.evals.segmentation.upernet import UPerNet
from engine.model.vit import create

SMALL = {"size": 32, "steps": 60, "batch_size": 8, "lr": 3e-3}


@pytest.mark.long
def test_learns_colours_and_leaves_the_subject_alone(untrained, colours):
    before = {key: value.clone() for key, value in untrained.vit.state_dict().items()}
    result = evaluate(untrained, *colours, Settings(**SMALL))
    losses = result.details["loss by step"]
    assert len(losses) == 60 and np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert result.values["mIoU"] > 2 * result.details["mIoU of the most frequent class everywhere"]
    assert "best mIoU on the way" not in result.values and result.details["mIoU by step"] == {}
    assert all(torch.equal(before[key], value) for key, value in untrained.vit.state_dict().items())
    assert "fine-tuned" in result.feature and "ours" in result.settings["recipe"]


def test_is_a_function_of_the_seed(untrained, colours):
    few = Settings(**SMALL | {"steps": 3})
    state = torch.get_rng_state()
    first, again, other = (evaluate(untrained, *colours, replace(few, seed=seed)) for seed in (0, 0, 1))
    assert first.details["loss by step"] == again.details["loss by step"] != other.details["loss by step"]
    assert first.values == again.values
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "lr", "layer_decay", "stride"),
    [("mae", 1e-4, 0.65, 256), ("ibot", 7e-4, 0.65, 341), ("beit", 3e-5, 0.9, 341), ("fair", 8e-5, 0.8, 341)],
)
def test_published_numbers(name, lr, layer_decay, stride):
    wanted = {
        "lr": lr, "layer_decay": layer_decay, "stride": stride, "steps": 160_000, "batch_size": 16, "weight_decay": 0.05,
        "warmup": 1500, "warmup_start": 1e-6, "schedule": "poly", "drop_path": 0.1, "dropout": 0.1, "size": 512, "short": 512,
        "ratio": (0.5, 2.0), "flip": 0.5, "photometric": True, "width": 768, "auxiliary": 256, "scales": (4.0, 2.0, 1.0, 0.5),
    }  # fmt: skip
    found = asdict(RECIPES[name])
    assert {key: found[key] for key in wanted} == wanted and AUXILIARY_WEIGHT == 0.4


def test_rates_fall_by_layer_as_published():
    model = UPerNet(create("vit_micro_patch8_32", depth=12), 3, 8, 8)
    recipe = RECIPES["mae"]
    of = {name: group for group in groups(model, recipe) for name in group.parameters}
    lr = {name: group.peak_lr for name, group in of.items()}
    for block in range(12):
        assert lr[f"vit.blocks.{block}.mlp.fc1.weight"] == pytest.approx(1e-4 * 0.65 ** (12 - block))
    for name in ("vit.patch_embed.proj.weight", "vit.cls_token", "vit.pos_embed"):
        assert lr[name] == pytest.approx(1e-4 * 0.65**13)
    for name in ("head.fuse.0.weight", "levels.0.0.weight", "auxiliary.2.bias"):
        assert lr[name] == pytest.approx(1e-4)
    assert of["head.fuse.0.weight"].weight_decay == of["vit.blocks.3.attn.qkv.weight"].weight_decay == 0.05
    for name in (
        "vit.pos_embed",
        "vit.cls_token",
        "vit.blocks.3.norm1.weight",
        "levels.0.1.weight",
        "head.scores.1.bias",
    ):
        assert of[name].weight_decay == 0
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(lr) == trained and not any(name.startswith("vit.norm") for name in trained)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"recipe": "swin"}, "one of scenes, mae, ibot, beit, fair"), ({"layer_decay": 1.5}, "layer_decay = 1.5"),
        ({"batch_size": 1}, "at least 2"), ({"lr": float("inf")}, "lr = inf"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_sentence(bad, said):
    with pytest.raises(BadInput, match=said) as caught:
        Settings(**bad)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_rate_that_diverges_is_one_sentence(untrained, colours):
    with pytest.raises(BadInput, match="segment_upernet: the loss did not stay finite"):
        evaluate(untrained, *colours, Settings(**SMALL | {"steps": 6, "lr": 1e30}))
