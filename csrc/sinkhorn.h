// What the Sinkhorn kernels are asked; the launchers stand in sinkhorn.cu.
#pragma once

#include <cstdint>

namespace tessera {

// Widest row: 32 slices, whose blocks wait for one another; an H200 holds eight times as many at once.
constexpr int MAX_PROTOTYPES = 131072;

enum class Type : int32_t { FLOAT16, BFLOAT16, FLOAT32 };

// B rows, K prototypes. Rows of the scores are contiguous and start on 16 bytes; all else is contiguous and fp32.
struct Sinkhorn {
  Type type;           // of scores
  const void* scores;  // [B, K]
  int64_t row_stride;  // in elements
  int64_t rows;
  int32_t prototypes;
  float scale;  // 1 / temperature
  // balance
  const float* start;  // log_u [K] before the first iteration; null: log_v is 0
  int32_t iterations;
  // written by balance, read by assign
  float* log_u;  // [K]
  // assign
  float* out;  // [B, K]
  // as many as the plan says
  float* parts;
  uint64_t* words;  // all 0
};

enum class SinkhornPass { BALANCE, ASSIGN };

// How a pass lies on the GPU, and what memory it takes from the caller.
struct SinkhornPlan {
  int32_t threads, slices, groups;
  int32_t width;    // columns of a slice
  int32_t batches;  // of a group's rows
  int32_t buffers;  // in shared memory, of a batch each
  int32_t ahead;    // batches whose copies are under way
  bool resident;    // all batches lie in shared memory, from the first iteration to the last
  int32_t shared;   // bytes
  int64_t float_count, word_count;  // of parts and words
};

// Null on success, else why not. A pass enqueues one cooperative kernel.
const char* sinkhorn_plan(const Sinkhorn& arguments, SinkhornPass pass, SinkhornPlan& plan);
const char* sinkhorn_balance(const Sinkhorn& arguments, const SinkhornPlan& plan, void* stream);
const char* sinkhorn_assign(const Sinkhorn& arguments, const SinkhornPlan& plan, void* stream);

}  // namespace tessera
