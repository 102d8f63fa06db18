"""The training loop: steps, epochs and the whole run.

Processes, tracking and saving are left to the `Runtime` and the `Observer` that are passed in. Within a step, the host
waits only for the previous step, to read whether it was skipped. Exceptions: a step that captures a CUDA graph, the
first step in which the parameters of --freeze-late are frozen, and optimizers that are not fused. Between steps, the
host also waits for the device when it updates the progress display, saves a checkpoint or evaluates the model.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from data_prep.loader import Batch
from data_prep.watched_file import DatasetChanged
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import Preempted
from ddp_trainer.distributed.sync_batchnorm import averaged_batchnorm
from ddp_trainer.engine.data import RunData
from ddp_trainer.engine.device_step import DeviceStep
from ddp_trainer.engine.ema import Ema
from ddp_trainer.engine.evaluation import Evaluation
from ddp_trainer.engine.host_copy import HostCopy
from ddp_trainer.engine.metrics import averages
from ddp_trainer.engine.observer import Observer
from ddp_trainer.engine.optim import LearningRates, zero_momentum
from ddp_trainer.engine.save_schedule import SaveSchedule
from ddp_trainer.engine.skipped_step import report_failing_step
from ddp_trainer.engine.step_guard import Attempt
from ddp_trainer.engine.step_log import StepLog
from ddp_trainer.engine.train_state import TrainState
from ddp_trainer.tracking.metric_files import Record

LONGEST_ROUND = 5.0  # seconds of a round of `_wait_for_save`, after which the user is told why the run waits


class Trainer:
    """Trains on one rank, from the current step to the last one. Build it with `engine.build.build_trainer`."""

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: RunData,
        observer: Observer,
    ) -> None:
        self.config, self.runtime, self.data, self.observer = config, runtime, data, observer
        self.model = runtime.place(model)
        ema = Ema(self.model, decay=config.optim.ema_decay) if config.optim.ema_decay else None
        self.evaluated_model = self.model if ema is None else ema.module
        wrapped, wrapped_optimizer = runtime.prepare(self.model, optimizer, passes=config.schedule.passes)
        zero_momentum(optimizer)
        self.rates = LearningRates(optimizer)
        self.state = TrainState(self.model, wrapped_optimizer, ema, runtime, clip=self._clip_gradients)
        self.guard = self.state.guard
        schedule, num_images = config.schedule, len(data.samples)
        self.steps_per_epoch = schedule.steps_per_epoch(num_images)
        self.total_steps, self.last_step = schedule.total_steps(num_images), schedule.last_step(num_images)
        self.freeze_step = schedule.freeze_step(self.total_steps)
        self.saves = SaveSchedule(config, runtime, steps_per_epoch=self.steps_per_epoch, last_step=self.last_step)
        self.step_log = StepLog(config.run.log_every_steps, timeout=runtime.timeout)
        self.share_of_peak: Callable[[int], float] = self._one_cycle
        self.rates.set(1.0)  # also moves the rates to the device, where a captured graph will read them
        self.device_step = DeviceStep(config, runtime, self.state, wrapped, data, say=observer.progress.note)
        runtime.separate_generators()

    def fit(self) -> Evaluation:
        """Trains to the last step and returns the last evaluation, with test-time augmentation.

        If any rank is asked to stop, saves the state and raises Preempted.
        """
        with report_failing_step(self.guard, self.runtime, self.observer, steps_per_epoch=self.steps_per_epoch):
            try:
                self.runtime.stop.raise_if_asked()
                self.runtime.end_of_startup()
                evaluation = None
                for epoch in range(len(self.state.history), math.ceil(self.last_step / self.steps_per_epoch)):
                    self.train_epoch(epoch)
                    evaluation = self.finish_epoch(epoch)
                return evaluation or self.evaluate(tta=True)  # None if no epoch was left
            except (Preempted, DatasetChanged) as error:
                # Saving is collective, but other ranks may not have noticed that the dataset changed.
                if isinstance(error, Preempted) or self.runtime.world_size == 1:
                    self.save()  # raises NonFinite instead if a skipped step has to end the run
                raise

    def train_epoch(self, epoch: int) -> None:
        """Takes the remaining steps of `epoch` (0-based), at most up to the last step of the run."""
        before, first, schedule = epoch * self.steps_per_epoch, self.state.step, self.config.schedule
        steps, side = min(self.steps_per_epoch, self.total_steps - before), self.data.spec.image_size
        ends = {"last_step": self.last_step, "total_steps": self.total_steps}
        self.observer.progress.start(
            *(epoch + 1, math.ceil(schedule.epochs), steps, first - before),
            lambda step: schedule.work_left(side, step=before + step, **ends),
        )
        self.state.watch.start()
        for step in self.steps(epoch, until=self.last_step):
            self.observer.check()
            self.observer.step_done(step)
            self.observer.progress.update(step - before, self._progress_values)
            if self.saves.after_step(step):
                self.save()
        self.runtime.synchronize()
        self.state.watch.stop()
        self.observer.progress.finish()

    def steps(self, epoch: int, *, until: int | None = None) -> Iterator[int]:
        """Takes the remaining steps of `epoch`, at most up to step `until` of the run.

        After each step, yields the number of steps that the run has done. Raises Preempted after a step if any rank was
        asked to stop: see `StopAgreement`.
        """
        before = epoch * self.steps_per_epoch
        rows = slice(self.state.step - before, None if until is None else until - before)
        for batch, draws in self.data.batches(epoch, rows):
            self.runtime.stop.announce()
            self.train_step(batch, epoch, draws)
            self._log_step(epoch)
            must_stop = self.runtime.stop.agreed()
            yield self.state.step
            if must_stop:
                raise Preempted

    def train_step(self, batch: Batch, epoch: int, draws: Tensor | None = None) -> None:
        """Takes one step, or skips it if the loss or a gradient is not finite.

        `draws`: random bits from `Augmenter.draw`; default: those for `epoch`.
        """
        draws = self.data.augmenter.draw(batch.indices, epoch) if draws is None else draws
        step, total_steps, schedule = self.state.step, self.total_steps, self.config.schedule
        if step >= self.freeze_step:
            self._freeze_late()
        share = self.share_of_peak(step)
        self.rates.set(share, late=share * schedule.late_lr_factor(step, total_steps=total_steps))
        side = schedule.crop_side(batch.images.size(2), step=step, total_steps=total_steps)
        losses = self.device_step(batch, draws, side)
        self.guard.check_previous(Attempt(step, batch.indices, losses))
        self.state.step += 1

    def _freeze_late(self) -> None:
        side, first, total = self.data.spec.image_size, int(self.freeze_step), self.total_steps
        sides = {self.config.schedule.crop_side(side, step=step, total_steps=total) for step in range(first, total)}
        late = (group["params"] for group in self.state.optimizer.param_groups if group["late"])
        self.device_step.freeze(itertools.chain.from_iterable(late), sorted(sides))
        self.freeze_step = math.inf  # done

    def finish_epoch(self, epoch: int) -> Evaluation:
        """Evaluates the model, records the epoch, saves a checkpoint if one is due, and returns the evaluation.

        An epoch that --max-steps cuts short is saved before it is recorded, so that a run that is resumed with a larger
        --max-steps continues that epoch.
        """
        state = self.state
        cut_short = state.step < min((epoch + 1) * self.steps_per_epoch, self.total_steps)
        if cut_short:
            self.save()
        skipped = self.guard.skipped_steps()
        self._flush_step_log()
        sums = self.runtime.sum_over_ranks(state.sums.values.clone())
        trained, evaluation = averages(sums), self.evaluate(tta=state.step >= self.last_step)
        seconds = state.watch.read()
        record: Record = {
            "epoch": epoch + 1,
            "step": state.step,
            "train_loss": trained.loss,
            "train_accuracy": trained.accuracy,
            "split": self.config.data.evaluation_split,  # the images to which all `test_` entries refer
            "test_loss": evaluation.loss,
            "test_accuracy": evaluation.correct / evaluation.total,
            "test_correct": evaluation.correct,
            "test_total": evaluation.total,
            "learning_rate": self._learning_rate(state.step - 1),
            "seconds": seconds,
            "images_per_second": trained.num_images / seconds,
            "skipped_steps": skipped.this_epoch,
        }
        state.history.append(record)
        state.start_epoch(sums)
        if epoch == 1:  # --resume concludes from two recorded epochs that a checkpoint was saved
            self._wait_for_save()
        self.observer.epoch_done(record)
        if not cut_short and self.saves.after_epoch(state.step):
            self.save()
        return evaluation

    def evaluate(self, *, tta: bool = False) -> Evaluation:
        with self.averaged_batchnorm():
            return self.data.evaluator.run(self.evaluated_model, tta=tta, poll=self.runtime.stop.raise_if_asked)

    def averaged_batchnorm(self) -> contextlib.AbstractContextManager:
        """Within the context, BatchNorm of the evaluated model has running statistics over the images of all ranks."""
        weight = self.data.loader.batch_size * self.device_step.loss_weight  # own images / mean of all ranks
        return averaged_batchnorm(self.evaluated_model, self.runtime.sum_over_ranks, self.runtime.world_size, weight)

    def save(self) -> None:
        """Saves a checkpoint as soon as the previous one is on disk. A collective operation."""
        self._wait_for_save()
        state = self.state.state_dict()
        self._flush_step_log()  # now, because a resumed run does not repeat the steps of the pending record
        self.observer.save(state, step=self.state.step, epoch=len(self.state.history))
        self.saves.saved()

    def _wait_for_save(self) -> None:
        """Waits for the previous save in short rounds. After each round, all ranks meet."""
        # Only the main rank saves. The others wait for it in `all_agree`, at most for --process-group-timeout.
        seconds = min(self.runtime.timeout / 4, LONGEST_ROUND)
        while not self.runtime.all_agree(self.observer.wait_for_save(seconds=seconds)):
            pass

    def _log_step(self, epoch: int) -> None:
        """Reports the pending record and, if the next one is due, starts to copy it to the host."""
        self._flush_step_log()
        step = self.state.step
        if self.step_log.is_due(step):
            sums = self.runtime.sum_over_ranks(self.state.sums.values.clone())
            position = {"epoch": epoch + 1, "step": step, "learning_rate": self._learning_rate(step - 1)}
            self.step_log.add(position, sums - self.state.logged_sums)
            self.state.logged_sums.copy_(sums)

    def _flush_step_log(self) -> None:
        if (record := self.step_log.take()) is not None:
            self.observer.step_record(record)

    def _one_cycle(self, step: int) -> float:
        return self.config.schedule.one_cycle(step, total_steps=self.total_steps)

    def _learning_rate(self, step: int) -> float:
        return self.config.optim.peak_lr * self.share_of_peak(step)

    def _clip_gradients(self) -> None:
        if self.config.optim.clip_norm:
            self.runtime.clip_gradients(self.model, self.config.optim.clip_norm)

    def _progress_values(self) -> dict[str, float]:
        """Figures for the progress bar, computed from this rank's images, so that no other rank is involved."""
        # The read has a time limit, because the current step may wait for a process that has died.
        own = averages(HostCopy(self.state.sums.values).read(timeout=self.runtime.timeout))
        done = own.num_images * self.config.schedule.batch_size / self.data.loader.batch_size  # by all ranks
        return {
            "loss": own.loss,
            "accuracy": own.accuracy,
            "learning_rate": self._learning_rate(self.state.step - 1),
            "images_per_second": done / max(self.state.watch.read(), 1e-9),
        }
