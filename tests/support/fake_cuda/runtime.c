// The log of calls, and the streams, events and graphs of an imitated CUDA runtime. All work finishes immediately,
// because nothing is computed. Stream capture follows CUDA's rules: a call that may wait makes the capture invalid. In
// thread-local mode, such a call from another thread is allowed, unless it waits for the device or the captured stream.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#include "fake_cuda.h"

// ---- the log ----
typedef struct { int kind; const char *name; size_t size; void *stream; } Entry;
#define MOST (1 << 20)
static Entry log_[MOST];
static volatile long length;
static volatile int logging;

void note(enum kind kind, const char *name, size_t size, void *stream) {
  if (!logging) return;
  long place = __sync_fetch_and_add(&length, 1);
  if (place < MOST) log_[place] = (Entry){kind, name, size, stream};
}
void fake_start(void) { length = 0; logging = 1; }
void fake_stop(void) { logging = 0; }
long fake_length(void) { return length < MOST ? length : MOST; }
Entry *fake_log(void) { return log_; }

// ---- streams, events, graphs ----
typedef struct {
  size_t nodes; int invalid, mode; unsigned long long id; pthread_t thread;
  int collectives, *users;  // collectives in the graph, and their communicator's counter of captured collectives
} Graph;
typedef struct Stream { Graph *graph; struct Stream *next; } Stream;
typedef struct { Graph *graph; } Event;
static Stream default_stream, *streams = &default_stream;
static Graph *capture;  // the one in progress; this process captures one at a time
static __thread int thread_mode = cudaStreamCaptureModeGlobal;
static __thread cudaError_t last_error;

static Stream *stream_of(void *stream) { return (uintptr_t)stream <= 2 ? &default_stream : stream; }
cudaError_t failed(cudaError_t error) { return last_error = error; }
cudaError_t illegal(const char *name) {
  note(ILLEGAL, name, 0, NULL);
  if (capture) capture->invalid = 1;
  return failed(cudaErrorStreamCaptureUnsupported);
}
// Whether this thread is currently forbidden to make a call that may wait.
int forbidden(void) {
  if (!capture || thread_mode == cudaStreamCaptureModeRelaxed || capture->mode == cudaStreamCaptureModeRelaxed) return 0;
  return capture->mode == cudaStreamCaptureModeGlobal || pthread_equal(capture->thread, pthread_self());
}

int is_capturing(void *stream) { Graph *graph = stream_of(stream)->graph; return graph ? 1 + graph->invalid : 0; }
void work(enum kind kind, const char *name, size_t size, void *stream) {
  note(kind, name, size, stream);
  if (stream_of(stream)->graph) stream_of(stream)->graph->nodes++;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  Stream *new = calloc(1, sizeof *new);
  new->next = streams, streams = new;
  *stream = (cudaStream_t)new;
  return 0;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return cudaStreamCreateWithPriority(stream, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = 0, *high = -5; return 0; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return 0; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  note(STREAM_WAIT, __func__, 0, stream);
  return is_capturing(stream) ? illegal(__func__) : 0;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return is_capturing(stream) ? illegal(__func__) : 0; }
cudaError_t cudaDeviceSynchronize(void) {
  note(DEVICE_WAIT, __func__, 0, NULL);
  return capture ? illegal(__func__) : 0;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  Graph *graph = ((Event *)event)->graph;
  if (graph && graph == capture) stream_of(stream)->graph = graph;  // this stream joins the capture
  return 0;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  static const int states[] = {cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive, cudaStreamCaptureStatusInvalidated};
  *status = states[is_capturing(stream)];
  return 0;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
  Graph *found = stream_of(stream)->graph;
  cudaStreamIsCapturing(stream, status);
  if (found && id) *id = found->id;
  if (found && graph) *graph = (cudaGraph_t)found;
  if (nodes) *nodes = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return 0;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  static unsigned long long captures;
  if (capture || stream_of(stream) == &default_stream) return failed(cudaErrorStreamCaptureUnsupported);
  capture = calloc(1, sizeof *capture);
  *capture = (Graph){.mode = mode, .id = ++captures, .thread = pthread_self()};
  stream_of(stream)->graph = capture;
  return 0;
}
static void release(Graph *graph) {
  if (graph && graph->users) *graph->users -= graph->collectives;
  if (graph) graph->users = NULL;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  Graph *done = stream_of(stream)->graph;
  if (!done) return failed(cudaErrorIllegalState);
  for (Stream *each = streams; each; each = each->next) if (each->graph == done) each->graph = NULL;
  capture = NULL;
  if (done->invalid) release(done);
  *graph = done->invalid ? NULL : (cudaGraph_t)done;
  return done->invalid ? failed(cudaErrorStreamCaptureInvalidated) : 0;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  int before = thread_mode;
  thread_mode = *mode, *mode = before;
  return 0;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
  *executable = (cudaGraphExec_t)graph;
  return 0;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(executable, graph, flags);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  if (!nodes) *count = ((Graph *)graph)->nodes;
  return 0;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  note(GRAPH, __func__, ((Graph *)executable)->nodes, stream);
  return 0;
}
void collective(const char *name, size_t count, void *stream, int *captured) {
  Graph *graph = stream_of(stream)->graph;
  work(NCCL, name, count, stream);
  if (graph) graph->users = captured, graph->collectives++, ++*captured;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { release((Graph *)executable); return 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = calloc(1, sizeof(Event)); return 0; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return 0; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  ((Event *)event)->graph = stream_of(stream)->graph;
  return 0;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
cudaError_t cudaEventQuery(cudaEvent_t event) { return forbidden() ? illegal(__func__) : 0; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { MAY_WAIT(EVENT_WAIT, 0, NULL); return 0; }
cudaError_t cudaEventElapsedTime(float *time, cudaEvent_t from, cudaEvent_t to) { *time = 1; return 0; }
cudaError_t cudaGetLastError(void) { cudaError_t error = last_error; last_error = 0; return error; }
cudaError_t cudaPeekAtLastError(void) { return last_error; }
