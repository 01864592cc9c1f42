import math

import pytest
import torch
from torch.nn import functional as F

from engine.evals.features import encoder_of
from engine.evals.segmentation import upernet
from engine.evals.segmentation.heads import FcnHead, LinearHead, OnFrozen, pixel_loss, resize, taps
from engine.evals.segmentation.upernet import PyramidPooling, UPerHead, UPerNet
from engine.evals.subject import Subject
from engine.model import vit


def small_vit(**overrides) -> vit.VisionTransformer:
    generator = torch.Generator().manual_seed(0)
    return vit.create("vit_micro_patch8_32", generator=generator, **overrides)


@pytest.mark.parametrize(
    ("depth", "wanted"), [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (6, (1, 2, 3, 5)), (1, (0, 0, 0, 0))]
)
def test_blocks_looked_at(depth, wanted):
    assert taps(depth) == wanted


@pytest.mark.parametrize("size", [(4, 4), (3, 7), (1, 1)])
@pytest.mark.parametrize("make", [LinearHead, FcnHead])
def test_heads_keep_the_map_and_start_undecided(make, size):
    torch.manual_seed(0)
    head = make(32, 11)
    logits = head(torch.randn(8, 32, *size))
    assert logits.shape == (8, 11, *size)
    shares = logits.softmax(1)
    assert shares.min() > 1 / 22 and shares.max() < 2 / 11
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in head.parameters() if p.ndim > 1)


def test_linear_head_is_batch_norm_and_one_matrix():
    torch.manual_seed(0)
    head, x = LinearHead(16, 5, dropout=0.0), 3 + 2 * torch.randn(4, 16, 6, 6)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    normal = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    expected = torch.einsum("bchw,kc->bkhw", normal, head[2].weight[:, :, 0, 0])
    torch.testing.assert_close(head(x), expected)
    assert abs(LinearHead(4096, 64)[2].weight.std().item() - 0.01) < 1e-4


def test_a_frozen_encoder_gets_no_gradient():
    encoder = torch.nn.Linear(3, 16)
    head = LinearHead(16, 5)
    model = OnFrozen(lambda images: encoder(images[:, :, ::8, ::8].permute(0, 2, 3, 1)).detach(), head)
    (logits,) = model(torch.randn(2, 3, 32, 32))
    logits.sum().backward()
    assert logits.shape == (2, 5, 4, 4) and encoder.weight.grad is None and head[2].weight.grad is not None
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {"head"}


def test_loss_counts_what_is_not_void():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 4, 4), torch.randint(0, 5, (2, 8, 8))
    labels[0, :3], labels[1, :, 5] = 255, 255
    large = resize(logits, (8, 8)).log_softmax(1)
    picked = [
        -large[b, labels[b, y, x], y, x] for b in range(2) for y in range(8) for x in range(8) if labels[b, y, x] < 255
    ]
    torch.testing.assert_close(pixel_loss(logits, labels), torch.stack(picked).mean())
    nothing = pixel_loss(logits.requires_grad_(), torch.full_like(labels, 255))
    nothing.backward()
    assert nothing == 0 and not logits.grad.any()
    uniform = pixel_loss(torch.zeros(2, 5, 4, 4), labels)
    assert abs(uniform.item() - math.log(5)) < 1e-6


def restated(conv, x):
    """Convolution, batch norm in evaluation, ReLU of one of torchvision's units."""
    weight, norm = conv[0].weight, conv[1]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return ((x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]).relu()


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    """In evaluation mode, with batch norms that are not the identity."""
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            for tensor in (part.running_mean, part.bias.data):
                tensor.normal_()
            for tensor in (part.running_var, part.weight.data):
                tensor.uniform_(0.5, 2)
    return module.eval()


@pytest.mark.parametrize("size", [(6, 6), (12, 12), (5, 9), (3, 3)])
def test_pyramid_pooling_equals_a_plain_restatement(size):
    torch.manual_seed(0)
    pool, x = stirred(PyramidPooling(8, 4)), torch.randn(2, 8, *size)
    parts = [x]
    for side, branch in zip((1, 2, 3, 6), pool.parts, strict=True):
        bins = torch.empty(2, 8, side, side)
        for row in range(side):
            for column in range(side):
                down, right = ((i * n // side, -(-(i + 1) * n // side)) for i, n in zip((row, column), size))
                bins[:, :, row, column] = x[:, :, slice(*down), slice(*right)].mean((2, 3))
        parts.append(F.interpolate(restated(branch[1], bins), size, mode="bilinear"))
    torch.testing.assert_close(pool(x), restated(pool.fuse, torch.cat(parts, 1)), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_upernets_head_equals_a_plain_restatement():
    torch.manual_seed(0)
    head = stirred(UPerHead(8, 5, 4))
    one, two, three, four = levels = [torch.randn(2, 8, side, side + 2) for side in (32, 16, 8, 4)]
    p4 = head.pool(four)
    p3 = restated(head.lateral[2], three) + F.interpolate(p4, three.shape[2:], mode="bilinear")
    p2 = restated(head.lateral[1], two) + F.interpolate(p3, two.shape[2:], mode="bilinear")
    p1 = restated(head.lateral[0], one) + F.interpolate(p2, one.shape[2:], mode="bilinear")
    smooth = [restated(conv, p) for conv, p in zip(head.smooth, (p1, p2, p3), strict=True)]
    large = [F.interpolate(p, one.shape[2:], mode="bilinear") for p in (*smooth, p4)]
    expected = head.scores[1](restated(head.fuse, torch.cat(large, 1)))
    torch.testing.assert_close(head(levels), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("scale", "side"), [(4.0, 24), (2.0, 12), (1.0, 6), (0.5, 3), (0.25, 1)])
def test_levels_are_rescaled(scale, side):
    level = upernet.rescaled(8, scale)
    assert level(torch.randn(2, 8, 6, 6)).shape == (2, 8, side, side)


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (40, 72), (128, 96)])
def test_upernet_on_images_of_any_multiple(size):
    torch.manual_seed(0)
    model = UPerNet(small_vit(), 7, 16, 8)
    images = torch.randn(2, 3, *size)
    main, auxiliary = model(images)
    assert main.shape == (2, 7, size[0] // 2, size[1] // 2) and auxiliary.shape == (2, 7, size[0] // 8, size[1] // 8)
    (alone,) = model.eval()(images)
    assert alone.shape == main.shape


def test_gradients_reach_all_that_is_trained():
    torch.manual_seed(0)
    model = UPerNet(small_vit(drop_path=0.1), 7, 16, 8)
    main, auxiliary = model(torch.randn(4, 3, 32, 32), torch.Generator().manual_seed(0))
    labels = torch.randint(0, 7, (4, 32, 32))
    (pixel_loss(main, labels) + 0.4 * pixel_loss(auxiliary, labels)).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not missing
    assert not model.vit.norm.weight.requires_grad  # the blocks' outputs are taken without it


@torch.no_grad()
def test_levels_are_the_outputs_of_the_blocks():
    torch.manual_seed(0)
    encoder = small_vit()
    model = UPerNet(encoder, 3, 8, 8, scales=(1.0, 1.0, 1.0, 1.0)).eval()
    seen, images = [], torch.randn(2, 3, 32, 48)
    model.head.register_forward_pre_hook(lambda _, args: seen.extend(args[0]))
    model(images)
    maps = Subject("x", encoder_of(encoder)).maps(images, blocks=(1, 2, 3, 5)).permute(0, 3, 1, 2)
    torch.testing.assert_close(torch.cat(seen, 1), maps)


def test_heights():
    model = UPerNet(small_vit(), 3, 8, 8)
    heights = {name: model.height(name) for name, _ in model.named_parameters()}
    assert heights["vit.patch_embed.proj.weight"] == heights["vit.cls_token"] == heights["vit.pos_embed"] == 0
    assert heights["vit.blocks.0.attn.qkv.weight"] == 1 and heights["vit.blocks.5.mlp.fc1.bias"] == 6
    assert heights["head.fuse.0.weight"] == heights["levels.1.weight"] == heights["auxiliary.2.bias"] == 7
