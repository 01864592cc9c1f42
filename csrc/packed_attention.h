// What the packed-attention kernels are asked; the launchers stand in packed_attention.cu.
#pragma once

#include <cstdint>

namespace tessera {

// Longest sequence: its keys and values (of head dim 128) just fit in the 163 KB of shared memory of sm_80.
constexpr int MAX_LENGTH = 320;

// T tokens, S sequences, H heads, D head dim. Strides count elements; the last dimension is contiguous, and every row
// starts on 16 bytes. out, lse, grad_qkv are contiguous.
struct PackedAttention {
  const void* qkv;  // [T, 3, H, D]
  int64_t token_stride, part_stride, head_stride;
  const int32_t* cu_seqlens;  // [S + 1]
  const int32_t* kv_lengths;  // [S]; null: every token is a key
  int64_t tokens;
  int32_t sequences, heads, head_dim, max_seqlen;
  float scale;
  bool bfloat16;  // else float16
  void* out;      // [T, H, D], written by forward, read by backward
  float* lse;     // [H, T], likewise
  // backward only
  const void* grad_out;  // [T, H, D]
  int64_t grad_token_stride, grad_head_stride;
  void* grad_qkv;  // [T, 3, H, D]
};

// Both enqueue one kernel on `stream`; null on success, else what the CUDA runtime says.
const char* packed_attention_forward(const PackedAttention& arguments, void* stream);
const char* packed_attention_backward(const PackedAttention& arguments, void* stream);

}  // namespace tessera
