"""Reports the images and losses of the step that ended a run because its loss or a gradient was not finite."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.observer import Observer
from ddp_trainer.engine.step_guard import Attempt, NonFinite, StepGuard


def describe_step(attempt: Attempt, runtime: Runtime, *, epoch: int) -> dict[str, Any]:
    """The images and losses of a step on every rank, as JSON values. `epoch`: 0-based. A collective operation."""
    ranks = [
        {"samples": samples, "losses": [loss if math.isfinite(loss) else None for loss in losses]}
        for samples, losses in zip(
            _lists_of_ranks(attempt.indices, runtime), _lists_of_ranks(attempt.losses.double(), runtime), strict=True
        )
    ]
    return {"step": attempt.step + 1, "epoch": epoch + 1, "precision": runtime.precision, "ranks": ranks}


def _lists_of_ranks(own: Tensor, runtime: Runtime) -> list[list]:
    """Gathers `own` (N,) from all ranks, as one list per rank. N may differ between ranks. A collective operation."""
    counts = runtime.gather(torch.tensor([len(own)], device=own.device)).flatten().tolist()
    padded = F.pad(own, (0, max(counts) - len(own)))
    return [row[:count] for row, count in zip(runtime.gather(padded).tolist(), counts, strict=True)]


@contextlib.contextmanager
def report_failing_step(
    guard: StepGuard, runtime: Runtime, observer: Observer, *, steps_per_epoch: int
) -> Iterator[None]:
    """If the block raises NonFinite, reports the skipped step to the observer. Always closes the progress display."""
    try:
        yield
    except NonFinite as error:
        report = describe_step(guard.attempt_of(error), runtime, epoch=error.step // steps_per_epoch)
        observer.skipped(report, step=error.step + 1)
        raise
    finally:
        observer.progress.finish()  # so that the next message starts on a new line
