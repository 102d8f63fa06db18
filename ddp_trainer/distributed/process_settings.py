"""Restores what a run changes in its process, because a notebook uses the same process after the run.

The settings of glibc's allocator (`host_memory`) are not restored, because their previous values cannot be read.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState

from data_prep.errors import require
from ddp_trainer.distributed.home import writable_home

_in_use = threading.RLock()  # re-entrant, because an observer may evaluate another run


@contextlib.contextmanager
def restored_settings() -> Iterator[None]:
    """After the block, restores torch's settings and random generators, Accelerate's state, and the environment.

    Raises InputError if another thread of this process is in such a block, because all threads share these settings.
    """
    require(
        _in_use.acquire(blocking=False),
        "another thread of this process is training or evaluating; "
        "wait until it has finished, or train in new processes with ddp_trainer.launch",
    )
    try:
        with _restored_environment(), writable_home(), _restored_torch(), _own_accelerate_state():
            yield
    finally:
        _in_use.release()


def require_usual_modes() -> None:
    """Raises InputError if the caller of a run has set a mode of torch in which the run would not train correctly.

    For example, torch.autocast keeps converted copies of the weights until its outermost block ends, so a run inside
    such a block would never use its new weights.
    """
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    changed = {
        "torch.autocast": any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")),
        "torch.no_grad or torch.inference_mode": not torch.is_grad_enabled(),
        f"the default device {device}": device.type != "cpu",
        f"the default type {dtype}": dtype != torch.float32,
    }
    found = " and ".join(name for name, is_changed in changed.items() if is_changed)
    require(not found, f"the run does not work with {found}, which your program has set; reset it before the run")


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
    # If torch.compile was not used before, its limit is torch's default. Reading it would take seconds.
    recompile_limit = torch.compiler.config.recompile_limit if "torch._dynamo" in sys.modules else 8
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
            if "torch._dynamo" in sys.modules:
                torch.compiler.config.recompile_limit = recompile_limit
            now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
            if now != (deterministic, warn_only):  # the next call takes seconds
                torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextlib.contextmanager
def _own_accelerate_state() -> Iterator[None]:
    """Within the block, Accelerate's global state, such as device and precision, is that of this run."""
    holders = (PartialState, AcceleratorState, GradientState)
    before, joined_before = [dict(holder._shared_state) for holder in holders], dist.is_initialized()
    for holder in holders:
        holder._shared_state.clear()
    try:
        yield
    finally:
        if dist.is_initialized() == joined_before:  # otherwise, the run has failed and the process is about to end
            for holder, state in zip(holders, before, strict=True):
                holder._shared_state.clear()
                holder._shared_state.update(state)
