"""Who is told what the loop does: the main process records, prints and saves; the other ranks stay silent."""

from typing import Any

from ddp_trainer.checkpoint import Checkpointer
from ddp_trainer.console import Progress, build_progress, epoch_line
from ddp_trainer.engine import Record
from ddp_trainer.rundir import RunDirectory
from ddp_trainer.tracking import Tracker


class SilentObserver:
    """For every rank but the main one."""

    def __init__(self) -> None:
        self.progress: Progress = build_progress(enabled=False)

    def epoch_done(self, record: Record) -> None:
        pass

    def save(self, state: dict[str, Any], *, step: int, epoch: int) -> None:
        pass


class RunObserver:
    """For the main process: console, trackers, checkpoints and status.json."""

    def __init__(
        self,
        run_dir: RunDirectory,
        tracker: Tracker,
        checkpointer: Checkpointer,
        *,
        epochs: int,
        settings: dict[str, Any],
    ) -> None:
        self.run_dir, self.tracker, self.checkpointer = run_dir, tracker, checkpointer
        self.epochs, self.settings = epochs, settings
        self.progress: Progress = build_progress(enabled=True)

    def epoch_done(self, record: Record) -> None:
        self.tracker.log_epoch(record)
        self.progress.note(epoch_line(record, epochs=self.epochs))

    def save(self, state: dict[str, Any], *, step: int, epoch: int) -> None:
        self.checkpointer.save({**state, "settings": self.settings, "tracker": self.tracker.state()}, step=step)
        self.run_dir.write_status("running", step=step, epoch=epoch)
