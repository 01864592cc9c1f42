import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from engine.model import vit
from engine.model.blocks import Block, initialise
from engine.model.tokens import Group, Layout, Packed
from tests.model.shaken import MICRO, RELATIVE, draw, shaken


def test_block_serves_the_decoder_of_mae():
    block = Block(512, 16)
    initialise(block, draw())
    x = torch.randn(6, 512, generator=draw())
    assert block(x, Layout((Group(2, 3),)).cu_seqlens("cpu"), 3).shape == (6, 512)
    lengths = torch.tensor([2, 2], dtype=torch.int32)
    limited = block(x, Layout((Group(2, 3),)).cu_seqlens("cpu"), 3, lengths)
    alone = block(x[[0, 1, 3, 4]], Layout((Group(2, 2),)).cu_seqlens("cpu"), 2)
    torch.testing.assert_close(limited[[0, 1, 3, 4]], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "relative"])
def test_one_compiled_code_serves_all_blocks(positions):
    torch._dynamo.reset()
    model = vit.create(MICRO, init_values=0.1, drop_path=0.2, positions=positions)
    counter = CompileCounterWithBackend("aot_eager")
    images = torch.randn(2, 3, 32, 32, generator=draw())
    expected = model(images)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=counter)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(images), expected)
    assert counter.frame_count == 1


def test_stochastic_depth_runs_only_the_kept_rows_and_weighs_them():
    block = shaken(MICRO, depth=1).blocks[0]
    groups = [torch.randn(4, 5, 128, generator=draw(1)), torch.randn(8, 3, 128, generator=draw(2))]
    seen, packed = [], Packed.pack(groups)
    block.norm1.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    block.norm2.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    with torch.no_grad():
        block.mlp.fc2.weight.zero_(), block.mlp.fc2.bias.zero_()
        after = block.forward_thinned(packed, 0.25, draw()).unpack()
        assert seen == [3 * 5 + 6 * 3] * 2
        branch = Packed(block.attend(packed.tokens_TC, packed.cu_seqlens, 5), packed.layout).unpack()
    for x, y, change, kept in zip(groups, after, branch, (3, 6), strict=True):
        moved = (y != x).any(dim=2).any(dim=1)
        assert moved.sum() == kept
        assert torch.equal(y[~moved], x[~moved])
        torch.testing.assert_close(y[moved], (x + change * len(x) / kept)[moved], atol=1e-5, rtol=1e-5)


def test_stochastic_depth_that_keeps_all_is_the_plain_block():
    block, packed = shaken(MICRO, depth=1).blocks[0], Packed.pack([torch.randn(2, 5, 128, generator=draw())])
    with torch.no_grad():
        plain = block(packed.tokens_TC, packed.cu_seqlens, 5)
        assert torch.equal(block.forward_thinned(packed, 0.1, draw()).tokens_TC, plain)


def test_stochastic_depth_keeps_relative_positions():
    model = shaken(MICRO, depth=1, **RELATIVE)
    block, bias, packed = (
        model.blocks[0],
        model.rel_pos_bias(),
        Packed.pack([torch.randn(4, 17, 128, generator=draw())]),
    )
    with torch.no_grad():
        block.mlp.fc2.weight.zero_(), block.mlp.fc2.bias.zero_()
        before, after = packed.unpack()[0], block.forward_thinned(packed, 0.5, draw(), bias).unpack()[0]
        branch = block.attend(packed.tokens_TC, packed.cu_seqlens, 17, None, bias).view(4, 17, 128)
    moved = (before != after).any(dim=2).any(dim=1)
    assert moved.sum() == 2
    torch.testing.assert_close(after[moved], (before + 2 * branch)[moved], atol=1e-5, rtol=1e-5)
