"""A step whose update was left out, taken again and looked at: where something that isn't finite arose first.

A run is a function of its configuration, so the step is reached again from the checkpoint before it; its update changed nothing,
so it can be taken a second time, uncompiled and watched.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from engine.core.durable import write_folder
from engine.core.errors import BadInput
from engine.core.host_memory import to_device
from engine.data.batch import Batch
from engine.training import checkpoint
from engine.training.build import build
from engine.training.feeding import Feeding
from engine.training.metrics import read_metrics, strict
from engine.training.parts import Parts
from engine.training.state import TrainState, restore


@dataclass(frozen=True)
class Stretch:
    """Between two logged steps of a stage updates were left out: after `before`, up to `last`, counted through all stages."""

    stage: str
    before: int
    last: int


@dataclass
class Seen:
    """What was not finite in a step, in the order of the step; empty where all was.

    Attributes:
        images: rows of the batch that were not finite before anything was computed.
        weights: parameters, likewise.
        forward: the first module whose output was not, and whether what it was given was.
        loss: as a number.
        backward: the first module whose output's gradient was not.
        gradients: parameters whose gradient was not.
    """

    images: list[int] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    forward: str = ""
    loss: float = 0.0
    backward: str = ""
    gradients: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.images:
            return f"{len(self.images)} of its images hold values that are not finite"
        if self.weights:
            return f"{len(self.weights)} weights are not finite, first {self.weights[0]}"
        if self.forward:
            return f"forward: {self.forward}"
        if self.loss != self.loss or abs(self.loss) == float("inf"):
            return "forward: the loss, of outputs that are all finite"
        if self.backward or self.gradients:
            first = self.backward or "of parameters alone"
            return f"backward: {first}; {len(self.gradients)} gradients are not finite"
        return (
            "nothing: run uncompiled, all of it is finite, so compiled code or its number format makes the difference"
        )


def left_out(run: Path) -> list[Stretch]:
    """Where updates of a run were left out, by its metrics."""
    stretches, before = [], {}
    for record in read_metrics(run / "metrics.jsonl"):
        if record["kind"] != "train" or "skipped_updates" not in record:
            continue
        step, count = before.get(record["stage"], (None, 0))
        if record["skipped_updates"] > count:
            stretches.append(Stretch(record["stage"], step or 0, record["step"]))
        before[record["stage"]] = record["step"], record["skipped_updates"]
    return stretches


def replay(parts: Parts, run: Path, stretch: Stretch, say: Callable[[str], None]) -> tuple[int, Seen, Path]:
    """Go to the first update that was left out, look at it, and write it down.

    Returns:
        Its step through all stages, what was seen, and the folder RUN/replay/step-N: what.json (ids, files and what was seen) and
        batch.safetensors (images, ids and draws).

    Raises:
        BadInput: there is no checkpoint before it, or no update is left out now.
    """
    state = _state_before(parts, run, stretch, say)
    stage = parts.stages[state.stage]
    with Feeding(parts, state) as feeding:
        while stage.first_step + state.step < stretch.last:
            batch, chosen, before = next(feeding), feeding.drawn(state.step), int(state.update.skipped)
            ids = to_device(batch.ids, state.update.skipped.device)
            state.update(state.step, batch.images, ids, chosen)
            if int(state.update.skipped) > before:
                seen = watched(state, batch, ids, chosen)
                step = stage.first_step + state.step + 1
                return step, seen, _write(parts, run, step, seen, batch, chosen)
            state.step += 1
    raise BadInput(
        f"no update after step {stretch.before:,} up to {stretch.last:,} is left out now: the run's device, kernels or data were "
        "others."
    )


def _state_before(parts: Parts, run: Path, stretch: Stretch, say: Callable[[str], None]) -> TrainState:
    index = next(stage.index for stage in parts.stages if stage.name == stretch.stage)
    first = parts.stages[index].first_step
    try:
        tensors, where = checkpoint.newest(run / "checkpoints", say, max(stretch.before, first))
    except BadInput:
        if index:
            raise
        say("no checkpoint is as old: going from the first step of the run")
        return build(parts, 0, None)
    state = build(parts, where["stage"], None, anew=False)
    restore(state, tensors, where)
    if where["stage"] != index:  # the one before, at its end
        state = build(parts, index, state.method)
    say(f"going from step {parts.stages[state.stage].first_step + state.step:,}")
    return state


def watched(state: TrainState, batch: Batch, ids: Tensor, drawn: Mapping[str, Tensor]) -> Seen:
    """Forward and backward of the state's step, uncompiled; the state stays as it is."""
    method, update = state.method, state.update
    images = [row for row in range(len(ids)) if not all(_finite(view[row]) for view in batch.images)]
    seen = Seen(images, [name for name, weight in method.named_parameters() if not _finite(weight)])
    with torch.compiler.set_stance("force_eager"), _hooks(method, seen):
        report = update.gradients(batch.images, ids, dict(drawn))
    seen.loss = float(report["loss"])
    seen.gradients = [
        name for name, weight in method.named_parameters() if weight.grad is not None and not _finite(weight.grad)
    ]
    update.optimizer.zero_grad(set_to_none=True)
    return seen


@contextmanager
def _hooks(method: nn.Module, seen: Seen) -> Iterator[None]:
    """Inside, modules of the method note in `seen` what is first to be not finite."""

    def after(name: str, module: nn.Module, given: tuple, out: Any) -> None:
        tensors = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        if not seen.forward and not _finite(*tensors):
            sound = _finite(*(tensor for tensor in tree_leaves(given) if isinstance(tensor, Tensor)))
            what = f"{name} ({type(module).__name__})"
            seen.forward = f"{what}, of finite input" if sound else f"what {what} is given"
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(partial(back, name, module))

    def back(name: str, module: nn.Module, gradient: Tensor) -> None:
        if not seen.backward and not _finite(gradient):
            seen.backward = f"the gradient of what {name} ({type(module).__name__}) gives"

    handles = [module.register_forward_hook(partial(after, name)) for name, module in method.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point())


def _write(parts: Parts, run: Path, step: int, seen: Seen, batch: Batch, drawn: Mapping[str, Tensor]) -> Path:
    paths: Sequence[str] = parts.train_images.paths
    what = {"step": step, "seen": asdict(seen), "found": str(seen), "rank": parts.ranks.rank}
    what |= {"ids": batch.ids.tolist(), "files": [paths[index] for index in batch.ids.tolist()]}
    tensors = {f"images.{index}": view for index, view in enumerate(batch.images)} | {"ids": batch.ids}
    tensors |= {f"drawn.{name}": value for name, value in drawn.items()}

    def fill(aside: Path) -> None:
        (aside / "what.json").write_text(json.dumps(strict(what), indent=1))
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, aside / "batch.safetensors")

    folder = run / "replay" / (f"step-{step:09d}" + (f"-rank-{parts.ranks.rank}" if parts.ranks.world > 1 else ""))
    write_folder(folder, fill)
    return folder
