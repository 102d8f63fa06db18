"""Copies device values to the host in the background, so that no step waits for the device."""

import math

import torch
from torch import Tensor

from ddp_trainer.distributed.device_wait import wait_for


class PendingValues:
    """A host copy of a small device tensor, queued behind the kernels launched so far. Only `read` waits for it."""

    def __init__(self, values: Tensor) -> None:
        on_gpu = values.is_cuda
        self._values = torch.empty_like(values, device="cpu", pin_memory=on_gpu).copy_(values, non_blocking=True)
        self._event = torch.cuda.Event() if on_gpu else None
        if self._event is not None:
            self._event.record()

    def read(self, *, timeout: float = math.inf) -> Tensor:
        """The values. Raises TimeoutError if the device does not finish the copy within `timeout` seconds."""
        if self._event is not None:
            wait_for(self._event, seconds=timeout)
        return self._values
