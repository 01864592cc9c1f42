// Registers every kernel with torch through its stable ABI, so that one binary serves torch 2.10 and later. Autograd,
// fakes and the checks of what a user may pass stay in Python (kernels/OP).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "packed_attention.h"
#include "sinkhorn.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

tessera::PackedAttention describe(const Tensor& qkv, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens,
                                  int64_t max_seqlen, const std::optional<Tensor>& kv_lengths, double scale) {
  tessera::PackedAttention a{};
  a.qkv = qkv.data_ptr();
  a.token_stride = qkv.stride(0);
  a.part_stride = qkv.stride(1);
  a.head_stride = qkv.stride(2);
  a.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  a.kv_lengths = kv_lengths ? static_cast<const int32_t*>(kv_lengths->data_ptr()) : nullptr;
  a.tokens = qkv.size(0);
  a.sequences = static_cast<int32_t>(cu_seqlens.size(0) - 1);
  a.heads = static_cast<int32_t>(qkv.size(2));
  a.head_dim = static_cast<int32_t>(qkv.size(3));
  a.max_seqlen = static_cast<int32_t>(max_seqlen);
  a.scale = static_cast<float>(scale);
  a.bfloat16 = qkv.scalar_type() == ScalarType::BFloat16;
  a.out = out.data_ptr();
  a.lse = static_cast<float*>(lse.data_ptr());
  return a;
}

std::tuple<Tensor, Tensor> packed_attention_forward(Tensor qkv, Tensor cu_seqlens, int64_t max_seqlen,
                                                    std::optional<Tensor> kv_lengths, double scale) {
  const int64_t tokens = qkv.size(0), heads = qkv.size(2), dim = qkv.size(3);
  Tensor out = torch::stable::new_empty(qkv, {tokens, heads, dim});
  Tensor lse = torch::stable::new_empty(qkv, {heads, tokens}, ScalarType::Float);
  const auto arguments = describe(qkv, out, lse, cu_seqlens, max_seqlen, kv_lengths, scale);
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  const char* error = tessera::packed_attention_forward(arguments, current_stream(qkv.get_device_index()));
  STD_TORCH_CHECK(!error, "packed_attention could not start on the GPU: ", error);
  return {out, lse};
}

Tensor packed_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens,
                                 int64_t max_seqlen, std::optional<Tensor> kv_lengths, double scale) {
  Tensor grad_qkv = torch::stable::new_empty(qkv, {qkv.size(0), 3, qkv.size(2), qkv.size(3)});
  auto arguments = describe(qkv, out, lse, cu_seqlens, max_seqlen, kv_lengths, scale);
  arguments.grad_out = grad_out.data_ptr();
  arguments.grad_token_stride = grad_out.stride(0);
  arguments.grad_head_stride = grad_out.stride(1);
  arguments.grad_qkv = grad_qkv.data_ptr();
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  const char* error = tessera::packed_attention_backward(arguments, current_stream(qkv.get_device_index()));
  STD_TORCH_CHECK(!error, "packed_attention could not start on the GPU: ", error);
  return grad_qkv;
}

tessera::Sinkhorn describe(const Tensor& scores, double temperature) {
  const ScalarType dtype = scores.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float,
                  "sinkhorn takes fp16, bf16 and fp32");
  tessera::Sinkhorn a{};
  a.type = dtype == ScalarType::Half       ? tessera::Type::FLOAT16
           : dtype == ScalarType::BFloat16 ? tessera::Type::BFLOAT16
                                           : tessera::Type::FLOAT32;
  a.scores = scores.data_ptr();
  a.row_stride = scores.stride(0);
  a.rows = scores.size(0);
  a.prototypes = static_cast<int32_t>(scores.size(1));
  a.scale = static_cast<float>(1 / temperature);
  return a;
}

// Plans the pass, gives it the memory that it asks for, and enqueues it.
void run(tessera::Sinkhorn a, const Tensor& scores, tessera::SinkhornPass pass,
         const char* (*launch)(const tessera::Sinkhorn&, const tessera::SinkhornPlan&, void*)) {
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  tessera::SinkhornPlan plan;
  const char* error = tessera::sinkhorn_plan(a, pass, plan);
  STD_TORCH_CHECK(!error, "sinkhorn cannot run on this GPU: ", error);
  const Tensor parts = torch::stable::new_empty(scores, {plan.float_count}, ScalarType::Float);
  const Tensor words = torch::stable::new_zeros(scores, {plan.word_count}, ScalarType::Long);
  a.parts = static_cast<float*>(parts.data_ptr());
  a.words = static_cast<uint64_t*>(words.data_ptr());
  error = launch(a, plan, current_stream(scores.get_device_index()));
  STD_TORCH_CHECK(!error, "sinkhorn could not start on the GPU: ", error);
}

Tensor sinkhorn_balance(Tensor scores, std::optional<Tensor> start, double temperature, int64_t iterations) {
  Tensor log_u = torch::stable::new_empty(scores, {scores.size(1)}, ScalarType::Float);
  auto a = describe(scores, temperature);
  a.start = start ? static_cast<const float*>(start->data_ptr()) : nullptr;
  a.iterations = static_cast<int32_t>(iterations);
  a.log_u = static_cast<float*>(log_u.data_ptr());
  run(a, scores, tessera::SinkhornPass::BALANCE, tessera::sinkhorn_balance);
  return log_u;
}

Tensor sinkhorn_assign(Tensor scores, Tensor log_u, double temperature) {
  Tensor out = torch::stable::new_empty(scores, {scores.size(0), scores.size(1)}, ScalarType::Float);
  auto a = describe(scores, temperature);
  a.log_u = static_cast<float*>(log_u.data_ptr());
  a.out = static_cast<float*>(out.data_ptr());
  run(a, scores, tessera::SinkhornPass::ASSIGN, tessera::sinkhorn_assign);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(tessera_cuda, library) {
  library.def(
      "packed_attention_forward(Tensor qkv, Tensor cu_seqlens, int max_seqlen, Tensor? kv_lengths, float scale) -> "
      "(Tensor, Tensor)");
  library.def(
      "packed_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, "
      "int max_seqlen, Tensor? kv_lengths, float scale) -> Tensor");
  library.def("sinkhorn_balance(Tensor scores, Tensor? start, float temperature, int iterations) -> Tensor");
  library.def("sinkhorn_assign(Tensor scores, Tensor log_u, float temperature) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tessera_cuda, CUDA, library) {
  library.impl("packed_attention_forward", TORCH_BOX(&packed_attention_forward));
  library.impl("packed_attention_backward", TORCH_BOX(&packed_attention_backward));
  library.impl("sinkhorn_balance", TORCH_BOX(&sinkhorn_balance));
  library.impl("sinkhorn_assign", TORCH_BOX(&sinkhorn_assign));
}
