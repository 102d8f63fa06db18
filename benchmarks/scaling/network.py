"""A network so cheap that loading and augmentation take up almost the whole time of an epoch.

Use it with `--network benchmarks.scaling.network:cheap`.
"""

from torch import nn


def cheap(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, kernel_size=8, stride=8, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )
