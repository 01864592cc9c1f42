"""MMC-style training against plain restatements: contrast, pixels and both readings of distillation with their gradients, their
sum, what is left out at weight 0, which patches count as masked, the teacher, a skipped update."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import methods
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.core.optim import Moment
from engine.methods.mmc import Mmc, Settings, masked_patches
from engine.methods.parts.collapse import CHOICES
from engine.methods.parts.corruption import corrupt
from engine.model import vit
from engine.model.heads import BatchNorm, contrast_projector
from engine.recipes import recipe
from engine.training.config import parse
from engine.training.step import Update
from tests.methods.parts.test_collapse import published_sinkhorn
from tests.methods.small import small
from tests.methods.test_dino import plain_head
from tests.methods.test_ibot import assert_padding_changes_nothing, masks_of
from tests.methods.test_nnclr import plain_head as plain_projector
from tests.saved import content
from tests.updates import finish

SMALL = small(Settings, epochs=4, augmentation="minimal", target_temperature_epochs=0, largest_block=0.5)
TERMS = ("contrast", "pixel", "distil")
READINGS = ("patch_same", "cls_to_patch")
IDS = torch.arange(4)


def make(encoder: dict[str, object] | None = None, **settings: object) -> Mmc:
    torch.manual_seed(0)
    model = vit.create("vit_micro_patch8_32", **({"depth": 2} | (encoder or {})))
    method = Mmc(model, Settings(**(SMALL | settings)))
    with torch.no_grad():  # the teacher has gone its own way
        for parameter in method.teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for name in ("collapse", "patch_collapse"):
            if getattr(getattr(method, name, None), "centre", None) is not None:
                getattr(method, name).centre.normal_(std=0.3)
    return method


def only(*terms: str) -> dict[str, float]:
    return {f"{term}_weight": float(term in terms) for term in TERMS}


def crops(seed: int = 0, batch: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, 32, 32, generator=generator) for _ in range(2))


def drawn(method: Mmc, step: int = 0, batch: int = 4) -> dict[str, Tensor]:
    return method.draw(Draws(0, step, batch=batch, rows=slice(None), device=torch.device("cpu")))


def gradients(method: Mmc, loss: Tensor) -> dict[str, Tensor]:
    method.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def assert_same_gradients(method: Mmc, loss: Tensor, plain: Tensor) -> None:
    ours, theirs = gradients(method, loss), gradients(method, plain)
    assert ours.keys() == theirs.keys() and any(gradient.abs().max() > 0 for gradient in ours.values())
    assert not any(name.startswith("teacher") for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=2e-5, rtol=1e-3, msg=name)


def plain_contrast(method: Mmc, seen: list[Tensor], taught: list[Tensor], temperature: float = 0.2) -> Tensor:
    """SiT: 2 temperatures times cross-entropy of cosines, each crop of the student with the teacher's other."""
    queries = plain_projector(method.projector, torch.cat([method.encoder.pool(x) for x in seen])).chunk(2)
    keys = plain_projector(method.teacher.projector, torch.cat([method.evaluated.pool(x) for x in taught])).chunk(2)
    total = 0
    for q, k in ((queries[0], keys[1]), (queries[1], keys[0])):
        cosine = F.cosine_similarity(q[:, None], k.detach()[None], dim=2)
        total = total + 2 * temperature * F.cross_entropy(cosine / temperature, torch.arange(len(q)))
    return total


def plain_pixels(method: Mmc, seen: list[Tensor], images: tuple[Tensor, ...], corrupted: Tensor) -> Tensor:
    """Mean of |decoded - clean| over the corrupted pixels of a crop, over crops."""
    p, errors = method.encoder.patch_size, []
    for crop, (seen_bLC, view) in enumerate(zip(seen, images)):
        columns = method.decoder.mlp(seen_bLC[:, 1:]).unflatten(2, (p * p, 3)).transpose(2, 3).flatten(2)
        restored = F.fold(columns.transpose(1, 2), view.shape[2:], p, stride=p)
        for image, hidden in enumerate(corrupted[:, crop]):
            errors.append((restored[image] - view[image]).abs()[:, hidden].mean())
    return torch.stack(errors).mean()


def plain_targets(method: Mmc, scores: Tensor, centre: Tensor | None) -> Tensor:
    if "sinkhorn" in method.settings.collapse:
        return published_sinkhorn(scores, 0.07)
    return ((scores if centre is None else scores - centre) / 0.07).softmax(-1)


def plain_distil(method: Mmc, seen: list[Tensor], taught: list[Tensor], corrupted: Tensor) -> Tensor:
    s, head = method.settings, method.head
    with torch.no_grad():
        scores = torch.stack([plain_head(method.teacher.head, method.evaluated.pool(x)) for x in taught])
    q = plain_targets(method, scores.flatten(0, 1), method.collapse.centre).view_as(scores)

    def entropy(q: Tensor, z: Tensor) -> Tensor:
        return -(q * (z / 0.1).log_softmax(-1)).sum(-1)

    def spread(*z: Tensor) -> Tensor:
        mean = (torch.cat(z) / 0.1).softmax(1).mean(0)
        return math.log(s.prototypes) + (mean * mean.log()).sum() if "me-max" in s.collapse else torch.zeros(())

    if s.distil == "cls_to_patch":
        student = [plain_head(head, x[:, 1:].mean(1)) for x in seen]
        return (entropy(q[0], student[0]).mean() + entropy(q[1], student[1]).mean()) / 2 + spread(*student)
    student = [plain_head(head, method.encoder.pool(x)) for x in seen]
    total = (entropy(q[0], student[1]).mean() + entropy(q[1], student[0]).mean()) / 2 + spread(*student)
    masks = [F.avg_pool2d(c.double(), method.encoder.patch_size).flatten(1) > 0.5 for c in corrupted.unbind(1)]
    with torch.no_grad():
        rows = [plain_head(method.teacher.head, x[:, 1:][m]) for x, m in zip(taught, masks)]
    targets = plain_targets(method, torch.cat(rows), method.patch_collapse.centre).split([len(r) for r in rows])
    students = [plain_head(head, x[:, 1:][m]) for x, m in zip(seen, masks)]
    for target, z, mask in zip(targets, students, masks):
        losses = torch.zeros(mask.shape).masked_scatter(mask, entropy(target, z))
        total = total + (losses.sum(1) / mask.sum(1).clamp_min(1)).mean() / 2
    return total + spread(*students)


def tokens(method: Mmc, images: tuple[Tensor, ...], numbers: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What the student and the teacher make of both crops, one at a time."""
    with torch.no_grad():
        taught = [method.teacher.encoder(view) for view in images]
    return [method.encoder(view) for view in corrupt(method.settings, images, numbers)], taught


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_contrast_equals_the_formula(pool: str):
    method = make({"global_pool": pool}, **only("contrast"))
    images, numbers = crops(), drawn(method)
    plain = plain_contrast(method, *tokens(method, images, numbers))
    loss = method(images, IDS, numbers)["loss"]
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    assert_same_gradients(method, loss, plain)


@pytest.mark.parametrize("align", [1, 8])
def test_pixels_equal_the_formula(align: int):
    method = make(**only("pixel"), block_align=align)
    images, numbers = crops(), drawn(method)
    plain = plain_pixels(method, tokens(method, images, numbers)[0], images, numbers["corrupted"])
    loss = method(images, IDS, numbers)["loss"]
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    assert_same_gradients(method, loss, plain)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("choice", CHOICES)
def test_distillation_equals_the_formula(choice: str, reading: str):
    method = make(**only("distil"), distil=reading, collapse=choice)
    images, numbers = crops(), drawn(method)
    plain = plain_distil(method, *tokens(method, images, numbers), numbers["corrupted"])
    report = method(images, IDS, numbers)
    assert report["loss"].item() == pytest.approx(plain.item(), abs=2e-5)
    assert_same_gradients(method, report["loss"], plain)
    assert {"prototype_usage", "target_entropy"} <= report.keys()


@pytest.mark.parametrize("reading", READINGS)
def test_the_loss_is_the_weighted_sum_of_the_terms(reading: str):
    weights = {"contrast_weight": 0.5, "pixel_weight": 2.0, "distil_weight": 0.25}
    method = make(**weights, distil=reading)
    images, numbers = crops(), drawn(method)
    seen, taught = tokens(method, images, numbers)
    terms = {
        "contrast": plain_contrast(method, seen, taught),
        "pixel": plain_pixels(method, seen, images, numbers["corrupted"]),
        "distil": plain_distil(method, seen, taught, numbers["corrupted"]),
    }
    report = method(images, IDS, numbers)
    for name, plain in terms.items():
        assert report[f"{name}_loss"].item() == pytest.approx(plain.item(), abs=2e-5)
    plain = sum(weights[f"{name}_weight"] * term for name, term in terms.items())
    assert report["loss"].item() == pytest.approx(plain.item(), abs=2e-5)
    assert_same_gradients(method, report["loss"], plain)


ARMS = [arm for count in (1, 2, 3) for arm in itertools.combinations(TERMS, count)]


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("arm", ARMS, ids="+".join)
def test_a_term_of_weight_0_is_not_computed(arm: tuple[str, ...], reading: str, monkeypatch: pytest.MonkeyPatch):
    method = make(**only(*arm), distil=reading, freeze_last_layer=0)
    taught = []
    monkeypatch.setattr(method, "teach", lambda images, teach=method.teach: taught.append(1) or teach(images))
    report = method(crops(), IDS, drawn(method))
    assert {name for name in TERMS if f"{name}_loss" in report} == set(arm)
    assert len(taught) == (arm != ("pixel",))
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    report["loss"].backward()
    assert {name for name, p in method.named_parameters() if p.grad is not None} == trained, (
        "ranks wait for all of them"
    )
    heads = {"contrast": {"projector"}, "pixel": {"decoder"}, "distil": {"head"}}
    assert {name.split(".")[0] for name in trained} == {"encoder"}.union(*(heads[name] for name in arm))
    assert method.prototype_count == (method.settings.prototypes if "distil" in arm else 0)
    assert hasattr(method, "collapse") == ("distil" in arm)
    assert hasattr(method, "patch_collapse") == ("distil" in arm and reading == "patch_same")
    method.settings.check("mmc")
    finish(method)
    if method.prototype_count:
        assert method.choose(method.features(crops()[0])).max() < method.prototype_count


def test_arms_see_the_same_corruption():
    numbers = [drawn(make(**only(*arm)), step=3) for arm in ARMS]
    for other in numbers[1:]:
        assert {"corrupted", "alien"} <= other.keys()
        assert all(torch.equal(value, other[name]) for name, value in numbers[0].items() if name in other)


def test_the_student_sees_corrupted_crops_and_the_teacher_clean_ones():
    method = make(alien_probability=0.0)
    images, numbers = crops(), drawn(method)
    hidden = numbers["corrupted"].transpose(0, 1)[:, :, None]
    before = [view.clone() for view in images]
    seen, taught = tokens(method, images, numbers)
    changed = tuple(torch.where(h, torch.randn_like(view), view) for view, h in zip(images, hidden))
    seen_changed, taught_changed = tokens(method, changed, numbers)
    assert all(torch.equal(a, b) for a, b in zip(seen, seen_changed))
    assert not torch.equal(taught[0], taught_changed[0])
    method(images, IDS, numbers)
    assert all(torch.equal(a, b) for a, b in zip(images, before))


def test_a_patch_is_masked_where_more_than_half_of_it_is_corrupted():
    corrupted = torch.zeros(1, 2, 8, 12, dtype=torch.bool)
    corrupted[0, 0, :2, :4] = True  # 8 of 16 pixels of the first patch
    corrupted[0, 0, 4:7, 4:7] = True  # 9 of the fifth
    corrupted[0, 1, :4, 3:12] = True  # 4 of the first, all of the second and third
    assert masked_patches(corrupted, 4).tolist() == [
        [[False, False, False, False, True, False], [False, True, True, False, False, False]]
    ]


@pytest.mark.parametrize("choice", CHOICES)
def test_crops_without_masked_patches_have_no_patch_loss(choice: str):
    method = make(collapse=choice)
    numbers = drawn(method)
    for of_corruption in ("corrupted", "masks"):
        numbers[of_corruption] = torch.zeros_like(numbers[of_corruption])
    report = method(crops(), IDS, numbers)
    report["loss"].backward()
    assert report["patch_loss"] == report["pixel_loss"] == 0 < report["class_loss"]
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    finish(method)
    assert all(value.isfinite().all() for value in method.state_dict().values())


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("choice", CHOICES)
def test_any_choice_against_collapse_trains(choice: str, reading: str):
    method = make(collapse=choice, distil=reading, freeze_last_layer=0)
    update = Update(method, 8)
    reports = [update(step, crops(step), IDS, drawn(method, step)) for step in range(1, 4)]
    assert all(math.isfinite(value) for report in reports for value in report.values())
    assert update.skipped == 0
    assert ("centre_norm" in reports[0]) == (choice == "centring")
    assert not method.settings.splits


def test_the_teacher_follows_encoder_and_both_heads():
    method = make(teacher_momentum=0.9)
    before = {name: p.clone() for name, p in method.teacher.named_parameters()}
    assert {name.split(".")[0] for name in before} == {"encoder", "projector", "head"}
    method.begin(Moment(0, 10, 5))
    finish(method)
    online = dict(method.named_parameters())
    for name, p in method.teacher.named_parameters():
        moved = 0.9 * before[name] + 0.1 * online[name] if online[name].requires_grad else before[name]
        torch.testing.assert_close(p, moved, msg=name)
    assert method.evaluated is method.teacher.encoder


def test_a_skipped_update_changes_nothing():
    method = make(freeze_last_layer=0)
    update = Update(method, 8)
    update(1, crops(), IDS, drawn(method))
    before = content(method, update)
    images = crops(1)
    images[0][2, 1] = math.nan
    update(2, images, IDS, drawn(method, 2))
    after = content(method, update)
    assert update.skipped == 1 and before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    update(2, crops(1), IDS, drawn(method, 2))
    last = content(method, update)
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, last[name])}
    parts = {"encoder", "projector", "decoder", "head", "teacher", "collapse", "patch_collapse"}
    assert {f"model/{part}" for part in parts} <= moved
    statistics = "model/teacher.projector.1.running_mean"
    assert not torch.equal(before[statistics], last[statistics]), "the teacher's norm has statistics of its own"


def test_the_contrastive_head_has_sit_s_shape():
    head = contrast_projector(384)
    assert [tuple(p.shape) for p in head.parameters() if p.ndim == 2] == [(4096, 384), (4096, 4096), (256, 4096)]
    assert [type(layer) for layer in head] == [
        nn.Linear, BatchNorm, nn.ReLU, nn.Linear, BatchNorm, nn.GELU, nn.Linear, BatchNorm,
    ]  # fmt: skip
    ours, theirs, x = BatchNorm(6, affine=False), nn.BatchNorm1d(6, affine=False), torch.randn(20, 6)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    ours.commit(torch.tensor(True))
    assert ours.state_dict().keys() == theirs.state_dict().keys() and not list(ours.parameters())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--mmc.distil", "patches"], "--mmc.distil is patches; it must be one of patch_same, cls_to_patch"),
        (["--mmc.contrast-weight", "-1"], "contrast-weight is -1.0; it must be a number from 0"),
        (["--mmc.pixel-weight", "-1"], "pixel-weight"),
        (["--mmc.distil-weight", "-1"], "distil-weight"),
        ([f"--mmc.{term}-weight=0" for term in TERMS], "above 0 where the other two weights are 0"),
        (["--mmc.global-crops", "3"], "global-crops is 3; it must be 2"),
        (["--mmc.local-crops", "2"], "local-crops is 2; it must be 0"),
        (["--mmc.contrast-temperature", "0"], "contrast-temperature"),
        (["--mmc.projector-hidden", "0"], "projector-hidden"),
        (["--mmc.embedding", "0"], "embedding"),
        (["--mmc.decoder-layers", "0"], "decoder-layers"),
        (["--mmc.fill", "black"], "fill is black"),
        (["--mmc.weight-ema", "0.9"], "weight-ema"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: list[str], named: str):
    with pytest.raises(BadInput, match=named):
        parse(["--method", "mmc", *flags])


def test_blocks_must_fit_the_crops():
    model = vit.create("vit_micro_patch8_32", depth=1)
    with pytest.raises(BadInput, match="block-align is 5"):
        Settings(**(SMALL | {"block_align": 5})).check_encoder("mmc", model)


@pytest.mark.parametrize("model", ["vit_small_patch16_224", "vit_base_patch16_224"])
def test_published_recipe(model: str):
    chosen = recipe("mmc", model, "auto", embedded=False)
    ((name, s),) = chosen.stages
    s.check("mmc")
    assert methods.get(name) is Mmc and chosen.source.startswith("after SiT")
    assert (s.epochs, s.batch_size, s.warmup * s.epochs, s.base_lr, s.end_lr) == (800, 256, 10, 5e-4, 1e-6)
    assert (s.weight_decay, s.weight_decay_end, s.clip_norm, s.clip_over) == (0.04, 0.1, 3.0, "tensor")
    assert (s.crop_scale, s.drop, s.fill, s.alien, s.alien_probability) == ((0.2, 1.0), (0.5, 0.5), "zeros", 0.3, 0.5)
    assert (s.projector_hidden, s.embedding, s.contrast_temperature, s.decoder_layers) == (4096, 256, 0.2, 3)
    assert (s.prototypes, s.target_temperature_start, s.target_temperature) == (8192, 0.04, 0.07)
    assert (s.contrast_weight, s.pixel_weight, s.distil_weight, s.distil) == (1, 1, 1, "patch_same")
    assert s.free_norm == (model == "vit_small_patch16_224")
    arms = [replace(s, **only(*arm)) for arm in ARMS]
    assert len(arms) == 7
    for arm in arms:
        arm.check("mmc")


@pytest.mark.parametrize("which", ["drawn", "none", "all"])
@pytest.mark.parametrize("choice", CHOICES)
def test_padding_changes_nothing(choice: str, which: str, monkeypatch: pytest.MonkeyPatch):
    method = make(collapse=choice)
    assert_padding_changes_nothing(method, crops(), masks_of(drawn(method), which), monkeypatch, torch.float32)
