"""MAE against a plain restatement of the paper: mask first, embed all patches, shuffle back, decode all, loss on the masked."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.core.draws import Draws
from engine.core.phases import WHOLE, Phase
from engine.methods.mae import Mae, Settings
from engine.model import vit
from engine.model.shapes import Alike
from engine.model.tokens import View
from engine.recipes import recipe

SETTINGS = Settings(epochs=1, batch_size=4, decoder_dim=64, decoder_depth=2, decoder_heads=2)


def make(name: str = "vit_micro_patch8_32", settings: Settings = SETTINGS, **encoder: object) -> Mae:
    torch.manual_seed(0)
    return Mae(vit.create(name, positions="sincos", **encoder), settings)


def draws(batch: int) -> Draws:
    return Draws(0, batch=batch, rows=slice(None), device=torch.device("cpu"))


def patchify(images: Tensor, p: int) -> Tensor:
    """[B, 3, H, W] -> [B, N, P*P*3], element order (row, column, channel)."""
    b, c, h, w = images.shape
    return images.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)


def plain_attention(x: Tensor, attention) -> Tensor:
    b, n, c = x.shape
    q, k, v = attention.qkv(x).view(b, n, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
    return attention.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


def plain_block(x: Tensor, block) -> Tensor:
    x = x + plain_attention(block.norm1(x), block.attn)
    hidden = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x)))
    return x + block.mlp.fc2(hidden)


def plain_loss(mae: Mae, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """He et al. 2022, section 3, in the paper's order of operations; returns loss and mask [B, N] (1 = removed)."""
    encoder, decoder, p = mae.encoder, mae.decoder, mae.encoder.patch_size
    patches = (
        torch.nn.functional.conv2d(images, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, stride=p)
        .flatten(2)
        .transpose(1, 2)
    )
    patches = patches + encoder.pos_embed[:, 1:]
    b, n, c = patches.shape
    keep = int(n * 0.25)
    shuffle = noise.argsort(1)
    restore = shuffle.argsort(1)
    kept = shuffle[:, :keep, None].expand(-1, -1, c)
    x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(b, -1, -1), patches.gather(1, kept)], 1)
    for block in encoder.blocks:
        x = plain_block(x, block)
    x = decoder.decoder_embed(encoder.norm(x))
    d = x.shape[-1]
    full = torch.cat([x[:, 1:], decoder.mask_token.expand(b, n - keep, -1)], 1)
    full = full.gather(1, restore[..., None].expand(-1, -1, d))
    x = torch.cat([x[:, :1], full], 1) + decoder.decoder_pos_embed
    for block in decoder.decoder_blocks:
        x = plain_block(x, block)
    prediction = decoder.decoder_pred(decoder.decoder_norm(x))[:, 1:]
    target = patchify(images, p)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    mask = torch.ones(b, n)
    mask[:, :keep] = 0
    mask = mask.gather(1, restore)
    error = (prediction - target).square().mean(-1)
    return (error * mask).sum() / mask.sum(), mask


def test_loss_and_gradients_equal_the_paper():
    mae, images = make(), torch.randn(4, 3, 32, 32)
    drawn = mae.draw(draws(4))
    loss = mae((images,), torch.arange(4), drawn)["loss"]
    loss.backward()
    ours = {name: p.grad.clone() for name, p in mae.named_parameters() if p.grad is not None}
    mae.zero_grad()
    plain, _ = plain_loss(mae, images, drawn["noise"][:, 0])
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    theirs = {name: p.grad for name, p in mae.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("size", "phase"), [((32, 32), WHOLE), ((48, 80), WHOLE), ((64, 128), Phase(side=0.5))])
def test_some_of_the_masked_patches_are_decoded_as_if_the_others_were_not_there(size: tuple[int, int], phase: Phase):
    settings = Settings(epochs=1, batch_size=4, decode_share=0.4, decoder_dim=64, decoder_depth=2, decoder_heads=2)
    mae = make(settings=settings, img_size=size)
    mae.phase = phase
    images = torch.randn(4, 3, *mae.size)
    drawn = mae.draw(draws(4))
    order = drawn["noise"][:, 0].argsort(dim=1, stable=True)
    visible, masked = order[:, : mae.keep], order[:, mae.keep : mae.keep + mae.decoded]
    assert mae.decoded == round(0.4 * (mae.patches_of_crop - mae.keep)) < mae.patches_of_crop - mae.keep
    loss = mae((images,), torch.arange(4), drawn)["loss"]
    loss.backward()
    ours = {name: p.grad.clone() for name, p in mae.named_parameters() if p.grad is not None}
    mae.zero_grad()

    decoder, p = mae.decoder, mae.encoder.patch_size
    (latent,) = mae.encoder.encode([View(images, visible)]).unpack()
    places = mae.decoder.positions(mae.grid)[0]
    rows = torch.cat([torch.zeros(4, 1, dtype=torch.int64), 1 + visible, 1 + masked], 1)
    x = decoder.decoder_embed(latent)
    x = torch.cat([x, decoder.mask_token.expand(4, mae.decoded, -1)], 1) + places[rows]
    for block in decoder.decoder_blocks:
        x = plain_block(x, block)
    prediction = decoder.decoder_pred(decoder.decoder_norm(x))[:, 1 + mae.keep :]
    target = patchify(images, p).gather(1, masked[..., None].expand(-1, -1, p * p * 3))
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    plain = (prediction - target).square().mean()
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, mae.get_parameter(name).grad, atol=1e-5, rtol=1e-4, msg=name)


def test_several_crops_are_the_mean_over_crops():
    mae = make(settings=Settings(epochs=1, batch_size=4, crops=2, decoder_dim=64, decoder_depth=2, decoder_heads=2))
    first, second = torch.randn(2, 4, 3, 32, 32)
    drawn = mae.draw(draws(4))
    loss = mae((first, second), torch.arange(4), drawn)["loss"]
    losses = [plain_loss(mae, view, drawn["noise"][:, crop])[0] for crop, view in enumerate((first, second))]
    assert loss.item() == pytest.approx(sum(losses).item() / 2, abs=1e-5)
    assert len(mae.views()) == 2


@pytest.mark.parametrize(("patch", "visible", "patches"), [(16, 49, 196), (14, 64, 256)])
def test_a_quarter_of_the_patches_is_visible(patch: int, visible: int, patches: int):
    mae = make("vit_tiny_patch16_224", patch_size=patch, depth=1)
    assert (mae.keep, mae.patches_of_crop) == (visible, patches)


def test_masks_are_uniform_and_differ_between_images_and_steps():
    mae = make()
    masks = []
    for step in range(200):
        drawn = mae.draw(Draws(0, step, batch=16, rows=slice(None), device=torch.device("cpu")))
        _, mask = plain_loss_mask(drawn["noise"][:, 0])
        masks.append(mask)
    share = torch.cat(masks).mean(0)
    assert (share - 0.75).abs().max() < 0.03  # 3,200 draws: five standard deviations
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 200


def plain_loss_mask(noise: Tensor) -> tuple[Tensor, Tensor]:
    order = noise.argsort(1)
    mask = torch.ones_like(noise)
    return order, mask.scatter(1, order[:, : noise.shape[1] // 4], 0.0)


def test_decoder_positions_are_sin_cos_with_a_zero_row_for_the_class_token():
    mae = make(img_size=(32, 64))
    positions, (rows, columns), dim = mae.decoder.decoder_pos_embed[0], mae.encoder.grid, 64
    assert not positions.requires_grad
    assert positions[0].abs().max() == 0
    omega = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    for row in range(rows):
        for column in range(columns):
            # Half the dims for the column (W first), half for the row; sine then cosine.
            expected = torch.cat([f(place * omega) for place in (column, row) for f in (torch.sin, torch.cos)])
            torch.testing.assert_close(positions[1 + row * columns + column], expected.float(), atol=1e-6, rtol=0)


def test_hidden_patches_are_never_read_by_the_encoder():
    mae, images = make(), torch.randn(2, 3, 32, 32)
    visible = torch.tensor([[0, 5], [3, 9]])
    masked = torch.tensor([[n for n in range(16) if n not in row] for row in visible.tolist()])
    (expected,) = mae.predict([Alike(images)], [visible], [masked])
    rows = patchify(images, 8)
    poisoned = rows.scatter(1, masked[..., None].expand(-1, -1, rows.shape[-1]), float("nan"))
    poisoned = poisoned.view(2, 4, 4, 8, 8, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 32, 32)
    assert torch.equal(*mae.predict([Alike(poisoned)], [visible], [masked]), expected)


def test_published_recipe():
    ((name, settings),) = recipe("mae", "vit_large_patch16_224", "auto", embedded=False).stages
    assert (name, settings.epochs, settings.batch_size, settings.warmup * settings.epochs) == ("mae", 800, 4096, 40)
    assert (settings.base_lr, settings.weight_decay, settings.betas) == (1.5e-4, 0.05, (0.9, 0.95))
    assert (settings.decoder_dim, settings.decoder_depth, settings.decoder_heads) == (512, 8, 16)
    mae = make(settings=settings, depth=1)
    groups = {name: group for group in mae.groups(4096) for name in group.parameters}
    assert all(group.peak_lr == pytest.approx(2.4e-3) for group in groups.values())
    assert groups["encoder.cls_token"].weight_decay == 0.05
    assert groups["encoder.norm.weight"].weight_decay == groups["encoder.patch_embed.proj.bias"].weight_decay == 0
    assert "encoder.pos_embed" not in groups


@pytest.mark.parametrize(("crops", "decode_share"), [(1, 1.0), (2, 0.5)])
def test_images_of_their_own_aspect_are_the_mean_over_images_one_by_one(crops: int, decode_share: float):
    sizes = Settings(epochs=1, batch_size=5, decoder_dim=64, decoder_depth=2, decoder_heads=2)
    mae = make(settings=replace(sizes, aspect="keep", crops=crops, decode_share=decode_share), depth=2)
    (view, *_) = mae.views()
    assert (view.patch, view.size) == (8, (32, 32))
    shapes = torch.tensor([[24, 40], [32, 32], [16, 64], [24, 40], [40, 24]])[:, None].expand(-1, crops, -1)
    rooms = tuple(torch.randn(5, 3, 32, 32) for _ in range(crops))
    drawn = mae.draw(draws(5)) | {"sizes": shapes}
    loss = mae(rooms, torch.arange(5), drawn)["loss"]
    loss.backward()
    ours = {name: p.grad.clone() for name, p in mae.named_parameters() if p.grad is not None}
    mae.zero_grad()

    alone = []
    for crop, room in enumerate(rooms):
        for row, (height, width) in enumerate(shapes[:, crop].tolist()):
            image = room[row].flatten()[: 3 * height * width].view(1, 3, height, width)
            order = drawn["noise"][row : row + 1, crop, : height * width // 64].argsort(dim=1, stable=True)
            keep = int(order.shape[1] * 0.25)
            visible, masked = order[:, :keep], order[:, keep:][:, : round(decode_share * (order.shape[1] - keep))]
            (prediction,) = mae.predict([Alike(image)], [visible], [masked])
            target = patchify(image, 8).gather(1, masked[..., None].expand(-1, -1, 192))
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
            alone.append((prediction - target).square().mean())
    plain = torch.stack(alone).mean()
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, mae.get_parameter(name).grad, atol=1e-5, rtol=1e-4, msg=name)


def test_images_that_fill_their_room_are_seen_as_crops_are():
    plain, own = make(), make(settings=replace(SETTINGS, aspect="keep"))
    images, drawn = torch.randn(4, 3, 32, 32), plain.draw(draws(4))
    whole = torch.full((4, 1, 2), 32)
    losses = [
        mae((images,), torch.arange(4), drawn | more)["loss"] for mae, more in ((plain, {}), (own, {"sizes": whole}))
    ]
    assert torch.equal(*losses)
