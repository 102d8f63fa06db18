"""Named, complete configurations. Each docstring gives the command and, if measured, the result, hardware and time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data_prep.augment_config import AugmentConfig
from ddp_trainer.config import DataConfig, NetworkConfig, OptimConfig, TrackingConfig, TrainConfig
from ddp_trainer.schedule import ScheduleConfig


def baseline() -> TrainConfig:
    """The usual recipe: 24 epochs of CIFAR-10 with SGD, one-cycle learning rate, crop, flip and 8x8 cutout.

    Command:   accelerate launch -m ddp_trainer.train baseline
    Source:    David Page's 24-epoch recipe for this network (github.com/davidcpage/cifar10-fast), with learning rates
               for a loss that is averaged over the batch
    Result:    90.76 %, or 91.60 % with test-time augmentation (n = 1)
    Measured:  on the same images as `fast`, on two CPU cores in bf16
    """
    return TrainConfig(
        recipe="baseline",
        augment=AugmentConfig(crop_padding=4, flip="random", cutout=8),
        schedule=ScheduleConfig(epochs=24, batch_size=512, warmup_fraction=5 / 24),
        optim=OptimConfig(optimizer="sgd", peak_lr=0.4, weight_decay=5e-4),
    )


FIRST_BLOCKS = "features.0.*,features.1.*,features.2.*"  # parameters of custom_resnet that `fast` freezes late


def _muon(*, epochs: float, small_crops: str) -> TrainConfig:
    """The settings that `fast`, `strong` and `long` share, adapted from airbench94_muon.

    airbench94_muon (github.com/KellerJordan/cifar10-airbench) sums the loss over a batch. Here the loss is averaged
    over 500 images, so the learning rates of SGD are 500 times as large. The head's rate also accounts for the scale of
    the logits. airbench divides the logits by the number of features, while `custom_resnet` divides them by 8. With the
    512 features of `custom_resnet`, airbench's rate of 0.67 for the head becomes 0.67 * 500 * 8^2 / 512^2. `fast` uses
    the same rate, although its network has only 384 features. A batch has 500 images (in `long`, 512) instead of
    airbench's 2,000, and the learning rate of Muon is lower than airbench's by a factor of sqrt(2).

    Unlike in airbench, the biases of BatchNorm are not decayed, and all weights start from torch's default
    initialization: a whitened stem and dirac initialization did not improve this network. CELU is David Page's
    choice for this network (see `baseline`).
    """
    return TrainConfig(
        augment=AugmentConfig(crop_padding=2, flip="alternating"),
        network=NetworkConfig(activation="celu", freeze_bn_scale=True, bn_momentum=0.4),
        schedule=ScheduleConfig(
            epochs=epochs, batch_size=500, warmup_fraction=0.0, final_lr_fraction=0.02, small_crops=small_crops
        ),
        optim=OptimConfig(
            optimizer="muon", peak_lr=0.17, head_lr=0.08, bias_lr=26.5, weight_decay=3e-3, label_smoothing=0.2
        ),
    )


def fast() -> TrainConfig:
    """Few operations: 11 epochs of CIFAR-10 (0.38 PFLOP) with Muon and a narrow network, small crops first.

    Command:   accelerate launch -m ddp_trainer.train fast
    Result:    90.11 % (standard deviation 0.51), or 91.20 % (0.06) with test-time augmentation (n = 3)
    Measured:  CIFAR-10 as JPEG files of quality 75, 5,000 test images
    Hardware:  two CPU cores in bf16
    Time:      31 minutes per run, with three single-threaded runs at once

    For the same number of operations, a network with three quarters of the usual channels sees more images, and so does
    a network that starts with crops of 16 and then 24 pixels. The last three epochs use whole images.
    """
    shared = _muon(epochs=11, small_crops="16:0.286,24:0.714")
    return replace(
        shared,
        recipe="fast",
        network=replace(shared.network, widths=(48, 96, 192, 384)),
        schedule=replace(shared.schedule, freeze_late=FIRST_BLOCKS),
    )


def strong() -> TrainConfig:
    """More accuracy: 12 epochs (0.93 PFLOP) with Muon and the network's usual widths, the first seven on small crops.

    Command:   accelerate launch -m ddp_trainer.train strong
    Result:    91.39 % (standard deviation 0.08), or 92.05 % (0.09) with test-time augmentation (n = 3)
    Measured:  on the same images and hardware as `fast`
    """
    return replace(_muon(epochs=12, small_crops="16:0.25,24:0.583"), recipe="strong")


def long() -> TrainConfig:
    """For GPUs: 50 epochs (5.7 PFLOP) with Muon, wider padding and 12x12 cutout, in batches that 16 GPUs can share.

    Command:   accelerate launch -m ddp_trainer.train long
    Result:    91.92 %, or 92.48 % with test-time augmentation (n = 1)
    Measured:  on the same images and hardware as `fast`, with two processes
    """
    shared = _muon(epochs=50, small_crops="")
    return replace(
        shared,
        recipe="long",
        augment=replace(shared.augment, crop_padding=4, cutout=12),
        schedule=replace(shared.schedule, batch_size=512),
    )


def finetune() -> TrainConfig:
    """For --init-from: 5 epochs at a low learning rate, which is ten times as high for the last linear layer.

    Command:   python -m ddp_trainer.train finetune --init-from RUN --data-dir data/photos
    Result:    not measured

    Add the `--network` that the weights belong to, and `--freeze PATTERN` for parameters that must not change.
    """
    return TrainConfig(
        recipe="finetune",
        augment=AugmentConfig(crop_padding=2, flip="random"),
        schedule=ScheduleConfig(epochs=5, batch_size=64, warmup_fraction=0.2),
        optim=OptimConfig(peak_lr=0.01, head_lr=0.1, weight_decay=5e-4),
    )


def photos() -> TrainConfig:
    """Photographs: 16 epochs of ResNet-18 on random areas of each image, resized to 224 pixels.

    Command:   accelerate launch -m ddp_trainer.train photos --data-dir data/photos
    Source:    the settings for ResNet-18 in github.com/libffcv/ffcv-imagenet (learning rate 0.5 for 256 images, label
               smoothing 0.1, 16 epochs), with larger random areas and a one-cycle schedule
    Result:    not measured

    Prepare the images with `--size 256`. To start from trained weights, add `--init-from FILE --peak-lr 0.05`. Any
    other `--network` works, too. At 224 pixels, the built-in network takes ten times as many operations as ResNet-18.
    """
    return TrainConfig(
        recipe="photos",
        data=DataConfig(data_dir=Path("data/photos")),
        augment=AugmentConfig(crop="random-resized", crop_scale=(0.35, 1.0), flip="random"),
        network=NetworkConfig(network="torchvision:resnet18"),
        schedule=ScheduleConfig(epochs=16, batch_size=256, warmup_fraction=0.125, train_size=224),
        optim=OptimConfig(peak_lr=0.5, weight_decay=5e-5, label_smoothing=0.1),
    )


def smoke() -> TrainConfig:
    """A test of the installation: 6 steps, an evaluation and a report, in seconds on a CPU, without W&B.

    Command:   python -m ddp_trainer.train smoke --data-dir data/synthetic
    Result:    the accuracy is meaningless
    """
    return TrainConfig(
        recipe="smoke",
        data=DataConfig(data_dir=Path("data/synthetic")),
        augment=AugmentConfig(crop_padding=2, flip="random", cutout=4),
        schedule=ScheduleConfig(epochs=2, batch_size=32, max_steps=6),
        optim=OptimConfig(peak_lr=0.1),
        tracking=TrackingConfig(wandb="disabled"),
    )


def demo() -> TrainConfig:
    """The run of `make demo`: 3 epochs on synthetic images, in minutes on a CPU.

    Command:   python -m ddp_trainer.train demo
    """
    return TrainConfig(
        recipe="demo",
        data=DataConfig(data_dir=Path("data/synthetic")),
        augment=AugmentConfig(crop_padding=2, flip="random"),
        schedule=ScheduleConfig(epochs=3, batch_size=64, warmup_fraction=0.25),
        optim=OptimConfig(peak_lr=0.2, weight_decay=5e-4),
    )


def _first_line(recipe: Callable[[], TrainConfig]) -> str:
    return (recipe.__doc__ or "").partition("\n")[0]  # python -OO removes docstrings


_ALL = (baseline, fast, strong, long, finetune, photos, smoke, demo)
RECIPES: dict[str, TrainConfig] = {recipe.__name__: recipe() for recipe in _ALL}


def describe_recipes() -> str:
    """The text that `--help` shows above the flags, with the first line of each recipe."""
    lines = [f"  {recipe.__name__:10} {_first_line(recipe)}" for recipe in _ALL]
    return "Train an image classifier. Recipes (default: baseline):\n\n" + "\n".join(lines)
