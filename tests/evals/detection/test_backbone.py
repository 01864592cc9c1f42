"""The windowed, packed backbone: equal to plain masked attention, whatever the grid; biases, stochastic depth, refusals."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.core.errors import BadInput
from engine.evals.detection import Form, WindowedViT, initialise_as_beit
from engine.evals.detection.backbone import RelativeBias, spread, tiling
from engine.model import vit
from engine.model.tokens import Packed, View
from tests.model.tables import as_beit_s_code

SIDE = 8  # of a patch


def small_vit(**overrides: object) -> vit.VisionTransformer:
    generator = torch.Generator().manual_seed(0)
    return vit.create("vit_micro_patch8_32", depth=4, generator=generator, **overrides)


def backbone(grid: tuple[int, int], encoder: dict[str, object] | None = None, **form: object) -> WindowedViT:
    """With biases that are not zero."""
    made = WindowedViT(small_vit(**encoder or {}), Form(size=SIDE * max(grid), **form))
    generator = torch.Generator().manual_seed(1)
    for bias in (made.window_bias, made.global_bias):
        if bias is not None:
            torch.nn.init.normal_(bias.relative_position_bias_table, generator=generator)
    return made


def images(grid: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, SIDE * grid[0], SIDE * grid[1], generator=torch.Generator().manual_seed(2))


def plain(model: WindowedViT, images_B3HW: Tensor, window: int) -> list[Tensor]:
    """The same weights on whole images in their own order: every token asks every token, and a mask forbids."""
    encoder = model.encoder
    tokens = encoder.embed([View(images_B3HW)]).unpack()[0][:, encoder.num_prefix_tokens :]
    height, width = (side // SIDE for side in images_B3HW.shape[2:])
    places = [(y, x) for y in range(height) for x in range(width)]
    maps = []
    for index, block in enumerate(encoder.blocks):
        whole = index in model.global_blocks
        bias = model.global_bias if whole else model.window_bias
        added = torch.zeros(encoder.num_heads, len(places), len(places))
        if bias is not None:
            (h, w), table = bias.grid, bias.relative_position_bias_table
            clamp = [[(y - v, x - u) for v, u in places] for y, x in places]
            entries = [[min(max(dy + h - 1, 0), 2 * h - 2) * (2 * w - 1) + min(max(dx + w - 1, 0), 2 * w - 2)
                        for dy, dx in row] for row in clamp]  # fmt: skip
            added = table[torch.tensor(entries)].permute(2, 0, 1)
        if not whole:
            of = [(y // window, x // window) for y, x in places]
            apart = torch.tensor([[a != b for b in of] for a in of])
            added = added.masked_fill(apart, -torch.inf)
        normed = block.norm1(tokens)
        q, k, v = block.attn.qkv(normed).unflatten(-1, (3, encoder.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=added[None])
        tokens = tokens + block.ls1(block.attn.proj(mixed.transpose(1, 2).flatten(2)))
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        if index in model.taps:
            maps.append(tokens.transpose(1, 2).unflatten(2, (height, width)))
    return maps


def value_and_gradients(model: WindowedViT, maps: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    model.zero_grad()
    generator = torch.Generator().manual_seed(3)
    sum((found * torch.randn(found.shape, generator=generator)).mean() for found in maps).backward()
    return maps, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("relative", [False, True], ids=["packed kernel", "relative biases"])
@pytest.mark.parametrize(
    ("grid", "window", "global_blocks"),
    [((6, 6), 3, 2), ((7, 5), 3, 2), ((5, 7), 2, 0), ((7, 10), 4, 4), ((4, 4), 14, 1), ((5, 3), 0, 4), ((6, 9), 5, 4)],
)
@pytest.mark.parametrize("pyramid", ["four-blocks", "simple"])
def test_windows_equal_plain_masked_attention(
    grid: tuple[int, int], window: int, global_blocks: int, relative: bool, pyramid: str
):
    encoder = {"init_values": 0.5, "reg_tokens": 1} if pyramid == "simple" else {}
    model = backbone(grid, encoder, window=window, global_blocks=global_blocks, relative=relative, pyramid=pyramid)
    given = images(grid)
    ours, our_gradients = value_and_gradients(model, model(given))
    theirs, their_gradients = value_and_gradients(model, plain(model, given, window))
    assert len(ours) == len(theirs) == (4 if pyramid == "four-blocks" else 1)
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == (2, 128, *grid)
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, their_gradients[name], atol=1e-5, rtol=1e-4, msg=name)


def test_other_windows_are_seen():
    """What the comparison above rests on."""
    model = backbone((7, 5), window=3, global_blocks=2, relative=False)
    given = images((7, 5))
    assert (model(given)[0] - plain(model, given, 4)[0]).abs().max() > 1e-3


def test_biases_that_start_at_zero_change_nothing():
    given, form = images((7, 7)), dict(size=56, window=3)
    without, zero = (WindowedViT(small_vit(), Form(relative=relative, **form)) for relative in (False, True))
    assert without.window_bias is None and without.global_bias is None
    for ours, theirs in zip(zero(given), without(given), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_only_tables_that_are_used_exist():
    def tables(**form: object) -> tuple[bool, bool]:
        made = WindowedViT(small_vit(), Form(size=64, window=form.pop("window", 3), **form))
        return made.window_bias is not None, made.global_bias is not None

    assert tables(global_blocks=2) == (True, True)
    assert tables(global_blocks=0) == (True, False)
    assert tables(global_blocks=4) == tables(window=0) == (False, True)


def test_the_paper_s_blocks_windows_and_tables():
    assert spread(12, 4) == (2, 5, 8, 11)
    assert spread(24, 4) == (5, 11, 17, 23)
    found = tiling((64, 64), 14, torch.device("cpu"))
    assert found.sizes == ((14, 14, 16), (14, 8, 4), (8, 14, 4), (8, 8, 1))
    assert sum(count for _, _, count in found.sizes) == 25
    assert torch.equal(found.order_N.sort().values, torch.arange(64 * 64))
    assert torch.equal(found.order_N[found.places_N], torch.arange(64 * 64))
    assert found.order_N[[0, 1, 13, 14, 196]].tolist() == [0, 1, 13, 64, 14]
    assert RelativeBias((14, 14), 12).relative_position_bias_table.shape == (27**2, 12)


def test_a_bias_belongs_to_an_offset():
    bias = RelativeBias((3, 4), 2)
    torch.nn.init.normal_(bias.relative_position_bias_table, generator=torch.Generator().manual_seed(0))
    whole, part = bias((3, 4)), bias((2, 3))
    # patch (1, 2) asks patch (0, 0): down 1, right 2
    entry = bias.relative_position_bias_table[(1 + 2) * 7 + 2 + 3]
    torch.testing.assert_close(whole[:, 1 * 4 + 2, 0], entry)
    torch.testing.assert_close(part[:, 1 * 3 + 2, 0], entry)
    torch.testing.assert_close(whole[:, 0, 0], whole[:, 11, 11])


def test_positions_are_resampled_once_and_learn():
    encoder = small_vit()
    model = WindowedViT(encoder, Form(size=72, window=3))
    torch.testing.assert_close(model.encoder.pos_embed[0, 1:], encoder.positions((9, 9)))
    assert model.encoder.img_size == (72, 72) and model.encoder.state_dict().keys() == encoder.state_dict().keys()
    torch.testing.assert_close(model.encoder.cls_token, encoder.cls_token)
    frozen = {name for name, p in model.encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"cls_token", "norm.weight", "norm.bias"}
    assert not WindowedViT(small_vit(positions="sincos"), Form(size=72, window=3)).encoder.pos_embed.requires_grad


def beit_vit(**overrides: object) -> vit.VisionTransformer:
    """With LayerScale and a table of relative positions that is not zero."""
    encoder = small_vit(positions="relative", init_values=0.5, **overrides)
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(encoder.rel_pos_bias.relative_position_bias_table, generator=generator)
    return encoder


@pytest.mark.parametrize("window", [4, 0], ids=["one window", "no window"])
def test_a_beit_encoder_attends_as_it_did_without_its_class_token(window: int):
    """At its own size, windowed and global blocks alike, but for the absolute positions, which are new."""
    encoder, given = beit_vit(), images((4, 4))
    model = WindowedViT(encoder, Form(size=32, window=window, global_blocks=2))
    torch.nn.init.zeros_(model.encoder.pos_embed)
    found = model(given)
    packed = Packed.pack([encoder.embed([View(given)]).unpack()[0][:, 1:]])
    bias_HLL = encoder.rel_pos_bias()[:, 1:, 1:]
    for block, our in zip(encoder.blocks, found, strict=True):
        tokens_TC = block(packed.tokens_TC, packed.cu_seqlens, packed.layout.max_seqlen, None, bias_HLL)
        packed = Packed(tokens_TC, packed.layout)
        their = packed.unpack()[0].transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(32, 32), (32, 40)])
def test_a_beit_encoder_s_table_is_resampled_as_by_its_code(shape: tuple[int, int]):
    encoder = beit_vit(img_size=shape)
    model = WindowedViT(encoder, Form(size=72, window=3, global_blocks=2))
    for bias in (model.window_bias, model.global_bias):
        table = encoder.rel_pos_bias.relative_position_bias_table.detach()
        expected = as_beit_s_code(table, encoder.grid, bias.grid)[:-3]
        assert bias.relative_position_bias_table.requires_grad
        torch.testing.assert_close(bias.relative_position_bias_table.detach(), expected, atol=1e-5, rtol=1e-5)


def test_a_beit_encoder_s_absolute_positions_are_new():
    encoder = beit_vit()
    torch.manual_seed(0)
    model = WindowedViT(encoder, Form(size=128, window=3))
    positions = model.encoder.pos_embed
    assert positions.requires_grad and positions.shape == (1, 1 + 16 * 16, 128)
    assert positions.std().item() == pytest.approx(0.02, rel=0.02)
    kept, left_out = model.encoder.state_dict(), "rel_pos_bias.relative_position_bias_table"
    assert kept.keys() - {"pos_embed"} == encoder.state_dict().keys() - {left_out}
    for name in kept.keys() - {"pos_embed"}:
        assert torch.equal(kept[name], encoder.state_dict()[name]), name
    again = vit.create(model.encoder.architecture.name, **dict(model.encoder.architecture.overrides))
    again.load_state_dict(kept)


@pytest.mark.parametrize("relative", [False, True])
def test_stochastic_depth_drops_branches_of_whole_images(relative: bool):
    model = backbone((5, 5), window=3, global_blocks=0, relative=relative)
    given = images((5, 5), 1).expand(64, -1, -1, -1)
    model.encoder.drop_path_rates = (0, 0, 0, 0.5)
    torch.manual_seed(0)
    with torch.no_grad():
        dropped = model(given)
        assert not torch.equal(dropped[3], model(given)[3])
        model.eval()
        kept = model(given)
        torch.testing.assert_close(dropped[2], kept[2])
        model.train()
        possible = []
        for worth in ((0, 0), (0, 2), (2, 0), (2, 2)):
            model._worth = lambda index, *_, worth=worth: (
                torch.tensor(worth).view(2, 1, 1, 1).expand(2, 64, 1, 1) if index == 3 else None
            )
            possible.append(model(given)[3][0])
    distances = torch.stack([(dropped[3] - one).flatten(1).abs().amax(1) for one in possible])
    nearest, which = distances.min(0)
    assert nearest.max() < 1e-4
    assert which.bincount(minlength=4).min() >= 6


def test_from_scratch_is_initialised_as_beit():
    encoder = vit.create("vit_tiny_patch16_224", depth=3)
    before = torch.get_rng_state()
    initialise_as_beit(encoder, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for number, block in enumerate(encoder.blocks, 1):
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
        for last in (block.attn.proj, block.mlp.fc2):
            assert last.weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.02)
            assert not last.bias.any()
    weight = encoder.patch_embed.proj.weight.clone()
    initialise_as_beit(encoder, seed=1)
    assert torch.equal(weight, encoder.patch_embed.proj.weight)
    initialise_as_beit(encoder, seed=2)
    assert not torch.equal(weight, encoder.patch_embed.proj.weight)
    relative = beit_vit()
    initialise_as_beit(relative)
    assert not relative.rel_pos_bias.relative_position_bias_table.any()


@pytest.mark.parametrize(
    ("encoder", "form", "sentence"),
    [
        ({}, {"size": 60}, "size 60 is not a multiple of the patch size 8"),
        (
            {"positions": "relative"},
            {"size": 64, "relative": False},
            "vit_micro_patch8_32 has relative positions, but this form has relative = False; choose True",
        ),
        ({}, {"size": 64, "global_blocks": 5}, "global_blocks 5 wants more blocks than the 4 of vit_micro_patch8_32"),
        ({"depth": 2}, {"size": 64, "global_blocks": 2}, "the pyramid four-blocks wants more blocks than the 2"),
    ],
)
def test_what_does_not_fit_is_one_sentence(encoder: dict[str, object], form: dict[str, object], sentence: str):
    encoder = vit.create("vit_micro_patch8_32", **({"depth": 4} | encoder))
    with pytest.raises(BadInput, match=sentence):
        WindowedViT(encoder, Form(**form))


def test_images_beyond_the_biases_are_one_sentence():
    model = backbone((5, 5), window=3)
    with pytest.raises(
        BadInput, match="images of 6x5 patches are larger than the 5x5 that the relative biases are for"
    ):
        model(images((6, 5)))


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        ({"pyramid": "fpn"}, "pyramid 'fpn' is none of four-blocks, simple"),
        ({"head_norm": "gn"}, "head_norm 'gn' is none of bn, ln"),
        ({"size": 0}, "size is 0; it must be a whole number from 1"),
        ({"window": -1}, "window is -1; it must be a whole number from 0"),
        ({"anchors": (32, 64)}, "anchors are \\(32, 64\\); they must be five"),
        ({"ratios": ()}, "ratios are \\(\\)"),
        ({"candidates": (0, 1)}, "candidates are \\(0, 1\\)"),
        ({"rpn_background": 0.8}, "rpn_background 0.8 and rpn_foreground 0.7"),
    ],
)
def test_a_form_that_cannot_be_is_one_sentence(form: dict[str, object], sentence: str):
    with pytest.raises(BadInput, match=sentence):
        Form(**form)


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_windows_of_the_small_form_fit_four_times(patch: int):
    form = Form.small(patch)
    side = form.size // patch
    assert tiling((side, side), form.window, torch.device("cpu")).sizes == ((form.window, form.window, 4),)
