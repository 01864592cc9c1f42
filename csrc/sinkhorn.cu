// Sinkhorn-Knopp on scores [B, K]: all iterations in one launch, and the assignment. Bytes, operations and why this
// exists: kernels/sinkhorn/__init__.py.
//
// Columns are cut into slices of up to 4096, rows into groups; a block is one (group, slice). It takes four rows of its
// slice at a time into registers, 16 columns per thread. What a row has to be divided by takes all its slices: their
// blocks, which all run at once, tell one another largest exponent and sum in a word each. So every exponential is
// formed once, and column sums stay in registers to the end of the group. They go to [groups, K]; after a barrier of
// the grid they are added in the order of the groups. No sum depends on who came first.
// Scores come by cp.async some batches ahead, across barriers too. Where a group's part of a slice fits in shared
// memory, it stays there: all iterations together read the scores once.
//
// Exponents of a row are scores / T + log_u; sums of exponentials are kept beside their largest exponent, in powers of
// two. A column outside the slice has log_u = -inf, a row outside the group a factor of 0.
#include "sinkhorn.h"

#include "device.h"

namespace tessera {
namespace {

constexpr int COLUMNS = 16;  // of a thread
constexpr int LINES = 4;     // rows of a batch
constexpr int MAX_THREADS = 256;
constexpr int MAX_WARPS = MAX_THREADS / 32;
constexpr int MAX_AHEAD = 4;  // what wait_copies_but can count
constexpr float LOWEST = -3.4028234663852886e38f;
// Below every exponent, and finite in powers of two as well.
constexpr float LEAST = -1e38f;

struct Launch : Sinkhorn, SinkhornPlan {};

// From the start of shared memory, in bytes: log_u of the slice; per line and warp, then per line, an exponent and a
// sum; the buffers. What the column sums of several warps take lies where log_u was.
__host__ __device__ constexpr int statistics_at(int threads) { return threads * COLUMNS * 4; }
__host__ __device__ constexpr int shares_at(int threads) { return statistics_at(threads) + LINES * MAX_WARPS * 8; }
__host__ __device__ constexpr int buffers_at(int threads) { return shares_at(threads) + LINES * 8; }

template <class Element>
constexpr int WIDTH = 16 / sizeof(Element);  // elements of a chunk

template <class Element>
TESSERA_DEVICE void unpack_chunk(float (&to)[WIDTH<Element>], uint4 chunk) {
  const uint32_t words[] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Element) == 4) {
      to[i] = as_float(words[i]);
    } else {
      const float2 pair = unpack<Element>(words[i]);
      to[i * 2] = pair.x;
      to[i * 2 + 1] = pair.y;
    }
  }
}

TESSERA_DEVICE uint4 pack_four(const float* from) {
  return {as_bits(from[0]), as_bits(from[1]), as_bits(from[2]), as_bits(from[3])};
}

struct Largest {
  TESSERA_DEVICE float operator()(float x, float y) const { return fmaxf(x, y); }
};
struct Sum {
  TESSERA_DEVICE float operator()(float x, float y) const { return x + y; }
};

// Of four lines over the lanes of a warp; each lane gets that of line lane() % 4.
template <class Join>
TESSERA_DEVICE float reduce_lines(const float (&x)[LINES], Join join) {
  const bool odd = lane() & 1, upper = lane() & 2;
  const float low = join(odd ? x[1] : x[0], shuffle_xor(odd ? x[0] : x[1], 1));
  const float high = join(odd ? x[3] : x[2], shuffle_xor(odd ? x[2] : x[3], 1));
  float result = join(upper ? high : low, shuffle_xor(upper ? low : high, 2));
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) result = join(result, shuffle_xor(result, distance));
  return result;
}

// sum * 2^largest, of two parts together.
TESSERA_DEVICE void join(float& largest, float& sum, float other_largest, float other_sum) {
  const float larger = fmaxf(largest, other_largest);
  sum = sum * exp2_approximate(largest - larger) + other_sum * exp2_approximate(other_largest - larger);
  largest = larger;
}

TESSERA_DEVICE void join_lanes(float& largest, float& sum, int lanes) {
  for (int distance = 1; distance < lanes; distance *= 2) {
    const float other = shuffle_xor(largest, distance);
    join(largest, sum, other, shuffle_xor(sum, distance));
  }
}

// The rows of this block's group in its slice, batch by batch, as often as asked, through buffers in shared memory. A
// thread reads what it copied itself, so no barrier is needed. Batches are numbered through all rounds.
template <class Element>
struct Stream {
  static constexpr int CHUNKS = COLUMNS / WIDTH<Element>;

  const Launch& a;
  int group, slice, first_column, columns;
  int64_t first_row;
  int rows, copied;  // of the group; batches that are ever copied

  TESSERA_DEVICE Stream(const Launch& a, int rounds) : a(a) {
    group = blockIdx.x / a.slices;
    slice = blockIdx.x % a.slices;
    first_column = slice * a.width;
    columns = max(0, min(a.width, a.prototypes - first_column));
    first_row = int64_t{group} * a.batches * LINES;
    rows = static_cast<int>(max(int64_t{0}, min(int64_t{a.batches} * LINES, a.rows - first_row)));
    copied = a.resident ? a.batches : rounds * a.batches;
    for (int number = 0; number < a.ahead; ++number) copy(number);
  }

  // First column, in the slice, of this thread's chunk.
  TESSERA_DEVICE int column(int chunk) const {
    return (chunk * static_cast<int>(blockDim.x) + static_cast<int>(thread_index())) * WIDTH<Element>;
  }

  // This thread's first chunk of a batch; from there on they lie the threads' chunks apart.
  TESSERA_DEVICE uint32_t place(int number) const {
    const int chunks = number % a.buffers * LINES * CHUNKS * static_cast<int>(blockDim.x);
    return shared_address(dynamic_shared()) + buffers_at(blockDim.x) + (chunks + thread_index()) * 16;
  }
  TESSERA_DEVICE static int further(int line, int chunk) {
    return (line * CHUNKS + chunk) * static_cast<int>(blockDim.x) * 16;
  }

  TESSERA_DEVICE void copy(int number) const {
    if (number < copied) {
      const uint32_t to = place(number);
      const int first = column(0), step = static_cast<int>(blockDim.x) * WIDTH<Element>;
#pragma unroll 1
      for (int line = 0; line < LINES; ++line) {
        const int row = number % a.batches * LINES + line;
        const auto* scores = static_cast<const Element*>(a.scores);
        const auto* from = scores + (first_row + row) * a.row_stride + first_column;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
          const int column = first + chunk * step;
          const int left = row < rows ? (columns - column) * static_cast<int>(sizeof(Element)) : 0;
          const int bytes = max(0, min(left, 16));
          copy_part_async(to + further(line, chunk), bytes ? from + column : scores, bytes);
        }
      }
    }
    commit_copies();
  }

  TESSERA_DEVICE void wait() const { wait_copies_but(a.ahead - 1); }

  TESSERA_DEVICE static void read(float (&to)[WIDTH<Element>], uint32_t place, int line, int chunk) {
    unpack_chunk<Element>(to, load_shared<uint4>(place + further(line, chunk)));
  }

  // log_u stays in shared memory, which is where the registers end; each thread reads what it wrote.
  TESSERA_DEVICE void store_log_u(const float* log_u) const {
    const uint32_t to = shared_address(dynamic_shared());
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int first = column(chunk);
#pragma unroll
      for (int i = 0; i < WIDTH<Element>; ++i) {
        const int at = first + i;
        store_shared(to + at * 4, at < columns ? log_u[first_column + at] : -infinity());
      }
    }
  }

  TESSERA_DEVICE void read_log_u(float (&to)[WIDTH<Element>], int chunk) const {
    const uint32_t from = shared_address(dynamic_shared()) + column(chunk) * 4;
#pragma unroll
    for (int i = 0; i < WIDTH<Element>; i += 4) {
      const uint4 four = load_shared<uint4>(from + i * 4);
      to[i] = as_float(four.x);
      to[i + 1] = as_float(four.y);
      to[i + 2] = as_float(four.z);
      to[i + 3] = as_float(four.w);
    }
  }
};

// The factor that makes this warp's exponentials shares of their rows. `top` and `sum` are those of line lane() % 4
// over the warp's columns, `tops` the former of all lines. Of `turn`, which counts the batches that came here, the
// lowest bit says which of two sets of words is used, the next how their top bit tells a new word from the one before.
// A block writes a word again only after it has read the turn between, whose words come from blocks that had read this
// one.
TESSERA_DEVICE void find_shares(float (&share)[LINES], const Launch& a, int group, int slice, int turn, float top,
                                float sum, const float (&tops)[LINES]) {
  const uint32_t shared = shared_address(dynamic_shared());
  const uint32_t statistics = shared + statistics_at(blockDim.x), shares = shared + shares_at(blockDim.x);
  if (lane() < LINES) {
    const uint32_t to = statistics + (lane() * MAX_WARPS + warp()) * 8;
    store_shared(to, top);
    store_shared(to + 4, sum);
  }
  __syncthreads();
  for (int line = warp(); line < LINES; line += warps()) {
    float largest = LEAST, total = 0;
    if (lane() < warps()) {
      const float2 part = load_shared<float2>(statistics + (line * MAX_WARPS + lane()) * 8);
      largest = part.x;
      total = part.y;
    }
    join_lanes(largest, total, MAX_WARPS);
    if (a.slices > 1) {
      uint64_t* words = a.words + ((int64_t{group} * 2 + turn % 2) * LINES + line) * a.slices;
      const bool news = turn / 2 % 2 == 0;
      if (lane() == 0) {
        const uint32_t bits = (as_bits(total) & 0x7fffffffu) | (news ? 0x80000000u : 0);
        publish(words + slice, uint64_t{bits} << 32 | as_bits(largest));
      }
      largest = LEAST;
      total = 0;
      for (int other = lane(); other < a.slices; other += 32) {
        const uint64_t word = await(words + other, news);
        join(largest, total, as_float(static_cast<uint32_t>(word)),
             as_float(static_cast<uint32_t>(word >> 32) & 0x7fffffffu));
      }
      join_lanes(largest, total, 32);
    }
    if (lane() == 0) {
      store_shared(shares + line * 8, largest);
      store_shared(shares + line * 8 + 4, 1 / total);
    }
  }
  __syncthreads();
#pragma unroll
  for (int line = 0; line < LINES; ++line) {
    const float2 whole = load_shared<float2>(shares + line * 8);
    share[line] = exp2_approximate(tops[line] - whole.x) * whole.y;
  }
}

// All rows of the group once: use(row, weight, share) gets four rows from `row` on, weight * share being their shares.
template <class Element, class Use>
TESSERA_DEVICE void normalise(const Stream<Element>& stream, int first, int first_turn, Use use) {
  constexpr int CHUNKS = Stream<Element>::CHUNKS;
  const Launch& a = stream.a;
#pragma unroll 1
  for (int batch = 0; batch < a.batches; ++batch) {
    stream.wait();
    const uint32_t place = stream.place(first + batch);
    float x[LINES][COLUMNS];
    float largest[LINES] = {LEAST, LEAST, LEAST, LEAST};
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      float log_u[WIDTH<Element>], score[WIDTH<Element>];
      stream.read_log_u(log_u, chunk);
#pragma unroll
      for (int line = 0; line < LINES; ++line) {
        stream.read(score, place, line, chunk);
#pragma unroll
        for (int i = 0; i < WIDTH<Element>; ++i) {
          float& exponent = x[line][chunk * WIDTH<Element> + i];
          exponent = fmaf(score[i], a.scale, log_u[i]);
          largest[line] = fmaxf(largest[line], exponent);
        }
      }
    }
    const float top = reduce_lines(largest, Largest()) * LOG2_E;
    // the buffer of this batch has been read
    stream.copy(first + batch + a.ahead);
    float tops[LINES], sum[LINES] = {}, share[LINES];
#pragma unroll
    for (int line = 0; line < LINES; ++line) {
      tops[line] = shuffle(top, line);
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) {
        x[line][i] = exp2_approximate(fmaf(x[line][i], LOG2_E, -tops[line]));
        sum[line] += x[line][i];
      }
    }
    const float total = reduce_lines(sum, Sum());
    find_shares(share, a, stream.group, stream.slice, first_turn + batch, top, total, tops);
    use(batch * LINES, x, share);
  }
}

// Of each column over the rows of the group: the largest score, and the sum of exp((score - largest) / T).
template <class Element>
TESSERA_DEVICE void sum_exponentials(const Stream<Element>& stream, float (&largest)[COLUMNS], float (&sum)[COLUMNS]) {
  constexpr int CHUNKS = Stream<Element>::CHUNKS;
  const Launch& a = stream.a;
  const float scale = a.scale * LOG2_E;
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    largest[i] = LOWEST;
    sum[i] = 0;
  }
#pragma unroll 1
  for (int batch = 0; batch < a.batches; ++batch) {
    stream.wait();
    const uint32_t place = stream.place(batch);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      float score[LINES][WIDTH<Element>];
#pragma unroll
      for (int line = 0; line < LINES; ++line) stream.read(score[line], place, line, chunk);
#pragma unroll
      for (int i = 0; i < WIDTH<Element>; ++i) {
        float& top = largest[chunk * WIDTH<Element> + i];
        const float before = top;
#pragma unroll
        for (int line = 0; line < LINES; ++line)
          if (batch * LINES + line < stream.rows) top = fmaxf(top, score[line][i]);
        float& total = sum[chunk * WIDTH<Element> + i];
        total *= exp2_approximate((before - top) * scale);
#pragma unroll
        for (int line = 0; line < LINES; ++line)
          if (batch * LINES + line < stream.rows) total += exp2_approximate((score[line][i] - top) * scale);
      }
    }
    stream.copy(batch + a.ahead);
  }
}

// This thread's columns of a group, to [groups, K] with room for whole slices.
template <class Element>
TESSERA_DEVICE void store_part(const Stream<Element>& stream, float* parts, const float (&x)[COLUMNS]) {
  const Launch& a = stream.a;
  float* to = parts + int64_t{stream.group} * a.slices * a.width + stream.first_column;
#pragma unroll
  for (int chunk = 0; chunk < Stream<Element>::CHUNKS; ++chunk) {
    const int column = stream.column(chunk);
    if (column >= a.width) continue;
#pragma unroll
    for (int i = 0; i < WIDTH<Element>; i += 4)
      *reinterpret_cast<uint4*>(to + column + i) = pack_four(x + chunk * WIDTH<Element> + i);
  }
}

// log_u from the parts [groups, K]: minus the log-sum-exp of each column, less log(K / B) where several iterations are
// asked for, by which it would otherwise grow each time and lose digits. A column is a thread's, or, where there are
// many groups, a lane's of all warps, each of which takes some of the groups.
TESSERA_DEVICE void merge_parts(const Launch& a, const float* before) {
  const int64_t pitch = int64_t{a.slices} * a.width;
  const float* largest_parts = a.parts + a.groups * pitch;
  const bool split = a.groups > 32;
  const int span = split ? 32 : blockDim.x, first_group = split ? warp() : 0, step = split ? warps() : 1;
  const float scale = a.scale * LOG2_E;
  const float even = a.iterations > 1 ? static_cast<float>(a.prototypes) / fmaxf(static_cast<float>(a.rows), 1) : 1;
  const uint32_t shared = shared_address(dynamic_shared());
  for (int start = blockIdx.x * span; start < a.prototypes; start += gridDim.x * span) {
    const int column = start + (split ? lane() : static_cast<int>(thread_index()));
    const bool real = column < a.prototypes;
    float largest = LOWEST, total = 0;
    if (real && before) {
      // columns summed to 1 before rows did, so some entry of each is at least 1 / (B K): a plain sum cannot underflow
#pragma unroll 8
      for (int group = first_group; group < a.groups; group += step) total += a.parts[group * pitch + column];
    } else if (real) {
#pragma unroll 8
      for (int group = first_group; group < a.groups; group += step) {
        const float part_largest = largest_parts[group * pitch + column], part = a.parts[group * pitch + column];
        const float larger = fmaxf(largest, part_largest);
        total = total * exp2_approximate((largest - larger) * scale) +
                part * exp2_approximate((part_largest - larger) * scale);
        largest = larger;
      }
    }
    if (split) {
      const uint32_t place = shared + thread_index() * 8;
      store_shared(place, largest);
      store_shared(place + 4, total);
      __syncthreads();
      for (int other = 1; other < warps() && warp() == 0; ++other) {
        const float2 part = load_shared<float2>(place + other * 32 * 8);
        const float larger = fmaxf(largest, part.x);
        total = before ? total + part.y
                       : total * exp2_approximate((largest - larger) * scale) +
                             part.y * exp2_approximate((part.x - larger) * scale);
        largest = larger;
      }
      __syncthreads();
    }
    if (real && (!split || warp() == 0))
      a.log_u[column] = before ? before[column] - logf(total * even) : -fmaf(largest, a.scale, logf(total));
  }
}

template <class Element>
__global__ void __launch_bounds__(MAX_THREADS, 2) balance_kernel(Launch a) {
  const Stream<Element> stream(a, a.iterations);
  const int unscaled = a.start ? 0 : 1;  // iterations that know no log_u
#pragma unroll 1
  for (int iteration = 0; iteration < a.iterations; ++iteration) {
    const float* before = iteration ? a.log_u : a.start;
    float sum[COLUMNS] = {};
    if (before) {
      stream.store_log_u(before);
      normalise<Element>(stream, iteration * a.batches, (iteration - unscaled) * a.batches,
                         [&](int row, const float(&weight)[LINES][COLUMNS], const float(&share)[LINES]) {
#pragma unroll
                           for (int i = 0; i < COLUMNS; ++i) {
                             float four = 0;
#pragma unroll
                             for (int line = 0; line < LINES; ++line)
                               four = fmaf(weight[line][i], row + line < stream.rows ? share[line] : 0, four);
                             sum[i] += four;
                           }
                         });
    } else {
      float largest[COLUMNS];
      sum_exponentials(stream, largest, sum);
      store_part(stream, a.parts + int64_t{a.groups} * a.slices * a.width, largest);
    }
    store_part(stream, a.parts, sum);
    grid_sync();
    merge_parts(a, before);
    if (iteration + 1 < a.iterations) grid_sync();
  }
}

// Two lanes have four columns of eight each to write at once: 32 bytes, since half a sector costs as much as a whole
// one.
TESSERA_DEVICE void store_pairwise(float* to, uint4 first, uint4 second, int column, int columns) {
  const bool odd = lane() & 1;
  const uint4 given = odd ? first : second;
  const uint4 got = {shuffle_xor(given.x, 1), shuffle_xor(given.y, 1), shuffle_xor(given.z, 1),
                     shuffle_xor(given.w, 1)};
  // the even lane's eight, then the odd lane's
  const int at = column - (odd ? 4 : 0);
  if (at < columns) store_for_later(to + at, odd ? got : first);
  if (at + 8 < columns) store_for_later(to + at + 8, odd ? second : got);
}

template <class Element>
__global__ void __launch_bounds__(MAX_THREADS, 2) assign_kernel(Launch a) {
  const Stream<Element> stream(a, 1);
  const bool whole_fours = a.prototypes % 4 == 0;
  stream.store_log_u(a.log_u);
  normalise<Element>(
      stream, 0, 0, [&](int row, const float(&weight)[LINES][COLUMNS], const float(&share)[LINES]) {
#pragma unroll
        for (int line = 0; line < LINES; ++line) {
          if (row + line >= stream.rows) break;
          float* to = a.out + (stream.first_row + row + line) * a.prototypes + stream.first_column;
#pragma unroll
          for (int chunk = 0; chunk < Stream<Element>::CHUNKS; ++chunk) {
            const int column = stream.column(chunk);
            float q[WIDTH<Element>];
#pragma unroll
            for (int i = 0; i < WIDTH<Element>; ++i) q[i] = weight[line][chunk * WIDTH<Element> + i] * share[line];
            if (!whole_fours) {
#pragma unroll
              for (int i = 0; i < WIDTH<Element>; ++i)
                if (column + i < stream.columns) to[column + i] = q[i];
            } else if constexpr (WIDTH<Element> == 4) {
              if (column < stream.columns) store_for_later(to + column, pack_four(q));
            } else {
              store_pairwise(to, pack_four(q), pack_four(q + 4), column, stream.columns);
            }
          }
        }
      });
}

constexpr int RESERVED = 1024;       // of shared memory, what the system takes of every block's share
constexpr int THREADS_AT_ONCE = 512;  // on one multiprocessor, at 128 registers each

int ceil_divide(int64_t x, int64_t y) { return static_cast<int>((x + y - 1) / y); }

template <class Run>
const char* with_type(Type type, Run run) {
  switch (type) {
    case Type::FLOAT16:
      return run(Float16{});
    case Type::BFLOAT16:
      return run(BFloat16{});
    case Type::FLOAT32:
      return run(float{});
  }
  return "no such dtype";
}

template <class Arguments>
const char* start(void (*kernel)(Arguments), const Sinkhorn& a, const SinkhornPlan& plan, void* stream) {
  return launch_cooperative(kernel, int64_t{plan.groups} * plan.slices, plan.threads, plan.shared, stream,
                            Launch{a, plan});
}

}  // namespace

const char* sinkhorn_plan(const Sinkhorn& a, SinkhornPass pass, SinkhornPlan& plan) {
  if (a.prototypes < 1 || a.prototypes > MAX_PROTOTYPES) return "rows are wider than these kernels take";
  const int element = a.type == Type::FLOAT32 ? 4 : 2, chunk = 16 / element;
  plan = {};
  plan.slices = ceil_divide(a.prototypes, MAX_THREADS * COLUMNS);
  plan.width = ceil_divide(ceil_divide(a.prototypes, plan.slices), chunk) * chunk;
  plan.threads = ceil_divide(plan.width, 32 * COLUMNS) * 32;

  // As many groups as run at once. Each costs a part of the column sums: fewer than eight batches are too few for one
  // more, unless multiprocessors had nothing to do.
  const int processors = multiprocessors();
  const int buffer = LINES * plan.threads * COLUMNS * element;
  const int least = RESERVED + buffers_at(plan.threads) + buffer;
  const int blocks_at_once = min(THREADS_AT_ONCE / plan.threads, shared_per_multiprocessor() / least);
  const int most = processors * blocks_at_once / plan.slices;
  if (most == 0) return "the GPU has too few multiprocessors for rows of this width";
  const int row_batches = ceil_divide(a.rows, LINES);
  const int wanted = max(ceil_divide(row_batches, 8), processors / plan.slices);
  plan.batches = ceil_divide(row_batches, max(1, min(min(wanted, most), row_batches)));
  plan.groups = max(1, plan.batches ? ceil_divide(row_batches, plan.batches) : 1);

  const int blocks_each = ceil_divide(int64_t{plan.groups} * plan.slices, processors);
  const int limit = min(shared_per_block(), shared_per_multiprocessor() / blocks_each - RESERVED);
  const int fit = (limit - buffers_at(plan.threads)) / buffer;
  plan.resident = plan.batches <= fit;
  plan.buffers = plan.resident ? max(1, plan.batches) : min(fit, MAX_AHEAD);
  plan.ahead = min(plan.buffers, MAX_AHEAD);
  plan.shared = buffers_at(plan.threads) + plan.buffers * buffer;

  if (pass == SinkhornPass::BALANCE) plan.float_count = 2 * int64_t{plan.groups} * plan.slices * plan.width;
  if (plan.slices > 1) plan.word_count = int64_t{plan.groups} * 2 * LINES * plan.slices;
  return nullptr;
}

const char* sinkhorn_balance(const Sinkhorn& a, const SinkhornPlan& plan, void* stream) {
  return with_type(a.type, [&](auto element) { return start(balance_kernel<decltype(element)>, a, plan, stream); });
}

const char* sinkhorn_assign(const Sinkhorn& a, const SinkhornPlan& plan, void* stream) {
  if (a.rows == 0) return nullptr;
  return with_type(a.type, [&](auto element) { return start(assign_kernel<decltype(element)>, a, plan, stream); });
}

}  // namespace tessera
