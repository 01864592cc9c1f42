// device.h for a machine without a GPU: a test tool, never a product path. Every thread of a block is a fiber; blocks,
// warps and lanes run in an order drawn from a seed, and a lane runs on until it meets a barrier or an instruction of
// the whole warp, so that whatever was left to luck between two barriers comes out differently. Blocks run one after
// the other, those of a cooperative launch in turns of a drawn length until all of them meet or have ended. Shared
// memory is a heap block of exactly the size asked for, filled with NaN: AddressSanitizer sees what lies outside,
// values what was never written. Copies to shared memory happen at the wait, as late as the hardware may make them, or
// at once (by the seed). Writes are seen by all threads at once: what only a fence would order is not put to the test.
// What the hardware forbids ends the process with a sentence.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define TESSERA_DEVICE inline
#define __global__
#define __host__
#define __device__
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct Index {
  int x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace tessera {

using std::max;
using std::min;

namespace emulation {

inline uint64_t seed = 0;
inline int multiprocessors = 4;
inline int shared_per_multiprocessor = 164 * 1024;
constexpr int SHARED_LIMIT = 163 * 1024;  // of one block, sm_80
// Times that rows of an 8 x 8 matrix had to wait for one another, since they lay in the same banks.
inline int64_t bank_conflicts = 0;

[[noreturn]] inline void fail(const char* sentence) {
  std::fprintf(stderr, "emulation: %s\n", sentence);
  std::exit(3);
}

using Collective = void (*)(void* const* lanes);

struct Copy {
  void* to;
  const void* from;
  int bytes;
  int64_t group;
  void perform() const {
    if (bytes) std::memcpy(to, from, bytes);
    std::memset(static_cast<char*>(to) + bytes, 0, 16 - bytes);
  }
};

// A thread. AT_WORD: it waits until the top bit of a word is as it wants it.
struct Fiber {
  static constexpr size_t STACK = 128 * 1024;
  enum State { RUNNABLE, AT_WARP, AT_BLOCK, AT_GRID, AT_WORD, DONE } state = RUNNABLE;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  Collective collective = nullptr;
  void* operands = nullptr;
  std::vector<Copy> copies;
  int64_t copy_group = 0;
  const uint64_t* word = nullptr;
  bool wanted_bit = false;
};

struct Block {
  int index = 0;
  std::vector<Fiber> fibers;
  unsigned char* shared = nullptr;
};

// The launch that runs, its block that runs, and of that the fiber that runs.
struct Running {
  std::function<void()> body;
  std::mt19937_64 random;
  Block* block = nullptr;
  Fiber* fiber = nullptr;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
};
inline Running running;

// AddressSanitizer has to be told that the stack changes.
inline void leave([[maybe_unused]] void** saved, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(saved, stack, size);
#endif
}
inline void arrive([[maybe_unused]] void* saved, [[maybe_unused]] const void** stack, [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, stack, size);
#endif
}

inline void yield(bool done = false) {
  Fiber& fiber = *running.fiber;
  void* saved = nullptr;
  leave(done ? nullptr : &saved, running.scheduler_stack, running.scheduler_stack_size);
  swapcontext(&fiber.context, &running.scheduler);
  arrive(saved, &running.scheduler_stack, &running.scheduler_stack_size);
}

inline void stop_at(Fiber::State state) {
  running.fiber->state = state;
  yield();
}

inline void enter() {
  arrive(nullptr, &running.scheduler_stack, &running.scheduler_stack_size);
  running.body();
  running.fiber->state = Fiber::DONE;
  yield(true);
}

inline void resume(Block& block, int thread) {
  Fiber& fiber = block.fibers[thread];
  running.block = &block;
  running.fiber = &fiber;
  threadIdx.x = thread;
  blockIdx.x = block.index;
  void* saved = nullptr;
  leave(&saved, fiber.stack.get(), Fiber::STACK);
  swapcontext(&running.scheduler, &fiber.context);
  arrive(saved, nullptr, nullptr);
}

inline void collective(Collective run, void* operands) {
  running.fiber->collective = run;
  running.fiber->operands = operands;
  stop_at(Fiber::AT_WARP);
}

inline std::vector<int> shuffled(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), running.random);
  return order;
}

// Runs one warp until each of its lanes has met a barrier, an instruction of the whole warp, a word that has not come,
// or the end. Whether any lane could run.
inline bool run_warp(Block& block, int warp) {
  Fiber* lanes = &block.fibers[warp * 32];
  bool ran = false, waits = false;
  for (int lane : shuffled(32)) {
    Fiber& fiber = lanes[lane];
    if (fiber.state == Fiber::AT_WORD && *fiber.word >> 63 == fiber.wanted_bit) fiber.state = Fiber::RUNNABLE;
    if (fiber.state == Fiber::RUNNABLE) {
      resume(block, warp * 32 + lane);
      ran = true;
    }
    waits |= fiber.state == Fiber::AT_WORD;
  }
  if (!ran || waits) return ran;
  void* operands[32];
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes[lane].state != lanes[0].state || lanes[lane].collective != lanes[0].collective)
      fail("the lanes of a warp met different instructions");
    operands[lane] = lanes[lane].operands;
  }
  if (lanes[0].state != Fiber::AT_WARP) return true;
  lanes[0].collective(operands);
  for (int lane = 0; lane < 32; ++lane) {
    lanes[lane].state = Fiber::RUNNABLE;
    lanes[lane].collective = nullptr;
  }
  return true;
}

// Runs every warp of a block once. Whether the block came any further.
inline bool run_warps(Block& block) {
  bool ran = false;
  for (int warp : shuffled(static_cast<int>(block.fibers.size()) / 32)) ran |= run_warp(block, warp);
  if (ran) return true;
  // nobody can go on: all are at the same barrier, or all have ended, unless some wait for another block
  const Fiber::State state = block.fibers[0].state;
  for (const Fiber& fiber : block.fibers)
    if (fiber.state == Fiber::AT_WORD) return false;
  for (const Fiber& fiber : block.fibers)
    if (fiber.state != state) fail("some threads of a block ended while others wait at a barrier");
  if (state != Fiber::AT_BLOCK) return false;
  for (Fiber& fiber : block.fibers) fiber.state = Fiber::RUNNABLE;
  return true;
}

inline bool all_are(const Block& block, Fiber::State state) {
  return std::all_of(block.fibers.begin(), block.fibers.end(), [&](const Fiber& f) { return f.state == state; });
}

inline void start(Block& block, int index, int shared_bytes) {
  block.index = index;
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, shared_bytes)) fail("out of memory");
  std::memset(shared, 0xff, shared_bytes);
  block.shared = static_cast<unsigned char*>(shared);
  for (Fiber& fiber : block.fibers) {
    fiber.state = Fiber::RUNNABLE;
    fiber.copy_group = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
}

inline void finish(Block& block) {
  for (Fiber& fiber : block.fibers)
    if (!fiber.copies.empty()) fail("a thread ended before its copies to shared memory were waited for");
  std::free(block.shared);
}

inline void run_alone(Block& block) {
  while (run_warps(block)) {
  }
  if (!all_are(block, Fiber::DONE)) fail("a block waits for others, which need not run at the same time");
}

inline void run_together(std::vector<Block>& blocks) {
  const auto count = [&](Fiber::State state) {
    return std::count_if(blocks.begin(), blocks.end(), [&](const Block& block) { return all_are(block, state); });
  };
  const auto all = static_cast<ptrdiff_t>(blocks.size());
  while (true) {
    bool ran = false;
    for (int index : shuffled(static_cast<int>(all))) {
      const int rounds = 1 + running.random() % 64;
      for (int round = 0; round < rounds && run_warps(blocks[index]); ++round) ran = true;
    }
    if (ran) continue;
    if (count(Fiber::DONE) == all) return;
    if (count(Fiber::AT_GRID) != all) fail("blocks wait for one another for ever");
    for (Block& block : blocks)
      for (Fiber& fiber : block.fibers) fiber.state = Fiber::RUNNABLE;
  }
}

inline void check_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail("an address is not aligned to its access");
}

}  // namespace emulation

inline void __syncthreads_() { emulation::stop_at(emulation::Fiber::AT_BLOCK); }
#define __syncthreads() ::tessera::__syncthreads_()

inline void grid_sync() { emulation::stop_at(emulation::Fiber::AT_GRID); }

inline void publish(uint64_t* to, uint64_t word) { *to = word; }

inline uint64_t await(const uint64_t* from, bool bit) {
  emulation::running.fiber->word = from;
  emulation::running.fiber->wanted_bit = bit;
  if (*from >> 63 != bit) emulation::stop_at(emulation::Fiber::AT_WORD);
  return *from;
}

inline unsigned char* dynamic_shared() { return emulation::running.block->shared; }

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulation::running.block->shared);
}

inline void copy_part_async(uint32_t address, const void* from, int bytes) {
  emulation::Fiber& fiber = *emulation::running.fiber;
  void* to = emulation::running.block->shared + address;
  emulation::check_aligned(to, 16);
  emulation::check_aligned(from, 16);
  if (bytes < 0 || bytes > 16) emulation::fail("a copy of more than 16 bytes, or fewer than none");
  const emulation::Copy copy{to, from, bytes, fiber.copy_group};
  if (emulation::seed == 0 || emulation::running.random() % 2)
    fiber.copies.push_back(copy);
  else
    copy.perform();
}

inline void copy_async(uint32_t address, const void* from, bool real) { copy_part_async(address, from, real ? 16 : 0); }

inline void commit_copies() { ++emulation::running.fiber->copy_group; }

inline void wait_copies_but(int groups) {
  emulation::Fiber& fiber = *emulation::running.fiber;
  auto& copies = fiber.copies;
  const int64_t first = fiber.copy_group - min(groups, 3);
  const auto later = std::find_if(copies.begin(), copies.end(), [&](const auto& copy) { return copy.group >= first; });
  std::for_each(copies.begin(), later, [](const emulation::Copy& copy) { copy.perform(); });
  copies.erase(copies.begin(), later);
}

inline void wait_copies() {
  for (const emulation::Copy& copy : emulation::running.fiber->copies) copy.perform();
  emulation::running.fiber->copies.clear();
}

namespace emulation {

struct Matrices {
  uint32_t* to;
  uint32_t row;
};

template <bool TRANSPOSED>
void load_matrices(void* const* lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t element[8][8];
    int rows_in_bank[8] = {};
    for (int row = 0; row < 8; ++row) {
      const uint32_t address = static_cast<const Matrices*>(lanes[matrix * 8 + row])->row;
      check_aligned(running.block->shared + address, 16);
      std::memcpy(element[row], running.block->shared + address, 16);
      ++rows_in_bank[address / 16 % 8];
    }
    bank_conflicts += *std::max_element(rows_in_bank, rows_in_bank + 8) - 1;
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = TRANSPOSED ? element[2 * t][g] : element[g][2 * t];
      const uint32_t high = TRANSPOSED ? element[2 * t + 1][g] : element[g][2 * t + 1];
      static_cast<const Matrices*>(lanes[lane])->to[matrix] = low | high << 16;
    }
  }
}

inline float from_half(uint16_t half) {
  const int sign = half >> 15, exponent = half >> 10 & 31, fraction = half & 1023;
  float value;
  if (exponent == 31)
    value = fraction ? NAN : INFINITY;
  else
    value = exponent ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                     : std::ldexp(static_cast<float>(fraction), -24);
  return sign ? -value : value;
}

inline uint16_t to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (size >= 65520) return sign | 0x7c00;
  if (size < std::ldexp(1.0f, -14)) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  int exponent;
  const float fraction = std::frexp(size, &exponent);  // in [0.5, 1)
  // a fraction that rounds up to 2048 carries into the exponent, as it should
  return sign | static_cast<uint16_t>(((exponent + 13) << 10) + static_cast<int>(std::nearbyint(fraction * 2048)));
}

inline float from_bfloat(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t to_bfloat(float value) {
  if (std::isnan(value)) return 0x7fff;
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  return static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

// of every 16-bit pattern, which is faster than computing it
template <class Element>
const float* numbers() {
  static const std::vector<float> table = [] {
    std::vector<float> all(1 << 16);
    for (int bits = 0; bits < 1 << 16; ++bits)
      all[bits] = std::is_same_v<Element, Float16> ? from_half(bits) : from_bfloat(bits);
    return all;
  }();
  return table.data();
}

struct MultiplyAdd {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <class Element>
void multiply_add(void* const* lanes) {
  const float* number = numbers<Element>();
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operands = *static_cast<const MultiplyAdd*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      for (int high = 0; high < 2; ++high)
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + high] = number[operands.a[i] >> 16 * high & 0xffff];
    for (int i = 0; i < 2; ++i)
      for (int high = 0; high < 2; ++high) b[2 * t + i * 8 + high][g] = number[operands.b[i] >> 16 * high & 0xffff];
  }
  float product[16][8] = {};
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) product[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<const MultiplyAdd*>(lanes[lane])->c[i] += product[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
}

template <class Word>
struct Shuffle {
  Word value, received;
  int other;  // how far away, or which lane
};

template <class Word>
void shuffle_xor(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<Shuffle<Word>*>(lanes[lane]);
    mine.received = static_cast<Shuffle<Word>*>(lanes[lane ^ mine.other])->value;
  }
}

template <class Word>
void shuffle(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<Shuffle<Word>*>(lanes[lane]);
    mine.received = static_cast<Shuffle<Word>*>(lanes[mine.other])->value;
  }
}

}  // namespace emulation

inline void load_matrices(uint32_t (&to)[4], uint32_t row) {
  emulation::Matrices operands{to, row};
  emulation::collective(emulation::load_matrices<false>, &operands);
}

inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) {
  emulation::Matrices operands{to, row};
  emulation::collective(emulation::load_matrices<true>, &operands);
}

template <class Element>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::MultiplyAdd operands{c, a, {b0, b1}};
  emulation::collective(emulation::multiply_add<Element>, &operands);
}

template <class Element>
uint32_t pack(float low, float high) {
  const auto round = std::is_same_v<Element, Float16> ? emulation::to_half : emulation::to_bfloat;
  return round(low) | uint32_t{round(high)} << 16;
}

template <class Element>
float2 unpack(uint32_t packed) {
  const float* number = emulation::numbers<Element>();
  return {number[packed & 0xffff], number[packed >> 16]};
}

template <class Word>
Word shuffle_xor(Word value, int lanes) {
  emulation::Shuffle<Word> operands{value, {}, lanes};
  emulation::collective(emulation::shuffle_xor<Word>, &operands);
  return operands.received;
}

template <class Word>
Word shuffle(Word value, int lane) {
  emulation::Shuffle<Word> operands{value, {}, lane};
  emulation::collective(emulation::shuffle<Word>, &operands);
  return operands.received;
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline void store_for_later(void* to, uint4 value) {
  emulation::check_aligned(to, 16);
  std::memcpy(to, &value, 16);
}

inline float exp2_approximate(float x) { return std::exp2(x); }

template <class Value>
Value load_shared(uint32_t address) {
  emulation::check_aligned(emulation::running.block->shared + address, sizeof(Value));
  Value value;
  std::memcpy(&value, emulation::running.block->shared + address, sizeof(value));
  return value;
}

inline uint4 load_shared_again(uint32_t address) {
  shuffle_xor(0, 0);  // all lanes meet
  return load_shared<uint4>(address);
}

inline void store_shared(uint32_t address, float value) {
  std::memcpy(emulation::running.block->shared + address, &value, sizeof(value));
}

inline unsigned thread_index() { return threadIdx.x; }

inline int64_t computed_here(int x) { return x; }

inline int multiprocessors() { return emulation::multiprocessors; }
inline int shared_per_multiprocessor() { return emulation::shared_per_multiprocessor; }
inline int shared_per_block() { return emulation::SHARED_LIMIT; }

namespace emulation {

template <class Arguments>
const char* begin(void (*kernel)(Arguments), int64_t blocks, int threads, int shared, const Arguments& arguments) {
  if (shared > SHARED_LIMIT) return "more shared memory than a block can have";
  running.random.seed(seed);
  running.body = [kernel, &arguments] { kernel(arguments); };
  blockDim.x = threads;
  gridDim.x = static_cast<int>(blocks);
  return nullptr;
}

}  // namespace emulation

template <class Arguments>
const char* launch(void (*kernel)(Arguments), int64_t blocks, int threads, int shared, void*,
                   const Arguments& arguments) {
  if (const char* error = emulation::begin(kernel, blocks, threads, shared, arguments)) return error;
  emulation::Block block;
  block.fibers.resize(threads);
  for (int index : emulation::shuffled(gridDim.x)) {
    emulation::start(block, index, shared);
    emulation::run_alone(block);
    emulation::finish(block);
  }
  return nullptr;
}

template <class Arguments>
const char* launch_cooperative(void (*kernel)(Arguments), int64_t blocks, int threads, int shared, void*,
                               const Arguments& arguments) {
  if (const char* error = emulation::begin(kernel, blocks, threads, shared, arguments)) return error;
  // 64 K registers, of which a thread takes 128, and 1 KB of shared memory per block for the system
  const int at_once = min(512 / threads, emulation::shared_per_multiprocessor / (shared + 1024));
  if (blocks > int64_t{at_once} * emulation::multiprocessors) return "more blocks than can run at once";
  std::vector<emulation::Block> together(blocks);
  for (int index = 0; index < blocks; ++index) {
    together[index].fibers.resize(threads);
    emulation::start(together[index], index, shared);
  }
  emulation::run_together(together);
  for (emulation::Block& block : together) emulation::finish(block);
  return nullptr;
}

}  // namespace tessera
