"""Runs a network on blank images without lasting effects, to check it or to count its operations."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def blank_passes(model: nn.Module) -> Iterator[None]:
    """After forward and backward passes in the block, removes the gradients and restores the buffers."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
