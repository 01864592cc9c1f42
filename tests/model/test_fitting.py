import pytest
import timm
import torch

from engine.core.errors import BadInput
from engine.model import weights
from tests.model.seeded import features, shaken
from tests.model.tables import as_beit_s_code
from tests.model.test_layouts import beit, beit_with_one_table


@pytest.mark.parametrize("overrides", [{}, dict(reg_tokens=2), dict(no_embed_class=True)])
def test_positions_of_another_grid_are_resampled_as_timm_does(overrides, tmp_path):
    published, model = shaken(**overrides), shaken(seed=1, img_size=(48, 16), **overrides)
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    report = weights.load(model, tmp_path / "weights.pth")
    assert report.resampled == ((4, 4), (6, 2))
    assert "resampled from 4x4 to 6x2" in str(report)
    torch.testing.assert_close(features(model, (48, 16)), features(published, (48, 16)), atol=1e-5, rtol=1e-5)


def test_an_export_knows_its_grid_even_where_the_count_fits(tmp_path):
    published, model = shaken(img_size=(64, 16)), shaken(seed=1)
    report = weights.load(model, weights.export(published, tmp_path / "export"))
    assert report.resampled == ((8, 2), (4, 4))
    torch.testing.assert_close(features(model), features(published), atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("key", ["rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_index"])
def test_beit_with_relative_positions_is_refused(key, tmp_path):
    tree = beit(shaken(init_values=0.1).state_dict())
    tree["model"][key] = torch.zeros(3)
    torch.save(tree, tmp_path / "beit.pth")
    with pytest.raises(BadInput, match=f"relative position biases.*{key}"):
        weights.load(shaken(init_values=0.1), tmp_path / "beit.pth")


def test_a_table_of_another_grid_is_resampled_as_by_beit_s_code(tmp_path):
    published, model = shaken(positions="relative"), shaken(seed=1, positions="relative", img_size=(48, 16))
    torch.save(beit_with_one_table(published.state_dict(), 4), tmp_path / "beit.pth")
    theirs = as_beit_s_code(published.rel_pos_bias.relative_position_bias_table.detach(), (4, 4), (6, 2))
    for source in (tmp_path / "beit.pth", weights.export(published, tmp_path / "export")):
        report = weights.load(model, source)
        assert report.resampled == ((4, 4), (6, 2))
        found = model.rel_pos_bias.relative_position_bias_table.detach()
        torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)


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
        (lambda s: s | {"pos_embed": torch.zeros(2, 17, 128)}, r"positions of shape \[2, 17, 128\]"),
        (
            lambda s: s | {"pos_embed": torch.ones(1, 26, 64)},
            r"1 of another shape \(pos_embed is 1x26x64, not 1x17x128",
        ),
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
