"""Passes over blank images that leave nothing behind: to warm a network up, or to count its operations."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def blank_passes(model: nn.Module) -> Iterator[None]:
    """Forward and backward passes in the block leave neither gradients nor changed buffers behind."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    model.zero_grad(set_to_none=True)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
