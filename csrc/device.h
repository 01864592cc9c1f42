// The few CUDA features that the kernels use, under names of their own: PTX where nvcc compiles, and an emulation where
// TESSERA_HOST asks for it (a test tool). Fragment layouts are those of the PTX manual for mma.m16n8k16:
// with g = lane / 4 and t = lane % 4, register pairs hold
//   A [16 x 16]: (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8)     B [16 x 8]: (2t, g) (2t + 8, g)
//   C [16 x 8]: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
#pragma once

#include <cstdint>

namespace tessera {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace tessera

#ifdef TESSERA_HOST
#include "host_emulation.h"
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define TESSERA_DEVICE __device__ __forceinline__

namespace tessera {

TESSERA_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char storage[];
  return storage;
}

// The address that the instructions below take.
TESSERA_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, or zeros where `real` is false: then nothing is read.
TESSERA_DEVICE void copy_async(uint32_t to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0)
               : "memory");
}

// The first `bytes` of 16 from global to shared memory, and zeros for the rest: nothing else is read.
TESSERA_DEVICE void copy_part_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// What this thread has copied since the last call is one group, and may be nothing.
TESSERA_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread's copies but the latest `groups`, at most 3.
TESSERA_DEVICE void wait_copies_but(int groups) {
  switch (groups) {
    case 0:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      break;
    case 1:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 3;" ::: "memory");
  }
}

// Waits for this thread's copies; others see them after the next barrier.
TESSERA_DEVICE void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8 x 8 matrices; lane i names row i % 8 of matrix i / 8.
TESSERA_DEVICE void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

TESSERA_DEVICE void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// one float, two, or four words
template <class Value>
TESSERA_DEVICE Value load_shared(uint32_t address);

template <>
TESSERA_DEVICE float load_shared<float>(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

template <>
TESSERA_DEVICE float2 load_shared<float2>(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
  return value;
}

template <>
TESSERA_DEVICE uint4 load_shared<uint4>(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// Four words that all lanes of a warp ask for, read again there rather than kept in registers: without the barrier the
// assembler reads them earlier.
TESSERA_DEVICE uint4 load_shared_again(uint32_t address) {
  uint4 value;
  asm volatile("bar.warp.sync 0xffffffff; ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

TESSERA_DEVICE void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// c [16 x 8] += a [16 x 16] b [16 x 8]
template <class Element>
TESSERA_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
TESSERA_DEVICE void multiply_add<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
TESSERA_DEVICE void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers in one register, the first in the low half; rounded to nearest even.
template <class Element>
TESSERA_DEVICE uint32_t pack(float low, float high);

template <>
TESSERA_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
TESSERA_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <class Element>
TESSERA_DEVICE float2 unpack(uint32_t packed);

template <>
TESSERA_DEVICE float2 unpack<Float16>(uint32_t packed) {
  __half2 pair;
  memcpy(&pair, &packed, sizeof(pair));
  return __half22float2(pair);
}

template <>
TESSERA_DEVICE float2 unpack<BFloat16>(uint32_t packed) {
  return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
}

template <class Word>
TESSERA_DEVICE Word shuffle_xor(Word value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// The value of one lane.
template <class Word>
TESSERA_DEVICE Word shuffle(Word value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

TESSERA_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
TESSERA_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

// All threads of all blocks of a cooperative launch meet, and see what the others wrote before.
TESSERA_DEVICE void grid_sync() { cooperative_groups::this_grid().sync(); }

// A word in global memory that passes from one block to others as a whole. It carries its own news, so that nothing
// else has to be ordered by it.
TESSERA_DEVICE void publish(uint64_t* to, uint64_t word) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

// Waits until the top bit of the word is `bit`.
TESSERA_DEVICE uint64_t await(const uint64_t* from, bool bit) {
  uint64_t word;
  do {
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  } while (static_cast<bool>(word >> 63) != bit);
  return word;
}

// 16 bytes to global memory that nobody reads soon: they leave the caches first.
TESSERA_DEVICE void store_for_later(void* to, uint4 value) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

TESSERA_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// threadIdx.x, but read again wherever it is asked for rather than kept in a register.
TESSERA_DEVICE unsigned thread_index() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// x, but what depends on it is not computed earlier and kept in registers.
TESSERA_DEVICE int64_t computed_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int shared_per_multiprocessor() { return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor); }
inline int shared_per_block() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

template <class Arguments>
const char* launch(void (*kernel)(Arguments), int64_t blocks, int threads, int shared, void* stream,
                   const Arguments& arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// All blocks run at once, or the launch fails.
template <class Arguments>
const char* launch_cooperative(void (*kernel)(Arguments), int64_t blocks, int threads, int shared, void* stream,
                               const Arguments& arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) {
    Arguments copy = arguments;
    void* pointers[] = {&copy};
    error = cudaLaunchCooperativeKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), pointers, shared,
                                        static_cast<cudaStream_t>(stream));
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tessera

#endif

namespace tessera {

constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LN_2 = 0.69314718055994530942f;

TESSERA_DEVICE constexpr float infinity() { return __builtin_huge_valf(); }

TESSERA_DEVICE int lane() { return thread_index() % 32; }
TESSERA_DEVICE int warp() { return thread_index() / 32; }
TESSERA_DEVICE int warps() { return blockDim.x / 32; }

}  // namespace tessera
