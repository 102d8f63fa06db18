"""Named, complete configurations. Each docstring gives the command, and what is known of the accuracy."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data_prep.augment_config import AugmentConfig
from ddp_trainer.config import DataConfig, NetworkConfig, OptimConfig, TrackingConfig, TrainConfig
from ddp_trainer.schedule import ScheduleConfig


def baseline() -> TrainConfig:
    """The classic: 24 epochs of CIFAR-10, OneCycle with its peak at epoch 5, batch 512, crop, flip and 8x8 cutout.

    Command: accelerate launch -m ddp_trainer.train baseline
    After David Page's 24-epoch recipe for this network (github.com/davidcpage/cifar10-fast), in mean-loss units.
    Accuracy: not measured in full. After its first 5 epochs, where its learning rate is highest (0.56 PFLOP): 76.62 %,
    78.36 % with test-time augmentation (n = 1, images and hardware as for `fast`).
    """
    return TrainConfig(
        recipe="baseline",
        augment=AugmentConfig(crop_padding=4, padding_mode="reflect", flip="random", cutout=8),
        schedule=ScheduleConfig(epochs=24, batch_size=512, warmup_fraction=5 / 24),
        optim=OptimConfig(optimizer="sgd", peak_lr=0.4, weight_decay=5e-4),
    )


def _muon(*, epochs: int, small_crops: float) -> TrainConfig:
    """What `fast`, `strong` and `long` share: airbench94_muon (github.com/KellerJordan/cifar10-airbench) carried over.

    Its learning rates are for losses summed over a batch; here losses are averaged over 500 images, so those of SGD are
    500 times as large. The head's also allows for the logits' scale, there one over the number of features: 0.67 * 500
    * 8^2 / 512^2. Batches are a quarter of those there, and Muon's rate is lower by the root of two. Other than there,
    BatchNorm's biases are not decayed, and all weights are learned and start as torch draws them: a whitened stem and
    dirac initialisation brought this network nothing. The activation is Page's for it.
    """
    return TrainConfig(
        augment=AugmentConfig(crop_padding=2, padding_mode="reflect", flip="alternating"),
        network=NetworkConfig(activation="celu", freeze_bn_scale=True, bn_momentum=0.4),
        schedule=ScheduleConfig(
            epochs=epochs, batch_size=500, warmup_fraction=0.0, final_lr_fraction=0.02, small_crop_fraction=small_crops
        ),
        optim=OptimConfig(
            optimizer="muon", peak_lr=0.17, head_lr=0.08, bias_lr=26.5, weight_decay=3e-3, label_smoothing=0.2
        ),
    )


def fast() -> TrainConfig:
    """For few operations: 7 epochs of CIFAR-10 (0.48 PFLOP) with Muon, the first five of them on small crops.

    Command: accelerate launch -m ddp_trainer.train fast
    Accuracy: 89.99 % (standard deviation 0.07), 90.67 % (0.06) with test-time augmentation (n = 3, CIFAR-10 as JPEG
    files of quality 75, 5,000 test images; 2 CPU cores in bf16, 24 minutes).

    Crops of 16, then 24 pixels show the network more images for the same operations; the last two epochs teach it
    whole ones.
    """
    return replace(_muon(epochs=7, small_crops=0.75), recipe="fast")


def strong() -> TrainConfig:
    """For more accuracy: 12 epochs (0.91 PFLOP) by the means of `fast`, seven of them on small crops.

    Command: accelerate launch -m ddp_trainer.train strong
    Accuracy: 91.44 %, 92.06 % with test-time augmentation (n = 1, images and hardware as for `fast`).
    """
    return replace(_muon(epochs=12, small_crops=0.6), recipe="strong")


def long() -> TrainConfig:
    """For GPUs: 50 epochs (5.6 PFLOP) with Muon, wide crops and 12x12 cutout, in batches that 8 or 16 GPUs can share.

    Command: accelerate launch -m ddp_trainer.train long
    Accuracy: not measured in full. Shortened to 2 epochs (0.23 PFLOP): 84.04 %, 85.12 % with test-time augmentation
    (n = 1, images and hardware as for `fast`).
    """
    shared = _muon(epochs=50, small_crops=0.0)
    return replace(
        shared,
        recipe="long",
        augment=replace(shared.augment, crop_padding=4, cutout=12),
        schedule=replace(shared.schedule, batch_size=512),
    )


def smoke() -> TrainConfig:
    """A few steps, from data to report in seconds on a CPU, without W&B; the accuracy means nothing.

    Command: python -m ddp_trainer.train smoke --data-dir data/synthetic
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
    """What `make demo` runs: the real network on the built-in synthetic images, in minutes on a CPU.

    Command: python -m ddp_trainer.train demo
    """
    return TrainConfig(
        recipe="demo",
        data=DataConfig(data_dir=Path("data/synthetic")),
        augment=AugmentConfig(crop_padding=2, flip="random"),
        schedule=ScheduleConfig(epochs=3, batch_size=64, warmup_fraction=0.25),
        optim=OptimConfig(peak_lr=0.2, weight_decay=5e-4),
    )


def _first_line(recipe: Callable[[], TrainConfig]) -> str:
    return (recipe.__doc__ or "").partition("\n")[0]  # python -OO drops docstrings


_ALL = (baseline, fast, strong, long, smoke, demo)
RECIPES: dict[str, TrainConfig] = {recipe.__name__: recipe() for recipe in _ALL}


def describe_recipes() -> str:
    """The list of recipes that `--help` shows."""
    lines = [f"  {recipe.__name__:10} {_first_line(recipe)}" for recipe in _ALL]
    return "Train the custom ResNet. Recipes (default: baseline):\n\n" + "\n".join(lines)
