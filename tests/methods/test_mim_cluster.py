"""Masked images with clustering against plain restatements of MC-SSL: three losses and their gradients, each switched off, who
sees what is corrupted, both centres, a skipped update, the decoder's pixels."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from engine import methods
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.optim import Moment
from engine.methods.mim_cluster import MimCluster, Settings
from engine.methods.parts.collapse import CHOICES
from engine.model import vit
from engine.model.heads import DinoHead, PixelDecoder
from engine.recipes import recipe
from engine.training.config import parse
from engine.training.step import Update
from tests.methods.small import small
from tests.methods.test_dino import plain_cls
from tests.methods.test_ibot import plain_distribution, plain_spread, plain_tokens
from tests.saved import content
from tests.updates import finish

SMALL = small(Settings, epochs=4, augmentation="minimal", target_temperature_epochs=0, patch_prototypes=40)
TERMS = ("class_weight", "patch_weight", "pixel_weight")


def make(**settings: object) -> MimCluster:
    torch.manual_seed(0)
    method = MimCluster(vit.create("vit_micro_patch8_32", depth=2), Settings(**(SMALL | settings)))
    with torch.no_grad():  # the teacher has gone its own way
        for parameter in method.teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for name, centre in method.named_buffers():
            if name.endswith("centre"):
                centre.normal_(std=0.3)
    return method


def crops(method: MimCluster, seed: int = 0, batch: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, *view.size, generator=generator) for view in method.views())


def drawn(method: MimCluster, step: int = 0, batch: int = 4) -> dict[str, Tensor]:
    return method.draw(Draws(0, step, batch=batch, rows=slice(None), device=torch.device("cpu")))


def plain_corrupted(images: Tensor, masks: Tensor, alien: Tensor) -> Tensor:
    """Image by image: zeros, or what the other of the pair has there."""
    result = images.clone()
    for i, mask in enumerate(masks):
        other = images[i + 1 if i % 2 == 0 else i - 1] if alien[i] else torch.zeros_like(images[i])
        result[i][:, mask] = other[:, mask]
    return result


def plain_scores(head: DinoHead, layer: nn.Module, x: Tensor) -> Tensor:
    x = head.mlp[4](F.gelu(head.mlp[2](F.gelu(head.mlp[0](x)))))
    weight = layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)
    return (x / x.norm(dim=1, keepdim=True)) @ weight.T


def plain_pixels(decoder: PixelDecoder, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Two linear layers with GELU, and a transposed convolution."""
    x = F.gelu(decoder.mlp[2](F.gelu(decoder.mlp[0](tokens))))
    x = x.transpose(1, 2).unflatten(2, grid)
    weight = decoder.mlp[4].weight.view(8, 8, 3, -1).permute(3, 2, 0, 1)
    pixels = F.conv_transpose2d(x, weight, stride=8)
    return pixels + decoder.mlp[4].bias.view(8, 8, 3).permute(2, 0, 1).repeat(1, *grid)


def plain_losses(method: MimCluster, images: tuple[Tensor, ...], numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The three losses of MC-SSL; every patch, corrupted or not, has a target."""
    s, student_t = method.settings, method.settings.student_temperature
    masks, alien = numbers["corrupted"].transpose(0, 1), numbers["alien"].T
    nothing, blank = torch.zeros(4, 16, dtype=torch.bool), torch.zeros(128)
    with torch.no_grad():
        twin = method.teacher
        taught = [plain_tokens(twin.encoder, x, nothing, blank) for x in images[:2]]
        class_scores = torch.cat([plain_scores(twin.head, twin.head.last_layer, x[:, 0]) for x in taught])
        patch_scores = torch.cat([x[:, 1:] for x in taught]).flatten(0, 1)
        patch_scores = plain_scores(twin.head, twin.patch_last_layer, patch_scores)
        targets = plain_distribution(method, class_scores, method.collapse.centre).chunk(2)
        patch_targets = plain_distribution(method, patch_scores, method.patch_collapse.centre)
    corrupted = [plain_corrupted(x, m, a) for x, m, a in zip(images, masks, alien)]
    seen = [plain_tokens(method.encoder, x, nothing, blank) for x in corrupted]
    pooled = [x[:, 0] for x in seen] + [plain_cls(method.encoder, x) for x in images[2:]]
    classes = [plain_scores(method.head, method.head.last_layer, x) for x in pooled]
    terms = [
        -(q * (z / student_t).log_softmax(1)).sum(1).mean()
        for i, q in enumerate(targets)
        for j, z in enumerate(classes)
        if i != j
    ]
    patches = plain_scores(method.head, method.patch_last_layer, torch.cat([x[:, 1:] for x in seen]).flatten(0, 1))
    errors = [(plain_pixels(method.decoder, x[:, 1:], (4, 4)) - clean).square() for x, clean in zip(seen, images[:2])]
    pixel_terms = [error[:, mask].mean() for view, of_view in zip(errors, masks) for error, mask in zip(view, of_view)]
    spread = "me-max" in s.collapse
    return {
        "class": sum(terms) / len(terms),
        "patch": -(patch_targets * (patches / student_t).log_softmax(1)).sum(1).mean(),
        "pixel": sum(pixel_terms) / len(pixel_terms),
        "class_spread": plain_spread(method, torch.cat(classes)) if spread else torch.zeros(()),
        "patch_spread": plain_spread(method, patches) if spread else torch.zeros(()),
        "class_mean": class_scores.mean(0),
        "patch_mean": patch_scores.mean(0),
    }


@pytest.mark.parametrize("choice", CHOICES)
def test_losses_and_gradients_equal_mc_ssl_s(choice: str):
    method = make(collapse=choice, class_weight=0.9, patch_weight=0.7, pixel_weight=0.4)
    images, numbers = crops(method), drawn(method)
    assert numbers["alien"].any() and not numbers["alien"].all()
    report = method(images, torch.arange(4), numbers)
    plain = plain_losses(method, images, numbers)
    for term in ("class", "patch", "pixel"):
        assert report[f"{term}_loss"].item() == pytest.approx(plain[term].item(), abs=2e-5)
    expected = 0.9 * (plain["class"] + plain["class_spread"]) + 0.7 * (plain["patch"] + plain["patch_spread"])
    expected = expected + 0.4 * plain["pixel"]
    assert report["loss"].item() == pytest.approx(expected.item(), abs=2e-5)
    assert (
        (plain["patch_spread"] > 0) == ("me-max" in choice) == (not torch.equal(plain["class_spread"], torch.zeros(())))
    )
    report["loss"].backward()
    ours = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    expected.backward()
    theirs = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() == {name for name, p in method.named_parameters() if p.requires_grad}
    assert not any(name.startswith("teacher") for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("on", [on for on in itertools.product((0.0, 1.0), repeat=3) if any(on)])
@pytest.mark.parametrize("choice", ["centring", "me-max+sinkhorn"])
def test_a_term_of_weight_zero_is_not_computed(on: tuple[float, ...], choice: str):
    whole, method = make(collapse=choice), make(collapse=choice, **dict(zip(TERMS, on)))
    method.load_state_dict({k: v for k, v in whole.state_dict().items() if k in method.state_dict()})
    images, numbers = crops(whole), drawn(whole)
    report = method(images[: len(method.views())], torch.arange(4), numbers)
    plain = plain_losses(whole, images, numbers)
    expected = on[0] * (plain["class"] + plain["class_spread"]) + on[1] * (plain["patch"] + plain["patch_spread"])
    assert report["loss"].item() == pytest.approx((expected + on[2] * plain["pixel"]).item(), abs=2e-5)
    assert {f"{term}_loss" in report for term, weight in zip(("class", "patch", "pixel"), on) if weight} == {True}
    assert {f"{term}_loss" in report for term, weight in zip(("class", "patch", "pixel"), on) if not weight} <= {False}
    assert method.prototype_count == (48 if on[0] else 0)
    assert method.settings.splits == (choice == "centring" or not (on[0] or on[1]))
    assert len(method.views()) == (4 if on[0] else 2)
    report["loss"].backward()
    # what trains has a gradient: ranks wait for each of them
    assert all((p.grad is not None) == p.requires_grad for p in method.parameters())
    trained = {name.rpartition(".")[0] for name, p in method.named_parameters() if p.requires_grad}
    for layer, wanted in {
        "head.mlp.0": on[0] or on[1], "head.last_layer": on[0], "patch_last_layer": on[1], "decoder.mlp.4": on[2],
    }.items():  # fmt: skip
        assert (layer in trained) == bool(wanted)
    finish(method)


@pytest.mark.parametrize("choice", CHOICES)
def test_any_choice_against_collapse_trains(choice: str):
    method = make(collapse=choice, fill="noise", freeze_last_layer=0)
    update = Update(method, 8)
    reports = [update(step, crops(method), torch.arange(4), drawn(method, step)) for step in range(1, 4)]
    assert all(math.isfinite(value) for report in reports for value in report.values())
    assert {"class_loss", "patch_loss", "pixel_loss", "prototype_usage", "patch_prototype_usage"} <= reports[0].keys()
    assert method.settings.splits == (choice in ("centring", "none"))


def test_only_the_student_sees_corrupted_pixels():
    method = make(alien_probability=0.0, class_weight=0.0, patch_weight=0.0)
    images, numbers = crops(method), drawn(method)
    seen = []
    method.decoder.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    masks = numbers["corrupted"].transpose(0, 1)[:, :, None]
    hidden, shown = (tuple(x + 9 * m for x, m in zip(images, which)) for which in (masks, ~masks))
    losses = [method(pictures, torch.arange(4), numbers)["loss"].item() for pictures in (images, hidden, shown)]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert losses[1] > 10 * losses[0]  # what was hidden is what is to be found
    method = make()
    taught = []
    method.teach = lambda large: taught.append(large) or MimCluster.teach(method, large)
    images = crops(method)
    method(images, torch.arange(4), numbers)
    assert all(torch.equal(a.images, b) for a, b in zip(taught[0], images[:2], strict=True))


def test_both_centres_move_after_the_update():
    method = make()
    images, numbers = crops(method), drawn(method)
    plain = plain_losses(method, images, numbers)
    before = method.collapse.centre.clone(), method.patch_collapse.centre.clone()
    for applied, share in ((False, 0.0), (True, 0.1)):
        method(images, torch.arange(4), numbers)
        assert torch.equal(method.patch_collapse.centre, before[1])
        finish(method, applied)
        torch.testing.assert_close(method.collapse.centre, (1 - share) * before[0] + share * plain["class_mean"])
        torch.testing.assert_close(method.patch_collapse.centre, (1 - share) * before[1] + share * plain["patch_mean"])


def test_even_micro_batches_give_the_whole_batch_s_update():
    states, losses = [], []
    for accumulate in (1, 2):
        method = make(freeze_last_layer=0, fill="noise")
        update = Update(method, 8, accumulate=accumulate)
        losses.append([update(step, crops(method), torch.arange(4), drawn(method))["loss"] for step in (1, 2)])
        states.append((method.collapse.centre, method.patch_collapse.centre))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("poisoned", [0, 3])
def test_a_skipped_update_changes_nothing(poisoned: int):
    method = make(freeze_last_layer=0)
    update = Update(method, 8)
    update(1, crops(method), torch.arange(4), drawn(method))
    before = content(method, update)
    images = crops(method, seed=1)
    images[poisoned][2, 1] = math.nan
    update(2, images, torch.arange(4), drawn(method, 2))
    after = content(method, update)
    assert update.skipped == 1 and before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    update(2, crops(method, seed=1), torch.arange(4), drawn(method, 2))
    last = content(method, update)
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, last[name])}
    assert {"model/encoder", "model/head", "model/patch_last_layer", "model/decoder", "model/teacher"} <= moved
    assert {"model/collapse", "model/patch_collapse"} <= moved


def test_the_teacher_follows_encoder_head_and_both_last_layers():
    method = make(teacher_momentum=0.9)
    before = {name: p.clone() for name, p in method.teacher.named_parameters()}
    assert {name.split(".")[0] for name in before} == {"encoder", "head", "patch_last_layer"}
    method.begin(Moment(0, 10, 5))
    finish(method)
    online = dict(method.named_parameters())
    for name, p in method.teacher.named_parameters():
        moved = 0.9 * before[name] + 0.1 * online[name] if online[name].requires_grad else before[name]
        torch.testing.assert_close(p, moved, msg=name)


def test_only_the_prototypes_of_images_are_frozen_for_an_epoch():
    frozen = {name: group.frozen_epochs for group in make().groups(64) for name in group.parameters}
    assert {name for name, epochs in frozen.items() if epochs} == {"head.last_layer.weight_v"}
    assert {"patch_last_layer.weight_v", "decoder.mlp.0.weight"} <= frozen.keys()
    assert not any(name.startswith("teacher") for name in frozen)


def test_decoded_patches_lie_where_they_are_cut_from():
    images = torch.randn(2, 3, 16, 24)
    indices = torch.arange(6).expand(2, -1)
    decoder = PixelDecoder(12, 8, layers=3)
    assert torch.equal(decoder.images(kernels.gather_patches(images, indices, 8), (2, 3)), images)
    assert decoder(torch.randn(2, 6, 12)).shape == (2, 6, 8 * 8 * 3)
    assert [type(layer) for layer in decoder.mlp] == [nn.Linear, nn.GELU] * 3 + [nn.Linear]


def test_of_larger_patches_what_is_decoded_is_that_of_the_model_s_own_resized():
    decoder, tokens_BNC = PixelDecoder(12, 8, layers=2), torch.randn(2, 6, 12)
    own_RCPP = decoder(tokens_BNC).view(12, 8, 8, 3).permute(0, 3, 1, 2)
    expected = F.interpolate(own_RCPP, size=(12, 12), mode="bilinear").permute(0, 2, 3, 1).reshape(2, 6, -1)
    torch.testing.assert_close(decoder(tokens_BNC, 12), expected, atol=1e-5, rtol=1e-5)
    assert decoder.images(expected, (2, 3), 12).shape == (2, 3, 24, 36)
    assert decoder.flops(12) - decoder.flops() == 2 * 12 * 3 * (12**2 - 8**2)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--mim_cluster.fill", "mud"], "--mim_cluster.fill is mud; it must be one of zeros, noise"),
        (["--mim_cluster.drop", "0.6", "0.5"], "--mim_cluster.drop"),
        (["--mim_cluster.alien", "1"], "--mim_cluster.alien is 1.0; it must be a share above 0, at most 0.9"),
        (["--mim_cluster.patch-prototypes", "1"], "--mim_cluster.patch-prototypes"),
        (["--mim_cluster.decoder-layers", "-1"], "--mim_cluster.decoder-layers"),
        (["--mim_cluster.pixel-weight", "-1"], "--mim_cluster.pixel-weight"),
        ([part for term in TERMS for part in (f"--mim_cluster.{term.replace('_', '-')}", "0")], "above 0 for one of"),
        (["--mim_cluster.local-crops", "-1"], "--mim_cluster.local-crops"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: list[str], named: str):
    with pytest.raises(BadInput) as refusal:
        parse(["--method", "mim_cluster", *flags])
    assert named in str(refusal.value)


def test_blocks_and_small_crops_must_fit_the_encoder():
    encoder = vit.create("vit_micro_patch8_32", depth=1)
    for wrong, named in (({"block_align": 5}, "block-align is 5"), ({"local_size": 20}, "local-size is 20")):
        with pytest.raises(BadInput, match=named):
            Settings(**(SMALL | wrong)).check_encoder("mim_cluster", encoder)


@pytest.mark.parametrize("model", ["vit_small_patch16_224", "vit_large_patch16_224"])
def test_published_recipe_is_mc_ssl_s_and_says_after(model: str):
    chosen = recipe("mim_cluster", model, "auto", embedded=False)
    ((name, s),) = chosen.stages
    s.check("mim_cluster")
    assert methods.get(name) is MimCluster
    assert chosen.source.startswith("after MC-SSL's") and "not found" in chosen.source
    of_dino = {"initialisation": "dino", "interpolation": "offset"}
    assert chosen.encoder == of_dino | {"global_pool": "token", "drop_path": 0.1}
    assert (s.epochs, s.batch_size, s.warmup * s.epochs, s.base_lr, s.end_lr) == (800, 512, 10, 5e-4, 1e-6)
    assert (s.crop_scale, s.local_crops, s.local_size, s.local_scale) == ((0.25, 1.0), 10, 96, (0.05, 0.25))
    assert (s.prototypes, s.patch_prototypes, s.head_hidden, s.bottleneck, s.free_norm) == (
        8192,
        8192,
        2048,
        256,
        False,
    )
    assert (s.target_temperature_start, s.target_temperature, s.target_temperature_epochs) == (0.04, 0.07, 30)
    assert (s.clip_norm, s.clip_over, s.weight_decay, s.weight_decay_end) == (3.0, "tensor", 0.04, 0.4)
    assert (s.drop, s.fill, s.alien, s.alien_probability) == ((0.5, 0.5), "zeros", 0.3, 0.5)
    assert (s.largest_block, s.block_align, s.decoder_layers) == (0.3, 1, 2)
    assert (s.class_weight, s.patch_weight, s.pixel_weight, s.collapse) == (1, 1, 1, "centring")
