"""First weights are those that the authors' code draws: how wide they spread and where they end, parameter by parameter."""

import math

import pytest
import torch
from torch import Tensor

from engine import methods
from engine.model import vit
from engine.model.initialisation import KINDS
from engine.model.positions import sincos_positions
from tests.methods.small import small
from tests.model.shaken import MICRO, draw

WIDTH, PATCH = 128, 3 * 8 * 8
LAYERS = {
    "attn.qkv": (WIDTH, 3 * WIDTH),
    "attn.proj": (WIDTH, WIDTH),
    "mlp.fc1": (WIDTH, 4 * WIDTH),
    "mlp.fc2": (4 * WIDTH, WIDTH),
}
INFINITE = math.inf
# of a normal distribution cut at one standard deviation
CUT = math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(1 / math.sqrt(2)))


def uniform(bound: float) -> tuple[float, float]:
    """Standard deviation and largest value."""
    return bound / math.sqrt(3), bound


def xavier(wide: int, next_wide: int) -> tuple[float, float]:
    return uniform(math.sqrt(6 / (wide + next_wide)))


def layer(kind: str, name: str, block: int) -> tuple[float, float]:
    """Of the weight of a block's layer, as the code of the kind has it; blocks count from 1."""
    if kind == "mocov3" and name == "attn.qkv":
        return xavier(WIDTH, WIDTH)  # three layers, each as wide as the model
    if kind in ("xavier", "mae", "mocov3"):
        return xavier(*LAYERS[name])
    if kind == "beit":
        share = 1 / math.sqrt(2 * block) if name in ("attn.proj", "mlp.fc2") else 1
        return 0.02 * CUT * share, 0.02 * share
    return 0.02, INFINITE


PATCHES = {
    "xavier": (xavier(PATCH, WIDTH), 0.0),
    "mae": (xavier(PATCH, WIDTH), 1 / math.sqrt(PATCH)),
    "mocov3": (xavier(PATCH, WIDTH), 0.0),
    "dino": (uniform(1 / math.sqrt(PATCH)), 1 / math.sqrt(PATCH)),
    "dinov2": (uniform(1 / math.sqrt(PATCH)), 1 / math.sqrt(PATCH)),
    "msn": ((math.sqrt(2 / PATCH), INFINITE), 0.0),
    "beit": ((0.02 * CUT, 0.02), 0.0),
}
"""Of the patch projection's weight, and the bound of its bias, which is uniform."""
TOKENS = {"mocov3": (1e-6, INFINITE), "dinov2": (1e-6, INFINITE), "beit": (0.02 * CUT, 0.02)}


def assert_spread(values: Tensor, expected: tuple[float, float]) -> None:
    std, bound = expected
    noise = 4 / math.sqrt(values.numel())  # of an estimate of a standard deviation, more than four times its own
    assert values.std().item() == pytest.approx(std, rel=noise) and abs(values.mean()) < noise * std
    assert values.abs().max() <= bound * (1 + 1e-6)
    assert bound is INFINITE or values.abs().max() > 0.9 * bound or values.numel() < 1000


@pytest.mark.parametrize("kind", KINDS)
def test_first_weights_spread_as_the_authors_code_has_them(kind: str):
    model = vit.create(MICRO, generator=draw(3), initialisation=kind, reg_tokens=4)
    for number, block in enumerate(model.blocks, 1):
        for name in LAYERS:
            part = block.get_submodule(name)
            assert_spread(part.weight, layer(kind, name, number))
            assert (part.bias == 0).all()
        for norm in (block.norm1, block.norm2):
            assert (norm.weight == 1).all() and (norm.bias == 0).all()
    of_patches, of_bias = PATCHES[kind]
    assert_spread(model.patch_embed.proj.weight, of_patches)
    if of_bias:
        assert_spread(model.patch_embed.proj.bias, uniform(of_bias))
    else:
        assert (model.patch_embed.proj.bias == 0).all()
    assert_spread(model.reg_token, TOKENS.get(kind, (0.02, INFINITE)))
    assert_spread(model.cls_token, TOKENS.get(kind, (0.02, INFINITE)))
    assert_spread(model.pos_embed, (0.02 * CUT, 0.02) if kind == "beit" else (0.02, INFINITE))


@pytest.mark.parametrize("kind", KINDS)
def test_first_weights_are_a_function_of_the_seed(kind: str):
    first, again, other = (vit.create(MICRO, generator=draw(seed), initialisation=kind, depth=2) for seed in (5, 5, 6))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.blocks[1].mlp.fc2.weight, other.blocks[1].mlp.fc2.weight)


def test_moco_v3_s_positions_tell_rows_first():
    model = vit.create(MICRO, initialisation="mocov3", positions="sincos", img_size=(24, 16), depth=1)  # 3 x 2 patches
    own, mae = model.pos_embed[0, 1:], sincos_positions(WIDTH, (3, 2))
    assert torch.equal(own, torch.cat([mae[:, WIDTH // 2 :], mae[:, : WIDTH // 2]], 1)) and not torch.equal(own, mae)
    frequencies = 10000.0 ** -(torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    row, column = 2, 1
    expected = torch.cat([f(place * frequencies) for place in (row, column) for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(own[row * 2 + column], expected.float())


def method_on(name: str, kind: str) -> methods.base.Method:
    torch.manual_seed(0)
    settings = methods.get(name).Settings
    sizes = {"projector_hidden": 256, "embedding": 128, "head_hidden": 256, "bottleneck": 128, "decoder_layers": 2}
    return methods.get(name)(vit.create(MICRO, depth=1, initialisation=kind), settings(**small(settings, **sizes)))


def of_torch(layer: torch.nn.Linear) -> None:
    """Uniform in +-1 / sqrt(width that comes in), bias too: the default of torch's linear layers and convolutions."""
    bound = layer.in_features**-0.5
    assert_spread(layer.weight, uniform(bound))
    assert layer.bias is None or 0.8 * bound < layer.bias.abs().max() <= bound


def of_dino(layer: torch.nn.Linear) -> None:
    assert_spread(layer.weight, (0.02, INFINITE))
    assert layer.bias is None or (layer.bias == 0).all()


def linears(module: torch.nn.Module) -> list[torch.nn.Linear]:
    return [part for part in module.modules() if type(part) is torch.nn.Linear]


@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2"])
def test_dino_s_heads_start_as_its_code_has_them(name: str):
    head = method_on(name, "dino").head
    assert len(linears(head)) == 3
    for layer in linears(head):
        of_dino(layer)
    assert (head.last_layer.weight_g == 1).all()
    assert_spread(head.last_layer.weight_v, uniform(128**-0.5))


def test_heads_start_as_their_authors_code_has_them():
    for layer in linears(method_on("msn", "msn").head):
        of_dino(layer)
    mocov3 = method_on("mocov3", "mocov3")
    for layer in (*linears(mocov3.projector), *linears(mocov3.predictor)):
        of_torch(layer)
    of_torch(method_on("simmim", "beit").decoder.mlp[-1])
    for head in method_on("relvit", "dino").heads.values():
        for layer in [head] if isinstance(head, torch.nn.Linear) else linears(head):
            of_torch(layer)
    for layer in linears(method_on("mmc", "dino").projector):  # SiT's
        of_dino(layer)
    for name in (
        "mmc",
        "mim_cluster",
    ):  # SiT's, MC-SSL's: layers, then a transposed convolution, filled by what it puts out
        *hidden, last = linears(method_on(name, "dino").decoder)
        assert len(hidden) == 2
        for layer in hidden:
            of_dino(layer)
        assert_spread(last.weight, uniform(PATCH**-0.5))
        assert 0.8 * PATCH**-0.5 < last.bias.abs().max() <= PATCH**-0.5
    mae = method_on("mae", "mae").decoder
    for layer in (mae.decoder_embed, mae.decoder_pred, mae.decoder_blocks[0].attn.qkv, mae.decoder_blocks[0].mlp.fc2):
        assert_spread(layer.weight, xavier(layer.in_features, layer.out_features))
        assert (layer.bias == 0).all()
    assert_spread(mae.mask_token, (0.02, INFINITE))
    beit = method_on("beit", "beit")
    for weight in (beit.head.weight, beit.mask_token):
        assert_spread(weight, (0.02 * CUT, 0.02))
    assert (beit.head.bias == 0).all()
    assert_spread(method_on("simmim", "beit").mask_token, (0.02 * CUT, 0.02))
    assert (method_on("ibot", "dino").mask_token == 0).all() and (method_on("dinov2", "dinov2").mask_token == 0).all()
