"""Casts of weights and of their gradients in one launch: the same bits, and which ones are taken together."""

import pytest
import torch
from torch import Tensor, fx

from engine.model.blocks import Block
from engine.model.initialisation import initialise
from engine.training.casts import CAST, CastsTogether
from tests.model.shaken import draw

LENGTH, SEQUENCES, WIDTH = 5, 3, 64


class Recorded(CastsTogether):
    """Keeps, of every graph, how many casts stay and how many each copy of lists makes."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.seen: list[tuple[int, list[int]]] = []

    def __call__(self, graph: fx.Graph) -> None:
        super().__call__(graph)
        graph.lint()
        copies = [node for node in graph.nodes if node.target is torch.ops.aten._foreach_copy.default]
        self.seen.append((sum(node.target is CAST for node in graph.nodes), [len(node.args[1]) for node in copies]))


def trained(together: CastsTogether | None) -> list[Tensor]:
    """What a block makes of tokens under autocast, and the gradients, compiled with the pass."""
    torch._dynamo.reset()
    block = Block(WIDTH, 2)
    initialise(block, draw())
    x_TC = torch.randn(LENGTH * SEQUENCES, WIDTH, generator=draw(1)).requires_grad_()
    ends = torch.arange(0, LENGTH * SEQUENCES + 1, LENGTH, dtype=torch.int32)
    settings = {"post_grad_custom_pre_pass": together, "force_disable_caches": True}  # code from a cache passes no pass
    with torch._inductor.config.patch(settings), torch.autocast("cpu", dtype=torch.bfloat16):
        y_TC = torch.compile(block.forward, fullgraph=True)(x_TC, ends, LENGTH)
        y_TC.square().sum().backward()
    return [y_TC, x_TC.grad, *(parameter.grad for parameter in block.parameters())]


@pytest.mark.long
def test_a_compiled_block_computes_the_same_bits_with_its_casts_together():
    together = Recorded()
    for ours, plain in zip(trained(together), trained(None), strict=True):
        assert ours.dtype == plain.dtype and torch.equal(ours, plain)
    (forward, backward) = together.seen
    assert forward[1] == [8]  # four weights and four biases
    assert backward[1] == [4]  # gradients of biases are sums, in whose code the cast is
    assert forward[0] > 0 < backward[0]  # those of the norms' outputs stay where they are fused


def test_what_others_read_too_or_another_device_is_left_alone():
    def casts(graph_of, device: str, mode: str = "real") -> int:
        trace = fx.experimental.proxy_tensor.make_fx(graph_of, tracing_mode=mode)
        graph = trace(torch.randn(4, 4), torch.randn(4, 4)).graph
        CastsTogether(device)(graph)
        return sum(node.target is torch.ops.aten._foreach_copy.default for node in graph.nodes)

    def cast(x: Tensor) -> Tensor:
        return CAST(x, torch.bfloat16)

    assert casts(lambda x, y: cast(x) @ cast(y), "cpu") == 1
    assert casts(lambda x, y: cast(x) @ cast(y), "cuda") == 0
    assert casts(lambda x, y: (z := cast(y)) @ cast(x) + z.sum(), "cpu") == 0
    assert casts(lambda x, y: cast(x) @ cast(y), "cpu", "symbolic") == 0
    assert casts(lambda x, y: cast(x + 1) @ cast(y + 1), "cpu") == 0
