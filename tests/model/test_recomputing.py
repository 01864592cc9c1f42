"""Activation checkpointing: the same gradients, with nothing computed again but what was said."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from engine.core.draws import Draws
from engine.methods.mae import Mae, Settings
from engine.model import recomputing, vit
from engine.model.blocks import Block
from engine.model.tokens import View
from engine.training.step import Update
from tests.saved import content

LENGTH, SEQUENCES, WIDTH = 17, 4, 64
KINDS = [kind for kind in recomputing.CHOICES if kind != "none"]


class Counting(TorchDispatchMode):
    """How often each op ran, by its name without overloads."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def backward(kind: str, *, biased: bool = False, dtype: torch.dtype | None = None, backend: str | None = None):
    """Gradients of three blocks' parameters and input, what ran in backward, and, of compiled code, how many [T, C] were kept for
    it."""
    torch.manual_seed(0)
    blocks = [Block(WIDTH, 2, init_values=0.1 if biased else None) for _ in range(3)]
    x_TC = torch.randn(LENGTH * SEQUENCES, WIDTH, requires_grad=True)
    bias_HLL = torch.randn(2, LENGTH, LENGTH, requires_grad=True) if biased else None
    ends = torch.arange(0, LENGTH * SEQUENCES + 1, LENGTH, dtype=torch.int32)
    y_TC, kept = x_TC, {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage()._cdata] = x.numel() // x_TC.numel()
        return x

    # of code that is not compiled these hooks see nothing: checkpointing has its own inside
    watched = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with watched, torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        for block in blocks:
            block.recompute = kind
            forward = torch.compile(block.forward, fullgraph=True, backend=backend) if backend else block
            y_TC = forward(y_TC, ends, LENGTH, None, bias_HLL)
    loss = y_TC.square().mean()
    with Counting() as counted:
        loss.backward()
    leaves = [x_TC, *([bias_HLL] if biased else []), *(p for block in blocks for p in block.parameters())]
    return [leaf.grad for leaf in leaves], counted.ops, sum(kept.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_are_the_same_bits(kind: str, dtype: torch.dtype | None, biased: bool):
    expected, *_ = backward("none", biased=biased, dtype=dtype)
    found, *_ = backward(kind, biased=biased, dtype=dtype)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
# what a graph keeps, and what its backward computes, is settled before inductor sees it
@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"], ids=["eager", "compiled"])
def test_backward_computes_again_what_was_said(kind: str, backend: str | None):
    torch._dynamo.reset()
    counters.clear()
    expected, plain, all_kept = backward("none", backend=backend)
    graphs = counters["stats"]["unique_graphs"]
    found, ops, kept = backward(kind, backend=backend)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    again = ops - plain
    products = again["mm"] + again["addmm"]
    # of each block: attention; the products but the last, which backward does not read; GELU
    attended = 3 if kind == "blocks" else 0
    assert (again["packed_attention_forward"], products) == (attended, 3 * attended)
    if backend is None:
        assert again["gelu"] == 3
    else:
        # the input; and the outputs of qkv, attention, projection and the first product of the MLP
        assert kept == 3 * {"blocks": 1, "selective": 1 + 3 + 1 + 1 + 4}[kind] < all_kept
        assert (graphs, counters["stats"]["unique_graphs"], counters["graph_break"]) == (1, 2, {})


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("blocks", None),
        ("selective", None),
        pytest.param("selective", "aot_eager_decomp_partition", marks=pytest.mark.long),
    ],
)
def test_rows_that_stochastic_depth_drops_stay_dropped(kind: str, backend: str | None):
    """What is computed again is the draw's: it is given to the block."""
    torch._dynamo.reset()
    found = []
    for recompute in ("none", kind):
        torch.manual_seed(0)
        encoder = vit.create("vit_micro_patch8_32", depth=2, drop_path=0.5)
        recomputing.choose(encoder, recompute)
        forward = torch.compile(encoder.blocks[1].forward_dropped, fullgraph=True, backend=backend) if backend else None
        if forward:
            encoder.blocks[1].forward_dropped = forward
        images = torch.randn(8, 3, 32, 32)
        encoder.encode([View(images)], torch.Generator().manual_seed(1)).tokens_TC.square().mean().backward()
        found.append([p.grad for p in encoder.parameters() if p.grad is not None])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs) if backend else torch.testing.assert_close(
            ours, theirs, atol=0, rtol=0
        )


def test_every_way_through_a_block_is_recomputed():
    """Else activations would be kept without a word."""
    method = Mae(vit.create("vit_micro_patch8_32", depth=2, drop_path=0.5), Settings(decoder_depth=1))
    ways = [
        (type(owner), name) for owner, name in (*method.regions(), *method.ragged_regions()) if isinstance(owner, Block)
    ]
    assert {name for _, name in ways} == {"forward", "forward_dropped"}
    assert all(hasattr(getattr(kind, name), "__wrapped__") for kind, name in ways)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_the_same_bits(kind: str):
    """Encoder and decoder, at the places where the engine has them."""

    def after(kind: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        sizes = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 1}
        method = Mae(vit.create("vit_micro_patch8_32", depth=2), Settings(epochs=1, batch_size=8, **sizes))
        recomputing.choose(method, kind)
        blocks = [part for part in method.modules() if isinstance(part, Block)]
        assert {block.recompute for block in blocks} == {kind} and len(blocks) == 3
        update = Update(method, 4)
        draws = Draws(0, batch=8, rows=slice(None), device=torch.device("cpu"))
        update(1, (torch.randn(8, 3, 32, 32),), torch.arange(8), method.draw(draws))
        return content(method, update)

    expected, found = after("none"), after(kind)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
