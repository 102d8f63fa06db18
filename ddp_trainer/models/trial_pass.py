"""Makes images for trial passes (forward and backward), and undoes what the passes change in a model."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def trial_passes(model: nn.Module) -> Iterator[None]:
    """When the block ends, removes all gradients of `model`, and restores its buffers and its training mode."""
    before, was_training = [(buffer, buffer.clone()) for buffer in model.buffers()], model.training
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        for buffer, value in before:
            if buffer.shape != value.shape:  # a buffer with a gradient history cannot be resized
                buffer.resize_(value.shape)
            buffer.copy_(value)


def trial_images(model: nn.Module, count: int, side: int) -> Tensor:
    """(count, 3, side, side) random values in channels_last format, on the device of the weights.

    The values are the same in each call. They are not constant, because some networks fail on a blank image.
    """
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)
    images = torch.randn(count, side, side, 3, generator=generator, dtype=image_dtype(model))
    return images.to(device).permute(0, 3, 1, 2)


def image_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the images that `model` is trained on: float32, unless all its parameters are float64.

    Frozen parameters may have any dtype.
    """
    return torch.float64 if all(value.dtype == torch.float64 for value in model.parameters()) else torch.float32
