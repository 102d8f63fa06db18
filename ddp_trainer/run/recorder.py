"""The trainer's observer on the main process: prints, logs to the trackers, writes checkpoints and status.json."""

import contextlib
import math
import sys
from collections.abc import Iterator
from typing import Any

from data_prep.dataset import DatasetInfo
from data_prep.errors import printable, shell_path, warn
from data_prep.files import write_json
from data_prep.sources import name_some
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.engine.observer import Observer
from ddp_trainer.engine.profiling import StepProfiler
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.run.checkpoint_saver import CheckpointSaver
from ddp_trainer.run.directory import RunDirectory, describe_run
from ddp_trainer.run.settings import settings_of
from ddp_trainer.tracking.console import build_progress, epoch_line, print_line
from ddp_trainer.tracking.metric_files import Record
from ddp_trainer.tracking.tracker import build_tracker


class SilentRecorder(Observer):
    """The recorder of every rank but the main one. It records nothing."""

    def say(self, line: str) -> None:
        pass

    def preempted(self) -> None:
        pass


class Recorder(SilentRecorder):
    """Records what the trainer reports, in the run directory and the trackers. Use `open_recorder` to create one.

    Reports each step and each record to `observer`, too.
    """

    def __init__(
        self,
        run_dir: RunDirectory,
        config: TrainConfig,
        dataset: DatasetInfo,
        runtime: Runtime,
        state: dict[str, Any] | None,
        observer: Observer,
    ) -> None:
        """Writes config.json and starts the trackers. `state`: see `open_recorder`."""
        self.run_dir, self.observer = run_dir, observer
        self.step, history = (state["step"], state["history"]) if state else (0, [])
        self.epoch = len(history)
        self.saved_step: int | None = self.step if state else None  # of the newest checkpoint
        self.epochs, self.split = math.ceil(config.schedule.epochs), config.data.evaluation_split
        self.settings = settings_of(config, dataset, precision=runtime.precision)
        for name in ("summary.json", "predictions.npz"):  # exist if a finished run is resumed with a larger --max-steps
            (run_dir.path / name).unlink(missing_ok=True)
        description = describe_run(config, dataset, runtime.describe())
        write_json(run_dir.path / "config.json", description)
        self.tracker = build_tracker(
            config.tracking,
            run_dir=run_dir.path,
            config=description,
            history=history,
            step=self.step,
            state=state["tracker"] if state else {},
        )
        self.progress = build_progress()
        self.checkpoints = CheckpointSaver(run_dir.checkpoints, keep=config.run.keep_checkpoints)
        self._waits_for_disk = False
        steps_left = config.schedule.last_step(dataset.splits["train"].count - config.data.held_out) - self.step
        self.profiler = StepProfiler.start(config.run.profile, steps_left=steps_left, folder=run_dir.path)

    def say(self, line: str) -> None:
        print_line(line, sys.stderr)

    def step_done(self, step: int) -> None:
        self.step = step
        if self.profiler is not None:
            self.profiler.step()
        self.observer.step_done(step)

    def step_record(self, record: Record) -> None:
        self.tracker.log_step(record)
        self.observer.step_record(dict(record))  # a copy, which the observer may change

    def epoch_done(self, record: Record) -> None:
        self.epoch = int(record["epoch"])
        self.tracker.log_epoch(record)
        self.progress.note(epoch_line(record, epochs=self.epochs))
        self.observer.epoch_done(dict(record))

    def wait_for_save(self, *, seconds: float) -> bool:
        is_saved = self.checkpoints.wait(seconds=seconds)
        if not is_saved and not self._waits_for_disk:
            self.progress.note("waiting for the disk: the previous checkpoint is still being saved")
        self._waits_for_disk = not is_saved
        return is_saved

    def save(self, state: dict[str, Any], *, step: int, epoch: int) -> None:
        def note_save() -> None:
            self.saved_step = step
            self.run_dir.write_status("running", step=step, epoch=epoch)

        whole = {**state, "settings": self.settings, "tracker": self.tracker.state()}
        self.checkpoints.save(
            whole,
            step=step,
            score=self._score(state),
            before_saving=self.tracker.sync,  # a resumed run does not repeat the records of the steps before its start
            when_saved=note_save,  # called after the save: --resume concludes from status.json that a checkpoint exists
        )
        self.step, self.epoch = step, epoch

    def check(self) -> None:
        self.checkpoints.check()

    def skipped(self, report: dict[str, Any], *, step: int) -> None:
        folder = self.run_dir.path / "crash"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"step-{step:08d}.json", report)

    def preempted(self) -> None:
        """Waits until the checkpoint is saved, then prints how to resume.

        Raises CheckpointError if the checkpoint cannot be saved.
        """
        self.checkpoints.close()
        resume = f"--out {shell_path(self.run_dir.path)} --resume"
        if self.saved_step is not None:
            message = f"stopped after step {self.step}, checkpoint saved; continue with {resume}"
        else:
            message = f"stopped before the first checkpoint; {resume} will start from step 0"
        self.run_dir.write_status("preempted", step=self.step, epoch=self.epoch, message=message)
        self.tracker.finish(None, failed=False)
        self.say(message)

    def failed(self, error: BaseException) -> None:
        """Records the failure. Never raises, because that would hide the original error."""
        try:
            self.checkpoints.close()
        except Exception as other:  # the save may fail for the same reason as the run, for example a GPU error
            if other is not error:
                print(f"error: {other}", file=sys.stderr, flush=True)
        self.run_dir.write_failure(error, step=self.step, epoch=self.epoch, saved_step=self.saved_step or 0)
        try:
            self.tracker.finish(None, failed=True)
        except OSError as other:
            warn(str(other))

    def _score(self, state: dict[str, Any]) -> float | None:
        """Accuracy of this state on the validation images; None if it was not evaluated on them.

        Accuracy on the test images is not used, because they must not decide which checkpoint is kept. With
        --validation, `test_accuracy` in a record is the accuracy on the validation images.
        """
        history = state["history"]
        if self.split == "test" or not history or history[-1]["step"] != state["step"]:
            return None
        return float(history[-1]["test_accuracy"])


def describe_plan(trainer: Trainer) -> str:
    """One line that describes the run and its hardware, and a warning if the validation images lack a class."""
    schedule, runtime = trainer.config.schedule, trainer.runtime
    # `data.labels` is set only with --balance batches, which draws exactly as many images as its batches need.
    leftover = len(trainer.data.samples) % schedule.batch_size if trainer.data.labels is None else 0
    dropped = f" ({leftover} leftover images are dropped each epoch, different ones every time)" if leftover else ""
    graphs = ""
    if runtime.device.type == "cuda":
        reason = trainer.device_step.no_graph_reason
        graphs = f", without CUDA graphs ({reason})" if reason else ", with CUDA graphs"
    passes = f" in {schedule.passes} passes" if schedule.passes > 1 else ""
    end = f", ends after step {trainer.last_step} (--max-steps)" if trainer.last_step < trainer.total_steps else ""
    missing_classes = ""
    if names := [printable(name) for name in trainer.data.missing_classes]:
        missing_classes = (
            f"\nwarning: --validation holds out no image of some classes ({name_some(names)}), so the accuracy "
            "does not include them; raise --validation, or add images"
        )
    return (
        f"{trainer.config.recipe}: {schedule.epochs:g} epochs x {trainer.steps_per_epoch} steps{end}, "
        f"batch {schedule.batch_size}{passes}{dropped}, "
        f"{runtime.world_size} x {runtime.device_name}, {runtime.precision}{graphs}{missing_classes}"
    )


@contextlib.contextmanager
def open_recorder(
    run_dir: RunDirectory | None,
    config: TrainConfig,
    dataset: DatasetInfo,
    runtime: Runtime,
    state: dict[str, Any] | None,
    observer: Observer | None,
) -> Iterator[SilentRecorder]:
    """Writes config.json and status.json, starts the trackers, and yields the recorder.

    `run_dir`: None on every rank but the main one. `state`: the checkpoint to resume from; None for a fresh start.

    If a finished run is resumed with a larger --max-steps, its old summary and predictions are removed. If the block
    raises an exception, the run is recorded as failed. On every rank but the main one, the recorder records nothing and
    does not call `observer`.
    """
    if run_dir is None:
        yield SilentRecorder()
        return
    step, epoch = (state["step"], len(state["history"])) if state else (0, 0)
    run_dir.write_status("running", step=step, epoch=epoch)
    try:
        recorder = Recorder(run_dir, config, dataset, runtime, state, observer or Observer())
    except BaseException as error:
        run_dir.write_failure(error, step=step, epoch=epoch, saved_step=step)
        raise
    try:
        yield recorder
    except BaseException as error:
        recorder.failed(error)
        raise
    finally:
        if recorder.profiler is not None:
            recorder.profiler.close()
