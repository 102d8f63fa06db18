"""Measures the time that one step takes on the host and on the GPU, and counts its GPU operations, such as kernels."""

import statistics
import time
from collections.abc import Callable

import torch

STEPS = 20  # number of steps whose time on the host is measured
TRACED_STEPS = 5


def gpu_cost(step: Callable[[], object]) -> dict[str, float]:
    """For one step: milliseconds on the host, milliseconds on the GPU, and the number of GPU operations."""
    from torch.profiler import ProfilerActivity, profile

    host = statistics.median(_host_seconds(step) for _ in range(STEPS))
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as traced:
        for _ in range(TRACED_STEPS):
            step()
        torch.cuda.synchronize()
    operations = [event for event in traced.events() or () if event.device_type.name == "CUDA"]
    device = sum(event.self_device_time_total for event in operations) / 1000
    return {
        "host_milliseconds": 1000 * host,
        "device_milliseconds": device / TRACED_STEPS,
        "operations": len(operations) / TRACED_STEPS,
    }


def _host_seconds(step: Callable[[], object]) -> float:
    """Seconds until `step` returns, starting with an idle GPU: the time to queue work, plus any wait for the GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
