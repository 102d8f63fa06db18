"""Undoes in-place changes of tensors on the device, such as BatchNorm updates in a step that is then skipped."""

import torch
from torch import Tensor


class TensorSnapshot:
    """Saves the values of tensors, and restores them if a bool tensor on the device is True.

    All tensors are copied together as bytes, so that a few kernels are enough for tensors of all types.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._memory = [_memory_of(tensor) for tensor in tensors]
        self._before: Tensor

    def remember(self) -> None:
        if self._memory:
            self._before = torch.cat(self._memory)

    def restore_where(self, condition: Tensor) -> None:
        """Restores the saved values if `condition`, a bool tensor of shape (), is True."""
        if self._memory:
            values = torch.where(condition, self._before, torch.cat(self._memory))
            torch._foreach_copy_(self._memory, values.split([len(memory) for memory in self._memory]))  # type: ignore[attr-defined]


def _memory_of(tensor: Tensor) -> Tensor:
    """(K,) uint8 view of the bytes from the first element of `tensor` to its last, whatever its strides."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    return tensor.detach().as_strided((length,), (1,)).view(torch.uint8)
