import argparse
import json
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, resolve_data_config

from engine.core.errors import BadInput
from engine.model import vit, weights
from engine.model.heads import Classifier

MICRO = "vit_micro_patch8_32"


def shaken(name: str = MICRO, seed: int = 0, **overrides):
    """A model whose every parameter differs from that of any other seed."""
    model, draw = vit.create(name, **{"depth": 2} | overrides), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return model


def features(model, size=(32, 32)):
    with torch.no_grad():
        return model(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(9)))


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


@pytest.mark.parametrize("key", ["rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_index"])
def test_beit_with_relative_positions_is_refused(key, tmp_path):
    tree = beit(shaken(init_values=0.1).state_dict())
    tree["model"][key] = torch.zeros(3)
    torch.save(tree, tmp_path / "beit.pth")
    with pytest.raises(BadInput, match=f"relative position biases.*{key}"):
        weights.load(shaken(init_values=0.1), tmp_path / "beit.pth")


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


def test_a_table_of_another_grid_is_resampled_as_timm_does(tmp_path):
    published, model = shaken(positions="relative"), shaken(seed=1, positions="relative", img_size=(48, 16))
    twin = published.architecture.twin("cpu").eval()
    twin.load_state_dict(published.architecture.timm_state(published.state_dict()))
    torch.save(beit_with_one_table(published.state_dict(), 4), tmp_path / "beit.pth")
    for source in (tmp_path / "beit.pth", weights.export(published, tmp_path / "export")):
        report = weights.load(model, source)
        assert report.resampled == ((4, 4), (6, 2))
        twin.set_input_size((48, 16))
        with torch.no_grad():
            images = torch.randn(2, 3, 48, 16, generator=torch.Generator().manual_seed(3))
            torch.testing.assert_close(model(images), twin.forward_features(images), atol=1e-5, rtol=1e-5)


def test_positions_of_the_other_kind_are_refused(tmp_path):
    model, state = shaken(positions="relative"), shaken(seed=1).state_dict()
    torch.save(state, tmp_path / "absolute.pth")
    table = {"rel_pos_bias.relative_position_bias_table": torch.zeros(50, 4)}
    torch.save({key: value for key, value in state.items() if key != "pos_embed"} | table, tmp_path / "odd.pth")
    torch.save({key: value for key, value in state.items() if key != "pos_embed"}, tmp_path / "none.pth")
    for name, message in (
        ("absolute.pth", "has absolute positions, this model relative ones"),
        ("odd.pth", "relative positions of 50x4, that of no square grid"),
        ("none.pth", r"1 missing \(rel_pos_bias.relative_position_bias_table\)"),
    ):
        before = features(model)
        with pytest.raises(BadInput, match=message):
            weights.load(model, tmp_path / name)
        assert torch.equal(features(model), before)


def test_patch_projection_saved_as_a_linear_layer_loads(tmp_path):
    published, model = shaken(), shaken(seed=1)
    state = published.state_dict()
    save_file(
        state | {"patch_embed.proj.weight": state["patch_embed.proj.weight"].flatten(1)}, tmp_path / "w.safetensors"
    )
    weights.load(model, tmp_path / "w.safetensors")
    assert torch.equal(features(model), features(published))


@pytest.mark.parametrize("overrides", [{}, dict(reg_tokens=2), dict(no_embed_class=True)])
def test_positions_of_another_grid_are_resampled_as_timm_does(overrides, tmp_path):
    published, model = shaken(**overrides), shaken(seed=1, img_size=(48, 16), **overrides)
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    report = weights.load(model, tmp_path / "weights.pth")
    assert report.resampled == ((4, 4), (6, 2))
    assert "resampled from 4x4 to 6x2" in str(report)
    torch.testing.assert_close(features(model, (48, 16)), features(published, (48, 16)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "overrides", [{}, dict(positions="sincos"), dict(img_size=(48, 16)), dict(no_embed_class=True)]
)
def test_a_source_without_positions_leaves_the_model_its_own(overrides, tmp_path):
    published, model = shaken(positions="none"), shaken(seed=1, **overrides)
    own, folder = model.pos_embed.detach().clone(), weights.export(published, tmp_path / "export")
    assert not timm.create_model(f"local-dir:{folder}", pretrained=True).pos_embed.any()
    report = weights.load(model, folder)
    assert torch.equal(model.pos_embed, own)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, published.blocks[1].mlp.fc2.weight)
    assert f"the model's own {model.architecture.positions} positions kept" in str(report)
    assert (report.loaded, report.resampled) == (len(published.state_dict()) - 1, None)
    reopened, report = weights.create(folder)
    assert torch.equal(features(reopened), features(published))
    assert (report.loaded, report.positions) == (len(published.state_dict()), "")


def test_a_model_without_positions_takes_none(tmp_path):
    published, model = shaken(), shaken(seed=1, positions="none")
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    report = weights.load(model, tmp_path / "weights.pth")
    assert not model.pos_embed.any()
    assert torch.equal(model.blocks[1].mlp.fc2.weight, published.blocks[1].mlp.fc2.weight)
    assert "the source's positions left out, since the model has none" in str(report)


def test_an_export_knows_its_grid_even_where_the_count_fits(tmp_path):
    published, model = shaken(img_size=(64, 16)), shaken(seed=1)
    report = weights.load(model, weights.export(published, tmp_path / "export"))
    assert report.resampled == ((8, 2), (4, 4))
    torch.testing.assert_close(features(model), features(published), atol=1e-5, rtol=1e-5)


def test_half_precision_files_load_as_single(tmp_path):
    model = shaken()
    torch.save({key: value.half() for key, value in shaken(seed=1).state_dict().items()}, tmp_path / "half.pth")
    weights.load(model, tmp_path / "half.pth")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


class Canary:
    """An object whose unpickling leaves a mark."""

    def __init__(self, mark) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def write_pickle(tree, path) -> None:
    path.write_bytes(pickle.dumps(tree, protocol=2))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".bin", ".pkl", ".safetensors"])
@pytest.mark.parametrize("write", [torch.save, write_pickle])
def test_pickled_objects_are_refused_and_never_run(write, suffix, tmp_path):
    path, mark, model = tmp_path / f"weights{suffix}", tmp_path / "mark", shaken()
    before = features(model)
    write({"model": model.state_dict(), "payload": Canary(mark)}, path)
    with pytest.raises(BadInput, match="no plain weights"):
        weights.load(model, path)
    assert not mark.exists()
    assert torch.equal(features(model), before)


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: without(s, "norm.weight", "blocks.1.mlp.fc1.bias"),
            r"2 missing \(blocks.1.mlp.fc1.bias, norm.weight\)",
        ),
        (lambda s: s | {"extra.0": torch.zeros(1)}, r"1 unexpected \(extra.0\)"),
        (lambda s: s | {"norm.weight": torch.zeros(7)}, r"1 of another shape \(norm.weight is 7, not 128\)"),
        (lambda s: s | {"pos_embed": torch.zeros(1, 13, 128)}, "13 positions, no square grid with or without its 1"),
        (lambda s: s | {"pos_embed": torch.zeros(13)}, r"positions of shape \[13\]"),
        (lambda s: s | {"patch_embed.proj.weight": torch.zeros(128, 3, 4, 4)}, "patches of 4 pixels, not 8"),
        (lambda s: s | {"patch_embed.proj.weight": torch.zeros(128, 5)}, "does not fit"),
        (lambda s: {"epoch": 3}, r"no state dict: 1 keys \(epoch\)"),
        (lambda s: [1, 2], "holds a list"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change, message, tmp_path):
    model = shaken()
    before = features(model)
    torch.save(change(shaken(seed=1).state_dict()), tmp_path / "weights.pth")
    with pytest.raises(BadInput, match=message):
        weights.load(model, tmp_path / "weights.pth")
    assert torch.equal(features(model), before)


def test_another_width_names_a_few_shapes_and_the_model(tmp_path):
    torch.save(shaken("vit_tiny_patch16_224").state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(
        BadInput, match=r"does not fit vit_small_patch16_224.*30 of another shape \(cls_token is 1x1x192"
    ):
        weights.load(shaken("vit_small_patch16_224"), tmp_path / "tiny.pth")


def test_without_strict_the_misfits_are_reported_but_shapes_still_must_agree(tmp_path):
    published, model = shaken().state_dict(), shaken(seed=1)
    torch.save(without(published, "norm.bias") | {"extra": torch.zeros(1)}, tmp_path / "weights.pth")
    report = weights.load(model, tmp_path / "weights.pth", strict=False)
    assert (report.missing, report.unexpected) == (("norm.bias",), ("extra",))
    assert report.loaded == len(published) - 1
    assert torch.equal(model.norm.weight, published["norm.weight"])
    torch.save(published | {"norm.bias": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(BadInput, match="another shape"):
        weights.load(model, tmp_path / "weights.pth", strict=False)
    torch.save({"something": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(BadInput, match="does not fit"):
        weights.load(model, tmp_path / "weights.pth", strict=False)


def test_sources_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0")
    (tmp_path / "cut.pth").write_bytes(b"PK\3\4 nothing")
    for source, message in {
        "nowhere.pth": "give a file, an exported folder, a run folder or a timm model",
        "timm:nonsense": "timm has no model 'nonsense'",
        tmp_path / "empty": "neither an exported folder",
        tmp_path / "cut.safetensors": "no plain weights",
        tmp_path / "cut.pth": "no plain weights",
    }.items():
        with pytest.raises(BadInput, match=message):
            weights.load(shaken(), source)


def test_a_timm_name_takes_its_pretrained_weights(monkeypatch):
    published, model, asked = (
        shaken("vit_tiny_patch16_224").architecture.twin("cpu").eval(),
        shaken("vit_tiny_patch16_224"),
        [],
    )
    monkeypatch.setattr(
        weights.timm, "create_model", lambda name, **options: asked.append((name, options)) or published
    )
    for source in ("vit_tiny_patch16_224.augreg_in21k", "timm:vit_tiny_patch16_224"):
        report = weights.load(model, source)
        assert report.source == f"timm:{source.removeprefix('timm:')}"
    assert asked[0] == ("vit_tiny_patch16_224.augreg_in21k", dict(pretrained=True, num_classes=0))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(images), published.forward_features(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "error", [FileNotFoundError("check your connection"), RuntimeError("No pretrained weights exist")]
)
def test_timm_weights_that_cannot_be_had_are_a_clear_error(error, monkeypatch):
    def refuse(*args, **options):
        raise error

    model = shaken()
    monkeypatch.setattr(weights.timm, "create_model", refuse)
    with pytest.raises(BadInput, match=f"weights of vit_tiny_patch16_224 cannot be had, give a file.*{error}"):
        weights.load(model, "timm:vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (MICRO, {}),
        (MICRO, dict(global_pool="avg", positions="sincos")),
        (MICRO, dict(global_pool="avg", fc_norm=True)),
        (MICRO, dict(positions="relative", init_values=0.1)),
        (MICRO, dict(positions="relative", global_pool="avg", img_size=(24, 32))),
        ("vit_micro_patch4_32", dict(img_size=(32, 16), reg_tokens=3)),
        (MICRO, dict(reg_tokens=2, no_embed_class=True, init_values=0.1, img_size=(16, 48))),
        ("vit_tiny_patch16_224", dict(global_pool="avg")),
        ("vit_tiny_patch16_224", dict(img_size=(64, 96), drop_path=0.1)),
    ],
)
def test_timm_and_we_load_an_export_with_equal_features(name, overrides, tmp_path):
    model = shaken(name, **overrides)
    folder = weights.export(model, tmp_path / "run" / "export")
    images = torch.randn(2, 3, *model.img_size)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours, report = weights.create(folder)
    assert ours.architecture == model.architecture
    assert report.resampled is None
    with torch.no_grad():
        expected = model(images)
        if model.rel_pos_bias is None:
            assert torch.equal(ours(images), expected)
        else:  # the bias of keys, which BEiT has not, cancels but for rounding
            torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs.forward_features(images), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs(images), model.pool(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "overrides", [{}, dict(global_pool="avg"), dict(global_pool="avg", fc_norm=True, reg_tokens=2)]
)
def test_timm_classifies_with_an_exported_head_as_we_do(overrides, tmp_path):
    model, classifier = shaken(**overrides), Classifier(128, 3, std=0.1)
    folder = weights.export(model, tmp_path / "export", classifier=classifier, classes=("ant", "bee", "cow"))
    images = torch.randn(2, 3, 32, 32)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        expected = classifier(model.pool(model(images)))
        torch.testing.assert_close(theirs(images), expected, atol=1e-5, rtol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_classes"], config["label_names"]) == (3, ["ant", "bee", "cow"])
    again, report = weights.create(folder)
    assert torch.equal(features(again), features(model))
    assert set(report.set_aside) == {"head.weight", "head.bias"}


def test_a_norm_after_pooling_starts_anew_where_the_source_has_one_before_it(tmp_path):
    source, model = shaken(), shaken(seed=1, global_pool="avg", fc_norm=True)
    before = {name: value.clone() for name, value in model.fc_norm.state_dict().items()}
    report = weights.load(model, weights.export(source, tmp_path / "export"))
    assert report.new_norm
    assert "the norm after pooling starts anew" in str(report)
    assert set(report.set_aside) == {"norm.weight", "norm.bias"}
    assert report.loaded == len(source.state_dict()) - 2
    state = model.state_dict()
    assert all(torch.equal(model.fc_norm.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(state[name], value) for name, value in source.state_dict().items() if name in state)
    again = shaken(seed=2, global_pool="avg", fc_norm=True)
    assert not weights.load(again, weights.export(model, tmp_path / "tuned")).new_norm
    assert torch.equal(again.fc_norm.weight, model.fc_norm.weight)


def test_an_export_describes_itself(tmp_path):
    folder = weights.export(shaken(img_size=(16, 48)), tmp_path / "export", extra={"method": "mae", "epoch": 3})
    config = json.loads((folder / "config.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]
    assert config["extra"] == {"method": "mae", "epoch": 3}
    assert (config["architecture"], config["num_classes"], config["num_features"], config["global_pool"]) == (
        "vit_tiny_patch16_224", 0, 128, "token",
    )  # fmt: skip
    assert config["model_args"]["embed_dim"] == 128
    assert not {"tag", "license", "origin_url"} & set(config["pretrained_cfg"])
    data = resolve_data_config({}, model=timm.create_model(f"local-dir:{folder}"))
    assert (data["input_size"], tuple(data["mean"]), data["interpolation"]) == (
        (3, 16, 48),
        IMAGENET_DEFAULT_MEAN,
        "bicubic",
    )


def test_run_folders_and_timm_like_folders_can_be_created_from(tmp_path):
    model = shaken()
    folder = weights.export(model, tmp_path / "export")
    again, _ = weights.create(str(tmp_path), drop_path=0.3)
    assert torch.equal(features(again), features(model))
    assert again.architecture.drop_path == 0.3
    weights.load(shaken(seed=1), tmp_path)
    tiny = weights.export(shaken("vit_tiny_patch16_224", global_pool="avg"), tmp_path / "tiny")
    config = json.loads((tiny / "config.json").read_text())
    del config["tessera"]
    (tiny / "config.json").write_text(json.dumps(config))
    foreign, _ = weights.create(tiny)
    assert (foreign.depth, foreign.global_pool, foreign.architecture.fc_norm) == (2, "avg", False)
    with pytest.raises(BadInput, match="does not say which model"):
        weights.create(folder / "model.safetensors")
    (folder / "config.json").write_text("{")
    with pytest.raises(BadInput, match="no readable config"):
        weights.create(folder)


def test_an_export_replaces_its_forerunner_whole_or_not_at_all(tmp_path, monkeypatch):
    first, second = shaken(), shaken(seed=1)
    folder = weights.export(first, tmp_path / "export")

    def fail(*args, **options):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_for_hf", fail)
        with pytest.raises(OSError, match="disk full"):
            weights.export(second, folder)
    assert torch.equal(features(weights.create(folder)[0]), features(first))
    weights.export(second, folder)
    assert torch.equal(features(weights.create(folder)[0]), features(second))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_export_never_replaces_something_else(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").touch()
    for target in (tmp_path / "precious", tmp_path / "precious" / "thesis.tex"):
        with pytest.raises(BadInput, match="something else"):
            weights.export(shaken(), target)
    assert (tmp_path / "precious" / "thesis.tex").exists()
