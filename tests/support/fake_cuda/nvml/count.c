/* The part of NVML that torch uses to count the GPUs before CUDA is initialized. */
#include <stdlib.h>

int nvmlInit(void) { return 0; }

int nvmlDeviceGetCount_v2(int *count) {
  const char *wanted = getenv("FAKE_GPUS");
  *count = wanted ? atoi(wanted) : 1;
  return 0;
}
