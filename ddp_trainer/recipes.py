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


def _fast(*, epochs: int, augment: AugmentConfig) -> TrainConfig:
    """What `fast`, `strong` and `long` share: airbench94_muon (github.com/KellerJordan/cifar10-airbench) carried over.

    Its learning rates are for losses summed over the batch; here losses are averaged, so those of SGD are 1000 times as
    large. The head's also allows for the logits' scale, there one over the number of features: 670 * 8^2 / 512^2. Other
    than there, BatchNorm's biases are not decayed, and the head starts as torch draws it. The activation is Page's for
    this network.
    """
    return TrainConfig(
        augment=augment,
        network=NetworkConfig(
            activation="celu", whiten_stem=True, dirac_init=True, freeze_bn_scale=True, bn_momentum=0.4
        ),
        schedule=ScheduleConfig(epochs=epochs, batch_size=1000, warmup_fraction=0.0, final_lr_fraction=0.02),
        optim=OptimConfig(
            optimizer="muon", peak_lr=0.24, head_lr=0.16, bias_lr=53.0, weight_decay=3e-3, label_smoothing=0.2
        ),
    )


def fast() -> TrainConfig:
    """For few operations: 5 epochs of CIFAR-10 (0.57 PFLOP) with Muon and a whitened stem.

    Command: accelerate launch -m ddp_trainer.train fast
    Accuracy: 90.51 % (standard deviation 0.30), 91.15 % (0.22) with test-time augmentation (n = 3, CIFAR-10 as JPEG
    files of quality 75, 5,000 test images; 2 CPU cores in fp32, 70 to 84 minutes).
    """
    augment = AugmentConfig(crop_padding=2, padding_mode="reflect", flip="alternating")
    return replace(_fast(epochs=5, augment=augment), recipe="fast")


def strong() -> TrainConfig:
    """For more accuracy: 8 epochs (0.91 PFLOP) by the means of `fast`.

    Command: accelerate launch -m ddp_trainer.train strong
    Accuracy: 91.26 %, 91.94 % with test-time augmentation (n = 1, images and hardware as for `fast`).
    """
    augment = AugmentConfig(crop_padding=2, padding_mode="reflect", flip="alternating")
    return replace(_fast(epochs=8, augment=augment), recipe="strong")


def long() -> TrainConfig:
    """For GPUs: 50 epochs (5.7 PFLOP) with Muon, wide crops and 12x12 cutout.

    Command: accelerate launch -m ddp_trainer.train long
    Accuracy: not measured in full. Shortened to 2 epochs (0.23 PFLOP): 83.34 %, 84.32 % with test-time augmentation
    (n = 1, images and hardware as for `fast`).
    """
    augment = AugmentConfig(crop_padding=4, padding_mode="reflect", flip="alternating", cutout=12)
    return replace(_fast(epochs=50, augment=augment), recipe="long")


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
    return (recipe.__doc__ or "").splitlines()[0]


_ALL = (baseline, fast, strong, long, smoke, demo)
RECIPES: dict[str, TrainConfig] = {recipe.__name__: recipe() for recipe in _ALL}


def describe_recipes() -> str:
    """The list of recipes that `--help` shows."""
    lines = [f"  {recipe.__name__:10} {_first_line(recipe)}" for recipe in _ALL]
    return "Train the custom ResNet. Recipes (default: baseline):\n\n" + "\n".join(lines)
