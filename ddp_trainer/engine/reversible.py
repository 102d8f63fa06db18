"""Tensors that a forward pass changes in place, and how to undo it on the device."""

import torch
from torch import Tensor


class Reversible:
    """Remembers tensors and restores them where a condition on the device holds.

    Tensors of one dtype are handled together, so that a few kernels serve all of them.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        dtypes = dict.fromkeys(tensor.dtype for tensor in tensors)
        self._groups = [[tensor for tensor in tensors if tensor.dtype == dtype] for dtype in dtypes]
        self._before: list[Tensor] = []

    def remember(self) -> None:
        self._before = [_flat(group) for group in self._groups]

    def restore_where(self, condition: Tensor) -> None:
        """`condition`: () bool."""
        for group, before in zip(self._groups, self._before, strict=True):
            values = torch.where(condition, before, _flat(group)).split([tensor.numel() for tensor in group])
            shaped = [value.view(tensor.shape) for value, tensor in zip(values, group, strict=True)]
            torch._foreach_copy_(group, shaped)  # type: ignore[attr-defined]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
