// The memory, kernels and device of an imitated CUDA runtime. Device memory is host memory, and kernels do nothing.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fake_cuda.h"

// ---- memory ----
typedef struct { char *at; size_t size; int type; } Block;  // type: as `memory_type` returns it
static Block blocks[1 << 16];
static int num_blocks;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int block_with(const void *at) {  // call it with the lock held; -1: there is no such block
  for (int i = 0; i < num_blocks; i++)
    if ((char *)at >= blocks[i].at && (char *)at < blocks[i].at + blocks[i].size) return i;
  return -1;
}
int memory_type(const void *at) {
  pthread_mutex_lock(&lock);
  int found = block_with(at), type = found < 0 ? 0 : blocks[found].type;
  pthread_mutex_unlock(&lock);
  return type;
}
static cudaError_t allocate(void **at, size_t size, int type) {
  size = (size + 4096) & ~4095ul;
  *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  pthread_mutex_lock(&lock);
  blocks[num_blocks++] = (Block){*at, size, type};
  pthread_mutex_unlock(&lock);
  return *at == MAP_FAILED ? failed(cudaErrorMemoryAllocation) : 0;
}
static cudaError_t release(void *at) {
  pthread_mutex_lock(&lock);
  int found = block_with(at);
  if (found >= 0) {
    munmap(blocks[found].at, blocks[found].size);
    blocks[found] = blocks[--num_blocks];
  }
  pthread_mutex_unlock(&lock);
  return 0;
}
cudaError_t cudaMalloc(void **at, size_t size) { MAY_WAIT(ALLOCATION, size, NULL); return allocate(at, size, 2); }
cudaError_t cudaFree(void *at) { if (!at) return 0; MAY_WAIT(ALLOCATION, 0, NULL); return release(at); }
cudaError_t cudaHostAlloc(void **at, size_t size, unsigned flags) { MAY_WAIT(ALLOCATION, size, NULL); return allocate(at, size, 1); }
cudaError_t cudaMallocHost(void **at, size_t size) { return cudaHostAlloc(at, size, 0); }
cudaError_t cudaFreeHost(void *at) { MAY_WAIT(ALLOCATION, 0, NULL); return release(at); }
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) { *left = 138ul << 30, *total = 139ul << 30; return 0; }
cudaError_t cudaGetSymbolAddress(void **at, const void *symbol) { return allocate(at, 4096, 2); }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *answer, const void *at) {
  memset(answer, 0, sizeof *answer);
  answer->type = memory_type(at), answer->device = answer->type == 2 ? 0 : -1;
  answer->devicePointer = answer->type ? (void *)at : NULL, answer->hostPointer = (void *)at;
  return 0;
}
// A copy to or from the host is really made. A copy within the device is only logged, like all other work of the device.
static void copy(const char *name, void *to, const void *from, size_t size, cudaStream_t stream) {
  int there = memory_type(to), here = memory_type(from);
  work(there == 2 && here == 2 ? COPY_ON_DEVICE : there && here ? COPY_PINNED : COPY_PAGEABLE, name, size, stream);
  if (there != 2 || here != 2) memmove(to, from, size);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  copy(__func__, to, from, size, stream);
  return 0;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  MAY_WAIT(COPY_BLOCKING, size, NULL);
  memmove(to, from, size);
  return 0;
}
cudaError_t cudaMemsetAsync(void *at, int value, size_t size, cudaStream_t stream) { work(MEMSET, __func__, size, stream); return 0; }
cudaError_t cudaMemset(void *at, int value, size_t size) { return cudaMemsetAsync(at, value, size, NULL); }

// ---- kernels: torch registers all of them by name when it is loaded ----
#define SLOTS (1 << 18)
static struct { const void *function; const char *name; } kernels[SLOTS];
static unsigned slot_of(const void *function) {
  unsigned slot = ((uintptr_t)function * 0x9E3779B97F4A7C15ull >> 40) & (SLOTS - 1);
  while (kernels[slot].function && kernels[slot].function != function) slot = (slot + 1) & (SLOTS - 1);
  return slot;
}
void **__cudaRegisterFatBinary(void *binary) { static void *handle[4]; return handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **handle, char *variable, char *at, const char *name, int ext, size_t size, int constant, int global) {}
void __cudaRegisterFunction(void **handle, const char *function, char *on_device, const char *name, int limit, void *a, void *b, void *c, void *d, int *e) {
  unsigned slot = slot_of(function);
  kernels[slot].function = function, kernels[slot].name = name;
}
typedef struct { dim3 grid, block; size_t memory; void *stream; } Launch;
static __thread Launch launches[8];
static __thread unsigned depth;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t memory, void *stream) {
  launches[depth++ & 7] = (Launch){grid, block, memory, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *memory, void *stream) {
  Launch top = launches[--depth & 7];
  *grid = top.grid, *block = top.block, *memory = top.memory, *(void **)stream = top.stream;
  return 0;
}
cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t memory, cudaStream_t stream) {
  const char *name = kernels[slot_of(function)].name;
  if (getenv("FAKE_OLD_GPU")) return failed(cudaErrorNoKernelImageForDevice);
  work(KERNEL, name ? name : "?", 0, stream);
  return 0;
}
cudaError_t __cudaLaunchKernel(void *function, dim3 grid, dim3 block, void **arguments, size_t memory, cudaStream_t stream) {
  return cudaLaunchKernel(function, grid, block, arguments, memory, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
  return cudaLaunchKernel(function, config->gridDim, config->blockDim, arguments, 0, config->stream);
}
cudaError_t __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return 0; }
cudaError_t cudaGetKernel(cudaKernel_t *kernel, const void *function) { *kernel = (cudaKernel_t)function; return 0; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *answer, const void *function) {
  memset(answer, 0, sizeof *answer);
  answer->maxThreadsPerBlock = 1024, answer->numRegs = 32, answer->maxDynamicSharedSizeBytes = 49152;
  answer->ptxVersion = answer->binaryVersion = 90;
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *function, int block, size_t memory) {
  *count = block ? 2048 / block : 1;
  return 0;
}

// ---- the device: it has the properties of an H200 ----
static __thread int device;
cudaError_t cudaGetDeviceCount(int *count) { const char *asked = getenv("FAKE_GPUS"); *count = asked ? atoi(asked) : 1; return 0; }
cudaError_t cudaGetDevice(int *current) { *current = device; return 0; }
cudaError_t cudaSetDevice(int new) { device = new; return 0; }
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int number) { snprintf(text, size, "0000:%02x:00.0", number + 1); return 0; }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int number) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrUnifiedAddressing: case cudaDevAttrConcurrentKernels: case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
    default: *value = 0;
  }
  return 0;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *answer, int number) {
  *answer = (struct cudaDeviceProp){
    .name = "NVIDIA H200, imitated", .totalGlobalMem = 139ul << 30, .major = 9, .multiProcessorCount = 132, .warpSize = 32,
    .maxThreadsPerBlock = 1024, .maxThreadsDim = {1024, 1024, 64}, .maxGridSize = {2147483647, 65535, 65535},
    .sharedMemPerBlock = 49152, .sharedMemPerBlockOptin = 232448, .sharedMemPerMultiprocessor = 233472,
    .reservedSharedMemPerBlock = 1024, .regsPerBlock = 65536, .regsPerMultiprocessor = 65536,
    .maxThreadsPerMultiProcessor = 2048, .maxBlocksPerMultiProcessor = 32, .l2CacheSize = 60 << 20,
    .unifiedAddressing = 1, .concurrentKernels = 1, .streamPrioritiesSupported = 1, .pciBusID = number + 1};
  answer->uuid.bytes[0] = number + 1;
  return 0;
}
cudaError_t cudaDriverGetVersion(int *version) { *version = 13020; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
const char *cudaGetErrorName(cudaError_t error) { return error ? "cudaError" : "cudaSuccess"; }
const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    default: return "imitated error";
  }
}
