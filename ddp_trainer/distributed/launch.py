"""Reads rank, local rank and world size from the launcher's environment variables, and checks that they are consistent.

`runtime` creates the process group.
"""

import os
from typing import NamedTuple

from data_prep.errors import InputError, require
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.accelerate_settings import check_accelerate_settings
from ddp_trainer.distributed.hardware import resolve_device, resolve_precision

# Variables that mpirun and srun --mpi set, and that Accelerate reads if it runs on CPUs.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")

# Flags of `accelerate launch` for one machine. With --multi_gpu and --num_processes, they override the file that
# `accelerate config` wrote, unless that file is for SageMaker.
ONE_MACHINE = (
    *("--num_machines", "1", "--gpu_ids", "all", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--main_process_port", "0"),
)


class Launch(NamedTuple):
    """The rank of this process among `world_size` processes, of which `local_world_size` run on this machine."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Launch":
        """Reads the launcher's variables. Raises InputError if they are not numbers or contradict each other."""
        world_size = _number("WORLD_SIZE", least=1)
        rank, local_rank = _number("RANK"), _number("LOCAL_RANK")
        local_world_size = _number("LOCAL_WORLD_SIZE", least=1)
        if world_size is None or world_size == 1:
            _require_alone(rank=rank, local_rank=local_rank, local_world_size=local_world_size)
            return cls()
        if rank is None:
            raise InputError(f"WORLD_SIZE={world_size} is set, but RANK is not; {_fix('WORLD_SIZE')}")
        launch = cls(rank, local_rank or 0, world_size, local_world_size or 1)
        launch._check()
        return launch

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def meeting_point(self) -> str:
        """Address at which the processes meet, as HOST:PORT."""
        return f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"

    def variables(self) -> dict[str, str]:
        """The launcher's environment variables for this process; empty for a single process."""
        if self.world_size == 1:
            return {}
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
        }

    def _check(self) -> None:
        for small, number, large, limit in (
            ("RANK", self.rank, "WORLD_SIZE", self.world_size),
            ("LOCAL_RANK", self.local_rank, "LOCAL_WORLD_SIZE", self.local_world_size),
        ):
            require(number < limit, f"{small} must be below {large}, got {small}={number} and {large}={limit}")
        require(
            self.local_world_size <= self.world_size,
            f"LOCAL_WORLD_SIZE must be at most WORLD_SIZE, got {self.local_world_size} and {self.world_size}",
        )
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            problem = f"WORLD_SIZE={self.world_size} is set, but {name}, where the processes meet, is not"
            require(bool(os.environ.get(name)), f"{problem}; {_fix('WORLD_SIZE')}")
        port = _number("MASTER_PORT", least=1)
        require(port is not None and port < 65536, f"MASTER_PORT must be in [1, 65535], got {port}")


def prints_errors() -> bool:
    """True in the first process of each machine, which prints the errors that every process finds."""
    try:
        return Launch.from_environment().local_rank == 0
    except InputError:
        return True


def check_machine(config: RuntimeConfig) -> Launch:
    """How this process was launched. Raises InputError if the settings do not fit this machine or that launch."""
    launch = Launch.from_environment()
    _check_launch(launch, config)
    check_accelerate_settings(config)
    resolve_precision(config)
    return launch


def _number(name: str, *, least: int = 0) -> int | None:
    """The environment variable `name` as a number of at least `least`; None if it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or number < least:
        raise InputError(f"the environment variable {name} must be a number of at least {least}, got {text!r}")
    return number


def _require_alone(**others: int | None) -> None:
    """Raises InputError if a variable says that there are several processes, although WORLD_SIZE does not."""
    for name, number in others.items():
        if number is not None and number > (name == "local_world_size"):
            found = f"WORLD_SIZE is {os.environ.get('WORLD_SIZE', 'not set')}"
            name = name.upper()
            raise InputError(f"{name}={number} is set, but this process is alone ({found}); {_fix(name)}")
    for name in MPI_SIZES if "WORLD_SIZE" not in os.environ else ():
        size = _number(name)
        require(
            size is None or size <= 1,
            f"{size} processes were started ({name}={size}), but WORLD_SIZE is not set: use accelerate launch instead",
        )


def _fix(name: str) -> str:
    return f"unset {name} to train with one process, or use accelerate launch for several"


def _check_launch(launch: Launch, config: RuntimeConfig) -> None:
    """Raises InputError if this process was launched as one of several but is alone, or if there are too few GPUs.

    `accelerate launch --cpu --num_processes 2` starts only one process. This mistake can be recognized because the
    launcher sets MASTER_ADDR but not WORLD_SIZE.
    """
    alone = "WORLD_SIZE" not in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ
    if alone and "MASTER_ADDR" in os.environ:
        raise InputError(
            "launched for several processes, but only one was started "
            "(with --cpu or MULTI_CPU, Accelerate starts only one): use accelerate launch --multi_gpu --num_processes "
            "N ... --device cpu, or unset MASTER_ADDR to train with one process"
        )
    if resolve_device(config) == "cuda":
        import torch

        gpus = torch.cuda.device_count()
        require(
            launch.local_world_size <= gpus,
            f"{launch.local_world_size} processes were launched on this machine, which has {gpus} GPUs: "
            "lower --num_processes, or train on the CPU with --device cpu",
        )
