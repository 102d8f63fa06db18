"""The interface to which the training loop reports.

The observer of the main process records, prints and saves (`run.recorder`). All other ranks have an observer that
ignores all reports, so the loop never asks which rank it runs on.
"""

from typing import Any

from ddp_trainer.tracking.console import Progress
from ddp_trainer.tracking.metric_files import Record


class Observer:
    """What the training loop reports to. This class ignores all reports; override the methods that you need.

    The trainer calls these methods on the training thread, in the order of events.
    """

    progress: Progress = Progress()

    def step_done(self, step: int) -> None:
        """Called after each step; `step`: number of steps done. The device may not have finished the last step yet."""

    def step_record(self, record: Record) -> None:
        """Called every `--log-every-steps` steps, at most one step late, with the means since the previous record."""

    def epoch_done(self, record: Record) -> None:
        """Called after each epoch, with its record in metrics.jsonl."""

    def wait_for_save(self, *, seconds: float) -> bool:
        """Waits up to `seconds` for the previous save. Returns whether it is finished."""
        return True

    def save(self, state: dict[str, Any], *, step: int, epoch: int) -> None:
        """Saves a checkpoint. The trainer changes the tensors in `state` afterwards, so copy them before returning."""

    def check(self) -> None:
        """Called after each step. If background work, such as saving a checkpoint, has failed, raises its error."""

    def skipped(self, report: dict[str, Any], *, step: int) -> None:
        """Called when the run ends because of skipped steps.

        `report` lists the images of the last skipped step and their losses.
        """
