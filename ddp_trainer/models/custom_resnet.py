"""The built-in ResNet.

Its structure (conv-pool-BN-activation blocks, two residual blocks) follows David Page's ResNet-9 in "How to train your
ResNet" (github.com/davidcpage/cifar10-fast). With ten classes and the default widths, it has 6,573,130 parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from ddp_trainer.config import DEFAULT_WIDTHS
from ddp_trainer.models.small_map_conv import Conv3x3

# The inputs of the head are the maxima of feature maps, well above 1. Without this factor, the logits would be large,
# too, and the head would diverge at learning rates that suit the convolutions. The value is Page's.
LOGIT_SCALE = 1 / 8

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "gelu": nn.GELU,
    "celu": partial(nn.CELU, alpha=0.3, inplace=True),  # Page's choice for this network, and his alpha
}


class BatchNorm(nn.BatchNorm2d):
    """A BatchNorm2d that does not count its batches. The count is only needed if `momentum` is None."""

    def forward(self, input: Tensor) -> Tensor:
        mean, variance, momentum = self.running_mean, self.running_var, self.momentum or 0.0
        return F.batch_norm(input, mean, variance, self.weight, self.bias, self.training, momentum, self.eps)


class ConvBlock(nn.Sequential):
    """3x3 convolution -> optional 2x2 max-pooling -> BatchNorm -> activation."""

    def __init__(self, in_channels: int, out_channels: int, activation: str, *, pool: bool = False) -> None:
        layers: list[nn.Module] = [Conv3x3(in_channels, out_channels)]
        if pool:
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, BatchNorm(out_channels), ACTIVATIONS[activation]())


class Residual(nn.Module):
    """x + block(block(x)); both blocks keep the number of channels."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            ConvBlock(channels, channels, activation), ConvBlock(channels, channels, activation)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class CustomResNet(nn.Module):
    """(N, 3, H, W) normalized images -> (N, num_classes) logits. H and W must be at least 8.

    The last pooling takes the maximum over the whole remaining map (4x4 for 32x32 images), so larger images work too.
    """

    def __init__(self, num_classes: int = 10, widths: Sequence[int] = DEFAULT_WIDTHS, activation: str = "relu") -> None:
        super().__init__()
        stem, first, second, third = widths
        self.features = nn.Sequential(
            ConvBlock(3, stem, activation),
            ConvBlock(stem, first, activation, pool=True),
            Residual(first, activation),
            ConvBlock(first, second, activation, pool=True),
            ConvBlock(second, third, activation, pool=True),
            Residual(third, activation),
        )
        self.head = nn.Linear(third, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        # Tensor.amax would return the same values, but its gradient is NaN when it is compiled in bf16.
        largest = F.max_pool2d(features, kernel_size=features.shape[2:]).flatten(start_dim=1)
        return self.head(largest) * LOGIT_SCALE
