"""A 3x3 convolution that trains faster on a CPU if the feature maps are small.

oneDNN, which computes torch's convolutions on a CPU, is slow on maps of few pixels, above all when it computes the
gradient of the weights. In bf16, on a CPU with AMX (matrix instructions), one matrix product over all pixels of the
batch takes a quarter of oneDNN's time on 4x4 maps and a tenth on 2x2 maps. The product computes the same sums as the
convolution, in another order.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.nn import functional as F

LARGEST_SIDE = 4  # pixels; on larger maps, the matrix product is slower on some CPUs


class Conv3x3(nn.Conv2d):
    """nn.Conv2d with kernel size 3, padding 1 and no bias: (N, C, H, W) -> (N, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        small = max(input.shape[2:]) <= LARGEST_SIDE and input.device.type == "cpu"
        if small and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _MatrixProduct.apply(input, self.weight)
        return super().forward(input)


class _MatrixProduct(torch.autograd.Function):
    """The convolution as a product of two matrices (im2col): the neighborhoods of all pixels, times the filters."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # casts only under autocast
    def forward(ctx: Any, images: Tensor, filters: Tensor) -> Tensor:
        neighborhoods = _neighborhoods(images)
        ctx.save_for_backward(neighborhoods, filters)
        return _as_images(neighborhoods @ _rows(filters).t(), like=images)

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        neighborhoods, filters = ctx.saved_tensors
        of_images = of_filters = None
        if ctx.needs_input_grad[0]:
            # To get the gradient of the images, the filters are flipped, their input and output channels are
            # swapped, and `gradient` is convolved with the result.
            turned = _rows(filters.flip(2, 3).transpose(0, 1))
            of_images = _as_images(_neighborhoods(gradient) @ turned.t(), like=gradient)
        if ctx.needs_input_grad[1]:  # false if the filters are frozen
            outputs, inputs = filters.shape[:2]
            of_filters = gradient.permute(0, 2, 3, 1).reshape(-1, outputs).t() @ neighborhoods
            of_filters = of_filters.view(outputs, 3, 3, inputs).permute(0, 3, 1, 2)
        return of_images, of_filters


def _neighborhoods(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N * H * W, 9 * C): for each pixel, the 3x3 pixels around it; 0 outside of the image."""
    count, channels, height, width = images.shape
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    result = images.new_empty(count, height, width, 9, channels)
    for tap in range(9):
        top, left = divmod(tap, 3)
        result[:, :, :, tap] = padded[:, top : top + height, left : left + width]
    return result.view(-1, 9 * channels)


def _rows(filters: Tensor) -> Tensor:
    """(out, in, 3, 3) -> (out, 9 * in), in the order of `_neighborhoods`."""
    return filters.permute(0, 2, 3, 1).reshape(len(filters), -1)


def _as_images(rows: Tensor, *, like: Tensor) -> Tensor:
    """(N * H * W, C) -> (N, C, H, W) in NHWC memory order. N, H and W are those of `like`."""
    count, _, height, width = like.shape
    return rows.view(count, height, width, -1).permute(0, 3, 1, 2)
