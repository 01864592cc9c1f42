"""Steps that are captured and replayed, as JSON: on the device that computes nothing, which is built where it isn't there.

python -m tests.null_device.graphs counted eager|compiled METHOD ...   stages of published recipes, as steps.py has them
python -m tests.null_device.graphs forms                               every form that is replayed, small, eager
python -m tests.null_device.graphs planted                             faults in what is captured
"""

import ctypes
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from engine import methods, recipes
from engine.core.draws import Draws
from engine.core.errors import BadInput
from engine.methods.base import Method
from engine.model import vit
from engine.null_device import device
from engine.null_device.record import Event, recorded
from engine.training import config
from engine.training.calls import without_data
from engine.training.graphs import WARM_UP
from engine.training.operations import CLASSES
from engine.training.stepping import made_ready, stepping
from tests.methods.small import REPLAYED, small
from tests.null_device.ledger import faults_of_capture
from tests.null_device.steps import MODEL, flags_of


def launches(events: list[Event]) -> int:
    """What the host launches: kernels, cuBLAS's calls, memsets, copies, graphs."""
    kinds = ("launch", "product", "memset", "copy_on_device", "copy_to_device", "replay")
    return sum(event.kind in kinds for event in events)


def watched(method: Method, compiles: bool) -> dict[str, object]:
    """What the host launches in a step as it is and in one that is replayed, and what was wrong of this and of the one captured.

    as_it_is, replayed: launches. nodes: of the graph. filled: copies into what it reads. replays: graphs that were launched.
    """
    plain, _ = stepping(made_ready(method, compiles))
    for number in range(WARM_UP):
        plain(number)
    with recorded() as as_it_is:
        plain(WARM_UP)
    step, _ = stepping(method, graphs=True)
    for number in range(WARM_UP):
        step(number)
    with recorded() as capturing:
        step(WARM_UP)
    with recorded() as replaying:
        step(WARM_UP + 1)
    waits = Counter(event.text for event in replaying if event.kind == "wait")
    loaded = [event.text for event in capturing if event.kind == "load"]
    replays = [event for event in replaying if event.kind == "replay"]
    batch = method.settings.batch_size
    drawn = method.draw(Draws(0, 0, 0, batch=batch, rows=slice(0, batch), device=torch.device("cuda", 0)))
    return {
        "as_it_is": launches(as_it_is), "replayed": launches(replaying), "nodes": sum(event.a for event in replays),
        "filled": 1 + len(method.views()) + len(drawn), "replays": len(replays),
        "faults": faults_of_capture(capturing) + [f"waits: {dict(waits)}"] * bool(waits)
        + [f"loaded when captured: {loaded}"] * bool(loaded),
    }  # fmt: skip


def counted(name: str, compiles: bool) -> dict[str, dict[str, object]]:
    """By stage of the published recipe."""
    plan = config.parse([*flags_of(name), "--device", "cuda"])
    encoder, found = vit.create(plan.model, **plan.encoder), {}
    for kind, settings in plan.stages:
        assert not settings.ungraphed(encoder), kind
        found[kind] = watched(without_data(kind, settings, encoder, CLASSES), compiles)
    return found


def in_small(name: str) -> dict[str, object]:
    kind = methods.get(name)
    settings = replace(kind.Settings(**small(kind.Settings, epochs=4)), **REPLAYED[name])
    return watched(without_data(name, settings, vit.create("vit_micro_patch8_32", depth=2), 3), False)


def read(x: Tensor) -> Tensor:
    return x * 2 if x.sum().item() > 0 else x


def synchronised(x: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return x


def of_pageable_memory(x: Tensor) -> Tensor:
    return x * torch.tensor(1.0).to(x.device, non_blocking=True)


def of_pinned_memory(x: Tensor) -> Tensor:
    return x * torch.tensor(1.0).pin_memory().to(x.device, non_blocking=True)


def nonzero(x: Tensor) -> Tensor:
    return x + x.detach().nonzero().sum()


def on_another_stream(x: Tensor) -> Tensor:
    with torch.cuda.stream(torch.cuda.default_stream()):
        torch.empty(4, device=x.device).fill_(1.0)
    return x


def left_behind(x: Tensor) -> Tensor:
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        torch.empty(4, device=x.device).fill_(1.0)
    return x


PLANTS = (read, synchronised, of_pageable_memory, of_pinned_memory, nonzero, on_another_stream, left_behind)


def planted(plant: Callable[[Tensor], Tensor]) -> dict[str, str | list[str]]:
    """In a small MAE's step: what the engine says, and what was seen of the capture."""
    ((kind, settings),) = recipes.recipe("mae", MODEL, "plain", embedded=False).stages
    settings = replace(settings, **small(type(settings), batch_size=2))
    method = without_data(kind, settings, vit.create(MODEL, depth=2), CLASSES)
    forward, said = method.forward, ""

    def with_fault(*arguments) -> dict[str, Tensor]:
        report = forward(*arguments)
        return report | {"loss": plant(report["loss"])}

    method.forward = with_fault
    step, _ = stepping(made_ready(method, False), graphs=True)
    for number in range(WARM_UP):
        step(number)
    torch.cuda.synchronize()
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        recorded() as events,
    ):  # a broken capture leaves its stream current
        try:
            step(WARM_UP)
        except BadInput as error:
            said = str(error)
    return {"said": said, "seen": faults_of_capture(events)}


@contextmanager
def capturing(runtime: ctypes.CDLL, stream: int, mode: int = 1):
    """A capture by the bare runtime, `mode` thread-local; yields a list that ends with the error of its end."""
    graph, errors = ctypes.c_void_p(), []
    errors.append(runtime.cudaStreamBeginCapture(ctypes.c_void_p(stream), mode))
    yield errors
    errors.append(runtime.cudaStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph)))


def bare() -> dict[str, list[int]]:
    """CUDA's errors of calls that may not be made while a stream captures: of the beginning, the call, the end."""
    torch.cuda.init()
    runtime, stream = ctypes.CDLL("libcuda.so.1"), torch.cuda.Stream().cuda_stream
    x, host = torch.empty(4, device="cuda"), torch.empty(4)
    event = torch.cuda.Event()
    event.record()
    at = ctypes.c_void_p
    calls = {
        "memcpy_of_pageable_memory": lambda: runtime.cudaMemcpyAsync(
            at(x.data_ptr()), at(host.data_ptr()), 16, 1, at(stream)
        ),
        "memcpy": lambda: runtime.cudaMemcpy(at(x.data_ptr()), at(host.data_ptr()), 16, 1),
        "malloc": lambda: runtime.cudaMalloc(ctypes.byref(at()), 16),
        "synchronize": lambda: runtime.cudaStreamSynchronize(at(stream)),
        "query": lambda: runtime.cudaStreamQuery(at(stream)),
        "event_of_before": lambda: runtime.cudaStreamWaitEvent(at(stream), at(event.cuda_event), 0),
        "event_query": lambda: runtime.cudaEventQuery(at(event.cuda_event)),
    }
    found = {}
    for name, call in calls.items():
        with capturing(runtime, stream) as errors:
            errors.append(call())
        found[name] = errors
    with capturing(runtime, stream, mode=2) as errors:  # relaxed
        errors.append(runtime.cudaMalloc(ctypes.byref(at()), 16))
    found["malloc, relaxed"] = errors
    with capturing(runtime, 0) as errors:
        pass
    return found | {"legacy stream": errors}


def main(arguments: list[str]) -> int:
    if "NULLCUDA_SM" not in os.environ:
        with device.built() as on_device:
            print(json.dumps(device.answer("tests.null_device.graphs", arguments, on_device())))
        return 0
    what, *others = arguments
    if what == "counted":
        found = {name: counted(name, others[0] == "compiled") for name in others[1:]}
    elif what == "forms":
        found = {name: in_small(name) for name in REPLAYED}
    else:
        found = {plant.__name__: planted(plant) for plant in PLANTS} | {"bare": bare()}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
