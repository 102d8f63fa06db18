"""Reports the skipped step that ended a run: its images and their losses."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.observer import Observer
from ddp_trainer.engine.step_guard import Attempt, NonFinite, StepGuard


def describe_step(attempt: Attempt, runtime: Runtime, *, epoch: int) -> dict[str, Any]:
    """The images and losses of a step on every rank, as JSON values. `epoch`: 0-based. A collective operation."""
    samples = runtime.gather(attempt.indices).tolist()
    losses = runtime.gather(attempt.losses.double()).tolist()
    ranks = [
        {"samples": own, "losses": [loss if math.isfinite(loss) else None for loss in own_losses]}
        for own, own_losses in zip(samples, losses, strict=True)
    ]
    return {"step": attempt.step + 1, "epoch": epoch + 1, "precision": runtime.precision, "ranks": ranks}


@contextlib.contextmanager
def reporting_the_end(
    guard: StepGuard, runtime: Runtime, observer: Observer, *, steps_per_epoch: int
) -> Iterator[None]:
    """Reports a NonFinite raised in the block to the observer, and always closes the progress display."""
    try:
        yield
    except NonFinite as error:
        report = describe_step(guard.attempt_of(error), runtime, epoch=error.step // steps_per_epoch)
        observer.skipped(report, step=error.step + 1)
        raise
    finally:
        observer.progress.finish()  # so that the next message starts on a new line
