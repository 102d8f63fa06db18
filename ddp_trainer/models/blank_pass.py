"""Makes blank images for trial passes (forward and backward), and undoes what the passes change in a model."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def blank_passes(model: nn.Module) -> Iterator[None]:
    """When the block ends, removes all gradients of `model`, and restores its buffers and its training mode."""
    before, was_training = [(buffer, buffer.clone()) for buffer in model.buffers()], model.training
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        for buffer, value in before:
            buffer.copy_(value)


def blank_images(model: nn.Module, count: int, side: int) -> Tensor:
    """(count, 3, side, side) zeros in channels_last format, with the dtype and device of the weights."""
    weights = next(model.parameters())
    return torch.zeros(count, side, side, 3, dtype=weights.dtype, device=weights.device).permute(0, 3, 1, 2)
