"""What is kept of the last steps, so that one that was refused can be told of: its images and their losses."""

import math
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddp_trainer.runtime import Runtime


class _Step(NamedTuple):
    step: int  # from 0
    epoch: int  # from 0
    indices: Tensor  # (N,) positions in the beton file
    losses: list[Tensor]  # of each image, in the parts of an accumulated batch


class RecentSteps:
    """The last two: a refusal is known one step late."""

    def __init__(self) -> None:
        self._steps: deque[_Step] = deque(maxlen=2)

    def begin(self, step: int, epoch: int, indices: Tensor) -> None:
        self._steps.append(_Step(step, epoch, indices, []))

    def add(self, losses: Tensor) -> None:
        self._steps[-1].losses.append(losses)

    def describe(self, step: int, runtime: Runtime) -> dict[str, Any]:
        """The images of `step` (from 0) and their losses, of every rank. A collective operation."""
        wanted = next(recent for recent in self._steps if recent.step == step)
        samples = runtime.gather(wanted.indices).tolist()
        losses = runtime.gather(torch.cat(wanted.losses).double()).tolist()
        ranks = [
            {"samples": ours, "losses": [loss if math.isfinite(loss) else None for loss in theirs]}
            for ours, theirs in zip(samples, losses, strict=True)
        ]
        return {"step": step + 1, "epoch": wanted.epoch + 1, "precision": runtime.precision, "ranks": ranks}
