"""Runs `narrow_train` as if each rank had memory for a given number of images in a pass.

The first argument has one number per rank, such as `16,8`. The other arguments are those of `ddp_trainer.train`.
"""

from collections.abc import Sequence

from ddp_trainer.distributed.launch import Launch
from ddp_trainer.engine.passes import MemoryNeed
from tests.support.workers.narrow_train import narrow_main


def main(argv: Sequence[str]) -> int:
    fitting = int(argv[0].split(",")[Launch.from_environment().rank])
    MemoryNeed.images_that_fit = lambda self, available: fitting  # type: ignore[method-assign]
    return narrow_main(argv[1:])
