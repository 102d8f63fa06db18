"""A loss or a gradient that is no finite number changes nothing, on any rank.

Whether it is one is decided on the device, and so is what follows from it: no step waits for the answer. The host gets
it a step later, or when it asks by `settle`. Gradients are alike on all ranks after their all-reduce, hence so are the
decisions, and every rank raises at the same step.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

FP16_PATIENCE = 10  # skipped steps in a row: the gradient scale was halved ten times, and it did not help


class NonFinite(Exception):
    """Training on would be of no use. `step`: from 0, the last one that was refused."""

    def __init__(self, step: int, patience: int) -> None:
        self.step = step
        steps = f"in {patience} steps in a row, the last of them" if patience > 1 else "in"
        super().__init__(
            f"the loss or a gradient is not finite {steps} step {step + 1}; nothing was updated by it, and its images "
            f"are listed in crash/: lower --peak-lr, or look at those images"
        )


def felt_by_all(loss: Tensor) -> Tensor:
    """`loss` (), with a gradient of NaN where it is not finite: the all-reduce of gradients then tells every rank.

    Without this an infinite loss may have finite gradients, and would be known to its own rank only.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


class StepGuard:
    """Refuses steps on the device. Call `begin`, then forward and backward, `judge`, and `after_step` at the end."""

    def __init__(self, model: nn.Module, changed_by_forward: Iterable[Tensor], *, patience: int) -> None:
        """`patience`: refused steps in a row that end the run."""
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._forward = _Reversible([*model.buffers(), *changed_by_forward])
        self.patience = patience
        device = self._parameters[0].device
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # refused in a row, refused in this epoch
        self._in_flight: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def begin(self) -> None:
        self._forward.remember()

    def judge(self) -> Tensor:
        """() bool on the device: whether this step is refused. What its forward pass changed is put back then."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        refused = ~get_total_norm(gradients).isfinite()  # a norm that overflows is as bad as a gradient that does
        gradients[-1].add_(torch.where(refused, math.nan, 0.0))  # for a gradient scaler, which looks at the gradients
        self._forward.put_back_where(refused)
        self._counts += refused
        self._counts[0] *= refused
        return refused

    def after_step(self, step: int) -> None:
        """Sends the counts of `step` to the host, and looks at those of the step before it. Raises NonFinite."""
        cuda = self._counts.is_cuda
        counts = torch.empty(2, dtype=torch.int64, pin_memory=cuda).copy_(self._counts, non_blocking=True)
        event = torch.cuda.Event() if cuda else None
        if event is not None:
            event.record()
        self._in_flight.append((step, counts, event))
        self._look(keep=1)

    def settle(self) -> list[int]:
        """[refused in a row, refused in this epoch], up to the last step. Waits for the device; raises NonFinite."""
        self._look(keep=0)
        return self._counts.tolist()

    def restore(self, counts: list[int]) -> None:
        self._counts.copy_(torch.tensor(counts))

    def start_epoch(self) -> None:
        self._counts[1] = 0

    def _look(self, *, keep: int) -> None:
        while len(self._in_flight) > keep:
            step, counts, event = self._in_flight.pop(0)
            if event is not None:
                event.synchronize()
            if counts[0] >= self.patience:
                raise NonFinite(step, self.patience)


def step_unless(refused: Tensor, optimizer: torch.optim.Optimizer, bare: torch.optim.Optimizer) -> None:
    """`optimizer.step()`, or nothing at all where `refused`. `bare`: the optimizer within Accelerate's wrapper.

    torch's fused optimizers, and Muon, look at `found_inf` on the device. Others are asked to wait for the answer.
    """
    if not getattr(bare, "_step_supports_amp_scaling", False):
        if not refused.item():
            optimizer.step()
        return
    bare.found_inf = refused.float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del bare.found_inf  # type: ignore[attr-defined]


class _Reversible:
    """Tensors that a forward pass changes in place. Together by type, so that a few kernels serve all of them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        dtypes = dict.fromkeys(tensor.dtype for tensor in tensors)
        self._groups = [[tensor for tensor in tensors if tensor.dtype == dtype] for dtype in dtypes]
        self._before: list[Tensor] = []

    def remember(self) -> None:
        self._before = [_flat(group) for group in self._groups]

    def put_back_where(self, condition: Tensor) -> None:
        for group, before in zip(self._groups, self._before, strict=True):
            values = torch.where(condition, before, _flat(group)).split([tensor.numel() for tensor in group])
            shaped = [value.view(tensor.shape) for value, tensor in zip(values, group, strict=True)]
            torch._foreach_copy_(group, shaped)  # type: ignore[attr-defined]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
