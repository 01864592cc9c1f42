"""Memory handed out so that misuse of it shows: what was not written is NaN, what lies around an output may not change, and what
is kept after a call is counted."""

import gc
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.choice import CALLS

ZONE = 4096  # bytes around each allocation that must stay as they are
POISON = 0xFF  # as a byte of every number: NaN for floats, -1 for integers

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format: lambda size, **kw: (size, None),
    _aten.empty_strided.default: lambda size, stride, **kw: (size, stride),
    _aten.new_empty.default: lambda x, size, **kw: (size, None),
    _aten.new_empty_strided.default: lambda x, size, stride, **kw: (size, stride),
    _aten.empty_like.default: lambda x, **kw: (x.shape, torch.empty_like(x, device="meta").stride()),
}


class Watched(TorchDispatchMode):
    """Inside, tensors that are made empty by the caller lie between two zones, poisoned, and are known afterwards.

    What ops in C++ allocate for their results is not seen, nor what compiled code does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._whole: list[Tensor] = []
        self._storages: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "tessera":  # behind the dispatcher no mode would see what it allocates
            with self:
                return CALLS[func._schema.name.removeprefix("tessera::")].body(*args, **kwargs)
        if func not in _ALLOCATIONS or kwargs.get("memory_format") is not None or kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        size, stride = _ALLOCATIONS[func](*args, **kwargs)
        like = args[0] if isinstance(args[0], Tensor) else None
        dtype = kwargs.get("dtype") or (torch.get_default_dtype() if like is None else like.dtype)
        device = kwargs.get("device") or (torch.get_default_device() if like is None else like.device)
        plain = (
            torch.empty_strided(size, stride, device="meta") if stride is not None else torch.empty(size, device="meta")
        )
        elements = plain.untyped_storage().nbytes() // plain.element_size()
        inner = -(-elements * dtype.itemsize // 16) * 16  # the rear zone begins on a boundary, too
        whole = torch.full((ZONE + inner + ZONE,), POISON, dtype=torch.uint8, device=device)
        self._whole.append(whole)
        self._storages.append(StorageWeakRef(whole.untyped_storage()))
        return whole[ZONE : ZONE + inner].view(dtype).as_strided(size, plain.stride(), ZONE // dtype.itemsize)

    def trespassed(self) -> str:
        """Where a zone was written to, in words; empty where none was. Waits for the device."""
        for whole in self._whole:
            for place, zone in (("before", whole[:ZONE]), ("behind", whole[-ZONE:])):
                if not bool((zone == POISON).all()):
                    return f"it wrote {place} one of its outputs"
        return ""

    def kept(self) -> int:
        """Bytes of these tensors that are still there when their users have let go of them."""
        sizes = [len(whole) for whole in self._whole]
        self._whole.clear()
        gc.collect()
        return sum(size for size, storage in zip(sizes, self._storages, strict=True) if not storage.expired())


def poison_cache(nbytes: int, device: torch.device) -> None:
    """Leave so much poisoned memory with the allocator of a GPU, which hands it out next: also to what `Watched` doesn't see."""
    if device.type == "cuda":
        torch.full((nbytes,), POISON, dtype=torch.uint8, device=device)


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """One number per tensor that changes when a bit of it does, nearly surely."""
    return [int(as_integers(x).to(torch.int64).sum()) for x in tensors]


def as_integers(x: Tensor) -> Tensor:
    """The same bits as integers, so that NaN equals itself."""
    x = x.detach().contiguous()
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
