"""Settings of torch itself: threads, determinism, precision of matrix products."""

import os

import torch

from ddp_trainer.config import RuntimeConfig


def use_all_cores() -> None:
    """Undoes OMP_NUM_THREADS=1, which Accelerate's launcher sets for every process, also for a single one.

    A launched process then computes with as many threads as one started by `python -m`, and so the same sums.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // local_processes, 1))


def set_backend_flags(config: RuntimeConfig) -> None:
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if config.deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports seconds of compiler
        torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.set_float32_matmul_precision("highest" if config.deterministic else "high")
