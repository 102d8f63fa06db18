"""When a checkpoint is due: at which steps, and at the end of which epochs."""

import math
import time

from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.runtime import Runtime

SECONDS_BETWEEN_EPOCHS = 5.0  # on a GPU, where an epoch may take less time than a save


class SaveSchedule:
    """Answers the same on every rank. Call `saved` after each save."""

    def __init__(self, config: TrainConfig, runtime: Runtime, *, steps_per_epoch: int, last_step: int) -> None:
        self._every, self._runtime = config.run.checkpoint_every_steps, runtime
        self._steps_per_epoch, self._last_step = steps_per_epoch, last_step
        # With --validation the best epoch is kept, so all of them must be saved.
        self._all_epochs = runtime.device.type != "cuda" or config.data.validation > 0
        self._saved_at = -math.inf

    def saved(self) -> None:
        self._saved_at = time.monotonic()

    def after_step(self, step: int) -> bool:
        """`step`: number of steps done. False at the end of an epoch, which is saved after its evaluation."""
        return bool(self._every) and step % self._every == 0 and step % self._steps_per_epoch != 0

    def after_epoch(self, step: int) -> bool:
        """`step`: number of steps done. A collective operation on GPUs."""
        asked_for = bool(self._every) and step % self._every == 0
        if self._all_epochs or asked_for or step >= self._last_step:
            return True
        due = time.monotonic() - self._saved_at >= SECONDS_BETWEEN_EPOCHS
        return bool(self._runtime.agree_on(due)[0])
