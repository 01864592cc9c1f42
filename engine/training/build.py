"""A stage made ready to train: its method on the encoder, compiled where asked, with its update; and how it is judged."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine import methods
from engine.methods.base import Labels, Method
from engine.model import recomputing, residual
from engine.training.parts import Parts
from engine.training.precision import AUTOCAST
from engine.training.state import TrainState
from engine.training.step import Update


def build(parts: Parts, index: int, earlier: Method | None, *, anew: bool = True) -> TrainState:
    """A stage at its first step, from the trained parts of the stage before; not `anew`, it waits for a checkpoint's content."""
    name, settings = parts.plan.stages[index]
    images = parts.images(index)
    known = (Labels(torch.from_numpy(images.labels), images.classes),) if settings.labelled else ()
    torch.manual_seed(parts.seed(index, "heads"))
    method = methods.get(name)(parts.encoder, settings, *known)
    if earlier is not None:
        method.inherit(earlier)
    method.to(parts.ranks.device).train()
    if anew:
        method.prepare(images, parts.ranks.device)
    recomputing.choose(method, parts.plan.train.recompute)
    residual.choose(method, parts.plan.train.residual)
    if parts.compiles:
        forms = sum(len(phase.forms) for phase in settings.token_phases.phases)
        compile_regions(method, forms, ragged=settings.aspect == "keep")
    timetable = parts.stages[index].timetable
    update = Update(
        method, timetable.length, parts.precision, parts.plan.train.accumulate,
        graphs=not parts.ungraphed()[index][1], timetable=timetable,
    )  # fmt: skip
    return TrainState(method, update, index, 0, [])


def compile_regions(method: Method, phases: int = 1, *, ragged: bool = False) -> None:
    """Compile a method's regions, each full-graph. Blocks of one shape share one compiled graph.

    Args:
        phases: in which they meet other shapes, or forms of them.
        ragged: whether these differ from step to step, as those of images of their own aspect do.
    """
    import torch._dynamo.config
    import torch._inductor.config  # takes seconds, which only a compiled run should spend

    from engine.training.casts import CastsTogether

    # Under DDP dynamo would cut a region at every 25 MB of its weights, to send gradients early: a block of ViT-L into three
    # graphs. Blocks are regions of their own, so gradients leave block by block anyway.
    torch._dynamo.config.optimize_ddp = False
    # On CPUs inductor proves every vector extension by a program built and run in a new process, 25 s on two cores. What the
    # system lists for the processor is enough.
    torch._inductor.config.cpp.vec_isa_ok = True
    # Its code for CPUs is made for a number of threads, which by default is no part of the key under which it is kept: code made
    # for two, run by one, takes fifteen times as long.
    torch._inductor.config.cpp.threads = torch.get_num_threads()
    torch._inductor.config.post_grad_custom_pre_pass = CastsTogether()
    # In each phase blocks meet other numbers of tokens: those of student and teacher, of decoders.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * (phases + 1))
    on_gpu = any(parameter.device.type == "cuda" for parameter in method.parameters())
    static = (*method.regions(), *(method.regions_on_gpus() if on_gpu else ()))
    for dynamic, regions in ((ragged, static), (True, method.ragged_regions())):
        for owner, name in regions:
            region = getattr(owner, name)
            if not hasattr(region, "get_compiler_config"):
                setattr(owner, name, torch.compile(region, fullgraph=True, dynamic=dynamic))


@contextmanager
def as_evaluated(parts: Parts, state: TrainState) -> Iterator[None]:
    """The encoder as it is judged and exported: averaged weights where there are any, eval mode, uncompiled."""
    dtype = AUTOCAST[parts.precision]
    with (
        state.update.average.in_place(),
        torch.compiler.set_stance("force_eager"),
        torch.autocast(parts.ranks.device.type, dtype=dtype, enabled=dtype is not None),
        torch.no_grad(),
    ):
        state.method.eval()
        try:
            yield
        finally:
            state.method.train()
