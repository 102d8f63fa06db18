"""Keeps Accelerate's own environment variables from changing the weights.

`accelerate launch` sets these variables from its flags and from the file that `accelerate config` wrote. But a run's
config.json must record everything that its weights depend on. So it is an error if a variable asks for FSDP, gradient
accumulation or anything else beyond plain DDP. All of these variables, except those in SPEED_ONLY, are hidden from
Accelerate, so a precision that one of them sets has no effect.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping

from data_prep.errors import InputError, require
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.hardware import TRUE

PREFIXES = ("ACCELERATE_", "FORK_LAUNCHED", "FSDP_", "MEGATRON_LM_", "MPI_", "MV2_", "OMPI_", "PARALLELISM_", "PMI_")
SPEED_ONLY = ("ACCELERATE_CPU_AFFINITY",)
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
THREADS = "OMP_NUM_THREADS"  # if it is not set, Accelerate chooses a number of threads and warns


def check_accelerate_settings(config: RuntimeConfig) -> None:
    """Raises InputError if one of Accelerate's variables asks for more than plain DDP, or names a device."""
    for name in sorted(os.environ):
        if name.startswith("ACCELERATE_USE_") and name != "ACCELERATE_USE_CPU" and os.environ[name].lower() in TRUE:
            feature = name.removeprefix("ACCELERATE_USE_")
            raise InputError(
                f"your Accelerate configuration asks for {feature} ({name}={os.environ[name]}), but this trainer uses "
                "plain DDP: use one of launch/*.yaml with --config_file, or unset the variable"
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    require(
        backend in ("", "no") or config.compile,
        f"your Accelerate configuration compiles the model (dynamo_backend {backend}): pass --compile to the trainer "
        "instead, and --dynamo_backend=no to the launcher",
    )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or "1"
    require(
        steps == "1",
        f"your Accelerate configuration accumulates gradients (ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps}): "
        "unset this variable, and pass --accumulate to the trainer instead",
    )
    device = os.environ.get("ACCELERATE_TORCH_DEVICE")
    require(not device, f"ACCELERATE_TORCH_DEVICE={device} names a device: unset it, and pass --device instead")


@contextlib.contextmanager
def environment_of(launch: Mapping[str, str]) -> Iterator[None]:
    """Within the block, sets the variables in `launch`, and hides Accelerate's own settings except SPEED_ONLY."""
    hidden = {name: value for name, value in os.environ.items() if _is_hidden(name)}
    try:
        for name in hidden:
            del os.environ[name]
        os.environ.update({THREADS: "1", **launch})
        yield
    finally:
        for name in (THREADS, *LAUNCH):
            os.environ.pop(name, None)
        os.environ.update(hidden)


def _is_hidden(name: str) -> bool:
    return name in (THREADS, *LAUNCH) or (name.startswith(PREFIXES) and name not in SPEED_ONLY)
