"""The layers that encoders and decoders are made of, on packed tokens, with timm's state-dict keys.

Shapes: T packed tokens, S sequences, C channels, H heads, D head dim, L sequence length, R patch rows of a step, E elements of a
patch (P * P * 3, channel last).
"""

from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from engine.core.errors import BadInput
from engine.model import residual
from engine.model.depth import put, take
from engine.model.patch_sizes import embedding_for
from engine.model.recomputing import recomputed
from kernels.packed_attention import HEAD_DIMS


class LayerScale(nn.Module):
    """Channels weighed by a learned vector that starts at `start` (Touvron et al. 2021, CaiT)."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x_TC: Tensor) -> Tensor:
        return x_TC * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention inside each packed sequence.

    The packed kernels know no bias of scores: with one, all sequences are as long as it is, and torch's
    scaled_dot_product_attention takes them as a batch.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % heads or dim // heads not in HEAD_DIMS:
            raise BadInput(f"width {dim} over {heads} heads makes heads of {dim / heads:g}, not one of {HEAD_DIMS}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x_TC: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        kv_lengths: Tensor | None = None,
        bias_HLL: Tensor | None = None,
    ) -> Tensor:
        """[T, C] to [T, C]. `kv_lengths` as in kernels.packed_attention; `bias_HLL` is added to every sequence's scores.

        Raises ValueError for both at once.
        """
        qkv_T3HD = self.qkv(x_TC).unflatten(-1, (3, self.heads, -1))
        if bias_HLL is None:
            return self.proj(kernels.packed_attention(qkv_T3HD, cu_seqlens, max_seqlen, kv_lengths).flatten(-2))
        if kv_lengths is not None:
            raise ValueError("attention takes kv_lengths or a bias, not both")
        q_SHLD, k_SHLD, v_SHLD = qkv_T3HD.unflatten(0, (-1, bias_HLL.shape[-1])).permute(2, 0, 3, 1, 4).unbind(0)
        mixed_SHLD = F.scaled_dot_product_attention(q_SHLD, k_SHLD, v_SHLD, attn_mask=bias_HLL[None].to(q_SHLD.dtype))
        return self.proj(mixed_SHLD.transpose(1, 2).flatten(2).flatten(0, 1))


class Mlp(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_TC: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_TC)))


class GatedMlp(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202), as DINOv2's largest models have it: SiLU of the first half of one linear layer's
    outputs weighs the other half, and a second layer reads `hidden` products."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_TC: Tensor) -> Tensor:
        gate, value = self.fc1(x_TC).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class Block(nn.Module):
    """One pre-norm transformer block on packed tokens; encoder and decoder share it.

    All blocks of one shape hold equal Python attributes, so that one compiled code serves them all.

    Attributes:
        recompute: what backward computes again, one of `engine.model.recomputing.CHOICES`.
    """

    recompute: str = "none"

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_dim: int | None = None,
        *,
        qkv_bias: bool = True,
        init_values: float | None = None,
        eps: float = 1e-6,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, qkv_bias)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = (GatedMlp if gated else Mlp)(dim, mlp_dim or 4 * dim)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)

    @recomputed
    def forward(
        self,
        x_TC: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        kv_lengths: Tensor | None = None,
        bias_HLL: Tensor | None = None,
        worth_2T1: Tensor | None = None,
    ) -> Tensor:
        """Attention and MLP, each added to its input: [T, C] to [T, C]. `kv_lengths` and `bias_HLL` as in Attention; `worth_2T1`,
        fp32, is what each token's branches count under stochastic depth."""
        change_TC = self.attend(x_TC, cu_seqlens, max_seqlen, kv_lengths, bias_HLL)
        if worth_2T1 is None:
            x_TC = residual.add(x_TC, change_TC)
            return residual.add(x_TC, self.feed(x_TC))
        x_TC = residual.add(x_TC, change_TC * worth_2T1[0])
        return residual.add(x_TC, self.feed(x_TC) * worth_2T1[1])

    def attend(
        self,
        x_TC: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        kv_lengths: Tensor | None = None,
        bias_HLL: Tensor | None = None,
    ) -> Tensor:
        """The attention branch alone, without the residual."""
        return self.ls1(self.attn(self.norm1(x_TC), cu_seqlens, max_seqlen, kv_lengths, bias_HLL))

    def feed(self, x_TC: Tensor) -> Tensor:
        """The MLP branch alone, without the residual."""
        return self.ls2(self.mlp(self.norm2(x_TC)))

    def flops(self, length: int) -> float:
        """Operations of one forward pass for a sequence of `length` tokens: matrix products only, two per multiply-add."""
        weights = sum(part.weight.numel() for part in self.modules() if isinstance(part, nn.Linear))
        return 2.0 * length * weights + 4.0 * length**2 * self.attn.proj.in_features

    @recomputed
    def forward_dropped(
        self,
        x_TC: Tensor,
        worth_2T1: Tensor,
        rows_2R: Tensor,
        places_2T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        bias_HLL: Tensor | None = None,
    ) -> Tensor:
        """`forward` where each branch is computed only for its rows of x_TC, as drawn (`engine.model.depth.Dropped`); cu_seqlens
        and max_seqlen are those of these rows."""
        attending, feeding = zip(rows_2R, places_2T, worth_2T1, strict=True)
        change_RC = self.attend(take(x_TC, *attending), cu_seqlens, max_seqlen, None, bias_HLL)
        x_TC = put(x_TC, change_RC, *attending)
        return put(x_TC, self.feed(take(x_TC, *feeding)), *feeding)


class PatchEmbed(nn.Module):
    """The patch projection: `proj` holds timm's convolution weight [C, 3, P, P], applied as one matrix product; to patches of
    another size as `engine.model.patch_sizes` has it."""

    def __init__(self, patch_size: int, dim: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size, bias=bias)

    def forward(self, patches_RE: Tensor) -> Tensor:
        weight_C3PP = embedding_for(self.proj.weight, isqrt(patches_RE.shape[1] // 3))
        weight_CE = weight_C3PP.permute(0, 2, 3, 1).flatten(1)  # patches come (row, column, channel)
        return F.linear(patches_RE.to(weight_CE.dtype), weight_CE, self.proj.bias)
