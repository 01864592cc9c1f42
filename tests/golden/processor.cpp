// A processor that others see in place of this one: AMD's Zen 2, which has AVX2 and no AVX-512, and other caches.
//
// Loaded before all other libraries. The kernel is asked to let `cpuid` fault in this process and in what it forks; each fault is
// answered here, with what the processor says but for what Zen 2 says otherwise. So libraries that choose their code by `cpuid`
// (torch, MKL, oneDNN, OpenBLAS, NumPy, DALI) choose what they would there. Not stood in for: the C library, which has asked before.

#include <asm/prctl.h>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

namespace {

struct Registers {
  uint32_t a, b, c, d;
};

constexpr uint32_t bits(std::initializer_list<int> places) {
  uint32_t all = 0;
  for (int place : places) all |= 1u << place;
  return all;
}

constexpr uint32_t kFeatures = 7, kCaches = 4, kAmdCaches = 0x8000001d, kAmdHighest = 0x80000000;
// of leaf 7: AVX-512 and AMX
constexpr uint32_t kWideB = bits({16, 17, 21, 26, 27, 28, 30, 31}), kWideD = bits({2, 3, 8, 22, 23, 24, 25});

bool let_fault(bool on) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, on ? 0L : 1L) == 0; }

Registers asked(uint32_t leaf, uint32_t part) {
  Registers r;
  let_fault(false);
  __asm__ volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(part));
  let_fault(true);
  return r;
}

Registers named_amd(uint32_t highest) { return {highest, 0x68747541, 0x444d4163, 0x69746e65}; }

// type and level, ways, sets of lines of 64 bytes
Registers cache(uint32_t kind, uint32_t ways, uint32_t sets) { return {kind, (ways - 1) << 22 | 63, sets - 1, 0}; }

Registers caches(uint32_t part) {
  switch (part) {
    case 0: return cache(0x121, 8, 64);     // data, 32 KiB
    case 1: return cache(0x122, 8, 64);     // code, 32 KiB
    case 2: return cache(0x143, 8, 1024);   // 512 KiB
    case 3: return cache(0x163, 16, 16384);  // 16 MiB
    default: return {};
  }
}

Registers seen(uint32_t leaf, uint32_t part) {
  switch (leaf) {
    case 0: return named_amd(0xd);
    case 1: {
      Registers r = asked(leaf, part);
      r.a = 0x00830f10;  // family 17h, model 31h
      return r;
    }
    case kFeatures: {
      if (part > 0) return {};
      Registers r = asked(leaf, part);
      return {0, r.b & ~kWideB, 0, r.d & ~kWideD};
    }
    case 2: case kCaches: case 0xb: case 0x14: case 0x19: case 0x1c: case 0x1d: case 0x1e: case 0x1f: case 0x24:
      return {};  // Intel's alone
    case kAmdHighest: return named_amd(0x8000001f);
    case kAmdCaches: return caches(part);
    default: return asked(leaf, part);
  }
}

void answer(int, siginfo_t*, void* context) {
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* code = reinterpret_cast<const unsigned char*>(registers[REG_RIP]);
  if (code == nullptr || code[0] != 0x0f || code[1] != 0xa2) {
    std::signal(SIGSEGV, SIG_DFL);  // a fault of another kind: it comes again, and ends the process
    return;
  }
  Registers r = seen(static_cast<uint32_t>(registers[REG_RAX]), static_cast<uint32_t>(registers[REG_RCX]));
  registers[REG_RAX] = r.a;
  registers[REG_RBX] = r.b;
  registers[REG_RCX] = r.c;
  registers[REG_RDX] = r.d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) void begin() {
  struct sigaction action = {};
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  if (sigaction(SIGSEGV, &action, nullptr) != 0 || !let_fault(true)) {
    std::fputs("processor.cpp: cpuid cannot be made to fault here\n", stderr);
    _exit(70);
  }
}

}  // namespace
