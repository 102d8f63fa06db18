// What the C files share: the log of calls, and the graph that a stream is being captured into.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

enum kind {
  KERNEL, GEMM, CUDNN, NCCL, COPY_ON_DEVICE, COPY_PINNED, MEMSET, GRAPH,              // work on the device
  COPY_PAGEABLE, COPY_BLOCKING, STREAM_WAIT, DEVICE_WAIT, EVENT_WAIT, ALLOCATION,     // the host waits, or may wait
  ILLEGAL                                                                             // not allowed during a capture
};

// One entry in the log. `stream`: NULL if the call has none. `size`: bytes, elements (NCCL), or nodes of a graph.
void note(enum kind kind, const char *name, size_t size, void *stream);
// Logs the call, and adds a node to the graph that `stream` is being captured into, if any.
void work(enum kind kind, const char *name, size_t size, void *stream);
// Logs a collective. If it is captured, adds 1 to `captured`, and subtracts it again when the graph is destroyed.
void collective(const char *name, size_t count, void *stream, int *captured);
// 1: page-locked host memory, 2: device memory, 0: any other memory.
int memory_type(const void *at);
int is_capturing(void *stream);  // 0: no, 1: yes, 2: the capture has become invalid

// Use as `return failed(error)`. Like CUDA, it also stores the error as the last error.
cudaError_t failed(cudaError_t error);
cudaError_t illegal(const char *name);  // notes the call and makes the capture invalid
int forbidden(void);                    // whether this thread is currently forbidden to make a call that may wait
#define MAY_WAIT(kind, size, stream) \
  do { note(kind, __func__, size, stream); if (forbidden()) return illegal(__func__); } while (0)
