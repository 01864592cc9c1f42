import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from engine.model import vit
from engine.model.blocks import Block
from engine.model.initialisation import initialise
from engine.model.tokens import Group, Layout
from tests.model.shaken import MICRO, draw


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
