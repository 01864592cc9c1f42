"""NNCLR head against plain restatements: the loss, the lookup without the own image, the queue's order."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.data.batch import Batch
from engine.methods.nnclr import Nnclr, Settings
from engine.model import vit
from engine.model.heads import BatchNorm, projector
from engine.model.memory import Queue
from engine.model.tokens import View
from engine.recipes import recipe

SETTINGS = Settings(
    epochs=1, batch_size=8, projector_hidden=32, predictor_hidden=48, embedding=16, queue_size=32, temperature=0.15
)


def make(settings: Settings = SETTINGS, **encoder: object) -> Nnclr:
    torch.manual_seed(0)
    return Nnclr(vit.create("vit_micro_patch8_32", depth=2, **encoder), settings)


def draws(method: Nnclr, step: int = 0, batch: int = 8) -> dict[str, Tensor]:
    return method.draw(Draws(0, step, batch=batch, rows=slice(None), device=torch.device("cpu")))


def plain_head(layers: nn.Sequential, x: Tensor) -> Tensor:
    """The head with torch's own batch norm in train mode."""
    for layer in layers:
        if isinstance(layer, BatchNorm):
            x = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=1e-5)
        else:
            x = layer(x)
    return x


def plain_loss(method: Nnclr, views: list[Tensor], ids: Tensor, choices: list[Tensor], top_k: int) -> Tensor:
    """Restated from losses/nnclr: pred0 meets the neighbour of view 1 and the other way round, mean of the two."""
    pooled = [method.encoder.pool(method.encoder(view)).detach() for view in views]
    projected = [plain_head(method.projector, view) for view in pooled]
    predicted = [F.normalize(plain_head(method.predictor, view), dim=1) for view in projected]
    neighbours = []
    for view, choice in zip(projected, choices):
        similarity = F.normalize(view, dim=1) @ method.queue.keys.T
        similarity[ids[:, None] == method.queue.ids[None]] = -1
        nearest = similarity.topk(top_k, dim=1).indices
        neighbours.append(method.queue.keys[nearest[torch.arange(len(ids)), choice]])
    losses = [
        F.cross_entropy(neighbour @ prediction.T / method.settings.temperature, torch.arange(len(ids)))
        for neighbour, prediction in ((neighbours[1], predicted[0]), (neighbours[0], predicted[1]))
    ]
    return sum(losses) / 2


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("top_k", [1, 4])
def test_loss_and_gradients_equal_a_plain_restatement(top_k: int, pool: str):
    method = make(Settings(**{**vars(SETTINGS), "top_k": top_k}), global_pool=pool)
    views, ids = torch.randn(2, 8, 3, 32, 32), torch.arange(8)
    # Some of the queue's keys come from the batch's own images and are the nearest by construction.
    with torch.no_grad():
        own = F.normalize(plain_head(method.projector, method.encoder.pool(method.encoder(views[0]))), dim=1)
    method.queue.keys[:8], method.queue.ids[:8] = own, torch.arange(8)
    drawn = draws(method)
    expected = plain_loss(method, list(views), ids, [drawn["choice0"], drawn["choice1"]], top_k)
    expected.backward()
    theirs = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    loss = method(tuple(views), ids, drawn)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    ours = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    assert all(name.startswith(("projector.", "predictor.")) for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-3, msg=name)
    assert not (method.neighbours == ids).any()


def test_queue_is_a_ring_of_view_zero_written_after_the_lookup():
    method = make()
    for step in range(6):
        views, ids = torch.randn(2, 8, 3, 32, 32), torch.arange(8) + 8 * step
        before = method.queue.keys.clone()
        method((views[0], views[1]), ids, draws(method, step))
        assert torch.equal(method.queue.keys, before)
        expected = F.normalize(plain_head(method.projector, method.encoder.pool(method.encoder(views[0]))), dim=1)
        method.after_step(torch.tensor(True))
        start = 8 * step % 32
        torch.testing.assert_close(method.queue.keys[start : start + 8], expected, atol=1e-6, rtol=1e-5)
        assert method.queue.ids[start : start + 8].tolist() == ids.tolist()
        others = [slot for slot in range(32) if not start <= slot < start + 8]
        assert torch.equal(method.queue.keys[others], before[others])
    assert method.queue.pointer.item() == 48 % 32


def test_queue_starts_as_unit_noise_of_no_image():
    queue = Queue(64, 16)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(64))
    assert (queue.ids == -1).all()
    assert queue.pointer == 0


def test_batch_norm_equals_torch():
    ours, theirs, x = BatchNorm(6), nn.BatchNorm1d(6), torch.randn(20, 6, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    for _ in range(3):
        a, b = ours(x), theirs(y)
    ours.commit(torch.tensor(True))
    weights = torch.randn(20, 6)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-4)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, msg=key)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(y), atol=1e-5, rtol=1e-5)


def test_head_has_the_published_shape():
    shapes = [tuple(p.shape) for p in projector(1024).parameters() if p.ndim == 2]
    assert shapes == [(2048, 1024), (2048, 2048), (256, 2048)]
    assert not any(isinstance(layer, nn.Linear) and layer.bias is not None for layer in projector(1024))
    (stage,) = recipe("nnclr", "vit_large_patch16_224", "plain", embedded=False).stages
    settings = stage[1]
    assert (settings.epochs, settings.batch_size, settings.base_lr, settings.weight_decay) == (20, 1024, 1e-4, 1e-5)
    assert (settings.temperature, settings.top_k, settings.queue_size, settings.warmup) == (0.15, 1, 65536, 0.2)
    groups = list(make(settings).groups(1024))
    assert [group.peak_lr for group in groups] == [pytest.approx(8e-4)] * len(groups)


def test_dropped_patches_are_not_seen_and_the_others_are_those_of_lowest_noise():
    method = make(Settings(**(vars(SETTINGS) | {"patch_keep": 0.5})), global_pool="avg")
    images, drawn = tuple(torch.randn(2, 8, 3, 32, 32)), draws(method)
    assert drawn["noise"].shape == (8, 2, 16)
    shown = drawn["noise"].argsort(-1)[..., :8]
    for view, pooled in enumerate(method.pooled(images, torch.arange(8), drawn)):
        (tokens,) = method.encoder.encode([View(images[view], shown[:, view])]).unpack()
        torch.testing.assert_close(pooled, tokens[:, 1:].mean(1), atol=1e-5, rtol=1e-4)


def test_stored_features_are_those_of_the_crops_and_are_used_again():
    method = make(Settings(**(vars(SETTINGS) | {"reuse": 2})))
    crops = torch.randn(2, 3, 8, 2, 3, 32, 32)  # turn, batch, image, view

    def each(views, turn):
        assert len(views) == 2
        for index, batch in enumerate(crops[turn]):
            yield Batch(torch.arange(8 * index, 8 * index + 8), tuple(batch.unbind(1)), None, index)

    with torch.no_grad():
        method.store(each, 20)
        expected = method.encoder.pool(method.encoder(crops.flatten(0, 3)))
    assert method.views() == () and method.stored.shape == (20, 2, 2, 128)
    expected = expected.view(2, 24, 2, 128)[:, :20].transpose(0, 1)
    torch.testing.assert_close(method.stored, expected, atol=1e-5, rtol=1e-4)
    ids, drawn = torch.tensor([3, 19, 7, 0, 1, 2, 4, 5]), draws(method)
    assert set(drawn["turn"].tolist()) == {0, 1}
    for view, pooled in enumerate(method.pooled((), ids, drawn)):
        assert torch.equal(pooled, method.stored[ids, drawn["turn"], view])
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method((), ids, drawn)["loss"].backward()
    assert method.projector[0].weight.grad.abs().sum() > 0
    assert not any("stored" in name for name in before)


@pytest.mark.parametrize(
    "wrong", [{"patch_keep": 0.0}, {"patch_keep": 1.5}, {"reuse": -1}, {"reuse": 1, "patch_keep": 0.5}]
)
def test_impossible_savings_are_refused(wrong: dict):
    with pytest.raises(BadInput, match=r"--nnclr\.(patch-keep|reuse) is"):
        Settings(**(vars(SETTINGS) | wrong)).check("nnclr")


def test_the_encoder_is_frozen():
    assert not any(p.requires_grad for p in make().encoder.parameters())
