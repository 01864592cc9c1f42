// A CUDA device that computes nothing. Preloaded into a process, it answers for libcudart, libcuda (that is its SONAME) and,
// in files of their own, for cuBLAS and NCCL: it hands out address space and writes down every launch, product, copy, allocation
// and wait. Whatever is read from it is zero. As a driver would, it reads registers and stack frames out of the machine code that it is
// given, and refuses code for another chip and launches that no chip takes.
//
// What a stream captures is written down as captured, and a replay as one launch of so many nodes; what a driver refuses while a
// stream captures is refused, and breaks the capture.
//
// NULLCUDA_SM: 90, an H200 (the default), or 80, an A100 of 80 GB. NULLCUDA_DRIVER: the CUDA that its driver knows, such as 12040;
// where that is of an older generation than the runtime, there is no device. Not answered yet: cuDNN, a second device. A library
// of its own, like cuBLAS, belongs into a file of its own, which writes with nullcuda_put.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace {

// ---- the chip: figures of NVIDIA's data sheets and of the CUDA programming guide's table of compute capabilities
struct Chip {
  const char* name;
  size_t memory;
  int sm, processors, clock_khz, memory_clock_khz, l2, shared_of_processor, shared_of_block;
};
const Chip A100 = {"NVIDIA A100-SXM4-80GB", 85097971712u, 80, 108, 1410000, 1593000, 41943040, 167936, 166912};
const Chip H200 = {"NVIDIA H200", 150754820096u, 90, 132, 1980000, 3201000, 62914560, 233472, 232448};
const Chip& chip() {
  static const Chip& c = getenv("NULLCUDA_SM") && !strcmp(getenv("NULLCUDA_SM"), "80") ? A100 : H200;
  return c;
}
// what doesn't fit the chip can be counted all the same
size_t memory() {
  static const size_t bytes = getenv("NULLCUDA_MEMORY") ? strtoull(getenv("NULLCUDA_MEMORY"), nullptr, 10) : chip().memory;
  return bytes;
}
int driver() {
  static const int version = getenv("NULLCUDA_DRIVER") ? atoi(getenv("NULLCUDA_DRIVER")) : CUDART_VERSION;
  return version;
}
constexpr int THREADS = 1024, REGISTERS = 65536, SHARED = 49152, GRID_Y = 65535;

int attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return THREADS;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return GRID_Y;
    case cudaDevAttrMaxSharedMemoryPerBlock: return SHARED;
    case cudaDevAttrTotalConstantMemory: return 65536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return REGISTERS;
    case cudaDevAttrClockRate: return chip().clock_khz;
    case cudaDevAttrMultiProcessorCount: return chip().processors;
    case cudaDevAttrMemoryClockRate: return chip().memory_clock_khz;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return chip().l2;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrUnifiedAddressing: case cudaDevAttrConcurrentKernels: case cudaDevAttrStreamPrioritiesSupported: return 1;
    case cudaDevAttrComputeCapabilityMajor: return chip().sm / 10;
    case cudaDevAttrComputeCapabilityMinor: return chip().sm % 10;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return chip().shared_of_processor;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return chip().shared_of_block;
    case cudaDevAttrCooperativeLaunch: return 1;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    default: return 0;
  }
}

// ---- the log: kind, text, three numbers
struct Event { std::string kind, text; long a, b, c; };
std::mutex lock;
std::vector<Event> events;
bool recording = false;
void note(std::string kind, std::string text, long a = 0, long b = 0, long c = 0) {
  if (!recording) return;
  std::lock_guard<std::mutex> guard(lock);
  events.push_back({std::move(kind), std::move(text), a, b, c});
}

// ---- memory
struct Block { size_t bytes; void* mapped; size_t mapped_bytes; };
std::map<char*, Block>& on_device() { static auto* m = new std::map<char*, Block>; return *m; }
std::map<char*, size_t>& pinned() { static auto* m = new std::map<char*, size_t>; return *m; }
size_t held = 0;
size_t bytes_of(const Block& b) { return b.bytes; }
size_t bytes_of(size_t b) { return b; }
template <class Map> bool inside(const Map& map, const void* p) {
  std::lock_guard<std::mutex> guard(lock);
  auto it = map.upper_bound((char*)p);
  return it != map.begin() && (--it, (char*)p < it->first + bytes_of(it->second));
}
template <class Handle> void new_handle(Handle* h) {
  static long last = 0x1000;
  std::lock_guard<std::mutex> guard(lock);
  *h = (Handle)(last += 16);
}

// ---- capture, as the CUDA programming guide has it (CUDA Graphs, creating a graph by stream capture)
struct Graph { long nodes = 0, launches = 0; };
struct Capture {
  unsigned long long id;
  cudaStream_t origin;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  Graph graph;
  std::set<cudaStream_t> streams, unjoined;
  bool broken = false;
};
std::map<unsigned long long, Capture>& captures() { static auto* m = new std::map<unsigned long long, Capture>; return *m; }
struct Recorded { unsigned long long capture; cudaStream_t stream; };
std::map<cudaEvent_t, Recorded>& recorded() { static auto* m = new std::map<cudaEvent_t, Recorded>; return *m; }
thread_local cudaStreamCaptureMode strictness = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;

// Of a stream, the capture that it takes part in; all of this under `lock`.
Capture* capture_of(cudaStream_t s) {
  for (auto& [id, capture] : captures())
    if (capture.streams.count(s)) return &capture;
  return nullptr;
}
// What is called, refused with the driver's own error; a null capture is the only one there is, or all of them.
cudaError_t refuse(Capture* capture, const char* call, cudaError_t error) {
  for (auto& [id, open] : captures())
    if (!capture || capture == &open) open.broken = true;
  if (recording) events.push_back({"refused_in_capture", call, (long)error, 0, 0});
  return last_error = error;
}
// Calls that may wait or allocate, which no thread may make that captures, unless it has said that it knows what it does.
cudaError_t unsafe(const char* call) {
  std::lock_guard<std::mutex> guard(lock);
  for (auto& [id, capture] : captures()) {
    bool own = capture.thread == std::this_thread::get_id() && capture.mode != cudaStreamCaptureModeRelaxed;
    bool others = strictness == cudaStreamCaptureModeGlobal && capture.mode == cudaStreamCaptureModeGlobal;
    if (strictness != cudaStreamCaptureModeRelaxed && (own || others))
      return refuse(&capture, call, cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}
// Waits for all that the device does, whoever asked for it.
cudaError_t wait_for_all(const char* call) {
  {
    std::lock_guard<std::mutex> guard(lock);
    if (!captures().empty()) return refuse(nullptr, call, cudaErrorStreamCaptureUnsupported);
  }
  note("wait", call);
  return cudaSuccess;
}
cudaError_t wait_for(cudaStream_t s, const char* call) {
  {
    std::lock_guard<std::mutex> guard(lock);
    if (Capture* capture = capture_of(s)) return refuse(capture, call, cudaErrorStreamCaptureUnsupported);
  }
  note("wait", call);
  return cudaSuccess;
}
cudaError_t look_at(cudaEvent_t e, const char* call) {
  {
    std::lock_guard<std::mutex> guard(lock);
    auto of_capture = recorded().find(e);
    if (of_capture != recorded().end() && captures().count(of_capture->second.capture))
      return refuse(&captures()[of_capture->second.capture], call, cudaErrorCapturedEvent);
  }
  return unsafe(call);
}
// Work in a stream: done, or captured.
cudaError_t put(cudaStream_t s, const char* kind, std::string text, long a = 0, long b = 0, long c = 0) {
  {
    std::lock_guard<std::mutex> guard(lock);
    if (Capture* capture = capture_of(s)) {
      if (capture->broken) return last_error = cudaErrorStreamCaptureInvalidated;
      capture->graph.nodes++;
      capture->graph.launches += !strcmp(kind, "launch") || !strcmp(kind, "product");
      if (s != capture->origin) capture->unjoined.insert(s);
      if (recording) events.push_back({std::string("captured_") + kind, std::move(text), a, b, c});
      return cudaSuccess;
    }
  }
  note(kind, std::move(text), a, b, c);
  return cudaSuccess;
}
bool captures_now(cudaStream_t s) {
  std::lock_guard<std::mutex> guard(lock);
  return capture_of(s) != nullptr;
}

// The device's memory is zero and stays so: whoever reads it gets the same at every run, and nothing of it becomes real.
cudaError_t copy(void* to, const void* from, size_t n, cudaStream_t s, bool waits) {
  bool down = inside(on_device(), from), up = inside(on_device(), to);
  const void* host = down ? to : from;
  const char* how = down && up ? "" : inside(pinned(), host) ? "pinned" : "pageable";
  const char* kind = down ? (up ? "copy_on_device" : "copy_from_device") : (up ? "copy_to_device" : "copy_on_host");
  if (waits)
    if (cudaError_t error = unsafe("cudaMemcpy")) return error;
  if (captures_now(s) && !strcmp(how, "pageable")) {
    std::lock_guard<std::mutex> guard(lock);
    return refuse(capture_of(s), "cudaMemcpyAsync of pageable memory", cudaErrorStreamCaptureUnsupported);
  }
  bool captured = captures_now(s);
  if (cudaError_t error = put(s, kind, how, (long)n)) return error;
  if (captured) return cudaSuccess;
  if (down && !up) memset(to, 0, n);
  if (!down && !up) memcpy(to, from, n);
  if (waits) note("wait", "cudaMemcpy");
  return cudaSuccess;
}

// ---- machine code
struct Kernel { std::string name; int registers = 0, frame = 0; int shared_allowed = SHARED; };
struct Module { std::map<std::string, Kernel> kernels; };

// Registers and stack frame of each kernel from section .nv.info of a cubin, as cuobjdump --dump-resource-usage prints them.
CUresult read_module(CUmodule* out, const char* data) {
  auto* module = new Module;
  *out = (CUmodule)module;
  auto* head = (const Elf64_Ehdr*)data;
  if (memcmp(head->e_ident, ELFMAG, SELFMAG) != 0) return CUDA_SUCCESS;  // a fat binary or PTX: nothing is known of it
  int sm = head->e_ident[EI_ABIVERSION] >= 8 ? head->e_flags >> 8 & 0xff : head->e_flags & 0xff;  // 8 came with CUDA 13
  if (sm != chip().sm) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  auto* sections = (const Elf64_Shdr*)(data + head->e_shoff);
  const char* names = data + sections[head->e_shstrndx].sh_offset;
  const Elf64_Shdr *symbols = nullptr, *info = nullptr;
  for (int i = 0; i < head->e_shnum; i++) {
    if (sections[i].sh_type == SHT_SYMTAB) symbols = &sections[i];
    if (!strcmp(names + sections[i].sh_name, ".nv.info")) info = &sections[i];
  }
  if (!symbols || !info) return CUDA_ERROR_INVALID_IMAGE;
  const char* strings = data + sections[symbols->sh_link].sh_offset;
  auto* table = (const Elf64_Sym*)(data + symbols->sh_offset);
  const char *at = data + info->sh_offset, *end = at + info->sh_size;
  while (at < end) {  // format, attribute, two bytes; format 4 has so many bytes more: a symbol and a number
    unsigned char format = at[0], which = at[1];
    unsigned size = format == 4 ? *(const uint16_t*)(at + 2) : 0;
    if (format == 4 && (which == 0x2f || which == 0x11)) {  // registers, frame
      auto* words = (const uint32_t*)(at + 4);
      std::string name = strings + table[words[0]].st_name;
      Kernel& kernel = module->kernels[name];
      kernel.name = name;
      (which == 0x2f ? kernel.registers : kernel.frame) = (int)words[1];
    }
    at += 4 + size;
  }
  return CUDA_SUCCESS;
}

std::unordered_map<const void*, Kernel>& compiled_in() {
  static auto* m = new std::unordered_map<const void*, Kernel>;
  return *m;
}
Kernel& known(const void* host_function) {
  std::lock_guard<std::mutex> guard(lock);
  Kernel& kernel = compiled_in()[host_function];
  if (kernel.name.empty()) kernel.name = "?";
  return kernel;
}

// What a driver refuses is refused here.
cudaError_t launch(const Kernel& k, dim3 g, dim3 b, size_t shared, cudaStream_t s) {
  size_t threads = (size_t)b.x * b.y * b.z, blocks = (size_t)g.x * g.y * g.z;
  bool fits = threads && threads <= THREADS && b.z <= 64 && blocks && g.x <= 2147483647u && g.y <= GRID_Y && g.z <= GRID_Y;
  fits = fits && (int)shared <= k.shared_allowed && (size_t)k.registers * ((threads + 31) / 32 * 32) <= REGISTERS;
  if (fits) return put(s, "launch", k.name, (long)blocks, (long)threads, (long)shared);
  note("refused", k.name, (long)blocks, (long)threads, (long)shared);
  return cudaErrorInvalidValue;
}
CUresult drive(CUfunction f, dim3 g, dim3 b, size_t shared, CUstream s) {  // the driver's errors have the runtime's numbers
  return (CUresult)launch(*(Kernel*)f, g, b, shared, s);
}

}  // namespace

#define OK(declaration) cudaError_t declaration { return cudaSuccess; }
#define DRIVER_OK(declaration) CUresult declaration { return CUDA_SUCCESS; }

extern "C" {
// ---- for the other files here
void nullcuda_note(const char* kind, const char* text, long a, long b, long c) { note(kind, text, a, b, c); }
int nullcuda_put(cudaStream_t s, const char* kind, const char* text, long a, long b, long c) {
  return put(s, kind, text, a, b, c);
}
void nullcuda_new_handle(void** h) { new_handle(h); }

// ---- for ledger.py and traffic.py
void nullcuda_record(int on) {
  std::lock_guard<std::mutex> guard(lock);
  events.clear();
  recording = on;
}
long nullcuda_count() {
  std::lock_guard<std::mutex> guard(lock);
  return (long)events.size();
}
void nullcuda_write(const char* path) {
  std::lock_guard<std::mutex> guard(lock);
  FILE* f = fopen(path, "w");
  for (auto& e : events) fprintf(f, "%s\t%s\t%ld\t%ld\t%ld\n", e.kind.c_str(), e.text.c_str(), e.a, e.b, e.c);
  fclose(f);
}

// ---- runtime: the device
cudaError_t cudaGetDeviceCount(int* n) {
  *n = driver() / 1000 >= CUDART_VERSION / 1000;
  return *n ? cudaSuccess : cudaErrorInsufficientDriver;
}
cudaError_t cudaGetDevice(int* d) { *d = 0; return cudaSuccess; }
OK(cudaSetDevice(int))
cudaError_t cudaDriverGetVersion(int* v) { *v = driver(); return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* v) { *v = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, chip().name);
  p->totalGlobalMem = memory(); p->sharedMemPerBlock = SHARED; p->regsPerBlock = p->regsPerMultiprocessor = REGISTERS;
  p->warpSize = 32; p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = THREADS; p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = GRID_Y;
  p->major = chip().sm / 10; p->minor = chip().sm % 10; p->multiProcessorCount = chip().processors; p->l2CacheSize = chip().l2;
  p->maxThreadsPerMultiProcessor = 2048; p->maxBlocksPerMultiProcessor = 32;
  p->sharedMemPerMultiprocessor = chip().shared_of_processor; p->sharedMemPerBlockOptin = chip().shared_of_block;
  p->memoryBusWidth = 5120; p->unifiedAddressing = p->concurrentKernels = p->ECCEnabled = p->cooperativeLaunch = 1;
  p->asyncEngineCount = 3; p->textureAlignment = 512;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) { *v = attribute(a); return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int) { snprintf(s, n, "0000:00:00.0"); return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* v, int, int) { *v = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return wait_for_all("cudaDeviceSynchronize"); }
cudaError_t cudaGetLastError() { cudaError_t error = last_error; last_error = cudaSuccess; return error; }
cudaError_t cudaPeekAtLastError() { return last_error; }
OK(cudaProfilerStart())
OK(cudaProfilerStop())

// ---- runtime: memory
cudaError_t cudaMemGetInfo(size_t* f, size_t* t) { *t = memory(); *f = *t - held; return cudaSuccess; }
cudaError_t cudaMalloc(void** p, size_t n) {
  constexpr size_t page = 2u << 20;
  if (cudaError_t error = unsafe("cudaMalloc")) return error;
  std::lock_guard<std::mutex> guard(lock);
  if (held + n > memory()) return cudaErrorMemoryAllocation;
  size_t whole = ((n + page - 1) & ~(page - 1)) + page;
  void* mapped = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return cudaErrorMemoryAllocation;
  *p = (void*)(((size_t)mapped + page - 1) & ~(page - 1));
  on_device()[(char*)*p] = {n, mapped, whole};
  held += n;
  if (recording) events.push_back({"malloc", "", (long)n, 0, 0});
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  if (cudaError_t error = unsafe("cudaFree")) return error;
  std::lock_guard<std::mutex> guard(lock);
  auto it = on_device().find((char*)p);
  if (it == on_device().end()) return p ? cudaErrorInvalidValue : cudaSuccess;
  held -= it->second.bytes;
  munmap(it->second.mapped, it->second.mapped_bytes);
  on_device().erase(it);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
  if (cudaError_t error = unsafe("cudaHostAlloc")) return error;
  *p = aligned_alloc(4096, (n + 4095) & ~4095ull);
  std::lock_guard<std::mutex> guard(lock);
  pinned()[(char*)*p] = n;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
  if (cudaError_t error = unsafe("cudaFreeHost")) return error;
  std::lock_guard<std::mutex> guard(lock);
  pinned().erase((char*)p);
  free(p);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* p, size_t n, unsigned) {
  std::lock_guard<std::mutex> guard(lock);
  pinned()[(char*)p] = n;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) {
  std::lock_guard<std::mutex> guard(lock);
  pinned().erase((char*)p);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) { return copy(d, s, n, nullptr, true); }
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t stream) {
  return copy(d, s, n, stream, false);
}
OK(cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind))
cudaError_t cudaMemset(void*, int, size_t n) {
  if (cudaError_t error = unsafe("cudaMemset")) return error;
  return put(nullptr, "memset", "", (long)n);
}
cudaError_t cudaMemsetAsync(void*, int, size_t n, cudaStream_t s) { return put(s, "memset", "", (long)n); }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  a->type = inside(on_device(), p) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  if (inside(pinned(), p)) a->type = cudaMemoryTypeHost;
  a->devicePointer = a->type == cudaMemoryTypeUnregistered ? nullptr : (void*)p;
  a->hostPointer = a->type == cudaMemoryTypeDevice ? nullptr : (void*)p;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** p, const void*) { static void* m = calloc(1, 1 << 20); *p = m; return cudaSuccess; }

// ---- runtime: streams and events, all of which are done at once
cudaError_t cudaStreamCreate(cudaStream_t* s) { new_handle(s); return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { new_handle(s); return cudaSuccess; }
OK(cudaStreamDestroy(cudaStream_t))
cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) { *p = 0; return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t s) {
  std::lock_guard<std::mutex> guard(lock);
  Capture* capture = capture_of(s);
  return capture ? refuse(capture, "cudaStreamQuery", cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return wait_for(s, "cudaStreamSynchronize"); }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  std::lock_guard<std::mutex> guard(lock);
  auto found = recorded().find(e);
  bool of_capture = found != recorded().end() && captures().count(found->second.capture);
  Capture* waiting = capture_of(s);
  if (waiting && (!of_capture || found->second.capture != waiting->id))
    return refuse(waiting, "cudaStreamWaitEvent", cudaErrorStreamCaptureIsolation);
  if (of_capture) {
    Capture& capture = captures()[found->second.capture];
    capture.streams.insert(s);
    capture.unjoined.erase(found->second.stream);
    if (s != capture.origin) capture.unjoined.insert(s);
  }
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* u, unsigned) {
  if (captures_now(s)) return wait_for(s, "cudaStreamAddCallback");
  f(s, cudaSuccess, u);
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* u) {
  if (captures_now(s)) return put(s, "host_function", "");
  f(u);
  return cudaSuccess;
}

// ---- runtime: capture and graphs
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* m) { std::swap(*m, strictness); return cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode) {
  static unsigned long long last = 0;
  std::lock_guard<std::mutex> guard(lock);
  if (!s) return last_error = cudaErrorStreamCaptureUnsupported;  // the legacy stream cannot
  if (capture_of(s)) return last_error = cudaErrorIllegalState;
  last++;
  captures()[last] = {last, s, mode, std::this_thread::get_id(), {}, {s}, {}};
  if (recording) events.push_back({"capture", "begins", 0, 0, 0});
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* g) {
  std::lock_guard<std::mutex> guard(lock);
  *g = nullptr;
  Capture* capture = capture_of(s);
  if (!capture || capture->origin != s) return last_error = cudaErrorIllegalState;
  Capture ended = *capture;
  captures().erase(ended.id);
  if (recording) events.push_back({"capture", "ends", ended.graph.nodes, ended.graph.launches, 0});
  if (ended.mode != cudaStreamCaptureModeRelaxed && ended.thread != std::this_thread::get_id())
    return last_error = cudaErrorStreamCaptureWrongThread;
  if (ended.broken) return last_error = cudaErrorStreamCaptureInvalidated;
  if (!ended.unjoined.empty()) return last_error = cudaErrorStreamCaptureUnjoined;
  *g = (cudaGraph_t) new Graph(ended.graph);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
  std::lock_guard<std::mutex> guard(lock);
  Capture* capture = capture_of(s);
  *status = !capture          ? cudaStreamCaptureStatusNone
            : capture->broken ? cudaStreamCaptureStatusInvalidated
                              : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* g,
    const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* count) {
  cudaStreamIsCapturing(s, status);
  std::lock_guard<std::mutex> guard(lock);
  Capture* capture = capture_of(s);
  if (id && capture) *id = capture->id;
  if (g) *g = capture ? (cudaGraph_t)&capture->graph : nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t* nodes, size_t* count) {
  if (nodes) return cudaErrorNotSupported;  // how many there are is known, not which
  *count = (size_t)((Graph*)g)->nodes;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long) {
  if (cudaError_t error = unsafe("cudaGraphInstantiate")) return error;
  *e = (cudaGraphExec_t) new Graph(*(Graph*)g);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) {
  if (captures_now(s)) return wait_for(s, "cudaGraphLaunch");
  note("replay", "", ((Graph*)e)->nodes, ((Graph*)e)->launches);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) { delete (Graph*)g; return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) { delete (Graph*)e; return cudaSuccess; }

// ---- runtime: events
cudaError_t cudaEventCreate(cudaEvent_t* e) { new_handle(e); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { new_handle(e); return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  std::lock_guard<std::mutex> guard(lock);
  recorded().erase(e);
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t e) { return look_at(e, "cudaEventQuery"); }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  std::lock_guard<std::mutex> guard(lock);
  recorded().erase(e);
  if (Capture* capture = capture_of(s)) recorded()[e] = {capture->id, s};
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  if (cudaError_t error = look_at(e, "cudaEventSynchronize")) return error;
  note("wait", "cudaEventSynchronize");
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { *ms = 1.0f; return cudaSuccess; }

// ---- runtime: kernels that were compiled into a library
void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*, int*) {
  compiled_in()[host].name = device;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
struct Configuration { dim3 grid, block; size_t shared; cudaStream_t stream; };
static thread_local std::vector<Configuration> pushed;
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t shared, cudaStream_t s) {
  pushed.push_back({g, b, shared, s});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* shared, void* s) {
  Configuration c = pushed.back();
  pushed.pop_back();
  *g = c.grid; *b = c.block; *shared = c.shared; *(cudaStream_t*)s = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) { *k = (cudaKernel_t)f; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void**, size_t shared, cudaStream_t s) {
  return launch(known((void*)f), g, b, shared, s);
}
cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void**, size_t shared, cudaStream_t s) {
  return launch(known(f), g, b, shared, s);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void**) {
  return launch(known(f), c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = THREADS; a->numRegs = 64; a->binaryVersion = a->ptxVersion = chip().sm;
  a->maxDynamicSharedSizeBytes = known(f).shared_allowed;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute a, int v) {
  if (a != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (v > chip().shared_of_block) return cudaErrorInvalidValue;
  known(f).shared_allowed = v > SHARED ? v : SHARED;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  *n = 2;
  return cudaSuccess;
}

// ---- driver
DRIVER_OK(cuInit(unsigned))
CUresult cuDriverGetVersion(int* v) { *v = driver(); return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* d, int) { *d = 0; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* n) { *n = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGetName(char* s, int n, CUdevice) { snprintf(s, n, "%s", chip().name); return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) { *v = attribute(a); return CUDA_SUCCESS; }
CUresult cuDeviceTotalMem_v2(size_t* n, CUdevice) { *n = memory(); return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) { *flags = 0; *active = 1; return CUDA_SUCCESS; }
static CUcontext const context = (CUcontext)0x77;
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) { *c = context; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* c) { *c = context; return CUDA_SUCCESS; }
DRIVER_OK(cuCtxSetCurrent(CUcontext))
DRIVER_OK(cuCtxPushCurrent_v2(CUcontext))
CUresult cuCtxPopCurrent_v2(CUcontext* c) { *c = context; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* d) { *d = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* v, CUlimit) { *v = 0; return CUDA_SUCCESS; }
DRIVER_OK(cuCtxSetLimit(CUlimit, size_t))
CUresult cuCtxSynchronize() { return (CUresult)wait_for_all("cuCtxSynchronize"); }
CUresult cuStreamSynchronize(CUstream s) { return (CUresult)wait_for(s, "cuStreamSynchronize"); }
CUresult cuGetErrorString(CUresult, const char** s) { *s = "refused by the null device"; return CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult, const char** s) { *s = "refused by the null device"; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* m, const void* image) { return read_module(m, (const char*)image); }
CUresult cuModuleLoad(CUmodule* m, const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::string image((std::istreambuf_iterator<char>(file)), {});
  return image.empty() ? CUDA_ERROR_FILE_NOT_FOUND : read_module(m, image.data());
}
CUresult cuModuleLoadDataEx(CUmodule* m, const void* image, unsigned, CUjit_option*, void**) {
  return read_module(m, (const char*)image);
}
DRIVER_OK(cuModuleUnload(CUmodule))  // kernels of it may be named in the log
CUresult cuModuleGetFunction(CUfunction* f, CUmodule m, const char* name) {
  Kernel& kernel = ((Module*)m)->kernels[name];
  kernel.name = name;
  *f = (CUfunction)&kernel;
  note("load", name, kernel.registers, kernel.frame);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction f) {
  auto* kernel = (Kernel*)f;
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? THREADS
       : a == CU_FUNC_ATTRIBUTE_NUM_REGS            ? kernel->registers
       : a == CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES    ? kernel->frame
                                                    : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
  if (a != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (v > chip().shared_of_block) return CUDA_ERROR_INVALID_VALUE;
  ((Kernel*)f)->shared_allowed = v > SHARED ? v : SHARED;
  return CUDA_SUCCESS;
}
DRIVER_OK(cuFuncSetCacheConfig(CUfunction, CUfunc_cache))
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) { *n = 2; return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) { *n = 2; return CUDA_SUCCESS; }
CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c,
    unsigned shared, CUstream s, void**, void**) {
  return drive(f, {x, y, z}, {a, b, c}, shared, s);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void**, void**) {
  return drive(f, {c->gridDimX, c->gridDimY, c->gridDimZ}, {c->blockDimX, c->blockDimY, c->blockDimZ}, c->sharedMemBytes,
      c->hStream);
}
CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c,
    unsigned shared, CUstream s, void**) {
  return drive(f, {x, y, z}, {a, b, c}, shared, s);
}
CUresult cuPointerGetAttribute(void* v, CUpointer_attribute a, CUdeviceptr p) {
  if (!inside(on_device(), (void*)p)) return CUDA_ERROR_INVALID_VALUE;
  if (a == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr*)v = p;
  else *(int*)v = a == CU_POINTER_ATTRIBUTE_MEMORY_TYPE ? CU_MEMORYTYPE_DEVICE : 0;
  return CUDA_SUCCESS;
}
DRIVER_OK(cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
    const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
    CUtensorMapFloatOOBfill))
static CUresult unanswered() { return CUDA_ERROR_NOT_SUPPORTED; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** p, unsigned, unsigned long long,
    cudaDriverEntryPointQueryResult* r) {
  void* own = dlsym(RTLD_DEFAULT, name);
  if (!own) own = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
  *p = own ? own : (void*)unanswered;
  if (r) *r = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
}
