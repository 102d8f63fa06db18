"""Checks that the settings fit the dataset, the processes and this machine, before anything is written or started."""

import os
import shutil
import sysconfig
from pathlib import Path

from data_prep.dataset import DatasetInfo
from data_prep.errors import printable, require
from ddp_trainer.config import TrainConfig
from ddp_trainer.tracking.wandb_service import mode_from_environment

SMALLEST_SIDE = 8  # pixels; the built-in network halves the side three times


def check_settings(config: TrainConfig, dataset: DatasetInfo, *, world_size: int) -> int:
    """Checks the settings, and returns the number of training images that are not held out.

    Raises InputError if the settings do not fit the dataset, the number of processes or this machine.
    """
    for flag, path in (("data-dir", config.data.data_dir.resolve()), ("init-from", config.network.init_from)):
        # config.json contains these paths. It could not be read again if a path were not valid text.
        valid = path is None or str(path) == printable(str(path))
        require(valid, f"--{flag} must be valid text without control characters, got {str(path)!a}")
    require(
        len(dataset.classes) > 1,
        f"{config.data.data_dir} has only one class, but training needs at least two; prepare a dataset with more",
    )
    total, held_out = dataset.splits["train"].count, config.data.held_out
    most = total - len(dataset.classes)
    require(
        most >= 0,
        f"{config.data.data_dir} has {len(dataset.classes):,} classes, but only {total:,} training images; add "
        "training images for every class, or leave out classes, and prepare the data again",
    )
    require(
        held_out <= most,
        f"--validation and --calibrate must leave one training image per class: hold out at most {most} of {total}, "
        f"got {held_out}",
    )
    _check_sides(config, dataset.image_size)
    require(
        not config.runtime.compile or can_compile(),
        "--compile needs a C++ compiler and Python's headers, and one of them is missing; leave out --compile, or "
        f"install them as root: apt-get install g++ python{sysconfig.get_python_version()}-dev",
    )
    num_images = total - held_out
    check_batch(config, num_images=num_images, world_size=world_size)
    if config.tracking.uses_wandb and config.tracking.wandb == "auto":
        mode_from_environment()  # raises InputError if WANDB_MODE is not a mode of W&B
    return num_images


def can_compile() -> bool:
    """Whether this machine has what torch.compile needs: a C++ compiler ($CXX or g++) and Python.h."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    return shutil.which(os.environ.get("CXX", "g++")) is not None and header.exists()


def _check_sides(config: TrainConfig, image_size: int) -> None:
    """Raises InputError if crops, padding or cutout do not fit images of `image_size` pixels a side."""
    train_size, padded = config.schedule.train_size or image_size, config.augment.crop == "padded"
    require(
        train_size <= image_size,
        f"--train-size must be at most the side of the images, {image_size} pixels, got {train_size}; "
        "prepare larger images",
    )
    require(
        config.schedule.train_size is None or train_size >= SMALLEST_SIDE,
        f"--train-size must be at least {SMALLEST_SIDE}, got {train_size}",
    )
    smallest = min(config.schedule.crop_sides(image_size))
    require(
        all(side < train_size for side, _ in config.schedule.crop_phases),
        f"--small-crops {config.schedule.small_crops}: small crops must be smaller than the other crops, which have "
        f"{train_size} pixels a side",
    )
    for flag, pixels, side in (
        ("crop-padding", config.augment.crop_padding if padded else 0, image_size),
        ("cutout", config.augment.cutout, smallest),
    ):
        what = "images" if side == image_size else "smallest crops"
        require(pixels < side, f"--{flag} must be below the side of the {what}, {side} pixels, got {pixels}")
    require(
        smallest >= SMALLEST_SIDE,
        f"--small-crops {config.schedule.small_crops}: the network needs crops of at least {SMALLEST_SIDE} pixels a "
        f"side, got {smallest}",
    )


def check_batch(config: TrainConfig, *, num_images: int, world_size: int) -> None:
    """Raises InputError if --batch-size or --profile does not fit the other settings.

    A batch must have enough images for all processes, but not more than the training set. With --mixup or --cutmix, it
    must be even. --profile must be below the number of steps of the run.
    """
    batch, accumulate, pairs = config.schedule.batch_size, config.schedule.accumulate, config.augment.mixes_pairs
    accumulate = 1 if accumulate == "auto" else accumulate
    require(not pairs or batch % 2 == 0, f"--mixup and --cutmix need an even --batch-size, got {batch}")
    least = accumulate + accumulate % 2 if pairs else accumulate  # number of images that each process needs
    require(
        batch >= least * world_size,
        f"--batch-size must be at least {least * world_size} for {world_size} processes x --accumulate {accumulate}, "
        f"got {batch}",
    )
    require(
        num_images >= batch,
        f"--batch-size must be at most the number of training images, {num_images}, got {batch}",
    )
    steps = config.schedule.last_step(num_images)
    require(
        config.run.profile < steps,
        f"--profile must be below {steps}, the number of steps of the run, got {config.run.profile}",
    )
