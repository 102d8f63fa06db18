"""The report of a skipped step that ended a run: which images it had, and their losses."""

import math
from typing import Any

import torch

from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.step_guard import Attempt


def describe_step(attempt: Attempt, runtime: Runtime, *, epoch: int) -> dict[str, Any]:
    """Images and losses of every rank, as JSON values; `epoch`: 0-based. A collective operation."""
    samples = runtime.gather(attempt.indices).tolist()
    losses = runtime.gather(torch.cat(attempt.losses).double()).tolist()
    ranks = [
        {"samples": own, "losses": [loss if math.isfinite(loss) else None for loss in own_losses]}
        for own, own_losses in zip(samples, losses, strict=True)
    ]
    return {"step": attempt.step + 1, "epoch": epoch + 1, "precision": runtime.precision, "ranks": ranks}
