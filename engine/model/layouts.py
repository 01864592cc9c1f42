"""How published files spell a backbone: what they wrap it in, what they put before its keys, what lies beside it."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from engine.core.errors import BadInput
from engine.model.sources import Source

State = dict[str, Tensor]
Backbone = tuple[State, str, tuple[str, ...]]  # its tensors, where in the file they were, the keys beside them

# Where published files nest their state dict; the first found is taken, which is the one their authors evaluate.
_CONTAINERS = (
    "teacher", "target_encoder", "state_dict_ema", "model_ema", "model", "state_dict", "model_state_dict", "net", "student",
    "encoder", "module",
)  # fmt: skip
_DEEPEST = 8  # containers in containers; a file may hold itself

_PROJECTION = "patch_embed.proj.weight"  # every backbone has it
# What precedes the backbone's keys in files of whom; the first that leads to a patch projection is taken. Where none does, and
# the file has one patch projection, what precedes that.
_PREFIXES = {
    "": "timm, MAE, MAE-CT, MIM-Refiner, BEiT; backbones of DINO, iBOT and DINOv2",
    "backbone.": "teachers of DINO and iBOT",
    "module.backbone.": "students of DINO and iBOT",
    "teacher.backbone.": "DINOv2 training",
    "module.base_encoder.": "MoCo v3",
    "module.momentum_encoder.": "MoCo v3, momentum encoder alone",
    "module.": "MSN, I-JEPA and others saved from DistributedDataParallel",
    "encoder.": "encoder and decoder in one file",
}
_COMPILED = "_orig_mod."  # what torch.compile puts into keys, wherever a module was compiled

# Other spellings of timm's keys: MIM-Refiner (2), DINOv2 (registers; blocks in chunks), BEiT and DeiT III (LayerScale), DINOv2's
# gated MLPs (2).
_SPELLINGS = (
    (re.compile(r"^cls_tokens\.tokens$"), "cls_token"),
    (re.compile(r"^pos_embed\.embed$"), "pos_embed"),
    (re.compile(r"^register_tokens$"), "reg_token"),
    (re.compile(r"^blocks\.\d+\.(\d+)\."), r"blocks.\1."),
    (re.compile(r"\.gamma_(\d)$"), r".ls\1.gamma"),
    (re.compile(r"\.mlp\.w12\."), ".mlp.fc1."),
    (re.compile(r"\.mlp\.w3\."), ".mlp.fc2."),
)

# How the code that wrote a file interpolates positions (`engine.model.positions.INTERPOLATIONS`), where the way to the backbone
# tells whose that is. A backbone that lies in the file by itself doesn't.
_INTERPOLATIONS = (
    (re.compile(r"(teacher|student)/(module\.)?backbone\.\*"), "offset"),  # DINO, iBOT
    (re.compile(r"(model/)?teacher\.backbone\.\*"), "offset"),  # DINOv2, while it trains
    (re.compile(r"target_encoder/.*"), "bicubic"),  # MSN, I-JEPA
    (re.compile(r"model/(encoder/)?\*"), "bicubic"),  # MAE, DeiT, BEiT; MAE-CT with its decoder
)

# Keys of what was trained along with the backbone.
_OTHER_PARTS = re.compile(
    r"(decoder|head|lm_head|visual\.head)[._]"
    r"|(fc|pred|predictor|projector|prototypes|dino_head|ibot_head|last_layer|attn_pool|head_dist)\."
    r"|(instance_head|local_group_head|group_head|relation_blocks)"
    r"|(mask_token|masked_embed)$"
)


def find_backbone(found: Source) -> Backbone:
    """The backbone's tensors without container and prefix, where they were, and the keys that lie beside them.

    Raises BadInput where there are none, where it is open which are meant, or where one of them is no plain, finite weight.
    """
    tree, place = found.tree, []
    while inner := next((key for key in _CONTAINERS if isinstance(tree.get(key), Mapping)), None):
        tree, place = tree[inner], [*place, inner]
        if len(place) > _DEEPEST:
            raise BadInput(f"{found.name} holds no state dict: its {'/'.join(place[:3])}/... has no end")
    tensors = {
        key.replace(_COMPILED, ""): value
        for key, value in tree.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise BadInput(f"{found.name} holds no state dict: {listing('keys', [str(key) for key in tree])}")
    prefix = _prefix(tensors, found.name)
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    beside = tuple(key for key in tensors if not key.startswith(prefix))
    _check(split_off_other_parts(state)[0], found.name)
    layout = "/".join([*place, prefix + "*"])
    return state, layout, beside


def _prefix(tensors: State, name: str) -> str:
    there = [key.removesuffix(_PROJECTION) for key in tensors if key.endswith(_PROJECTION)]
    known = next((prefix for prefix in _PREFIXES if prefix in there), None)
    if known is not None or not there:
        return known or ""
    if len(there) > 1:
        raise BadInput(f"{name} holds {listing('backbones', there)}: save the one that is meant in a file of its own")
    return there[0]


def _check(state: State, name: str) -> None:
    faults = [f"{key} {fault}" for key, value in state.items() if (fault := _fault(key, value))]
    if faults:
        raise BadInput(f"{name} has tensors of the backbone that cannot be weights: {listing('of them', faults)}")


def _fault(key: str, value: Tensor) -> str:
    """Why a tensor of this name can't be a weight, in words, or nothing."""
    if value.layout != torch.strided or value.is_quantized:
        return "is sparse or quantised"
    if key.endswith(("relative_position_index", "num_batches_tracked")):
        return ""  # counts, which nothing learns
    if not value.is_floating_point():
        return f"is of {str(value.dtype).removeprefix('torch.')}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return "claims more numbers than the file holds"
    return "" if bool(value.isfinite().all()) else "has values that are not finite"


def respell(state: State) -> State:
    """`state` under timm\'s keys."""
    respelt = {}
    for key, value in state.items():
        for pattern, spelling in _SPELLINGS:
            key = pattern.sub(spelling, key)
        respelt[key] = value
    return respelt


def traits(found: Source, state: State, layout: str) -> dict[str, object]:
    """What a backbone tells of the model it was trained as, beside its shapes: overrides of `engine.model.vit.create`.

    Args:
        state, layout: as of `find_backbone`.
    """
    spelt = respell(state)
    registers, told = spelt.get("reg_token"), {}
    if any(key.endswith(".ls1.gamma") for key in spelt):
        told["init_values"] = 1.0  # any: the file's own take its place
    if any(key.endswith(".mlp.w12.weight") for key in state):
        told["gated_mlp"] = True
    if registers is not None and registers.ndim == 3:
        told["reg_tokens"] = registers.shape[1]
    if any(key.startswith("rel_pos_bias.") for key in spelt):
        told["positions"] = "relative"
    if "fc_norm.weight" in spelt and "norm.weight" not in spelt:
        told |= {"global_pool": "avg", "fc_norm": True}
    kind = next((kind for pattern, kind in _INTERPOLATIONS if pattern.fullmatch(layout)), None)
    if "pos_embed.embed" in state or "ctor_kwargs" in found.tree:  # MIM-Refiner, MAE-CT
        kind = "bicubic"
    elif "init_values" in told and getattr(state.get("mask_token"), "ndim", 0) == 2:  # DINOv2, its backbone by itself
        kind = "antialiased" if registers is not None else "offset"
    return told | ({"interpolation": kind} if kind else {})


def split_off_other_parts(state: State) -> tuple[State, tuple[str, ...]]:
    """`state` without decoders, heads and mask tokens, and their keys."""
    others = tuple(key for key in state if _OTHER_PARTS.match(key))
    return {key: value for key, value in state.items() if key not in others}, others


def join_query_and_value_biases(state: State) -> State:
    """BEiT keeps no bias for keys: a zero one is the same."""
    for key in [key for key in state if key.endswith(".attn.q_bias")]:
        query, value = state.pop(key), state.pop(key.replace("q_bias", "v_bias"))
        state[key.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])
    return state


def listing(label: str, keys: Iterable[str], most: int = 3) -> str:
    """How many `keys` there are, under a `label`, and the first few of them."""
    keys = list(keys)
    return f"{len(keys)} {label} ({', '.join(keys[:most])}{', ...' if len(keys) > most else ''})"
