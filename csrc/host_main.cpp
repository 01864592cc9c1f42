// Runs the kernels in the emulation on one case, read from standard input and answered on standard output, both as raw
// bytes: a test tool. Every tensor has a heap block of its own of exactly its size, so that AddressSanitizer sees wild
// accesses.
#include "device.h"
#include "packed_attention.h"

namespace {

struct Case {
  int64_t tokens, sequences, heads, head_dim, max_seqlen, bfloat16, has_kv_lengths;
  int64_t token_stride, part_stride, head_stride, qkv_elements;
  int64_t grad_token_stride, grad_head_stride, grad_elements;
  int64_t seed, shared_per_multiprocessor;
  double scale;
};

std::vector<void*> blocks;

// Result memory that is never written stays NaN.
template <class T>
T* allocate(int64_t count) {
  void* memory = std::malloc(std::max<int64_t>(count, 1) * sizeof(T));
  std::memset(memory, 0xff, count * sizeof(T));
  blocks.push_back(memory);
  return static_cast<T*>(memory);
}

template <class T>
T* read(int64_t count) {
  T* memory = allocate<T>(count);
  const size_t got = std::fread(memory, sizeof(T), count, stdin);
  if (got != static_cast<size_t>(count)) tessera::emulation::fail("short input");
  return memory;
}

}  // namespace

int main() {
  const Case given = *read<Case>(1);
  tessera::emulation::seed = given.seed;
  tessera::emulation::shared_per_multiprocessor = static_cast<int>(given.shared_per_multiprocessor);
  const int64_t elements = given.tokens * given.heads * given.head_dim;
  tessera::PackedAttention a{};
  a.qkv = read<uint16_t>(given.qkv_elements);
  a.grad_out = read<uint16_t>(given.grad_elements);
  a.cu_seqlens = read<int32_t>(given.sequences + 1);
  a.kv_lengths = given.has_kv_lengths ? read<int32_t>(given.sequences) : nullptr;
  a.token_stride = given.token_stride;
  a.part_stride = given.part_stride;
  a.head_stride = given.head_stride;
  a.grad_token_stride = given.grad_token_stride;
  a.grad_head_stride = given.grad_head_stride;
  a.tokens = given.tokens;
  a.sequences = static_cast<int32_t>(given.sequences);
  a.heads = static_cast<int32_t>(given.heads);
  a.head_dim = static_cast<int32_t>(given.head_dim);
  a.max_seqlen = static_cast<int32_t>(given.max_seqlen);
  a.scale = static_cast<float>(given.scale);
  a.bfloat16 = given.bfloat16;
  uint16_t* out = allocate<uint16_t>(elements);
  uint16_t* grad_qkv = allocate<uint16_t>(3 * elements);
  a.out = out;
  a.lse = allocate<float>(given.heads * given.tokens);
  a.grad_qkv = grad_qkv;
  for (const auto run : {tessera::packed_attention_forward, tessera::packed_attention_backward})
    if (const char* error = run(a, nullptr)) tessera::emulation::fail(error);
  std::fwrite(out, 2, elements, stdout);
  std::fwrite(a.lse, 4, given.heads * given.tokens, stdout);
  std::fwrite(grad_qkv, 2, 3 * elements, stdout);
  std::fwrite(&tessera::emulation::bank_conflicts, 8, 1, stdout);
  for (void* memory : blocks) std::free(memory);
}
