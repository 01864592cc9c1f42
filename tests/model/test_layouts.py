import argparse
import re

import numpy as np
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


def lightning(state: dict) -> dict:
    return {"state_dict": prefixed("model.", state), "pytorch-lightning_version": "2.5"}


def of_a_trainer(state: dict) -> dict:
    """With what numpy leaves in the file of whoever saves his best accuracy."""
    return {
        "model_state_dict": prefixed("net.", state),
        "best": np.float64(0.5),
        "lr": np.float32(1e-3),
        "step": np.int64(7),
    }


def in_a_net(state: dict) -> dict:
    return {"net": state}


def compiled_under_ddp(state: dict) -> dict:
    return prefixed("module._orig_mod.", state)


def compiled_in_blocks(state: dict) -> dict:
    return {re.sub(r"^(blocks\.\d+)\.", r"\1._orig_mod.", key): value for key, value in state.items()}


LAYOUTS = [
    lightning, of_a_trainer, in_a_net, compiled_under_ddp, compiled_in_blocks, plain, mae, mae_with_decoder, mae_ct,
    mae_ct_all_in_one, mim_refiner, dino, dino_student, ibot, ibot_backbone, msn, moco_v3, dinov2, timm_classifier,
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


def test_two_backbones_of_unknown_names_are_not_guessed_at(tmp_path):
    state = shaken().state_dict()
    torch.save(prefixed("left.", state) | prefixed("right.", state), tmp_path / "two.pth")
    with pytest.raises(BadInput, match=r"2 backbones \(left\., right\.\): save the one that is meant"):
        weights.load(shaken(), tmp_path / "two.pth")


NAN = torch.full((128,), float("nan"))


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("norm.bias", lambda t: NAN, "norm.bias has values that are not finite"),
        ("norm.bias", lambda t: -NAN.nan_to_num(float("inf")), "norm.bias has values that are not finite"),
        ("norm.weight", lambda t: t.long(), "norm.weight is of int64"),
        ("norm.weight", lambda t: t.to(torch.complex64), "norm.weight is of complex64"),
        ("blocks.0.mlp.fc1.weight", lambda t: t.to_sparse(), "blocks.0.mlp.fc1.weight is sparse or quantised"),
        (
            "blocks.0.mlp.fc1.weight",
            lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
            "blocks.0.mlp.fc1.weight is sparse or quantised",
        ),
        ("norm.weight", lambda t: t[:1].clone().expand(2**34), "norm.weight claims more numbers than the file holds"),
    ],
)
def test_what_can_be_no_weight_is_refused_by_name_and_nothing_is_loaded(key, change, said, tmp_path):
    model = shaken()
    before, state = features(model), shaken(seed=1).state_dict()
    state[key] = change(state[key])
    torch.save({"model": state}, tmp_path / "weights.pth")
    with pytest.raises(BadInput) as refused:
        weights.load(model, tmp_path / "weights.pth")
    assert "cannot be weights: 1 of them (" in str(refused.value) and said in str(refused.value)
    assert torch.equal(features(model), before)


def test_what_lies_beside_the_backbone_may_be_anything(tmp_path):
    published, model = shaken(), shaken(seed=1)
    torch.save({"model": published.state_dict() | {"decoder_pred.bias": NAN}}, tmp_path / "weights.pth")
    weights.load(model, tmp_path / "weights.pth")
    assert torch.equal(features(model), features(published))


def test_a_file_that_holds_itself_is_refused(tmp_path):
    tree: dict = {"epoch": 3}
    tree["model"] = tree
    torch.save(tree, tmp_path / "weights.pth")
    with pytest.raises(BadInput, match="has no end"):
        weights.load(shaken(), tmp_path / "weights.pth")


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
