// Runs the kernels of one op in the emulation on one case, read from standard input and answered on standard output,
// both as raw bytes: a test tool. The number of the op comes first. Every tensor has a heap block of its own of exactly
// its size, so that AddressSanitizer sees wild accesses.
#include "device.h"
#include "packed_attention.h"
#include "sinkhorn.h"

// A program needs the kernels of the ops that it is asked for only.
namespace tessera {

[[gnu::weak]] const char* packed_attention_forward(const PackedAttention& arguments, void* stream);
[[gnu::weak]] const char* packed_attention_backward(const PackedAttention& arguments, void* stream);
[[gnu::weak]] const char* sinkhorn_plan(const Sinkhorn& arguments, SinkhornPass pass, SinkhornPlan& plan);
[[gnu::weak]] const char* sinkhorn_balance(const Sinkhorn& arguments, const SinkhornPlan& plan, void* stream);
[[gnu::weak]] const char* sinkhorn_assign(const Sinkhorn& arguments, const SinkhornPlan& plan, void* stream);

}  // namespace tessera

namespace {

using tessera::emulation::fail;

enum class Op : int64_t { PACKED_ATTENTION, SINKHORN };

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
  if (got != static_cast<size_t>(count)) fail("short input");
  return memory;
}

void check(const char* error) {
  if (error) fail(error);
}

struct PackedAttentionCase {
  int64_t tokens, sequences, heads, head_dim, max_seqlen, bfloat16, has_kv_lengths;
  int64_t token_stride, part_stride, head_stride, qkv_elements;
  int64_t grad_token_stride, grad_head_stride, grad_elements;
  int64_t seed, shared_per_multiprocessor;
  double scale;
};

void run_packed_attention() {
  if (!tessera::packed_attention_forward) fail("this program has no packed_attention");
  const auto given = *read<PackedAttentionCase>(1);
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
  for (const auto run : {tessera::packed_attention_forward, tessera::packed_attention_backward}) check(run(a, nullptr));
  std::fwrite(out, 2, elements, stdout);
  std::fwrite(a.lse, 4, given.heads * given.tokens, stdout);
  std::fwrite(grad_qkv, 2, 3 * elements, stdout);
  std::fwrite(&tessera::emulation::bank_conflicts, 8, 1, stdout);
}

struct SinkhornCase {
  int64_t rows, prototypes, type, iterations, has_start;
  int64_t row_stride, score_elements;
  int64_t seed, multiprocessors, shared_per_multiprocessor;
  double temperature;
};

// balance, then the assignment that its log_u gives, or without iterations `start`. Of both passes also groups, slices,
// batches and whether they are resident.
void run_sinkhorn() {
  if (!tessera::sinkhorn_plan) fail("this program has no sinkhorn");
  const auto given = *read<SinkhornCase>(1);
  tessera::emulation::seed = given.seed;
  tessera::emulation::multiprocessors = static_cast<int>(given.multiprocessors);
  tessera::emulation::shared_per_multiprocessor = static_cast<int>(given.shared_per_multiprocessor);
  const int64_t elements = given.rows * given.prototypes;
  tessera::Sinkhorn a{};
  a.type = static_cast<tessera::Type>(given.type);
  const int64_t size = a.type == tessera::Type::FLOAT32 ? 4 : 2;
  a.scores = read<char>(given.score_elements * size);
  a.start = given.has_start ? read<float>(given.prototypes) : nullptr;
  a.row_stride = given.row_stride;
  a.rows = given.rows;
  a.prototypes = static_cast<int32_t>(given.prototypes);
  a.iterations = static_cast<int32_t>(given.iterations);
  a.scale = static_cast<float>(1 / given.temperature);
  a.log_u = allocate<float>(given.prototypes);
  a.out = allocate<float>(elements);
  const auto run = [&](tessera::SinkhornPass pass, auto launch) {
    tessera::SinkhornPlan plan;
    check(tessera::sinkhorn_plan(a, pass, plan));
    a.parts = allocate<float>(plan.float_count);
    a.words = allocate<uint64_t>(plan.word_count);
    std::memset(a.words, 0, plan.word_count * 8);
    if (pass != tessera::SinkhornPass::BALANCE || a.iterations) check(launch(a, plan, nullptr));
    const int64_t told[] = {plan.groups, plan.slices, plan.batches, plan.resident};
    std::fwrite(told, 8, 4, stdout);
  };
  run(tessera::SinkhornPass::BALANCE, tessera::sinkhorn_balance);
  if (!a.iterations) std::memcpy(a.log_u, a.start, given.prototypes * 4);
  run(tessera::SinkhornPass::ASSIGN, tessera::sinkhorn_assign);
  std::fwrite(a.log_u, 4, given.prototypes, stdout);
  std::fwrite(a.out, 4, elements, stdout);
}

}  // namespace

int main() {
  switch (*read<Op>(1)) {
    case Op::PACKED_ATTENTION:
      run_packed_attention();
      break;
    case Op::SINKHORN:
      run_sinkhorn();
      break;
    default:
      fail("no such op");
  }
  for (void* memory : blocks) std::free(memory);
}
