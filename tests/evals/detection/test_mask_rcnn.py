"""The detector: the paper's size and constants, aligned features, losses and detections in torchvision's form."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, box_iou

from engine.core.errors import BadInput
from engine.evals.detection import Form, create, undecayed
from engine.evals.detection.mask_rcnn import AlignedRoIAlign, Anchors
from engine.evals.detection.pyramid import strides
from engine.model import twins, vit

TINY = replace(
    Form.small(),
    size=64,
    window=3,
    global_blocks=2,
    channels=32,
    candidates=(100, 100),
    proposals=50,
    roi_samples=32,
    box_hidden=64,
)


def small_vit(**overrides: object) -> vit.VisionTransformer:
    return vit.create("vit_micro_patch8_32", depth=4, generator=torch.Generator().manual_seed(0), **overrides)


def scene(*boxes: tuple[int, int, int, int], side: int = 64) -> tuple[Tensor, dict[str, Tensor]]:
    """A dark image of bright rectangles; the first is of category 1, the second of 2."""
    image, masks = -torch.ones(3, side, side), torch.zeros(len(boxes), side, side, dtype=torch.uint8)
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        image[index, y0:y1, x0:x1] = 2
        masks[index, y0:y1, x0:x1] = 1
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return image, {"boxes": corners, "labels": torch.arange(1, len(boxes) + 1), "masks": masks}


def batch(*scenes: tuple[Tensor, dict[str, Tensor]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images, targets = zip(*scenes, strict=True)
    return list(images), list(targets)


def test_a_vit_b_has_as_many_parameters_as_the_reproduction():
    with torch.device("meta"):
        encoder = vit.VisionTransformer(twins.read("vit_base_patch16_224", {})[0])
    model = create(encoder, 80, Form())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == pytest.approx(118.67e6, rel=1e-3)


def test_the_paper_s_constants_reach_their_parts():
    with torch.device("meta"):
        encoder = vit.VisionTransformer(twins.read("vit_base_patch16_224", {})[0])
    model = create(encoder, 80, Form())
    rpn, roi = model.rpn, model.roi_heads
    assert rpn._pre_nms_top_n == {"training": 2000, "testing": 1000}
    assert rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
    assert (rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold, rpn.nms_thresh) == (0.7, 0.3, 0.7)
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, 0.5)
    assert rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert (roi.fg_bg_sampler.batch_size_per_image, roi.fg_bg_sampler.positive_fraction) == (512, 0.25)
    assert roi.proposal_matcher.high_threshold == roi.proposal_matcher.low_threshold == 0.5
    assert (roi.score_thresh, roi.nms_thresh, roi.detections_per_img) == (0.05, 0.5, 100)
    assert roi.box_coder.weights == (10, 10, 5, 5)
    assert (roi.box_roi_pool.output_size, roi.mask_roi_pool.output_size) == ((7, 7), (14, 14))
    assert roi.box_roi_pool.sampling_ratio == roi.mask_roi_pool.sampling_ratio == 0
    assert model.backbone.vit.global_blocks == model.backbone.vit.taps == (2, 5, 8, 11)
    kinds = {part: [type(m) for m in found.modules()] for part, found in roi.named_children()}
    assert kinds["box_head"].count(nn.Conv2d) == kinds["box_head"].count(nn.BatchNorm2d) == 4
    assert kinds["box_head"].count(nn.Linear) == 1
    assert kinds["mask_head"].count(nn.BatchNorm2d) == 4
    assert [type(m) for m in rpn.head.conv.modules()].count(nn.Conv2d) == 2


@pytest.mark.parametrize("patch", [8, 14])
def test_features_of_proposals_are_aligned(patch: int):
    """A map that holds its own places in the image, read in the middle of bins, gives these middles."""
    side, steps = 448, strides(patch)
    maps = {}
    for name, stride in zip("0123", steps, strict=False):
        middle = (torch.arange(round(side / stride)) + 0.5) * stride
        maps[name] = torch.stack(torch.meshgrid(middle, middle, indexing="xy"))[None].repeat(2, 1, 1, 1)
    boxes = [torch.tensor([[60.0, 80, 100, 160], [100, 120, 140, 140]]), torch.tensor([[100.0, 120, 320, 340]])]
    found = AlignedRoIAlign(steps, 7)(maps, boxes, [(side, side)] * 2)
    shares = (torch.arange(7) + 0.5) / 7
    for (x0, y0, x1, y1), read in zip(torch.cat(boxes).tolist(), found, strict=True):
        torch.testing.assert_close(read[0], (x0 + (x1 - x0) * shares).expand(7, 7), atol=1e-3, rtol=0)
        torch.testing.assert_close(read[1], (y0 + (y1 - y0) * shares)[:, None].expand(7, 7), atol=1e-3, rtol=0)
    if patch == 8:
        unaligned = MultiScaleRoIAlign(list("0123"), 7, 2)(maps, boxes, [(side, side)] * 2)
        assert (unaligned - found).mean() > steps[0] / 4


def test_proposals_go_to_the_level_of_their_size():
    maps = {
        name: torch.full((1, 1, side, side), float(name)) for name, side in zip("0123", (256, 128, 64, 32), strict=True)
    }
    sides = (10, 111, 113, 223, 225, 447, 449, 1000)
    boxes = [torch.tensor([[0.0, 0, side, side] for side in sides])]
    levels = AlignedRoIAlign(strides(16), 1)(maps, boxes, [(1024, 1024)]).flatten()
    assert levels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    boxes = [found / 2 for found in boxes]  # patches of half the side: the same in places of the maps
    assert torch.equal(AlignedRoIAlign(strides(8), 1)(maps, boxes, [(512, 512)]).flatten(), levels)


def test_anchors_lie_a_stride_apart_on_odd_maps():
    anchors = Anchors(strides(8), (8, 16, 32, 64, 128), (1.0,))
    sides = (20, 10, 5, 3, 2)  # of 5 patches
    images = ImageList(torch.zeros(1, 3, 40, 40), [(40, 40)])
    (found,) = anchors(images, [torch.zeros(1, 1, side, side) for side in sides])
    parts = found.split([side**2 for side in sides])
    for part, side, stride, size in zip(parts, sides, strides(8), (8, 16, 32, 64, 128), strict=True):
        middles = (part[:, :2] + part[:, 2:]) / 2
        assert middles[-1].tolist() == [stride * (side - 1)] * 2
        assert ((part[:, 2:] - part[:, :2]) == size).all()


@pytest.mark.parametrize("form", [TINY, replace(TINY, pyramid="simple", head_norm="ln")], ids=["paper", "ViTDet"])
@pytest.mark.parametrize("encoder", [{}, {"positions": "relative", "init_values": 0.5}], ids=["plain", "BEiT"])
def test_gradients_reach_all_that_is_trained(form: Form, encoder: dict[str, object]):
    model = create(small_vit(drop_path=0.1, **encoder), 2, form)
    torch.manual_seed(0)
    losses = model(*batch(scene((8, 8, 30, 40)), scene((20, 10, 60, 50), (2, 2, 18, 20))))
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not without


@pytest.mark.parametrize("norm", ["bn", "ln"])
def test_images_without_objects_give_finite_losses(norm: str):
    model = create(small_vit(), 2, replace(TINY, head_norm=norm))
    for scenes in ([scene(), scene()], [scene(), scene((8, 8, 30, 40))], [scene()]):
        model.zero_grad()
        losses = model(*batch(*scenes))
        assert torch.isfinite(torch.stack(list(losses.values()))).all()
        sum(losses.values()).backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())


def test_it_learns_two_scenes_and_finds_what_is_on_them():
    """Boxes, categories and masks come back where they were: in images of other sizes than the padded, too."""
    scenes = [scene((8, 8, 30, 40)), scene((30, 6, 58, 30), (4, 30, 24, 54), side=60)]
    images, targets = batch(*scenes)
    model = create(small_vit(), 2, replace(TINY, head_norm="ln"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(0)
    for _ in range(80):
        optimiser.zero_grad()
        sum(model(images, targets).values()).backward()
        optimiser.step()
    with torch.no_grad():
        detections = model.eval()(images)
    for image, target, found in zip(images, targets, detections, strict=True):
        height, width = image.shape[1:]
        assert found["masks"].shape == (len(found["boxes"]), 1, height, width)
        assert found["labels"].dtype == torch.int64 and found["scores"].dtype == torch.float32
        assert (found["scores"].diff() <= 0).all()
        assert found["masks"].min() >= 0 and found["masks"].max() <= 1
        assert (
            found["boxes"].min() >= 0 and found["boxes"][:, 2].max() <= width and found["boxes"][:, 3].max() <= height
        )
        best = found["scores"].topk(len(target["boxes"])).indices
        overlap, which = box_iou(target["boxes"], found["boxes"][best]).max(1)
        assert overlap.min() > 0.7
        assert torch.equal(found["labels"][best][which], target["labels"])
        masks, truth = found["masks"][best][which][:, 0] > 0.5, target["masks"].bool()
        shared = (masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))
        assert shared.min() > 0.7


def test_an_image_is_judged_alike_alone_and_among_others():
    model = create(small_vit(), 2, replace(TINY, score_threshold=0.01)).eval()
    images = [scene((8, 8, 30, 40))[0], scene((5, 5, 20, 20), side=50)[0]]
    with torch.no_grad():
        together, alone = model(images), model(images[1:])
    assert len(alone[0]["boxes"]) > 0
    for name, found in alone[0].items():
        torch.testing.assert_close(together[1][name], found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("relative", [False, True])
def test_under_autocast_boxes_stay_in_fp32(relative: bool):
    model = create(small_vit(), 2, replace(TINY, relative=relative, score_threshold=0.01))
    images, targets = batch(scene((8, 8, 30, 40)), scene((5, 5, 20, 20), side=50))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets)
        model.eval()
        with torch.no_grad():
            found = model(images)[0]
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
    assert {name: values.dtype for name, values in found.items()} == {
        "boxes": torch.float32, "labels": torch.int64, "scores": torch.float32, "masks": torch.float32
    }  # fmt: skip
    assert len(found["boxes"]) and not torch.equal(found["boxes"], found["boxes"].bfloat16().float())


def test_a_seed_draws_the_heads_and_nothing_else():
    encoder, before = small_vit(), torch.get_rng_state()
    first, again, other = (create(encoder, 2, TINY, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    states = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    name = "roi_heads.box_predictor.cls_score.weight"
    assert not torch.equal(states[0][name], states[2][name])
    ours = first.backbone.vit.encoder.blocks[0].mlp.fc1.weight
    assert torch.equal(ours, encoder.blocks[0].mlp.fc1.weight) and ours is not encoder.blocks[0].mlp.fc1.weight


def test_a_seed_draws_the_positions_of_a_beit_encoder():
    encoder, before = small_vit(positions="relative"), torch.get_rng_state()
    first, again, other = (create(encoder, 2, TINY, seed).backbone.vit.encoder.pos_embed for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.std().item() == pytest.approx(0.02, rel=0.05)


def test_norms_positions_and_biases_are_not_decayed():
    model = create(small_vit(), 2, TINY)
    found, known = undecayed(model), dict(model.named_parameters())
    assert found <= known.keys()
    for name in ("backbone.vit.encoder.pos_embed", "backbone.vit.window_bias.relative_position_bias_table",
                 "backbone.vit.encoder.blocks.0.norm1.weight", "backbone.pyramid.scales.0.1.bias",
                 "roi_heads.mask_head.0.1.weight"):  # fmt: skip
        assert name in found
    large = {name for name in found if known[name].ndim > 1}
    assert {name.rpartition(".")[2] for name in large} == {"pos_embed", "relative_position_bias_table"}
    assert "backbone.vit.encoder.blocks.0.attn.qkv.bias" not in found


def test_what_does_not_fit_is_one_sentence():
    with pytest.raises(BadInput, match="a detector of 0 categories was asked for"):
        create(small_vit(), 0, TINY)
    with pytest.raises(BadInput, match="image 1 of the batch has 72x72 pixels, more than the detector's 64"):
        create(small_vit(), 2, TINY).eval()([torch.zeros(3, 64, 64), torch.zeros(3, 72, 72)])
