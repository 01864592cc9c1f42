"""Ranks and collectives: the only place that talks to torch.distributed.

A single process is world size 1 of the same code: every function below then returns its input. Gradients flow through
`all_gather` and `all_reduce`; with gradients averaged over ranks (DDP) they add up to those of one large batch.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as td
from torch import Tensor, nn

from engine.core.errors import BadInput
from engine.core.gpus import unusable
from engine.core.heartbeat import Heartbeat, end, stop_with_parent
from engine.core.host_memory import keep_freed_memory


@dataclass(frozen=True)
class Ranks:
    """Who this process is, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, global_batch: int) -> slice:
        """This rank's rows of a global batch."""
        share = global_batch // self.world
        return slice(self.rank * share, (self.rank + 1) * share)


def start(device: str = "auto") -> Ranks:
    """Join the process group that `torchrun` describes in the environment, or be alone; make the process ready for it.

    Args:
        device: "auto" (a GPU if there is one), "cpu" or "cuda".

    Raises:
        BadInput: the device is not one of these, or not on this machine; or it has a GPU that torch cannot use.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise BadInput(f"--device {device} is unknown; choose auto, cpu or cuda.")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    kind = "cpu" if device == "cpu" else _kind(local_rank)
    if device == "cuda" and kind != "cuda":
        raise BadInput("--device cuda was asked for, but torch sees no CUDA device; choose auto or cpu.")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
    else:
        keep_freed_memory()
    if world > 1:
        td.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=30))
        _meet()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_with_parent()
    rank = td.get_rank() if world > 1 else 0
    return Ranks(rank, world, torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu"))


def _kind(local_rank: int) -> str:
    """Of the device that is there: "cuda" or "cpu". A GPU that can't be used is not gone round: its owner would wait for days."""
    if said := unusable(local_rank):
        raise BadInput(
            f"this machine has a GPU that torch {torch.__version__} cannot use: {said}. docs/faq.md says what helps; "
            "--device cpu goes without."
        )
    if not torch.cuda.is_available():
        return "cpu"
    if local_rank >= torch.cuda.device_count():
        raise BadInput(f"local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}.")
    return "cuda"


def of_lost_rank(error: Exception) -> str:
    """What a collective said where another process of the group is gone or does not answer; nothing where an error is about
    something else."""
    told = str(error).splitlines()[0] if str(error) else ""
    of_gloo = isinstance(error, RuntimeError) and "gloo" in told  # which has no kind of its own
    return told if of_gloo or isinstance(error, td.DistBackendError | td.DistNetworkError) else ""


def stop() -> None:
    """Leave the process group, if there is one."""
    global _place
    if _place is not None:
        _place.heartbeat.leave(_place.store)
        _place = None
    if td.is_initialized():
        td.destroy_process_group()


@dataclass(frozen=True)
class _Place:
    """Where ranks meet outside of collectives, which have a time limit and keep Python from hearing signals: a store of our own
    in rank 0's process, since the launcher's is gone when that was killed."""

    store: td.Store
    heartbeat: Heartbeat


_place: _Place | None = None


def _meet() -> None:
    global _place
    launchers, first = td.distributed_c10d._get_default_store(), td.get_rank() == 0
    host, port = os.environ["MASTER_ADDR"], 0 if first else int(launchers.get("port of tessera"))
    store = td.TCPStore(host, port, is_master=first, wait_for_workers=False, timeout=timedelta(minutes=5))
    if first:
        launchers.set("port of tessera", str(store.port))
    _place = _Place(store, Heartbeat(store.clone(), td.get_rank(), td.get_world_size(), end))
    _place.heartbeat.start()


_alone = False


@contextmanager
def as_one_rank() -> Iterator[None]:
    """Inside, this process acts as if it were alone, and speaks with no other: for what is computed without content."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


_meetings = count()  # the same number on every rank


def world_size() -> int:
    return td.get_world_size() if td.is_initialized() and not _alone else 1


def rank() -> int:
    return td.get_rank() if td.is_initialized() and not _alone else 0


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        td.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        td.all_reduce(grad)
        return grad


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
        td.all_gather(list(out.chunk(world_size())), x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        td.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def all_reduce(x: Tensor) -> Tensor:
    """Sum of `x` over ranks; differentiable."""
    return _AllReduce.apply(x) if world_size() > 1 else x


def all_gather(x: Tensor) -> Tensor:
    """Rows of all ranks, in rank order: [b, ...] -> [world * b, ...]; differentiable."""
    return _AllGather.apply(x) if world_size() > 1 else x


@torch.no_grad()
def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor, of which every rank has one, by their mean, in place."""
    for x in tensors if world_size() > 1 else ():
        total = x.contiguous()
        td.all_reduce(total)
        x.copy_(total / world_size())


@torch.no_grad()
def all_true(flag: Tensor) -> Tensor:
    """A boolean scalar that is true where it is true on every rank. Stays on the device: no host sync."""
    if world_size() == 1:
        return flag
    agreed = flag.to(torch.int32)
    td.all_reduce(agreed, op=td.ReduceOp.MIN)
    return agreed.bool()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on any rank; all ranks get the same answer. Waits for the device."""
    return bool(largest(flag, device))


def largest(value: float, device: torch.device) -> float:
    """Of all ranks' values; all ranks get the same answer. Waits for the device."""
    if world_size() == 1:
        return value
    seen = torch.tensor(value, dtype=torch.float64, device=device)
    td.all_reduce(seen, op=td.ReduceOp.MAX)
    return seen.item()


def group() -> td.ProcessGroup | None:
    """All ranks, for what wants a process group; None when alone."""
    return td.group.WORLD if world_size() > 1 else None


def barrier() -> None:
    """Wait until all ranks are here, however long one of them works: what is gone, the heartbeat notices."""
    if world_size() > 1:
        name = f"meeting-{next(_meetings)}"
        with _first_lives():
            if _place.store.add(name, 1) == world_size():
                _place.store.set(f"{name}-of-all", "")
            _await(f"{name}-of-all")


def _await(name: str) -> str:
    """What the store has under a name, once it is there; by looking, so that signals are heard."""
    pause = 0.001
    while not _place.store.check([name]):
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    return _place.store.get(name).decode()


@contextmanager
def _first_lives() -> Iterator[None]:
    """Around what needs rank 0, without which a run ends."""
    try:
        yield
    except td.DistError:
        end("rank 0 is gone")


def share(value: object) -> object:
    """Rank 0's value (JSON-like) on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]


def from_first(make: Callable[[], object]) -> object:
    """What rank 0 makes (JSON), on every rank. The others wait as long as it takes. An exception on rank 0 is raised there, and
    ends the others by BadInput."""
    if world_size() == 1:
        return make()
    store, name = _place.store, f"meeting-{next(_meetings)}"
    if rank() == 0:
        try:
            value = make()
        except BaseException as error:
            store.set(name, json.dumps({"failed": f"{type(error).__name__}: {error}"}))
            raise
        store.set(name, json.dumps({"value": value}))
        return value
    with _first_lives():
        found = json.loads(_await(name))
    if "failed" in found:
        raise BadInput(f"rank 0 failed: {found['failed']}")
    return found["value"]


def first_to_say(sentence: str) -> bool:
    """Whether no other rank has asked this of that sentence: so that what several ranks would say is said once."""
    if world_size() == 1:
        return True
    key = hashlib.blake2b(sentence.encode("utf-8", "replace"), digest_size=16).hexdigest()
    try:
        return _place.store.add(f"said-{key}", 1) == 1
    except td.DistError:  # rank 0 is gone; twice is better than never
        return True


def union(values: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Every rank's values without repeats, sorted: the same list on every rank."""
    parts: list[list[tuple[str, ...]] | None] = [list(values)]
    if world_size() > 1:
        parts = [None] * world_size()
        td.all_gather_object(parts, list(values))
    return sorted({value for part in parts for value in part})


def parallel(module: nn.Module) -> nn.Module:
    """The module with gradients averaged over ranks; itself when alone or without anything to train."""
    if world_size() == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def without_sync(module: nn.Module) -> AbstractContextManager:
    """Accumulate gradients locally: for all but the last micro-batch of a step."""
    return module.no_sync() if isinstance(module, nn.parallel.DistributedDataParallel) else nullcontext()
