"""The loop: a step, an epoch, a run. The only place where a step calls backward.

Ranks, tracking and saving arrive as arguments; what a step computes is decided here. The loop never waits for the
device within a step: everything the host reads of a step, it reads one step late.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from data_prep.augment import AugmentedBatch, split_batch
from data_prep.loader import Batch
from data_prep.watched_file import DatasetChanged
from ddp_trainer.config import TrainConfig
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import Preempted
from ddp_trainer.engine.data import RunData
from ddp_trainer.engine.ema import Ema
from ddp_trainer.engine.evaluation import Evaluation
from ddp_trainer.engine.loss import losses_per_image
from ddp_trainer.engine.metrics import averages
from ddp_trainer.engine.observer import Observer
from ddp_trainer.engine.optim import LearningRates, zero_momentum
from ddp_trainer.engine.skipped_step import describe_step
from ddp_trainer.engine.step_guard import NonFinite, nan_gradient_if_not_finite
from ddp_trainer.engine.step_log import StepLog
from ddp_trainer.engine.train_state import TrainState
from ddp_trainer.tracking.metric_files import Record


class Trainer:
    """One run on one rank, from its current step to its last. Build it with `engine.build.build_trainer`."""

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
        self.wrapped, wrapped_optimizer = runtime.prepare(self.model, optimizer)
        for side in config.schedule.crop_sides(data.evaluator.spec.image_size):
            runtime.warm_up(self.wrapped, self._blank_images(side))
        zero_momentum(optimizer)
        self.rates = LearningRates(optimizer)
        self.state = TrainState(self.model, wrapped_optimizer, ema, runtime, clip=self._clip_gradients)
        self.guard = self.state.guard
        self.steps_per_epoch = config.schedule.steps_per_epoch(len(data.samples))
        self.last_step = config.schedule.last_step(len(data.samples))
        self.step_log = StepLog(config.run.log_every_steps)
        self.share_of_peak: Callable[[int], float] = self._one_cycle

    @property
    def evaluated_model(self) -> nn.Module:
        return self.model if self.state.ema is None else self.state.ema.module

    def fit(self) -> Evaluation:
        """Trains to the last step; returns the last evaluation, with test-time augmentation.

        Raises Preempted, with the state saved, when any rank was asked to stop.
        """
        with self._reporting_the_end():
            try:
                self.runtime.stop.raise_if_asked()
                self.runtime.end_of_startup()
                evaluation = None
                for epoch in range(len(self.state.history), math.ceil(self.last_step / self.steps_per_epoch)):
                    self.train_epoch(epoch)
                    evaluation = self.finish_epoch(epoch)
                return evaluation or self.evaluate(tta=True)
            except (Preempted, DatasetChanged) as error:
                # One rank notices a changed file while others may be within a step, and saving is collective.
                if isinstance(error, Preempted) or self.runtime.world_size == 1:
                    self.save()  # raises NonFinite if the last steps must not be saved
                raise

    def train_epoch(self, epoch: int) -> None:
        """Takes the steps of `epoch` (0-based) from the current one to its end, or to the last step of the run."""
        before = epoch * self.steps_per_epoch
        progress = self.observer.progress
        progress.start(epoch + 1, self.config.schedule.epochs, self.steps_per_epoch, self.state.step - before)
        self.state.watch.start()
        for step in self.steps(epoch, until=self.last_step):
            self.observer.check()
            self.observer.step_done(step)
            progress.update(step - before, self._progress_values)
            if self._checkpoint_is_due():
                self.save()
        self.runtime.synchronize()
        self.state.watch.stop()
        progress.finish()

    def steps(self, epoch: int, *, until: int | None = None) -> Iterator[int]:
        """Takes the remaining steps of `epoch`, at most up to step `until`, and yields the number of steps done.

        Raises Preempted after the step in which any rank was asked to stop.
        """
        before = epoch * self.steps_per_epoch
        rows = slice(self.state.step - before, None if until is None else until - before)
        for batch, turns in self.data.batches(epoch, rows, config=self.config, runtime=self.runtime):
            self.runtime.stop.announce()
            self.train_step(batch, epoch, turns)
            self._log_step(epoch)
            if self.runtime.stop.agreed():
                raise Preempted
            yield self.state.step

    def train_step(self, batch: Batch, epoch: int, turns: Tensor | None = None) -> None:
        """One step, or none at all if the loss or a gradient is not finite; never waits. `turns`: as in `Order`."""
        side = self.config.schedule.crop_side(batch.images.size(2), epoch=epoch)
        augmented = self.data.augmenter(batch, epoch=epoch if turns is None else turns, side=side)
        self.rates.set(self.share_of_peak(self.state.step))
        with self.guard.attempt(self.state.step, batch.indices) as attempt:
            parts = list(split_batch(augmented, self.config.schedule.accumulate))
            for part in parts:  # gradients are averaged over the ranks in the last backward pass only
                with contextlib.nullcontext() if part is parts[-1] else self.runtime.no_sync(self.wrapped):
                    attempt.record(self._backward(part))
        if self.state.ema is not None:
            self.state.ema.update(self.model, skip=attempt.skipped)
        self.state.step += 1

    def _backward(self, part: AugmentedBatch) -> Tensor:
        """Adds this part's gradients, counts its images, and returns its losses, (N,)."""
        logits = self.wrapped(self.runtime.laid_out(part.images))
        losses = losses_per_image(
            logits,
            part.labels,
            part.partner_labels,
            part.label_weights,
            label_smoothing=self.config.optim.label_smoothing,
            class_weights=self.data.class_weights,
        )
        loss = losses.mean() / self.config.schedule.accumulate
        self.runtime.backward(nan_gradient_if_not_finite(loss))
        self.state.sums.add(losses.detach(), logits.detach().argmax(dim=1) == part.labels)
        return losses

    def finish_epoch(self, epoch: int) -> Evaluation:
        """Evaluation, record and checkpoint after the steps of `epoch`.

        An epoch that --max-steps cut short is saved as unfinished, so that a resumed run with more steps finishes it.
        """
        state = self.state
        cut_short = state.step < (epoch + 1) * self.steps_per_epoch
        if cut_short:
            self.save()
        skipped = self.guard.settle()
        self._flush_step_log()
        sums = self.runtime.sum_over_ranks(state.sums.values.clone())
        trained = averages(sums)
        evaluation = self.evaluate(tta=state.step >= self.last_step)
        seconds = state.watch.read()
        record: Record = {
            "epoch": epoch + 1,
            "step": state.step,
            "train_loss": trained.loss,
            "train_accuracy": trained.accuracy,
            "split": self.config.data.evaluation_split,
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
        self.observer.epoch_done(record)
        if not cut_short:
            self.save()
        return evaluation

    def evaluate(self, *, tta: bool = False) -> Evaluation:
        with self.runtime.averaged_batchnorm(self.evaluated_model):
            return self.data.evaluator.run(self.evaluated_model, tta=tta, poll=self.runtime.stop.raise_if_asked)

    def save(self) -> None:
        state = self.state.state_dict()
        self._flush_step_log()  # a resumed run does not take these steps again
        self.observer.save(state, step=self.state.step, epoch=len(self.state.history))

    def _checkpoint_is_due(self) -> bool:
        every, step = self.config.run.checkpoint_every_steps, self.state.step
        return bool(every) and step % every == 0 and step % self.steps_per_epoch != 0

    def _log_step(self, epoch: int) -> None:
        """Reports the pending record, and starts to copy the next one if it is due."""
        self._flush_step_log()
        step = self.state.step
        if self.step_log.is_due(step):
            sums = self.runtime.sum_over_ranks(self.state.sums.values.clone())
            position = {"epoch": epoch + 1, "step": step, "learning_rate": self._learning_rate(step - 1)}
            self.step_log.add(position, sums - self.state.logged_sums)
            self.state.logged_sums.copy_(sums)

    def _flush_step_log(self) -> None:
        record = self.step_log.take()
        if record is not None:
            self.observer.step_record(record)

    def _one_cycle(self, step: int) -> float:
        return self.config.schedule.one_cycle(step, steps_per_epoch=self.steps_per_epoch)

    def _learning_rate(self, step: int) -> float:
        return self.config.optim.peak_lr * self.share_of_peak(step)

    def _clip_gradients(self) -> None:
        if self.config.optim.clip_norm:
            self.runtime.clip_gradients(self.wrapped, self.config.optim.clip_norm)

    def _blank_images(self, side: int) -> Tensor:
        """A zero batch with the shape, dtype and memory format of one forward pass of this rank."""
        count = self.config.schedule.batch_size // self.config.schedule.accumulate // self.runtime.world_size
        dtype = next(self.model.parameters()).dtype
        images = torch.zeros(count, side, side, 3, dtype=dtype, device=self.runtime.device)
        return self.runtime.laid_out(images.permute(0, 3, 1, 2))

    def _progress_values(self) -> dict[str, float]:
        """Figures for the main rank's progress bar: those of its own images, so that drawing needs no other rank."""
        own = averages(self.state.sums.values)
        done = self.runtime.world_size * own.num_images
        return {
            "loss": own.loss,
            "accuracy": own.accuracy,
            "learning_rate": self._learning_rate(self.state.step - 1),
            "images_per_second": done / max(self.state.watch.read(), 1e-9),
        }

    @contextlib.contextmanager
    def _reporting_the_end(self) -> Iterator[None]:
        """Reports a NonFinite raised in the block to the observer, and always closes the progress display."""
        try:
            yield
        except NonFinite as error:
            attempt, epoch = self.guard.attempt_of(error), error.step // self.steps_per_epoch
            report = describe_step(attempt, self.runtime, epoch=epoch)
            self.observer.skipped(report, step=error.step + 1)
            raise
        finally:
            self.observer.progress.finish()  # the next message starts on a line of its own
