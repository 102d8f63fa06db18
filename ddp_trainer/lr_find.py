"""LR range test: `accelerate launch -m ddp_trainer.lr_find [RECIPE]` suggests a peak learning rate.

The learning rate rises by a constant factor per step, up to --end-lr or until the run diverges. A run diverges if the
smoothed loss exceeds four times its lowest value, or if a loss or gradient is not finite. The suggestion is a tenth of
the rate with the lowest smoothed loss (`report.loss_curve`).

The range test is from Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv 1506.01186, section 3.3).
The exponential rise is from Gugger, "How Do You Find A Good Learning Rate" (sgugger.github.io, 2018); fastai and
Lightning use it, too.

A step does the same as in a normal run, because `build_trainer` builds the same trainer. Only the schedule differs.
The trained network is discarded.
"""

import contextlib
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.augment_config import AugmentConfig
from data_prep.data_config import DataConfig
from data_prep.dataset import read_dataset, verify_dataset
from data_prep.errors import require
from data_prep.files import replace_file, write_json
from data_prep.streams import forgiving_output
from ddp_trainer.command_line import SMALLER_STEPS, parse_flags, program_name, run_command, take_recipe
from ddp_trainer.config import NetworkConfig, OptimConfig, RunConfig, RuntimeConfig, TrackingConfig, TrainConfig
from ddp_trainer.distributed.launch import check_machine
from ddp_trainer.distributed.process_end import exit_process
from ddp_trainer.distributed.process_settings import restored_settings
from ddp_trainer.distributed.runtime import Runtime
from ddp_trainer.distributed.signals import Preempted, StopRequest
from ddp_trainer.engine.build import build_trainer, prepare_network
from ddp_trainer.engine.metrics import Averages, averages
from ddp_trainer.engine.passes import resolve_passes
from ddp_trainer.engine.step_guard import NonFinite
from ddp_trainer.engine.trainer import Trainer
from ddp_trainer.report.figures import default_style
from ddp_trainer.report.loss_curve import LossCurve
from ddp_trainer.run.checks import check_settings
from ddp_trainer.run.lock import locked_folder
from ddp_trainer.schedule import ScheduleConfig
from ddp_trainer.tracking.console import print_line

# The fields of RangeTestConfig that TrainConfig has, too.
SHARED = ("recipe", "data", "augment", "network", "schedule", "optim", "runtime")


@dataclass(frozen=True, kw_only=True)
class RatesConfig:
    """The learning rates to try, and where to write the results."""

    out: Path | None = None
    """Folder for lr_find.png and lr_find.json; default: runs/lr_find-RECIPE-TIMESTAMP."""
    start_lr: float = 1e-5
    """Learning rate of the first step."""
    end_lr: float = 10.0
    """Learning rate of the last step, unless the loss diverges earlier."""
    steps: int = 100
    """Number of optimizer steps."""

    def __post_init__(self) -> None:
        require(
            0 < self.start_lr < self.end_lr < math.inf,
            f"--start-lr must be positive and below --end-lr, got {self.start_lr} and {self.end_lr}",
        )
        RunConfig(out=self.out)  # raises InputError if --out cannot be used
        require(self.steps >= 2, f"--steps must be at least 2, got {self.steps}")

    def at(self, step: int) -> float:
        """Learning rate at `step` (0-based)."""
        return self.start_lr * (self.end_lr / self.start_lr) ** (step / (self.steps - 1))


@dataclass(frozen=True, kw_only=True)
class RangeTestConfig:
    """The settings of the range test and of the recipe, without those of the run directory and the trackers.

    Of the schedule, only --batch-size, --accumulate and --train-size are used.
    """

    rates: RatesConfig = field(default_factory=RatesConfig)
    recipe: Annotated[str, tyro.conf.Suppress] = "custom"
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @classmethod
    def of(cls, recipe: TrainConfig) -> "RangeTestConfig":
        return cls(**{name: getattr(recipe, name) for name in SHARED})

    def as_train_config(self) -> TrainConfig:
        """The settings for the trainer, without small crops, --freeze-late, --max-steps and step records."""
        shared = {name: getattr(self, name) for name in SHARED}
        shared["schedule"] = replace(self.schedule, small_crops="", freeze_late="", max_steps=None)
        return TrainConfig(**shared, run=RunConfig(log_every_steps=0), tracking=TrackingConfig(wandb="disabled"))


def range_test(trainer: Trainer, rates: RatesConfig) -> LossCurve:
    """Trains with a rising learning rate until the last step, or until the loss diverges, and returns the losses.

    All ranks stop at the same step, because they compute the loss over the global batch. Raises Preempted if any rank
    was asked to stop.
    """
    peak_lr = trainer.config.optim.peak_lr
    trainer.share_of_peak = lambda step: rates.at(step) / peak_lr
    curve, sums = LossCurve(rates.steps), trainer.state.sums
    trainer.runtime.end_of_startup()
    try:
        for step in itertools.chain.from_iterable(trainer.steps(epoch) for epoch in itertools.count()):
            done = averages(trainer.runtime.sum_over_ranks(sums.values.clone()))
            sums.reset()
            if done.num_images:  # 0 in a skipped step; in fp16, steps are skipped until the loss scale is low enough
                curve.add(rates.at(step - 1), done.loss)
            if trainer.runtime.is_main and step % max(rates.steps // 10, 1) == 0:
                _show_progress(rates, step, done)
            if curve.diverged or step == rates.steps:
                break
        trainer.guard.skipped_steps()
    except NonFinite:  # a loss or gradient is infinite or NaN
        curve.diverged = True
    return curve


def _show_progress(rates: RatesConfig, step: int, done: Averages) -> None:
    loss = f"loss {done.loss:.4f}" if done.num_images else "skipped"
    print_line(f"step {step}/{rates.steps}  lr {rates.at(step - 1):.2e}  {loss}", sys.stderr)


def write_results(out: Path, curve: LossCurve, config: TrainConfig, runtime: Runtime) -> None:
    """Writes lr_find.json, then lr_find.png, and prints the suggestion."""
    suggested, others = curve.suggestion(), {}
    if suggested is not None:  # all rates rose together, so their ratios are those of the recipe
        rates = {"head_lr": config.optim.head_lr, "bias_lr": config.optim.bias_lr}
        others = {name: rate / config.optim.peak_lr * suggested for name, rate in rates.items() if rate is not None}
    content = {
        "suggested_lr": suggested,
        **{f"suggested_{name}": rate for name, rate in others.items()},
        "diverged": curve.diverged,
        "recipe": config.recipe,
        "batch_size": config.schedule.batch_size,
        "optimizer": config.optim.optimizer,
        "world_size": runtime.world_size,
        "learning_rates": curve.rates,
        "losses": curve.losses,
        "smoothed_losses": curve.smoothed,
    }
    write_json(out / "lr_find.json", content)
    replace_file(out / "lr_find.png", curve.draw(f"Learning rate range test, {config.recipe}"))
    flags = "".join(f" --{name.replace('_', '-')} {rate:g}" for name, rate in others.items())
    print_line(curve.advice() + flags, sys.stderr)
    print(json.dumps({"suggested_lr": suggested, "plot": str(out / "lr_find.png")}), flush=True)


def find_learning_rate(test: RangeTestConfig, stop: StopRequest) -> None:
    """Runs the range test and writes its results. Raises InputError for wrong input, before the first step."""
    config = test.as_train_config()
    launch = check_machine(config.runtime)
    dataset = read_dataset(config.data.data_dir)
    check_settings(config, dataset, world_size=launch.world_size)
    verify_dataset(config.data.data_dir, dataset, full=config.data.verify == "full")
    out = test.rates.out
    with contextlib.ExitStack() as stack:
        if launch.is_main:
            out = stack.enter_context(locked_folder(out, f"lr_find-{config.recipe}"))
        stack.enter_context(restored_settings())
        if launch.is_main:
            # This style is for the picture. It is set before the test, because `default_style` may raise InputError.
            stack.enter_context(default_style())
        runtime = Runtime(config.runtime, stop=stop)
        try:
            network, _ = prepare_network(config, dataset, world_size=runtime.world_size, load_weights=True)
            config = resolve_passes(config, runtime, dataset, network)
            curve = range_test(build_trainer(config, runtime, dataset, network=network), test.rates)
        except Preempted:
            if runtime.is_main:
                print_line("stopped: nothing was written", sys.stderr)
        else:
            if out is not None and runtime.is_main:
                write_results(out, curve, config, runtime)
        runtime.close()


def parse(argv: Sequence[str]) -> RangeTestConfig:
    recipe, arguments = take_recipe(argv)
    description = (
        "Find a good --peak-lr for a recipe: train with a rising learning rate, then write lr_find.png and "
        "lr_find.json. Of the schedule, only --batch-size, --accumulate and --train-size are used."
    )
    prog = f"{program_name('ddp_trainer.lr_find')} [RECIPE]"
    return parse_flags(
        RangeTestConfig, arguments, prog=prog, description=description, default=RangeTestConfig.of(recipe)
    )


@forgiving_output()  # before `listening`, whose pipe would otherwise take the place of a closed stdout or stderr
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 after success or a signal, 2 for wrong input, 1 after any other error."""
    stop = StopRequest()
    words = sys.argv[1:] if argv is None else argv

    def work() -> None:
        find_learning_rate(parse(words), stop)

    with stop.listening():
        return run_command(work, launched=True, memory_fix=SMALLER_STEPS)


def main_process() -> None:
    """Calls `main` and ends the process. Entry point of `python -m ddp_trainer.lr_find` and `ddp-lr-find`."""
    exit_process(main())


if __name__ == "__main__":
    main_process()
