// The functions of the CUDA driver, cuBLAS, cuDNN and NCCL that must do more than return 0. They compute no values.
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "fake_cuda.h"

// ---- the driver ----
static CUresult success(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = (void *)success;
  if (result) *result = cudaDriverEntryPointSuccess;
  return 0;
}
CUresult cuDriverGetVersion(int *version) { *version = 13020; return 0; }
CUresult cuDeviceGetCount(int *count) { return cudaGetDeviceCount(count); }
CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return 0; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  return cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device);
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)64; return 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)64; return 0; }
CUresult cuCtxGetDevice(CUdevice *device) { return cudaGetDevice(device); }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "imitated error"; return 0; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)128; return 0; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) { *function = (CUfunction)strdup(name); return 0; }
CUresult cuLaunchKernel(CUfunction function, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f,
                        unsigned memory, CUstream stream, void **arguments, void **extra) {
  work(KERNEL, (const char *)function, 0, stream);
  return 0;
}
CUresult cuPointerGetAttribute(void *answer, CUpointer_attribute attribute, CUdeviceptr at) {
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)answer = at;
  else *(int *)answer = memory_type((void *)at) == 2 ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
  return 0;
}

// ---- cuBLAS, and the stream that each handle works on ----
typedef struct { void *stream; char rest[504]; } Handle;
#define CREATE(name) int name(Handle **handle) { *handle = calloc(1, sizeof(Handle)); return 0; }
#define SET_STREAM(name) int name(Handle *handle, void *stream) { handle->stream = stream; return 0; }
#define GEMM(name) int name(Handle *handle) { work(GEMM, #name, 0, handle->stream); return 0; }
CREATE(cublasCreate_v2)
SET_STREAM(cublasSetStream_v2)
int cublasGetMathMode(Handle *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(Handle *handle, int *mode) { *mode = 0; return 0; }
size_t cublasLtGetVersion(void) { return 130400; }
GEMM(cublasGemmEx) GEMM(cublasGemmStridedBatchedEx) GEMM(cublasSgemmEx) GEMM(cublasDotEx)
GEMM(cublasSgemm_v2) GEMM(cublasDgemm_v2) GEMM(cublasSgemv_v2) GEMM(cublasDgemv_v2) GEMM(cublasSdot_v2)
GEMM(cublasSgemmStridedBatched) GEMM(cublasDgemmStridedBatched)
CREATE(cublasLtMatmulDescCreate) CREATE(cublasLtMatmulPreferenceCreate) CREATE(cublasLtMatrixLayoutCreate)
int cublasLtMatmul(void *h, void *a, void *b, void *c, void *d, void *e, void *f, void *g, void *i, void *j, void *k, void *l,
                   void *m, void *n, size_t workspace, void *stream) {
  work(GEMM, "cublasLtMatmul", 0, stream);
  return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void *h, void *a, void *b, void *c, void *d, void *e, void *f, int asked, void *results, int *found) {
  memset(results, 0, 96);
  *found = 1;
  return 0;
}

// ---- cuDNN's graph interface: one engine for each operation ----
// The constants are those of cudnn_backend.h.
enum { OPERATION_GRAPH = 15, ENGINE_OF_CONFIG = 202, ENGINE_OF_PLAN = 300, INT64 = 3 };
enum { CONVOLUTION = 10, CONVOLUTION_OF_FILTER = 11, CONVOLUTION_OF_DATA = 12 };
typedef struct { int type, operation; char rest[248]; } Descriptor;
CREATE(cudnnCreate)
SET_STREAM(cudnnSetStream)
int cudnnGetStream(Handle *handle, void **stream) { *stream = handle->stream; return 0; }
size_t cudnnGetVersion(void) { return 92600; }
size_t cudnnGetCudartVersion(void) { return CUDART_VERSION; }
const char *cudnnGetErrorString(int error) { return "imitated error"; }
int cudnnBackendCreateDescriptor(int type, Descriptor **new) {
  *new = calloc(1, sizeof **new);
  (*new)->type = type;
  if (type >= CONVOLUTION && type <= CONVOLUTION_OF_DATA) (*new)->operation = type;
  return 0;
}
int cudnnBackendDestroyDescriptor(Descriptor *old) { free(old); return 0; }
int cudnnBackendSetAttribute(Descriptor *of, int name, int type, int64_t count, const void *values) {
  if (of->type == OPERATION_GRAPH && count && !of->operation) of->operation = (*(Descriptor **)values)->operation;
  return 0;
}
int cudnnBackendGetAttribute(Descriptor *of, int name, int type, int64_t room, int64_t *count, void *values) {
  int is_engine = name == ENGINE_OF_CONFIG || name == ENGINE_OF_PLAN;
  if (is_engine && values && room) (*(Descriptor **)values)->operation = of->operation;
  if (!is_engine && type == INT64 && values && room) *(int64_t *)values = 0;
  if (count) *count = is_engine || type == INT64;
  return 0;
}
int cudnnBackendExecute(Handle *handle, Descriptor *plan, Descriptor *variables) {
  static const char *names[] = {"cudnn convolution", "cudnn convolution of filter", "cudnn convolution of data"};
  work(CUDNN, plan->operation ? names[plan->operation - CONVOLUTION] : "cudnn graph", 0, handle->stream);
  return 0;
}


// ---- cuDNN's BatchNorm, which fp16 uses ----
#define BATCHNORM(name) int name(Handle *handle) { work(CUDNN, #name, 0, handle->stream); return 0; }
CREATE(cudnnCreateTensorDescriptor)
BATCHNORM(cudnnBatchNormalizationForwardTrainingEx) BATCHNORM(cudnnBatchNormalizationBackwardEx)
BATCHNORM(cudnnBatchNormalizationForwardInference)
int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    void *h, int mode, int fused, void *a, void *b, void *c, void *d, void *e, size_t *size) { *size = 4096; return 0; }
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
    void *h, int mode, int fused, void *a, void *b, size_t *size) { *size = 4096; return 0; }
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    void *h, int mode, int fused, void *a, void *b, void *c, void *d, void *e, void *f, void *g, size_t *size) { *size = 4096; return 0; }

// ---- NCCL: ranks exchange nothing ----
typedef struct { int size, rank, graphs; char rest[4096]; } Communicator;  // graphs: number of captured collectives
typedef struct { char bytes[128]; } Id;
int ncclGetVersion(int *version) { *version = 23007; return 0; }
int ncclGetUniqueId(Id *id) { memset(id, 7, sizeof *id); return 0; }
int ncclCommInitRank(Communicator **new, int size, Id id, int rank) {
  *new = calloc(1, sizeof **new);
  (*new)->size = size, (*new)->rank = rank;
  return 0;
}
int ncclCommInitRankConfig(Communicator **new, int size, Id id, int rank, void *config) { return ncclCommInitRank(new, size, id, rank); }
int ncclCommCount(Communicator *of, int *size) { *size = of->size; return 0; }
int ncclCommUserRank(Communicator *of, int *rank) { *rank = of->rank; return 0; }
int ncclCommGetAsyncError(Communicator *of, int *error) { *error = 0; return 0; }
const char *ncclGetErrorString(int error) { return "imitated error"; }
const char *ncclGetLastError(Communicator *of) { return ""; }
int ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, Communicator *of, void *stream) {
  collective(__func__, count, stream, &of->graphs);
  return 0;
}
int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, Communicator *of, void *stream) {
  collective(__func__, count, stream, &of->graphs);
  return 0;
}
int ncclAllGather(const void *from, void *to, size_t count, int type, Communicator *of, void *stream) {
  collective(__func__, count, stream, &of->graphs);
  return 0;
}
int ncclCommDestroy(Communicator *of) {  // the real function waits until no graph uses the communicator
  note(of->graphs ? ILLEGAL : DEVICE_WAIT, __func__, 0, NULL);
  return 0;
}
