"""An exponential moving average of a model's weights, updated without waiting for the device.

torch's AveragedModel waits for the device in each update, and cannot skip an update.
"""

import copy
import itertools
from typing import TypeGuard

import torch
from torch import Tensor, nn

from data_prep.errors import InputError
from data_prep.machine_limits import lacks_memory
from ddp_trainer.models.registry import describe_error

# torch cannot add the other floating-point types, such as float8.
AVERAGED_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Ema(nn.Module):
    """A moving average of a model: `module` holds the averaged parameters and buffers.

    The first update copies the parameters and buffers of the model. Two kinds of tensors are always copied: those whose
    type is not in `AVERAGED_TYPES`, and those that contain infinity from the start, such as attention masks, because
    their averages would be NaN.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        """`decay`: share of the old average that each update after the first one keeps."""
        super().__init__()
        self.module = frozen_copy(model)
        self._averaged = [value.dtype in AVERAGED_TYPES and not _has_infinity(value) for value in _tensors(model)]
        self.decay = decay
        device = next(model.parameters()).device
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def update(self, model: nn.Module, *, skip: Tensor) -> None:
        """Moves the average one step towards `model`, unless `skip`, a bool scalar on the device, is True."""
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        averaged = list(itertools.compress(pairs, self._averaged))
        averages, current = [average for average, _ in averaged], [value.detach() for _, value in averaged]
        share = torch.where(self.updates == 0, 1.0, 1 - self.decay) * ~skip
        moves = torch._foreach_sub(current, averages)  # type: ignore[attr-defined]
        torch._foreach_mul_(moves, share)  # type: ignore[attr-defined]
        torch._foreach_add_(averages, moves)  # type: ignore[attr-defined]
        for (copied, value), is_averaged in zip(pairs, self._averaged, strict=True):
            if not is_averaged:  # such as the number of batches that BatchNorm has seen
                copied.copy_(value)
        self.updates += ~skip


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of a network for `Ema`. Raises InputError if it cannot be copied."""
    # deepcopy refuses the results of operations, such as an auxiliary loss that the network keeps.
    results = [value for layer in model.modules() for value in vars(layer).values() if _is_result(value)]
    detached: dict[int, object] = {id(value): value.detach() for value in results}
    try:
        return copy.deepcopy(model, detached).requires_grad_(False)
    except Exception as error:
        if lacks_memory(error):
            raise
        fix = "detach the tensors that the network keeps in lists or dictionaries, or train without --ema-decay"
        raise InputError(f"--ema-decay: the network cannot be copied ({describe_error(error)}); {fix}") from error


def _is_result(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and not value.is_leaf


def _has_infinity(tensor: Tensor) -> bool:
    return not tensor.is_meta and bool(tensor.isinf().any())


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
