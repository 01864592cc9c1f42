"""What is compiled stays whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine import train
from engine.training.build import compile_regions
from tests.ranks import free_port

ROOT = Path(__file__).parents[2]


class Wide(nn.Module):
    """One region with 48 MB of weights, of which DDP sends 25 MB at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2000, 2000), nn.GELU(), nn.Linear(2000, 2000), nn.GELU(), nn.Linear(2000, 2000)
        )

    def region(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.region(x)

    def regions(self):
        yield self, "region"

    def ragged_regions(self):
        return iter(())


@pytest.fixture
def alone(monkeypatch):
    """A process group of this process alone."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    dist.init_process_group("gloo", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.usefixtures("alone")
def test_a_region_is_one_graph_under_ddp(monkeypatch, cut: bool):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: plain_compile(f, backend=counting, fullgraph=True))
    before = torch._dynamo.config.optimize_ddp
    torch._dynamo.config.optimize_ddp = True  # as torch has it
    torch._dynamo.reset()
    try:
        module = Wide()
        compile_regions(module)
        torch._dynamo.config.optimize_ddp |= cut  # the control
        nn.parallel.DistributedDataParallel(module)(torch.zeros(2, 2000)).sum().backward()
    finally:
        torch._dynamo.config.optimize_ddp = before
        torch._dynamo.reset()
    assert (len(graphs) == 1) == (not cut)


def test_where_compiling_fails_it_is_said_how_to_go_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def broken(*_: object) -> int:
        return torch.compile(lambda x: x + 1, backend=lambda graph, inputs: 1 / 0)(torch.ones(2))

    monkeypatch.setattr(train, "run", broken)
    arguments = ["--method", "mae", "--device", "cpu", "--epochs", "1", "--out", str(tmp_path / "run")]
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as failed:
        train.main(arguments)
    assert failed.value.__notes__[-1].endswith("--compile off goes without.")
    monkeypatch.setattr(train, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as failed:
        train.main(arguments)
    assert not hasattr(failed.value, "__notes__")


FROM_CACHE = """
import torch
from torch._dynamo.utils import counters
from engine.training.build import compile_regions


class Softmax(torch.nn.Module):
    def region(self, x):
        return x.softmax(1)

    def regions(self):
        yield self, "region"

    def ragged_regions(self):
        return iter(())


method = Softmax()
compile_regions(method)
method.region(torch.ones(4096, 64))
print(torch.get_num_threads(), counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.long
def test_code_made_for_one_number_of_threads_is_not_taken_for_another(tmp_path):
    """A study's jobs run with fewer threads than the run before, and share its compiled code."""
    seen, order = [], (2, 1, 2)  # both ways
    for threads in order:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, "-c", FROM_CACHE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        seen.append(done.stdout.strip())
    # taken from the cache where that number was there before
    assert seen == [f"{threads} {order[:place].count(threads)}" for place, threads in enumerate(order)]
