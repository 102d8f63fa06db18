"""Who this process is among those that were launched, as the launcher's environment variables say.

Owned here: rank, local rank, world size, and whether they can be right. Starts nothing. Not owned here: the process
group (`runtime`).
"""

import os
from typing import NamedTuple

from data_prep.errors import InputError, require
from ddp_trainer.config import RuntimeConfig
from ddp_trainer.distributed.hardware import resolve_device, resolve_precision


class Launch(NamedTuple):
    """A process among `world_size`, of which some share its machine."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Launch":
        rank, local_rank, world_size = (os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        return cls(int(rank or 0), int(local_rank or 0), int(world_size or 1))

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def check_machine(config: RuntimeConfig) -> None:
    """Raises InputError if this launch, device or precision cannot be what the settings ask for."""
    _check_launch(config)
    resolve_precision(config)


def _check_launch(config: RuntimeConfig) -> None:
    """Raises InputError if this process was launched as one of several and finds itself alone.

    `accelerate launch --cpu --num_processes 2` starts a single process. It differs from a real single process in
    one way: Accelerate's launcher sets an address to meet at, but no world size.
    """
    alone = "WORLD_SIZE" not in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ
    if alone and "MASTER_ADDR" in os.environ:
        raise InputError(
            "launched for several processes, but this one is alone (--cpu and MULTI_CPU make Accelerate start one): "
            "use accelerate launch --multi_gpu --num_processes N ... --device cpu, or unset MASTER_ADDR for one process"
        )
    if resolve_device(config) == "cuda":
        import torch

        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE") or 1), torch.cuda.device_count()
        require(
            processes <= gpus,
            f"{processes} processes were launched on this machine, which has {gpus} GPUs: "
            "lower --num_processes, or train on the CPU with --device cpu",
        )
