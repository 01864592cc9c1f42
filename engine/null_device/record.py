"""In a process on the device that computes nothing: what it wrote down."""

import ctypes
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Event(NamedTuple):
    """One line of the log.

    kind, and what its numbers are: launch or refused (blocks, threads, bytes of dynamic shared memory), product (rows, columns of
    all in a batch, summands), load (registers, bytes of stack frame); malloc, memset, copy_to_device, copy_from_device,
    copy_on_device, copy_on_host, collective (bytes of a rank); wait. text: the kernel, the cuBLAS or NCCL call, for copies from
    or to the host "pinned" or "pageable", the call that waits.

    Of graphs: capture ("begins" or "ends"; nodes, and launches and products among them); what is captured in between, as above
    with captured_ before the kind; refused_in_capture (the call, and CUDA's error); replay (nodes, launches and products).
    """

    kind: str
    text: str
    a: int
    b: int
    c: int


@contextmanager
def recorded() -> Iterator[list[Event]]:
    """The list is filled when the context ends."""
    library = ctypes.CDLL("libcuda.so.1")
    events: list[Event] = []
    library.nullcuda_record(1)
    try:
        yield events
    finally:
        with tempfile.NamedTemporaryFile("r") as file:
            library.nullcuda_write(file.name.encode())
            library.nullcuda_record(0)
            lines = (line.rstrip("\n").split("\t") for line in file)
            events += [Event(kind, text, *map(int, numbers)) for kind, text, *numbers in lines]
