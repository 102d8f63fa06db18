"""Copies device values to the host in the background, so that no step waits for the device."""

import math
from typing import Any

import torch
from torch import Tensor

from ddp_trainer.distributed.device_wait import wait_for


class HostCopy:
    """A copy of tensors in host memory, which later steps do not change.

    Tensors on a GPU are copied after the kernels launched so far have finished. Only `read` waits for that.
    """

    def __init__(self, values: Any) -> None:
        """`values`: a tensor, or dicts and lists that contain tensors, at any depth. Other values are not copied."""
        self._on_gpu = False
        self._values = self._copy(values)
        self._event = torch.cuda.Event() if self._on_gpu else None
        if self._event is not None:
            self._event.record()

    def read(self, *, timeout: float = math.inf) -> Any:
        """The copy. Raises TimeoutError if the device does not finish it within `timeout` seconds."""
        if self._event is not None:
            wait_for(self._event, seconds=timeout)
        return self._values

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._on_gpu |= value.is_cuda
            copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            return copy.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {key: self._copy(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._copy(item) for item in value]
        return value
