// cuBLAS on the device that computes nothing: a call is written down as a product. How many kernels the real one takes for it is
// not known here.

// Of 16-bit numbers cuBLAS's headers need the names only; their definitions want headers that torch's wheels leave out.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
struct __half;
struct __nv_bfloat16;
#include <cublasLt.h>
#include <cublas_v2.h>

#include <cstdio>
#include <cstring>
#include <mutex>
#include <unordered_map>

extern "C" int nullcuda_put(cudaStream_t s, const char* kind, const char* text, long a, long b, long c);
extern "C" void nullcuda_new_handle(void** h);

#define BLAS_OK(declaration) cublasStatus_t declaration { return CUBLAS_STATUS_SUCCESS; }

namespace {
std::mutex lock;
std::unordered_map<cublasHandle_t, cudaStream_t>& streams() {
  static auto* m = new std::unordered_map<cublasHandle_t, cudaStream_t>;
  return *m;
}
cudaStream_t stream_of(cublasHandle_t h) {
  std::lock_guard<std::mutex> guard(lock);
  return streams()[h];
}
cublasStatus_t product(cudaStream_t s, const char* call, long m, long n, long k, long batch) {
  char text[64];
  snprintf(text, sizeof text, "%s x%ld", call, batch);
  return nullcuda_put(s, "product", text, m, n * batch, k) ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}
using Op = cublasOperation_t;
struct Layout { long rows, columns; int batch = 1; };
struct Description { int transposes_a = 0; };
}  // namespace

extern "C" {
cublasStatus_t cublasCreate_v2(cublasHandle_t* h) { nullcuda_new_handle((void**)h); return CUBLAS_STATUS_SUCCESS; }
BLAS_OK(cublasDestroy_v2(cublasHandle_t))
cublasStatus_t cublasSetStream_v2(cublasHandle_t h, cudaStream_t s) {
  std::lock_guard<std::mutex> guard(lock);
  streams()[h] = s;
  return CUBLAS_STATUS_SUCCESS;
}
BLAS_OK(cublasSetWorkspace_v2(cublasHandle_t, void*, size_t))
BLAS_OK(cublasSetMathMode(cublasHandle_t, cublasMath_t))
cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* m) { *m = CUBLAS_DEFAULT_MATH; return CUBLAS_STATUS_SUCCESS; }
BLAS_OK(cublasSetPointerMode_v2(cublasHandle_t, cublasPointerMode_t))
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* m) {
  *m = CUBLAS_POINTER_MODE_HOST;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmEx(cublasHandle_t h, Op, Op, int m, int n, int k, const void*, const void*, cudaDataType, int,
    const void*, cudaDataType, int,
                            const void*, void*, cudaDataType, int, cublasComputeType_t, cublasGemmAlgo_t) {
  return product(stream_of(h), "GemmEx", m, n, k, 1);
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, Op, Op, int m, int n, int k, const void*, const void*,
    cudaDataType, int, long long, const void*,
                                          cudaDataType, int, long long, const void*, void*, cudaDataType, int, long long,
    int batch,
                                          cublasComputeType_t, cublasGemmAlgo_t) {
  return product(stream_of(h), "GemmStridedBatchedEx", m, n, k, batch);
}
cublasStatus_t cublasSgemm_v2(cublasHandle_t h, Op, Op, int m, int n, int k, const float*, const float*, int, const float*,
    int, const float*, float*, int) {
  return product(stream_of(h), "Sgemm", m, n, k, 1);
}
cublasStatus_t cublasDgemm_v2(cublasHandle_t h, Op, Op, int m, int n, int k, const double*, const double*, int, const double*,
    int, const double*, double*, int) {
  return product(stream_of(h), "Dgemm", m, n, k, 1);
}
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t h, Op, Op, int m, int n, int k, const float*, const float*, int,
    long long, const float*, int,
                                         long long, const float*, float*, int, long long, int batch) {
  return product(stream_of(h), "SgemmStridedBatched", m, n, k, batch);
}
cublasStatus_t cublasDgemmStridedBatched(cublasHandle_t h, Op, Op, int m, int n, int k, const double*, const double*, int,
    long long, const double*, int,
                                         long long, const double*, double*, int, long long, int batch) {
  return product(stream_of(h), "DgemmStridedBatched", m, n, k, batch);
}
size_t cublasLtGetVersion() { return 130000; }
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* l, cudaDataType, uint64_t rows, uint64_t columns, int64_t) {
  *l = (cublasLtMatrixLayout_t) new Layout{(long)rows, (long)columns};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { delete (Layout*)l; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l, cublasLtMatrixLayoutAttribute_t a, const void* v,
    size_t) {
  if (a == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) ((Layout*)l)->batch = *(int*)v;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t, cudaDataType_t) {
  *d = (cublasLtMatmulDesc_t) new Description;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { delete (Description*)d; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a, const void* v,
    size_t) {
  if (a == CUBLASLT_MATMUL_DESC_TRANSA) ((Description*)d)->transposes_a = *(int*)v;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) {
  nullcuda_new_handle((void**)p);
  return CUBLAS_STATUS_SUCCESS;
}
BLAS_OK(cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t))
BLAS_OK(cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void*,
    size_t))
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
                                              cublasLtMatmulHeuristicResult_t* r, int* found) {
  memset(r, 0, sizeof *r);
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void*, const void*, cublasLtMatrixLayout_t a,
    const void*, cublasLtMatrixLayout_t,
                              const void*, const void*, cublasLtMatrixLayout_t, void*, cublasLtMatrixLayout_t out,
    const cublasLtMatmulAlgo_t*, void*, size_t,
                              cudaStream_t s) {
  auto *left = (Layout*)a, *result = (Layout*)out;
  long k = ((Description*)d)->transposes_a ? left->rows : left->columns;
  return product(s, "LtMatmul", result->rows, result->columns, k, result->batch);
}
}
