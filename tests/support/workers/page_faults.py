"""Allocates and frees a block of memory ten times, and prints the number of page faults."""

import ctypes
import resource

import torch

from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.runtime import Runtime

BLOCK = 64 * 2**20  # bytes

PR_SET_THP_DISABLE = 41  # huge pages would reduce the number of page faults

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    Runtime(RuntimeConfig(device="cpu", precision="fp32"))
    torch.ones(BLOCK, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(BLOCK, dtype=torch.uint8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
