"""A count made by hand: a product, a pass over memory and attention."""

from collections import Counter
from typing import Any

from engine.planning.counting import Count
from engine.planning.peak import PARTS
from engine.planning.traffic import Moved, Work

GB = 10**9


def made(**changes: Any) -> Count:
    rows = (
        Moved("forward, update", "addmm", 2, Counter({Work(GB, 10**12): 2})),
        Moved("backward", "mm", 4, Counter({Work(2 * GB, 10**12): 4})),
        Moved("backward", "triton_gelu", 3, Counter({Work(5 * GB): 3})),
        Moved("forward, update", "packed_attention_forward", 1, Counter({Work(GB, 10**11, "attention"): 1})),
    )
    peak = dict.fromkeys(PARTS, GB) | {"activations": 20 * GB}
    what = {"launches": 10, "rows": rows, "peak": peak, "gradient_bytes": GB, "flops_per_image": 1e9}
    return Count(**what | changes)
