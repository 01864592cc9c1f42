"""Files as their authors publish them, with random values, by what `--weights FILE --model NAME` of engine.eval calls: features
equal a plain restatement of the authors' forward pass, at the size they were trained at and at others.

Containers and keys are those that the authors' code saves and loads. Shapes: C width, N patches, R registers, H heads, L tokens.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from engine.core.errors import BadInput
from engine.evals.command_line import Eval
from engine.evals.encoders import encoder
from engine.model import weights
from tests.model.tables import as_beit_s_code

State = dict[str, Tensor]
Grid = tuple[int, int]
MODEL, WIDTH, DEPTH, HEADS, PATCH, SIDE = "vit_micro_patch8_32", 128, 6, 4, 8, 4  # images of 32 pixels, 4 x 4 patches
GATED = 344  # two thirds of 4 * WIDTH, in eights
WIDER = {"native": (32, 32), "larger": (56, 56), "not square": (40, 72)}


def draw(*shape: int, scale: float = 0.05, about: float = 0.0) -> Tensor:
    """Of torch's own generator, which every test begins anew."""
    return about + scale * torch.randn(shape)


def linear(name: str, out: int, of: int) -> State:
    return {f"{name}.weight": draw(out, of), f"{name}.bias": draw(out)}


def norm(name: str, width: int = WIDTH) -> State:
    return {f"{name}.weight": draw(width, scale=0.2, about=1.0), f"{name}.bias": draw(width, scale=0.2)}


def block(width: int = WIDTH) -> State:
    parts = [("attn.qkv", 3 * width, width), ("attn.proj", width, width)]
    parts += [("mlp.fc1", 4 * width, width), ("mlp.fc2", width, 4 * width)]
    found = norm("norm1", width) | norm("norm2", width)
    for part in parts:
        found |= linear(*part)
    return found


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def backbone(width: int = WIDTH, depth: int = DEPTH, patch: int = PATCH, side: int = SIDE) -> State:
    """As DINO, iBOT, MSN, MAE and MoCo v3 spell it."""
    state = {"cls_token": draw(1, 1, width), "pos_embed": draw(1, 1 + side * side, width, scale=0.5)}
    state |= {"patch_embed.proj.weight": draw(width, 3, patch, patch), "patch_embed.proj.bias": draw(width)}
    for index in range(depth):
        state |= prefixed(f"blocks.{index}.", block(width))
    return state | norm("norm", width)


def layer_scale(state: State, first: str, second: str) -> State:
    """With LayerScale of these names in every block."""
    scales = {f"blocks.{i}.{name}": draw(WIDTH, scale=0.3, about=1.0) for i in range(DEPTH) for name in (first, second)}
    return state | scales


# What the authors' code computes, of a backbone in the common spelling: timm's, with scales of branches as gamma_1 and gamma_2.


@dataclass
class Read:
    """A backbone in the common spelling: `class_place_C` is added to its class token, which `registers_RC` follow as they are."""

    state: State
    places_NC: Tensor
    class_place_C: Tensor | float = 0.0
    registers_RC: Tensor | None = None
    bias_HLL: Tensor | None = None
    heads: int = HEADS


def tokens_of(read: Read, images: Tensor) -> Tensor:
    """All tokens after the final norm, or, where there is none, after the last block."""
    state, patch = read.state, read.state["patch_embed.proj.weight"].shape[-1]
    x_BNC = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x_BNC = x_BNC.flatten(2).transpose(1, 2) + read.places_NC
    first_1C = state["cls_token"][0] + read.class_place_C
    leading = first_1C if read.registers_RC is None else torch.cat([first_1C, read.registers_RC])
    x = torch.cat([leading.expand(len(x_BNC), -1, -1), x_BNC], dim=1)
    for index in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))):
        x = after_block(x, {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"blocks.{index}.")}, read)
    return normed(x, state, "norm") if "norm.weight" in state else x


def normed(x: Tensor, state: State, name: str) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def after_block(x: Tensor, of: State, read: Read) -> Tensor:
    length, width = x.shape[1:]
    qkv = normed(x, of, "norm1") @ of["attn.qkv.weight"].T + of["attn.qkv.bias"]
    q, k, v = qkv.reshape(-1, length, 3, read.heads, width // read.heads).permute(2, 0, 3, 1, 4)
    scores = (q * (width // read.heads) ** -0.5) @ k.transpose(-2, -1)
    if read.bias_HLL is not None:
        scores = scores + read.bias_HLL
    attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, length, width)
    x = x + of.get("gamma_1", 1.0) * (attended @ of["attn.proj.weight"].T + of["attn.proj.bias"])
    if "mlp.w12.weight" in of:
        gate, value = (normed(x, of, "norm2") @ of["mlp.w12.weight"].T + of["mlp.w12.bias"]).split(GATED, dim=-1)
        change = (value * gate / (1 + (-gate).exp())) @ of["mlp.w3.weight"].T + of["mlp.w3.bias"]
    else:
        hidden = normed(x, of, "norm2") @ of["mlp.fc1.weight"].T + of["mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        change = hidden @ of["mlp.fc2.weight"].T + of["mlp.fc2.bias"]
    return x + of.get("gamma_2", 1.0) * change


def by_size(places_NC: Tensor, old: int, new: Grid, **options: Any) -> Tensor:
    """MAE, DeiT and BEiT when they load, MAE-CT and MIM-Refiner as they go, DINOv2 with registers: to a size in patches."""
    return moved(places_NC, old, new, size=new, **options)


def with_offset(places_NC: Tensor, old: int, new: Grid) -> Tensor:
    """DINO, iBOT, DINOv2: by a scale that has a tenth of a patch too much."""
    return moved(places_NC, old, new, scale_factor=tuple((n + 0.1) / old for n in new))


def by_area(places_NC: Tensor, old: int, new: Grid) -> Tensor:
    """MSN, which knows squares only: by the root of the ratio of patches."""
    return moved(places_NC, old, new, scale_factor=math.sqrt(new[0] * new[1] / old**2))


def moved(places_NC: Tensor, old: int, new: Grid, **how: Any) -> Tensor:
    if new == (old, old):
        return places_NC
    image = places_NC.T.reshape(1, -1, old, old)
    return F.interpolate(image, mode="bicubic", **how)[0].flatten(1).T


Move = Callable[[Tensor, int, Grid], Tensor]


def plainly(move: Move, state: State, new: Grid) -> Read:
    """Positions of class token and patches in one table; the class token's is left alone."""
    places = state["pos_embed"][0]
    return Read(state, move(places[1:], math.isqrt(len(places) - 1), new), places[0])


# The files. Each function takes what its code saves as the backbone, and returns what lies in the file.


def of_mae(state: State) -> dict:
    """mae_pretrain_vit_*.pth."""
    return {"model": state}


def of_mae_with_decoder(state: State) -> dict:
    """mae_visualize_vit_*.pth, and what pre-training saves."""
    decoder = {"mask_token": draw(1, 1, 64), "decoder_pos_embed": draw(1, 17, 64)} | norm("decoder_norm", 64)
    decoder |= linear("decoder_embed", 64, WIDTH) | linear("decoder_pred", 192, 64)
    decoder |= prefixed("decoder_blocks.0.", block(64))
    other = {"optimizer": {"state": {}, "param_groups": []}, "epoch": 799, "scaler": {"scale": 65536.0}}
    return {"model": state | decoder} | other | {"args": argparse.Namespace(mask_ratio=0.75, norm_pix_loss=True)}


def of_mae_finetuned(state: State) -> dict:
    """mae_finetuned_vit_*.pth: the mean of patches, and a norm after it."""
    return {"model": state | linear("head", 10, WIDTH)}


def of_dino(state: State) -> dict:
    """dino_*_pretrain_full_checkpoint.pth: the teacher is meant."""
    head = {f"mlp.{layer}.weight": draw(64, WIDTH) for layer in (0, 2, 4)}
    head |= {"last_layer.weight_g": draw(32, 1), "last_layer.weight_v": draw(32, 64)}
    student = prefixed("module.backbone.", backbone()) | prefixed("module.head.", head)
    teacher = prefixed("backbone.", state) | prefixed("head.", head)
    other = {"optimizer": {"state": {}, "param_groups": []}, "epoch": 100, "args": argparse.Namespace(arch="vit_small")}
    return {"student": student, "teacher": teacher, "dino_loss": {"center": draw(1, 32)}, "fp16_scaler": {}} | other


def of_ibot(state: State) -> dict:
    """checkpoint.pth, "full ckpt" in its README."""
    tree = of_dino(state)
    tree["student"]["module.backbone.masked_embed"] = draw(1, WIDTH)
    tree["teacher"] |= {"head.last_layer2.weight_g": draw(32, 1), "head.last_layer2.weight_v": draw(32, 64)}
    return tree | {"ibot_loss": {"center": draw(1, 32), "center2": draw(1, 1, 32)}}


def of_msn(state: State) -> dict:
    """vits16_800ep.pth.tar: the target encoder is meant; either has its projection as fc."""
    head = linear("fc.fc1", 64, WIDTH) | linear("fc.fc2", 64, 64) | linear("fc.fc3", 32, 64)
    for name in ("fc.bn1", "fc.bn2"):
        moments = {f"{name}.running_mean": draw(64), f"{name}.running_var": draw(64).abs()}
        head |= norm(name, 64) | moments | {f"{name}.num_batches_tracked": torch.tensor(7)}
    found = {"encoder": backbone() | head, "target_encoder": state | head}
    found = {name: prefixed("module.", tensors) for name, tensors in found.items()}
    return found | {"opt": {"state": {}}, "prototypes": draw(16, 32), "epoch": 800, "loss": 1.0, "lr": 1e-3}


def of_moco(state: State, arch: str = "vit_base") -> dict:
    """vit-*-300ep.pth.tar: the base encoder is meant, whose head is its projector."""
    found = {}
    for name, tensors in (("base_encoder", state), ("momentum_encoder", backbone())):
        head = {"head.0.weight": draw(64, WIDTH), "head.3.weight": draw(64, 64)} | norm("head.1", 64)
        found |= prefixed(f"module.{name}.", tensors | head | {"head.1.num_batches_tracked": torch.tensor(7)})
    found |= {"module.predictor.0.weight": draw(64, 32)} | norm("module.predictor.1", 64)
    other = {"optimizer": {"state": {}, "param_groups": []}, "scaler": {"scale": 65536.0}}
    return {"epoch": 300, "arch": arch, "state_dict": found} | other


def of_dinov2_while_it_trains(state: State) -> dict:
    """teacher_checkpoint.pth: blocks in chunks of its sharding."""
    chunked = {key.replace("blocks.", f"blocks.{int(key.split('.')[1]) // 3}.") if key.startswith("blocks.") else key: value
               for key, value in state.items()}  # fmt: skip
    heads = {f"{name}.mlp.0.weight": draw(64, WIDTH) for name in ("dino_head", "ibot_head")}
    return {"teacher": prefixed("backbone.", chunked) | heads}


def of_maect(state: State) -> dict:
    """maect_*.th: positions of patches alone."""
    made = {"patch_size": PATCH, "embedding_dim": WIDTH, "depth": DEPTH, "attention_heads": HEADS}
    return {"state_dict": state, "ctor_kwargs": made}


def of_mim_refiner(state: State) -> dict:
    """maerefined_*.th."""
    return {"state_dict": state, "ctor_kwargs": {"patch_size": PATCH, "dim": WIDTH}, "ckpt": {"epoch": 30}}


def of_beit(state: State) -> dict:
    """beit_*_patch16_224_pt22k.pth."""
    beside = {"mask_token": draw(1, 1, WIDTH)} | linear("lm_head", 40, WIDTH)
    return {"model": state | beside}


def maect_backbone() -> State:
    state = backbone()
    return state | {"pos_embed": state["pos_embed"][:, 1:]}


def read_maect(state: State, new: Grid) -> Read:
    return Read(state, by_size(state["pos_embed"][0], SIDE, new))


def refined_backbone() -> State:
    state = backbone()
    places = state.pop("pos_embed")[:, 1:].unflatten(1, (SIDE, SIDE))
    return state | {"cls_tokens.tokens": state.pop("cls_token"), "pos_embed.embed": places}


def read_refined(state: State, new: Grid) -> Read:
    places = state["pos_embed.embed"].flatten(1, 2)[0]
    return Read(state | {"cls_token": state["cls_tokens.tokens"]}, by_size(places, SIDE, new))


def dinov2_backbone(registers: int = 0) -> State:
    state = layer_scale(backbone(), "ls1.gamma", "ls2.gamma") | {"mask_token": draw(1, WIDTH)}
    return state | ({"register_tokens": draw(1, registers, WIDTH)} if registers else {})


def gated_dinov2_backbone() -> State:
    """Of its giant, and of a ViT-L/14 that trained from the start."""
    state = {key: value for key, value in dinov2_backbone().items() if ".mlp." not in key}
    for index in range(DEPTH):
        state |= linear(f"blocks.{index}.mlp.w12", 2 * GATED, WIDTH) | linear(f"blocks.{index}.mlp.w3", WIDTH, GATED)
    return state


def read_dinov2(state: State, new: Grid) -> Read:
    common = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for key, v in state.items()}
    registers = state.get("register_tokens")
    read = plainly(with_offset if registers is None else partial(by_size, antialias=True), common, new)
    read.registers_RC = None if registers is None else registers[0]
    return read


def beit_backbone() -> State:
    """As pre-trained: biases of queries and values alone, one table of relative positions with its index."""
    state = layer_scale(backbone(), "gamma_1", "gamma_2")
    del state["pos_embed"]
    for index in range(DEPTH):
        query, _, value = state.pop(f"blocks.{index}.attn.qkv.bias").chunk(3)
        state |= {f"blocks.{index}.attn.q_bias": query, f"blocks.{index}.attn.v_bias": value}
    state["rel_pos_bias.relative_position_bias_table"] = draw((2 * SIDE - 1) ** 2 + 3, HEADS, scale=0.5)
    return state | {"rel_pos_bias.relative_position_index": offsets(SIDE)}


def offsets(side: int) -> Tensor:
    """Int64 [L, L]: the row of the table for who asks (row) whom (column)."""
    last = (2 * side - 1) ** 2
    index = torch.full((1 + side * side, 1 + side * side), last)
    index[:, 0], index[0, 0] = last + 1, last + 2
    for asks in range(side * side):
        for asked in range(side * side):
            down, right = asks // side - asked // side, asks % side - asked % side
            index[1 + asks, 1 + asked] = (down + side - 1) * (2 * side - 1) + right + side - 1
    return index


def read_beit(state: State, new: Grid) -> Read:
    common = dict(state)
    for index in range(DEPTH):
        query, value = (state[f"blocks.{index}.attn.{name}"] for name in ("q_bias", "v_bias"))
        common[f"blocks.{index}.attn.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    table = state["rel_pos_bias.relative_position_bias_table"]
    if new != (SIDE, SIDE):
        table = as_beit_s_code(table, (SIDE, SIDE), new)
    bias_HLL = table[offsets(new[0])].permute(2, 0, 1)
    return Read(common, torch.zeros(new[0] * new[1], WIDTH), bias_HLL=bias_HLL)


@dataclass
class File:
    """One kind of published file.

    write: the backbone -> what lies in the file; move or read: how its code gets to positions of a grid; sizes: those of `WIDER`
    that its code can do; flags: of engine.eval, where the layout doesn't tell all; pool: what its authors judge.
    """

    name: str
    write: Callable[[State], dict]
    read: Callable[[State, Grid], Read]
    backbone: Callable[[], State] = backbone
    sizes: tuple[str, ...] = tuple(WIDER)
    flags: dict[str, Any] = field(default_factory=dict)
    pool: str = "token"
    suffix: str = ".pth"


SQUARE = ("native", "larger")
FILES = [
    File("MAE", of_mae, partial(plainly, by_size), sizes=SQUARE),
    File("MAE, with its decoder", of_mae_with_decoder, partial(plainly, by_size), sizes=SQUARE),
    File("MAE-CT", of_maect, read_maect, maect_backbone, suffix=".th"),
    File("MIM-Refiner", of_mim_refiner, read_refined, refined_backbone, suffix=".th"),
    File("DINO", of_dino, partial(plainly, with_offset)),
    File("DINO, backbone", dict, partial(plainly, with_offset), flags={"interpolation": "offset"}),
    File("iBOT", of_ibot, partial(plainly, with_offset)),
    File("iBOT, backbone", lambda state: {"state_dict": state}, partial(plainly, with_offset), flags={"interpolation": "offset"}),
    File("MSN", of_msn, partial(plainly, by_area), sizes=SQUARE, suffix=".pth.tar"),
    File("MoCo v3", of_moco, partial(plainly, by_size), sizes=("native",), suffix=".pth.tar"),
    File("DINOv2", dict, read_dinov2, dinov2_backbone),
    File("DINOv2, registers", dict, read_dinov2, partial(dinov2_backbone, 4)),
    File("DINOv2, teacher while it trains", of_dinov2_while_it_trains, read_dinov2, dinov2_backbone),
    File("DINOv2, registers, as safetensors", dict, read_dinov2, partial(dinov2_backbone, 4), suffix=".safetensors"),
    File("DINOv2, gated MLPs", dict, read_dinov2, gated_dinov2_backbone),
    File("BEiT", of_beit, read_beit, beit_backbone, sizes=SQUARE, pool="avg"),
]  # fmt: skip


def saved(file: File, state: State, folder: Path) -> Path:
    path = folder / f"weights{file.suffix}"
    (save_file if file.suffix == ".safetensors" else torch.save)(file.write(state), path)
    return path


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "size"), [(file, size) for file in FILES for size in file.sizes], ids=lambda v: getattr(v, "name", v)
)
def test_features_are_those_of_the_authors_code(file: File, size: str, tmp_path: Path):
    state, (height, width) = file.backbone(), WIDER[size]
    path, images = saved(file, state, tmp_path), torch.randn(2, 3, height, width)
    expected = tokens_of(file.read(state, (height // PATCH, width // PATCH)), images)
    prefix = expected.shape[1] - height * width // PATCH**2
    of_size = {} if size == "native" else {"image_size": (height, width)}
    flags = Eval(weights=(str(path),), model=MODEL, pool=file.pool, **of_size, **file.flags)
    _, found = encoder(str(path), flags, torch.device("cpu"))
    pooled = expected[:, 0] if file.pool == "token" else expected[:, prefix:].mean(1)
    torch.testing.assert_close(found.encode(images), pooled, atol=1e-5, rtol=1e-5)
    # images of that size in a model of the size that the file has; relative positions are those of one size
    model, report = weights.create(path, MODEL, **file.flags)
    assert not report.missing + report.unexpected and report.resampled is None
    if size == "native" or model.rel_pos_bias is None:
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_mean_of_patches_of_a_fine_tuned_mae_is_normed_as_by_its_code(tmp_path: Path):
    state = backbone()
    state |= {key.replace("norm.", "fc_norm."): state.pop(key) for key in ("norm.weight", "norm.bias")}
    torch.save(of_mae_finetuned(state), tmp_path / "mae_finetuned.pth")
    images = torch.randn(2, 3, 32, 32)
    path = str(tmp_path / "mae_finetuned.pth")
    _, found = encoder(path, Eval(weights=(path,), model=MODEL), torch.device("cpu"))
    tokens = tokens_of(plainly(by_size, state, (SIDE, SIDE)), images)
    expected = normed(tokens[:, 1:].mean(1), state, "fc_norm")
    torch.testing.assert_close(found.encode(images), expected, atol=1e-5, rtol=1e-5)


def test_norms_after_the_branches_are_refused(tmp_path: Path):
    """dbotrefined_*.th are as MAE's, d2v2refined_*.th are not: they have a norm before the blocks and none after them."""
    state = refined_backbone()
    state |= {key.replace("norm.", "embed_norm."): state.pop(key) for key in ("norm.weight", "norm.bias")}
    torch.save(of_mim_refiner(state), tmp_path / "d2v2refined_l16.th")
    with pytest.raises(BadInput, match=r"2 missing \(norm.weight, norm.bias\); 2 unexpected \(embed_norm.weight"):
        weights.create(tmp_path / "d2v2refined_l16.th", MODEL)


@torch.no_grad()
def test_moco_s_small_model_has_twelve_heads_and_is_refused_by_one_of_six(tmp_path: Path):
    state = backbone(width=384, depth=1, patch=16, side=14)
    torch.save(of_moco(state, "vit_small"), tmp_path / "vit-s-300ep.pth.tar")
    with pytest.raises(
        BadInput, match="12 heads, and vit_small_patch16_224 has 6: choose vit_small_12heads_patch16_224"
    ):
        weights.create(tmp_path / "vit-s-300ep.pth.tar", "vit_small_patch16_224", depth=1)
    model, _ = weights.create(tmp_path / "vit-s-300ep.pth.tar", "vit_small_12heads_patch16_224", depth=1)
    images, read = torch.randn(2, 3, 224, 224), plainly(by_size, state, (14, 14))
    read.heads = 12
    torch.testing.assert_close(model(images), tokens_of(read, images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "other"), [("DINO", by_size), ("MAE", with_offset), ("DINOv2, registers", with_offset)]
)
def test_another_way_to_interpolate_would_be_seen(file: str, other: Move, tmp_path: Path):
    file = next(each for each in FILES if each.name == file)
    state, images = file.backbone(), torch.randn(2, 3, 56, 56)
    read = file.read(state, (7, 7))
    model, _ = weights.create(saved(file, state, tmp_path), MODEL)
    read.places_NC = other(state["pos_embed"][0, 1:], SIDE, (7, 7))
    assert (model(images) - tokens_of(read, images)).abs().max() > 1e-3
