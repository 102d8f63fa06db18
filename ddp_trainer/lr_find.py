"""`accelerate launch -m ddp_trainer.lr_find [RECIPE]`: how high the learning rate of a training may be.

The range test of Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv 1506.01186, section 3.3), in the
exponential form of Gugger, "How Do You Find A Good Learning Rate" (sgugger.github.io, 2018), which fastai and Lightning
have: from a rate that is too low to one that is too high by a constant factor per step, until the smoothed loss is
over four times its lowest. The suggestion is a tenth of the rate with the lowest smoothed loss (`loss_curve`).

The steps are the trainer's own, on the global batches of the recipe, with a fresh model that is thrown away.
"""

import itertools
import json
import math
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from data_prep.augment_config import AugmentConfig
from data_prep.errors import InputError, require
from ddp_trainer.assembly import build_data, build_network
from ddp_trainer.command_line import parse_flags, program_name, take_recipe
from ddp_trainer.config import DataConfig, NetworkConfig, OptimConfig, RuntimeConfig, TrainConfig
from ddp_trainer.engine import Trainer
from ddp_trainer.hardware import launch_environment
from ddp_trainer.loss_curve import LossCurve
from ddp_trainer.metrics import averages
from ddp_trainer.observer import SilentObserver
from ddp_trainer.optim import build_optimizer
from ddp_trainer.recipes import RECIPES
from ddp_trainer.run import TrainingRun
from ddp_trainer.rundir import replace_file, write_json
from ddp_trainer.schedule import ScheduleConfig
from ddp_trainer.signals import Preempted
from ddp_trainer.train import leave


@dataclass(frozen=True, kw_only=True)
class RangeConfig:
    """Which learning rates are tried."""

    out: Path | None = None
    """Folder for lr_find.png and lr_find.json; by default runs/lr_find-RECIPE-TIMESTAMP."""
    start_lr: float = 1e-5
    """Learning rate of the first step."""
    end_lr: float = 10.0
    """Learning rate of the last step, if the loss does not diverge before."""
    steps: int = 100
    """Optimizer steps from the first rate to the last."""

    def __post_init__(self) -> None:
        require(
            0 < self.start_lr < self.end_lr < math.inf,
            f"--start-lr {self.start_lr} --end-lr {self.end_lr}: give two numbers above 0, the lower first",
        )
        require(self.steps >= 2, f"--steps {self.steps}: give at least 2")

    def rate(self, step: int) -> float:
        """Of step `step`, counted from 0."""
        return self.start_lr * (self.end_lr / self.start_lr) ** (step / (self.steps - 1))


@dataclass(frozen=True, kw_only=True)
class RangeTestConfig:
    """A recipe without the settings of a run directory. Of the schedule only the batch size and its parts matter."""

    sweep: RangeConfig = field(default_factory=RangeConfig)
    recipe: Annotated[str, tyro.conf.Suppress] = "custom"
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @classmethod
    def of(cls, recipe: TrainConfig) -> "RangeTestConfig":
        return cls(recipe=recipe.recipe, data=recipe.data, augment=recipe.augment, network=recipe.network,
                   schedule=recipe.schedule, optim=recipe.optim, runtime=recipe.runtime)  # fmt: skip

    def training(self) -> TrainConfig:
        whole_images = replace(self.schedule, small_crop_fraction=0.0)  # it would see small crops only
        return TrainConfig(recipe=self.recipe, data=self.data, augment=self.augment, network=self.network,
                           schedule=whole_images, optim=self.optim, runtime=self.runtime)  # fmt: skip


class RangeTrainer(Trainer):
    """The trainer, its learning rate taken from the sweep instead of the schedule."""

    def __init__(self, sweep: RangeConfig, *parts: Any) -> None:
        super().__init__(*parts)
        self.sweep = sweep

    def learning_rate(self, step: int) -> float:
        return self.sweep.rate(step)

    def run(self) -> LossCurve:
        """Steps until the last rate or until the loss diverges, which all ranks see at the same step: the loss is that
        of the global batch. Raises Preempted when any rank was asked to stop."""
        self.runtime.end_of_startup()
        curve, refused = LossCurve(self.sweep.steps), 0
        for epoch in itertools.count():
            for batch in self.data.loader.batches(self.plan(epoch)):
                self.runtime.announce_stop()
                self.sums.reset()
                self.train_step(batch, epoch)
                done = averages(self.runtime.sum_over_ranks(self.sums.values.clone()))
                refused = 0 if done.num_images else refused + 1  # a refused step has counted no image
                loss = math.nan if refused else done.loss
                if refused in (0, self.guard.patience):  # fewer in a row are fp16's search for its loss scale
                    curve.add(self.learning_rate(self.step - 1), loss)
                if self.runtime.stop_agreed():
                    raise Preempted
                self._tell(loss)
                if curve.diverged or self.step == self.sweep.steps:
                    return curve
        raise AssertionError("an endless count has ended")

    def _tell(self, loss: float) -> None:
        if self.runtime.is_main and self.step % max(self.sweep.steps // 10, 1) == 0:
            print(f"step {self.step}/{self.sweep.steps}  lr {self.learning_rate(self.step - 1):.2e}  loss {loss:.4f}",
                  file=sys.stderr, flush=True)  # fmt: skip


class RangeTest(TrainingRun):
    """The checks, data and processes of a training, without its run directory."""

    def __init__(self, config: RangeTestConfig) -> None:
        self.sweep = config.sweep
        self.out = config.sweep.out or Path("runs") / f"lr_find-{config.recipe}-{datetime.now():%Y%m%d-%H%M%S}"
        super().__init__(config.training())

    def _claim(self) -> None:
        """A folder for the two files. A run that is there is not touched."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.out}: cannot be written ({error.strerror}); name another folder") from None
        require(os.access(self.out, os.W_OK), f"--out {self.out}: cannot be written; name another folder")

    def measure(self) -> LossCurve:
        data = build_data(self.config, self.runtime, self.dataset, self.spec)
        model = build_network(self.config.network, self.spec)
        optimizer = build_optimizer(model, self.config.optim)
        return RangeTrainer(self.sweep, self.config, self.runtime, model, optimizer, data, SilentObserver()).run()

    def write(self, curve: LossCurve) -> None:
        """lr_find.png, then lr_find.json, on the main process; says what is suggested."""
        if not self.runtime.is_main:
            return
        picture = curve.draw(f"Learning rate range test, {self.config.recipe}")
        replace_file(self.out / "lr_find.png", picture)
        suggested, optim = curve.suggestion(), self.config.optim
        suggestion, others = {"suggested_lr": suggested}, {}
        if suggested is not None:  # those set apart were tried in step with it
            set_apart = {name: getattr(optim, name) for name in ("head_lr", "bias_lr") if getattr(optim, name)}
            others = {name: rate / optim.peak_lr * suggested for name, rate in set_apart.items()}
        write_json(self.out / "lr_find.json", {
            **suggestion,
            **{f"suggested_{name}": rate for name, rate in others.items()},
            "diverged": curve.diverged,
            "recipe": self.config.recipe,
            "batch_size": self.config.schedule.batch_size,
            "optimizer": self.config.optim.optimizer,
            "world_size": self.runtime.world_size,
            "learning_rates": curve.rates,
            "losses": curve.losses,
            "smoothed_losses": curve.smoothed,
        })  # fmt: skip
        self.say(curve.advice() + "".join(f" --{name.replace('_', '-')} {rate:g}" for name, rate in others.items()))
        print(json.dumps({**suggestion, "plot": str(self.out / "lr_find.png")}), flush=True)


def parse(argv: Sequence[str]) -> RangeTestConfig:
    recipe, arguments = take_recipe(argv, RECIPES)
    description = (
        "Learning rate range test of a recipe: writes lr_find.png and lr_find.json. Of the schedule only --batch-size "
        "and --accumulate count."
    )
    prog = f"{program_name('ddp_trainer.lr_find')} [RECIPE]"
    return parse_flags(
        RangeTestConfig, arguments, prog=prog, description=description, default=RangeTestConfig.of(recipe)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """0: written, or asked to stop; 2: the input is wrong; 1: anything else."""
    try:
        test = RangeTest(parse(sys.argv[1:] if argv is None else argv))
        try:
            test.write(test.measure())
        except Preempted:
            test.say("asked to stop: nothing is written")
        test.close()
    except InputError as error:
        if launch_environment()[1] == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
