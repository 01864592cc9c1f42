"""MIM-Refiner against plain restatements: the alignment loss of every head, what heads read, what learns how fast, queues."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.methods.mim_heads import LARGE, MimHeads
from engine.methods.mim_heads import Settings as HeadSettings
from engine.methods.mim_refiner import MimRefiner, Settings
from engine.model import vit
from engine.model.twins import read
from engine.recipes import recipe
from tests.methods.test_nnclr import plain_head

SMALL = {
    "epochs": 1,
    "batch_size": 8,
    "projector_hidden": 32,
    "predictor_hidden": 48,
    "embedding": 16,
    "queue_size": 32,
    "local_crops": 2,
    "local_size": 16,
    "head_blocks": (2, 3, 4),
    "top_k": 3,
}
SIZES = {
    # blocks with heads, batch, temperature, epochs, side of small crops, frozen blocks, depth
    "vit_large_patch16_224": (range(17, 25), 1024, 0.2, 30, 96, 0, 24),
    "vit_huge_patch14_224": (range(21, 33), 512, 0.3, 30, 98, 0, 32),
    "vit_2b_patch14_224": (range(17, 25), 512, 0.35, 20, 98, 6, 24),
}


def make(kind: type[MimHeads] = MimRefiner, pool: str = "token", **settings: object) -> MimHeads:
    torch.manual_seed(0)
    encoder = vit.create("vit_micro_patch8_32", depth=4, global_pool=pool)
    return kind(encoder, kind.Settings(**(SMALL | settings)))


def crops(method: MimHeads) -> tuple[Tensor, ...]:
    return tuple(torch.randn(8, 3, *view.size) for view in method.views())


def draws(method: MimHeads) -> dict[str, Tensor]:
    return method.draw(Draws(0, batch=8, rows=slice(None), device=torch.device("cpu")))


def plain_features(method: MimHeads, images: tuple[Tensor, ...], block: int) -> Tensor:
    """What a block makes of every view, view after view: raw below the last block, normed after it."""
    encoder, read = method.encoder, {}
    hook = encoder.blocks[block - 1].register_forward_hook(lambda module, given, out: read.update(tokens=out))
    pooled = []
    for view in images:
        final = encoder(view)
        tokens = final if block == len(encoder.blocks) else read["tokens"].unflatten(0, (len(view), -1))
        pooled.append(tokens[:, 0] if encoder.global_pool == "token" else tokens[:, 1:].mean(1))
    hook.remove()
    return torch.cat(pooled)


def plain_loss(method: MimHeads, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Tensor:
    """Restated pair by pair: the neighbour meets the own image's prediction, the view itself the others'."""
    views, batch, temperature = len(images), len(ids), method.settings.temperature
    intended = method.settings.local_pairs == "intended"
    total = torch.zeros(())
    for block in method.blocks:
        head = method.heads[str(block)]
        projected = plain_head(head.projector, plain_features(method, images, block))
        predicted = F.normalize(plain_head(head.predictor, projected), dim=1).unflatten(0, (views, batch))
        own = F.normalize(projected.detach(), dim=1).unflatten(0, (views, batch))
        terms = []
        for i in range(LARGE):
            similarity = own[i] @ head.queue.keys.T
            similarity[ids[:, None] == head.queue.ids[None]] = -1
            nearest = similarity.topk(method.settings.top_k, dim=1).indices
            neighbour = head.queue.keys[nearest[torch.arange(batch), drawn[f"choice{block}"][:, i]]]
            # the code counts small views from the first one of all (src/losses/ssl/nnclr_loss.py)
            for j in (1 - i, *range(*(LARGE, views) if intended else (0, views - LARGE))):
                logits = torch.where(torch.eye(batch) > 0, neighbour @ predicted[j].T, own[i] @ predicted[j].T)
                terms.append(F.cross_entropy(logits / temperature, torch.arange(batch)))
        total = total + torch.stack(terms).mean()
    return total


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize(
    ("kind", "pairs"), [(MimHeads, "released"), (MimRefiner, "released"), (MimRefiner, "intended")]
)
def test_loss_and_gradients_equal_a_plain_restatement(kind: type[MimHeads], pairs: str, pool: str):
    method = make(kind, pool, local_pairs=pairs, local_crops=3)
    images, ids, drawn = crops(method), torch.arange(8), draws(method)
    # Some keys come from the batch's own images and are the nearest by construction.
    with torch.no_grad():
        for block in method.blocks:
            head = method.heads[str(block)]
            own = F.normalize(plain_head(head.projector, plain_features(method, images, block)), dim=1)
            head.queue.keys[:8], head.queue.ids[:8] = own[:8], ids
    expected = plain_loss(method, images, ids, drawn)
    expected.backward()
    theirs = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    loss = method(images, ids, drawn)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    ours = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() == {name for name, p in method.named_parameters() if p.requires_grad}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=2e-5, rtol=1e-3, msg=name)
    assert not (method.neighbours == ids).any()


def test_large_views_alone_make_two_terms_a_head():
    method = make(local_crops=0)
    images, ids, drawn = crops(method), torch.arange(8), draws(method)
    assert len(images) == LARGE
    expected = plain_loss(method, images, ids, drawn)
    assert method(images, ids, drawn)["loss"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_loss_adds_up_what_every_head_reports():
    method = make()
    report = method(crops(method), torch.arange(8), draws(method))
    assert [name for name in report if name.startswith("loss_")] == ["loss_block2", "loss_block3", "loss_block4"]
    parts = [report[f"loss_block{block}"].item() for block in (2, 3, 4)]
    assert report["loss"].item() == pytest.approx(sum(parts))


def test_every_head_draws_its_own_neighbours():
    drawn = draws(make(top_k=20))
    assert drawn.keys() == {"choice2", "choice3", "choice4"}
    assert all(choice.shape == (8, LARGE) for choice in drawn.values())
    assert not torch.equal(drawn["choice2"], drawn["choice3"])
    assert not torch.equal(drawn["choice2"][:, 0], drawn["choice2"][:, 1])


def test_queues_take_the_first_view_after_the_lookup():
    method = make()
    images, ids = crops(method), torch.arange(8) + 40
    before = {block: method.heads[str(block)].queue.keys.clone() for block in method.blocks}
    method(images, ids, draws(method))
    for block in method.blocks:
        assert torch.equal(method.heads[str(block)].queue.keys, before[block])
    method.after_step(torch.tensor(True))
    for block in method.blocks:
        head = method.heads[str(block)]
        own = F.normalize(plain_head(head.projector, plain_features(method, images, block)), dim=1)
        torch.testing.assert_close(head.queue.keys[:8], own[:8], atol=1e-5, rtol=1e-4)
        assert torch.equal(head.queue.keys[8:], before[block][8:])
        assert head.queue.ids.tolist() == [*ids.tolist(), *[-1] * 24]
        assert head.queue.pointer == 8


def test_the_first_stage_leaves_the_encoder_alone():
    method = make(MimHeads)
    assert not any(p.requires_grad for p in method.encoder.parameters())
    groups = list(method.groups(512))
    assert {n.partition(".")[0] for group in groups for n in group.parameters} == {"heads"}
    assert [group.peak_lr for group in groups] == [pytest.approx(4e-4)] * len(groups)  # views do not count


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_frozen_blocks_get_no_gradient(frozen: int):
    method = make(frozen_blocks=frozen)
    method(crops(method), torch.arange(8), draws(method))["loss"].backward()
    reached = {name for name, p in method.named_parameters() if p.grad is not None}
    assert {int(n.split(".")[2]) for n in reached if n.startswith("encoder.blocks.")} == set(range(frozen, 4))
    assert ("encoder.patch_embed.proj.weight" in reached) == ("encoder.cls_token" in reached) == (frozen == 0)
    assert "encoder.pos_embed" not in reached
    assert "encoder.norm.weight" in reached


def test_stage_two_hands_over_every_head_with_its_queue():
    earlier = make(MimHeads)
    for block in earlier.blocks:
        earlier.heads[str(block)].queue.ids[:5] = block
    later = MimRefiner(earlier.encoder, Settings(**SMALL))
    later.inherit(earlier)
    for name, value in earlier.heads.state_dict().items():
        assert torch.equal(later.heads.state_dict()[name], value), name
    assert later.encoder.blocks[0].norm1.weight.requires_grad
    other = MimRefiner(earlier.encoder, Settings(**(SMALL | {"head_blocks": (3, 4)})))
    with pytest.raises(BadInput, match="mim_refiner takes its heads from mim_heads"):
        other.inherit(earlier)


@pytest.mark.parametrize("model", SIZES)
def test_rates_and_settings_equal_the_published_ones(model: str):
    blocks, batch, temperature, epochs, side, frozen, depth = SIZES[model]
    chosen = recipe("mim_refiner", model, "plain", embedded=False)
    assert [stage for stage, _ in chosen.stages] == ["mae", "mim_heads", "mim_refiner"]
    assert (chosen.encoder["global_pool"], chosen.encoder["positions"]) == ("token", "sincos")
    assert (chosen.stages[0][1].epochs, chosen.stages[0][1].batch_size) == (1600, 4096)
    heads, refinement = chosen.stages[1][1], chosen.stages[2][1]
    for settings in (heads, refinement):
        assert (settings.head_blocks, settings.batch_size, settings.temperature) == (tuple(blocks), batch, temperature)
        assert (settings.local_crops, settings.local_size, settings.local_scale) == (10, side, (0.05, 0.25))
        assert (settings.local_pairs, settings.warmup_form) == ("released", "between")
        assert (settings.crop_scale, settings.augmentation) == ((0.25, 1.0), "byol")
        assert (settings.projector_hidden, settings.predictor_hidden, settings.embedding) == (2048, 4096, 256)
        assert (settings.queue_size, settings.end_lr, settings.betas) == (65536, 1e-6, (0.9, 0.95))
        assert settings.warmup * settings.epochs == pytest.approx(4)
    assert (heads.epochs, heads.base_lr, heads.weight_decay, heads.top_k) == (20, 2e-4, 1e-5, 1)
    assert (refinement.epochs, refinement.top_k, refinement.weight_ema) == (epochs, 20, 0.9999)
    with torch.device("meta"):
        # Names and depth decide; a narrow twin keeps a large encoder out of memory.
        twin = vit.create("vit_micro_patch8_32", depth=depth)
        method = MimRefiner(twin, replace(refinement, projector_hidden=32, predictor_hidden=32, queue_size=batch))
    groups = {name: group for group in method.groups(batch) for name in group.parameters}
    peak = 4e-4 * batch / 256
    for index in range(depth):
        inside = [n for n in groups if n.startswith(f"encoder.blocks.{index}.")]
        assert bool(inside) == (index >= frozen)
        for n in inside:
            assert groups[n].peak_lr == pytest.approx(peak * 0.65 ** (depth - index))
            assert groups[n].weight_decay == (0.05 if n.endswith("weight") and "norm" not in n else 0)
    assert ("encoder.patch_embed.proj.weight" in groups) == (frozen == 0)
    if frozen == 0:
        stem = groups["encoder.patch_embed.proj.weight"], groups["encoder.cls_token"]
        assert [group.peak_lr for group in stem] == [pytest.approx(peak * 0.65 ** (depth + 1))] * 2
        assert [group.weight_decay for group in stem] == [0.05, 0]
    assert groups["encoder.norm.weight"].peak_lr == pytest.approx(peak)
    first = f"heads.{blocks[0]}"
    assert groups[f"{first}.projector.0.weight"].peak_lr == pytest.approx(peak)
    assert groups[f"{first}.projector.0.weight"].weight_decay == 1e-5
    assert groups[f"{first}.predictor.4.weight"].weight_decay == 0
    assert len(groups) == len({name for name, p in method.named_parameters() if p.requires_grad})


def test_the_largest_published_encoder_has_its_shape():
    architecture, _ = read("vit_2b_patch14_224", {"global_pool": "token", "fc_norm": False})
    with torch.device("meta"):
        encoder = vit.VisionTransformer(architecture)
    assert (encoder.embed_dim, encoder.depth, encoder.num_heads, encoder.patch_size) == (2560, 24, 32, 14)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(1.9e9, rel=0.01)


def test_a_head_has_the_published_form():
    with torch.device("meta"):
        method = MimHeads(vit.create("vit_micro_patch8_32", depth=4), HeadSettings(head_blocks=(4,)))
    head = method.heads["4"]
    kinds = [type(layer).__name__ for layer in head.projector]
    assert kinds == ["Linear", "BatchNorm", "GELU", "Linear", "BatchNorm", "GELU", "Linear", "BatchNorm"]
    assert [type(layer).__name__ for layer in head.predictor] == ["Linear", "BatchNorm", "GELU", "Linear", "BatchNorm"]
    matrices = [tuple(p.shape) for p in [*head.projector.parameters(), *head.predictor.parameters()] if p.ndim == 2]
    assert matrices == [(2048, 128), (2048, 2048), (256, 2048), (4096, 256), (256, 4096)]
    assert not any(getattr(layer, "bias", None) is not None for layer in [*head.projector[::3], *head.predictor[::3]])


@pytest.mark.parametrize(
    ("depth", "named", "found"),
    [(24, (), range(17, 25)), (12, (), range(9, 13)), (6, (), (5, 6)), (1, (), (1,)), (4, (1, 4), (1, 4))],
)
def test_heads_sit_on_the_upper_third_unless_named(depth: int, named: tuple[int, ...], found: object):
    assert Settings(head_blocks=named).blocks(depth) == tuple(found)


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"head_blocks": (4, 2)}, "head-blocks"),
        ({"head_blocks": (0, 4)}, "head-blocks"),
        ({"local_crops": -1}, "local-crops"),
        ({"local_scale": (0.3, 0.2)}, "local-scale"),
        ({"local_pairs": "all"}, "local-pairs"),
        ({"layer_decay": 0.0}, "layer-decay"),
        ({"head_base_lr": 0.0}, "head-base-lr"),
        ({"frozen_blocks": -1}, "frozen-blocks"),
        ({"queue_size": 12}, "queue-size"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(changed: dict, flag: str):
    Settings(**SMALL).check("mim_refiner")
    with pytest.raises(BadInput, match=f"--mim_refiner.{flag} is"):
        Settings(**(SMALL | changed)).check("mim_refiner")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"head_blocks": (2, 3)}, "must end with the encoder's last block, 4"),
        ({"head_blocks": (2, 5)}, "must end with the encoder's last block, 4"),
        ({"local_size": 20}, "a multiple of the patch size 8"),
        ({"frozen_blocks": 5}, "at most the encoder's 4 blocks"),
    ],
)
def test_a_value_that_does_not_fit_the_encoder_is_refused(changed: dict, said: str):
    encoder = vit.create("vit_micro_patch8_32", depth=4)
    Settings(**SMALL).check_encoder("mim_refiner", encoder)
    with pytest.raises(BadInput, match=said):
        Settings(**(SMALL | changed)).check_encoder("mim_refiner", encoder)
