"""What a VisionTransformer is built from, and what of it may be overridden."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from engine.core.errors import BadInput
from engine.model.initialisation import KINDS
from engine.model.positions import INTERPOLATIONS

TIMM_OVERRIDES = (
    "img_size", "patch_size", "depth", "global_pool", "fc_norm", "reg_tokens", "init_values", "no_embed_class",
)  # fmt: skip
OVERRIDES = (
    *TIMM_OVERRIDES, "gated_mlp", "positions", "interpolation", "initialisation", "drop_path", "drop_path_uniform",
)  # fmt: skip
POSITIONS = ("learned", "sincos", "none", "relative")


@dataclass(frozen=True)
class Architecture:
    """What a VisionTransformer is built from. `create(name, **dict(overrides))` gives the same one again."""

    name: str
    overrides: tuple[tuple[str, object], ...]
    img_size: tuple[int, int]
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    qkv_bias: bool
    class_token: bool
    reg_tokens: int
    no_embed_class: bool
    pre_norm: bool
    init_values: float | None
    eps: float
    global_pool: str
    fc_norm: bool
    positions: str
    interpolation: str
    initialisation: str
    drop_path: float
    drop_path_uniform: bool
    gated_mlp: bool

    @property
    def grid(self) -> tuple[int, int]:
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        return self.class_token + self.reg_tokens

    def timm_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of this model under the names of its twin (`engine.model.twins`). timm's BEiT has no bias of keys: it adds
        one number to all scores of a query, which softmax takes away."""
        if self.positions != "relative":
            return dict(state)
        named = {}
        for key, value in state.items():
            if key.endswith(".qkv.bias"):
                query, _, values = value.chunk(3)
                named |= {
                    key.replace("qkv.bias", "q_bias"): query.clone(),
                    key.replace("qkv.bias", "v_bias"): values.clone(),
                }
            else:
                named[re.sub(r"\.ls(\d)\.gamma$", r".gamma_\1", key)] = value
        return named


def check_overrides(overrides: Mapping[str, object]) -> None:
    """BadInput for an override that is unknown or out of range."""
    unknown = [key for key in overrides if key not in OVERRIDES]
    if unknown:
        raise BadInput(f"unknown model override {', '.join(unknown)}: choose among {', '.join(OVERRIDES)}")
    choices_of = {
        "global_pool": ("token", "avg"), "positions": POSITIONS, "interpolation": INTERPOLATIONS, "initialisation": KINDS,
    }  # fmt: skip
    for key, choices in choices_of.items():
        if key in overrides and overrides[key] not in choices:
            raise BadInput(f"{key} {overrides[key]!r} is none of {', '.join(choices)}")
    for key, value in overrides.items():
        try:
            hash(value)
        except TypeError:
            raise BadInput(f"{key} {value!r} is neither text nor numbers") from None
    if not 0 <= overrides.get("drop_path", 0) < 1:
        raise BadInput(f"drop_path {overrides['drop_path']} should lie in [0, 1)")
