"""Allocates and frees a block of memory 40 times.

Prints in how many of these rounds most pages of the block caused page faults.
"""

import ctypes
import resource

import torch

from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.runtime import Runtime

BLOCK = 64 * 2**20  # bytes; by default, glibc keeps freed blocks of up to 32 MiB

PR_SET_THP_DISABLE = 41  # huge pages would reduce the number of page faults


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    Runtime(RuntimeConfig(device="cpu", precision="fp32"))
    faulty = 0
    for _ in range(40):
        before = page_faults()
        torch.ones(BLOCK, dtype=torch.uint8)
        faulty += page_faults() - before > BLOCK // resource.getpagesize() // 2
    print(faulty)
