"""Who is told what the loop does: the main process records, prints and saves; the other ranks stay silent."""

from typing import Any

from ddp_trainer.checkpointer import Checkpointer
from ddp_trainer.config import TrainConfig
from ddp_trainer.console import Progress, build_progress, epoch_line
from ddp_trainer.engine import Record
from ddp_trainer.rundir import RunDirectory, write_json
from ddp_trainer.tracking import Tracker


class SilentObserver:
    """For every rank but the main one."""

    def __init__(self) -> None:
        self.progress: Progress = build_progress(enabled=False)

    def epoch_done(self, record: Record) -> None:
        pass

    def save(self, state: dict[str, Any], *, step: int, epoch: int) -> None:
        pass

    def check(self) -> None:
        pass

    def crashed(self, report: dict[str, Any], *, step: int) -> None:
        pass


class RunObserver:
    """For the main process: console, trackers, checkpoints and status.json."""

    def __init__(
        self,
        run_dir: RunDirectory,
        tracker: Tracker,
        checkpointer: Checkpointer,
        config: TrainConfig,
        *,
        settings: dict[str, Any],
    ) -> None:
        self.run_dir, self.tracker, self.checkpointer = run_dir, tracker, checkpointer
        self.epochs, self.split = config.schedule.epochs, config.data.evaluation_split
        self.settings = settings
        self.progress: Progress = build_progress(enabled=True)

    def epoch_done(self, record: Record) -> None:
        self.tracker.log_epoch(record)
        self.progress.note(epoch_line(record, epochs=self.epochs, split=self.split))

    def save(self, state: dict[str, Any], *, step: int, epoch: int) -> None:
        whole = {**state, "settings": self.settings, "tracker": self.tracker.state()}
        self.checkpointer.save(whole, step=step, score=self._score(state))
        self.run_dir.write_status("running", step=step, epoch=epoch)

    def check(self) -> None:
        self.checkpointer.check()

    def crashed(self, report: dict[str, Any], *, step: int) -> None:
        folder = self.run_dir.path / "crash"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"step-{step:08d}.json", report)

    def _score(self, state: dict[str, Any]) -> float | None:
        """Accuracy on the validation images, of a state just evaluated. The test split must choose nothing."""
        history = state["history"]
        if self.split == "test" or not history or history[-1]["step"] != state["step"]:
            return None
        return float(history[-1]["test_accuracy"])
