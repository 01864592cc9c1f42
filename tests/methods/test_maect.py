"""Contrastive tuning: which parameters learn how fast, what the averages do, and the loss through the averaged projector."""

import pytest
import torch
import torch.nn.functional as F

from engine.core.draws import Draws
from engine.methods.maect import Maect, Settings
from engine.methods.nnclr import Nnclr
from engine.methods.nnclr import Settings as NnclrSettings
from engine.model import vit
from engine.recipes import recipe
from tests.updates import finish

SMALL = {
    "epochs": 1,
    "batch_size": 8,
    "projector_hidden": 32,
    "predictor_hidden": 48,
    "embedding": 16,
    "queue_size": 32,
}
SIZES = {
    # depth, frozen blocks, batch, temperature plain/aug, top-k plain/aug, EMA, epochs plain/aug, encoder peak lr
    "vit_base_patch16_224": (12, 6, 1024, (0.15, 0.15), (20, 10), 0.99, (20, 80), 8e-4, "avg"),
    "vit_large_patch16_224": (24, 12, 1024, (0.2, 0.15), (20, 10), 0.99, (20, 40), 8e-4, "token"),
    "vit_huge_patch16_224": (32, 16, 512, (0.3, 0.35), (20, 20), 0.995, (30, 40), 4e-4, "token"),
    "vit_huge_patch14_224": (32, 16, 512, (0.3, 0.35), (20, 20), 0.995, (30, 40), 4e-4, "token"),
}


def make(depth: int = 4, **settings: object) -> Maect:
    torch.manual_seed(0)
    return Maect(vit.create("vit_micro_patch8_32", depth=depth), Settings(**(SMALL | settings)))


def one_step(method: Maect, ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    drawn = method.draw(Draws(0, batch=8, rows=slice(None), device=torch.device("cpu")))
    return method(tuple(torch.randn(2, 8, 3, 32, 32)), torch.arange(8) if ids is None else ids, drawn)


@pytest.mark.parametrize("variant", ["plain", "aug"])
@pytest.mark.parametrize("name", SIZES)
def test_layer_rates_and_frozen_sets_equal_the_published_ones(name: str, variant: str):
    depth, frozen, batch, temperature, top_k, ema, epochs, peak, pool = SIZES[name]
    aug = variant == "aug"
    chosen = recipe("maect", name, variant, embedded=False)
    assert [stage for stage, _ in chosen.stages] == ["mae", "nnclr", "maect"]
    assert chosen.encoder["global_pool"] == pool
    settings = chosen.stages[2][1]
    assert (settings.epochs, settings.batch_size) == (epochs[aug], batch)
    assert (settings.temperature, settings.top_k, settings.projector_ema) == (temperature[aug], top_k[aug], ema)
    assert (settings.warmup, settings.weight_ema, settings.layer_decay) == (0.2, 0.9999, 0.65)
    assert settings.augmentation == ("byol" if aug else "minimal")
    with torch.device("meta"):
        # Names and depth decide; a narrow twin keeps a ViT-H out of memory.
        method = Maect(vit.create("vit_micro_patch8_32", depth=depth), settings)
    groups = {n: group for group in method.groups(batch) for n in group.parameters}
    for index in range(depth):
        inside = [n for n in groups if n.startswith(f"encoder.blocks.{index}.")]
        assert bool(inside) == (index >= frozen)
        for n in inside:
            assert groups[n].peak_lr == pytest.approx(peak * 0.65 ** (depth - index))
            assert groups[n].weight_decay == (0.05 if n.endswith("weight") and "norm" not in n else 0)
    assert groups["encoder.norm.weight"].peak_lr == pytest.approx(peak)
    assert not any(n.startswith(("encoder.patch_embed", "encoder.cls_token", "encoder.pos_embed")) for n in groups)
    head = (5e-4 if aug else 1e-4) * 2 * batch / 256
    assert groups["projector.0.weight"].peak_lr == groups["predictor.0.weight"].peak_lr == pytest.approx(head)
    assert (groups["projector.0.weight"].weight_decay, groups["projector.1.weight"].weight_decay) == (1e-5, 0)
    assert not any(n.startswith("projector_average") for n in groups)


def test_gradients_reach_the_upper_half_only():
    method = make()
    one_step(method)["loss"].backward()
    reached = {name for name, p in method.named_parameters() if p.grad is not None}
    assert reached == {name for name, p in method.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in reached if name.startswith("encoder.blocks")} == {"2", "3"}
    assert not any(name.startswith("projector_average") for name in reached)


def test_loss_looks_up_with_the_averaged_projector():
    method = make(top_k=1)
    with torch.no_grad():
        for p in method.projector_average.parameters():
            p.add_(0.1 * torch.randn_like(p))
    views, ids = torch.randn(2, 8, 3, 32, 32), torch.arange(8)
    zero = {"choice0": torch.zeros(8, dtype=torch.int64), "choice1": torch.zeros(8, dtype=torch.int64)}
    loss = method(tuple(views), ids, zero)["loss"]
    pooled = [method.encoder.pool(method.encoder(view)) for view in views]
    queries = [F.normalize(method.projector_average(view), dim=1) for view in pooled]
    found = [method.queue.keys[(query @ method.queue.keys.T).argmax(1)] for query in queries]
    predicted = [F.normalize(method.predictor(method.projector(view)), dim=1) for view in pooled]
    targets, t = torch.arange(8), method.settings.temperature
    expected = (
        F.cross_entropy(found[1] @ predicted[0].T / t, targets)
        + F.cross_entropy(found[0] @ predicted[1].T / t, targets)
    ) / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(method.queue.pending[0][0], queries[0])


def test_projector_average_follows_with_its_momentum_and_copies_statistics():
    method = make(projector_ema=0.9)
    before = [p.clone() for p in method.projector_average.parameters()]
    one_step(method)
    with torch.no_grad():
        for p in method.projector.parameters():
            p.add_(1.0)
    finish(method)
    for old, new, online in zip(before, method.projector_average.parameters(), method.projector.parameters()):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * online)
    for average, online in zip(method.projector_average.buffers(), method.projector.buffers()):
        assert torch.equal(average, online)


def test_stage_two_hands_over_head_and_queue():
    torch.manual_seed(1)
    encoder = vit.create("vit_micro_patch8_32", depth=4)
    earlier = Nnclr(encoder, NnclrSettings(**SMALL))
    earlier.queue.ids[:5] = 7
    earlier.queue.pointer.fill_(5)
    later = Maect(encoder, Settings(**SMALL))
    later.inherit(earlier)
    for part in ("projector", "predictor", "queue"):
        for name, value in getattr(earlier, part).state_dict().items():
            assert torch.equal(getattr(later, part).state_dict()[name], value), name
    for name, value in earlier.projector.state_dict().items():
        assert torch.equal(later.projector_average.state_dict()[name], value), name
    assert later.encoder is earlier.encoder


def test_neighbour_is_drawn_uniformly_from_the_top_k():
    method = make(top_k=4)
    chosen = torch.cat(
        [method.draw(Draws(0, s, batch=8, rows=slice(None), device=torch.device("cpu")))["choice0"] for s in range(500)]
    )
    assert (
        chosen.bincount(minlength=4) / len(chosen) - 0.25
    ).abs().max() < 0.035  # 4,000 draws: five standard deviations


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_frozen_blocks_keep_nothing_for_autograd_and_take_a_precision_of_their_own(keep: float):
    plain, low = make(patch_keep=keep), make(patch_keep=keep, frozen_precision="bf16")
    images = tuple(torch.randn(2, 8, 3, 32, 32))
    drawn = plain.draw(Draws(0, batch=8, rows=slice(None), device=torch.device("cpu")))
    exact, rounded = (method.frozen_tokens(images, drawn) for method in (plain, low))
    assert exact.layout.max_seqlen == 1 + 16 * keep
    assert not exact.tokens_TC.requires_grad and not rounded.tokens_TC.requires_grad
    assert rounded.tokens_TC.dtype == exact.tokens_TC.dtype == torch.float32
    error = (rounded.tokens_TC - exact.tokens_TC).norm() / exact.tokens_TC.norm()
    assert 1e-4 < error < 2e-2, "bf16 has eight bits"
    low(images, torch.arange(8), drawn)["loss"].backward()
    assert low.encoder.blocks[3].attn.qkv.weight.grad.abs().sum() > 0
    assert low.encoder.blocks[1].attn.qkv.weight.grad is None
