"""Changes torch's own settings: threads, determinism, TF32 and the limit of torch.compile."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from data_prep.errors import InputError
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.hardware import resolve_precision
from ddp_trainer.distributed.launch import Launch
from ddp_trainer.distributed.signals import LAUNCHER_VARIABLES
from ddp_trainer.models.autocast_check import NOT_DETERMINISTIC

# More than the number of input shapes in a run (crop sizes x part sizes, before and after --freeze-late).
COMPILATIONS = 64


def use_share_of_cores(launch: Launch) -> None:
    """Gives each process an equal share of this machine's cores, even if a launcher set OMP_NUM_THREADS.

    A single process therefore uses as many threads under `accelerate launch` as with `python -m`, and computes the
    same floating-point results. A number of threads that the user has set is kept.
    """
    if "OMP_NUM_THREADS" in os.environ:
        is_free = any(name in os.environ for name in LAUNCHER_VARIABLES) and not _given_to_the_launcher()
    else:
        is_free = launch.world_size > 1  # torch itself chooses the number for a single process
    if is_free:
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // launch.local_world_size, 1))


def _given_to_the_launcher() -> bool:
    """Whether the user set the number of threads for the launcher, which is the parent of this process."""
    parent = Path(f"/proc/{os.getppid()}")
    try:
        environment, words = (parent / "environ").read_bytes(), (parent / "cmdline").read_bytes()
    except OSError:
        return False
    in_environment = any(variable.startswith(b"OMP_NUM_THREADS=") for variable in environment.split(b"\0"))
    return in_environment or b"num_cpu_threads_per_process" in words.replace(b"-", b"_")


def set_backend_flags(config: RuntimeConfig) -> None:
    """Sets torch's flags for determinism, TF32 and --compile.

    Only bf16 and fp16 runs without --deterministic may use TF32.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if now != (config.deterministic, False):  # the next call takes seconds
        torch.use_deterministic_algorithms(config.deterministic)
        # By default, deterministic torch also fills each new tensor with NaN. In the recipe `fast`, that takes 38 %
        # more kernels.
        torch.utils.deterministic.fill_uninitialized_memory = not config.deterministic  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not config.deterministic
    allow_tf32 = resolve_precision(config) != "fp32" and not config.deterministic
    torch.set_float32_matmul_precision("high" if allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = allow_tf32
    if config.compile:
        # After 8 compilations (torch's default), new shapes would run uncompiled. Which shapes these are would depend
        # on where the run was resumed, and so would the last digits of its results.
        torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, COMPILATIONS)


@contextlib.contextmanager
def explained_determinism() -> Iterator[None]:
    """Raises InputError if an operation in the block fails because it is not deterministic."""
    try:
        yield
    except RuntimeError as error:
        if NOT_DETERMINISTIC not in str(error):
            raise
        raise InputError(f"--deterministic: {str(error).partition(', but')[0]}; leave out --deterministic") from error
