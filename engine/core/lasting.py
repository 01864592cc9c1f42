"""Tensors that a cache keeps must not be of the kind that its first caller happened to compute with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors made inside have content and take part in autograd, also where the caller is in inference mode, or lists with fake
    tensors what a run will call."""
    with torch.inference_mode(False), unset_fake_temporarily():
        yield
