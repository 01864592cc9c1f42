"""Forward and backward of an update as a CUDA graph: captured once, then replayed by one launch at every step, where the host
would launch thousands of kernels.

A replay does again what was captured: the same kernels, on the same memory. So what differs from step to step has to lie in
memory that stays where it is: images, ids and draws are copied into buffers; weights, queues and centres change in place. Numbers
that Python computes with are frozen in a graph, which is why guard, gradient norms, clipping, optimiser and averages follow
outside of it, launch by launch, and why the settings of a method say whether its step can be replayed
(`StageSettings.ungraphed`).

What a replay writes holds until the next one: what is reported, gradients, and what modules keep for `Method.after_step`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from engine.core import dist
from engine.core.errors import BadInput
from engine.methods.settings import StageSettings
from engine.model.vit import VisionTransformer
from engine.training import gradient_cache
from engine.training.config import Train
from kernels.checks import checks_values

UNSEEN = "nothing has shown on this GPU that it is right and faster; --graphs on takes it"
WARM_UP = 2  # updates before the one that is captured: in them code is compiled, kernels are loaded, caches are filled
Report = dict[str, Tensor | float]
Backward = Callable[[tuple[Tensor, ...], Tensor, dict[str, Tensor]], Report]


def obstacle(
    train: Train, settings: StageSettings, encoder: VisionTransformer, ranks: dist.Ranks, precision: str
) -> str:
    """Why a stage's steps cannot be replayed, or are not to be, in words; "" where they can."""
    if train.graphs == "off":
        return "--graphs off"
    if ranks.device.type != "cuda":
        return "graphs are for GPUs"
    if precision == "fp32" or torch.cuda.get_device_capability(ranks.device) < (8, 0):
        return "attention in fp32, or before sm_80, may read lengths on the host"
    if ranks.world > 1:
        return "not under several processes yet"
    if checks_values(ranks.device):
        return "TESSERA_DEBUG=1 looks at what tensors hold"
    if train.profile:
        return "--profile watches launches one by one"
    if gradient_cache.needed(settings, train.accumulate):
        return "micro-batches whose images are compared are represented twice"
    if settings.aspect == "keep":
        return "how many tokens images of their own aspect have differs from step to step"
    return settings.ungraphed(encoder)


def check(graphs: str, obstacles: Sequence[tuple[str, str]]) -> None:
    """Raise BadInput where graphs are asked for and a stage, by its name, has an obstacle."""
    for stage, why in obstacles:
        if graphs == "on" and why:
            raise BadInput(f"--graphs on cannot be had in stage {stage}: {why}; leave it out.")


def described(obstacles: Sequence[tuple[str, str]]) -> str:
    """In a line, of all stages."""
    words = [f"no CUDA graph: {why}" if why else "steps replayed from a CUDA graph" for _, why in obstacles]
    if len(set(words)) == 1:
        return words[0]
    return "; ".join(f"{stage}: {said}" for (stage, _), said in zip(obstacles, words, strict=True))


class Recorder(Protocol):
    """What captures work and does it again."""

    def warm_up(self, work: Callable[[], Report]) -> Report:
        """Do work as it will be captured, and return what it returns."""

    def capture(self, work: Callable[[], Report]) -> Report:
        """Take up work without doing it; what is returned has content once it was replayed."""

    def replay(self) -> None:
        """Do the work that was captured."""


class CudaGraph:
    """A recorder of what a CUDA device does. Warm-up and capture run on a stream of their own: a legacy stream can't be captured,
    and gradients must be accumulated on the stream on which they were in the warm-up. Replays run on the current one.
    """

    def __init__(self, device: torch.device):
        self._stream, self._graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()

    def warm_up(self, work: Callable[[], Report]) -> Report:
        current = torch.cuda.current_stream(self._stream.device)
        # each waits for the other, so memory that one frees is never written by the other too early
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            report = work()
        current.wait_stream(self._stream)
        return report

    def capture(self, work: Callable[[], Report]) -> Report:
        # thread_local: the loader's thread may allocate and wait meanwhile
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        self._graph.replay()


class Replayed:
    """An update's forward and backward: the first `WARM_UP` as they are, then one that is captured, and replayed from there on.

    Args:
        method: whose modules keep tensors for `after_step` in a list `pending`, if they keep any.
        trained: the parameters whose gradients backward leaves.
        recorder: a `CudaGraph`, but in tests.

    Attributes:
        buffers: where images, ids and draws are read, on the device, by name.
    """

    def __init__(self, method: nn.Module, trained: list[nn.Parameter], recorder: Recorder):
        self.method, self.trained, self.recorder = method, trained, recorder
        self._warm = 0
        self.buffers: dict[str, Tensor] = {}
        self._report: Report | None = None

    def __call__(self, backward: Backward, images: tuple[Tensor, ...], ids: Tensor, drawn: dict[str, Tensor]) -> Report:
        """What `backward` reports of its arguments; gradients lie in the parameters. All of it is overwritten by the next call.

        `backward` isn't kept: it belongs to who holds this, and a circle would hold a graph's memory until Python looks for it.

        Raises:
            BadInput: the device or its driver can't capture this.
            ValueError: arguments have other names or shapes than at the first call.
        """
        device = self.trained[0].device
        given = {"ids": ids} | {f"view {i}": view for i, view in enumerate(images)}
        given |= {f"drawn {name}": x for name, x in drawn.items()}
        self._fill(given, device)
        buffers = self.buffers
        views = tuple(buffers[f"view {i}"] for i in range(len(images)))
        inputs = views, buffers["ids"], {name: buffers[f"drawn {name}"] for name in drawn}
        if self._warm < WARM_UP:
            self._warm += 1
            return self.recorder.warm_up(lambda: backward(*inputs))
        if self._report is None:
            self._capture(lambda: backward(*inputs))
        self.recorder.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for kept, tensors in self._pending:
            kept[:] = tensors
        return dict(self._report)

    def _fill(self, given: dict[str, Tensor], device: torch.device) -> None:
        """Copy a step's tensors to where the graph reads them; those of the host go to the device, which isn't waited for."""
        if not self.buffers:
            self.buffers = {name: torch.empty(x.shape, dtype=x.dtype, device=device) for name, x in given.items()}
        shapes = {name: (x.shape, x.dtype) for name, x in given.items()}
        if shapes != {name: (x.shape, x.dtype) for name, x in self.buffers.items()}:
            raise ValueError(f"a replayed step's tensors must keep names, shapes and dtypes, and are {shapes}")
        for name, x in given.items():
            self.buffers[name].copy_(x, non_blocking=True)

    def _capture(self, work: Callable[[], Report]) -> None:
        # without gradients there, backward leaves its own tensors in them instead of adding to what is there
        for parameter in self.trained:
            parameter.grad = None
        try:
            self._report = self.recorder.capture(work)
        except RuntimeError as error:
            first = error.__context__ or error  # the end of a broken capture fails, too
            raise BadInput(
                f"the step could not be captured as a CUDA graph ({str(first).splitlines()[0]}); go on with --graphs off."
            ) from error
        self._gradients = [(p, p.grad) for p in self.trained if p.grad is not None]
        modules = [module for module in self.method.modules() if hasattr(module, "pending")]
        self._pending = [(module.pending, list(module.pending)) for module in modules]
