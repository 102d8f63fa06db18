"""Skips a step on every rank if its loss or a gradient is not finite, without waiting for the device.

The decision, and everything that depends on it, is computed on the device. All ranks have the same gradients after the
all-reduce. They therefore make the same decision, and every rank raises `NonFinite` at the same step. The host learns
about a skipped step one step later, or when it calls `StepGuard.skipped_steps`. With fp16, the run then continues,
unless too many steps in a row were skipped. Without fp16, the first skipped step ends the run.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from data_prep.errors import ExplainedError
from ddp_trainer.engine.host_copy import HostCopy
from ddp_trainer.engine.tensor_snapshot import TensorSnapshot

# With fp16, the loss scale is halved after each skipped step. The run ends if this many steps in a row were skipped.
# Without fp16, there is no scale that could be too large, so the first skipped step ends the run.
FP16_PATIENCE = 10

IN_A_ROW, THIS_EPOCH = 0, 1  # positions of the fields of `SkippedSteps`


class NonFinite(ExplainedError):
    """Raised when the run cannot continue because of skipped steps. `step` (0-based) is the last skipped step."""

    def __init__(self, step: int, patience: int) -> None:
        self.step = step
        if patience == 1:
            problem = f"loss or gradient not finite at step {step + 1}; the step was skipped"
        else:
            problem = (
                f"loss or gradient not finite in {patience} steps in a row, which were skipped; "
                f"step {step + 1} is the last one"
            )
        super().__init__(f"{problem}. Its images are listed in crash/. Try a lower --peak-lr, or look at these images")


class Attempt(NamedTuple):
    """The images and losses of one step, taken or skipped. If this step ends the run, they are listed in `crash/`."""

    step: int  # 0-based
    indices: Tensor  # (N,) positions in the beton file
    losses: Tensor  # (N,) one for each image


class Decision:
    """Whether a step is skipped. The value is on the device, and is set at the end of a `StepGuard.attempt` block."""

    skipped: Tensor  # () bool


class SkippedSteps(NamedTuple):
    in_a_row: int
    this_epoch: int


class StepGuard:
    """Takes or skips the optimizer step after a forward and backward pass, and informs the host later.

        with guard.attempt() as decision:
            losses = ...
            losses.backward(weights_if_finite(1 / len(losses), losses))
        ema.update(model, skip=decision.skipped)
        guard.check_previous(Attempt(step, batch.indices, losses))

    At the end of the block, the guard takes the optimizer step, or skips it and undoes what the forward pass changed.
    All of this happens on the device and can be captured into a CUDA graph. `check_previous` runs on the host.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        changed_by_forward: Iterable[Tensor] = (),
        *,
        scaler: torch.amp.GradScaler | None = None,
        clip: Callable[[], None] = lambda: None,
        timeout: float = math.inf,
    ) -> None:
        """`optimizer`: may be wrapped by Accelerate.

        `changed_by_forward`: tensors to restore after a skipped step, in addition to the model's buffers.
        `clip`: called before each update to clip the gradients. `timeout`: seconds to wait for a step to finish.
        """
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer, self._scaler, self._clip = optimizer, scaler, clip
        self._forward = TensorSnapshot([*model.buffers(), *changed_by_forward])
        self._timeout = timeout
        self._patience = 1 if scaler is None else FP16_PATIENCE
        self._counts = torch.tensor(SkippedSteps(0, 0)).to(self._parameters[0].device)
        self._recent: deque[Attempt] = deque(maxlen=2)  # the host learns about a skipped step one step later
        self._pending: deque[tuple[int, HostCopy]] = deque()

    @contextlib.contextmanager
    def attempt(self) -> Iterator[Decision]:
        """A context manager for the forward and backward pass of one step."""
        decision = Decision()
        self._forward.remember()
        yield decision
        decision.skipped = self._decide()
        self._forward.restore_where(decision.skipped)
        self._update(decision.skipped)
        self._counts += decision.skipped  # counts a skipped step in both fields
        self._counts[IN_A_ROW] *= decision.skipped  # 0 after a step that was taken

    def check_previous(self, attempt: Attempt) -> None:
        """Records `attempt` and checks the step before it.

        Raises NonFinite if the run cannot continue, and TimeoutError if the device does not finish that step in time.
        """
        self._recent.append(attempt)
        self._pending.append((attempt.step, HostCopy(self._counts)))
        self._check(keep=1)

    def skipped_steps(self) -> SkippedSteps:
        """Number of steps skipped in a row up to now, and number skipped in this epoch. Waits for the device.

        Raises the same errors as `check_previous`.
        """
        self._check(keep=0)
        return SkippedSteps(*self._counts.tolist())

    def restore(self, counts: SkippedSteps) -> None:
        self._counts.copy_(torch.tensor(counts))

    def start_epoch(self) -> None:
        self._counts[THIS_EPOCH] = 0

    def attempt_of(self, error: NonFinite) -> Attempt:
        return next(recent for recent in self._recent if recent.step == error.step)

    def _decide(self) -> Tensor:
        """() bool: whether to skip this step. It is skipped if the norm of all gradients is not finite."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = get_total_norm(gradients)
        zero = norm - norm  # NaN if the norm is not finite
        if self._scaler is not None:
            # The scaler skips a step if an element of a gradient is not finite. The norm can also overflow if all
            # elements are finite. With a NaN in a gradient, the scaler then skips the step, too.
            gradients[-1].add_(zero)
        return zero != 0

    def _update(self, skipped: Tensor) -> None:
        """Takes the optimizer's step unless `skipped`."""
        self._clip()
        if self._scaler is None:
            step_unless(skipped, self._optimizer)
        else:
            self._optimizer.step()  # the scaler skips the same steps, and lowers its scale
        self._optimizer.zero_grad(set_to_none=True)

    def _check(self, *, keep: int) -> None:
        """Checks all steps that were not checked before, except for the last `keep` steps."""
        while len(self._pending) > keep:
            step, counts = self._pending.popleft()
            if counts.read(timeout=self._timeout)[IN_A_ROW] >= self._patience:
                raise NonFinite(step, self._patience)


def weights_if_finite(weight: float, losses: Tensor) -> Tensor:
    """The weights (N,) of `losses` (N,) in a backward pass: `weight` each, or NaN if the losses' sum is not finite.

    NaN weights make the gradients NaN, and the all-reduce passes these on to every rank. Otherwise, an infinite loss
    could have finite gradients, and the other ranks would not notice it.
    """
    total = losses.detach().sum()
    return (total - total + weight).expand_as(losses)


def step_unless(skipped: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Takes the step of `optimizer` unless `skipped`, a scalar bool tensor, is True.

    torch's fused optimizers and Muon check `found_inf` on the device. For other optimizers, the host waits for
    `skipped`.
    """
    bare: Any = getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's wrapper
    if not getattr(bare, "_step_supports_amp_scaling", False):
        if not skipped.item():
            optimizer.step()
        return
    bare.found_inf = skipped.float()
    try:
        optimizer.step()
    finally:
        del bare.found_inf
