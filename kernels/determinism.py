"""The same bits at every run, where torch can give them."""

import os

import torch


def same_bits_from_torch(device: torch.device) -> None:
    """Have torch take its deterministic kernels on this device from now on: sums without atomics, cuBLAS with fixed workspaces.
    What has none warns and runs. On a CPU nothing changes."""
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over each new tensor, for debugging
