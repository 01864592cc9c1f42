// Sinkhorn-Knopp on scores [B, K]: all iterations in one launch, the assignment, and the cross-entropy of a student
// against it with its gradient. Bytes, operations and why this exists: kernels/sinkhorn/__init__.py.
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
constexpr int LINES = 4;     // rows of a batch, of both matrices together
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

template <class Element>
TESSERA_DEVICE uint4 pack_chunk(const float (&from)[WIDTH<Element>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Element) == 4)
      words[i] = as_bits(from[i]);
    else
      words[i] = pack<Element>(from[i * 2], from[i * 2 + 1]);
  }
  return {words[0], words[1], words[2], words[3]};
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
template <class Element, int MATRICES>
struct Stream {
  static constexpr int CHUNKS = COLUMNS / WIDTH<Element>;
  static constexpr int ROWS = LINES / MATRICES;

  const Launch& a;
  int group, slice, first_column, columns;
  int64_t first_row;
  int rows, copied;  // of the group; batches that are ever copied

  TESSERA_DEVICE Stream(const Launch& a, int rounds) : a(a) {
    group = blockIdx.x / a.slices;
    slice = blockIdx.x % a.slices;
    first_column = slice * a.width;
    columns = max(0, min(a.width, a.prototypes - first_column));
    first_row = int64_t{group} * a.batches * ROWS;
    rows = static_cast<int>(max(int64_t{0}, min(int64_t{a.batches} * ROWS, a.rows - first_row)));
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
        const int row = number % a.batches * ROWS + line % ROWS;
        const auto* matrix = static_cast<const Element*>(line < ROWS ? a.scores : a.student);
        const auto* from = matrix + (first_row + row) * (line < ROWS ? a.row_stride : a.student_stride) + first_column;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
          const int column = first + chunk * step;
          const int left = row < rows ? (columns - column) * static_cast<int>(sizeof(Element)) : 0;
          const int bytes = max(0, min(left, 16));
          copy_part_async(to + further(line, chunk), bytes ? from + column : matrix, bytes);
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
TESSERA_DEVICE void normalise(const Stream<Element, 1>& stream, int first, int first_turn, Use use) {
  constexpr int CHUNKS = Stream<Element, 1>::CHUNKS;
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
TESSERA_DEVICE void sum_exponentials(const Stream<Element, 1>& stream, float (&largest)[COLUMNS],
                                     float (&sum)[COLUMNS]) {
  constexpr int CHUNKS = Stream<Element, 1>::CHUNKS;
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
TESSERA_DEVICE void store_part(const Stream<Element, 1>& stream, float* parts, const float (&x)[COLUMNS]) {
  const Launch& a = stream.a;
  float* to = parts + int64_t{stream.group} * a.slices * a.width + stream.first_column;
#pragma unroll
  for (int chunk = 0; chunk < Stream<Element, 1>::CHUNKS; ++chunk) {
    const int column = stream.column(chunk);
    if (column >= a.width) continue;
#pragma unroll
    for (int i = 0; i < WIDTH<Element>; i += 4) {
      const float* four = x + chunk * WIDTH<Element> + i;
      *reinterpret_cast<uint4*>(to + column + i) = {as_bits(four[0]), as_bits(four[1]), as_bits(four[2]),
                                                    as_bits(four[3])};
    }
  }
}

// log_u from the parts [groups, K]: minus the log-sum-exp of each column. A column is a thread's, or, where there are
// many groups, a lane's of all warps, each of which takes some of the groups.
TESSERA_DEVICE void merge_parts(const Launch& a, const float* before) {
  const int64_t pitch = int64_t{a.slices} * a.width;
  const float* largest_parts = a.parts + a.groups * pitch;
  const bool split = a.groups > 32;
  const int span = split ? 32 : blockDim.x, first_group = split ? warp() : 0, step = split ? warps() : 1;
  const float scale = a.scale * LOG2_E;
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
      a.log_u[column] = before ? before[column] - logf(total) : -fmaf(largest, a.scale, logf(total));
  }
}

template <class Element>
__global__ void __launch_bounds__(MAX_THREADS, 2) balance_kernel(Launch a) {
  const Stream<Element, 1> stream(a, a.iterations);
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
  const Stream<Element, 1> stream(a, 1);
  const bool whole_fours = a.prototypes % 4 == 0;
  stream.store_log_u(a.log_u);
  normalise<Element>(
      stream, 0, 0, [&](int row, const float(&weight)[LINES][COLUMNS], const float(&share)[LINES]) {
#pragma unroll
        for (int line = 0; line < LINES; ++line) {
          if (row + line >= stream.rows) break;
          float* to = a.out + (stream.first_row + row + line) * a.prototypes + stream.first_column;
#pragma unroll
          for (int chunk = 0; chunk < Stream<Element, 1>::CHUNKS; ++chunk) {
            const int column = stream.column(chunk);
            float q[WIDTH<Element>];
#pragma unroll
            for (int i = 0; i < WIDTH<Element>; ++i) q[i] = weight[line][chunk * WIDTH<Element> + i] * share[line];
            if (!whole_fours) {
#pragma unroll
              for (int i = 0; i < WIDTH<Element>; ++i)
                if (column + i < stream.columns) to[column + i] = q[i];
            } else if constexpr (WIDTH<Element> == 4) {
              if (column < stream.columns) store_for_later(to + column, pack_chunk<float>(q));
            } else {
              const float first[] = {q[0], q[1], q[2], q[3]}, second[] = {q[4], q[5], q[6], q[7]};
              store_pairwise(to, pack_chunk<float>(first), pack_chunk<float>(second), column, stream.columns);
            }
          }
        }
      });
}

// Of one row: the largest exponents of target and student, the sums of their exponentials relative to those, and that
// of exp(target - its largest) times (student - its largest).
struct RowSums {
  float top, total, product, student_top, student_total;

  TESSERA_DEVICE void add(const RowSums& other) {
    const float larger = fmaxf(top, other.top), student_larger = fmaxf(student_top, other.student_top);
    const float here = exp2_approximate((top - larger) * LOG2_E);
    const float there = exp2_approximate((other.top - larger) * LOG2_E);
    product = (product + (student_top - student_larger) * total) * here +
              (other.product + (other.student_top - student_larger) * other.total) * there;
    total = total * here + other.total * there;
    student_total = student_total * exp2_approximate((student_top - student_larger) * LOG2_E) +
                    other.student_total * exp2_approximate((other.student_top - student_larger) * LOG2_E);
    top = larger;
    student_top = student_larger;
  }

  TESSERA_DEVICE void add_lanes() {
    for (int distance = 1; distance < 32; distance *= 2)
      add({shuffle_xor(top, distance), shuffle_xor(total, distance), shuffle_xor(product, distance),
           shuffle_xor(student_top, distance), shuffle_xor(student_total, distance)});
  }
};

// Each warp writes the sums of its columns to [5, B, parts], parts being all warps that share a row; after a barrier of
// the grid a warp adds up those of a row, and after another one block the losses.
template <class Element>
__global__ void __launch_bounds__(MAX_THREADS, 2) cross_entropy_kernel(Launch a) {
  constexpr int ROWS = Stream<Element, 2>::ROWS, CHUNKS = Stream<Element, 2>::CHUNKS;
  const Stream<Element, 2> stream(a, 1);
  const int parts = a.slices * warps();
  const int64_t plane = a.rows * parts;
  float* losses = a.parts + 5 * plane;
  stream.store_log_u(a.log_u);
#pragma unroll 1
  for (int batch = 0; batch < a.batches; ++batch) {
    stream.wait();
    const uint32_t place = stream.place(batch);
    float x[LINES][COLUMNS];  // targets, then students
    float largest[LINES] = {LEAST, LEAST, LEAST, LEAST};
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      float log_u[WIDTH<Element>], score[WIDTH<Element>];
      stream.read_log_u(log_u, chunk);
      const int real = stream.columns - stream.column(chunk);
#pragma unroll
      for (int line = 0; line < LINES; ++line) {
        stream.read(score, place, line, chunk);
#pragma unroll
        for (int i = 0; i < WIDTH<Element>; ++i) {
          float& exponent = x[line][chunk * WIDTH<Element> + i];
          if (line < ROWS)
            exponent = fmaf(score[i], a.scale, log_u[i]);
          else
            exponent = i < real ? score[i] * a.student_scale : LEAST;
          largest[line] = fmaxf(largest[line], exponent);
        }
      }
    }
    const float top = reduce_lines(largest, Largest());
    stream.copy(batch + a.ahead);
    float sum[LINES] = {}, product[LINES] = {}, tops[LINES];
#pragma unroll
    for (int line = 0; line < LINES; ++line) tops[line] = shuffle(top, line);
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) {
        const float weight = exp2_approximate((x[row][i] - tops[row]) * LOG2_E);
        const float below = x[ROWS + row][i] - tops[ROWS + row];
        sum[row] += weight;
        sum[ROWS + row] += exp2_approximate(below * LOG2_E);
        product[row] = fmaf(weight, below, product[row]);
      }
    const float total = reduce_lines(sum, Sum());
    const float sum_of_products = reduce_lines(product, Sum());
    const int row = batch * ROWS + lane() % ROWS;
    if (lane() < LINES && row < stream.rows) {
      float* to = a.parts + (stream.first_row + row) * parts + stream.slice * warps() + warp();
      if (lane() < ROWS) {
        to[0] = top;
        to[plane] = total;
        to[2 * plane] = sum_of_products;
      } else {
        to[3 * plane] = top;
        to[4 * plane] = total;
      }
    }
  }
  grid_sync();
  for (int64_t row = int64_t{blockIdx.x} * warps() + warp(); row < a.rows; row += int64_t{gridDim.x} * warps()) {
    RowSums whole{LEAST, 0, 0, LEAST, 0};
    for (int part = lane(); part < parts; part += 32) {
      const float* from = a.parts + row * parts + part;
      whole.add({from[0], from[plane], from[2 * plane], from[3 * plane], from[4 * plane]});
    }
    whole.add_lanes();
    if (lane() == 0) {
      a.target_rows[row] = whole.top;
      a.target_rows[a.rows + row] = whole.total;
      a.student_rows[row] = whole.student_top;
      a.student_rows[a.rows + row] = whole.student_total;
      losses[row] = logf(whole.student_total) - whole.product / whole.total;
    }
  }
  grid_sync();
  if (blockIdx.x) return;
  float loss = 0;
  for (int64_t row = thread_index(); row < a.rows; row += blockDim.x) loss += losses[row];
  for (int distance = 1; distance < 32; distance *= 2) loss += shuffle_xor(loss, distance);
  const uint32_t statistics = shared_address(dynamic_shared()) + statistics_at(blockDim.x);
  if (lane() == 0) store_shared(statistics + warp() * 4, loss);
  __syncthreads();
  if (thread_index()) return;
  for (int other = 1; other < warps(); ++other) loss += load_shared<float>(statistics + other * 4);
  *a.loss = loss / fmaxf(static_cast<float>(a.rows), 1);
}

constexpr int GRADIENT_ROWS = 32;  // of a block

// A block takes 32 rows of as many columns as its threads have chunks.
template <class Element>
__global__ void __launch_bounds__(MAX_THREADS) gradient_kernel(Sinkhorn a) {
  constexpr int W = WIDTH<Element>;
  const int blocks_per_row = (a.prototypes + W * blockDim.x - 1) / (W * blockDim.x);
  const int64_t first_row = int64_t{static_cast<int>(blockIdx.x) / blocks_per_row} * GRADIENT_ROWS;
  const int rows = static_cast<int>(min(int64_t{GRADIENT_ROWS}, a.rows - first_row));
  const int column = (blockIdx.x % blocks_per_row * blockDim.x + thread_index()) * W;
  const uint32_t shared = shared_address(dynamic_shared());
  const float scale = *a.grad_loss * a.student_scale / static_cast<float>(a.rows);
  for (int row = thread_index(); row < rows; row += blockDim.x) {
    const float* targets = a.target_rows + first_row + row;
    const float* students = a.student_rows + first_row + row;
    store_shared(shared + row * 16, targets[0]);
    store_shared(shared + row * 16 + 4, scale / targets[a.rows]);
    store_shared(shared + row * 16 + 8, students[0]);
    store_shared(shared + row * 16 + 12, scale / students[a.rows]);
  }
  __syncthreads();
  const int real = min(W, a.prototypes - column);
  if (real <= 0) return;
  float log_u[W];
#pragma unroll
  for (int i = 0; i < W; ++i) log_u[i] = i < real ? a.log_u[column + i] : 0;
  const auto* scores = static_cast<const Element*>(a.scores) + first_row * a.row_stride + column;
  const auto* students = static_cast<const Element*>(a.student) + first_row * a.student_stride + column;
  auto* grad = static_cast<Element*>(a.grad) + first_row * a.prototypes + column;
  const bool whole_chunks = a.prototypes % W == 0;
  const auto load = [&](const Element* from) {
    uint4 chunk{0, 0, 0, 0};
    if (real == W)
      chunk = *reinterpret_cast<const uint4*>(from);
    else
#pragma unroll
      for (int i = 0; i < W; ++i)
        if (i < real) reinterpret_cast<Element*>(&chunk)[i] = from[i];
    return chunk;
  };
#pragma unroll 4
  for (int row = 0; row < rows; ++row) {
    float score[W], student[W];
    unpack_chunk<Element>(score, load(scores + row * a.row_stride));
    unpack_chunk<Element>(student, load(students + row * a.student_stride));
    const uint4 sums = load_shared<uint4>(shared + row * 16);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const float exponent = fmaf(score[i], a.scale, log_u[i]) - as_float(sums.x);
      const float student_exponent = student[i] * a.student_scale - as_float(sums.z);
      student[i] = exp2_approximate(student_exponent * LOG2_E) * as_float(sums.w) -
                   exp2_approximate(exponent * LOG2_E) * as_float(sums.y);
    }
    const uint4 packed = pack_chunk<Element>(student);
    Element* to = grad + int64_t{row} * a.prototypes;
    if (whole_chunks)
      *reinterpret_cast<uint4*>(to) = packed;
    else
#pragma unroll
      for (int i = 0; i < W; ++i)
        if (i < real) to[i] = reinterpret_cast<const Element*>(&packed)[i];
  }
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
  const bool cross_entropy = pass == SinkhornPass::CROSS_ENTROPY;
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
  const int row_batches = ceil_divide(a.rows, cross_entropy ? LINES / 2 : LINES);
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
  if (cross_entropy) plan.float_count = a.rows * (5 * plan.slices * (plan.threads / 32) + 1);
  if (!cross_entropy && plan.slices > 1) plan.word_count = int64_t{plan.groups} * 2 * LINES * plan.slices;
  return nullptr;
}

const char* sinkhorn_balance(const Sinkhorn& a, const SinkhornPlan& plan, void* stream) {
  return with_type(a.type, [&](auto element) { return start(balance_kernel<decltype(element)>, a, plan, stream); });
}

const char* sinkhorn_assign(const Sinkhorn& a, const SinkhornPlan& plan, void* stream) {
  if (a.rows == 0) return nullptr;
  return with_type(a.type, [&](auto element) { return start(assign_kernel<decltype(element)>, a, plan, stream); });
}

const char* sinkhorn_cross_entropy_forward(const Sinkhorn& a, const SinkhornPlan& plan, void* stream) {
  return with_type(a.type,
                   [&](auto element) { return start(cross_entropy_kernel<decltype(element)>, a, plan, stream); });
}

const char* sinkhorn_cross_entropy_backward(const Sinkhorn& a, void* stream) {
  if (a.rows == 0) return nullptr;
  return with_type(a.type, [&](auto element) {
    using Element = decltype(element);
    const int chunks = ceil_divide(a.prototypes, WIDTH<Element>);
    const int threads = min(MAX_THREADS, ceil_divide(chunks, 32) * 32);
    const int64_t blocks = int64_t{ceil_divide(chunks, threads)} * ceil_divide(a.rows, GRADIENT_ROWS);
    return launch(gradient_kernel<Element>, blocks, threads, GRADIENT_ROWS * 16, stream, a);
  });
}

}  // namespace tessera
