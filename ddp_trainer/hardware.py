"""What this machine and this launch allow: number of processes, device, precision. Starts nothing.

torch, which takes seconds to import, is asked about GPUs only.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import InputError, require
from ddp_trainer.config import RuntimeConfig, TrainConfig

if TYPE_CHECKING:
    from data_prep.dataset import DatasetInfo


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 itself; emulated, it would be slower than fp32."""
    flags = _cpu_info().split()
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))


def cpu_name() -> str:
    names = [line.split(":", 1)[1].strip() for line in _cpu_info().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {len(os.sched_getaffinity(0))} cores"


def launch_environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) as the launcher set them, before any process group exists."""
    rank, local_rank, world_size = (os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return int(rank or 0), int(local_rank or 0), int(world_size or 1)


def check_launch(config: RuntimeConfig) -> None:
    """InputError where this process was launched as one of several and finds itself alone.

    `accelerate launch --cpu --num_processes 2` starts a single process; what tells it from an honest single one is that
    Accelerate's launcher sets an address to meet at, but no world size.
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
        require(processes <= gpus, f"{processes} processes were launched on this machine, which has {gpus} GPUs: "
                                   "lower --num_processes, or train on the CPU by --device cpu")  # fmt: skip


def check_dataset(config: TrainConfig, dataset: "DatasetInfo") -> int:
    """How many images there are to train on. Raises InputError where the settings do not fit the dataset."""
    held_out, size, total = config.data.validation, dataset.image_size, dataset.splits["train"].count
    require(held_out < total, f"--validation {held_out}: there are {total} training images; leave some to train on")
    augment, smallest = config.augment, min(config.schedule.crop_sides(size))
    seen = "images" if smallest == size else "first crops"
    for flag, pixels, what, side in (
        ("crop-padding", augment.crop_padding, "images", size),
        ("cutout", augment.cutout, seen, smallest),
    ):
        require(pixels < side, f"--{flag} {pixels}: the {what} have {side} pixels a side; give at most {side - 1}")
    require(
        smallest >= 8,  # three poolings halve it
        f"--small-crop-fraction {config.schedule.small_crop_fraction}: the first crops have {smallest} pixels a side, "
        "and the network takes 8 at least; give 0, or prepare larger images",
    )
    images_of_a_part = check_batch(config, num_images=total - held_out)
    require(
        images_of_a_part > 1 or smallest >= 16 or (config.runtime.sync_bn and launch_environment()[2] > 1),
        f"--batch-size {config.schedule.batch_size} leaves each part a single image of {smallest} pixels a side, and "
        "BatchNorm one value per channel in the last layers: raise it, or prepare larger images",
    )
    return total - held_out


def check_batch(config: TrainConfig, *, num_images: int) -> int:
    """How many images of the global batch pass through the network at a time, on each process.

    Raises InputError unless the batch can be shared out evenly and filled often enough, for --profile too.
    """
    batch, world = config.schedule.batch_size, launch_environment()[2]
    parts = world * config.schedule.accumulate
    require(
        batch % parts == 0,
        f"--batch-size {batch} is not divisible by {world} processes x --accumulate {config.schedule.accumulate}: "
        f"use {max(batch // parts, 1) * parts}",
    )
    require(
        not config.augment.mixes_pairs or batch // parts % 2 == 0,
        f"--mixup and --cutmix pair images: --batch-size {batch} gives each of {parts} parts an odd number of them",
    )
    require(
        config.schedule.candidates == 1 or not config.augment.mixes_pairs,
        "--candidates chooses single images, and --mixup and --cutmix make one of two: leave out one or the other",
    )
    each = f" with --candidates {config.schedule.candidates}" if config.schedule.candidates > 1 else ""
    require(
        num_images >= config.schedule.candidates_per_step,
        f"--batch-size {batch}{each} is more than the {num_images} training images: lower it",
    )
    steps = config.schedule.last_step(num_images)
    require(
        config.run.profile < steps,
        f"--profile {config.run.profile}: the run has {steps} steps, the first of which warms up; "
        f"give at most {steps - 1}",
    )
    return batch // parts


def check_machine(config: RuntimeConfig) -> None:
    """Raises InputError where launch, device or precision cannot be what was asked for. Starts nothing."""
    check_launch(config)
    resolve_precision(config)


def resolve_device(config: RuntimeConfig) -> str:
    if config.device == "cpu":
        return "cpu"
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on"):
        require(config.device == "auto", "--device cuda: Accelerate was told to use the CPU, by --cpu or by use_cpu in "
                                         "its configuration; leave that out, or take --device cpu")  # fmt: skip
        return "cpu"
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no usable GPU here; use --device cpu, or check the driver")
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_precision(config: RuntimeConfig) -> str:
    """fp32, bf16 or fp16. Raises InputError for fp16 on a CPU, which has no gradient scaling there."""
    on_cuda = resolve_device(config) == "cuda"
    if config.precision == "fp16" and not on_cuda:
        raise InputError("--precision fp16 works on CUDA only; use --precision bf16 or fp32 on the CPU")
    if config.precision != "auto":
        return config.precision
    if on_cuda:
        import torch

        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"
