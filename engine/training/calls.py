"""Which ops a run will call, with which shapes: one step of each stage with fake tensors, which have sizes and no content."""

import copy
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from engine import methods
from engine.core import dist
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.methods.base import Labels, Method
from engine.methods.settings import StageSettings
from engine.model import vit
from engine.training import config, gradient_cache
from engine.training.config import Plan
from engine.training.loop import Stage
from engine.training.precision import automatic
from engine.training.step import Update
from kernels.calibration.calls import Call, keep_largest, listing


def calls_of(
    plan: Plan, device: torch.device, world: int, precision: str, classes: int = 1000, stages: Sequence[Stage] = ()
) -> list[Call]:
    """The calls of all stages, of each class of shapes the largest.

    Args:
        plan: the run.
        device: where it trains; a GPU must be there.
        world: over how many ranks a batch is shared out.
        precision: fp32, bf16 or fp16.
        classes: of the images, for stages that learn from them.
        stages: those of the plan for these images; without them, all steps are of the settings' batch.
    """
    calls: dict[tuple[str, str], Call] = {}
    earlier = None
    with torch.random.fork_rng(devices=[]):  # new weights, which nobody sees, are drawn
        encoder = vit.create(plan.model, **plan.encoder)
        for index, (name, settings) in enumerate(plan.stages):
            steps = [(phase, settings.batch_size) for phase in settings.token_phases.phases]
            if stages:
                steps = [(stretch.phase, stretch.images) for stretch in stages[index].timetable.stretches]
            method = without_data(name, settings, encoder, classes)
            if earlier is not None:
                method.inherit(earlier)
            earlier = method
            for phase, batch in steps:
                rows, accumulate = batch // world, plan.train.accumulate
                if not gradient_cache.needed(settings, accumulate):  # then micro-batches are alike, and one is enough
                    rows, accumulate = rows // accumulate, 1
                for method.phase in phase.forms:
                    for call in _calls_of_step(method, rows, accumulate, device, precision):
                        keep_largest(calls, call)
    return list(calls.values())


def _calls_of_step(method: Method, rows: int, accumulate: int, device: torch.device, precision: str) -> list[Call]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, listing() as calls, dist.as_one_rank():
        with unset_fake_temporarily():
            without_content = _emptied(method, mode, device).train()
            drawn = method.draw(_Sizes(mode, rows, device))
        images = tuple(torch.empty(rows, 3, *view.size, device=device) for view in method.views())
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Accessing the data pointer of FakeTensor"
            )  # the ViT tells by it what changed
            update = Update(without_content, total_steps=1, precision=precision, accumulate=accumulate)
            update(0, images, torch.empty(rows, dtype=torch.int64, device=device), drawn)
    return calls


def _emptied(method: Method, mode: FakeTensorMode, device: torch.device) -> Method:
    """A copy whose parameters and buffers are fake, on the device."""
    copies: dict[int, Tensor] = {}
    for tensor in (*method.parameters(), *method.buffers()):
        with mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        is_parameter = isinstance(tensor, nn.Parameter)
        copies[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    return copy.deepcopy(method, copies)


def without_data(name: str, settings: StageSettings, encoder: vit.VisionTransformer, classes: int) -> Method:
    """A stage's method as its steps run it, where there are no images: it stores no features first, and labels are made up."""
    if hasattr(settings, "reuse"):
        settings = replace(settings, reuse=0)  # the pass that stores features calls what a step without them calls
    names = tuple(map(str, range(classes)))
    known = (Labels(torch.zeros(settings.batch_size, dtype=torch.int64), names),) if settings.labelled else ()
    return methods.get(name)(encoder, settings, *known)


class _Sizes(Draws):
    """Draws of which those for the device are fake; those for the host are real, since the host looks at them."""

    def __init__(self, mode: FakeTensorMode, batch: int, device: torch.device):
        super().__init__(0, batch=batch, rows=slice(None), device=torch.device("cpu"))
        self.mode, self.device = mode, device

    def uniform(self, *shape: int) -> Tensor:
        with self.mode:
            return torch.empty(self.batch, *shape, device=self.device)

    def integers(self, below: int) -> Tensor:
        with self.mode:
            return torch.empty(self.batch, dtype=torch.int64, device=self.device)

    def field(self, *shape: int) -> Tensor:
        return self.uniform(*shape)


def main() -> int:
    """Print the calls of METHOD MODEL BATCH DEVICE as JSON, for `kernels.calibrate`, which may not import what lies above it."""
    method, model, batch, device = sys.argv[1:]
    try:
        plan = config.parse(["--method", method, "--model", model, "--batch-size", batch])
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    calls = calls_of(plan, torch.device(device), 1, automatic(torch.device(device)))
    print(json.dumps([{"name": call.name, "arguments": dict(call.arguments)} for call in calls]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
