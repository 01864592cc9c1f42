// Attention inside each sequence of a packed batch, one block per (sequence, head). Bytes, operations and why this
// exists: kernels/packed_attention/__init__.py.
//
// Forward keeps all keys and values of the pair in shared memory; a warp takes 16 queries at a time.
// Backward divides the accumulators by hand, so that it needs neither atomics nor an fp32 buffer for the gradient of q:
// first a warp takes some keys at a time and runs over the queries (gradients of k and v), then it takes as many queries
// and runs over the keys (gradient of q). Scores are formed twice for that. Up to head dim 64 it takes 32 rows, so that
// what it reads from shared memory feeds two products, and 16 where only these are left; beyond, 16 fill the registers.
// Where two blocks with all of q, k, v, grad_out fit on one multiprocessor, everything is staged once; else k and v
// replace q and grad_out between the two phases.
//
// S sequences, H heads, D head dim. Rows are padded to a multiple of 16, the row count of one mma.
#include "packed_attention.h"

#include <type_traits>

#include "device.h"

namespace tessera {
namespace {

constexpr int TILE = 16;
constexpr int MAX_WARPS = 8;
constexpr int SLICE = 4;  // tiles of keys whose scores forward holds at once

__host__ __device__ constexpr int tiles_of(int rows) { return (rows + TILE - 1) / TILE; }

// Rows of D 16-bit elements in shared memory, in bytes. Any 8 consecutive rows have the same 16-byte chunk in different
// bank groups: chunks are permuted by the row number, or, where D does not divide evenly, rows are a chunk longer.
template <int D>
struct Rows {
  static constexpr int PITCH = 2 * (D == 80 ? 88 : D);
  // Tiles of two tensors and two numbers per row take turns, so that one address serves all of them.
  static constexpr int SECOND = TILE * PITCH;
  static constexpr int STATISTICS = 2 * SECOND;
  static constexpr int GROUP = STATISTICS + 2 * TILE * 4;
  static constexpr int PERMUTED = D == 80 ? 1 : D % 64 ? 4 : 8;  // chunks that change places among themselves

  TESSERA_DEVICE static uint32_t offset(int row, int chunk) {
    const int shift = PERMUTED == 8 ? row & 7 : PERMUTED == 4 ? row >> 1 & 3 : 0;
    return row * PITCH + (chunk ^ shift) * 16;
  }
  // From the address of chunk 0 or 1 of a row, that of the chunk 2 * step further. Chunks that change places are
  // aligned to their sum, so no address has to be kept for a step.
  TESSERA_DEVICE static uint32_t advance(uint32_t address, int step) {
    constexpr int STEPS = PERMUTED > 1 ? PERMUTED / 2 : 1;
    return (address ^ step % STEPS * 32) + step / STEPS * STEPS * 32;
  }
  // What lane i names of a tile for load_matrices. Plain, the 16 rows are an A operand; transposed, a B operand whose k
  // runs over the rows: registers 0, 1 hold columns 0..7, registers 2, 3 columns 8..15.
  TESSERA_DEVICE static uint32_t across() { return offset(lane() % 16, lane() / 16); }
  // Plain, B operands whose k runs along the row: registers 0, 1 hold rows 0..7, registers 2, 3 rows 8..15 of the same
  // step; or, of 8 rows alone, those of the next step.
  template <int EIGHTS = 2>
  TESSERA_DEVICE static uint32_t along() {
    return EIGHTS == 2 ? offset(lane() / 16 * 8 + lane() % 8, lane() / 8 % 2) : offset(lane() % 8, lane() / 8);
  }
};

// One (sequence, head): where it starts, how many tokens it has, and how many of them are keys. A layout that breaks
// its promise is cut: results are wrong then, but nothing outside the tensors and shared memory is touched.
struct Pair {
  int start, head, length, keys;
  TESSERA_DEVICE explicit Pair(const PackedAttention& a) {
    const int sequence = blockIdx.x / a.heads;
    head = blockIdx.x % a.heads;
    const int tokens = static_cast<int>(a.tokens);
    start = max(0, min(a.cu_seqlens[sequence], tokens));
    length = max(0, min(min(a.cu_seqlens[sequence + 1], tokens) - start, a.max_seqlen));
    keys = a.kv_lengths ? max(0, min(a.kv_lengths[sequence], length)) : length;
  }

  // Shared memory holds it for when registers are short: 16 bytes, and the tiles behind them stay aligned.
  static constexpr int BYTES = 128;
  TESSERA_DEVICE explicit Pair(uint32_t kept) {
    const uint4 words = load_shared_again(kept);
    start = words.x, head = words.y, length = words.z, keys = words.w;
  }
  TESSERA_DEVICE void keep(uint32_t to) const {
    if (thread_index()) return;
    const int words[] = {start, head, length, keys};
#pragma unroll
    for (int i = 0; i < 4; ++i) store_shared(to + i * 4, as_float(words[i]));
  }
};

// The block copies `rows` rows to shared memory, and zeros up to a whole tile: 0 times what lay there may be NaN. A warp
// takes whole tiles, so that a lane's places in a tile are the same for all of them.
template <int D, class Element>
TESSERA_DEVICE void stage(uint32_t to, const Element* from, int64_t stride, int rows) {
  constexpr int CHUNKS = D / 8, EACH = TILE * CHUNKS / 32;
  static_assert(EACH * 32 == TILE * CHUNKS);
  for (int tile = warp(); tile < tiles_of(rows); tile += warps()) {
    const Element* first = from + int64_t{tile} * TILE * stride;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int row = (lane() + i * 32) / CHUNKS, chunk = (lane() + i * 32) % CHUNKS;
      const bool real = tile * TILE + row < rows;
      copy_async(to + tile * Rows<D>::GROUP + Rows<D>::offset(row, chunk), first + (real ? row : 0) * stride + chunk * 8,
                 real);
    }
  }
}

template <class Element>
TESSERA_DEVICE void zero_rows(Element* to, int64_t stride, int first, int end, int dim) {
  const int chunks = dim / 8;
  for (int i = thread_index(); i < (end - first) * chunks; i += blockDim.x)
    *reinterpret_cast<uint4*>(to + (first + i / chunks) * stride + i % chunks * 8) = uint4{0, 0, 0, 0};
}

// All of a tile's A operands, from shared memory or straight from global memory, where `rows` rows exist.
template <int D>
TESSERA_DEVICE void load_operand(uint32_t (&a)[D / 16][4], uint32_t tile) {
#pragma unroll
  for (int step = 0; step < D / 16; ++step) load_matrices(a[step], Rows<D>::advance(tile + Rows<D>::across(), step));
}

template <int D, class Element>
TESSERA_DEVICE void load_operand(uint32_t (&a)[D / 16][4], const Element* tile, int64_t stride, int rows) {
  const int g = lane() / 4, t = lane() % 4;
#pragma unroll
  for (int step = 0; step < D / 16; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8;
      const Element* pair = tile + row * stride + step * 16 + i / 2 * 8 + t * 2;
      a[step][i] = row < rows ? *reinterpret_cast<const uint32_t*>(pair) : 0;
    }
}

// c [16 M x 8 EIGHTS] += a [16 M x D] rows [8 EIGHTS x D]^T, where this lane names a row as Rows::along() says. What is
// read from shared memory is multiplied by all M tiles.
template <class Element, int D, int M, int EIGHTS>
TESSERA_DEVICE void scores(float (&c)[M][EIGHTS][4], const uint32_t (&a)[M][D / 16][4], uint32_t along,
                           int further = 0) {
  constexpr int STEPS = 2 / EIGHTS;  // that one load serves
  static_assert(D / 16 % STEPS == 0);
#pragma unroll
  for (int step = 0; step < D / 16; step += STEPS) {
    uint32_t b[4];
    load_matrices(b, Rows<D>::advance(along, step) + further);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int m = 0; m < M; ++m)
        multiply_add<Element>(c[m][i % EIGHTS], a[m][step + i / EIGHTS], b[i * 2], b[i * 2 + 1]);
  }
}

// c [16 M x D] += a [16 M x 16] rows [16 x D], where this lane names a row as Rows::across() says; likewise.
template <class Element, int D, int M>
TESSERA_DEVICE void accumulate(float (&c)[M][D / 8][4], const uint32_t (&a)[M][4], uint32_t across, int further = 0) {
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t b[4];
    load_matrices_transposed(b, Rows<D>::advance(across, step) + further);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      multiply_add<Element>(c[m][step * 2], a[m], b[0], b[1]);
      multiply_add<Element>(c[m][step * 2 + 1], a[m], b[2], b[3]);
    }
  }
}

// The result of one product, rounded, is the A operand of the next as it lies in the registers; `first` counts its eights
// of columns.
template <class Element, int M, int EIGHTS>
TESSERA_DEVICE void round_to_operand(uint32_t (&a)[M][4], const float (&c)[M][EIGHTS][4], int first = 0) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int i = 0; i < 2 * EIGHTS; ++i)
      a[m][first * 2 + i] = pack<Element>(c[m][i / 2][i % 2 * 2], c[m][i / 2][i % 2 * 2 + 1]);
}

// Lane t of a quad has word t of four chunks, and gets chunk t.
TESSERA_DEVICE void transpose_in_quad(uint32_t (&word)[4]) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      const bool upper = lane() & distance;
      const uint32_t other = shuffle_xor(upper ? word[i] : word[i + distance], distance);
      if (upper)
        word[i] = other;
      else
        word[i + distance] = other;
    }
}

// Writes the first `rows` rows of a tile, times a factor for the upper and one for the lower 8: 64 bytes of a row at
// once, since half a sector costs as much as a whole one.
template <int D, class Element>
TESSERA_DEVICE void store_tile(Element* to, int64_t stride, int rows, const float (&c)[D / 8][4], float upper,
                               float lower) {
  const int g = lane() / 4, t = lane() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = half ? lower : upper;
    Element* row = to + (g + half * 8) * stride;
    const bool real = g + half * 8 < rows;
#pragma unroll
    for (int first = 0; first < D / 8; first += 4) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4 && first + i < D / 8; ++i)
        word[i] = pack<Element>(c[first + i][half * 2] * factor, c[first + i][half * 2 + 1] * factor);
      if (first + 4 <= D / 8) {
        transpose_in_quad(word);
        if (real) *reinterpret_cast<uint4*>(row + (first + t) * 8) = uint4{word[0], word[1], word[2], word[3]};
      } else if (real) {
#pragma unroll
        for (int i = 0; first + i < D / 8; ++i) *reinterpret_cast<uint32_t*>(row + (first + i) * 8 + t * 2) = word[i];
      }
    }
  }
}

template <class Element, int D>
__global__ void __launch_bounds__(MAX_WARPS * 32) forward_kernel(PackedAttention a) {
  const Pair pair(a);
  const int64_t out_stride = int64_t{a.heads} * D;
  const Element* q = static_cast<const Element*>(a.qkv) + pair.start * a.token_stride + pair.head * a.head_stride;
  Element* out = static_cast<Element*>(a.out) + pair.start * out_stride + pair.head * D;
  float* lse = a.lse + pair.head * a.tokens + pair.start;
  if (pair.keys == 0) {
    zero_rows(out, out_stride, 0, pair.length, D);
    for (int i = thread_index(); i < pair.length; i += blockDim.x) lse[i] = -infinity();
    return;
  }
  const uint32_t k_shared = shared_address(dynamic_shared());
  const uint32_t v_shared = k_shared + Rows<D>::SECOND;
  const uint32_t along = k_shared + Rows<D>::along(), across = k_shared + Rows<D>::across();
  stage<D>(k_shared, q + a.part_stride, a.token_stride, pair.keys);
  stage<D>(v_shared, q + 2 * a.part_stride, a.token_stride, pair.keys);

  const int g = lane() / 4, t = lane() % 4;
  const float to_log2 = a.scale * LOG2_E;
  bool staged = false;
  for (int first = warp() * TILE; first < pair.length || !staged; first += warps() * TILE) {
    uint32_t q_operand[1][D / 16][4];
    load_operand<D>(q_operand[0], q + first * a.token_stride, a.token_stride, pair.length - first);
    if (!staged) {
      // also by a warp that has no queries
      wait_copies();
      __syncthreads();
      staged = true;
      if (first >= pair.length) break;
    }
    float result[1][D / 8][4] = {};
    // of rows g and g + 8: largest scaled score so far, in powers of two, and this lane's share of the sum
    float largest[2] = {-infinity(), -infinity()}, sum[2] = {};
#pragma unroll 1
    for (int slice = 0; slice < pair.keys; slice += SLICE * TILE) {
      float s[SLICE][1][2][4] = {};
      float before[2] = {largest[0], largest[1]};
#pragma unroll
      for (int i = 0; i < SLICE; ++i) {
        const int key = slice + i * TILE;
        if (key >= pair.keys) break;
        scores<Element, D>(s[i], q_operand, along + key / TILE * Rows<D>::GROUP);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float& score = s[i][0][j / 4][j % 4];
          score = key + j / 4 * 8 + t * 2 + j % 2 < pair.keys ? score * to_log2 : -infinity();
          largest[j % 4 / 2] = fmaxf(largest[j % 4 / 2], score);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        largest[half] = fmaxf(largest[half], shuffle_xor(largest[half], 1));
        largest[half] = fmaxf(largest[half], shuffle_xor(largest[half], 2));
        const float shrink = exp2_approximate(before[half] - largest[half]);
        sum[half] *= shrink;
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
          result[0][i][half * 2] *= shrink;
          result[0][i][half * 2 + 1] *= shrink;
        }
      }
#pragma unroll
      for (int i = 0; i < SLICE; ++i) {
        const int key = slice + i * TILE;
        if (key >= pair.keys) break;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float& p = s[i][0][j / 4][j % 4];
          p = exp2_approximate(p - largest[j % 4 / 2]);
          sum[j % 4 / 2] += p;
        }
        uint32_t p_operand[1][4];
        round_to_operand<Element>(p_operand, s[i]);
        accumulate<Element, D>(result, p_operand, across + key / TILE * Rows<D>::GROUP, Rows<D>::SECOND);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += shuffle_xor(sum[half], 1);
      sum[half] += shuffle_xor(sum[half], 2);
      const int row = first + g + half * 8;
      if (t == 0 && row < pair.length) lse[row] = (largest[half] + log2f(sum[half])) * LN_2;
    }
    store_tile<D>(out + first * out_stride, out_stride, pair.length - first, result[0], 1 / sum[0], 1 / sum[1]);
  }
}

// Tiles of rows that a warp of backward owns at once. Two halve what is read from shared memory, where the accumulators
// of both fit in the registers.
template <int D>
constexpr int TOGETHER = D <= 64 ? 2 : 1;

// So that two blocks have enough registers: 168 a thread at head dim 32, 255 at 64. Longer rows have one block.
template <int D>
constexpr int BACKWARD_WARPS = D == 32 ? 6 : D == 64 ? 4 : MAX_WARPS;

// The warps of a block take M tiles in turn, and then what is left of them singly. `own` gives back which it was.
template <int M, class Tiles, class Own>
TESSERA_DEVICE void in_turn(const Tiles& tiles, int turn, const Own& own) {
  int tile = turn * M;
#pragma unroll 1
  while (tile + M <= tiles()) tile = own(tile, std::integral_constant<int, M>{}) + warps() * M;
  if constexpr (M > 1) {
    // the warp whose turn it is next begins
    const int whole = tiles() / M;
#pragma unroll 1
    for (tile = whole * M + tile / M - whole; tile < tiles();)
      tile = own(tile, std::integral_constant<int, 1>{}) + warps();
  }
}

struct Backward : PackedAttention {
  float to_log2;  // scale, for exponents of two
};

// RESIDENT: q, k, v and grad_out lie in shared memory at once.
template <class Element, int D, bool RESIDENT>
__global__ void __launch_bounds__(BACKWARD_WARPS<D> * 32, D <= 64 ? 2 : 1) backward_kernel(Backward a) {
  constexpr int SECOND = Rows<D>::SECOND, GROUP = Rows<D>::GROUP;
  const Pair pair(a);
  const int64_t out_stride = int64_t{a.heads} * D, grad_stride = 3 * out_stride;
  // pair and pointers are formed where they are used: kept through the products, they would not fit in the registers
  const auto part = [&](const Pair& of, int index, int row = 0) {
    return static_cast<const Element*>(a.qkv) + computed_here(of.start + row) * a.token_stride +
           computed_here(index) * a.part_stride + computed_here(of.head) * a.head_stride;
  };
  const auto grad_out = [&](const Pair& of, int row = 0) {
    return static_cast<const Element*>(a.grad_out) + computed_here(of.start + row) * a.grad_token_stride +
           computed_here(of.head) * a.grad_head_stride;
  };
  const auto grad = [&](const Pair& of, int index, int row = 0) {
    return static_cast<Element*>(a.grad_qkv) + computed_here(of.start + row) * grad_stride +
           computed_here(index) * out_stride + computed_here(of.head) * D;
  };
  zero_rows(grad(pair, 1), grad_stride, pair.keys, pair.length, D);
  zero_rows(grad(pair, 2), grad_stride, pair.keys, pair.length, D);
  if (pair.keys == 0) {
    zero_rows(grad(pair, 0), grad_stride, 0, pair.length, D);
    return;
  }

  const uint32_t kept = shared_address(dynamic_shared()), q_shared = kept + Pair::BYTES;
  const auto k_rows = [&] {
    return RESIDENT ? q_shared + tiles_of(static_cast<int>(computed_here(a.max_seqlen))) * GROUP : q_shared;
  };
  // per tile of queries: 16 log-sum-exps in powers of two, then 16 dot products of out and grad_out, negative
  const uint32_t statistics = q_shared + Rows<D>::STATISTICS;
  pair.keep(kept);
  stage<D>(q_shared, part(pair, 0), a.token_stride, pair.length);
  stage<D>(q_shared + SECOND, grad_out(pair), a.grad_token_stride, pair.length);
  if constexpr (RESIDENT) {
    stage<D>(k_rows(), part(pair, 1), a.token_stride, pair.keys);
    stage<D>(k_rows() + SECOND, part(pair, 2), a.token_stride, pair.keys);
  }

  const Element* out = static_cast<const Element*>(a.out) + pair.start * out_stride + pair.head * D;
  const float* lse = a.lse + pair.head * a.tokens + pair.start;
  for (int first = warp() * 8; first < tiles_of(pair.length) * TILE; first += warps() * 8) {
    const int row = first + lane() / 4, t = lane() % 4;
    const bool real = row < pair.length;
    float sum = 0;
    for (int chunk = t; chunk < D / 8 && real; chunk += 4) {
      const uint4 o = *reinterpret_cast<const uint4*>(out + row * out_stride + chunk * 8);
      const uint4 grad_o = *reinterpret_cast<const uint4*>(grad_out(pair) + row * a.grad_token_stride + chunk * 8);
      const uint32_t o_words[] = {o.x, o.y, o.z, o.w}, grad_words[] = {grad_o.x, grad_o.y, grad_o.z, grad_o.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<Element>(o_words[i]), y = unpack<Element>(grad_words[i]);
        sum += x.x * y.x + x.y * y.y;
      }
    }
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (t == 0) {
      const uint32_t to = statistics + row / TILE * GROUP + row % TILE * 4;
      // a row of padding has no probability anywhere
      store_shared(to, real ? lse[row] * LOG2_E : infinity());
      store_shared(to + TILE * 4, -sum);
    }
  }
  wait_copies();
  __syncthreads();

  const auto own_keys = [&](int own, auto count) {
    constexpr int M = decltype(count)::value;
    const Pair pair(kept);
    const int tiles = tiles_of(pair.length);
    uint32_t k_operand[M][D / 16][4], v_operand[M][D / 16][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if constexpr (RESIDENT) {
        load_operand<D>(k_operand[m], k_rows() + (own + m) * GROUP);
        load_operand<D>(v_operand[m], k_rows() + SECOND + (own + m) * GROUP);
      } else {
        const int row = (own + m) * TILE;
        load_operand<D>(k_operand[m], part(pair, 1, row), a.token_stride, pair.keys - row);
        load_operand<D>(v_operand[m], part(pair, 2, row), a.token_stride, pair.keys - row);
      }
    }
    // eights of queries that are asked at once: registers are short for both with two tiles of keys
    constexpr int EIGHTS = M > 1 ? 1 : 2;
    // from the last tile to the first: one register counts them and keeps whose they are asked for
    constexpr uint32_t COUNT = 32;
    static_assert(tiles_of(MAX_LENGTH) < COUNT);
    uint32_t left = own * COUNT + tiles;
    const uint32_t last = q_shared + (tiles - 1) * GROUP;
    uint32_t along = last + Rows<D>::template along<EIGHTS>(), across = last + Rows<D>::across();
    float k_result[M][D / 8][4] = {}, v_result[M][D / 8][4] = {};
#pragma unroll 1
    for (; left % COUNT; --left) {
      const uint32_t column = statistics + (left % COUNT - 1) * GROUP + lane() % 4 * 8;
      // all transposed: rows are keys, columns are queries
      uint32_t p_operand[M][4], ds_operand[M][4];
#pragma unroll
      for (int eight = 0; eight < 2; eight += EIGHTS) {
        float p[M][EIGHTS][4] = {}, ds[M][EIGHTS][4];
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i) {
          const float2 minus_delta = load_shared<float2>(column + TILE * 4 + (eight + i) * 32);
#pragma unroll
          for (int m = 0; m < M; ++m) {
            ds[m][i][0] = ds[m][i][2] = minus_delta.x;
            ds[m][i][1] = ds[m][i][3] = minus_delta.y;
          }
        }
        scores<Element, D>(p, k_operand, along, eight * 8 * Rows<D>::PITCH);
        scores<Element, D>(ds, v_operand, along, SECOND + eight * 8 * Rows<D>::PITCH);
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i) {
          const float2 lse_2 = load_shared<float2>(column + (eight + i) * 32);
#pragma unroll
          for (int j = 0; j < 4 * M; ++j) {
            float& probability = p[j / 4][i][j % 4];
            probability = exp2_approximate(probability * a.to_log2 - (j % 2 ? lse_2.y : lse_2.x));
            ds[j / 4][i][j % 4] *= probability;
          }
        }
        round_to_operand<Element>(p_operand, p, eight);
        round_to_operand<Element>(ds_operand, ds, eight);
      }
      accumulate<Element, D>(v_result, p_operand, across, SECOND);
      accumulate<Element, D>(k_result, ds_operand, across);
      along -= GROUP;
      across -= GROUP;
    }
    own = left / COUNT;
    const Pair after(kept);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int row = (own + m) * TILE;
      store_tile<D>(grad(after, 1, row), grad_stride, after.keys - row, k_result[m], a.scale, a.scale);
      store_tile<D>(grad(after, 2, row), grad_stride, after.keys - row, v_result[m], 1, 1);
    }
    return own;
  };
  in_turn<TOGETHER<D>>([&] { return tiles_of(Pair(kept).keys); }, warp(), own_keys);

  if constexpr (!RESIDENT) {
    const Pair pair(kept);
    __syncthreads();
    stage<D>(k_rows(), part(pair, 1), a.token_stride, pair.keys);
    stage<D>(k_rows() + SECOND, part(pair, 2), a.token_stride, pair.keys);
    wait_copies();
    __syncthreads();
  }

  const auto own_queries = [&](int own, auto count) {
    constexpr int M = decltype(count)::value;
    const Pair pair(kept);
    uint32_t q_operand[M][D / 16][4], grad_out_operand[M][D / 16][4];
    float lse_row[M][2], minus_delta_row[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if constexpr (RESIDENT) {
        load_operand<D>(q_operand[m], q_shared + (own + m) * GROUP);
        load_operand<D>(grad_out_operand[m], q_shared + SECOND + (own + m) * GROUP);
      } else {
        const int row = (own + m) * TILE;
        load_operand<D>(q_operand[m], part(pair, 0, row), a.token_stride, pair.length - row);
        load_operand<D>(grad_out_operand[m], grad_out(pair, row), a.grad_token_stride, pair.length - row);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = statistics + (own + m) * GROUP + (lane() / 4 + half * 8) * 4;
        lse_row[m][half] = load_shared<float>(row);
        minus_delta_row[m][half] = load_shared<float>(row + TILE * 4);
      }
    }
    const int t = lane() % 4;
    uint32_t along = k_rows() + Rows<D>::along(), across = k_rows() + Rows<D>::across();
    float q_result[M][D / 8][4] = {};
    // a tile of keys; only the last may have fewer than 16
    const auto ask = [&](int key, auto is_whole) {
      constexpr bool WHOLE = decltype(is_whole)::value;
      float p[M][2][4] = {}, ds[M][2][4];
#pragma unroll
      for (int j = 0; j < 8 * M; ++j) ds[j / 8][j / 4 % 2][j % 4] = minus_delta_row[j / 8][j % 4 / 2];
      scores<Element, D>(p, q_operand, along);
      scores<Element, D>(ds, grad_out_operand, along, SECOND);
#pragma unroll
      for (int j = 0; j < 8 * M; ++j) {
        const float exponent = p[j / 8][j / 4 % 2][j % 4] * a.to_log2 - lse_row[j / 8][j % 4 / 2];
        const bool real = WHOLE || key + j / 4 % 2 * 8 + t * 2 + j % 2 < pair.keys;
        float& gradient = ds[j / 8][j / 4 % 2][j % 4];
        gradient = real ? exp2_approximate(exponent) * gradient : 0;
      }
      uint32_t operand[M][4];
      round_to_operand<Element>(operand, ds);
      accumulate<Element, D>(q_result, operand, across);
      along += GROUP;
      across += GROUP;
    };
    if constexpr (D < 128) {
      const int whole = pair.keys / TILE * TILE;
#pragma unroll 1
      for (int key = 0; key < whole; key += TILE) ask(key, std::true_type{});
      if (whole < pair.keys) ask(whole, std::false_type{});
    } else {
      // two registers are missing for both
#pragma unroll 1
      for (int key = 0; key < pair.keys; key += TILE) ask(key, std::false_type{});
    }
    const Pair after(kept);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int row = (own + m) * TILE;
      store_tile<D>(grad(after, 0, row), grad_stride, after.length - row, q_result[m], a.scale, a.scale);
    }
    return own;
  };
  // the other way round: who had one more before has one fewer now
  in_turn<TOGETHER<D>>([&] { return tiles_of(Pair(kept).length); }, warps() - 1 - warp(), own_queries);
}

// As many warps as there are tiles, or so many that all have the same number of tiles but for one.
int threads_for(int max_seqlen) {
  const int tiles = tiles_of(max_seqlen);
  const int rounds = (tiles + MAX_WARPS - 1) / MAX_WARPS;
  return (tiles + rounds - 1) / rounds * 32;
}

template <int D, class Element>
const char* run_forward(const PackedAttention& a, void* stream) {
  const int shared = tiles_of(a.max_seqlen) * Rows<D>::GROUP;
  return launch(forward_kernel<Element, D>, int64_t{a.sequences} * a.heads, threads_for(a.max_seqlen), shared, stream,
                a);
}

template <int D, class Element>
const char* run_backward(const PackedAttention& a, void* stream) {
  constexpr int RESERVED = 1024;  // what the system takes of every block's share
  const int shared = tiles_of(a.max_seqlen) * Rows<D>::GROUP;
  const int owned = (tiles_of(a.max_seqlen) + TOGETHER<D> - 1) / TOGETHER<D>;
  const int threads = (owned < BACKWARD_WARPS<D> ? owned : BACKWARD_WARPS<D>) * 32;
  const int64_t blocks = int64_t{a.sequences} * a.heads;
  const Backward arguments{a, a.scale * LOG2_E};
  if (2 * (2 * shared + Pair::BYTES + RESERVED) <= shared_per_multiprocessor())
    return launch(backward_kernel<Element, D, true>, blocks, threads, 2 * shared + Pair::BYTES, stream, arguments);
  return launch(backward_kernel<Element, D, false>, blocks, threads, shared + Pair::BYTES, stream, arguments);
}

template <class Element>
const char* dispatch(const PackedAttention& a, void* stream, bool backward) {
  switch (a.head_dim) {
#define CASE(D) \
  case D:       \
    return backward ? run_backward<D, Element>(a, stream) : run_forward<D, Element>(a, stream);
    CASE(32)
    CASE(64)
    CASE(80)
    CASE(96)
    CASE(128)
#undef CASE
  }
  return "no such head dim";
}

const char* check_and_dispatch(const PackedAttention& a, void* stream, bool backward) {
  if (a.max_seqlen > MAX_LENGTH) return "sequences are longer than these kernels take";
  if (a.max_seqlen <= 0 || a.sequences == 0 || a.heads == 0) return nullptr;
  return a.bfloat16 ? dispatch<BFloat16>(a, stream, backward) : dispatch<Float16>(a, stream, backward);
}

}  // namespace

const char* packed_attention_forward(const PackedAttention& a, void* stream) {
  return check_and_dispatch(a, stream, false);
}

const char* packed_attention_backward(const PackedAttention& a, void* stream) {
  return check_and_dispatch(a, stream, true);
}

}  // namespace tessera
