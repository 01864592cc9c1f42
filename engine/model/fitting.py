"""Fits the weights of another model to this one: positions to its grid and prefix tokens, the norm to its pooling; says what
does not fit.

Shapes: C channels, N patches, E prefix tokens that have a position of their own.
"""

from math import isqrt

import torch
from torch import Tensor

from engine.core.errors import BadInput
from engine.model.layouts import State, listing
from engine.model.positions import resampled, resampled_table
from engine.model.sources import Grid, Source
from engine.model.vit import VisionTransformer

_TABLE = "rel_pos_bias.relative_position_bias_table"


def check_patch_size(state: State, model: VisionTransformer, name: str) -> None:
    """BadInput where the file\'s patches have another size than the model\'s."""
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4 and kernel.shape[-1] != model.patch_size:
        raise BadInput(f"{name} has patches of {kernel.shape[-1]} pixels, not {model.patch_size}: set patch_size")


def check_heads(found: Source, layout: str, model: VisionTransformer) -> None:
    """BadInput for MoCo v3's ViT-S in a model of its shapes that has not its heads, which no tensor tells of."""
    theirs = found.tree.get("arch") == "vit_small" and layout.endswith(
        ("module.base_encoder.*", "module.momentum_encoder.*")
    )
    if theirs and model.num_heads != 12:
        raise BadInput(
            f"{found.name} is MoCo v3's ViT-S, whose attention has 12 heads, and {model.architecture.name} has "
            f"{model.num_heads}: choose vit_small_12heads_patch16_224"
        )


def fit_relative_positions(
    state: State, model: VisionTransformer, found: Source
) -> tuple[State, tuple[Grid, Grid] | None]:
    """`state` with the table of relative positions that the model wants, if it wants one, and the grids before and after if they
    differ; BadInput where the file's positions are of another kind."""
    relative = [key for key in state if "relative_position" in key or "rel_pos" in key]
    of_blocks = any(key.startswith("blocks.") for key in relative)
    if of_blocks:
        raise BadInput(
            f"{found.name} has relative position biases for each block, as fine-tuned BEiT has them, and this backbone one table "
            f"for all: {listing('keys', relative)}"
        )
    if relative and model.rel_pos_bias is None:
        raise BadInput(
            f'{found.name} has relative position biases, this model absolute positions: build it with positions="relative" '
            f"({listing('keys', relative)})"
        )
    if model.rel_pos_bias is None:
        return state, None
    absolute = state.get("pos_embed")
    if absolute is not None and absolute.any():
        raise BadInput(
            f"{found.name} has absolute positions, this model relative ones: build it with positions learned or sincos"
        )
    state = {
        key: value for key, value in state.items() if key not in ("pos_embed", "rel_pos_bias.relative_position_index")
    }
    wanted = model.rel_pos_bias.relative_position_bias_table
    table = state.get(_TABLE)
    if table is None or (table.shape == wanted.shape and found.grid in (None, model.grid)):
        return state, None
    side = isqrt(max(0, len(table) - 3))
    grid = found.grid or ((side + 1) // 2,) * 2
    if table.ndim != 2 or len(table) != (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3:
        raise BadInput(f"{found.name} has a table of relative positions of {_shape(table)}, that of no square grid")
    if table.shape[1] == wanted.shape[1]:  # other heads are refused with all that does not fit
        state[_TABLE] = resampled_table(table, grid, model.grid)
    return state, (grid, model.grid)


def own_positions(positions: Tensor, model: VisionTransformer) -> str:
    """Why `model` keeps the positions that it has, in words; nothing where it takes those of the source."""
    kind = model.architecture.positions
    if kind == "none" and positions.any():
        return "the source's positions left out, since the model has none"
    if kind in ("learned", "sincos") and not positions.any():
        return f"the model's own {kind} positions kept, since the source was trained without any"
    return ""


def fit_positions(state: State, model: VisionTransformer, found: Source) -> tuple[State, tuple[Grid, Grid] | None]:
    """`state` with positions for the model's grid and prefix tokens, and the grids before and after if they differ."""
    positions, grid = state["pos_embed"], found.grid
    if positions.ndim == 4:
        grid, positions = tuple(positions.shape[1:3]), positions.flatten(1, 2)
    if positions.ndim != 3 or len(positions) != 1:
        raise BadInput(f"{found.name} has positions of shape {list(positions.shape)}, not [1, tokens, channels]")
    cls, registers = (state[key].shape[1] if key in state else 0 for key in ("cls_token", "reg_token"))
    prefix, grid = _read_positions(positions.shape[1], (cls + registers, cls, 0), grid, model, found.name)
    prefix_1EC, patches_1NC = positions[:, :prefix], positions[:, prefix:]
    moved = None if grid == model.grid else (grid, model.grid)
    if moved and positions.shape[2] == model.embed_dim:  # another width is refused with all that does not fit
        patches_1NC = resampled(patches_1NC[0], *moved, model.architecture.interpolation)[None]
    state = dict(state)
    if model.no_embed_class:
        if prefix:
            state["cls_token"] = state["cls_token"] + prefix_1EC[:, :cls]
        if prefix > cls:
            state["reg_token"] = state["reg_token"] + prefix_1EC[:, cls:]
        state["pos_embed"] = patches_1NC
    else:
        without = patches_1NC.new_zeros(1, max(0, model.num_prefix_tokens - prefix), patches_1NC.shape[2])
        state["pos_embed"] = torch.cat([prefix_1EC[:, : model.num_prefix_tokens], without, patches_1NC], dim=1)
    return state, moved


def _read_positions(
    rows: int, prefixes: tuple[int, ...], grid: Grid | None, model: VisionTransformer, name: str
) -> tuple[int, Grid]:
    """How many of `rows` positions belong to prefix tokens, and which grid the others form."""
    own = 0 if model.no_embed_class else model.num_prefix_tokens
    if grid is None and own in prefixes and rows - own == model.grid[0] * model.grid[1]:
        return own, model.grid
    squares = [(prefix, (isqrt(max(0, rows - prefix)),) * 2) for prefix in prefixes]
    for prefix, (height, width) in [(prefix, grid) for prefix in prefixes if grid] + squares:
        if rows > prefix and height * width == rows - prefix:
            return prefix, (height, width)
    raise BadInput(f"{name} has {rows} positions, no square grid with or without its {prefixes[0]} prefix tokens")


def exchange_norm(state: State, model: VisionTransformer) -> tuple[State, tuple[str, ...]]:
    """`state` with the model's norm after pooling for the source's before it, and the keys that this takes the place of."""
    own = {key: value.detach() for key, value in model.state_dict().items() if key.startswith("fc_norm.")}
    norms = tuple(key for key in state if key.startswith("norm."))
    if not own or not norms or own.keys() & state.keys():
        return state, ()
    return {key: value for key, value in state.items() if key not in norms} | own, norms


def compare(state: State, model: VisionTransformer, name: str, strict: bool) -> tuple[tuple[str, ...], ...]:
    """Missing and unexpected keys; BadInput where they or the shapes forbid loading."""
    wanted = model.state_dict()
    missing = tuple(key for key in wanted if key not in state)
    unexpected = tuple(key for key in state if key not in wanted)
    differing = [
        f"{key} is {_shape(state[key])}, not {_shape(wanted[key])}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    if differing or len(missing) == len(wanted) or (strict and (missing or unexpected)):
        groups = {"of another shape": differing, "missing": missing, "unexpected": unexpected}
        faults = "; ".join(listing(label, keys) for label, keys in groups.items() if keys)
        raise BadInput(f"{name} does not fit {model.architecture.name}, choose the model it was trained as: {faults}")
    return missing, unexpected


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
