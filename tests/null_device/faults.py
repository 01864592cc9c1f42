"""On the device that computes nothing: faults planted into a small MAE's step and into compiled regions, and what is reported."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from engine import recipes
from engine.model import vit
from engine.training.build import compile_regions
from engine.training.calls import without_data
from engine.training.operations import CLASSES
from engine.training.stepping import made_ready, stepping
from tests.methods.small import small
from tests.null_device.ledger import Report, examine
from tests.null_device.steps import MODEL


def read_for_a_branch(x: Tensor) -> Tensor:
    return x * 2 if x.sum().item() > 0 else x


def mask_as_index(x: Tensor) -> Tensor:
    return x + x.detach()[x > 0].sum()


def copy_to_host(x: Tensor) -> Tensor:
    return x + x.detach().sum().cpu().to(x.device)


def nonzero(x: Tensor) -> Tensor:
    return x + x.detach().nonzero().sum()


def list_to_device(x: Tensor) -> Tensor:
    return x * torch.tensor([1.0], device=x.device)


def synchronised(x: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return x


WAITING = (read_for_a_branch, mask_as_index, copy_to_host, nonzero, list_to_device, synchronised)


def break_of_the_graph(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x


# the compiler takes a list's numbers into its kernels
COMPILED = (*(plant for plant in WAITING if plant is not list_to_device), break_of_the_graph)


class Region(nn.Module):
    """A layer with a plant behind it, which the engine compiles; `number` differs at every step where that is the plant."""

    def __init__(self, plant: Callable[[Tensor], Tensor], step_by: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.plant, self.number, self.step_by = plant, 1.0, step_by

    def layered(self, x: Tensor) -> Tensor:
        return self.plant(nn.functional.gelu(self.layer(x)) * self.number)

    def regions(self) -> Iterator[tuple[object, str]]:
        yield self, "layered"

    def regions_on_gpus(self) -> Iterator[tuple[object, str]]:
        yield from ()

    def ragged_regions(self) -> Iterator[tuple[object, str]]:
        yield from ()

    def step(self, _: int) -> None:
        self.layered(torch.empty(8, 32, device="cuda")).sum().backward()
        self.number += self.step_by


@triton.jit
def too_large(x, N: tl.constexpr):
    at = x + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    left = tl.load(at)
    product = tl.dot(left, left)
    tl.store(at, tl.exp(product) * tl.dot(product.to(tl.float16), left) + product)


def launching(grid: tuple[int, ...], size: int) -> Callable[[int], None]:
    x = torch.empty(size, size, dtype=torch.float16, device="cuda")
    return lambda _: too_large[grid](x, size)


def in_the_step(plant: Callable[[Tensor], Tensor]) -> Report:
    """Where nothing is compiled: on the way from the loss of a small MAE."""
    ((kind, settings),) = recipes.recipe("mae", MODEL, "plain", embedded=False).stages
    settings = replace(settings, **small(type(settings), batch_size=2))
    planted = without_data(kind, settings, vit.create(MODEL, depth=2), CLASSES)
    forward = planted.forward

    def with_fault(*arguments) -> dict[str, Tensor]:
        report = forward(*arguments)
        return report | {"loss": plant(report["loss"])}

    planted.forward = with_fault
    return examine(stepping(made_ready(planted, compiles=False))[0])


def in_a_region(plant: Callable[[Tensor], Tensor], step_by: float = 0.0) -> Report:
    torch._dynamo.reset()
    region = Region(plant, step_by).to("cuda")
    compile_regions(region)
    return examine(region.step)


if __name__ == "__main__":
    found = {"none": in_the_step(lambda x: x), "none, compiled": in_a_region(lambda x: x)}
    found |= {plant.__name__: in_the_step(plant) for plant in WAITING}
    found |= {f"{plant.__name__}, compiled": in_a_region(plant) for plant in COMPILED}
    found["another number, compiled"] = in_a_region(lambda x: x, step_by=1.0)
    found["spills"] = examine(launching((1,), 128))
    try:
        found["refused"] = examine(launching((1, 70_000), 16))
    except RuntimeError as error:
        found["refused"] = Report(faults=[str(error)])
    print(json.dumps({name: report.faults for name, report in found.items()}))
