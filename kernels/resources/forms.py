"""The forms that the pipe model knows: which code runs, how many programs, and how often their loops turn, by shape.

Sizes are those of published recipes: 2^20 tokens in 16 heads, 4,096 queries against a queue of 65,536, heads of 65,536
prototypes. Ratios to the floor hardly depend on how many rows there are.
"""

import importlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import ceil
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch

from kernels import library
from kernels.compiled import Variant, compiled_for, tool
from kernels.cost import Cost
from kernels.resources.pipes import Code, Trips, Unmodelled, demand, disassemble, frequencies, milliseconds, parse
from kernels.resources.rates import Rates

TOKENS, HEADS = 2**20, 16
# tokens and head dims of MAE's encoder and decoder, of ViT-L/16, L/14 and H/14
ATTENTION_SHAPES = ((50, 64), (50, 80), (197, 32), (197, 64), (197, 80), (257, 32), (257, 64), (257, 80))
ROWS, QUEUE, CHANNELS, PROTOTYPES, WHOLE_ROW = 4096, 65536, 256, 65536, 8192
IMAGES, PATCHES, RELATION_TOKENS, RELATION_CHANNELS = 256, 147, 64, 42
# a form that rises above its stored ratio by more than this has become worse; compilers move a few instructions
WORSE = 1.05
# sequences that share a program, whose loops over their neighbours the compiler unrolls in ways of its own
_GROUPED = "its loops over neighbouring sequences are unrolled in parts, whose shares the shape doesn't tell"


class Launch(NamedTuple):
    """One kernel: `code` is a Variant to compile, or the library that holds it and a pattern of its mangled name."""

    code: Variant | tuple[Path, str]
    programs: float
    warps: int
    trips: tuple[Trips, ...] = ()


class Form(NamedTuple):
    """An implementation of an op at a shape, or why it is not modelled."""

    op: str
    name: str
    shape: str
    floor: Cost
    launches: tuple[Launch, ...] = ()
    obstacle: str = ""


class Modelled(NamedTuple):
    """Milliseconds by pipe, and of the floor: what must be moved or multiplied at the chip's rates."""

    pipes: dict[str, float]
    floor: float

    @property
    def largest(self) -> str:
        return max(self.pipes, key=self.pipes.get)

    @property
    def ratio(self) -> float:
        """The busiest pipe's time over the floor; 1 where that is below the floor, since then memory decides."""
        return max(1.0, self.pipes[self.largest] / self.floor)


def model(form: Form, rates: Rates) -> Modelled:
    """What a form's launches ask of a chip together; Unmodelled, with the reason, where that can't be derived."""
    if form.obstacle:
        raise Unmodelled(form.obstacle)
    total: Counter = Counter()
    for launch in form.launches:
        code = _code(launch.code, rates.capability)
        for kind, amount in demand(code, frequencies(code, launch.trips)).items():
            total[kind] += amount * launch.warps * launch.programs
    return Modelled(milliseconds(total, rates), form.floor.floor_seconds(rates.dram, rates.flops) * 1e3)


def _code(source: Variant | tuple[Path, str], capability: int) -> Code:
    if isinstance(source, Variant):
        return parse(disassemble(compiled_for(source, capability).asm["cubin"]))
    # a large library takes seconds, and several forms ask for the same kernel
    with _one_at_a_time:
        return parse(_library_code(*source, capability))


_one_at_a_time = Lock()


@cache
def _library_code(path: Path, kernel: str, capability: int) -> str:
    """The machine code of the one kernel whose mangled name has this pattern."""
    chip = "sm_90a" if capability == 90 and path == library.LIBRARY else f"sm_{capability}"
    names = {name for name in _kernels_of(path, chip) if re.search(kernel, name)}
    if len(names) != 1:
        raise Unmodelled(f"{path.name} has {len(names)} kernels like {kernel} for {chip}")
    return tool("cuobjdump", "-arch", chip, "-sass", "-fun", names.pop(), str(path))


@cache
def _kernels_of(path: Path, chip: str) -> list[str]:
    if not path.is_file():
        raise Unmodelled(f"there is no {path.name}: {_ABSENT[path.name]}")
    symbols = tool("cuobjdump", "-arch", chip, "-symbols", str(path)).splitlines()
    return [line.split()[-1] for line in symbols if "STO_ENTRY" in line]


_TORCH = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
_ABSENT = {library.LIBRARY.name: "the CUDA kernels are not built", _TORCH.name: "this torch is not for CUDA"}


def forms(op: str, rates: Rates) -> list[Form]:
    """All forms of an op on a chip."""
    return list(_FORMS[op](rates))


def table(ops: Sequence[str], chips: Sequence[Rates], workers: int, only: str = "") -> list[dict[str, Any]]:
    """A row for each form and chip: "ratio" and "largest" pipe, "floor" and "pipes" in ms; or "not_modelled", why. With
    `only`, a regular expression, the forms whose "OP: FORM: SHAPE" it is found in."""
    jobs = [(form, rates) for op in ops for rates in chips for form in forms(op, rates)]
    jobs = [(form, rates) for form, rates in jobs if re.search(only, f"{form.op}: {form.name}: {form.shape}")]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda job: _row(*job), jobs))


def stored(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of the Triton forms that are modelled the ratio to the floor, by chip and "OP: FORM: SHAPE"."""
    result: dict[str, dict[str, float]] = {}
    for row in rows:
        if "ratio" in row and row["form"].startswith("Triton"):
            result.setdefault(row["chip"], {})[f"{row['op']}: {row['form']}: {row['shape']}"] = round(row["ratio"], 3)
    return result


def worsened(rows: Sequence[dict[str, Any]], before: dict[str, dict[str, float]]) -> list[str]:
    """In sentences, which forms have a busiest pipe further above the floor than `before` by more than WORSE, or are new
    or no longer modelled; only the chips and forms of `rows` are looked at."""
    now, found = stored(rows), []
    for row in rows:
        name, chip = f"{row['op']}: {row['form']}: {row['shape']}", row["chip"]
        if not row["form"].startswith("Triton"):
            continue
        was, ratio = before.get(chip, {}).get(name), now.get(chip, {}).get(name)
        if was is None and ratio is not None:
            found.append(f"{name} on {chip} is not in the stored table: {ratio:.2f} times the floor now")
        elif was is not None and ratio is None:
            found.append(f"{name} on {chip} is not modelled any more: {row['not_modelled']}")
        elif was is not None and ratio > was * WORSE:
            found.append(
                f"{name} on {chip} took {was:.2f} times the floor and takes {ratio:.2f} now ({row['largest']})"
            )
    return found


def _row(form: Form, rates: Rates) -> dict[str, Any]:
    row = {"op": form.op, "form": form.name, "shape": form.shape, "chip": rates.name}
    try:
        found = model(form, rates)
    except Unmodelled as reason:
        return row | {"not_modelled": str(reason)}
    return row | {"ratio": found.ratio, "largest": found.largest, "floor": found.floor, "pipes": found.pipes}


def _triton(op: str):
    return importlib.import_module(f"kernels.{op}.triton")


def _variant(op: str, name: str, capability: int) -> Variant:
    return next(variant for variant in _triton(op).variants(capability) if variant.name == name)


def _packed_attention(rates: Rates) -> Iterator[Form]:
    for tokens, dim in ATTENTION_SHAPES:
        for number, direction in enumerate(("forward", "backward")):
            yield attention_in_triton(direction, tokens, dim, rates, number)
    for tokens, dim in ATTENTION_SHAPES:
        for number, direction in enumerate(("forward", "backward")):
            yield _attention_in_cuda(direction, tokens, dim, rates, number)
    for tokens, dim in ATTENTION_SHAPES:
        # head dim 80 runs in kernels for 96, with a part of the columns masked
        for number, direction in enumerate(("forward", "backward") if dim != 80 else ()):
            yield _attention_in_torch(direction, tokens, dim, number)
    yield Form("packed_attention", "Triton, grouped", "16 tokens", Cost(0, 0), obstacle=_GROUPED)


def _attention_floor(tokens: int, dim: int, number: int) -> Cost:
    cost = importlib.import_module("kernels.packed_attention").cost
    return cost([tokens] * (TOKENS // tokens), HEADS, dim, 2)[number]


def attention_in_triton(direction: str, tokens: int, dim: int, rates: Rates, number: int) -> Form:
    """What a batch of equal lengths in bf16 launches."""
    module = _triton("packed_attention")
    (form,) = module.ladder(direction, dim, torch.bfloat16, rates.capability, tokens, equal=True)
    chosen = module.config(direction, form, dim, torch.bfloat16, rates.capability)
    variant = module._variant(direction, form, dim, torch.bfloat16, rates.capability)
    programs, blocks = TOKENS // tokens * HEADS, ceil(tokens / chosen.rows)
    if form.pieces:
        launch = Launch(variant, programs, chosen.warps, (Trips(blocks, may_vanish=blocks == 1),))
    elif direction == "forward":
        launch = Launch(variant, programs * blocks, chosen.warps, (Trips(ceil(tokens / chosen.step)),))
    else:
        # half of the programs own keys, half queries
        role = Trips(ceil(tokens / chosen.step), 0.5)
        launch = Launch(variant, programs * blocks * 2, chosen.warps, (role, role))
    floor = _attention_floor(tokens, dim, number)
    return Form("packed_attention", f"Triton, {direction}", f"{tokens} tokens, D {dim}", floor, (launch,))


def _attention_in_cuda(direction: str, tokens: int, dim: int, rates: Rates, number: int) -> Form:
    """The loops of csrc/packed_attention.cu, in its order."""
    tiles, form = ceil(tokens / 16), ""
    if direction == "forward":
        warps = ceil(tiles / ceil(tiles / 8))
        stage, each, never = Trips(tiles / warps), Trips(tiles / warps), Trips(0, 0)
        trips = (stage, stage, each, Trips(tiles / 4), never, never)
    else:
        together = 2 if dim <= 64 else 1
        warps = min(ceil(tiles / together), {32: 6, 64: 4}.get(dim, 8))
        stage = Trips(tiles / warps)
        shared = tiles * (16 * 2 * 2 * (88 if dim == 80 else dim) + 128)
        resident = 2 * (2 * shared + 128 + 1024) <= {80: 164, 90: 228}[rates.capability] * 1024
        row_dots = (Trips(2 * tiles / warps), Trips(ceil(dim / 32), may_vanish=dim == 32))
        # first as many tiles at once as a warp owns, then the last one alone
        owned = [Trips(tiles // together / warps), Trips(tiles % together / warps)][:together]
        keys = [trip for own in owned for trip in (own, Trips(tiles))]
        queries = [trip for own in owned for trip in (own, Trips(tokens // 16))]
        both = (stage, stage)
        trips = (Trips(0), Trips(0), *both, *(both if resident else ()), *row_dots, *keys)
        trips += (*(() if resident else both), *queries, Trips(0, 0))
        form = f"Lb{resident:d}E"
    kernel = rf"{direction}_kernel.*BFloat16ELi{dim}E{form}"
    launch = Launch((library.LIBRARY, kernel), TOKENS // tokens * HEADS, warps, trips)
    floor = _attention_floor(tokens, dim, number)
    return Form("packed_attention", f"CUDA, {direction}", f"{tokens} tokens, D {dim}", floor, (launch,))


def _attention_in_torch(direction: str, tokens: int, dim: int, number: int) -> Form:
    """A peer: FlashAttention-2 inside torch, blocks of 128 queries by 128 keys, sequences of unequal lengths. Of backward
    its main kernel alone, without the pass before it, the one after it, and the stack of its three gradients."""
    blocks = ceil(tokens / 128)
    if direction == "forward":
        kernel = rf"pytorch_flash.*flash_fwd_kernelI.*Flash_fwd_kernel_traitsILi{dim}ELi128ELi128E.*bfloat16.*"
        kernel += r"(Lb0E){5}Lb1ELb0ELb0EEEvNS_16Flash_fwd_params"
        # the masked block of keys stands before the loop over the others
        trips, warps = (Trips(blocks - 1),), 4
    else:
        kernel = rf"pytorch_flash.*seqk_parallel_kernelI.*Flash_bwd_kernel_traitsILi{dim}ELi128ELi128E.*bfloat16.*"
        kernel += r"(Lb0E){5}Lb1ELb0EEEvNS_16Flash_bwd_params"
        # a program takes one block of keys and runs over the queries
        trips, warps = (Trips(1), Trips(blocks)), 8
    launch = Launch((_TORCH, kernel), TOKENS // tokens * HEADS * blocks, warps, trips)
    floor = _attention_floor(tokens, dim, number)
    return Form("packed_attention", f"torch, {direction}", f"{tokens} tokens, D {dim}", floor, (launch,))


def _soft_cross_entropy(rates: Rates) -> Iterator[Form]:
    """DINO's patches, a teacher row for each student row; the merge of a row's parts is left out."""
    module, shape = _triton("soft_cross_entropy"), f"{ROWS} rows, K {PROTOTYPES}"
    forward, backward = importlib.import_module("kernels.soft_cross_entropy").cost(ROWS, ROWS, PROTOTYPES, 2)
    tile = module._tile(PROTOTYPES, 2)
    row_tiles, tiles = ceil(ROWS / tile.rows), ceil(PROTOTYPES / tile.width)
    parts = min(16, max(1, 32 * rates.sms // row_tiles), tiles)
    variant = _variant("soft_cross_entropy", f"cross-entropy bf16 K {PROTOTYPES} V 0", rates.capability)
    launch = Launch(variant, row_tiles * parts, variant.warps, (Trips(ceil(tiles / parts)),))
    yield Form("soft_cross_entropy", "Triton, forward", shape, forward, (launch,))
    variant = _variant("soft_cross_entropy", f"gradient bf16 K {PROTOTYPES} V 0", rates.capability)
    launch = Launch(variant, row_tiles * tiles, variant.warps)
    yield Form("soft_cross_entropy", "Triton, backward", shape, backward, (launch,))


def _sinkhorn(rates: Rates) -> Iterator[Form]:
    """Sweeps of the Triton form: two bytes an element, three operations; the merge of the parts is left out."""
    module = _triton("sinkhorn")
    for title, prototypes in (("column sums", PROTOTYPES), ("rows summed", WHOLE_ROW)):
        whole = prototypes <= module._LARGEST_WHOLE and title == "rows summed"
        tile = module._whole_tile(prototypes) if whole else module._tile(prototypes)
        columns = 1 if whole else ceil(prototypes / tile.columns)
        parts, rows_per_part = module._parts(ROWS, tile.rows, 8 * rates.sms // (4 if whole else columns))
        variant = _variant("sinkhorn", f"{title} bf16 K {prototypes}", rates.capability)
        turns = rows_per_part // tile.rows
        launch = Launch(variant, columns * parts, variant.warps, (Trips(turns, may_vanish=turns == 1),))
        elements = ROWS * prototypes
        yield Form(
            "sinkhorn", f"Triton, {title}", f"{ROWS} rows, K {prototypes}", Cost(2 * elements, 3 * elements), (launch,)
        )
    waits = "its programs take roles by a ticket and wait for one another"
    yield Form("sinkhorn", "Triton, two passes", f"{ROWS} rows, K {PROTOTYPES}", Cost(0, 0), obstacle=waits)
    waits = "one launch for all iterations, with barriers of the whole grid"
    yield Form("sinkhorn", "CUDA", f"{ROWS} rows, K {PROTOTYPES}", Cost(0, 0), obstacle=waits)


def _info_nce(rates: Rates) -> Iterator[Form]:
    module, shape = _triton("info_nce"), f"{ROWS} x {QUEUE}, C {CHANNELS}"
    forward, backward = importlib.import_module("kernels.info_nce").cost(ROWS, QUEUE, CHANNELS, 2)

    def launch(title: str, rows: int, columns: int, bytes_per_row: int) -> Launch:
        choose = module._forward_tile if title == "forward" else module._backward_tile
        tile = choose(torch.bfloat16, CHANNELS, rates.capability, True)
        splits, per_split = module._splits(rows, columns, tile, rates.sms, bytes_per_row)
        variant = _variant("info_nce", f"{title} bf16 C {CHANNELS}", rates.capability)
        return Launch(variant, ceil(rows / tile.rows) * splits, tile.warps, (Trips(per_split // tile.columns),))

    yield Form("info_nce", "Triton, forward", shape, forward, (launch("forward", ROWS, QUEUE, 8),))
    gradients = ("gradient of queries", ROWS, QUEUE), ("gradient of keys", QUEUE, ROWS)
    launches = tuple(launch(*gradient, 4 * CHANNELS) for gradient in gradients)
    yield Form("info_nce", "Triton, backward", shape, backward, launches)


def _nearest_neighbours(rates: Rates) -> Iterator[Form]:
    module, shape = _triton("nearest_neighbours"), f"{ROWS} x {QUEUE}, C {CHANNELS}"
    floor = importlib.import_module("kernels.nearest_neighbours").cost(ROWS, QUEUE, CHANNELS, 2)
    tile = module._tile(torch.bfloat16, CHANNELS, 1, rates.capability, True)
    splits, per_split = module._splits(ROWS, QUEUE, 1, tile, rates.sms)
    variant = _variant("nearest_neighbours", f"bf16 C {CHANNELS} k 1", rates.capability)
    launch = Launch(variant, ceil(ROWS / tile.queries) * splits, tile.warps, (Trips(per_split // tile.keys),))
    yield Form("nearest_neighbours", "Triton, k 1", shape, floor, (launch,))
    depends = "how often a key enters the list depends on the values"
    yield Form("nearest_neighbours", "Triton, k > 1", shape, floor, obstacle=depends)


def _relation(rates: Rates) -> Iterator[Form]:
    module, shape = _triton("relation"), f"{IMAGES} images, {RELATION_TOKENS} tokens, D {RELATION_CHANNELS}"
    sizes = f"bf16 N {RELATION_TOKENS} D {RELATION_CHANNELS}"
    cost = importlib.import_module("kernels.relation").cost
    forward, backward = cost(IMAGES, RELATION_TOKENS, RELATION_CHANNELS, 2)
    tile = module._forward_tile(torch.bfloat16, RELATION_TOKENS, RELATION_CHANNELS)
    tiles = ceil(RELATION_TOKENS / tile.rows) * ceil(RELATION_TOKENS / tile.columns)
    variant = _variant("relation", f"forward {sizes}", rates.capability)
    launch = Launch(variant, IMAGES * tiles, variant.warps, (Trips(module._CLASSES.value),))
    yield Form("relation", "Triton, forward", shape, forward, (launch,))
    variant = _variant("relation", f"gradients {sizes}", rates.capability)
    launch = Launch(variant, IMAGES * module._CLASSES.value, variant.warps)
    yield Form("relation", "Triton, backward", shape, backward, (launch,))


def _patches(rates: Rates) -> Iterator[Form]:
    module, asked, shape = _triton("patches"), IMAGES * PATCHES, f"{IMAGES} x {PATCHES} patches of 16"
    cost = importlib.import_module("kernels.patches").cost
    rows, width = module._slices(3 * 16**2)
    variant = _variant("patches", "gather bf16 patch 16", rates.capability)
    launch = Launch(variant, ceil(asked / rows) * ceil(3 * 16**2 / width), variant.warps)
    yield Form("patches", "Triton, gather", shape, cost(asked, 16, 2, 4)[0], (launch,))
    loss = cost(asked, 16, 2, 4)[1]
    rows, _, warps = module._whole(16)
    for title, floor in (("forward", loss), ("backward", Cost(loss.bytes + 4 * asked * 3 * 16**2, loss.flops))):
        variant = _variant("patches", f"loss {title} bf16 patch 16", rates.capability)
        yield Form("patches", f"Triton, loss {title}", shape, floor, (Launch(variant, ceil(asked / rows), warps),))


def _adamw(rates: Rates) -> Iterator[Form]:
    either = "a program takes one of two ways through its code, by where its tensor lies"
    yield Form("adamw", "Triton", "a ViT-L's tensors", Cost(0, 0), obstacle=either)


_FORMS = {
    "adamw": _adamw,
    "info_nce": _info_nce,
    "nearest_neighbours": _nearest_neighbours,
    "packed_attention": _packed_attention,
    "patches": _patches,
    "relation": _relation,
    "sinkhorn": _sinkhorn,
    "soft_cross_entropy": _soft_cross_entropy,
}
