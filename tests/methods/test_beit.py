"""BEiT against a plain restatement: loss and gradients with relative positions, masks, codes, codebook, a skipped update."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine import methods
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.data.sources import open_images
from engine.data.subsets import subset
from engine.methods.beit import Beit, Settings
from engine.methods.parts.tokenizers import Codebook, DiscreteVae
from engine.model import vit
from engine.recipes import recipe
from engine.training.config import parse
from engine.training.step import Update
from tests.methods.small import small
from tests.methods.test_ibot import assert_padding_changes_nothing, masks_of
from tests.methods.test_mae import patchify
from tests.saved import content

SMALL = small(Settings, epochs=4, smallest_block=2, mask_ratio=0.5, jitter=0.0, clip_norm=0.0)


def make(encoder: dict | None = None, **settings: object) -> Beit:
    torch.manual_seed(0)
    overrides = {"depth": 2, "positions": "relative", "init_values": 0.1} | (encoder or {})
    method = Beit(vit.create("vit_micro_patch8_32", **overrides), Settings(**(SMALL | settings)))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return method


def crops(seed: int = 0, batch: int = 4) -> tuple[Tensor]:
    return (torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed)),)


def drawn(method: Beit, step: int = 0, batch: int = 4, rows: slice = slice(None)) -> dict[str, Tensor]:
    return method.draw(Draws(0, step, batch=batch, rows=rows, device=torch.device("cpu")))


def plain_bias(encoder: vit.VisionTransformer) -> Tensor:
    """[H, L, L] by loops."""
    (height, width), table = encoder.grid, encoder.rel_pos_bias.relative_position_bias_table
    last = (2 * height - 1) * (2 * width - 1)
    rows = [torch.stack([table[last + 2]] + [table[last]] * (height * width))]
    for asks in range(height * width):
        row = [table[last + 1]]
        for asked in range(height * width):
            down, right = asks // width - asked // width, asks % width - asked % width
            row.append(table[(down + height - 1) * (2 * width - 1) + right + width - 1])
        rows.append(torch.stack(row))
    return torch.stack(rows).permute(2, 0, 1)


def plain_tokens(method: Beit, images: Tensor, mask: Tensor) -> Tensor:
    """BEiT's encoder with its mask token, written out; [B, 1 + N, C]."""
    encoder = method.encoder
    x = F.conv2d(images, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, stride=encoder.patch_size)
    x = x.flatten(2).transpose(1, 2)
    x = torch.where(mask[..., None], method.mask_token, x)
    x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], 1)
    bias = plain_bias(encoder)
    for block in encoder.blocks:
        y = block.norm1(x)
        q, k, v = block.attn.qkv(y).view(*y.shape[:2], 3, block.attn.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + bias).softmax(-1)
        x = x + block.ls1.gamma * block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.ls2.gamma * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return encoder.norm(x)


def plain_codes(method: Beit, images: Tensor) -> Tensor:
    """[B, N]: the nearest centre of each patch, by distances."""
    patches = patchify(images, method.encoder.patch_size)
    patches = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
    return torch.cdist(patches.double(), method.tokenizer.centres.double()).argmin(2)


def plain_loss(method: Beit, images: Tensor, mask: Tensor) -> Tensor:
    """Equation 2: the negative log-likelihood of masked patches' codes, averaged within each image, then over images."""
    scores = method.head(plain_tokens(method, images, mask)[:, 1:]).log_softmax(2)
    likelihood = scores.gather(2, plain_codes(method, images)[..., None])[..., 0]
    return torch.stack([-line[hidden].mean() for line, hidden in zip(likelihood, mask)]).mean()


def test_loss_and_gradients_equal_the_paper():
    method, (images,) = make(), crops()
    masks = drawn(method)["masks"]
    masks[1, masks[1].nonzero()[0]] = False  # images differ in how many they hide
    report, plain = method((images,), torch.arange(4), {"masks": masks}), plain_loss(method, images, masks)
    assert report["loss"].item() == pytest.approx(plain.item(), abs=1e-5)
    report["loss"].backward()
    ours = {name: p.grad.clone() for name, p in method.named_parameters()}
    method.zero_grad()
    plain.backward()
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=2e-6, rtol=1e-3, msg=name)
    assert ours["mask_token"].abs().max() > 0
    assert ours["encoder.rel_pos_bias.relative_position_bias_table"].abs().sum(1).min() > 0


def test_hidden_pixels_reach_the_targets_alone():
    method, (images,) = make(), crops()
    masks = drawn(method)["masks"]
    pixels = masks.view(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(pixels, images.flip(3), images)
    seen = {}

    def watch(codes: str):
        method.encoder.norm.register_forward_hook(lambda module, args, out: seen.__setitem__(codes, out))

    watch("first")
    one = method((images,), torch.arange(4), {"masks": masks})
    kept = seen["first"]
    two = method((changed,), torch.arange(4), {"masks": masks})
    assert torch.equal(kept, seen["first"]) and one["loss"] != two["loss"]


def test_what_is_reported():
    method, (images,) = make(), crops()
    masks = drawn(method)["masks"]
    report = method((images,), torch.arange(4), {"masks": masks})
    codes = plain_codes(method, images)[masks]
    guesses = method.head(plain_tokens(method, images, masks)[:, 1:]).argmax(2)[masks]
    assert report["code_accuracy"].item() == pytest.approx((guesses == codes).double().mean().item(), abs=1e-6)
    share = codes.bincount().double() / len(codes)
    perplexity = math.exp(-torch.xlogy(share, share).sum())
    assert report["code_usage"].item() == pytest.approx(perplexity / min(48, len(codes)), rel=1e-5)


def test_masks_are_75_of_196_patches_in_blocks():
    method = Beit(
        vit.create("vit_tiny_patch16_224", depth=1),
        Settings(**(SMALL | {"mask_ratio": 75 / 196, "smallest_block": 16})),
    )
    masks = torch.cat([drawn(method, step, 32)["masks"] for step in range(8)])
    hidden = masks.sum(1)
    assert masks.shape == (256, 196) and masks.dtype == torch.bool and masks.device.type == "cpu"
    assert hidden.max() == 75 and (hidden == 75).double().mean() > 0.5 and hidden.double().mean() > 70
    grid = masks.view(-1, 14, 14)
    beside = (grid[:, :, 1:] & grid[:, :, :-1]).sum().item() / masks.sum().item()
    assert beside > 0.7  # of patches hidden one by one, 0.36 have a hidden one to their right


def test_masks_are_functions_of_seed_step_and_row():
    method = make()
    whole = drawn(method, 3, 8)["masks"]
    parts = [drawn(method, 3, 8, rows)["masks"] for rows in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(drawn(method, 4, 8)["masks"], whole)


def test_a_batch_without_masks_teaches_nothing():
    method = make()
    report = method(crops(), torch.arange(4), {"masks": torch.zeros(4, 16, dtype=torch.bool)})
    report["loss"].backward()
    assert all(value == 0 for value in report.values())
    assert all(p.grad is None or not p.grad.any() for p in method.parameters())


def test_micro_batches_give_the_whole_batch_s_update():
    ends = []
    for accumulate in (1, 2):
        method = make()
        update = Update(method, 8, accumulate=accumulate)
        losses = [update(step, crops(), torch.arange(4), drawn(method))["loss"] for step in (1, 2)]
        ends.append((torch.stack(losses), method.head.weight.detach()))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-5, rtol=1e-4)


def test_a_skipped_update_changes_nothing_and_no_update_the_codebook():
    method = make()
    update = Update(method, 8)
    update(1, crops(), torch.arange(4), drawn(method))
    before = content(method, update)
    (images,) = crops(1)
    images[2] = math.nan
    update(2, (images,), torch.arange(4), drawn(method))
    after = content(method, update)
    assert update.skipped == 1 and all(torch.equal(value, after[name]) for name, value in before.items())
    update(2, crops(1), torch.arange(4), drawn(method))
    last = content(method, update)
    same = {name for name, value in before.items() if torch.equal(value, last[name])}
    assert "model/tokenizer.centres" in same
    moved = {"model/head.weight", "model/mask_token", "model/encoder.rel_pos_bias.relative_position_bias_table"}
    assert not same & moved


def test_stochastic_depth_is_drawn():
    method = make({"drop_path": 0.5})
    numbers = drawn(method)
    losses = [
        method(crops(), torch.arange(4), numbers | {"depth": numbers["depth"] + shift})["loss"].item()
        for shift in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_groups_leave_the_class_token_undecayed():
    groups = {name: group for group in make().groups(2048) for name in group.parameters}
    assert all(group.peak_lr == pytest.approx(1.5e-3) for group in groups.values())
    free = {name for name, group in groups.items() if not group.weight_decay}
    assert "encoder.cls_token" in free and {name for name in free if name != "encoder.cls_token"} == {
        name for name in groups if groups[name].parameters[name].ndim == 1
    }
    assert {"mask_token", "encoder.rel_pos_bias.relative_position_bias_table"} <= groups.keys() - free
    table = "encoder.rel_pos_bias.relative_position_bias_table"
    faster = {name: group.peak_lr for group in make(table_lr=20).groups(2048) for name in group.parameters}
    assert {name for name, rate in faster.items() if rate == pytest.approx(3e-2)} == {table}
    assert faster.keys() == groups.keys() and faster["head.weight"] == pytest.approx(1.5e-3)
    assert "encoder.pos_embed" in {
        n for g in make({"positions": "learned"}).groups(8) if not g.weight_decay for n in g.parameters
    }


def few_digits():
    return subset(open_images(None, "train"), torch.arange(0, 1400, 14))


def test_preparing_fits_the_codebook_and_keeps_it_beside_the_run(tmp_path: Path):
    books = []
    for seed in (0, 0, 1):
        method = make()
        torch.manual_seed(seed)
        method.prepare(few_digits(), torch.device("cpu"))
        books.append(method.tokenizer.centres.clone())
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])
    method.keepsakes(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codebook.png", "codebook.safetensors"]
    again = make(codebook=str(tmp_path / "codebook.safetensors"))
    assert torch.equal(again.tokenizer.centres, books[2])
    again.prepare(few_digits(), torch.device("cpu"))
    assert torch.equal(again.tokenizer.centres, books[2])


def test_files_give_the_codes(tmp_path: Path):
    torch.manual_seed(0)
    torch.save(DiscreteVae(8, width=8, per_group=2, codes=40).state_dict(), tmp_path / "encoder.pth")
    Codebook(30, 8, normalise=False).save(tmp_path / "codebook.safetensors")
    encoder, (images,) = vit.create("vit_micro_patch8_32", depth=1), crops()
    for flag, name, codes in (("tokenizer", "encoder.pth", 40), ("codebook", "codebook.safetensors", 30)):
        file = str(tmp_path / name)
        Settings(**(SMALL | {flag: file, "codes": codes})).check_encoder("beit", encoder)
        with pytest.raises(
            BadInput, match=f"--beit.codes is 48, but --beit.{flag} .* has {codes}; set --beit.codes {codes}"
        ):
            Settings(**(SMALL | {flag: file})).check_encoder("beit", encoder)
        method = make(codes=codes, **{flag: file})
        masks = drawn(method)["masks"]
        expected = method.tokenizer(images).view(4, 16)[masks]
        loss, _ = method.code_loss(
            method.encoder(images)[:, 1:][masks], expected, torch.full((len(expected),), 1 / len(expected))
        )
        assert loss.isfinite() and expected.max() < codes
        report = method((images,), torch.arange(4), {"masks": masks})
        report["loss"].backward()
        assert not any(name.startswith("tokenizer") for name, p in method.named_parameters() if p.grad is not None)
        assert any(name.startswith("tokenizer") for name in method.state_dict())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--beit.mask-ratio", "1"], "mask-ratio"),
        (["--beit.smallest-block", "0"], "smallest-block"),
        (["--beit.codes", "1"], "codes"),
        (["--beit.table-lr", "0"], "table-lr"),
        (["--beit.codebook-patches", "5"], "at least one for each of the 64 codes"),
        (["--beit.tokenizer", "a", "--beit.codebook", "b"], "left out where a codebook is given"),
        (["--beit.jitter", "-1"], "jitter"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: list[str], named: str):
    with pytest.raises(BadInput, match=named):
        parse(["--method", "beit", *flags])


def test_masks_and_files_must_fit_the_encoder():
    for overrides, settings, named in (
        ({}, {"mask_ratio": 0.01}, "hides none"),
        ({"img_size": (8, 128)}, {}, "too narrow"),
        ({}, {"smallest_block": 9}, "hides 8 of the model's 16 patches in all"),
        ({}, {"codebook": "/nowhere/codebook.safetensors"}, "there is no codebook"),
        ({}, {"tokenizer": "/nowhere/encoder.pkl"}, "there is no tokenizer"),
    ):
        with pytest.raises(BadInput, match=named):
            Settings(**(SMALL | settings)).check_encoder(
                "beit", vit.create("vit_micro_patch8_32", depth=1, **overrides)
            )


@pytest.mark.parametrize("model", ["vit_base_patch16_224", "vit_large_patch16_224", "vit_small_patch16_224"])
def test_published_recipe(model: str):
    chosen = recipe("beit", model, "auto", embedded=False)
    ((name, s),) = chosen.stages
    s.check("beit")
    s.check_encoder("beit", vit.create(model, depth=1, **{k: v for k, v in chosen.encoder.items() if k != "depth"}))
    assert methods.get(name) is Beit and chosen.source.startswith("after BEiT's released recipe")
    assert (s.epochs, s.batch_size, s.warmup * s.epochs, s.end_lr) == (800, 2048, 10, 1e-5)
    assert s.base_lr * 2048 / 256 == pytest.approx(1.5e-3)
    assert (s.weight_decay, s.betas, s.clip_norm, s.clip_over) == (0.05, (0.9, 0.999), 3.0, "all")
    assert (s.crop_scale, s.flip, s.jitter, s.codes, s.smallest_block) == ((0.08, 1.0), 0.5, 0.4, 8192, 16)
    scale = 1e-5 if "large" in model else 0.1
    assert chosen.encoder == {
        "initialisation": "beit", "positions": "relative", "init_values": scale, "drop_path": 0.1, "global_pool": "avg"
    }  # fmt: skip
    (view,) = Beit(vit.create("vit_tiny_patch16_224", depth=1), s).views()
    assert (view.size, view.jitter, view.brightness, view.contrast, view.saturation, view.hue) == (
        (224, 224),
        1,
        0.4,
        0.4,
        0.4,
        0,
    )


@pytest.mark.parametrize("which", ["drawn", "none", "all"])
def test_padding_changes_nothing(which: str, monkeypatch: pytest.MonkeyPatch):
    method = make()
    assert_padding_changes_nothing(method, crops(), masks_of(drawn(method), which), monkeypatch, torch.float32)
