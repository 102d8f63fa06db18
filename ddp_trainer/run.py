"""One training run put together from its parts, from checked input to the files of a complete run."""

import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from data_prep.dataset import read_dataset, verify_dataset
from data_prep.errors import InputError
from ddp_trainer.assembly import build_data, build_network, training_flops
from ddp_trainer.checkpoint import CheckpointError
from ddp_trainer.checkpointer import Checkpointer
from ddp_trainer.config import TrainConfig
from ddp_trainer.console import duration, print_line
from ddp_trainer.engine import Observer, Trainer
from ddp_trainer.evaluate import Evaluation
from ddp_trainer.hard_examples import choose_hard_images
from ddp_trainer.hardware import check_dataset, launch_environment
from ddp_trainer.model import ModelSpec, count_parameters
from ddp_trainer.model_card import write_model_card_or_say_why
from ddp_trainer.observer import RunObserver, SilentObserver
from ddp_trainer.optim import build_optimizer
from ddp_trainer.outputs import write_model, write_predictions, write_report_or_say_why, write_summary
from ddp_trainer.profiling import profile_steps
from ddp_trainer.resuming import COMPLETE, FRESH, find_start, load_state, refuse_other_training
from ddp_trainer.run_data import HardImages, RunData
from ddp_trainer.rundir import RunDirectory, describe_run, recorded_settings, write_json
from ddp_trainer.runtime import Runtime, check_machine
from ddp_trainer.signals import StopRequest
from ddp_trainer.tracking import NullTracker, Tracker, build_tracker
from ddp_trainer.training_state import restore_state


class TrainingRun:
    """Checks the input, takes the run directory and joins the other processes.

    Raises InputError where data, configuration, launch or run directory are not usable; nothing is written over then.
    """

    def __init__(self, config: TrainConfig, stop: StopRequest | None = None) -> None:
        self.config = config
        check_machine(config.runtime)
        self.dataset = read_dataset(config.data.data_dir)
        num_images = check_dataset(config, self.dataset)
        verify_dataset(config.data.data_dir, self.dataset)
        self.run_dir = self._claim() if launch_environment()[0] == 0 else None
        last_step = config.schedule.last_step(num_images)
        start = FRESH
        if self.run_dir is not None and config.run.resume:
            start = find_start(self.run_dir, last_step)
        self.runtime, self.start = self._join(start, stop)
        self.state = self._saved_state()
        self.position = (self.state["step"], len(self.state["history"])) if self.state else (0, 0)
        self.tracker: Tracker = NullTracker()
        self.checkpointer: Checkpointer | None = None
        self.trainer: Trainer | None = None

    def _join(self, start: int, stop: StopRequest | None) -> tuple[Runtime, int]:
        """This process among the others, and where all of them start."""
        try:
            runtime = Runtime(self.config.runtime, accumulate=self.config.schedule.accumulate, stop=stop)
            return runtime, runtime.agree_on(start)
        except Exception as error:  # such as of a process that never came
            if self.run_dir is not None and start != COMPLETE and not isinstance(error, InputError):
                self.run_dir.write_status("failed", step=max(start, 0), message=f"{type(error).__name__}: {error}")
            raise

    def _claim(self) -> RunDirectory | None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        out = self.config.run.out or Path("runs") / f"{self.config.recipe}-{stamp}"
        return RunDirectory(out, resume=self.config.run.resume)

    def _saved_state(self) -> dict[str, Any] | None:
        """What to go on from, if anything. Raises InputError where it is another training."""
        if self.start == FRESH:
            return None
        assert self.config.run.out is not None, "--resume comes with --out"
        if self.is_complete:  # there is nothing to compute, so what `auto` comes to on this machine is all the same
            asked = {**self.settings, "precision": self.config.runtime.precision}
            refuse_other_training(recorded_settings(self.config.run.out), asked)
            return None
        return load_state(self.config.run.out, self.start, self.settings)

    @property
    def is_complete(self) -> bool:
        return self.start == COMPLETE

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            classes=tuple(self.dataset.classes),
            mean=self.dataset.mean,
            std=self.dataset.std,
            image_size=self.dataset.image_size,
            activation=self.config.network.activation,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must share with the run it goes on with: also the pixels, and what `auto` came to."""
        images = self.dataset.splits["train"].sha256
        return {**self.config.fixed_on_resume(), "precision": self.runtime.precision, "training images": images}

    def say(self, line: str) -> None:
        if self.runtime.is_main:
            print_line(line, sys.stderr)

    def build(self) -> Trainer:
        """The trainer, standing where the run starts or goes on."""
        state, self.state = self.state, None  # not to be held in memory for the whole run
        observer = self._observer(state)
        data = self._data(state, observer)
        model = build_network(self.config.network, self.spec)
        optimizer = build_optimizer(model, self.config.optim)
        trainer = Trainer(self.config, self.runtime, model, optimizer, data, observer)
        if state is not None:
            restore_state(trainer, state)
        self.trainer = trainer
        self._announce(trainer)
        if state is None and data.hard is not None:
            trainer.save()  # the choice has taken its time
        profile_steps(trainer, self.config.run.profile, self.run_dir)
        return trainer

    def _data(self, state: dict[str, Any] | None, observer: Observer) -> RunData:
        """With its hard images, which are chosen where that is still to be done."""
        hard = HardImages(**state["hard"]) if state and state["hard"] else None
        if self.config.schedule.candidates > 1 and state is None:
            self.say("a small network chooses the hard images first")
            hard = choose_hard_images(self.config, self.runtime, self.dataset, self.spec, observer)
            self.say(f"the hard images are chosen, in {duration(hard.seconds)}")
        return replace(build_data(self.config, self.runtime, self.dataset, self.spec), hard=hard)

    def _observer(self, state: dict[str, Any] | None) -> Observer:
        if self.run_dir is None:
            return SilentObserver()
        step, epoch = self.position
        self.run_dir.write_status("running", step=step, epoch=epoch)
        for name in ("summary.json", "predictions.npz"):  # of fewer --max-steps: no longer the whole run
            (self.run_dir.path / name).unlink(missing_ok=True)
        description = describe_run(self.config, self.dataset, self._machine)
        write_json(self.run_dir.path / "config.json", description)
        self.tracker = build_tracker(
            self.config.tracking,
            run_dir=self.run_dir.path,
            config=description,
            history=state["history"] if state else (),
            state=state["tracker"] if state else {},
        )
        self.checkpointer = Checkpointer(self.run_dir.checkpoints, keep=self.config.run.keep_checkpoints)
        return RunObserver(self.run_dir, self.tracker, self.checkpointer, self.config, settings=self.settings)

    @property
    def _machine(self) -> dict[str, Any]:
        runtime = self.runtime
        return {"precision": runtime.precision, "world_size": runtime.world_size, "device": runtime.device.type,
                "device_name": runtime.device_name}  # fmt: skip

    def _announce(self, trainer: Trainer) -> None:
        schedule, runtime = self.config.schedule, self.runtime
        left_out = len(trainer.data.samples) % schedule.candidates_per_step
        hardest = f"the hardest {schedule.batch_size} of " if schedule.candidates > 1 else ""
        self.say(
            f"{self.config.recipe}: {schedule.epochs} epochs of {trainer.steps_per_epoch} steps of {hardest}"
            f"{schedule.candidates_per_step} images ({left_out} images, others each time, do not fill a last batch), "
            f"{runtime.world_size} x {runtime.device_name}, {runtime.precision}"
        )
        if self.start >= 0:
            self.say(f"resuming {self.config.run.out} after step {trainer.step}")

    def finish(self, trainer: Trainer, evaluation: Evaluation) -> None:
        """Writes what a complete run leaves, on the main process; the others are done after the weights."""
        with self.runtime.averaged_batchnorm(trainer.evaluated_model):
            if self.run_dir is not None:
                write_model(self.run_dir.path, trainer.evaluated_model, self.spec)
        if self.run_dir is None or self.checkpointer is None:
            return
        path = self.run_dir.path
        self.checkpointer.close()
        write_predictions(path, evaluation, trainer.data.evaluator.loader)
        summary = write_summary(path, evaluation, self._facts(trainer))
        write_model_card_or_say_why(path)
        self.tracker.finish(summary)
        report = write_report_or_say_why(path)
        self.run_dir.write_status("done", step=trainer.step, epoch=len(trainer.history))
        plain, tta = (f"{summary[name]:.2%}" for name in ("test_accuracy", "test_accuracy_tta"))
        counts = f"{evaluation.correct}/{evaluation.total} ({plain})"
        self.say(f"{summary['evaluation_split']} accuracy {counts}, {tta} with test-time augmentation")
        self.say(f"run directory: {path}" + (f"\nreport: {report}" if report else ""))

    def _facts(self, trainer: Trainer) -> dict[str, Any]:
        images = trainer.step * self.config.schedule.batch_size
        flops = training_flops(self.config, self.spec, steps=trainer.step, num_images=len(trainer.data.samples))
        unfinished = trainer.watch.read()  # the epoch that --max-steps has cut short
        seconds = sum(record["seconds"] for record in trainer.history) + unfinished
        hard = trainer.data.hard
        return {
            "evaluation_split": self.config.data.evaluation_split,
            "epochs": len(trainer.history),
            "steps": trainer.step,
            "world_size": self.runtime.world_size,
            "device": self.runtime.device_name,
            "precision": self.runtime.precision,
            "train_seconds": seconds + (hard.seconds if hard else 0.0),
            "train_pflops": flops / 1e15,
            "parameters": count_parameters(trainer.model),
            "images_per_second": images / seconds,
        }

    def finish_again(self) -> None:
        """Of a complete run: what it lacks because it was killed after its summary."""
        self.say(f"{self.config.run.out} is complete already: nothing to do")
        if self.run_dir is None or self.run_dir.status.get("state") == "done":
            return
        summary = self.run_dir.summary or {}
        write_model_card_or_say_why(self.run_dir.path)
        write_report_or_say_why(self.run_dir.path)
        self.run_dir.write_status("done", step=summary.get("steps", 0), epoch=summary.get("epochs", 0))

    def preempted(self) -> None:
        """Waits until the state is saved, and says so. Raises CheckpointError where it cannot be."""
        if self.checkpointer is not None:
            self.checkpointer.close()
        self._end("preempted", "asked to stop; go on with --resume")
        done = "nothing is saved yet" if self.trainer is None and self.start == FRESH else "the state is saved"
        self.say(f"asked to stop: {done}; go on with --resume")

    def failed(self, error: BaseException) -> None:
        """Never raises: the error that led here is to be seen."""
        try:
            if self.checkpointer is not None:
                self.checkpointer.close()
        except CheckpointError as other:
            print(f"error: {other}", file=sys.stderr, flush=True)
        try:
            self._end("failed", f"{type(error).__name__}: {error}")
        except OSError as other:
            print(f"warning: {other}", file=sys.stderr, flush=True)

    def _end(self, state: str, message: str) -> None:
        if self.run_dir is None:
            return
        step, epoch = (self.trainer.step, len(self.trainer.history)) if self.trainer else self.position
        self.run_dir.write_status(state, step=step, epoch=epoch, message=message)
        self.tracker.finish(None, failed=state == "failed")

    def close(self) -> None:
        """After a good end only: it waits for the other processes."""
        self.runtime.close()
