"""Decides after which steps and epochs a checkpoint is saved."""

import math
import time

from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.runtime import Runtime

# On a GPU, an epoch may take less time than a save. So on GPUs, a checkpoint after an epoch is saved only if at
# least this many seconds have passed since the previous save, or if --validation, --checkpoint-every-steps or the end
# of the run requires it.
SECONDS_BETWEEN_EPOCHS = 5.0


class SaveSchedule:
    """Decides whether a checkpoint is due, with the same answer on every rank. Call `saved` after each save."""

    def __init__(self, config: TrainConfig, runtime: Runtime, *, steps_per_epoch: int, last_step: int) -> None:
        self._every, self._runtime = config.run.checkpoint_every_steps, runtime
        self._steps_per_epoch, self._last_step = steps_per_epoch, last_step
        # With --validation, the checkpoint of the best epoch is kept, so every epoch must be saved.
        self._all_epochs = runtime.device.type != "cuda" or config.data.validation > 0
        self._saved_at = -math.inf

    def saved(self) -> None:
        self._saved_at = time.monotonic()

    def after_step(self, step: int) -> bool:
        """Whether to save after `step` steps. False at the end of an epoch or the run, where `after_epoch` decides."""
        is_end = step % self._steps_per_epoch == 0 or step == self._last_step
        return bool(self._every) and step % self._every == 0 and not is_end

    def after_epoch(self, step: int) -> bool:
        """Whether to save after an epoch that ends after `step` steps. A collective operation on GPUs."""
        asked_for = bool(self._every) and step % self._every == 0
        if self._all_epochs or asked_for or step >= self._last_step:
            return True
        due = time.monotonic() - self._saved_at >= SECONDS_BETWEEN_EPOCHS
        return bool(self._runtime.agree_on(due)[0])
