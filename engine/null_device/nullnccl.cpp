// NCCL on the device that computes nothing: ranks are let into a group, and a collective is written down with its bytes. Nothing is
// sent: what a rank receives is what lay there. That processes meet, and by what store, is torch's own code.

// Of numbers of 16 and 8 bits the header needs nothing; what defines them wants headers that torch's wheels leave out.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
#include <nccl.h>

#include <cstring>

extern "C" void nullcuda_note(const char* kind, const char* text, long a, long b, long c);

struct ncclComm { int ranks, rank; };

#define NCCL_OK(declaration) ncclResult_t declaration { return ncclSuccess; }

namespace {
long bytes(size_t count, ncclDataType_t type) {
  switch (type) {
    case ncclInt8: case ncclUint8: case ncclFloat8e4m3: case ncclFloat8e5m2: return (long)count;
    case ncclFloat16: case ncclBfloat16: return 2 * (long)count;
    case ncclInt64: case ncclUint64: case ncclFloat64: return 8 * (long)count;
    default: return 4 * (long)count;
  }
}
ncclResult_t collective(const char* name, size_t count, ncclDataType_t type) {
  nullcuda_note("collective", name, bytes(count, type), 0, 0);
  return ncclSuccess;
}
ncclResult_t join(ncclComm_t* comm, int ranks, int rank) {
  *comm = new ncclComm{ranks, rank};
  return ncclSuccess;
}
}  // namespace

extern "C" {
ncclResult_t ncclGetVersion(int* version) { *version = NCCL_VERSION_CODE; return ncclSuccess; }
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) { memset(id, 1, sizeof *id); return ncclSuccess; }
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId, int rank) { return join(comm, ranks, rank); }
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId, int rank, ncclConfig_t*) {
  return join(comm, ranks, rank);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t* comm, int ranks, int rank, int, ncclUniqueId*, ncclConfig_t*) {
  return join(comm, ranks, rank);
}
ncclResult_t ncclCommSplit(ncclComm_t comm, int, int, ncclComm_t* made, ncclConfig_t*) { return join(made, comm->ranks, comm->rank); }
ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) { *count = comm->ranks; return ncclSuccess; }
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) { *rank = comm->rank; return ncclSuccess; }
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) { *error = ncclSuccess; return ncclSuccess; }
const char* ncclGetErrorString(ncclResult_t) { return "no error"; }
const char* ncclGetLastError(ncclComm_t) { return ""; }
NCCL_OK(ncclCommFinalize(ncclComm_t))
NCCL_OK(ncclCommDestroy(ncclComm_t))
NCCL_OK(ncclCommAbort(ncclComm_t))
NCCL_OK(ncclCommRegister(const ncclComm_t, void*, size_t, void**))
NCCL_OK(ncclCommDeregister(const ncclComm_t, void*))
NCCL_OK(ncclGroupStart())
NCCL_OK(ncclGroupEnd())
ncclResult_t ncclAllReduce(const void*, void*, size_t n, ncclDataType_t t, ncclRedOp_t, ncclComm_t, cudaStream_t) {
  return collective("AllReduce", n, t);
}
ncclResult_t ncclAllGather(const void*, void*, size_t n, ncclDataType_t t, ncclComm_t, cudaStream_t) {
  return collective("AllGather", n, t);
}
ncclResult_t ncclReduceScatter(const void*, void*, size_t n, ncclDataType_t t, ncclRedOp_t, ncclComm_t, cudaStream_t) {
  return collective("ReduceScatter", n, t);
}
ncclResult_t ncclBroadcast(const void*, void*, size_t n, ncclDataType_t t, int, ncclComm_t, cudaStream_t) {
  return collective("Broadcast", n, t);
}
ncclResult_t ncclBcast(void*, size_t n, ncclDataType_t t, int, ncclComm_t, cudaStream_t) { return collective("Broadcast", n, t); }
ncclResult_t ncclReduce(const void*, void*, size_t n, ncclDataType_t t, ncclRedOp_t, int, ncclComm_t, cudaStream_t) {
  return collective("Reduce", n, t);
}
ncclResult_t ncclSend(const void*, size_t n, ncclDataType_t t, int, ncclComm_t, cudaStream_t) { return collective("Send", n, t); }
ncclResult_t ncclRecv(void*, size_t n, ncclDataType_t t, int, ncclComm_t, cudaStream_t) { return collective("Recv", n, t); }
}
