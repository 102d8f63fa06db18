"""The loop: train_step, train_epoch, evaluate, fit. The only place where a step calls backward.

Ranks, tracking and saving arrive as arguments; what a step computes is decided here.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.augment import Augmented, split
from data_prep.loader import Batch
from data_prep.order import train_batches
from ddp_trainer.config import TrainConfig
from ddp_trainer.console import Progress
from ddp_trainer.crash import RecentSteps
from ddp_trainer.ema import Ema
from ddp_trainer.evaluate import Evaluation
from ddp_trainer.metrics import RunningSums, Stopwatch, averages, losses_per_image
from ddp_trainer.nonfinite import FP16_PATIENCE, NonFinite, StepGuard, felt_by_all, step_unless
from ddp_trainer.optim import set_learning_rate, zero_momentum
from ddp_trainer.run_data import RunData
from ddp_trainer.runtime import Runtime
from ddp_trainer.signals import Preempted
from ddp_trainer.training_state import capture_state

Record = dict[str, float | int]


class Observer(Protocol):
    """Who is told what happens. On silent ranks it does nothing."""

    progress: Progress

    def epoch_done(self, record: Record) -> None: ...

    def save(self, state: dict[str, Any], *, step: int, epoch: int) -> None: ...

    def check(self) -> None:
        """Raises what went wrong in the background since the last call."""

    def crashed(self, report: dict[str, Any], *, step: int) -> None: ...


class Trainer:
    """Model, optimizer and position of one run on one rank."""

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
        self.ema = Ema(self.model, decay=config.optim.ema_decay) if config.optim.ema_decay else None
        self.wrapped, self.optimizer = runtime.prepare(self.model, optimizer)
        for side in config.schedule.crop_sides(data.evaluator.spec.image_size):
            runtime.warm_up(self.wrapped, self._blank_images(side))
        self.bare_optimizer = optimizer
        zero_momentum(optimizer)
        self.steps_per_epoch = config.schedule.steps_per_epoch(len(data.samples))
        self.last_step = config.schedule.last_step(len(data.samples))
        self.step = 0
        self.history: list[Record] = []
        self.sums = RunningSums(runtime.device)
        patience = 1 if runtime.scaler is None else FP16_PATIENCE
        self.guard = StepGuard(self.model, [self.sums.values], patience=patience)
        self.recent = RecentSteps()
        self.watch = Stopwatch()

    def _blank_images(self, side: int) -> Tensor:
        """As many as this rank's forward pass takes, as the network sees images."""
        count = self.config.schedule.batch_size // self.config.schedule.accumulate // self.runtime.world_size
        dtype = next(self.model.parameters()).dtype
        images = torch.zeros(count, side, side, 3, dtype=dtype, device=self.runtime.device)
        return self.runtime.laid_out(images.permute(0, 3, 1, 2))

    def learning_rate(self, step: int) -> float:
        """Of step `step`, counted from 0."""
        return self.config.optim.peak_lr * self.config.schedule.one_cycle(step, steps_per_epoch=self.steps_per_epoch)

    @property
    def evaluated_model(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.module

    def fit(self) -> Evaluation:
        """Trains from where the run stands to its last step; returns the last evaluation, with test-time augmentation.

        Raises Preempted, with the state saved, when any rank was asked to stop.
        """
        with self.telling():
            return self._fit()

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """The observer is told how what is done within ends."""
        try:
            yield
        except NonFinite as error:
            self.observer.crashed(self.recent.describe(error.step, self.runtime), step=error.step + 1)
            raise
        finally:
            self.observer.progress.finish()  # what is said next begins on a line of its own

    def _fit(self) -> Evaluation:
        try:
            self.runtime.stop_if_asked()
            self.runtime.end_of_startup()
            evaluation = None
            for epoch in range(len(self.history), math.ceil(self.last_step / self.steps_per_epoch)):
                self.train_epoch(epoch)
                evaluation = self.finish_epoch(epoch)
            return evaluation or self.evaluate(tta=True)
        except Preempted:
            self.save()  # raises NonFinite where the last steps must not be saved
            raise

    def train_epoch(self, epoch: int) -> None:
        """Steps of `epoch` (from 0) from the current position to its end or to the last step of the run."""
        first = self.step - epoch * self.steps_per_epoch
        last = min(self.last_step - epoch * self.steps_per_epoch, self.steps_per_epoch)
        progress = self.observer.progress
        progress.start(epoch + 1, self.config.schedule.epochs, self.steps_per_epoch, first)
        self.watch.start()
        for batch in self.data.loader.batches(self.plan(epoch)[first:last]):
            self.runtime.announce_stop()
            self.train_step(batch, epoch)
            self.guard.after_step(self.step - 1)
            self.observer.check()
            progress.update(self.step - epoch * self.steps_per_epoch, self._progress_values)
            if self.runtime.stop_agreed():
                raise Preempted
            if self._checkpoint_is_due():
                self.save()
        self.runtime.synchronize()
        self.watch.stop()
        progress.finish()

    def plan(self, epoch: int) -> np.ndarray:
        """(steps, images of this rank in a step) sample indices."""
        order, runtime = self.data.order(seed=self.config.runtime.seed, epoch=epoch), self.runtime
        size = self.config.schedule.batch_size
        return train_batches(order, batch_size=size, rank=runtime.rank, world_size=runtime.world_size)

    def train_step(self, batch: Batch, epoch: int) -> None:
        """One optimizer step, or none if loss or gradient are not finite. Nothing in it waits for the device."""
        side = self.config.schedule.crop_side(batch.images.size(2), epoch=epoch)
        augmented = self.data.augmenter(batch, epoch=epoch, side=side)
        set_learning_rate(self.optimizer, self.learning_rate(self.step))
        self.recent.begin(self.step, epoch, batch.indices)
        self.guard.begin()
        parts = list(split(augmented, self.config.schedule.accumulate))
        for part in parts[:-1]:
            with self.runtime.no_sync(self.wrapped):
                self._forward_backward(part, len(parts))
        self._forward_backward(parts[-1], len(parts))
        refused = self.guard.judge()
        if self.config.optim.clip_norm:
            self.runtime.clip_gradients(self.wrapped, self.config.optim.clip_norm)
        if self.runtime.scaler is None:
            step_unless(refused, self.optimizer, self.bare_optimizer)
        else:
            self.optimizer.step()  # the gradient scaler refuses the same steps, and lowers its scale
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, skip=refused)
        self.step += 1

    def _forward_backward(self, part: Augmented, num_parts: int) -> None:
        logits = self.wrapped(self.runtime.laid_out(part.images))
        losses = losses_per_image(
            logits, part.labels, part.partner_labels, part.label_weights,
            label_smoothing=self.config.optim.label_smoothing,
        )  # fmt: skip
        self.runtime.backward(felt_by_all(self.objective(losses) / num_parts))
        self.sums.add(losses.detach(), logits.detach().argmax(dim=1) == part.labels)
        self.recent.add(losses.detach())

    def objective(self, losses: Tensor) -> Tensor:
        """What a step descends, from the losses (N,) of this rank's images."""
        return losses.mean()

    def finish_epoch(self, epoch: int) -> Evaluation:
        """Evaluation, record and checkpoint after the steps of `epoch`.

        An epoch that --max-steps cut short is saved as unfinished: with more steps, a resumed run goes on within it.
        """
        cut_short = self.step < (epoch + 1) * self.steps_per_epoch
        if cut_short:
            self.save()
        _, skipped_steps = self.guard.settle()
        trained = averages(self.runtime.sum_over_ranks(self.sums.values.clone()))
        evaluation = self.evaluate(tta=self.step >= self.last_step)
        seconds = self.watch.read()
        record: Record = {
            "epoch": epoch + 1,
            "step": self.step,
            "train_loss": trained.loss,
            "train_accuracy": trained.accuracy,
            "test_loss": evaluation.loss,
            "test_accuracy": evaluation.correct / evaluation.total,
            "test_correct": evaluation.correct,
            "test_total": evaluation.total,
            "learning_rate": self.learning_rate(self.step - 1),
            "seconds": seconds,
            "images_per_second": trained.num_images / seconds,
            "skipped_steps": skipped_steps,
        }
        self.history.append(record)
        self.start_sums()
        self.observer.epoch_done(record)
        if not cut_short:
            self.save()
        return evaluation

    def start_sums(self) -> None:
        """Loss, hits, seconds and skipped steps are those of an epoch."""
        self.watch = Stopwatch()
        self.sums.reset()
        self.guard.start_epoch()

    def evaluate(self, *, tta: bool = False) -> Evaluation:
        with self.runtime.averaged_batchnorm(self.evaluated_model):
            return self.data.evaluator.run(self.evaluated_model, tta=tta, poll=self.runtime.stop_if_asked)

    def _progress_values(self) -> dict[str, float]:
        """For the bar of the main rank: its own images only, so that drawing needs no other rank."""
        own = averages(self.sums.values)
        done = self.runtime.world_size * own.num_images
        return {
            "loss": own.loss,
            "accuracy": own.accuracy,
            "learning_rate": self.learning_rate(self.step - 1),
            "images_per_second": done / max(self.watch.read(), 1e-9),
        }

    def _checkpoint_is_due(self) -> bool:
        every = self.config.run.checkpoint_every_steps
        return bool(every) and self.step % every == 0 and self.step % self.steps_per_epoch != 0

    def save(self) -> None:
        self.observer.save(capture_state(self), step=self.step, epoch=len(self.history))
