"""Runs `narrow_train`, and in one step makes the loss of the last rank's second image NaN.

Arguments: the number of the step, counted from 1 in this process, then the arguments of the trainer.
"""

import math
from collections.abc import Sequence

import torch

import ddp_trainer.engine.device_step
from ddp_trainer.distributed.launch import Launch
from ddp_trainer.engine.warm_up import STEPS_ON_CPU
from tests.support.workers.narrow_train import narrow_main


def poison(step: int) -> None:
    real, calls = ddp_trainer.engine.device_step.losses_per_image, []
    launch = Launch.from_environment()
    skipped = STEPS_ON_CPU if launch.world_size > 1 else 0  # the warm-up

    def poisoned(*arguments: torch.Tensor, **options: float) -> torch.Tensor:
        losses = real(*arguments, **options)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == skipped + step and launch.rank == launch.world_size - 1:
            losses = losses.index_fill(0, torch.tensor(1), math.nan)
        return losses

    ddp_trainer.engine.device_step.losses_per_image = poisoned  # type: ignore[assignment]


def main(argv: Sequence[str]) -> int:
    poison(int(argv[0]))
    return narrow_main(argv[1:])
