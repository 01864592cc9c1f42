import argparse

import pytest
import torch

from engine.core.errors import BadInput
from engine.model import weights
from tests.model.seeded import features, shaken


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def plain(state: dict) -> dict:
    return dict(state)


def mae(state: dict) -> dict:
    return {"model": state}


def mae_with_decoder(state: dict) -> dict:
    decoder = [
        "mask_token",
        "decoder_pos_embed",
        "decoder_embed.weight",
        "decoder_blocks.0.norm1.weight",
        "decoder_pred.bias",
    ]
    tree = {"model": state | {key: torch.zeros(3) for key in decoder}, "optimizer": {"state": {}}, "epoch": 799}
    return tree | {"scaler": {"scale": 1.0}, "args": argparse.Namespace(lr=1e-3)}


def mae_ct(state: dict) -> dict:
    assert not state["pos_embed"][:, 0].any()
    state = state | {"pos_embed": state["pos_embed"][:, 1:]}
    return {"state_dict": state, "ctor_kwargs": {"patch_size": 8, "embedding_dim": 128}}


def mae_ct_all_in_one(state: dict) -> dict:
    decoder = {"mask_token": torch.zeros(3), "embed.weight": torch.zeros(3)}
    return {"trainer": {"epoch": 3}, "model": {"encoder": state, "decoder": decoder}, "model_ctor_kwargs": {}}


def mim_refiner(state: dict) -> dict:
    state = dict(state)
    state["cls_tokens.tokens"] = state.pop("cls_token")
    state["pos_embed.embed"] = state.pop("pos_embed")[:, 1:].unflatten(1, (4, 4))
    return {"state_dict": state, "ctor_kwargs": {"dim": 128}, "ckpt": {"epoch": 20}, "abs_ckpt": {}, "stage_id": "x"}


def dino(state: dict) -> dict:
    head = {"head.mlp.0.weight": torch.zeros(3), "head.last_layer.weight_g": torch.zeros(3)}
    student = {key: torch.zeros_like(value) for key, value in state.items()}
    return {
        "student": prefixed("module.", prefixed("backbone.", student) | head),
        "teacher": prefixed("backbone.", state) | head,
        "optimizer": {"state": {}},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small"),
        "dino_loss": {"center": torch.zeros(1, 3)},
    }


def dino_student(state: dict) -> dict:
    return {"student": dino(state)["student"] | prefixed("module.backbone.", state)}


def ibot(state: dict) -> dict:
    tree = dino(state)
    tree["teacher"] |= {"backbone.masked_embed": torch.zeros(1, 3), "head.last_layer2.weight_v": torch.zeros(3)}
    return tree


def ibot_backbone(state: dict) -> dict:
    return {"state_dict": state}


def msn(state: dict) -> dict:
    head = {"module.fc.fc1.weight": torch.zeros(3), "module.fc.bn1.running_mean": torch.zeros(3)}
    online = prefixed("module.", {key: torch.zeros_like(value) for key, value in state.items()})
    return {
        "encoder": online | head,
        "target_encoder": prefixed("module.", state) | head,
        "prototypes": torch.zeros(4, 3),
    }


def moco_v3(state: dict) -> dict:
    momentum = {key: torch.zeros_like(value) for key, value in state.items()}
    head = {"module.base_encoder.head.0.weight": torch.zeros(3), "module.predictor.0.weight": torch.zeros(3)}
    tensors = prefixed("module.base_encoder.", state) | prefixed("module.momentum_encoder.", momentum) | head
    return {"epoch": 300, "arch": "vit_base", "state_dict": tensors, "best_acc1": torch.tensor(0.0), "optimizer": {}}


def in_chunks(state: dict) -> dict:
    return {key.replace("blocks.", f"blocks.{0 if 'blocks.0.' in key else 1}."): value for key, value in state.items()}


def dinov2(state: dict) -> dict:
    return in_chunks(state) | {"mask_token": torch.zeros(1, 128)}


def timm_classifier(state: dict) -> dict:
    return state | {"head.weight": torch.zeros(10, 128), "head.bias": torch.zeros(10)}


LAYOUTS = [
    plain, mae, mae_with_decoder, mae_ct, mae_ct_all_in_one, mim_refiner, dino, dino_student, ibot, ibot_backbone, msn,
    moco_v3, dinov2, timm_classifier,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_published_layouts_load_exactly(layout, tmp_path):
    published, model = shaken(positions="sincos"), shaken(seed=1)
    torch.save(layout(published.state_dict()), tmp_path / "weights.pth")
    report = weights.load(model, tmp_path / "weights.pth")
    assert torch.equal(features(model), features(published))
    assert report.loaded == len(published.state_dict())
    assert not report.missing + report.unexpected
    assert report.resampled is None


def test_reports_say_what_was_found_and_set_aside(tmp_path):
    torch.save(mae_with_decoder(shaken().state_dict()), tmp_path / "mae.pth")
    torch.save(moco_v3(shaken().state_dict()), tmp_path / "moco.pth")
    report, other = (weights.load(shaken(seed=1), tmp_path / name) for name in ("mae.pth", "moco.pth"))
    assert report.layout == "model/*"
    assert other.layout == "state_dict/module.base_encoder.*"
    assert set(report.set_aside) == {
        "mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.norm1.weight", "decoder_pred.bias",
    }  # fmt: skip
    assert {"head.0.weight", "module.predictor.0.weight", "module.momentum_encoder.cls_token"} <= set(other.set_aside)
    assert "5 set aside (mask_token, decoder_pos_embed, decoder_embed.weight, ...)" in str(report)


@pytest.mark.parametrize("no_embed_class", [True, False])
def test_dinov2_registers_load_in_either_convention(no_embed_class, tmp_path):
    published = shaken(reg_tokens=2, no_embed_class=True, init_values=0.5)
    state, place = dinov2(published.state_dict()), torch.randn(1, 1, 128)
    state |= {"register_tokens": state.pop("reg_token"), "cls_token": state["cls_token"] - place}
    state["pos_embed"] = torch.cat([place, state["pos_embed"]], dim=1)
    torch.save(state, tmp_path / "dinov2.pth")
    model = shaken(seed=1, reg_tokens=2, no_embed_class=no_embed_class, init_values=0.5)
    weights.load(model, tmp_path / "dinov2.pth")
    torch.testing.assert_close(features(model), features(published), atol=1e-5, rtol=1e-5)


def beit(state: dict) -> dict:
    state = {key.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): v for key, v in state.items()}
    for key in [key for key in state if key.endswith("qkv.bias")]:
        query, _, value = state.pop(key).chunk(3)
        state |= {key.replace("qkv.bias", "q_bias"): query, key.replace("qkv.bias", "v_bias"): value}
    return {"model": state | {"mask_token": torch.zeros(1, 1, 3), "lm_head.weight": torch.zeros(3)}}


def test_beit_with_absolute_positions_loads(tmp_path):
    published, model = shaken(init_values=0.1), shaken(seed=1, init_values=0.1)
    for block in published.blocks:
        block.attn.qkv.bias.data.chunk(3)[1].zero_()
    torch.save(beit(published.state_dict()), tmp_path / "beit.pth")
    weights.load(model, tmp_path / "beit.pth")
    assert torch.equal(features(model), features(published))


def beit_with_one_table(state: dict, grid: int) -> dict:
    """As BEiT's pre-trained files are: the table's index lies beside it."""
    return {
        "model": beit(state)["model"] | {"rel_pos_bias.relative_position_index": torch.zeros(grid**2 + 1, grid**2 + 1)}
    }


def test_beit_with_one_table_for_all_blocks_loads(tmp_path):
    kind = dict(init_values=0.1, positions="relative")
    published, model = shaken(**kind), shaken(seed=1, **kind)
    for block in published.blocks:
        block.attn.qkv.bias.data.chunk(3)[1].zero_()
    torch.save(beit_with_one_table(published.state_dict(), 4), tmp_path / "beit.pth")
    report = weights.load(model, tmp_path / "beit.pth")
    assert torch.equal(features(model), features(published))
    assert report.resampled is None and not report.missing + report.unexpected
    assert {"mask_token", "lm_head.weight"} == set(report.set_aside)
    with pytest.raises(BadInput, match=r'relative position biases, this model absolute.*positions="relative"'):
        weights.load(shaken(init_values=0.1), tmp_path / "beit.pth")
