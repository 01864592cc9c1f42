"""RelViT against plain restatements, pair by pair and patch by patch: labels, losses, mega-patches, patch augmentation."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.data.views import IMAGENET_MEAN, IMAGENET_STD
from engine.methods.base import Labels
from engine.methods.parts import patch_augmentation
from engine.methods.parts.patch_augmentation import arrange, draw_patches, join, recolour, split, zoom
from engine.methods.parts.relations import angles, distances
from engine.methods.relvit import Relvit, Settings
from engine.model import vit
from engine.recipes import recipe
from engine.recipes.small_data import SETS
from engine.training import config
from kernels import relation

PLAIN = {"patch_zoom": 1.0, "patch_jitter": 0.0, "patch_grayscale": 0.0}
ALL = {"relation_weight": 0.5, "position_weight": 0.7, "distance_weight": 1.3, "angle_weight": 1.7}


def make(labels: Labels | None = None, encoder: dict | None = None, **settings: object) -> Relvit:
    torch.manual_seed(0)
    encoder = vit.create("vit_micro_patch8_32", **{"positions": "none", "depth": 2} | (encoder or {}))
    known = () if labels is None else (labels,)
    return Relvit(encoder, Settings(epochs=1, batch_size=4, **settings), *known)


def draws(batch: int, seed: int = 0) -> Draws:
    return Draws(seed, batch=batch, rows=slice(None), device=torch.device("cpu"))


def place(token: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of a place in a grid."""
    return token // grid[1], token % grid[1]


def direction(a: int, b: int, grid: tuple[int, int]) -> int:
    """Where a lies seen from b: left-up, up, right-up, left, centre, right, left-down, down, right-down."""
    (row_a, column_a), (row_b, column_b) = place(a, grid), place(b, grid)
    above_level_below = 0 if row_a < row_b else 1 if row_a == row_b else 2
    left_same_right = 0 if column_a < column_b else 1 if column_a == column_b else 2
    return 3 * above_level_below + left_same_right


def distance(a: int, b: int, grid: tuple[int, int]) -> float:
    return math.dist(place(a, grid), place(b, grid))


def angle(a: int, b: int, grid: tuple[int, int]) -> float:
    if a == b:
        return 0.0
    shifted = [[at + size / 2 for at, size in zip(place(token, grid), grid)] for token in (a, b)]
    product = sum(x * y for x, y in zip(*shifted))
    return math.acos(product / (math.hypot(*shifted[0]) * math.hypot(*shifted[1]) + 1e-4)) / math.pi


def plain_map(of_pair, grid: tuple[int, int]) -> Tensor:
    """All pairs, scaled to [-1, 1]."""
    count = grid[0] * grid[1]
    values = torch.tensor([[of_pair(a, b, grid) for b in range(count)] for a in range(count)])
    return values / values.max() * 2 - 1


def plain_terms(method: Relvit, tokens: Tensor, places: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Each loss with loops over the images and pairs (sheet, sections 2 and 3)."""
    heads, count, width = method.heads, tokens.shape[1], tokens.shape[2]
    terms = {name: [] for name in ("relation", "position", "distance", "angle")}
    maps = {"distance": plain_map(distance, grid), "angle": plain_map(angle, grid)}
    for image, where in zip(tokens, places.tolist()):
        queries, keys = (
            [image @ part_of_class.T for part_of_class in linear.weight.split(width // 9)]
            for linear in (heads["relation"].query, heads["relation"].key)
        )
        for a in range(count):
            scores = heads["position"].weight @ image[a] + heads["position"].bias
            terms["position"].append(F.cross_entropy(scores, torch.tensor(where[a])))
            for b in range(count):
                logits = [queries[c][a] @ keys[c][b] / math.sqrt(width // 9) for c in range(9)]
                target = torch.tensor(direction(where[a], where[b], grid))
                terms["relation"].append(F.cross_entropy(torch.stack(logits), target))
        for name, wanted in maps.items():
            query, key = (image @ part.weight.T for part in (heads[name].query, heads[name].key))
            for a in range(count):
                for b in range(count):
                    terms[name].append((query[a] @ key[b] / math.sqrt(width) - wanted[where[a], where[b]]) ** 2)
    return {name: torch.stack(values).mean() for name, values in terms.items()}


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (3, 5), (7, 7)])
def test_maps_of_distances_and_angles_equal_pair_by_pair(grid: tuple[int, int]):
    torch.testing.assert_close(distances(grid), plain_map(distance, grid), atol=1e-6, rtol=0)
    torch.testing.assert_close(angles(grid), plain_map(angle, grid), atol=1e-6, rtol=0)
    for made in (distances(grid), angles(grid)):
        assert made.dtype == torch.float32
        assert torch.equal(made, made.T)
        assert (made.diagonal().unique().item(), made.max().item()) == (-1, 1)


@pytest.mark.parametrize("add_class_token", [False, True])
@pytest.mark.parametrize("img_size", [(32, 32), (24, 32)])
def test_losses_and_gradients_equal_pair_by_pair(img_size: tuple[int, int], add_class_token: bool):
    # positions, so that a permutation is no no-op
    method = make(
        encoder={"img_size": img_size, "positions": "learned"},
        permute=True,
        add_class_token=add_class_token,
        **ALL,
        **PLAIN,
    )
    images, grid = torch.randn(2, 3, *img_size), (img_size[0] // 8, 4)
    drawn = method.draw(draws(2))
    report = method((images,), torch.arange(2), drawn)
    report["loss"].backward()
    ours = {name: p.grad.clone() for name, p in method.named_parameters()}
    method.zero_grad()
    order = drawn["order"]
    assert not torch.equal(order[0], order[1])
    patches = split(images, 8)
    moved = join(torch.stack([image[row] for image, row in zip(patches, order)]), grid)
    tokens = method.encoder(moved)
    tokens = tokens[:, 1:] + tokens[:, :1] if add_class_token else tokens[:, 1:]
    terms = plain_terms(method, tokens, order, grid)
    loss = sum(ALL[f"{name}_weight"] * term for name, term in terms.items())
    loss.backward()
    for name, term in terms.items():
        assert report[f"{name}_loss"].item() == pytest.approx(term.item(), abs=1e-5), name
    assert report["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", ["relation", "position", "distance"])
def test_operations_of_heads_equal_torch_s_count(name: str):
    head, tokens = make(**ALL).heads[name], torch.randn(3, 16, 128, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        head.loss(tokens, torch.arange(16).expand(3, -1)).backward()
    unseen = relation.cost(1, 16, 128 // 9, 4)[0].flops if name == "relation" else 0  # the counter sees no op of ours
    assert counter.get_total_flops() == 3 * 3 * (head.flops(16) - unseen)


def test_a_weight_of_zero_leaves_its_head_out():
    method = make(relation_weight=0.0, position_weight=0.0, distance_weight=2.0, **PLAIN)
    assert list(method.heads) == ["distance"]
    report = method((torch.randn(2, 3, 32, 32),), torch.arange(2), {})
    assert report.keys() == {"loss", "distance_loss"}
    assert report["loss"].item() == pytest.approx(2 * report["distance_loss"].item())
    assert set(make().heads) == {"relation", "position"}


def test_class_loss_is_the_classifier_s_cross_entropy_and_joins_the_others():
    labels = Labels(torch.tensor([2, 0, 1, 1, 0, 2]), ("a", "b", "c"))
    method = make(labels, {"positions": "learned"}, class_weight=0.5, **PLAIN)
    assert method.settings.labelled
    assert not make().settings.labelled
    images, ids = torch.randn(3, 3, 32, 32), torch.tensor([5, 1, 3])
    torch.nn.init.normal_(method.classifier.weight)
    report = method((images,), ids, {})
    scores = method.features(images) @ method.classifier.weight.T + method.classifier.bias
    expected = F.cross_entropy(scores, torch.tensor([2, 0, 1])).item()
    assert report["class_loss"].item() == pytest.approx(expected, abs=1e-5)
    total = report["relation_loss"] + report["position_loss"] + 0.5 * report["class_loss"]
    assert report["loss"].item() == pytest.approx(total.item(), abs=1e-6)


def test_without_positions_a_permutation_changes_no_loss():
    torch.manual_seed(1)
    images, method = torch.randn(3, 3, 32, 32), make(permute=True, **ALL, **PLAIN)
    order = {"order": method.draw(draws(3))["order"]}
    identity = {"order": torch.arange(16).expand(3, -1)}
    losses = [method((images,), torch.arange(3), drawn)["loss"].item() for drawn in (order, identity)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    seeing = make(encoder={"positions": "learned"}, permute=True, **ALL, **PLAIN)
    losses = [seeing((images,), torch.arange(3), drawn)["loss"].item() for drawn in (order, identity)]
    assert losses[0] != pytest.approx(losses[1], abs=1e-4)


def test_places_say_where_each_patch_comes_from():
    settings = Settings(permute=True, **PLAIN)
    images = torch.arange(24.0).repeat_interleave(64).view(1, 24, 8, 8).expand(2, -1, -1, -1)
    images = join(images[:, :, None].expand(-1, -1, 3, -1, -1), (4, 6))  # every patch shows its own number
    drawn = draw_patches(settings, draws(2), (4, 6))
    moved, places = arrange(settings, images, drawn, 8)
    assert torch.equal(split(moved, 8)[:, :, 0, 3, 3].long(), places)
    assert [sorted(row) for row in places.tolist()] == [list(range(24))] * 2
    assert places.tolist() != [list(range(24))] * 2


def plain_mega(image: Tensor, rows: list[int], columns: list[int], patch: int) -> Tensor:
    lines = []
    for top, bottom in pairwise(rows):
        cells = []
        for left, right in pairwise(columns):
            cell = image[:, top * patch : bottom * patch, left * patch : right * patch]
            cells.append(F.interpolate(cell[None], size=(patch, patch), mode="bilinear", antialias=True)[0])
        lines.append(torch.cat(cells, 2))
    return torch.cat(lines, 1)


@pytest.mark.parametrize(("grid", "parts"), [((7, 7), 5), ((4, 6), 2), ((5, 5), 5)])
def test_mega_patches_equal_cells_resized_one_by_one(grid: tuple[int, int], parts: int):
    settings = Settings(mega_patches=parts, mega_shared=False, **PLAIN)
    images = torch.randn(6, 3, grid[0] * 8, grid[1] * 8)
    drawn = draw_patches(settings, draws(6), grid)
    made, places = arrange(settings, images, drawn, 8)
    assert made.shape == (6, 3, parts * 8, parts * 8)
    assert places.tolist() == [list(range(parts**2))] * 6
    for image, rows, columns, one in zip(images, drawn["rows"].tolist(), drawn["columns"].tolist(), made):
        torch.testing.assert_close(one, plain_mega(image, rows, columns, 8), atol=1e-5, rtol=1e-5)


def test_cut_lines_are_uniform_and_differ_between_axes():
    settings = Settings(mega_patches=3, mega_shared=False, **PLAIN)
    drawn = draw_patches(settings, draws(4000), (5, 6))
    for name, size in (("rows", 5), ("columns", 6)):
        lines = drawn[name]
        assert (lines.diff() >= 1).all()
        assert (lines[:, 0] == 0).all()
        assert (lines[:, -1] == size).all()
        counts = torch.bincount(lines[:, 1:-1].flatten(), minlength=size)[1:size] / len(lines)
        torch.testing.assert_close(counts, torch.full((size - 1,), 2 / (size - 1)), atol=0.04, rtol=0)  # 5 sigma
    shared = (drawn["rows"][:, 1] == drawn["columns"][:, 1]).float().mean()  # .5 * .4 + .33 * .3 + .17 * .2 = 1/3
    assert shared == pytest.approx(1 / 3, abs=0.04)


def test_shared_lines_cut_rows_and_columns_alike():
    settings, images = Settings(mega_patches=3, **PLAIN), torch.randn(8, 3, 48, 48)
    drawn = draw_patches(settings, draws(8), (6, 6))
    assert torch.equal(drawn["rows"], drawn["columns"])
    made, _ = arrange(settings, images, drawn, 8)
    for image, lines, one in zip(images, drawn["rows"].tolist(), made):
        torch.testing.assert_close(one, plain_mega(image, lines, lines, 8), atol=1e-5, rtol=1e-5)
    with pytest.raises(BadInput, match=r"--relvit.mega-shared cuts both axes .* 4 x 6 patches"):
        settings.check_patches("relvit", (4, 6))


def test_heads_of_mega_patches_know_their_grid():
    method = make(encoder={"patch_size": 4}, mega_patches=5, **ALL)
    images, grid = torch.randn(2, 3, 32, 32), (5, 5)
    drawn = method.draw(draws(2))
    report = method((images,), torch.arange(2), drawn)
    seen, places = arrange(method.settings, images, drawn, 4)
    terms = plain_terms(method, method.encoder(seen)[:, 1:], places, grid)
    for name, term in terms.items():
        assert report[f"{name}_loss"].item() == pytest.approx(term.item(), abs=1e-5), name


@pytest.mark.parametrize(("side", "cut"), [(4, 3), (8, 7), (16, 14), (32, 28)])
def test_zoom_equals_patches_cropped_one_by_one(side: int, cut: int):
    torch.manual_seed(0)
    settings = Settings()
    patches, uniforms = torch.rand(2, 9, 3, side, side), torch.rand(2, 9, 8)
    made, tops = zoom(settings, patches, uniforms), set()
    for i in range(2):
        for n in range(9):
            top, left = (int(u * (side - cut + 1)) for u in uniforms[i, n, :2].tolist())
            tops.add(top)
            expected = tv.resized_crop(patches[i, n], top, left, cut, cut, [side, side], antialias=True)
            torch.testing.assert_close(made[i, n], expected, atol=1e-5, rtol=1e-5)
    assert len(tops) > 1


def plain_colours(pixels: np.ndarray, b: float, c: float, s: float, turn: float) -> np.ndarray:
    """[3, H, W] in [0, 1]: contrast about mid-grey, brightness, then saturation and hue in YIQ; pixel by pixel."""
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    out = np.empty_like(pixels)
    for row in range(pixels.shape[1]):
        for column in range(pixels.shape[2]):
            rgb = ((pixels[:, row, column] - 0.5) * c + 0.5) * b
            y, i, q = to_yiq @ rgb
            chroma = s * (i + 1j * q) * np.exp(1j * turn)
            out[:, row, column] = np.linalg.solve(to_yiq, [y, chroma.real, chroma.imag])
    return out.clip(0, 1)


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def test_colours_equal_patches_recoloured_one_by_one():
    torch.manual_seed(0)
    settings, pixels, u = Settings(patch_grayscale=0.3), torch.rand(2, 12, 3, 4, 4), torch.rand(2, 12, 8)
    made, kinds = recolour(settings, normalised(pixels), u), set()
    for i in range(2):
        for n in range(12):
            _, _, jitter, b, c, s, hue, gray = u[i, n].tolist()
            jittered, grey = jitter < 0.8, gray < 0.3
            kinds.add((jittered, grey))
            factors = [0.6 + 0.8 * number for number in (b, c, s)] if jittered else [1.0, 1.0, 1.0]
            factors[2] = 0.0 if grey else factors[2]
            turn = 2 * math.pi * 0.1 * (2 * hue - 1) if jittered else 0.0
            expected = plain_colours(pixels[i, n].double().numpy(), *factors, turn)
            torch.testing.assert_close(made[i, n], normalised(torch.from_numpy(expected).float()), atol=1e-5, rtol=1e-5)
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}


def test_colours_of_normalised_patches_are_torchvision_s_patch_by_patch():
    torch.manual_seed(0)
    settings = Settings(patch_grayscale=0.3, patch_colours="normalised")
    patches, u, seen = normalised(torch.rand(2, 24, 3, 4, 4)), torch.rand(2, 24, 12), set()
    patches[0, 0, :, :2] = patches[0, 0, :1, :2]  # without colour
    made = recolour(settings, patches, u)
    assert ((made < 0) | (made > 1)).any() and ((patches < 0) & (made == 0)).any()
    steps = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for i in range(2):
        for n in range(24):
            _, _, jitter, *numbers, gray = u[i, n, :8].tolist()
            amounts = [0.6 + 0.8 * number for number in numbers[:3]] + [0.1 * (2 * numbers[3] - 1)]
            expected, order = patches[i, n], sorted(range(4), key=u[i, n, 8:].tolist().__getitem__)
            for step in order if jitter < 0.8 else ():
                expected = steps[step](expected, amounts[step])
            expected = tv.rgb_to_grayscale(expected, num_output_channels=3) if gray < 0.3 else expected
            seen.add((jitter < 0.8, gray < 0.3, tuple(order)))
            torch.testing.assert_close(made[i, n], expected, atol=1e-5, rtol=1e-5)
    assert len({order for *_, order in seen}) > 10 and len({kinds[:2] for kinds in seen}) == 4
    drawn = draw_patches(settings, draws(4), (4, 4))
    assert drawn["patches"].shape == (4, 16, 12) and draw_patches(Settings(), draws(4), (4, 4))["patches"].shape == (
        4,
        16,
        8,
    )


def test_colours_alone_are_torchvision_s():
    """Brightness, saturation and loss of colour mean the same there; its contrast and hue are other ones."""
    torch.manual_seed(0)
    pixels, middle = torch.rand(1, 5, 3, 8, 8), torch.full((1, 5, 8), 0.5)
    middle[..., patch_augmentation._JITTER] = 0.0
    middle[..., patch_augmentation._GRAY] = 1.0
    for column, function in (("_BRIGHTNESS", tv.adjust_brightness), ("_SATURATION", tv.adjust_saturation)):
        u = middle.clone()
        u[..., getattr(patch_augmentation, column)] = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.99])
        made = recolour(Settings(), normalised(pixels), u)
        for n, number in enumerate((0.0, 0.25, 0.5, 0.75, 0.99)):
            expected = function(pixels[0, n], 0.6 + 0.8 * number)
            torch.testing.assert_close(made[0, n], normalised(expected), atol=3e-3, rtol=0)  # its grey has four digits
    middle[..., patch_augmentation._GRAY] = 0.0
    grey = tv.rgb_to_grayscale(pixels, num_output_channels=3)
    torch.testing.assert_close(recolour(Settings(), normalised(pixels), middle), normalised(grey), atol=3e-3, rtol=0)


def test_every_patch_is_changed_on_its_own_in_the_order_of_the_paper():
    """Mega-patches, zoom, colours, permutation; the whole equals its parts for one patch after the other."""
    settings, images = Settings(mega_patches=3, mega_shared=False, permute=True), normalised(torch.rand(3, 3, 40, 32))
    drawn = draw_patches(settings, draws(3), (5, 4))
    made, places = arrange(settings, images, drawn, 8)
    for i in range(3):
        mega = plain_mega(images[i], drawn["rows"][i].tolist(), drawn["columns"][i].tolist(), 8)
        for n in range(9):
            source = places[i, n].item()
            row, column = source // 3 * 8, source % 3 * 8
            patch, u = mega[None, None, :, row : row + 8, column : column + 8], drawn["patches"][None, None, i, source]
            expected = recolour(settings, zoom(settings, patch, u), u)[0, 0]
            row, column = n // 3 * 8, n % 3 * 8
            torch.testing.assert_close(made[i, :, row : row + 8, column : column + 8], expected, atol=1e-5, rtol=1e-5)


def test_numbers_differ_between_patches_images_and_steps():
    drawn = [draw_patches(Settings(), draws(4, seed), (4, 4))["patches"] for seed in range(3)]
    rows = torch.cat(drawn).flatten(0, 1)
    assert len({tuple(row.tolist()) for row in rows}) == 3 * 4 * 16


def test_off_means_untouched():
    images, off = torch.randn(2, 3, 32, 32), Settings(**PLAIN)
    drawn = draw_patches(off, draws(2), (4, 4))
    assert drawn == {}
    made, places = arrange(off, images, drawn, 8)
    assert made is images
    assert places.tolist() == [list(range(16))] * 2
    only_zoom, only_colour = replace(off, patch_zoom=1.15), replace(off, patch_jitter=0.8)
    patches, u = normalised(torch.rand(2, 16, 3, 8, 8)), torch.rand(2, 16, 8)
    assert recolour(only_zoom, patches, u) is patches
    assert zoom(only_colour, patches, u) is patches
    assert zoom(replace(off, patch_zoom=1.01), patches, u) is patches  # less than a pixel
    unlucky = torch.ones(2, 16, 8)
    torch.testing.assert_close(recolour(only_colour, patches, unlucky), patches, atol=1e-5, rtol=1e-5)


def test_half_a_batch_draws_and_loses_what_it_does_within_the_whole():
    method, images = make(encoder={"patch_size": 4}, mega_patches=5, permute=True, **ALL), torch.randn(4, 3, 32, 32)
    drawn = method.draw(draws(4))
    whole = method((images,), torch.arange(4), drawn)["loss"].item()
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        own = method.draw(Draws(0, batch=4, rows=rows, device=torch.device("cpu")))
        for name, value in own.items():
            assert torch.equal(value, drawn[name][rows]), name
        halves.append(method((images[rows],), torch.arange(4)[rows], own)["loss"].item())
    assert whole == pytest.approx(sum(halves) / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(relation_weight=0.0, position_weight=0.0),
            "relation-weight is 0.0; it must be a number from 0, and above 0 for",
        ),
        (dict(angle_weight=-1.0), "angle-weight is -1.0"),
        (dict(mega_patches=1), "mega-patches is 1; it must be 0, or a whole number from 2"),
        (dict(patch_zoom=0.9), "patch-zoom is 0.9; it must be a number from 1"),
        (dict(patch_jitter=1.1), "patch-jitter is 1.1"),
        (dict(labels_per_class=5), "labels-per-class is 5"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str):
    with pytest.raises(BadInput, match=message):
        Settings(**settings).check("relvit")


@pytest.mark.parametrize(
    ("settings", "model", "encoder", "message"),
    [
        (
            dict(mega_patches=5),
            "vit_micro_patch8_32",
            {},
            "mega-patches is 5; it must be at most 4 for the model's 4 x 4 patches",
        ),
        ({}, "vit_micro_patch8_32", dict(patch_size=32), "the model sees only one"),
        (dict(add_class_token=True), "vit_medium_patch16_gap_240", {}, "add-class-token needs a model that has one"),
    ],
)
def test_models_that_do_not_fit_are_refused(settings: dict, model: str, encoder: dict, message: str):
    with pytest.raises(BadInput, match=message):
        Settings(**settings).check_encoder("relvit", vit.create(model, depth=1, **encoder))


def test_published_recipe():
    ((name, settings),) = recipe("relvit", "vit_small_patch16_224", "auto", embedded=False).stages
    assert (name, settings.epochs, settings.batch_size, settings.base_lr, settings.end_lr) == (
        "relvit", 100, 256, 5e-4, 1.25e-6,
    )  # fmt: skip
    assert (settings.schedule, settings.warmup, settings.clip_norm) == ("quarter-cosine", 0.1, 1.0)
    assert (settings.weight_decay, settings.betas) == (0.1, (0.9, 0.999))
    (group,) = make(decay_all=True).groups(256)
    assert (group.peak_lr, group.weight_decay) == (5e-4, 0.1)
    assert {"encoder.norm.weight", "encoder.cls_token", "heads.position.bias"} <= group.parameters.keys()
    assert "encoder.pos_embed" not in group.parameters
    assert sorted(group.weight_decay for group in make(decay_all=False).groups(256)) == [0.0, 0.1]


@pytest.mark.parametrize(
    ("preset", "sides", "pad", "joint"),
    [
        ("cifar10", (32, 4), 4, False),
        ("tiny-imagenet", (64, 8), 4, False),
        ("imagenet100", (224, 32), 0, False),
        ("svhn-joint", (32, 4), 4, True),
        ("joint", (224, 16), 0, True),
    ],
)
def test_published_presets_of_sets_and_regimes(preset: str, sides: tuple[int, int], pad: int, joint: bool):
    model = () if preset in SETS else ("--model", "vit_small_patch16_224")
    sized = ("--image-size", str(sides[0]), "--patch-size", str(sides[1])) if preset == "svhn-joint" else ()
    plan = config.parse(["--method", "relvit", "--preset", preset, "--data", "somewhere", *model, *sized])
    ((_, settings),) = plan.stages
    encoder = vit.create(plan.model, **plan.encoder | {"depth": 1})
    assert (encoder.img_size, encoder.patch_size, encoder.embed_dim) == ((sides[0],) * 2, sides[1], 384)
    assert (settings.pad, settings.labelled, settings.patch_zoom > 1) == (pad, joint, not joint)
    kept = {"positions": "learned", "global_pool": "token"} if joint else {"positions": "none", "global_pool": "avg"}
    assert kept.items() <= plan.encoder.items()
    assert plan.encoder["drop_path"] == 0.1
    (view,) = make(Labels(torch.arange(4), tuple("abcd")) if joint else None, class_weight=1.0 * joint, pad=pad).views()
    assert (view.pad, view.size, view.flip) == (pad, (32, 32), 0.5)
