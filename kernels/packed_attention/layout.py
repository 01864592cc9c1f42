"""The layout of a packed batch: read on the host and checked, and as it lies in memory."""

from itertools import pairwise

import torch
from torch import Tensor


def read(tokens: int, cu_seqlens: Tensor, max_seqlen: int, kv_lengths: Tensor | None) -> list[tuple[int, int, int]]:
    """The start, the length and the number of keys of each sequence, all in tokens; a GPU is waited for.

    Args:
        tokens: how many there are.
        cu_seqlens: int32 [S+1], see `kernels.packed_attention`.
        max_seqlen: length of the longest sequence.
        kv_lengths: int32 [S]; None: all tokens are keys.

    Raises:
        ValueError: where the sequences do not fill the tokens, one is longer than max_seqlen or shorter than its keys.
    """
    starts = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    if starts[0] != 0 or starts[-1] != tokens or any(not 0 <= length <= max_seqlen for length in lengths):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the {tokens} tokens in steps of at most max_seqlen = {max_seqlen}, "
            f"got {starts[0]} to {starts[-1]} in steps of {min(lengths, default=0)} to {max(lengths, default=0)}"
        )
    keys = lengths if kv_lengths is None else kv_lengths.tolist()
    for length, key in zip(lengths, keys, strict=True):
        if not 0 <= key <= length:
            raise ValueError(f"kv_lengths must lie between 0 and the length, got {key} for a sequence of {length}")
    return list(zip(starts[:-1], lengths, keys, strict=True))


def equally_long(tokens: int, cu_seqlens: Tensor, max_seqlen: int, kv_lengths: Tensor | None) -> bool:
    """Whether shapes alone tell that each sequence has max_seqlen tokens, all of them keys: there are as many as there can be."""
    return tokens > 0 and kv_lengths is None and (len(cu_seqlens) - 1) * max_seqlen == tokens


def in_chunks(x: Tensor) -> Tensor:
    """x as it is where each row lies in whole chunks of 16 bytes, which is how kernels read 16 bit; else a copy."""
    *strides, last = x.stride()
    if last == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)
