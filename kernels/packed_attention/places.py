"""Where tokens lie in their sequences, and keys laid in front of the other tokens: on the device, so that nothing waits for it.

T tokens, S sequences.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def of_tokens(tokens: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence of each token, int64 [T], and its place in it, int32 [T]."""
    token_T = torch.arange(tokens, device=cu_seqlens.device, dtype=torch.int32)
    sequence_T = torch.searchsorted(cu_seqlens[1:], token_T, right=True)
    return sequence_T, token_T - cu_seqlens[sequence_T]


class KeysFirst(NamedTuple):
    """For kernels that take keys packed for themselves: the order of tokens that puts keys in front, sequence by sequence.

    The number of keys is never known to the host, so rows behind the last key stay, and nobody reads them.
    """

    is_key_T: Tensor
    keyless_T: Tensor
    """Whether the token's sequence has no key."""
    order_T: Tensor
    place_T: Tensor
    """The order's inverse."""
    cu_keys: Tensor
    """int32 [S+1]: where each sequence's keys start."""

    @staticmethod
    def of(tokens: int, cu_seqlens: Tensor, kv_lengths: Tensor) -> "KeysFirst":
        sequence_T, place_T = of_tokens(tokens, cu_seqlens)
        keys_T = kv_lengths[sequence_T]
        is_key_T = place_T < keys_T
        order_T = torch.argsort(~is_key_T, stable=True)
        inverse_T = torch.empty_like(order_T).scatter_(0, order_T, torch.arange(tokens, device=order_T.device))
        cu_keys = torch.nn.functional.pad(kv_lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return KeysFirst(is_key_T, keys_T == 0, order_T, inverse_T, cu_keys)

    def lay(self, x_THD: Tensor) -> Tensor:
        """Keys or values in that order."""
        return x_THD[self.order_T]

    def back(self, grad_THD: Tensor) -> Tensor:
        """Their gradient in the order of the tokens; zero where a token is no key, whatever a kernel left there in memory."""
        return grad_THD[self.place_T].masked_fill_(~self.is_key_T[:, None, None], 0)

    def zeroed(self, x_THD: Tensor) -> Tensor:
        """Zero where a sequence has no key, in place: kernels may leave such rows as they were in memory."""
        return x_THD.masked_fill_(self.keyless_T[:, None, None], 0)

    def agreed(self, lse_HT: Tensor) -> Tensor:
        """-inf where a sequence has no key, in place: kernels have +inf there, or anything."""
        return lse_HT.masked_fill_(self.keyless_T, -torch.inf)


def taken(qkv_T3HD: Tensor, shape: tuple[int, int], keys: KeysFirst | None) -> list[Tensor]:
    """q, k, v as a batch of this shape (B, M), each [B,M,H,D]; keys and values laid in front where only some tokens are keys."""
    q, k, v = qkv_T3HD.unbind(1)
    if keys is not None:
        k, v = keys.lay(k), keys.lay(v)
    return [x.unflatten(0, shape) for x in (q, k, v)]
