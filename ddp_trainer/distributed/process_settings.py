"""Restores what a run changes in its process, because a notebook uses the same process after the run.

The settings of glibc's allocator (`host_memory`) are not restored, because their previous values cannot be read.
"""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState

from ddp_trainer.distributed.home import writable_home


@contextlib.contextmanager
def restored_settings() -> Iterator[None]:
    """After the block, restores torch's settings and random generators, Accelerate's state, and the environment."""
    with _restored_environment(), writable_home(), _restored_torch(), _own_accelerate_state():
        yield


@contextlib.contextmanager
def _restored_environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


def _matmul_precision() -> str:
    """torch's setting for float32 matrix products, even if it was set by the newer `fp32_precision`.

    In that case, torch's own function may raise an exception.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        on_cpu = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
        return "medium" if on_cpu == "bf16" else "high"


def _cudnn_allows_tf32() -> bool:
    """See `_matmul_precision`."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


@contextlib.contextmanager
def _restored_torch() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), _matmul_precision()
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    allow_tf32 = _cudnn_allows_tf32()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                # Setting a stream of another GPU would create a context there.
                if stream is None or stream.device_index != torch.cuda.current_device():
                    stream = torch.cuda.default_stream()
                torch.cuda.set_stream(stream)
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, allow_tf32
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            if torch.are_deterministic_algorithms_enabled() != deterministic:  # the next call takes seconds
                torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextlib.contextmanager
def _own_accelerate_state() -> Iterator[None]:
    """Within the block, Accelerate's global state, such as device and precision, is that of this run."""
    holders = (PartialState, AcceleratorState, GradientState)
    before = [dict(holder._shared_state) for holder in holders]
    for holder in holders:
        holder._shared_state.clear()
    try:
        yield
    finally:
        if not dist.is_initialized():  # otherwise, the run has failed and the process is about to end
            for holder, state in zip(holders, before, strict=True):
                holder._shared_state.clear()
                holder._shared_state.update(state)
