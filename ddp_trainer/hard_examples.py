"""Hard-example choice: each batch is the hardest part of a larger one, by the losses of a small network.

The small network is ours at a quarter of its width, and costs a sixteenth. It is trained first, through the whole
schedule, in the order and with the augmentation and the settings of the run, on what is hardest in each step by its own
losses; which images those were is all that is kept. After airbench96_faster (github.com/KellerJordan/cifar10-airbench),
whose small network learns in every fourth step only.

Chosen beforehand, the images of a step remain a plan: the run can be stopped, resumed and moved as any other. The
choice itself is made anew where it was interrupted. It takes all candidates of a step in one pass, whatever
`--accumulate`, and depends on the number of processes as BatchNorm's statistics do.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.dataset import DatasetInfo
from ddp_trainer.assembly import build_data, build_network, small_network
from ddp_trainer.config import RunConfig, TrainConfig
from ddp_trainer.engine import Observer, Trainer
from ddp_trainer.model import ModelSpec
from ddp_trainer.observer import SilentObserver
from ddp_trainer.optim import build_optimizer
from ddp_trainer.run_data import HardImages
from ddp_trainer.runtime import Runtime


def hardest(losses: Tensor, count: int) -> Tensor:
    """(N,) -> (N,) bool: the `count` highest; of equal ones the first, so that every rank finds the same."""
    order = losses.argsort(descending=True, stable=True)
    return torch.zeros_like(losses, dtype=torch.bool).index_fill_(0, order[:count], True)


class PassingOn(SilentObserver):
    """Progress and crashes are those of the run; epochs and states of the small network are not kept."""

    def __init__(self, observer: Observer) -> None:
        self.progress, self._observer = observer.progress, observer

    def crashed(self, report: dict[str, Any], *, step: int) -> None:
        self._observer.crashed(report, step=step)


class SmallTrainer(Trainer):
    """Trains on the `kept` hardest images of each step, and notes which they were."""

    def __init__(self, kept: int, *parts: Any) -> None:
        super().__init__(*parts)
        self.kept = kept
        self.marks: list[Tensor] = []
        self.seconds = 0.0

    def objective(self, losses: Tensor) -> Tensor:
        """Their mean. Ranks may have more of them or fewer, and the mean over ranks is DDP's to take."""
        ranks = self.runtime.gather(losses.detach())
        marks = hardest(ranks.flatten(), self.kept)
        self.marks.append(marks)
        own = marks.view_as(ranks)[self.runtime.rank]
        return (losses * own).sum() * self.runtime.world_size / self.kept

    def choose(self) -> HardImages:
        """Those of the whole schedule. Raises Preempted when any rank was asked to stop."""
        with self.telling():
            marks = torch.stack([self._choose_in(epoch) for epoch in range(self.config.schedule.epochs)])
        return HardImages(marks, self.seconds)

    def _choose_in(self, epoch: int) -> Tensor:
        self.marks.clear()
        self.train_epoch(epoch)
        self.guard.settle()
        self.seconds += self.watch.read()
        self.start_sums()
        return torch.from_numpy(np.packbits(torch.cat(self.marks).cpu().numpy()))


def choose_hard_images(
    config: TrainConfig, runtime: Runtime, dataset: DatasetInfo, spec: ModelSpec, observer: Observer
) -> HardImages:
    """Those of the run that `config` describes.

    A collective operation. Draws nothing from torch's generator, so the run's own network starts as it would without.
    """
    whole = replace(config.schedule, batch_size=config.schedule.candidates_per_step, candidates=1, accumulate=1,
                    max_steps=None)  # fmt: skip
    training = replace(config, schedule=whole, optim=replace(config.optim, ema_decay=0.0), run=RunConfig())
    small = small_network(spec)
    with torch.random.fork_rng(devices=[]):
        data = build_data(training, runtime, dataset, small)
        model = build_network(training.network, small)
    optimizer = build_optimizer(model, training.optim)
    trainer = SmallTrainer(config.schedule.batch_size, training, runtime, model, optimizer, data,
                           PassingOn(observer))  # fmt: skip
    return trainer.choose()
